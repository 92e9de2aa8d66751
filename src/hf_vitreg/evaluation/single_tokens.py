# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Random tokens of images by what they are: CLS, registers, outliers and other patches.

"Vision Transformers Need Registers" (Darcet et al., 2024), section 2.1: the paper picks one random token of a kind in
every image and trains a linear probe on it. A patch is an outlier where its norm before the final norm is above the
threshold; tokens are given after the final norm, as everything that uses the model reads them.

One pass over the images draws the tokens of all kinds. They are kept in memory, for N images and a width D no more
than `N * num_draws * D` numbers of 4 bytes a kind: 39 GB for five draws of ViT-g on all of ImageNet-1k.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch.nn import functional

from ..data.image_data import ImageData, read_ahead
from ..distributed import derived_seed, num_cores
from ..features import VisionEncoder
from .extraction import FeatureSpec, preprocess
from .progress import progress_bar


KINDS = ("cls", "normal", "outlier", "register")
NUM_DRAWS = 5
DRAW = 11  # what a seed is derived for, beside other choices


@dataclass(frozen=True, eq=False)
class DrawnTokens:
    """Random tokens of one kind, of the images that have such a token.

    Attributes:
        images: Which images, ascending, `(num_images,)`.
        tokens: After the final norm, `(num_images, num_draws, hidden_size)`. Where every image has one token of the
            kind, as of CLS, there is one draw.
        cells: Where they are in the grid, `row * cols + col`, `(num_images, num_draws)`; -1 unless they are patches.
        pixels: Of their patches, normalized, channel by channel, `(num_images, num_draws, 3 * patch_size**2)`; `None`
            where they were not asked for.
        num_without: How many images have no such token.
        grid: Rows and columns.
    """

    images: torch.Tensor
    tokens: torch.Tensor
    cells: torch.Tensor
    pixels: torch.Tensor | None
    num_without: int
    grid: tuple[int, int]

    def __len__(self) -> int:
        return len(self.images)


def available_kinds(encoder: VisionEncoder) -> tuple[str, ...]:
    """The kinds of tokens that a model may have."""
    absent = {"cls": not encoder.has_cls, "register": not encoder.num_registers}
    return tuple(kind for kind in KINDS if not absent.get(kind))


def draw_tokens(
    encoder: VisionEncoder,
    data: ImageData,
    threshold: float,
    kinds: Sequence[str] | None = None,
    *,
    num_draws: int = NUM_DRAWS,
    with_pixels: bool = False,
    size: tuple[int, int] | None = None,
    preprocessing: str = "crop",
    batch_size: int = 32,
    num_workers: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, DrawnTokens]:
    """Draws tokens of some kinds from every image, in one pass.

    Each draw takes one of the image's tokens of the kind, whichever it took before. What is drawn depends on the
    seed, the number of the image and its own tokens alone.

    Args:
        encoder: On the device to compute on.
        data: Images.
        threshold: Norm before the final norm of the last layer, above which a patch is an outlier. 150 for DINOv2
            ViT-g in the paper; other models have others.
        kinds: `"cls"`, `"normal"` and `"outlier"` patches, `"register"`; by default all that the model may have.
        num_draws: How often.
        with_pixels: Take the pixels of patches, too.
        size, preprocessing: As in `FeatureSpec`.
        batch_size: Images that go through the model together.
        num_workers: Threads that decode images.
        seed: Of the draws.
        progress: Show how far it is.

    Returns:
        Tokens by kind, of no image where none has such a token.

    Raises:
        ValueError: for kinds that the model has not, a number that is too small, or an image that cannot be read.
    """
    kinds = tuple(kinds or available_kinds(encoder))
    for kind in kinds:
        if kind not in available_kinds(encoder):
            raise ValueError(f"{encoder.name} has no {kind!r} tokens, only {', '.join(available_kinds(encoder))}.")
    if num_draws < 1 or batch_size < 1 or not len(data):
        raise ValueError(f"There must be an image and a draw, got num_draws={num_draws} of {data.display_name}.")
    spec = FeatureSpec(kinds=("patches",), size=size, preprocessing=preprocessing).of(encoder)
    draw = _Draw(encoder, kinds, threshold, num_draws, with_pixels, seed)
    stores = {kind: _Store(len(data)) for kind in kinds}
    with progress_bar(progress) as bar:
        task = bar.add_task(f"Tokens of {data.display_name}", total=len(data))
        for first, pixel_values in _batches(encoder, data, spec, batch_size, num_workers):
            for kind, rows in draw(first, pixel_values).items():
                stores[kind].add(rows)
            bar.advance(task, len(pixel_values))
    return {kind: store.drawn(encoder.grid(*spec.size)) for kind, store in stores.items()}


def _batches(
    encoder: VisionEncoder, data: ImageData, spec: FeatureSpec, batch_size: int, num_workers: int | None
) -> Iterator[tuple[int, torch.Tensor]]:
    """The number of the first image, and `(batch_size, 3, height, width)`."""
    with ThreadPoolExecutor(num_workers or num_cores()) as pool:
        prepared = read_ahead(
            lambda index: preprocess(encoder, data.image(index), spec), range(len(data)), pool, ahead=batch_size
        )
        first = 0
        while batch := list(islice(prepared, batch_size)):
            yield first, torch.stack(batch)
            first += len(batch)


class _Rows(NamedTuple):
    """What was drawn from the images of a batch; see `DrawnTokens`."""

    images: torch.Tensor
    tokens: torch.Tensor
    cells: torch.Tensor
    pixels: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class _Draw:
    """What draws from a batch. Its attributes are the arguments of `draw_tokens`."""

    encoder: VisionEncoder
    kinds: Sequence[str]
    threshold: float
    num_draws: int
    with_pixels: bool
    seed: int

    def __call__(self, first: int, pixel_values: torch.Tensor) -> dict[str, _Rows]:
        before = self.encoder.layers(pixel_values, [-1])[-1]
        final, norms = self.encoder.final(before), torch.linalg.vector_norm(before.float(), dim=-1).cpu()
        pixels = None
        if self.with_pixels:
            side = self.encoder.patch_size
            pixels = functional.unfold(pixel_values, side, stride=side).mT
        return {kind: self._rows(kind, first, norms, final, pixels) for kind in self.kinds}

    def _rows(
        self, kind: str, first: int, norms: torch.Tensor, final: torch.Tensor, pixels: torch.Tensor | None
    ) -> _Rows:
        is_kind = self._is_kind(kind, norms)
        images = is_kind.any(dim=1).nonzero().flatten()
        places = [self._places(kind, first + index, is_kind[index]) for index in images.tolist()]
        places = torch.stack(places) if places else torch.empty(0, self._draws_of(kind), dtype=torch.long)
        rows, columns = images.to(final.device)[:, None], places.to(final.device)
        cells = (places - self.encoder.num_prefix_tokens).clamp(min=-1)
        of_patches = None if pixels is None else pixels[images[:, None], cells.clamp(min=0)]
        return _Rows(images + first, final[rows, columns].float().cpu(), cells, of_patches)

    def _is_kind(self, kind: str, norms: torch.Tensor) -> torch.Tensor:
        """`(batch_size, tokens)`."""
        place = torch.arange(norms.shape[1])
        if kind == "cls":
            return (place == 0).expand(norms.shape)
        if kind == "register":
            of_registers = self.encoder.register_slice
            return ((place >= of_registers.start) & (place < of_registers.stop)).expand(norms.shape)
        is_patch, is_high = place >= self.encoder.num_prefix_tokens, norms > self.threshold
        return is_patch & (is_high if kind == "outlier" else ~is_high)

    def _places(self, kind: str, image: int, is_kind: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, DRAW, KINDS.index(kind), image))
        candidates = is_kind.nonzero().flatten()
        return candidates[torch.randint(len(candidates), (self._draws_of(kind),), generator=generator)]

    def _draws_of(self, kind: str) -> int:
        is_single = kind == "cls" or (kind == "register" and self.encoder.num_registers == 1)
        return 1 if is_single else self.num_draws


class _Store:
    """Rows where they are to stay; a list of batches would take their place twice in the end."""

    def __init__(self, num_images: int):
        self.num_images, self.length, self.buffers = num_images, 0, None

    def add(self, rows: _Rows) -> None:
        if self.buffers is None:
            # pages that are never written take no memory
            self.buffers = [
                None if each is None else each.new_empty(self.num_images, *each.shape[1:]) for each in rows
            ]
        for buffer, values in zip(self.buffers, rows):
            if buffer is not None:
                buffer[self.length : self.length + len(values)] = values
        self.length += len(rows.images)

    def drawn(self, grid: tuple[int, int]) -> DrawnTokens:
        filled = [None if buffer is None else buffer[: self.length] for buffer in self.buffers]
        return DrawnTokens(*filled, num_without=self.num_images - self.length, grid=grid)
