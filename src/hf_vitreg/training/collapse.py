# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Watches for collapse: features that use few directions, a teacher that says the same of every image or nothing."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from ..pretrain_recipe import MonitorOptions


class TrainingCollapsed(RuntimeError):
    """A metric went beyond its limit, and `--on_collapse stop` was given.

    Attributes:
        metric: Its name.
        value: Of the metric.
        limit: That it is beyond; `None` where it should only be finite.
        step: Where.
    """

    def __init__(self, metric: str, value: float, limit: float | None, step: int):
        super().__init__(_message(metric, value, limit, step))
        self.metric, self.value, self.limit, self.step = metric, value, limit, step


class _Limit(NamedTuple):
    """What a metric is, how far it may go, and what helps where it goes beyond."""

    option: str
    is_largest: bool
    meaning: str
    remedy: str

    def is_beyond(self, value: float, limit: float) -> bool:
        return value > limit if self.is_largest else value < limit


LIMITS = {
    "feature_rank": _Limit(
        "min_feature_rank",
        False,
        "the features of different images use few directions",
        "Raise --koleo_weight, or lower --learning_rate.",
    ),
    "target_entropy": _Limit(
        "min_target_entropy",
        False,
        "the teacher gives all images to few prototypes",
        "Use --centering sinkhorn_knopp, lower --center_momentum, or raise --teacher_temperature.",
    ),
    "teacher_entropy": _Limit(
        "max_teacher_entropy",
        True,
        "the teacher says next to nothing of an image",
        "Lower --teacher_temperature and --teacher_temperature_start, or lower --learning_rate.",
    ),
}


class CollapseWatch:
    """Compares metrics with their limits. A run that stops improving is none of its concern, one that collapsed is.

    Metrics are shares of what they could be: `feature_rank` of the smaller of images and width, `target_entropy` (of
    the teacher's mean output) and `teacher_entropy` (the mean over its outputs) of the logarithm of the number of
    prototypes; there may be several, with something before these names. Others are only asked to be finite.

    Args:
        options: Limits, and what to do.
    """

    def __init__(self, options: MonitorOptions):
        self.options = options
        self._beyond: set[str] = set()

    def check(self, metrics: Mapping[str, float], step: int) -> list[str]:
        """What there is to warn of, each metric once until it has been within its limit again.

        Args:
            metrics: Of a step; those that are missing are not judged.
            step: Optimizer steps done.

        Raises:
            TrainingCollapsed: for the first metric beyond its limit, where a run is to stop there.
        """
        if self.options.on_collapse == "ignore":
            return []
        messages = []
        for metric, value in metrics.items():
            limit = self._limit(metric)
            is_beyond = not math.isfinite(value) or (limit is not None and _kind(metric).is_beyond(value, limit))
            if is_beyond and self.options.on_collapse == "stop":
                raise TrainingCollapsed(metric, value, limit, step)
            if is_beyond and metric not in self._beyond:
                messages.append(_message(metric, value, limit, step))
            (self._beyond.add if is_beyond else self._beyond.discard)(metric)
        return messages

    def _limit(self, metric: str) -> float | None:
        kind = _kind(metric)
        return None if kind is None else getattr(self.options, kind.option)


def _kind(metric: str) -> _Limit | None:
    """What limits a metric: one limit for `teacher_entropy` and `ibot_teacher_entropy`."""
    return next((limit for name, limit in LIMITS.items() if metric.endswith(name)), None)


def _message(metric: str, value: float, limit: float | None, step: int) -> str:
    if limit is None or not math.isfinite(value):
        return f"{metric} is {value} at step {step}. Lower --learning_rate, or raise --warmup_ratio."
    option, is_largest, meaning, remedy = _kind(metric)
    beyond = "above" if is_largest else "below"
    return f"{metric} is {value:.3g} at step {step}, {beyond} --{option} {limit:g}: {meaning}. {remedy}"
