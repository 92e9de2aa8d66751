# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The steps that augmentations share, and the augmentation of images with texts."""

import dataclasses
from collections.abc import Callable, Sequence

import PIL.Image
import torch
from torchvision.transforms import v2

from ..objective_options import CLIPOptions, PostHocOptions


@dataclasses.dataclass(frozen=True)
class PixelValues:
    """A transform's image by its name in a batch: `pixel_values` (3, height, width), normalized float32."""

    transform: Callable[[PIL.Image.Image], torch.Tensor]

    def __call__(self, image: PIL.Image.Image) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.transform(image)}


def random_resized_crop(size: int | tuple[int, int], min_scale: float) -> v2.RandomResizedCrop:
    """A part of an image, from a share of `min_scale` up to all of it, at this size in pixels."""
    return v2.RandomResizedCrop(
        size, scale=(min_scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
    )


def normalized(steps: Sequence[Callable], mean: Sequence[float], std: Sequence[float]) -> v2.Compose:
    """Steps on 8-bit tensors, between the image and its normalization: `PIL.Image -> (3, height, width)`."""
    return v2.Compose(
        [v2.PILToTensor(), *steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    )


def clip_transform(
    options: CLIPOptions, image_size: int, image_mean: Sequence[float], image_std: Sequence[float]
) -> PixelValues:
    """OpenCLIP's augmentation: a random crop of nearly all of the image, and a flip where it is asked for."""
    steps = [random_resized_crop(image_size, options.clip_crop_min_scale), v2.RandomHorizontalFlip(options.clip_flip)]
    return PixelValues(normalized(steps, image_mean, image_std))


def post_hoc_transform(
    options: PostHocOptions, image_size: int, image_mean: Sequence[float], image_std: Sequence[float]
) -> PixelValues:
    """What PH-Reg distils on: the shorter edge resized, a square of all of it at random, and a flip."""
    steps = [
        v2.Resize(image_size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomCrop(image_size),
        v2.RandomHorizontalFlip(options.post_hoc_flip),
    ]
    return PixelValues(normalized(steps, image_mean, image_std))
