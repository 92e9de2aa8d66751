# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Fair timing: all candidates alternate in one process, in another order every round, and ratios are within rounds."""

import datetime
import json
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hf_vitreg.machine import describe_machine


RESULTS = Path(__file__).parent / "results"


def alternate(
    candidates: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after two rounds that do not count."""
    order, seconds = list(candidates), {name: [] for name in candidates}
    generator = random.Random(0)
    for round_index in track(range(rounds + 2), description="timing", transient=True):
        generator.shuffle(order)
        for name in order:
            _wait_for(device)
            started = time.perf_counter()
            candidates[name]()
            _wait_for(device)
            if round_index >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(seconds: dict[str, list[float]], ours: str = "hf_vitreg") -> dict[str, dict[str, float]]:
    """Median milliseconds, and how many times faster ours is: the median over rounds, with its quartiles."""
    rows = {}
    for name, values in seconds.items():
        ratios = sorted(theirs / own for theirs, own in zip(values, seconds[ours]))
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "median_ms": statistics.median(values) * 1e3,
            "ratio_to_ours": middle,
            "ratio_quartiles": [low, high],
        }
    return rows


def show(title: str, rows: dict[str, dict[str, float]], ratio: str = "ours is faster by") -> None:
    """The summary as a table; `ratio` says what the ratio is."""
    table = Table("", "median ms", ratio, "quartiles", title=title)
    for name, row in rows.items():
        low, high = row["ratio_quartiles"]
        table.add_row(name, f"{row['median_ms']:.1f}", f"{row['ratio_to_ours']:.3f}x", f"{low:.3f} to {high:.3f}")
    Console().print(table)


def save(name: str, device: torch.device, **measured: object) -> None:
    """Writes `results/NAME.json` with the machine, the date and the command."""
    RESULTS.mkdir(exist_ok=True)
    record = {
        "machine": describe_machine(device),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        **measured,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
