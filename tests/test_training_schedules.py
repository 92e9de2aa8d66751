# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
from loss_cases import SCHEDULES
from original_outputs import load

from hf_vitreg.training.schedules import cosine, frozen, linear, warmup_cosine


OURS = {
    "base_value": "start",
    "final_value": "end",
    "total_iters": "total_steps",
    "warmup_iters": "warmup_steps",
    "start_warmup_value": "warmup_start",
    "freeze_iters": "frozen_steps",
}


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


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_the_original_code(name):
    *_, expected = load("dinov2_losses")
    arguments = {OURS[argument]: value for argument, value in SCHEDULES[name].items()}
    found = [cosine(step, **arguments) for step in range(arguments["total_steps"])]
    assert found == pytest.approx(expected[f"schedule/{name}"].tolist(), rel=1e-12, abs=1e-15)
    assert cosine(arguments["total_steps"], **arguments) == cosine(10_000, **arguments) == arguments["end"]


def test_the_temperature_of_the_teacher_is_linear():
    *_, expected = load("dinov2_losses")
    found = [linear(step, 31, 0.04, 0.07) for step in range(40)]
    assert found == pytest.approx([*expected["schedule/teacher_temperature"].tolist(), *[0.07] * 9], rel=1e-12)
    assert linear(0, 0, 0.04, 0.07) == 0.07


def test_a_frozen_value_is_zero_at_first():
    assert [frozen(step, 2, 0.5) for step in range(4)] == [0, 0, 0.5, 0.5]
