# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Unsupervised object discovery with any ViT: one box an image, by LOST or by attention, and its CorLoc.

The protocol is that of LOST (Siméoni et al., 2021, section 4.1): images at their own size, normalized and then padded
with zeros to whole patches. "Vision Transformers Need Registers" (Darcet et al., 2024, section 3.3) adds a bias to the
gram matrix and does not say which one. `tune_object_discovery` chooses it, as "Vision Transformers Don't Need Trained
Registers" (Jiang et al., 2025) does with normalized features, but on a share of the images that it names, and reports
CorLoc on the others.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from ..data.image_data import ImageData
from ..distributed import derived_seed
from ..features import VisionEncoder
from ..metrics.corloc import CorLoc, is_found
from .image_boxes import AttentionSettings, BoxFinder, ImageBox, LostSettings, Settings


BIASES = tuple(-step / 20 for step in range(21))  # 0 to -1, where Jiang et al. look for it
TUNING = 2  # what a seed is derived for, beside other choices of images
_FAMILIES_ON_VALUES = re.compile(r"deit-?_?(3|iii)|clip", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class DiscoveredObjects:
    """One box for each image.

    Attributes:
        boxes: `(num_images, 4)` float64: left, top, right and bottom, in pixels of the image.
        image_sizes: `(num_images, 2)`, height and width.
        found: Whether the box of each image overlaps a true one with an IoU of 0.5 or more; `None` for an image whose
            true boxes are not known.
        corloc: Share of the images in which it does, in `[0, 1]`; `None` where no true box is known.
        settings: What the boxes were made with.
        num_seeds_in_background: Images whose seed was not similar to itself, so that its patch is the box.
        resized_to: Height and width that all images were resized to, `None` where they kept their own.
    """

    boxes: np.ndarray
    image_sizes: np.ndarray
    found: Sequence[bool | None]
    corloc: float | None
    settings: Settings
    num_seeds_in_background: int
    resized_to: tuple[int, int] | None

    def summary(self) -> dict[str, Any]:
        """What belongs in a report, as JSON takes it."""
        return {
            "corloc": self.corloc,
            "num_images": len(self.boxes),
            "method": "lost" if isinstance(self.settings, LostSettings) else "attention",
            **dataclasses.asdict(self.settings),
            "num_seeds_in_background": self.num_seeds_in_background,
            "resized_to": self.resized_to,
        }


class Trial(NamedTuple):
    """Settings, and their CorLoc on the images that tune."""

    settings: LostSettings
    corloc: float


@dataclass(frozen=True, eq=False)
class TunedDiscovery:
    """Object discovery with settings that were chosen on a share of the images.

    Attributes:
        objects: Boxes of all images with the chosen settings. Its CorLoc includes the images that chose them.
        settings: Those with the highest CorLoc on the images that tune, the first of equals.
        tuning_indices: Which images these are.
        tuning_corloc: CorLoc on them, too high by the choice.
        corloc: CorLoc on all others.
        trials: Every setting that was tried.
        seed: That drew the images.
    """

    objects: DiscoveredObjects
    settings: LostSettings
    tuning_indices: Sequence[int]
    tuning_corloc: float
    corloc: float
    trials: Sequence[Trial]
    seed: int

    def summary(self, data: ImageData) -> dict[str, Any]:
        """What belongs in a report, as JSON takes it; the images that tuned by their names."""
        return {
            **self.objects.summary(),
            "corloc": self.corloc,
            "corloc_on_tuning_images": self.tuning_corloc,
            "corloc_on_all_images": self.objects.corloc,
            "num_images_measured": len(data) - len(self.tuning_indices),
            "tuning_seed": self.seed,
            "tuning_images": [data.name(index) for index in self.tuning_indices],
            "trials": [{**dataclasses.asdict(trial.settings), "corloc": trial.corloc} for trial in self.trials],
        }


def default_facet(encoder: VisionEncoder) -> str:
    """Values for DeiT-III and CLIP, keys for all others, as Darcet et al. (2024), section 3.3, have it for DINOv2.

    Families are known by the source and name of the model; a converted model that is called something else has keys.
    """
    return "value" if _FAMILIES_ON_VALUES.search(f"{encoder.source} {encoder.name}") else "key"


def discover_objects(
    encoder: VisionEncoder,
    data: ImageData,
    method: str = "lost",
    *,
    layer: int = -1,
    facet: str | None = None,
    normalize: bool = False,
    bias: float = 0.0,
    k_patches: int = 100,
    head: int = 4,
    kept_mass: float = 0.6,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> DiscoveredObjects:
    """One box for each image.

    Args:
        encoder: A model.
        data: Images; where it has `boxes(index)`, the boxes are compared with those.
        method: `"lost"`, or `"attention"`, the baseline.
        layer: From 0, or from the end with -1 the last.
        facet, normalize, bias, k_patches: See `LostSettings`; by default `default_facet`.
        head, kept_mass: See `AttentionSettings`.
        size: Height and width in pixels that images are resized to, whatever their proportions. By default images
            keep their size, unless the model takes its own alone.
        batch_size: Images of one size that the model gets together.
        accelerator: Of the processes that share the images; each gets all boxes.
        progress: Show a bar.

    Raises:
        ValueError: where there is no image, one cannot be read, or the model has no such layer, facet, head or size.
    """
    if method == "lost":
        settings = LostSettings(layer, facet or default_facet(encoder), normalize, bias, k_patches)
    elif method == "attention":
        settings = AttentionSettings(layer, head, kept_mass)
    else:
        raise ValueError(f'method must be "lost" or "attention", got {method!r}.')
    finder = BoxFinder(encoder, data, size, batch_size, accelerator, progress)
    boxes = finder.boxes(range(len(data)), [settings])[settings]
    return _objects(boxes, data, settings, finder.resized_to)


def tune_object_discovery(
    encoder: VisionEncoder,
    data: ImageData,
    *,
    layers: Sequence[int] = (-1,),
    facets: Sequence[str] | None = None,
    normalize: Sequence[bool] = (True,),
    biases: Sequence[float] = BIASES,
    k_patches: int = 100,
    tuning_share: float = 0.2,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> TunedDiscovery:
    """LOST with the settings that find most on a random share of the images, and what they find on the others.

    An image of the share goes through the model once for all settings, and its gram matrix is computed once for all
    biases.

    Args:
        encoder: A model.
        data: Images with `boxes(index)`.
        layers, facets, normalize, biases: What is tried, each with each; by default `default_facet`.
        k_patches: See `LostSettings`.
        tuning_share: Share of the images that tune, above 0 and below 1.
        seed: Of the choice of images.
        size, batch_size, accelerator, progress: As in `discover_objects`.

    Raises:
        ValueError: as `discover_objects` does, and where there are no true boxes, nothing to try, or less than two
            images.
    """
    facets = [default_facet(encoder)] if facets is None else facets
    tried = [
        LostSettings(layer, facet, is_normalized, bias, k_patches)
        for layer, facet, is_normalized, bias in itertools.product(layers, facets, normalize, biases)
    ]
    if not tried:
        raise ValueError("There is nothing to try: give a layer, a facet, a bias, and normalize of True or False.")
    tuning, others = _tuning_split(data, tuning_share, seed)
    finder = BoxFinder(encoder, data, size, batch_size, accelerator, progress)
    tuning_boxes = finder.boxes(tuning, tried)
    trials = [Trial(settings, _corloc(tuning_boxes[settings], data)) for settings in tried]
    best = max(trials, key=lambda trial: trial.corloc)
    other_boxes = finder.boxes(others, [best.settings])[best.settings]
    all_boxes = {**tuning_boxes[best.settings], **other_boxes}
    return TunedDiscovery(
        objects=_objects(all_boxes, data, best.settings, finder.resized_to),
        settings=best.settings,
        tuning_indices=tuning,
        tuning_corloc=best.corloc,
        corloc=_corloc(other_boxes, data),
        trials=trials,
        seed=seed,
    )


def _objects(
    boxes: Mapping[int, ImageBox], data: ImageData, settings: Settings, resized_to: tuple[int, int] | None
) -> DiscoveredObjects:
    ordered = [boxes[index] for index in range(len(data))]
    true_boxes = [data.boxes(index) if hasattr(data, "boxes") else () for index in range(len(data))]
    found = [is_found(box.sides, true) if len(true) else None for box, true in zip(ordered, true_boxes)]
    return DiscoveredObjects(
        boxes=np.array([box.sides for box in ordered]),
        image_sizes=np.array([box.image_size for box in ordered]),
        found=found,
        corloc=_corloc(boxes, data) if any(each is not None for each in found) else None,
        settings=settings,
        num_seeds_in_background=sum(box.seed_in_background for box in ordered),
        resized_to=resized_to,
    )


def _corloc(boxes: Mapping[int, ImageBox], data: ImageData) -> float:
    true_boxes = [np.asarray(data.boxes(index), dtype=np.float64).tolist() for index in boxes]
    metric = CorLoc(keep_in_memory=True)
    return metric.compute(predictions=[box.sides for box in boxes.values()], references=true_boxes)["corloc"]


def _tuning_split(data: ImageData, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the images that tune, and of the others, each at least one and in order."""
    if not hasattr(data, "boxes"):
        raise ValueError(f"{data.display_name} has no boxes to tune with. Give them, or a fixed bias.")
    if not 0 < share < 1 or len(data) < 2:
        raise ValueError(
            f"Tuning needs a share of the images above 0 and below 1 and two images at least, got {share} of "
            f"{len(data)}."
        )
    generator = torch.Generator().manual_seed(derived_seed(seed, TUNING))
    order = torch.randperm(len(data), generator=generator).tolist()
    number = min(max(round(share * len(data)), 1), len(data) - 1)
    return sorted(order[:number]), sorted(order[number:])
