# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Distances between the features of a student and those that it is to have."""

import torch
import torch.nn.functional as F

from .prototypes import full_precision


def cosine_distance(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How far the directions of features are apart, from 0 to 2.

    ```
    loss = mean(1 - cosine(student[i], target[i]) for all features i)
    ```

    Args:
        student: `(..., hidden_size)`.
        target: Of the same shape; no gradient reaches it.

    Raises:
        ValueError: where the shapes differ.
    """
    _require_same_shape(student, target)
    with torch.autocast(student.device.type, enabled=False):
        return 1 - F.cosine_similarity(full_precision(student), full_precision(target.detach()), dim=-1).mean()


def squared_distance(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of all values; arguments and errors as for `cosine_distance`.

    ```
    loss = mean((student - target) ** 2)
    ```
    """
    _require_same_shape(student, target)
    with torch.autocast(student.device.type, enabled=False):
        return F.mse_loss(full_precision(student), full_precision(target.detach()))


def _require_same_shape(student: torch.Tensor, target: torch.Tensor) -> None:
    if student.shape != target.shape:
        raise ValueError(
            f"Student and target must be the same features, got {tuple(student.shape)} and {tuple(target.shape)}."
        )
