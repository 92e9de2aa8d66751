# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import platform

import torch

from hf_vitreg.machine import describe_machine, package_versions


def test_machine_is_described_with_its_cores_and_torch():
    text = describe_machine(torch.device("cpu"))
    assert " of " in text and torch.__version__ in text


def test_versions_are_those_that_run():
    versions = package_versions()
    assert versions["python"] == platform.python_version() and torch.__version__.startswith(versions["torch"])
