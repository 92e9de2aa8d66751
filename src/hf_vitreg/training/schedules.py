# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Schedules as pure functions of the step."""

import math


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, start: float, peak: float, end: float) -> float:
    """Linear from `start` to `peak` over the warmup, then half a cosine to `end` (Loshchilov and Hutter, 2017).

    Args:
        step: From 0. The peak is reached at `warmup_steps`, the end at `total_steps`; it stays there.
        total_steps: Steps of the run.
        warmup_steps: Steps of the rise; 0 starts at the peak.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine(
    step: int,
    total_steps: int,
    start: float,
    end: float,
    warmup_steps: int = 0,
    warmup_start: float = 0.0,
    frozen_steps: int = 0,
) -> float:
    """0 while frozen, linear from `warmup_start` to `start`, then half a cosine to `end`, as DINOv2 counts its steps.

    There the warmup's last step is at `start` and so is the first of the cosine, which comes near `end` at the last
    step and reaches it after. For learning rate, weight decay and the teacher's momentum; only the first has a warmup.

    Args:
        step: From 0.
        total_steps: Steps of the run, with those of warmup and freeze.
        start: What the cosine starts at.
        end: What it ends at.
        warmup_steps: Steps of the rise.
        warmup_start: Value at the first of them.
        frozen_steps: Steps at 0, before the warmup.
    """
    if step < frozen_steps:
        return 0.0
    if step < frozen_steps + warmup_steps:
        return linear(step - frozen_steps, warmup_steps, warmup_start, start)
    if step >= total_steps:
        return end
    progress = (step - frozen_steps - warmup_steps) / (total_steps - frozen_steps - warmup_steps)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(step: int, num_steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `num_steps - 1`, where it stays; for the teacher's temperature.

    Args:
        step: From 0.
        num_steps: Steps of the change; one alone is at `start`, as in DINOv2. 0 is at `end` from the first step.
        start: First value.
        end: Last value.
    """
    if step >= num_steps:
        return end
    return start + (end - start) * step / max(1, num_steps - 1)


def frozen(step: int, frozen_steps: int, value: float) -> float:
    """0 for the first steps, then `value`: the learning rate of a last layer that DINOv2 holds back at the start."""
    return 0.0 if step < frozen_steps else value
