# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a conversion costs at full size, in every direction: `python benchmarks/conversion_cost.py`.

Random weights in the original DINOv2 layout go in, out to the layouts of DINOv2, transformers and timm, and in again
from the latter two. The bound is 1.3 times the checkpoint's bytes plus 1 GB of memory, and the time to read the file
twice beside that of the comparison. Needs four times the checkpoint's size on the disk.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from timing import save


REPOSITORY = Path(__file__).parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]


def write_checkpoint(arch: str, path: Path) -> None:
    from test_conversion_checkpoints import published_checkpoint

    torch.save(published_checkpoint(arch), path)


def run(*arguments: object) -> tuple[float, int]:
    """Seconds and peak resident bytes, mapped files included, of `convert.py` in a process of its own."""
    command = [sys.executable, REPOSITORY / "conversion" / "convert.py", *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} failed.")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def seconds_to_read(path: Path) -> float:
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        block = bytearray(2**24)
        while file.readinto(block):
            pass
    return time.perf_counter() - started


def largest(folder: Path) -> Path:
    """The file with the weights."""
    return max((path for path in [folder, *folder.glob("*")] if path.is_file()), key=lambda path: path.stat().st_size)


def main(arch: Annotated[str, typer.Option(help="A DINOv2 architecture.")] = "vitg14_reg4"):
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original, ours = folder / "original.pth", folder / "vitreg"
        write_checkpoint(arch, original)
        steps = {
            "dinov2": (original, ours, []),
            "to-dinov2": (ours, folder / "out.pth", []),
            "to-transformers": (ours, folder / "transformers", []),
            "transformers": (folder / "transformers", folder / "back", []),
            "to-timm": (ours, folder / "timm", []),
            "timm": (folder / "timm", folder / "back", ["--overwrite"]),
        }
        for step, (source, target, options) in steps.items():
            weights = largest(source)
            reading = seconds_to_read(weights)
            seconds, peak = run(step, source, target, *options)
            record = target / "conversion.json"
            comparison = json.loads(record.read_text()).get("comparison_seconds") if record.exists() else None
            size = weights.stat().st_size
            rows[step] = {
                "checkpoint_gb": size / 1e9,
                "peak_gb": peak / 1e9,
                "allowed_gb": 1.3 * size / 1e9 + 1,
                "seconds": seconds,
                "seconds_to_read": reading,
                "comparison_seconds": comparison,
            }
            Console().print(step, rows[step])
    table = Table("", *next(iter(rows.values())), title=f"Conversion of {arch}, random float32 weights")
    for step, row in rows.items():
        table.add_row(step, *("" if value is None else f"{value:.1f}" for value in row.values()))
    Console().print(table)
    save(f"conversion_cost_{arch}", torch.device("cpu"), arch=arch, steps=rows)


if __name__ == "__main__":
    typer.run(main)
