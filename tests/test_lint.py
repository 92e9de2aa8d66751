# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""ruff over the repository, and transformers' own linter over the model files."""

import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "--no-cache", "."],
        ["ruff", "format", "--check", "--no-cache", "."],
        ["mlinter", "--no-progress", "--no-cache", "src/hf_vitreg"],
    ],
    ids=["ruff check", "ruff format", "mlinter"],
)
def test_linter_has_nothing_to_say(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mlinter_would_see_a_violation(tmp_path):
    for name in ("configuration_vitreg.py", "modeling_vitreg.py"):
        source = (REPOSITORY / "src/hf_vitreg" / name).read_text()
        (tmp_path / name).write_text(source.replace("# CODEPATH:", "#"))
    command = [sys.executable, "-m", "mlinter", "--no-progress", "--no-cache", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "TRF041" in done.stdout + done.stderr
