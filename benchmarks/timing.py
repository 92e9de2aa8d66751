# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What benchmarks do with what they measured: a table, and a JSON file."""

import datetime
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hf_vitreg.deployment.speed import COLUMNS, Limit, Speed
from hf_vitreg.machine import describe_machine


RESULTS = Path(__file__).parent / "results"


def show(title: str, rows: dict[str, dict[str, float]], ratio: str = "ours is faster by") -> None:
    """The summary as a table; `ratio` says what the ratio is."""
    table = Table("", "median ms", ratio, "quartiles", title=title)
    for name, row in rows.items():
        low, high = row["ratio_quartiles"]
        table.add_row(name, f"{row['median_ms']:.1f}", f"{row['ratio_to_ours']:.3f}x", f"{low:.3f} to {high:.3f}")
    Console().print(table)


def show_speeds(
    title: str,
    speeds: Mapping[str, Speed],
    limits: Mapping[str, Limit],
    bars: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Speeds as a table, with the `bars` that some of their fields are to reach."""
    console = Console()
    for name, limit in limits.items():
        console.print(f"matmul limit, {name}: {limit}", highlight=False)
    table = Table("", *COLUMNS, "quartiles of times faster", "bars", title=title)
    for name, speed in speeds.items():
        reached = [
            f"{field} {bar}: {'reached' if getattr(speed, field) >= bar else 'missed'}"
            for field, bar in (bars or {}).get(name, {}).items()
        ]
        low, high = speed.times_faster_quartiles
        table.add_row(name, *speed.cells(), f"{low:.2f} to {high:.2f}", ", ".join(reached))
    console.print(table)


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
