# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Losses on features alone: KoLeo spreads those of images, Gram keeps how patches of an image relate."""

from typing import Literal

import torch
import torch.nn.functional as F

from .collectives import gather_with_gradient, process_index
from .prototypes import full_precision


def koleo_loss(features: torch.Tensor, across_processes: bool = False, eps: float = 1e-8) -> torch.Tensor:
    """Entropy estimate of Kozachenko and Leonenko, negated (Sablayrolles et al., 2019, equation 2; DINOv2).

    ```
    x[i] = features[i] / norm(features[i])
    j[i] = argmax(x[i] @ x[j] for all j but i)
    loss = mean(-log(norm(x[i] - x[j[i]] + eps) + eps) for all i)
    ```

    DINOv2 takes it of one crop at a time, since crops of an image should be alike, and adds the two global crops. It
    looks for neighbours among the images of a process.

    Args:
        features: CLS of different images before the head, `(batch, hidden_size)`.
        across_processes: Look for neighbours among the images of all processes, so that several processes are one with
            the global batch. Collective.
        eps: Keeps the logarithm of equal images finite.

    Raises:
        ValueError: for one image, which has no neighbour.
    """
    with torch.autocast(features.device.type, enabled=False):
        own = F.normalize(full_precision(features), dim=-1, eps=eps)
        images = gather_with_gradient(own) if across_processes else own
        if len(images) < 2:
            raise ValueError("KoLeo needs two images at least to find neighbours: raise the batch size.")
        first = process_index() * len(own) if across_processes else 0
        with torch.no_grad():
            similarity = own @ images.T
            similarity[:, first : first + len(own)].fill_diagonal_(-torch.inf)
            nearest = similarity.argmax(dim=1)
        return -(F.pairwise_distance(own, images[nearest], eps=eps) + eps).log().mean()


def gram_loss(
    student: torch.Tensor, teacher: torch.Tensor, negatives: Literal["keep", "drop", "drop_teacher"] = "keep"
) -> torch.Tensor:
    """Distance between the patches' similarities of student and teacher (DINOv3, Siméoni et al., 2025, equation 2).

    ```
    x, y = student / norm(student), teacher / norm(teacher)          # each patch
    loss = mean((x[b] @ x[b].T - y[b] @ y[b].T) ** 2 for all images b, all pairs of patches)
    ```

    Args:
        student: Patch tokens, `(batch, num_patches, hidden_size)`.
        teacher: The Gram teacher's of the same patches, at the student's resolution; no gradient reaches it.
        negatives: `keep` is the published formula. `drop` sets negative similarities to 0 on both sides,
            `drop_teacher` on the teacher's alone, which is what the original code's option comes to.

    Raises:
        ValueError: where the shapes differ in images or patches, or `negatives` is something else.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"Student and teacher must have the same patches, got {tuple(student.shape)} and {tuple(teacher.shape)}, "
            "(batch, num_patches, hidden_size)."
        )
    if negatives not in ("keep", "drop", "drop_teacher"):
        raise ValueError(f"negatives must be 'keep', 'drop' or 'drop_teacher', got {negatives!r}.")
    with torch.autocast(student.device.type, enabled=False):
        ours, target = _similarities(student), _similarities(teacher.detach())
        ours = ours.relu() if negatives == "drop" else ours
        return F.mse_loss(ours, target if negatives == "keep" else target.relu())


def _similarities(patches: torch.Tensor) -> torch.Tensor:
    """Cosines between the patches of each image, `(batch, num_patches, num_patches)`."""
    patches = F.normalize(full_precision(patches), dim=-1)
    return patches @ patches.mT
