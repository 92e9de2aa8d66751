# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest

from hf_vitreg.training.schedules import warmup_cosine


def value(step, total=110, warmup=10):
    return warmup_cosine(step, total, warmup, start=0.0, peak=2.0, end=0.5)


def test_known_points():
    assert [value(step) for step in (0, 5, 10, 110)] == pytest.approx([0.0, 1.0, 2.0, 0.5])
    assert value(60) == pytest.approx((2.0 + 0.5) / 2)  # half of a cosine is half of the way
    assert value(500) == pytest.approx(0.5)


def test_rises_then_falls():
    values = [value(step) for step in range(111)]
    assert values[:11] == sorted(values[:11]) and values[10:] == sorted(values[10:], reverse=True)


def test_no_warmup_starts_at_the_peak():
    assert value(0, warmup=0) == 2.0
