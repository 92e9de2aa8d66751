# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Runs of finetune.py and pretrain.py, in this process and in others."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import safetensors.torch
import torch


ROOT = Path(__file__).parents[1]
KILL_WHILE_SAVING = """
import importlib, os, signal, sys
import accelerate, torch

script = importlib.import_module(sys.argv[1])
script.share_cores = lambda: torch.set_num_threads(1)
save_state, saves = accelerate.Accelerator.save_state, []

def killed_in_the_second(self, folder):
    saves.append(folder)
    save_state(self, folder)
    if len(saves) == 2:
        os.remove(folder / "optimizer.bin")
        os.kill(os.getpid(), signal.SIGKILL)

accelerate.Accelerator.save_state = killed_in_the_second
script.main(sys.argv[2:])
"""
WITH_ARGUMENTS = """
import importlib, json, os
import torch

script = importlib.import_module(os.environ["SCRIPT"])
script.share_cores = lambda: torch.set_num_threads(1)
script.main(json.loads(os.environ["ARGUMENTS"]))
"""


def one_thread() -> None:
    """Sums have one order, and threads do not wait for each other where the tensors are tiny."""
    torch.set_num_threads(1)


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(output_dir) / "model.safetensors")


def assert_equal_weights(first: Path, second: Path) -> None:
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def client_environment(tmp_path: Path) -> dict[str, str]:
    """Of a process that runs a script on the CPU, with nothing of this machine's cache."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    own = {"PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def killed_in_the_second_save(script: str, arguments: list[str], tmp_path: Path) -> set[str]:
    """Runs a script until it is killed within its second checkpoint; what is in `run/checkpoints` then."""
    command = [sys.executable, "-c", KILL_WHILE_SAVING, script, *arguments, "--output_dir", str(tmp_path / "run")]
    killed = subprocess.run(command, env=client_environment(tmp_path), cwd=tmp_path, capture_output=True, timeout=240)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    return {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
