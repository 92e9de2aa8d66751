# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch

from hf_vitreg.deployment import speed
from hf_vitreg.deployment.matmul_limit import Product
from hf_vitreg.deployment.speed import COLUMNS, Candidate, Limit, measure_speed


def test_speeds_are_those_of_rounds(monkeypatch):
    """By hand: the machine is half as fast in the last round, and neither ratio nor fraction shows it."""
    product = Product("a library", (10, 10, 5), torch.bfloat16, lambda: None, seconds=0.025)
    monkeypatch.setattr(speed, "fastest_product", lambda device, dtype: product)
    seconds = {"plain": [6.0, 6.0, 12.0], "fast": [2.0, 2.0, 4.0], "products of bfloat16": [4.0, 4.0, 8.0]}
    turns = {}

    def alternate(candidates, rounds, device, progress):
        turns.update(candidates)
        return seconds

    monkeypatch.setattr(speed, "alternate", alternate)
    candidates = {name: Candidate(lambda: None, torch.bfloat16) for name in ("plain", "fast")}
    speeds, limits = measure_speed(candidates, "plain", 400.0, 8, 3, torch.device("cpu"))
    assert list(turns) == list(seconds)
    # two products of 1000 operations take a turn of 4 seconds: 500 a second
    assert limits == {"bfloat16": Limit(5e-7, "a library, 10x10x5")}
    fast = speeds["fast"]
    assert (fast.median_ms, fast.images_per_second, fast.gflops) == (2000.0, 4.0, 2e-7)
    assert (fast.times_faster, fast.times_faster_quartiles) == (3.0, (3.0, 3.0))
    assert fast.fraction_of_limit == pytest.approx(0.4)
    assert speeds["plain"].fraction_of_limit == pytest.approx(0.4 / 3)
    assert len(fast.cells()) == len(COLUMNS)
