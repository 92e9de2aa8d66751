# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""From a decoded image to the model's input: the image processor, and the random augmentation of training."""

import dataclasses
from collections.abc import Callable

import PIL.Image
import torch
from torchvision.transforms import v2
from transformers import BitImageProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..recipe import AugmentationOptions
from .augmentations import normalized, random_resized_crop


def new_image_processor(image_size: int) -> BitImageProcessor:
    """Resizes the shorter edge to `image_size` pixels, crops the centre, normalizes with ImageNet's statistics."""
    return BitImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        resample=PIL.Image.Resampling.BICUBIC,
        image_mean=list(IMAGENET_DEFAULT_MEAN),
        image_std=list(IMAGENET_DEFAULT_STD),
        do_convert_rgb=True,
    )


def input_size(processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width in pixels of what a processor makes of every image.

    Raises:
        ValueError: where it makes images of different sizes.
    """
    crops = getattr(processor, "do_center_crop", None) and processor.crop_size
    size = dict((processor.crop_size if crops else processor.size) or {})
    if not size.get("height") or not size.get("width"):
        raise ValueError(
            f"The image processor makes images of different sizes (size {dict(processor.size)}, no crop), which no "
            'batch can hold. Set do_center_crop and crop_size, or size={"height": .., "width": ..}, in '
            "preprocessor_config.json."
        )
    return size["height"], size["width"]


def resized_image_processor(processor: BaseImageProcessor, image_size: int) -> BaseImageProcessor:
    """The same processor for square images of another size; what it resizes to stays in proportion to the crop."""
    height, _ = input_size(processor)
    square = {"height": image_size, "width": image_size}
    sides = {side: pixels for side, pixels in dict(processor.size).items() if pixels}
    resized = {side: round(image_size * pixels / height) for side, pixels in sides.items()}
    settings = {**processor.to_dict(), "size": resized}
    if settings.get("crop_size"):
        settings["crop_size"] = square
    return type(processor).from_dict(settings)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """What the pipeline does to an image: `PIL.Image -> (num_channels, height, width)`."""

    processor: BaseImageProcessor

    def __call__(self, image: PIL.Image.Image) -> torch.Tensor:
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


def train_transform(
    processor: BaseImageProcessor, options: AugmentationOptions
) -> Callable[[PIL.Image.Image], torch.Tensor]:
    """Random crop, flip and RandAugment, then the processor's normalization: `PIL.Image -> (3, height, width)`."""
    steps = [random_resized_crop(input_size(processor), options.random_crop_min_scale)]
    if options.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(options.horizontal_flip))
    if options.rand_augment_num_ops:
        steps.append(v2.RandAugment(options.rand_augment_num_ops, options.rand_augment_magnitude))
    return normalized(steps, processor.image_mean, processor.image_std)
