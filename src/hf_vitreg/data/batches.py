# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Batches of training images without end, decoded and cropped by workers, the same after a restart."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset

from ..distributed import derived_seed, forked_rng
from .datasets import read_image
from .orders import Example, Order


logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]
# what is learned from an image beside itself: its name in a sample, and the column of it
COLUMNS = {"images": {}, "labels": {"labels": "label"}, "captions": {"caption": "caption"}}


class BadImage(NamedTuple):
    """One that could not be read, and why."""

    position: int
    epoch: int
    name: str
    reason: str


class _Prepared(NamedTuple):
    """What a worker made of some examples: of those that can be read a batch and their positions."""

    batch: Batch | None
    positions: list[int]
    bad: list[BadImage]

    def cut(self, size: int) -> tuple["_Prepared", "_Prepared | None"]:
        """The first `size` images, or all there are, and the others."""
        if len(self.positions) <= size:
            return self, None
        first = {name: values[:size] for name, values in self.batch.items()}
        others = {name: values[size:] for name, values in self.batch.items()}
        return _Prepared(first, self.positions[:size], []), _Prepared(others, self.positions[size:], [])


class _Preparation(Dataset):
    """The part of the work that workers do."""

    def __init__(self, rows: Sequence[dict] | None, transform: Callable, collate: Callable, seed: int, wants: str):
        self.rows = rows
        self.transform = transform
        self.collate = collate
        self.seed = seed
        self.columns = COLUMNS[wants]

    def __getitems__(self, examples: Sequence[Example]) -> _Prepared:
        samples, positions, bad = [], [], []
        for example in examples:
            row = self.rows[example.index] if example.row is None else example.row
            try:
                image = read_image(row["image"])
            except Exception as error:  # decoders fail on damaged files in many ways
                bad.append(BadImage(example.position, example.epoch, row["name"], _reason(error)))
                continue
            samples.append(self._sample(image, row, example))
            positions.append(example.position)
        return _Prepared(self.collate(samples) if samples else None, positions, bad)

    def _sample(self, image: PIL.Image.Image, row: Mapping, example: Example) -> dict:
        with forked_rng(derived_seed(self.seed, example.epoch, example.index, example.repetition)):
            sample = self.transform(image)
        return sample | {name: row[column] for name, column in self.columns.items()}


class TrainingBatches:
    """Batches in the order of the examples, all of the same size, without end.

    An image that cannot be read is left out and the next example takes its place, so that all processes have as many
    batches. What the batches hold depends neither on the number of workers nor on interruptions.

    Args:
        order: Of the examples of this process.
        transform: From an RGB `PIL.Image` to tensors by name. It draws from torch's CPU generator alone, which is
            seeded for each image. Workers must be able to unpickle it.
        collate: From samples, which are what the transform gave with `labels` or `caption`, to tensors with images on
            the first axis, of shapes that do not depend on which samples are together.
        finish: What is left to do in the training process, from a batch and its number among those of this process,
            and gives a batch.
        batch_size: Images of a batch.
        seed: Of the transform, with the pass, the index and the repetition of an image.
        num_workers: Processes that read, decode and transform; 0 does so in this one.
        prefetch_factor: Lists of examples that each of them is ahead.
        on_bad_image: `skip`, or `raise`.
        wants: What a sample has beside the image.

    Attributes:
        bad_images: Names of the images that were left out.
    """

    def __init__(
        self,
        order: Order,
        transform: Callable[[PIL.Image.Image], Batch],
        collate: Callable[[list[dict]], Batch],
        finish: Callable[[Batch, int], Batch],
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        on_bad_image: Literal["raise", "skip"] = "skip",
        wants: Literal["images", "labels", "captions"] = "images",
    ):
        self.order = order
        self.finish = finish
        self.batch_size = batch_size
        self.on_bad_image = on_bad_image
        self.bad_images: dict[str, None] = {}
        self.num_batches = 0
        self._loader = DataLoader(
            _Preparation(order.rows, transform, collate, seed, wants),
            batch_sampler=_Lists(self),
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=prefetch_factor if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # it draws a seed, which must not come from that of the training
        )
        self._order_state = order.state(0)
        self._start_over()

    def _start_over(self) -> None:
        """Forgets what was read ahead, and ends the workers."""
        self._prepared: Iterator[_Prepared] | None = None
        self._left: _Prepared | None = None
        self._found: list[BadImage] = []
        self._all_bad_since: int | None = None
        self.num_missing = 0

    @property
    def num_bad(self) -> int:
        """Images that were left out, each counted once."""
        return len(self.bad_images)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Raises `ValueError` where no image of a whole pass can be read, or none may be left out."""
        parts, num_missing = [], self.batch_size
        while num_missing:
            part, self._left = (self._left or self._read()).cut(num_missing)
            parts += [part] if part.positions else []
            num_missing -= len(part.positions)
        batch = parts[0].batch
        if len(parts) > 1:
            batch = {name: torch.cat([part.batch[name] for part in parts]) for name in batch}
        self._advance(parts[-1].positions[-1] + 1)
        self.num_batches += 1
        return self.finish(batch, self.num_batches - 1)

    def _read(self) -> _Prepared:
        if self._prepared is None:
            self._prepared = iter(self._loader)
        prepared = next(self._prepared)
        self._found += prepared.bad
        self.num_missing += len(prepared.bad)
        if prepared.positions:
            self._all_bad_since = None
        if prepared.bad:
            self._judge(prepared)
        return prepared

    def _judge(self, prepared: _Prepared) -> None:
        first, last = prepared.bad[0], prepared.bad[-1]
        if self.on_bad_image == "raise":
            raise ValueError(
                f"{first.name} cannot be read as an image: {first.reason}. Repair or remove it, or set --on_bad_image "
                "skip."
            )
        if not prepared.positions and self._all_bad_since is None:
            self._all_bad_since = first.epoch
        elif not prepared.positions and last.epoch > self._all_bad_since + 1:
            raise ValueError(f"None of the images can be read. {last.name}: {last.reason}.")

    def _advance(self, position: int) -> None:
        """All before a position is done with. What was read beyond it is read again after a restart."""
        self._order_state = self.order.state(position)
        while self._found and self._found[0].position < position:
            bad = self._found.pop(0)
            if bad.name not in self.bad_images:
                logger.warning("Skipped: %s cannot be read as an image: %s", bad.name, bad.reason)
                self.bad_images[bad.name] = None

    def state(self) -> dict:
        """What `load_state` needs to go on after the last batch, in the types of JSON; of each process another."""
        return {
            "order": self._order_state,
            "num_batches": self.num_batches,
            "bad_images": list(self.bad_images),
        }

    def load_state(self, state: dict) -> None:
        """Goes on from there. Raises `ValueError` where the state belongs to other data or processes."""
        self._start_over()
        self.order.load_state(state["order"])
        self._order_state = state["order"]
        self.num_batches = state["num_batches"]
        self.bad_images = dict.fromkeys(state["bad_images"])

    def close(self) -> None:
        """Ends the workers and what reads ahead."""
        self._start_over()
        self.order.close()

    def __enter__(self) -> "TrainingBatches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Lists:
    """The examples that workers get together: a batch, or where images were bad as many as are missing.

    Without the latter each batch after a bad image would be put together from two.
    """

    def __init__(self, batches: TrainingBatches):
        self.batches = batches

    def __iter__(self) -> Iterator[list[Example]]:
        while True:
            size = min(self.batches.num_missing, self.batches.batch_size)
            self.batches.num_missing -= size
            yield [next(self.batches.order) for _ in range(size or self.batches.batch_size)]


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "Pillow does not know the format"  # its own words name a buffer in memory
    return " ".join(str(error).split()) or type(error).__name__


def _as_it_is(prepared: _Prepared) -> _Prepared:
    return prepared
