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
