# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Features of many images to one file, the model kept busy: what `hf-vitreg features` does.

Threads decode and resize, another one makes batches of one size, one writes, and the caller's runs the model. Images
are divided into windows, which batches never cross: whatever interruption there was, batches are the same, and so is
the file, to the last bit.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import PIL.Image
import torch
from transformers import PreTrainedModel

from ..data.image_data import read_ahead
from ..distributed import num_cores
from ..evaluation.feature_cache import encoder_key
from ..evaluation.progress import progress_bar
from ..features import VisionEncoder, load_vit, quiet_loading
from ..machine import memory_errors, usable_device
from ..matmul import fast_float32_matmul
from ..modeling_vitreg import ViTRegModel
from .feature_files import (
    DTYPES,
    PATCHES,
    PartialFeatures,
    Rows,
    Shard,
    concatenated,
    require_output,
    require_stackable,
    write_features,
)
from .image_sources import ImageSource, SourceImage, open_images
from .optimize import optimize
from .quantize import quantize


KINDS = ("cls", "registers", PATCHES, "patch_mean")
WINDOW_BATCHES = 16  # batches of images of many sizes that are sorted by size together
MAX_WAITING_BYTES = 256 * 2**20  # of images that wait for others of their size
MAX_PATCHES = 128 * 128  # of an image: more are a mistake more often than a wish
# what a model can be made to compute in
FAST = ("float32", "bfloat16", "int8")
# a shard is written as soon as it has so many images, or bytes, or seconds
SHARD_IMAGES, SHARD_BYTES, SHARD_SECONDS = 1000, 256 * 2**20, 60.0

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Which features, and of which images.

    Attributes:
        tokens: Some of `"cls"`, `"registers"`, `"patches"` and `"patch_mean"`, after the model's final norm.
        layer: Whose, from 1; by default the last.
        dtype: Of the file, `"float32"` or `"float16"`.
        size: Height and width in pixels that the model sees, by `VisionEncoder.preprocess`; by default its own.
        keep_size: In place of it each image has the whole patches nearest to its own size, and its aspect; less than
            a patch is cut off.
        max_side: With `keep_size`, larger images are scaled down until no side has more pixels.
        batch_size: Images that go through the model together; with `keep_size` fewer of those that are larger than
            the model's own size.
        num_workers: Threads that decode; by default the cores.
        optimize: What a ViTReg computes in by `deployment.optimize`, `"float32"` or `"bfloat16"`, or by `quantize`,
            `"int8"`; by default the model computes as it is.
        skip_bad_images: Leave out what cannot be read.
        split, config_name, image_column, streaming: As for `open_images`.
    """

    tokens: tuple[str, ...] = ("cls",)
    layer: int | None = None
    dtype: str = "float32"
    size: tuple[int, int] | None = None
    keep_size: bool = False
    max_side: int | None = None
    batch_size: int = 32
    num_workers: int | None = None
    optimize: str | None = None
    skip_bad_images: bool = False
    split: str = "train"
    config_name: str | None = None
    image_column: str | None = None
    streaming: bool = False

    def __post_init__(self):
        for name, values, allowed in (
            ("tokens", self.tokens, KINDS),
            ("dtype", [self.dtype], DTYPES),
            ("optimize", [self.optimize], (None, *FAST)),
        ):
            wrong = [value for value in values if value not in allowed]
            if wrong or not values:
                given = ", ".join(map(repr, wrong)) or "none"
                raise ValueError(f"{name} must be among {', '.join(filter(None, allowed))}, got {given}.")
        for name in ("batch_size", "num_workers", "max_side"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.keep_size and self.size is not None:
            raise ValueError("Images are given one size, or keep theirs: size goes without keep_size.")
        if self.max_side is not None and not self.keep_size:
            raise ValueError("max_side is for images that keep their size: add keep_size, or give a size.")


@dataclass(frozen=True)
class Extracted:
    """What was extracted.

    Attributes:
        path: The file.
        num_images: How many images are in it.
        left_out: Why an image is not, by its name.
        num_computed: How many of the images this run computed; others were there from one before.
        seconds: What that took, from the first image that was asked for until the file was there.
        model_seconds: For how many of them the model was computing.
    """

    path: Path
    num_images: int
    left_out: Mapping[str, str]
    num_computed: int
    seconds: float
    model_seconds: float

    @property
    def images_per_second(self) -> float:
        """Of this run."""
        return self.num_computed / self.seconds

    @property
    def model_busy(self) -> float:
        """Share of the time in which the model was computing."""
        return self.model_seconds / self.seconds

    def sentence(self) -> str:
        """In words: `1000 images, 41.3 images/s, model busy 96 %`."""
        before = self.num_images - self.num_computed
        there = f", {before} of them computed before" if before else ""
        return (
            f"{self.num_images} images{there}, {self.images_per_second:.1f} images/s, "
            f"model busy {self.model_busy:.0%}".replace("%", " %")
        )


def extract_features(
    model: str | Path | VisionEncoder,
    images: Sequence[str | Path],
    output: str | Path,
    options: FeatureOptions | None = None,
    *,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Extracted:
    """Features of images to a file. A run that was stopped goes on when it is started again, to the same file.

    What is computed is kept in `OUTPUT.partial` until the file is there.

    Args:
        model: As for `load_vit`, or one that is loaded.
        images: As for `open_images`.
        output: A file that ends in `.parquet` or `.safetensors`; what is in it tells `write_features`.
        options: Which features, of which images.
        device: Where to compute; by default a GPU where there is one. A model that is loaded stays where it is.
        overwrite: Replace a file that is there, and begin again what was begun with something else.
        progress: Show a bar on stderr.

    Returns:
        What was extracted, and how fast.

    Raises:
        ValueError: for whatever cannot be used, which is named: a model without such tokens, an image that cannot be
            read, an unfinished run of another model, other images or options.
        OSError: where files cannot be written.
    """
    options, output = options or FeatureOptions(), Path(output)
    require_output(output, overwrite)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("Features are extracted by one process: start it without torchrun or accelerate launch.")
    source = open_images(
        images,
        split=options.split,
        config_name=options.config_name,
        image_column=options.image_column,
        streaming=options.streaming,
    )
    with quiet_loading(), memory_errors():
        encoder = model if isinstance(model, VisionEncoder) else load_vit(model, device=usable_device(device))
        _require_possible(encoder, options, output)
        description = _description(encoder, source, options)
        partial = PartialFeatures(output, description, overwrite)
        _refuse_left_out(partial, options)
        with fast_float32_matmul() if encoder.device.type == "cpu" else contextlib.nullcontext():
            optimized = _optimized(encoder, options.optimize)
            return _Run(encoder, source, options, partial, output, progress, optimized).run()


def _require_possible(encoder: VisionEncoder, options: FeatureOptions, output: Path) -> None:
    """Raises `ValueError` for what no image could be given."""
    for kind, exists in (("cls", encoder.has_cls), ("registers", encoder.num_registers)):
        if kind in options.tokens and not exists:
            raise ValueError(f"{encoder.name} has no {kind}. Choose other tokens among {', '.join(KINDS)}.")
    if not 1 <= _layer(encoder, options) <= encoder.num_layers:
        raise ValueError(f"{encoder.name} has layers 1 to {encoder.num_layers}, got {options.layer}.")
    if options.optimize and not isinstance(encoder.model, ViTRegModel):
        raise ValueError(f"optimize is for ViTReg models, which {encoder.name} is not: convert it, or leave it out.")
    if options.max_side is not None and options.max_side < encoder.patch_size:
        raise ValueError(f"max_side is {options.max_side} pixels, less than a patch of {encoder.patch_size}.")
    encoder.preprocess([PIL.Image.new("RGB", (1, 1))], options.size)


def _layer(encoder: VisionEncoder, options: FeatureOptions) -> int:
    return encoder.num_layers if options.layer is None else options.layer


def _description(encoder: VisionEncoder, source: ImageSource, options: FeatureOptions) -> dict:
    """All that the features depend on."""
    return {
        "model": {**encoder_key(encoder), "mean": list(encoder.mean), "std": list(encoder.std)},
        "dtype of the weights": str(encoder.dtype),
        "optimized": options.optimize,
        "images": source.identity,
        # what decides how they are rounded, too
        "batch size": options.batch_size,
        "tokens": [kind for kind in KINDS if kind in options.tokens],
        "layer": _layer(encoder, options),
        "dtype": options.dtype,
        "size": "kept" if options.keep_size else options.size or encoder.image_size,
        "max side": options.max_side,
    }


def _refuse_left_out(partial: PartialFeatures, options: FeatureOptions) -> None:
    if partial.left_out and not options.skip_bad_images:
        raise ValueError(
            f"{len(partial.left_out)} images were left out before. The first: {next(iter(partial.left_out.values()))} "
            "Go on with --skip-bad-images, or begin again with --overwrite."
        )


def _optimized(encoder: VisionEncoder, name: str | None) -> PreTrainedModel | None:
    """The encoder's model, made to compute in what is named so; `None` where it is to compute as it is."""
    if name is None:
        return None
    return quantize(encoder.model) if name == "int8" else optimize(encoder.model, getattr(torch, name))


def in_background(items: Iterable[Item], ahead: int) -> Iterator[Item]:
    """Items that a thread reads while the caller is busy.

    Args:
        items: What they are read from; closed by that thread where it can be.
        ahead: No more than this many are read before they are asked for, and one that waits for room.

    Yields:
        The items in order. An error is raised where its item would have been.
    """
    ready, is_over = queue.Queue(ahead), threading.Event()

    def offer(item: Item | None, error: BaseException | None, is_last: bool) -> bool:
        while not is_over.is_set():
            with contextlib.suppress(queue.Full):
                ready.put((item, error, is_last), timeout=0.05)
                return True
        return False

    def read() -> None:
        try:
            if all(offer(item, None, False) for item in items):
                offer(None, None, True)
        except BaseException as error:  # whatever it is, it is the caller's
            offer(None, error, True)
        finally:
            getattr(items, "close", lambda: None)()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            item, error, is_last = ready.get()
            if error is not None:
                raise error
            if is_last:
                return
            yield item
    finally:
        is_over.set()
        thread.join()


class _Prepared(NamedTuple):
    """One image that was read: its size in pixels, and `pixels` `(3, height, width)`, uint8; or why there are none."""

    image: SourceImage
    size: tuple[int, int] = (0, 0)
    pixels: torch.Tensor | None = None
    reason: str | None = None


class _WindowEnd(NamedTuple):
    """After the last batch of a window: where it stops, and why images of it were left out, by their names."""

    stop: int
    left_out: dict[str, str]


class _Done(NamedTuple):
    """One image with its features, without the axis of the batch."""

    image: SourceImage
    size: tuple[int, int]
    grid: tuple[int, int]
    features: dict[str, np.ndarray]


@dataclass(eq=False)
class _Run:
    """One run, from the images that have no features yet to the file."""

    encoder: VisionEncoder
    source: ImageSource
    options: FeatureOptions
    partial: PartialFeatures
    output: Path
    progress: bool
    optimized: PreTrainedModel | None
    model_seconds: float = 0.0
    first_grid: tuple[int, int] | None = None
    # of the shard that nobody writes yet
    rows: list[Rows] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    start: int = 0
    stop: int = 0

    def run(self) -> Extracted:
        if self.optimized is not None:  # compiled before anything is timed
            self._tokens(torch.zeros(2, 3, *self.encoder.image_size, device=self.encoder.device))
        num_before, started = self.partial.num_images, time.perf_counter()
        if PATCHES in self.options.tokens and (first := next(self.partial.filled(), None)):
            self.first_grid = tuple(first.grids[0].tolist())
        self._compute()
        partial = self.partial
        if not partial.num_images:
            reason = next(iter(partial.left_out.values()), "there is none.")
            partial.remove()
            raise ValueError(f"No image of {self.source.display_name} can be read. The first: {reason}")
        write_features(self.output, partial.filled, self._about())
        partial.remove()
        seconds, num_computed = time.perf_counter() - started, partial.num_images - num_before
        return Extracted(self.output, partial.num_images, partial.left_out, num_computed, seconds, self.model_seconds)

    def _about(self) -> dict:
        encoder, description = self.encoder, self.partial.description
        return {
            "model": encoder.name,
            "source": encoder.source,
            "sha256": description["model"]["weights"],
            "patch_size": encoder.patch_size,
            "images": self.source.display_name,
            **{name: description[name] for name in ("tokens", "layer", "dtype", "size", "max side", "batch size")},
            "left_out": self.partial.left_out,
        }

    # What other threads do

    def _batches(self, pool: ThreadPoolExecutor) -> Iterator[list[_Prepared] | _WindowEnd]:
        """Images of one size at a time, and the ends of windows."""
        waiting, num_bytes, left_out, stop = {}, 0, {}, self.partial.stop
        window = self.options.batch_size * (WINDOW_BATCHES if self.options.keep_size else 1)
        jobs = self.source.since(stop)
        for each in read_ahead(self._prepare, jobs, pool, ahead=self.options.batch_size):
            stop = each.image.index + 1
            if each.pixels is None:
                left_out[each.image.name] = each.reason
            else:
                size = each.pixels.shape[1:]
                waiting.setdefault(size, []).append(each)
                num_bytes += each.pixels.nbytes
                if num_bytes > MAX_WAITING_BYTES:
                    size = max(waiting, key=lambda size: len(waiting[size]) * size.numel())
                if len(waiting[size]) >= self._batch_size(size) or num_bytes > MAX_WAITING_BYTES:
                    batch = waiting.pop(size)
                    num_bytes -= sum(each.pixels.nbytes for each in batch)
                    yield batch
            if stop % window == 0:
                yield from waiting.values()
                yield _WindowEnd(stop, left_out)
                waiting, num_bytes, left_out = {}, 0, {}
        yield from waiting.values()
        yield _WindowEnd(stop, left_out)

    def _batch_size(self, size: Sequence[int]) -> int:
        """Of images of a size: no more memory than a batch of the model's own."""
        if not self.options.keep_size:
            return self.options.batch_size
        own, patches = (int(np.prod(self.encoder.grid(*pixels))) for pixels in (self.encoder.image_size, size))
        return max(1, min(self.options.batch_size, self.options.batch_size * own // patches))

    def _prepare(self, image: SourceImage) -> _Prepared:
        try:
            picture = image.read()
        except ValueError as error:
            if not self.options.skip_bad_images:
                raise ValueError(f"{error} Or leave out what cannot be read with --skip-bad-images.") from error
            return _Prepared(image, reason=str(error))
        size = (picture.height, picture.width)
        seen = self._kept_size(image, size) if self.options.keep_size else self.options.size or self.encoder.image_size
        return _Prepared(image, size, self.encoder.fit(picture, seen))

    def _kept_size(self, image: SourceImage, size: tuple[int, int]) -> tuple[int, int]:
        """Whole patches nearest to an image's own size, or to that with the largest side that is allowed."""
        patch_size, longest = self.encoder.patch_size, self.options.max_side or max(size)
        scale = min(1, longest / max(size))
        # nearest may be more than was allowed
        most = max(size) if self.options.max_side is None else longest // patch_size
        rows, cols = (max(1, min(round(side * scale / patch_size), most)) for side in size)
        if rows * cols > MAX_PATCHES:
            raise ValueError(
                f"{image.name} has {size[0]}x{size[1]} pixels, {rows * cols} patches, and no more than {MAX_PATCHES} "
                f"are computed. Give --max-side, as {self.encoder.patch_size * 64}."
            )
        return rows * patch_size, cols * patch_size

    # What the caller's thread does

    def _compute(self) -> None:
        workers = self.options.num_workers or num_cores()
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(workers))
            self._writer = stack.enter_context(ThreadPoolExecutor(1))
            self._writing, self._begun = None, time.perf_counter()
            self.start = self.stop = self.partial.stop
            bar = stack.enter_context(progress_bar(self.progress))
            task = bar.add_task("features", total=self.source.count, completed=self.stop)
            # what whole windows have is kept, whatever happens
            stack.callback(self._finish_writing)
            batches = in_background(self._batches(pool), ahead=2)
            stack.enter_context(contextlib.closing(batches))
            done = []
            for batch in batches:
                if isinstance(batch, _WindowEnd):
                    self._end_window(done, batch)
                    bar.advance(task, len(batch.left_out))
                    done = []
                else:
                    done += self._features(batch)
                    bar.advance(task, len(batch))

    def _features(self, batch: Sequence[_Prepared]) -> list[_Done]:
        grid = self.encoder.grid(*batch[0].pixels.shape[1:])
        if PATCHES in self.options.tokens:
            self.first_grid = self.first_grid or grid
            require_stackable(self.output, self.first_grid, grid, batch[0].image.name)
        pixels = torch.stack([each.pixels for each in batch]).to(self.encoder.device)
        pixels = self.encoder.normalize(pixels)
        started = time.perf_counter()
        found = self._forward(pixels)
        self.model_seconds += time.perf_counter() - started
        self._require_finite(found, batch)
        return [
            _Done(each.image, each.size, grid, {kind: values[index] for kind, values in found.items()})
            for index, each in enumerate(batch)
        ]

    def _forward(self, pixels: torch.Tensor) -> dict[str, np.ndarray]:
        """Features by kind, an image a row. They are copied to the CPU, so that the device has finished."""
        tokens = self.encoder.split(self.encoder.final(self._tokens(pixels)))
        found = {}
        for kind in KINDS:
            if kind in self.options.tokens:
                values = tokens.patches.mean(1, dtype=torch.float32) if kind == "patch_mean" else getattr(tokens, kind)
                found[kind] = values.to(getattr(torch, self.options.dtype)).cpu().numpy()
        return found

    def _tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """The output of the layer that is asked for, of the type of the model."""
        number = _layer(self.encoder, self.options)
        if self.optimized is None:
            return self.encoder.layers(pixels, [number - 1])[number - 1]
        found = self.optimized(pixels.to(self.optimized.dtype), output_hidden_states=number).hidden_states
        return next(filter(lambda tokens: tokens is not None, found)).to(self.encoder.dtype)

    def _require_finite(self, found: Mapping[str, np.ndarray], batch: Sequence[_Prepared]) -> None:
        for kind, values in found.items():
            is_finite = np.isfinite(values).reshape(len(batch), -1).all(axis=1)
            if not is_finite.all():
                name = batch[int((~is_finite).argmax())].image.name
                advice = " They may not fit float16: write float32." if self.options.dtype == "float16" else ""
                raise ValueError(f"The {kind} features of {name} are NaN or infinite.{advice}")

    def _end_window(self, done: list[_Done], end: _WindowEnd) -> None:
        """Puts a window's images in their order, and writes the shard when it has enough."""
        if done:
            self.rows.append(_rows(sorted(done, key=lambda each: each.image.index)))
        self.left_out |= end.left_out
        self.stop = end.stop
        num_bytes = sum(int(rows.bytes_each().sum()) for rows in self.rows)
        is_full = sum(map(len, self.rows)) >= SHARD_IMAGES or num_bytes >= SHARD_BYTES
        if is_full or time.perf_counter() - self._begun >= SHARD_SECONDS:
            self._write_shard()

    def _write_shard(self) -> None:
        self._wait_for_writing()
        if self.stop > self.start:
            shard = (self.start, self.stop, self.left_out, self.rows)
            self._writing = self._writer.submit(self._write, *shard)
        self.rows, self.left_out, self.start, self._begun = [], {}, self.stop, time.perf_counter()

    def _write(self, start: int, stop: int, left_out: Mapping[str, str], rows: Sequence[Rows]) -> None:
        self.partial.write(Shard(start, stop, left_out, concatenated(rows) if rows else None))

    def _wait_for_writing(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _finish_writing(self) -> None:
        self._wait_for_writing()
        # nothing goes after a shard that could not be written
        if self.start == self.partial.stop:
            self._write_shard()
            self._wait_for_writing()


def _rows(done: Sequence[_Done]) -> Rows:
    tensors = {}
    for kind in done[0].features:
        join = np.concatenate if kind == PATCHES else np.stack
        tensors[kind] = join([each.features[kind] for each in done])
    return Rows(
        [each.image.name for each in done],
        np.array([each.size for each in done], dtype=np.int32),
        np.array([each.grid for each in done], dtype=np.int32),
        tensors,
    )
