# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Fair timing: all candidates alternate in one process, in another order every round, and ratios are within rounds."""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.console import Console
from rich.progress import track


WARM_UP_ROUNDS = 2


def alternate(
    candidates: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, progress: bool = True
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round, after two rounds that do not count.

    Args:
        candidates: What is timed, by name.
        rounds: That count, 2 or more: quartiles need as many.
        device: That they compute on; a GPU has to have done what it was asked for.
        progress: Show a bar on stderr.

    Raises:
        ValueError: for too few rounds.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be 2 or more, got {rounds}: a single one says nothing of how times scatter.")
    order, seconds = list(candidates), {name: [] for name in candidates}
    generator, console = random.Random(0), Console(stderr=True)
    numbers = range(-WARM_UP_ROUNDS, rounds)
    for number in track(numbers, "timing", transient=True, console=console, disable=not progress):
        generator.shuffle(order)
        for name in order:
            _wait_for(device)
            started = time.perf_counter()
            candidates[name]()
            _wait_for(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The median over rounds of the ratio within a round, and its quartiles."""
    low, middle, high = statistics.quantiles([above / below for above, below in zip(numerators, denominators)], n=4)
    return middle, (low, high)


def summary(seconds: Mapping[str, Sequence[float]], ours: str = "hf_vitreg") -> dict[str, dict]:
    """Median milliseconds, and how many times faster ours is: the median over rounds, with its quartiles."""
    rows = {}
    for name, values in seconds.items():
        middle, quartiles = ratio(values, seconds[ours])
        rows[name] = {
            "median_ms": statistics.median(values) * 1e3,
            "ratio_to_ours": middle,
            "ratio_quartiles": list(quartiles),
        }
    return rows
