# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Batches, and the mixing of images within one."""

from collections.abc import Callable

import torch
from torch.utils.data import default_collate
from torchvision.transforms import v2

from ..objective_options import SupervisedOptions
from ..recipe import AugmentationOptions


def collate(samples: list[dict[str, torch.Tensor | int]]) -> dict[str, torch.Tensor]:
    """Stacks what the samples have, such as `pixel_values` (batch, num_channels, height, width), `labels` (batch,).

    A worker stacks straight into the memory that it shares with the training process.
    """
    return default_collate(samples)


def mixing(
    options: AugmentationOptions | SupervisedOptions, num_labels: int
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Mixup (Zhang et al., 2018) and cutmix (Yun et al., 2019) over a batch, one of the two a batch where both are on.

    The function returned takes pixel values and integer labels and gives pixel values and, where something mixes,
    labels as probabilities of shape `(batch, num_labels)`.
    """
    choices = []
    if options.mixup_alpha:
        choices.append(v2.MixUp(alpha=options.mixup_alpha, num_classes=num_labels))
    if options.cutmix_alpha:
        choices.append(v2.CutMix(alpha=options.cutmix_alpha, num_classes=num_labels))
    return v2.RandomChoice(choices) if choices else lambda pixel_values, labels: (pixel_values, labels)
