# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Features of images with their labels: what probes take, refuse, hold out, and divide over processes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..distributed import derived_seed


HOLD_OUT = 1  # what a seed is derived for, beside the probes' own


class ImageFeatures(NamedTuple):
    """Features of images after the model's final norm, in memory or memory-mapped, for chosen layers in their order.

    Attributes:
        cls: `(num_images, num_layers, hidden_size)`, or `(num_images, hidden_size)` of one layer.
        labels: Class of each image, `(num_images,)`; `None` where nobody knows it.
        patch_mean: Mean of the patches, shaped as `cls`, or `(num_images, hidden_size)` of the last layer.
        register_mean: Mean of the registers, shaped as `patch_mean`; `None` where the model has none.
    """

    cls: torch.Tensor
    labels: torch.Tensor | Sequence[int] | None = None
    patch_mean: torch.Tensor | None = None
    register_mean: torch.Tensor | None = None


def rows_in_chunks(num_rows: int, chunk_size: int) -> list[slice]:
    """Consecutive slices that cover all rows. They depend on nothing else, so that rounding does not either."""
    return [slice(start, min(start + chunk_size, num_rows)) for start in range(0, num_rows, chunk_size)]


def require_features(features: torch.Tensor, name: str, ndim: int = 2) -> None:
    """Reads all features once, in chunks.

    Raises:
        ValueError: If they are empty, of other dimensions, no floating point numbers, NaN or infinite.
    """
    if features.ndim != ndim or not features.numel() or not features.is_floating_point():
        sizes = "(images, layers, hidden_size)" if ndim == 3 else "(images, hidden_size)"
        raise ValueError(
            f"The {name} features must be floating point numbers of shape {sizes} with at least one image, got "
            f"{features.dtype} of shape {tuple(features.shape)}."
        )
    for rows in rows_in_chunks(len(features), 8192):
        finite = torch.isfinite(features[rows]).flatten(1).all(dim=1)
        if not finite.all():
            raise ValueError(
                f"The {name} features of image {rows.start + int((~finite).nonzero()[0])} are NaN or infinite. "
                "Extract them anew in float32 or bfloat16: tokens overflow float16 easily."
            )


def require_width(features: torch.Tensor, width: int, name: str) -> None:
    """Raises `ValueError` unless the last axis has the width of the training features."""
    if features.shape[-1] != width:
        raise ValueError(
            f"The {name} features have {features.shape[-1]} channels and those of the training set {width}: both must "
            "come from one model and the same layers."
        )


def require_labels(
    labels: torch.Tensor | Sequence[int] | None, num_images: int, num_classes: int, name: str
) -> torch.Tensor:
    """Labels as an int64 tensor on the CPU, `(num_images,)`.

    Raises:
        ValueError: If there are none, their number is not that of the images, or one is not from 0 to
            `num_classes - 1`.
    """
    if labels is None:
        raise ValueError(f"The {name} images have no labels, and this evaluation needs the class of each.")
    labels = torch.as_tensor(labels).detach().cpu()
    if labels.is_floating_point() or labels.is_complex() or labels.shape != (num_images,):
        raise ValueError(
            f"The {name} labels must be {num_images} integers, one for each image with features, got {labels.dtype} "
            f"of shape {tuple(labels.shape)}."
        )
    labels = labels.long()
    outside = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"The {name} labels must lie in 0 ... {num_classes - 1}, but image {first} has {int(labels[first])}, "
            f"and {len(outside)} labels in all lie outside. Unreadable images, which have -100, must be left out."
        )
    return labels


def require_every_class(labels: torch.Tensor, num_classes: int, name: str) -> None:
    """Raises `ValueError` where a class has no image to learn it from."""
    missing = (torch.bincount(labels, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if missing:
        listed = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        raise ValueError(
            f"{len(missing)} of {num_classes} classes have no image among the {name} images: {listed}. Add images "
            "of them, or number only the classes that there are."
        )


def held_out_split(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the images to train on and of those held out, both ascending, drawn within each class.

    Args:
        labels: `(num_images,)`.
        share: Of each class that is held out, rounded; every class keeps at least one image to train on.
        seed: Of the draw.

    Raises:
        ValueError: If the share is not between 0 and 1, or leaves nothing held out.
    """
    if not 0 < share < 1:
        raise ValueError(f"held_out_share must be between 0 and 1, got {share}. DINOv2 holds out 0.1.")
    generator = torch.Generator().manual_seed(derived_seed(seed, HOLD_OUT))
    order = torch.randperm(len(labels), generator=generator)
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        images = order[labels[order] == label]
        is_held_out[images[: min(round(share * len(images)), len(images) - 1)]] = True
    if not is_held_out.any():
        raise ValueError(
            f"A share of {share} of {len(labels)} training images in {len(labels.unique())} classes leaves none held "
            "out. Give a larger held_out_share, or more images."
        )
    return (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten()


def own_share(units: Sequence, accelerator: Accelerator | None) -> Sequence:
    """The units of work of this process, dealt out in turn. What is in a unit must not depend on the processes."""
    return units if accelerator is None else units[accelerator.process_index :: accelerator.num_processes]


def gathered(results: list, accelerator: Accelerator | None) -> list:
    """The results of all processes, in each of them."""
    return results if accelerator is None or accelerator.num_processes == 1 else gather_object(results)


def probe_device(
    device: torch.device | str | None, accelerator: Accelerator | None, features: torch.Tensor
) -> torch.device:
    """The device given, else that of the accelerator, else that of the features."""
    if device is not None:
        return torch.device(device)
    return features.device if accelerator is None else accelerator.device


def chunks_on(
    features: torch.Tensor, chunk_size: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and their features, converted chunk by chunk."""
    for rows in rows_in_chunks(len(features), chunk_size):
        yield rows, features[rows].to(device=device, dtype=dtype)
