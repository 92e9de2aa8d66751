# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Changes of color and sharpness of a stack of crops at once, each crop by a strength of its own.

They give what torchvision's functions of the same names give on images of floats. Those take one strength a call, and
their hue and blur take most of the time of a self-supervised input pipeline; these are two to twenty times faster.

Every `crops` is `(num_crops, 3, height, width)` with values from 0 to 1, and is left as it was.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


LUMA = (0.2989, 0.587, 0.114)
# DINOv2 blurs with 9 taps and a sigma from this interval, in pixels
BLUR_TAPS = 9
BLUR_SIGMAS = (0.1, 2.0)


def luma(crops: torch.Tensor) -> torch.Tensor:
    """Brightness as ITU-R BT.601 weighs it, `(num_crops, 1, height, width)`."""
    red, green, blue = crops.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def grayscale(crops: torch.Tensor) -> torch.Tensor:
    return luma(crops).expand_as(crops)


def adjust_brightness(crops: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Multiplies by factors `(num_crops,)`."""
    return (crops * factors.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(crops: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Moves away from the mean brightness of the crop for factors `(num_crops,)` above 1, towards it below."""
    return luma(crops).mean(dim=(1, 2, 3), keepdim=True).lerp(crops, factors.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_saturation(crops: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Moves away from gray for factors `(num_crops,)` above 1, towards it below."""
    return luma(crops).lerp(crops, factors.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_hue(crops: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Turns the hue of HSV by shifts `(num_crops,)` of a full turn.

    With the hue h in sixths of a turn, red is `low + chroma * clamp(|h - 3| - 1, 0, 1)`, green
    `low + chroma * clamp(2 - |h - 2|, 0, 1)` and blue the same about 4 in place of 2 (Smith, 1978).
    """
    red, green, blue = crops.unbind(1)
    high, low = crops.amax(dim=1), crops.amin(dim=1)
    chroma = high - low
    from_red, from_green = high == red, high == green
    hue = torch.where(from_red, green - blue, torch.where(from_green, blue - red, red - green))
    # gray has no hue, and its chroma of 0 takes away whatever is computed
    hue.div_(chroma.clamp(min=torch.finfo(chroma.dtype).tiny))
    hue += torch.where(from_red, 0.0, torch.where(from_green, 2.0, 4.0))
    hue.add_(6 * shifts.view(-1, 1, 1)).remainder_(6)
    centers, signs, offsets = crops.new_tensor([[3, 2, 4], [1, -1, -1], [-1, 2, 2]]).view(3, 1, 3, 1, 1).unbind()
    share = (hue[:, None] - centers).abs_().mul_(signs).add_(offsets).clamp_(0, 1)
    return share.mul_(chroma[:, None]).add_(low[:, None])


def gaussian_blur(crops: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Blurs by Gaussians of standard deviations `(num_crops,)` in pixels, over 9 pixels, or what fits a small crop."""
    reach = min(BLUR_TAPS // 2, crops.shape[-2] - 1, crops.shape[-1] - 1)
    distances = torch.arange(-reach, 1) / sigmas[:, None]
    weights = torch.exp(-0.5 * distances**2)
    weights = weights / (2 * weights.sum(dim=1, keepdim=True) - 1)
    for axis in (2, 3):
        crops = _blur_axis(crops, weights, reach, axis)
    return crops


def _blur_axis(crops: torch.Tensor, weights: torch.Tensor, reach: int, axis: int) -> torch.Tensor:
    """Sums of shifted crops: several times faster on a CPU than a convolution with a kernel for each crop."""
    size = crops.shape[axis]
    padded = F.pad(crops, (reach, reach, 0, 0) if axis == 3 else (0, 0, reach, reach), mode="reflect")
    *sides, middle = weights.T[..., None, None, None]
    blurred = crops * middle
    for shift, weight in enumerate(sides):
        left, right = padded.narrow(axis, shift, size), padded.narrow(axis, 2 * reach - shift, size)
        blurred.addcmul_(left + right, weight)
    return blurred


def solarize(crops: torch.Tensor) -> torch.Tensor:
    """Inverts values from 128 of 255 on."""
    return torch.where(crops >= 127.5 / 255, 1 - crops, crops)


def color_jitter(
    crops: torch.Tensor, brightness: float, contrast: float, saturation: float, hue: float = 0.0
) -> torch.Tensor:
    """Adjusts the four in random order, each crop by factors drawn from `1 ± strength` and a shift from `± hue`.

    One order is drawn for the stack, where torchvision draws one for each crop.
    """
    changes = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    strengths = (brightness, contrast, saturation, hue)
    for i in torch.randperm(len(changes)).tolist():
        if strengths[i]:
            low, high = (-hue, hue) if i == 3 else (max(0.0, 1 - strengths[i]), 1 + strengths[i])
            crops = changes[i](crops, uniform(len(crops), low, high))
    return crops


def random_gaussian_blur(crops: torch.Tensor) -> torch.Tensor:
    """Blurs by standard deviations drawn from 0.1 to 2 pixels, as DINOv2 does."""
    return gaussian_blur(crops, uniform(len(crops), *BLUR_SIGMAS))


def uniform(num: int, low: float, high: float) -> torch.Tensor:
    """Draws `(num,)` from an interval, by torch's CPU generator."""
    return torch.empty(num).uniform_(low, high)


def normalize(crops: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Takes the means of the channels away and divides by the standard deviations."""
    return (crops - crops.new_tensor(mean).view(-1, 1, 1)).div_(crops.new_tensor(std).view(-1, 1, 1))
