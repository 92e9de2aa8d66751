# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Monocular depth by a linear head on frozen patches and CLS (Oquab et al., 2024, section 7.4).

Defaults are those of the Monocular Depth Estimation Toolbox, which DINOv2's code is made for: 38,400 steps of 16
images with AdamW, a rate of 1e-4 that follows half a cosine and rises in the first third, a weight decay of 0.01, and
gradients of at most 35.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.nn.functional import interpolate

from ..distributed import forked_rng
from ..features import VisionEncoder
from ..metrics.depth import depth_error_sums, depth_errors, valid_pixels
from ..modeling_vitreg import ViTRegDepthHead, ViTRegForDepthEstimation, log_gradient_loss, scale_invariant_loss
from . import patch_heads
from .patch_heads import PatchFeatures, Targets, head_outputs, model_with_head, read_target, train_head


def train_depth_head(
    features: PatchFeatures,
    targets: Targets,
    *,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
    num_bins: int = 256,
    num_steps: int = 38_400,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.01,
    warmup_share: float = 1 / 3,
    scale_steps: int = 100,
    gradient_weight: float = 0.5,
    max_grad_norm: float = 35.0,
    label_size: tuple[int, int] | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    on_step: Callable[[int, float], object] | None = None,
) -> ViTRegDepthHead:
    """Train a linear head on `scale_invariant_loss` and `log_gradient_loss` of its depth at the labels' size.

    The result depends on features, targets, settings and seed, and on no number of processes.

    Args:
        features: Patches of the chosen layers, with CLS where the model has one. DINOv2: one layer or four.
        targets: Depth of every pixel, `(height, width)` of numbers, 0 where it is not known. Each may have a size of
            its own.
        min_depth, max_depth: What the head can say, in the unit of the targets. Targets above are not counted.
        num_bins: Depths between them.
        num_steps, batch_size, learning_rate, weight_decay, max_grad_norm: The toolbox's by default.
        warmup_share: Of the steps, in which the learning rate rises.
        scale_steps: The first ones, in which `scale_invariant_loss` is `warming_up`.
        gradient_weight: Of `log_gradient_loss`. DINOv2's is 0.5, of a loss that is zero in its code for one image or
            two a device: see there. 0 leaves it out.
        label_size: Height and width that targets are brought to for the loss, by nearest pixel; by default they stay
            as they are.
        seed: Of the weights the head starts with, and of the order of the images.
        accelerator: Says the device. Every process trains the same head; see `patch_heads`.
        on_step: Gets the number of steps that are done, and the loss of the last.

    Returns:
        The head, in eval mode, from `(batch_size, num_channels, rows, cols)` to `(batch_size, 4 * rows, 4 * cols)`.

    Raises:
        ValueError: for targets of another number than images, or depths that are no range.
    """
    _check(features, targets, min_depth, max_depth)
    with forked_rng(seed):
        head = ViTRegDepthHead(features.num_channels, num_bins, min_depth, max_depth)

    def backward(depths: torch.Tensor, labels: list[torch.Tensor], step: int) -> float:
        loss = depth_loss(depths, labels, max_depth, gradient_weight, warming_up=step < scale_steps)
        loss.backward()
        return loss.item()

    return train_head(
        head,
        features,
        lambda index: read_target(targets, index, label_size).float(),
        backward,
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_steps=round(warmup_share * num_steps),
        decay=lambda done: (1 + math.cos(math.pi * done)) / 2,
        max_grad_norm=max_grad_norm,
        seed=seed,
        accelerator=accelerator,
        on_step=on_step,
    )


def _check(features: PatchFeatures, targets: Targets, min_depth: float, max_depth: float):
    if not 0 <= min_depth < max_depth:
        raise ValueError(f"Depths must be 0 <= min_depth < max_depth, got {min_depth} and {max_depth}.")
    if not callable(targets) and len(targets) != len(features):
        raise ValueError(f"There are {len(targets)} targets for the features of {len(features)} images.")


def depth_loss(
    depths: torch.Tensor,
    labels: Sequence[torch.Tensor],
    max_depth: float,
    gradient_weight: float = 0.5,
    warming_up: bool = False,
) -> torch.Tensor:
    """DINOv2's loss of a batch whose labels may have sizes of their own.

    Where they have one, it is the loss of `ViTRegForDepthEstimation`. Else images are brought to the height and width
    of the largest by margins without depth, which count in neither term.

    Args:
        depths: `(batch_size, rows, cols)` of a head.
        labels: `(height, width)` each.
        max_depth: Labels above are not counted.
        gradient_weight: Of `log_gradient_loss`.
        warming_up: Of `scale_invariant_loss`.
    """
    height, width = (max(sides) for sides in zip(*(label.shape for label in labels)))

    def padded(depth: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(depth, (0, width - depth.shape[-1], 0, height - depth.shape[-2]))

    fitted = [
        interpolate(depth[None], size=label.shape, mode="bilinear")[0] for depth, label in zip(depths.split(1), labels)
    ]
    predicted, target = torch.cat(list(map(padded, fitted))), torch.stack(list(map(padded, labels)))
    loss = scale_invariant_loss(predicted, target, max_depth, warming_up)
    return loss + gradient_weight * log_gradient_loss(predicted, target, max_depth)


@torch.no_grad()
def evaluate_depth(
    head: nn.Module,
    features: PatchFeatures,
    targets: Targets,
    *,
    min_depth: float = 1e-3,
    max_depth: float = 10.0,
    eigen_crop: bool = False,
    accelerator: Accelerator | None = None,
    on_image: Callable[[int, torch.Tensor], object] | None = None,
) -> dict[str, float]:
    """RMSE, delta1 and the like, each image predicted at the size of its target; means over the images.

    Where there are several processes, each computes the errors of its share of the images.

    Args:
        head: Of `train_depth_head`, or a model's `depth_head`.
        features, targets: As for training.
        min_depth, max_depth: Pixels whose target is outside are not counted; predictions are clamped to them.
        eigen_crop: See `metrics.depth.valid_pixels`.
        accelerator: Says the device, and joins the processes.
        on_image: Gets the number of each image that this process has predicted, and its `(height, width)` of depths.

    Returns:
        As `metrics.depth.DepthErrors`, the same on every process.

    Raises:
        ValueError: for targets of another number than images, or one without a valid depth.
    """
    _check(features, targets, min_depth, max_depth)
    errors = []
    for index, depth in head_outputs(head, features, accelerator):
        target = read_target(targets, index).float()
        predicted = interpolate(depth[None], size=target.shape, mode="bilinear")[0, 0].cpu()
        valid = valid_pixels(target.numpy(), min_depth, max_depth, eigen_crop)
        if not valid.any():
            raise ValueError(
                f"Target {index} has no depth between {min_depth:g} and {max_depth:g}. Leave the image out, or allow "
                "other depths."
            )
        errors.append((index, *depth_error_sums(predicted.clamp(min_depth, max_depth).numpy(), target.numpy(), valid)))
        if on_image:
            on_image(index, predicted)
    if accelerator:
        errors = gather_object(errors)
    # in the order of one process, so that sums round as there
    _, sums, counts = zip(*sorted(errors, key=lambda error: error[0]))
    return depth_errors(sums, counts)


def build_depth_model(
    encoder: VisionEncoder, layers: Sequence[int], head: ViTRegDepthHead
) -> ViTRegForDepthEstimation:
    """A whole model for `AutoModelForDepthEstimation` and the depth-estimation pipeline.

    Save it together with `dense_image_processor(encoder, height, width)`.

    Args:
        encoder: A ViTReg. Its weights are copied.
        layers: Whose features the head was trained on.
        head: Of `train_depth_head`.

    Raises:
        ValueError: where the encoder is no ViTReg, or layers and head do not belong together.
    """
    settings = {"num_depth_bins": head.num_bins, "min_depth": head.min_depth, "max_depth": head.max_depth}
    return model_with_head(ViTRegForDepthEstimation, encoder, layers, head, **settings)


def save_depth_head(
    folder: str | os.PathLike, encoder: VisionEncoder, layers: Sequence[int], head: ViTRegDepthHead
) -> list[Path]:
    """Write the head alone, `depth_head.safetensors` and `.json`, as for models that are no ViTReg."""
    facts = {"encoder": encoder.name, "source": encoder.source, "layers": list(layers)}
    facts |= {"num_bins": head.num_bins, "min_depth": head.min_depth, "max_depth": head.max_depth}
    return patch_heads.save_head(folder, "depth_head", head, facts)
