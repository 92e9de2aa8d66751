# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Semantic segmentation by a linear head on frozen patch features (Oquab et al., 2024, section 7.4).

DINOv2 trains it on ADE20k for 40,000 steps of 16 images with AdamW, a rate of 1e-3 that decays linearly after 1,500
steps of warm-up, and a weight decay of 1e-4.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

from ..distributed import forked_rng
from ..features import VisionEncoder
from ..metrics.mean_iou import confusion_matrix, iou_scores
from ..modeling_vitreg import ViTRegForSemanticSegmentation, ViTRegSegmentationHead
from . import patch_heads
from .patch_heads import PatchFeatures, Targets, head_outputs, model_with_head, read_target, train_head


def train_segmentation_head(
    features: PatchFeatures,
    targets: Targets,
    num_classes: int,
    *,
    num_steps: int = 40_000,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    warmup_share: float = 1_500 / 40_000,
    ignore_index: int = 255,
    label_size: tuple[int, int] | None = None,
    seed: int = 0,
    accelerator: Accelerator | None = None,
    on_step: Callable[[int, float], object] | None = None,
) -> ViTRegSegmentationHead:
    """Train a linear head: cross entropy of its logits, interpolated to the labels, per pixel that has a class.

    The result depends on features, targets, settings and seed, and on no number of processes.

    Args:
        features: Patches of the chosen layers. DINOv2: the last, or in its multi-scale results the last four.
        targets: Class of every pixel, `(height, width)` of integers, 0 to `num_classes - 1` or `ignore_index`. Each
            may have a size of its own.
        num_classes: Of which there are that many.
        num_steps, batch_size, learning_rate, weight_decay: DINOv2's by default.
        warmup_share: Of the steps.
        ignore_index: Target of pixels that have no class.
        label_size: Height and width that targets are brought to for the loss, by nearest pixel; by default they stay
            as they are. The cost of a step is proportional to it: for masks of 720x960 pixels on a CPU, four times the
            patch grid is a choice.
        seed: Of the weights the head starts with, and of the order of the images.
        accelerator: Says the device. Every process trains the same head; see `patch_heads`.
        on_step: Gets the number of steps that are done, and the loss of the last.

    Returns:
        The head, in eval mode, which reads `(batch_size, num_channels, rows, cols)`.

    Raises:
        ValueError: for targets of another number than images, or with a value that is no class.
    """
    _check_number(features, targets)

    def read_labels(index: int) -> torch.Tensor:
        labels = read_target(targets, index, label_size)
        counted = labels[labels != ignore_index]
        if labels.is_floating_point() or (counted.numel() and not 0 <= counted.min() <= counted.max() < num_classes):
            raise ValueError(
                f"Target {index} must hold classes from 0 to {num_classes - 1}, or {ignore_index} for none, as "
                f"integers; got values from {labels.min()} to {labels.max()} ({labels.dtype})."
            )
        return labels.long()

    with forked_rng(seed):
        head = ViTRegSegmentationHead(features.num_channels, num_classes)
        nn.init.normal_(head.classifier.weight, std=0.01)
        nn.init.zeros_(head.classifier.bias)
    return train_head(
        head,
        features,
        read_labels,
        lambda logits, labels, step: cross_entropy_backward(logits, labels, ignore_index),
        num_steps=num_steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup_steps=round(warmup_share * num_steps),
        decay=lambda done: 1 - done,
        max_grad_norm=float("inf"),
        seed=seed,
        accelerator=accelerator,
        on_step=on_step,
    )


def _check_number(features: PatchFeatures, targets: Targets):
    if not callable(targets) and len(targets) != len(features):
        raise ValueError(f"There are {len(targets)} targets for the features of {len(features)} images.")


def cross_entropy_backward(logits: torch.Tensor, labels: Sequence[torch.Tensor], ignore_index: int = 255) -> float:
    """Mean cross entropy over all pixels of a batch that have a class, and its gradients.

    One image after another is interpolated and forgotten: logits at the size of the labels are the largest tensors by
    far, 200 MB for an image of ADE20k, of which a batch would keep several at once.

    Args:
        logits: `(batch_size, num_classes, rows, cols)`; its gradients are propagated.
        labels: `(height, width)` each, int64.
        ignore_index: Label of pixels that are not counted.

    Returns:
        The loss, 0 where no pixel has a class.
    """
    num_counted = max(sum((label != ignore_index).sum() for label in labels), 1)
    leaf = logits.detach().float().requires_grad_()
    total = torch.zeros((), device=logits.device)
    for one, label in zip(leaf.split(1), labels):
        upsampled = interpolate(one, size=label.shape, mode="bilinear")
        loss = cross_entropy(upsampled, label[None], ignore_index=ignore_index, reduction="sum") / num_counted
        loss.backward()
        total += loss.detach()
    logits.backward(leaf.grad.to(logits.dtype))
    return total.item()


@torch.no_grad()
def evaluate_segmentation(
    head: nn.Module,
    features: PatchFeatures,
    targets: Targets,
    num_classes: int,
    *,
    ignore_index: int = 255,
    accelerator: Accelerator | None = None,
    on_image: Callable[[int, torch.Tensor], object] | None = None,
) -> dict[str, float | list[float | None]]:
    """Mean IoU, each image predicted at the size of its target from bilinearly interpolated logits.

    Where there are several processes, each counts the pixels of its share of the images, and the counts are summed.

    Args:
        head: Of `train_segmentation_head`, or a model's `segmentation_head`.
        features, targets, num_classes, ignore_index: As for training.
        accelerator: Says the device, and joins the processes.
        on_image: Gets the number of each image that this process has predicted, and its `(height, width)` of classes.

    Returns:
        As `metrics.mean_iou.MeanIoU`, the same on every process.

    Raises:
        ValueError: for targets of another number than images, with a value that is no class, or without any.
    """
    _check_number(features, targets)
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for index, logits in head_outputs(head, features, accelerator):
        target = read_target(targets, index)
        prediction = interpolate(logits, size=target.shape, mode="bilinear").argmax(dim=1)[0].cpu()
        try:
            counts += torch.from_numpy(confusion_matrix(prediction, target, num_classes, ignore_index))
        except ValueError as error:
            raise ValueError(f"Target {index}: {error}") from error
        if on_image:
            on_image(index, prediction)
    if accelerator:
        counts = accelerator.reduce(counts.to(accelerator.device), reduction="sum").cpu()
    counts = counts.numpy()
    return iou_scores(counts.diagonal(), counts.sum(axis=0), counts.sum(axis=1), ignore_index)


def build_segmentation_model(
    encoder: VisionEncoder,
    layers: Sequence[int],
    head: ViTRegSegmentationHead,
    class_names: Sequence[str],
    ignore_index: int = 255,
) -> ViTRegForSemanticSegmentation:
    """A whole model for `AutoModelForSemanticSegmentation` and the image-segmentation pipeline.

    Save it together with `dense_image_processor(encoder, height, width)`.

    Args:
        encoder: A ViTReg. Its weights are copied.
        layers: Whose features the head was trained on.
        head: Of `train_segmentation_head`.
        class_names: By class.
        ignore_index: Label of pixels that have no class.

    Raises:
        ValueError: where the encoder is no ViTReg, or layers, classes and head do not belong together.
    """
    if len(class_names) != head.classifier.out_channels:
        raise ValueError(f"There are {len(class_names)} class names for a head of {head.classifier.out_channels}.")
    return model_with_head(
        ViTRegForSemanticSegmentation,
        encoder,
        layers,
        head,
        id2label=dict(enumerate(class_names)),
        label2id={name: index for index, name in enumerate(class_names)},
        semantic_loss_ignore_index=ignore_index,
    )


def save_segmentation_head(
    folder: str | os.PathLike,
    encoder: VisionEncoder,
    layers: Sequence[int],
    head: ViTRegSegmentationHead,
    class_names: Sequence[str],
) -> list[Path]:
    """Write the head alone, `segmentation_head.safetensors` and `.json`, as for models that are no ViTReg."""
    facts = {"encoder": encoder.name, "source": encoder.source, "layers": list(layers), "classes": list(class_names)}
    return patch_heads.save_head(folder, "segmentation_head", head, facts)
