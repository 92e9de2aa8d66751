# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a test's function gives in two processes that talk to each other."""

import os
import subprocess
import sys
from pathlib import Path

import torch


SCRIPT = """
import importlib, os, sys
import torch
import torch.distributed as dist

module, function, folder = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
found = getattr(importlib.import_module(module), function)(dist.get_rank(), 2)
torch.save(found, f"{folder}/{dist.get_rank()}.pt")
dist.barrier()
dist.destroy_process_group()
# not through the interpreter's end: a thread of gloo that wakes there takes the process down with SIGABRT
os._exit(0)
"""


def results_of_two(module: str, function: str, folder: Path) -> list[dict]:
    """What `function(rank, num_processes)` of a test module returns in each of two processes that torchrun starts."""
    tests = Path(__file__).parent
    (folder / "both.py").write_text(SCRIPT)
    python_path = os.pathsep.join([str(tests), str(tests.parent / "src")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(folder / "both.py"), module, function, str(folder)],
        env=os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
