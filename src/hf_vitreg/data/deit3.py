# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The augmentation of supervised training, 3-Augment of DeiT-III (Touvron et al., 2022), and the mixing of labels."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torchvision.transforms import v2

from ..distributed import derived_seed, forked_rng
from ..objective_options import SupervisedOptions
from . import photometric
from .augmentations import PixelValues, normalized, random_resized_crop
from .collate import mixing


# border that a simple random crop may move into, in pixels
PADDING = 4


@dataclasses.dataclass(frozen=True)
class ThreeAugment:
    """One of grayscale, solarization and blur, then color jitter: `(3, height, width)`, 8-bit to values from 0 to 1.

    Attributes:
        color_jitter: Strength of the jitter of brightness, contrast and saturation.
    """

    color_jitter: float

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        changes = (photometric.grayscale, photometric.solarize, photometric.random_gaussian_blur)
        crops = changes[int(torch.randint(len(changes), ()))](image[None] / 255)
        return photometric.color_jitter(crops, *[self.color_jitter] * 3)[0]


def supervised_transform(
    options: SupervisedOptions, image_size: int, image_mean: Sequence[float], image_std: Sequence[float]
) -> PixelValues:
    """Crop, flip, and 3-Augment or RandAugment or neither, as the options say."""
    steps = [*_crop(options, image_size), v2.RandomHorizontalFlip(options.flip)]
    if options.rand_augment_num_ops:
        steps.append(v2.RandAugment(options.rand_augment_num_ops, options.rand_augment_magnitude))
    elif options.three_augment:
        steps.append(ThreeAugment(options.three_augment_color_jitter))
    return PixelValues(normalized(steps, image_mean, image_std))


def _crop(options: SupervisedOptions, image_size: int) -> list[nn.Module]:
    if options.train_crop == "random_resized_crop":
        return [random_resized_crop(image_size, options.random_crop_min_scale)]
    return [
        v2.Resize(image_size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomCrop(image_size, padding=PADDING, padding_mode="reflect"),
    ]


def label_mixing(
    options: SupervisedOptions, num_labels: int, seed: int, process_index: int = 0
) -> Callable[[dict[str, torch.Tensor], int], dict[str, torch.Tensor]]:
    """Mixup or cutmix of a batch, a function of seed, batch number and process.

    The function returned takes a batch with `pixel_values` and `labels` (batch,), and the number of batches before it.
    Where anything mixes, labels become probabilities `(batch, num_labels)`.
    """
    mix = mixing(options, num_labels)

    def finish(batch: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
        with forked_rng(derived_seed(seed, number, process_index)):
            pixel_values, labels = mix(batch["pixel_values"], batch["labels"])
        return {**batch, "pixel_values": pixel_values, "labels": labels}

    return finish
