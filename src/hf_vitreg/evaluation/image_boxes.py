# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Images through a model, and one box of each by LOST or by attention."""

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import PIL.Image
import torch
from accelerate import Accelerator
from torch.nn import functional
from torchvision.transforms.v2 import functional as image_functional

from ..data.image_data import ImageData, read_ahead
from ..distributed import num_cores
from ..features import VisionEncoder
from .labelled import gathered, own_share
from .lost import attention_boxes, lost_sweep
from .progress import progress_bar


logger = logging.getLogger(__name__)

FACETS = ("query", "key", "value", "output")
BATCHES_AT_ONCE = 8  # among the images of so many batches those of one size are brought together


@dataclass(frozen=True)
class LostSettings:
    """How LOST looks at a model.

    Attributes:
        layer: From 0, or from the end with -1 the last.
        facet: `"query"`, `"key"` or `"value"` of its attention, or its `"output"` after the model's final norm.
        normalize: Compare directions only.
        bias: Added to every similarity.
        k_patches: How many patches may join the seed.
    """

    layer: int = -1
    facet: str = "key"
    normalize: bool = False
    bias: float = 0.0
    k_patches: int = 100


@dataclass(frozen=True)
class AttentionSettings:
    """How the baseline looks at a model.

    Attributes:
        layer: From 0, or from the end with -1 the last.
        head: Whose attention of CLS; the published code takes the head 4.
        kept_mass: Share of the attention that is kept.
    """

    layer: int = -1
    head: int = 4
    kept_mass: float = 0.6


Settings = LostSettings | AttentionSettings


class ImageBox(NamedTuple):
    """Left, top, right and bottom in pixels of the image, its size, and whether its seed was in the background."""

    sides: tuple[float, float, float, float]
    image_size: tuple[int, int]
    seed_in_background: bool = False


class _Prepared(NamedTuple):
    """An image as the model takes it, `(3, height, width)`, and its own height and width."""

    index: int
    pixels: torch.Tensor
    image_size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class BoxFinder:
    """What turns images into boxes. Its arguments are those of `discover_objects`."""

    encoder: VisionEncoder
    data: ImageData
    size: tuple[int, int] | None = None
    batch_size: int = 8
    accelerator: Accelerator | None = None
    progress: bool = False

    @cached_property
    def resized_to(self) -> tuple[int, int] | None:
        """Height and width that all images are resized to, `None` where they keep their own.

        Raises:
            ValueError: for a size that the model cannot take, or where its normalization is not known.
        """
        if self.encoder.mean is None or self.encoder.std is None:
            raise ValueError(
                f"What {self.encoder.name} normalizes its images with is not known: it has no "
                "preprocessor_config.json. Save its image processor beside it, or give mean and std to "
                "VisionEncoder.wrap."
            )
        if self.size is not None:
            self.encoder.grid(*self.size)
            return self.size
        if _takes_any_size(self.encoder):
            return None
        height, width = self.encoder.image_size
        logger.warning(
            "%s takes no images but of %dx%d pixels: all are resized to it, whatever their proportions. The published "
            "protocol keeps the size of each.",
            self.encoder.name,
            height,
            width,
        )
        return self.encoder.image_size

    def boxes(self, indices: Sequence[int], settings: Sequence[Settings]) -> dict[Settings, dict[int, ImageBox]]:
        """The boxes of some images by their index, for each of the settings and in every process.

        Args:
            indices: Which images.
            settings: All for LOST, or all for attention.

        Raises:
            ValueError: where there is no image, one cannot be read, or the model has not what the settings ask for.
        """
        if not len(indices):
            raise ValueError(f"{self.data.display_name} has no image.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}.")
        _require_settings(self.encoder, settings)
        # units that do not depend on the number of processes: neither do batches, and so not even rounding
        unit = BATCHES_AT_ONCE * self.batch_size
        units = [indices[start : start + unit] for start in range(0, len(indices), unit)]
        found = gathered(self._own_boxes(own_share(units, self.accelerator), settings), self.accelerator)
        boxes = {each: {} for each in settings}
        for used, index, box in sorted(found, key=lambda result: result[1]):
            boxes[used][index] = box
        return boxes

    def _own_boxes(
        self, units: Sequence[Sequence[int]], settings: Sequence[Settings]
    ) -> list[tuple[Settings, int, ImageBox]]:
        find = _lost if isinstance(settings[0], LostSettings) else _attention
        results, workers = [], num_cores()
        is_shown = self.progress and (self.accelerator is None or self.accelerator.is_main_process)
        with ThreadPoolExecutor(workers) as pool, progress_bar(is_shown) as bar:
            task = bar.add_task("Discovering objects", total=sum(map(len, units)))
            prepared = read_ahead(self._prepare, itertools.chain.from_iterable(units), pool, ahead=2 * workers)
            for unit in units:
                for batch in _by_size(itertools.islice(prepared, len(unit)), self.batch_size):
                    pixels = torch.stack([image.pixels for image in batch])
                    # what a box may reach, in pixels as the model sees them
                    sizes = [self.resized_to or image.image_size for image in batch]
                    for used, boxes, in_background in find(self.encoder, pixels, settings, sizes):
                        for image, box, size, is_lost in zip(batch, boxes.tolist(), sizes, in_background.tolist()):
                            sides = _in_image(box, size, image.image_size)
                            results.append((used, image.index, ImageBox(sides, image.image_size, is_lost)))
                    bar.advance(task, len(batch))
        return results

    def _prepare(self, index: int) -> _Prepared:
        image = self.data.image(index).convert("RGB")
        image_size = (image.height, image.width)
        if self.resized_to is not None:
            image = image.resize(self.resized_to[::-1], PIL.Image.Resampling.BICUBIC)
        pixels = image_functional.pil_to_tensor(image).float() / 255
        pixels = image_functional.normalize(pixels, list(self.encoder.mean), list(self.encoder.std))
        # zeros after the normalization: in the colour of the mean
        below, right = (-side % self.encoder.patch_size for side in pixels.shape[1:])
        return _Prepared(index, functional.pad(pixels, (0, right, 0, below)), image_size)


def _takes_any_size(encoder: VisionEncoder) -> bool:
    """Asks the model itself, with the few patches of a size that none is made for."""
    try:
        encoder.observe(torch.zeros(1, 3, 2 * encoder.patch_size, 3 * encoder.patch_size))
    except ValueError:
        return encoder.grid(*encoder.image_size) == (2, 3)
    return True


def _require_settings(encoder: VisionEncoder, settings: Sequence[Settings]) -> None:
    for each in settings:
        encoder.layer_index(each.layer)
        if isinstance(each, AttentionSettings):
            if not 0 <= each.head < encoder.num_heads:
                raise ValueError(
                    f"head {each.head} does not exist: {encoder.name} has {encoder.num_heads}, counted from 0."
                )
        elif each.facet not in FACETS:
            raise ValueError(f"facet must be one of {', '.join(map(repr, FACETS))}, got {each.facet!r}.")


def _by_size(images: Iterable[_Prepared], batch_size: int) -> Iterator[list[_Prepared]]:
    """Images of one size together."""
    waiting = defaultdict(list)
    for image in images:
        shape = image.pixels.shape
        waiting[shape].append(image)
        if len(waiting[shape]) == batch_size:
            yield waiting.pop(shape)
    yield from waiting.values()


def _in_image(
    box: Sequence[float], size: tuple[int, int], image_size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """A box in an image of one size, in the same image of another."""
    vertical, horizontal = (own / seen for own, seen in zip(image_size, size))
    left, top, right, bottom = box
    return left * horizontal, top * vertical, right * horizontal, bottom * vertical


# The methods: settings, their boxes (batch_size, 4), and whether seeds were in the background (batch_size,)
_Found = Iterator[tuple[Settings, torch.Tensor, torch.Tensor]]


def _lost(
    encoder: VisionEncoder, pixels: torch.Tensor, settings: Sequence[LostSettings], sizes: Sequence[tuple[int, int]]
) -> _Found:
    features = _features(encoder, pixels, {(each.layer, each.facet) for each in settings})
    differing_in_bias = defaultdict(list)
    for each in settings:
        differing_in_bias[replace(each, bias=0.0)].append(each)
    for common, swept in differing_in_bias.items():
        found = lost_sweep(
            features[common.layer, common.facet],
            *encoder.grid(*pixels.shape[-2:]),
            encoder.patch_size,
            sizes,
            k_patches=common.k_patches,
            normalize=common.normalize,
            biases=[each.bias for each in swept],
        )
        for each, boxes in zip(swept, found):
            yield each, boxes.boxes, boxes.seed_in_background


def _features(
    encoder: VisionEncoder, pixels: torch.Tensor, wanted: set[tuple[int, str]]
) -> dict[tuple[int, str], torch.Tensor]:
    """Patches of every layer and facet, `(batch_size, rows * cols, hidden_size)`, by one forward pass."""
    found, outputs, projections = {}, defaultdict(list), defaultdict(list)
    for layer, facet in sorted(wanted):
        if facet == "output":
            outputs[encoder.layer_index(layer)].append(layer)
        else:
            projections[layer].append(facet)

    def keep(layer: int, facet: str, tokens: torch.Tensor):
        found[layer, facet] = tokens[:, encoder.patch_slice]

    def keep_output(index: int, tokens: torch.Tensor):
        for layer in outputs.get(index, ()):
            keep(layer, "output", encoder.final(tokens))

    with ExitStack() as stack:
        for layer, facets in projections.items():
            stack.enter_context(encoder.show_projections(layer, facets, partial(keep, layer)))
        encoder.observe(pixels, on_layer=keep_output)
    return found


def _attention(
    encoder: VisionEncoder,
    pixels: torch.Tensor,
    settings: Sequence[AttentionSettings],
    sizes: Sequence[tuple[int, int]],
) -> _Found:
    for each in settings:
        weights = encoder.attention(pixels, each.layer, "cls")[:, each.head, 0, encoder.patch_slice]
        grid = encoder.grid(*pixels.shape[-2:])
        boxes = attention_boxes(weights, *grid, encoder.patch_size, sizes, kept_mass=each.kept_mass)
        yield each, boxes, torch.zeros(len(boxes), dtype=torch.bool)
