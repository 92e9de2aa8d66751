# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The crops of self-supervised training as DINOv2 and DINOv3 make them, and what their batch gets beside: masks."""

import dataclasses
import math
import random
from collections.abc import Sequence

import PIL.Image
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..distributed import derived_seed
from ..objective_options import NUM_GLOBAL_CROPS
from ..pretrain_recipe import PretrainRecipe
from . import photometric
from .masking import batch_masks


BICUBIC = v2.InterpolationMode.BICUBIC
# DINOv2's strengths of brightness, contrast, saturation and hue
COLOR_JITTER = (0.4, 0.4, 0.2, 0.1)
# smallest and largest ratio of width and height of a box
ASPECT_RATIOS = (3 / 4, 4 / 3)
# draws of a box before the largest one in the middle has to do
BOX_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class MultiCropTransform:
    """Two large and some small crops of an image, colored each in its own way (DINOv2, Oquab et al., 2024).

    Gives `global_crops` (2, 3, height, width), `local_crops` (num_local_crops, 3, height, width) and, with Gram
    anchoring, `gram_crops` (2, 3, height, width): the boxes of the global crops in the colors of the image. All are
    float32 and normalized, of the largest of the sizes listed; `CropFinish` makes the others of them. What is random
    comes from torch's CPU generator.

    Attributes:
        options: Of crops and of Gram anchoring.
        image_mean: Mean of each channel, of values from 0 to 1.
        image_std: Standard deviation of each channel.
    """

    options: PretrainRecipe
    image_mean: Sequence[float]
    image_std: Sequence[float]

    def __call__(self, image: PIL.Image.Image) -> dict[str, torch.Tensor]:
        options, pixels = self.options, F.pil_to_tensor(image)
        global_size, local_size = max(options.global_crop_size), max(options.local_crop_size)
        gram_size = max(gram_crop_sizes(options), default=0)
        # the anchor sees the boxes of the student: they are cut once, at the larger of the two sizes
        boxes = self._cut(pixels, NUM_GLOBAL_CROPS, options.global_crop_scale, max(global_size, gram_size))
        local_crops = self._cut(pixels, options.num_local_crops, options.local_crop_scale, local_size)
        global_crops = self._recolor(_resize(boxes, global_size), options.global_blur, [0.0, options.solarize])
        local_crops = self._recolor(local_crops, [options.local_blur] * len(local_crops), [0.0] * len(local_crops))
        found = {"global_crops": global_crops, "local_crops": local_crops}
        if gram_size:
            found["gram_crops"] = _resize(boxes, gram_size) / 255
        return {name: photometric.normalize(crops, self.image_mean, self.image_std) for name, crops in found.items()}

    def _cut(self, pixels: torch.Tensor, num_crops: int, scale: Sequence[float], size: int) -> torch.Tensor:
        """Boxes of `(3, height, width)`, flipped at random: `(num_crops, 3, size, size)` of 8-bit integers."""
        crops = torch.empty(num_crops, 3, size, size, dtype=torch.uint8)
        flips = (torch.rand(num_crops) < self.options.horizontal_flip).tolist()
        for crop, box, flip in zip(crops, random_boxes(num_crops, *pixels.shape[-2:], scale), flips, strict=True):
            # from 8-bit integers with channels last, as PIL has them, torch resizes three times as fast
            resized = F.resized_crop_image(pixels, *box, [size, size], BICUBIC, antialias=True)
            crop.copy_(resized.flip(-1) if flip else resized)
        return crops

    def _recolor(self, crops: torch.Tensor, blur: Sequence[float], solarize: Sequence[float]) -> torch.Tensor:
        """Jitter, grayscale, blur and solarization of 8-bit crops, the last two with a probability for each crop."""
        options, num_crops = self.options, len(crops)
        blur = [1 - share for share in blur] if options.legacy_blur_probability else blur
        shares = [[options.color_jitter] * num_crops, [options.grayscale] * num_crops, blur, solarize]
        changes = (self._jitter, photometric.grayscale, photometric.random_gaussian_blur, photometric.solarize)
        crops = crops / 255
        for change, chosen in zip(changes, torch.rand(4, num_crops) < torch.tensor(shares), strict=True):
            if chosen.any():
                crops[chosen] = change(crops[chosen])
        return crops

    def _jitter(self, crops: torch.Tensor) -> torch.Tensor:
        return photometric.color_jitter(crops, *(self.options.color_jitter_strength * share for share in COLOR_JITTER))


def random_boxes(num_boxes: int, height: int, width: int, scale: Sequence[float]) -> list[tuple[int, int, int, int]]:
    """Draws boxes within an image as torchvision's `RandomResizedCrop` does, each as (top, left, height, width).

    Args:
        num_boxes: How many.
        height: Of the image, in pixels.
        width: Of the image.
        scale: Smallest and largest share of its area.
    """
    draws = torch.rand(num_boxes, 2 * BOX_ATTEMPTS + 2, dtype=torch.float64).tolist()
    return [_random_box(draw, height, width, scale) for draw in draws]


def _random_box(draws: list[float], height: int, width: int, scale: Sequence[float]) -> tuple[int, int, int, int]:
    """A box from numbers between 0 and 1: two for its place, then two for each attempt at its size."""
    low, high = math.log(ASPECT_RATIOS[0]), math.log(ASPECT_RATIOS[1])
    place, attempts = draws[:2], zip(draws[2::2], draws[3::2], strict=True)
    for area_draw, aspect_draw in attempts:
        area = height * width * (scale[0] + area_draw * (scale[1] - scale[0]))
        aspect = math.exp(low + aspect_draw * (high - low))
        rows, cols = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < rows <= height and 0 < cols <= width:
            return int(place[0] * (height - rows + 1)), int(place[1] * (width - cols + 1)), rows, cols
    rows, cols = min(height, round(width / ASPECT_RATIOS[0])), min(width, round(height * ASPECT_RATIOS[1]))
    return (height - rows) // 2, (width - cols) // 2, rows, cols


class CropFinish:
    """Gives a batch of crops its size, where several are listed, and its masks, where patches are masked.

    A batch with `global_crops` (batch, 2, 3, height, width), `local_crops` and maybe `gram_crops` gets `masks`
    (2 * batch, num_patches), all first crops before all second ones, `mask_indices` and `mask_weights` (num_masked,).
    The result is a function of the seed and of the batch's number. The size is the same on all processes. Their masks
    are parts of those of one process that had the global batch, in which the images of a process follow each other.

    Args:
        options: Of crops, masks and Gram anchoring.
        patch_size: Of the model, in pixels.
        seed: Of the run.
        process_index: Of this process.
        num_processes: Processes that share a global batch.
        batch_size: Images in the batch of a process.

    Raises:
        ValueError: for crops that are no whole number of patches.
    """

    def __init__(
        self,
        options: PretrainRecipe,
        patch_size: int,
        seed: int,
        process_index: int,
        num_processes: int,
        batch_size: int,
    ):
        sizes = {
            "global_crops": options.global_crop_size,
            "local_crops": options.local_crop_size,
            "gram_crops": gram_crop_sizes(options),
        }
        for name, listed in sizes.items():
            if any(size % patch_size for size in listed):
                raise ValueError(
                    f"--{name[:-1]}_size must be multiples of the patch size, {patch_size}, got {listed}."
                )
        self.options, self.patch_size, self.seed, self.sizes = options, patch_size, seed, sizes
        self.batch_size, self.global_batch_size = batch_size, batch_size * num_processes
        self.first_image = process_index * batch_size

    def __call__(self, batch: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
        """The batch with its crops resized and its masks beside them, on the device of the crops.

        Args:
            batch: Crops, on any device.
            number: Batches that this process had before.
        """
        size_seed, mask_seed = derived_seed(self.seed, number, 0), derived_seed(self.seed, number, 1)
        numbers = range(len(self.options.global_crop_size))
        [choice] = random.Random(size_seed).choices(numbers, self.options.crop_size_weights or None)
        sized = {name: _resize(batch[name], sizes[choice]) for name, sizes in self.sizes.items() if name in batch}
        batch = {**batch, **sized}
        if self.options.masks_patches:
            batch |= self._masks(mask_seed, batch["global_crops"])
        return batch

    def _masks(self, seed: int, crops: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, cols = (pixels // self.patch_size for pixels in crops.shape[-2:])
        first = [crop * self.global_batch_size + self.first_image for crop in range(NUM_GLOBAL_CROPS)]
        drawn = batch_masks(
            seed,
            NUM_GLOBAL_CROPS * self.global_batch_size,
            rows,
            cols,
            self.options.mask_probability,
            *self.options.mask_ratio,
            wanted=[start + image for start in first for image in range(self.batch_size)],
        )
        found = {"masks": drawn.masks, "mask_indices": drawn.indices, "mask_weights": drawn.weights}
        return {name: tensor.to(crops.device, non_blocking=True) for name, tensor in found.items()}


def gram_crop_sizes(options: PretrainRecipe) -> list[int]:
    """Sizes at which the teacher of Gram anchoring sees global crops, one for each of theirs; empty without one."""
    return (options.gram_crop_size or options.global_crop_size) if options.gram_weight else []


def _resize(crops: torch.Tensor, size: int) -> torch.Tensor:
    """`(..., height, width)` to `(..., size, size)`, on the device of the crops; what has the size stays."""
    if crops.shape[-1] == size:
        return crops
    return F.resize_image(crops, [size, size], BICUBIC, antialias=True)
