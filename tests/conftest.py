# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What every test gets: the same seed, one thread, torch's own matmul, and no way out to the network."""

import huggingface_hub.constants
import pytest
import torch


# models of these sizes win nothing by a second thread, and on a busy machine wait for it ten times as long
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def default_matmul():
    """The scripts choose for their process, and tests of exactness run in it too."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The constant and not the environment: processes that a test starts may speak to a Hub on this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
