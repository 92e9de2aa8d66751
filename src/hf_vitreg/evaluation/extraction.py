# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""From images to the features that all evaluations are made of, each image through the model once.

Images are divided into shards of a fixed size, and batches never cross them: whichever process computes a shard, after
whatever interruption, it computes the same numbers.
"""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torchvision.transforms.v2 import functional as image_functional

from ..data.image_data import ImageData, StreamedData, content_hash, decode, read_ahead
from ..distributed import num_cores
from ..features import Tokens, VisionEncoder
from .feature_cache import INDICES, LABELS, FeatureCache, Features, MappedTensor, Shard, encoder_key
from .progress import progress_bar


POOLED_KINDS = ("cls", "patch_mean", "register_mean")
FACETS = ("query", "key", "value")
KINDS = (*POOLED_KINDS, "patches", *FACETS)
PREPROCESSING = ("crop", "fit", "stretch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

MAX_SHARD_IMAGES = 1024
MAX_SHARD_BYTES = 256 * 2**20
NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Which features of an image.

    Attributes:
        kinds: Some of, with N images, L layers and D the hidden size:
            `"cls"`, `"patch_mean"`, `"register_mean"`, `(N, L, D)`, and `"patches"`, `(N, L, rows * cols, D)`: tokens
            after the model's final norm; `"query"`, `"key"`, `"value"`, `(N, L, rows * cols, D)`: of the patches as
            they are projected, before norms and rotation.
        layers: From 0, or from the end with -1 the last.
        size: Height and width in pixels that the model sees; by default its own.
        preprocessing: `"crop"` resizes the shorter side to 256/224 of the size and crops the centre, as
            classification is evaluated; `"fit"` is `VisionEncoder.preprocess`, which crops no more than it has to;
            `"stretch"` resizes both sides, whatever becomes of the aspect, so that nothing is cut off.
        dtype: Features are stored in. Half precision takes half the space.
    """

    kinds: tuple[str, ...] = ("cls", "patch_mean")
    layers: tuple[int, ...] = (-1,)
    size: tuple[int, int] | None = None
    preprocessing: str = "crop"
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        _require_among("kinds", self.kinds, KINDS)
        _require_among("preprocessing", [self.preprocessing], PREPROCESSING)
        _require_among("dtype", [self.dtype], DTYPES)
        if not self.kinds or not self.layers:
            raise ValueError(f"There must be a kind and a layer, got kinds={self.kinds}, layers={self.layers}.")

    def of(self, encoder: VisionEncoder) -> "FeatureSpec":
        """The same with layers counted from 0 and a size, and kinds in their own order.

        Raises:
            ValueError: where the model has no such layer or tokens, or does not take images of this size.
        """
        _require_tokens(encoder, self.kinds)
        size = encoder.image_size if self.size is None else tuple(self.size)
        # raises early what it would raise for every image
        encoder.preprocess([PIL.Image.new("RGB", (1, 1))], size)
        return FeatureSpec(
            kinds=tuple(kind for kind in KINDS if kind in self.kinds),
            layers=tuple(encoder.layer_index(layer) for layer in self.layers),
            size=size,
            preprocessing=self.preprocessing,
            dtype=self.dtype,
        )


def _require_among(name: str, values: Sequence, allowed: Sequence) -> None:
    for value in values:
        if value not in allowed:
            raise ValueError(f"{name} must be among {', '.join(map(str, allowed))}, got {value!r}.")


def _require_tokens(encoder: VisionEncoder, kinds: Sequence[str]) -> None:
    for kind, exists in (("cls", encoder.has_cls), ("register_mean", encoder.num_registers)):
        if kind in kinds and not exists:
            others = ", ".join(other for other in KINDS if other != kind)
            raise ValueError(f"{encoder.name} has no tokens for {kind!r} features. Choose among {others}.")


# One image, one batch


def preprocess(encoder: VisionEncoder, image: PIL.Image.Image, spec: FeatureSpec) -> torch.Tensor:
    """One image as the model takes it.

    Args:
        encoder: Says what to normalize with.
        image: RGB.
        spec: Says the size, and how to come to it; see `FeatureSpec`.

    Returns:
        `(3, height, width)`, float32.
    """
    height, width = size = spec.size or encoder.image_size
    if spec.preprocessing == "crop":
        image = _cropped(image, height, width)
    elif spec.preprocessing == "stretch":
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    # of what has the size already, it is the normalization alone
    return encoder.preprocess([image], size)[0]


def _cropped(image: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    """The centre of an image that is resized until it covers 256/224 of the size (DINOv2's evaluation, 256 of 224)."""
    rows, cols = round(height * 256 / 224), round(width * 256 / 224)
    if rows * image.width >= cols * image.height:
        covering = [rows, rows * image.width // image.height]
    else:
        covering = [cols * image.height // image.width, cols]
    bicubic = image_functional.InterpolationMode.BICUBIC
    return image_functional.center_crop(
        image_functional.resize(image, covering, interpolation=bicubic), [height, width]
    )


@torch.no_grad()
def batch_features(encoder: VisionEncoder, pixel_values: torch.Tensor, spec: FeatureSpec) -> dict[str, torch.Tensor]:
    """The features of a batch by kind, in one forward pass.

    Args:
        encoder: A model.
        pixel_values: `(batch_size, 3, height, width)`.
        spec: Kinds, layers and dtype to take; see `FeatureSpec`.

    Returns:
        Tensors on the CPU, in the spec's dtype, with the shapes that `FeatureSpec` gives; N is the batch size.

    Raises:
        ValueError: where the model has no such layer or tokens, or does not take images of this size.
    """
    _require_tokens(encoder, spec.kinds)
    layers = [encoder.layer_index(layer) for layer in spec.layers]
    facets = [kind for kind in spec.kinds if kind in FACETS]
    token_kinds = [kind for kind in spec.kinds if kind not in FACETS]
    found = {kind: {} for kind in spec.kinds}

    def on_layer(layer: int, tokens: torch.Tensor):
        if layer in layers and token_kinds:
            final = encoder.split(encoder.final(tokens))
            for kind in token_kinds:
                found[kind][layer] = _of_tokens(final, kind).to(spec.dtype).cpu()

    def on_projection(layer: int, facet: str, projected: torch.Tensor):
        found[facet][layer] = projected[:, encoder.patch_slice].to(spec.dtype).cpu()

    with ExitStack() as stack:
        for layer in set(layers) if facets else ():
            stack.enter_context(encoder.show_projections(layer, facets, partial(on_projection, layer)))
        encoder.observe(pixel_values, on_layer=on_layer)
    return {kind: torch.stack([values[layer] for layer in layers], dim=1) for kind, values in found.items()}


def _of_tokens(final: Tokens, kind: str) -> torch.Tensor:
    if kind in ("patch_mean", "register_mean"):
        return (final.patches if kind == "patch_mean" else final.registers).mean(dim=1, dtype=torch.float32)
    return final.cls if kind == "cls" else final.patches


# All images


def extract(
    encoder: VisionEncoder,
    data: ImageData | StreamedData,
    spec: FeatureSpec,
    cache_dir: str | Path | None = None,
    accelerator: Accelerator | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    progress: bool = False,
    on_bad_image: str = "raise",
    shard_size: int | None = None,
) -> Features:
    """The features of all images, from the cache where they are in it, else computed and cached.

    A run that was stopped goes on with the shards that are missing. No process holds more than one shard. Numbers of
    one `batch_size` are the same to the last bit for any number of processes; another one changes them by rounding.

    Args:
        encoder: On the device to compute on; the same on all processes.
        data: Images, with `labels` and `class_names` where it has them. Streams are read once by every process, which
            decodes its share alone.
        spec: Which features.
        cache_dir: Where to keep them, a folder that all processes see. `None`: in a temporary one, which is removed
            when the features are closed or no longer used.
        accelerator: Whose processes share the work.
        batch_size: Images that go through the model together.
        num_workers: Threads that decode; by default the cores of this process.
        progress: Show how far it is on stderr.
        on_bad_image: `"raise"`, or `"skip"` to leave out what cannot be read, which `Features.left_out` names.
        shard_size: Images a file; by default 1,024, or as many as fit 256 MB.

    Returns:
        Them on every process; see `Features`.

    Raises:
        ValueError: where an image cannot be read, there is none, the model has no such features, or a file of the
            cache is damaged; all named.
    """
    _require_among("on_bad_image", [on_bad_image], ("raise", "skip"))
    if batch_size < 1:
        raise ValueError(f"The batch size must be 1 or more, got {batch_size}.")
    processes = accelerator or PartialState()
    spec = spec.of(encoder)
    shard_size = shard_size or _shard_size(encoder, spec)
    with _cache_folder(cache_dir, processes) as folder:
        cache = FeatureCache(folder, _description(encoder, data, spec, shard_size, cache_dir is not None, processes))
        _require_agreement(cache, processes)
        about = {"model": encoder.name, "data": data.display_name}
        if processes.is_main_process and not cache.has_manifest():
            cache.write_manifest({**about, "num_images": len(data) if _has_length(data) else None})
        run = _Run(encoder, spec, cache, processes, batch_size, num_workers, progress, on_bad_image, shard_size)
        num_images = run.all_of(data) if _has_length(data) else run.all_as_they_come(data)
        processes.wait_for_everyone()
        shards = [cache.read(number) for number in range(math.ceil(num_images / shard_size))]
        _refuse_left_out(data, shards, on_bad_image)
        if processes.is_main_process:
            cache.write_manifest({**about, "num_images": num_images})
            cache.remove_leftovers()
        # the main process may soon remove what is temporary: now everybody has it open
        processes.wait_for_everyone()
    is_temporary = cache_dir is None and processes.is_main_process
    return _features(encoder, data, spec, cache, shards, is_temporary)


def _has_length(data: ImageData | StreamedData) -> bool:
    return hasattr(data, "__len__")


def _shard_size(encoder: VisionEncoder, spec: FeatureSpec) -> int:
    rows, cols = encoder.grid(*spec.size)
    vectors = sum(1 if kind in POOLED_KINDS else rows * cols for kind in spec.kinds) * len(spec.layers)
    images = MAX_SHARD_BYTES // (vectors * encoder.hidden_size * spec.dtype.itemsize)
    # whole batches of the usual sizes, as long as these fit
    images -= images % 32 if images > 32 else 0
    return max(1, min(images, MAX_SHARD_IMAGES))


def _description(
    encoder: VisionEncoder,
    data: ImageData | StreamedData,
    spec: FeatureSpec,
    shard_size: int,
    is_kept: bool,
    processes: Accelerator | PartialState,
) -> dict:
    """All that the features depend on. Of a temporary cache, which nobody finds again, no hash is needed."""
    normalization = {"mean": list(encoder.mean), "std": list(encoder.std), "interpolation": "bicubic"}
    return {
        "kinds": spec.kinds,
        "layers": spec.layers,
        "dtype": str(spec.dtype),
        "preprocessing": {"name": spec.preprocessing, "size": spec.size, **normalization},
        "shard_size": shard_size,
        "model": encoder_key(encoder) if is_kept else None,
        "data": _data_key(data, processes) if is_kept else None,
    }


def _data_key(data: ImageData | StreamedData, processes: Accelerator | PartialState) -> dict:
    if _has_length(data):
        return {"sha256": content_hash(data, processes), "num_images": len(data)}
    # labels of a stream are stored with its features, and their numbers are those of these classes
    return {"stream": data.identity, "class_names": list(data.class_names)}


@contextlib.contextmanager
def _cache_folder(cache_dir: str | Path | None, processes: Accelerator | PartialState) -> Iterator[Path]:
    """The folder given, or a temporary one of the main process, which is removed where the block fails."""
    if cache_dir is not None:
        yield Path(cache_dir)
        return
    chosen = [tempfile.mkdtemp(prefix="vitreg-features-") if processes.is_main_process else None]
    folder = Path(broadcast_object_list(chosen)[0])
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _require_agreement(cache: FeatureCache, processes: Accelerator | PartialState) -> None:
    keys = gather_object([cache.key])
    if len(set(keys)) > 1:
        raise ValueError(
            f"The {processes.num_processes} processes do not hold the same model, options and data. Load the same "
            "weights on each, or seed them before they are drawn."
        )


class _Job(NamedTuple):
    """One image to be read: its number, its shard, and how to read it."""

    index: int
    shard: int
    read: Callable[[], PIL.Image.Image]
    label: int = NO_LABEL


class _Prepared(NamedTuple):
    """One image that was read: `pixels` `(3, height, width)`, or why there are none."""

    job: _Job
    pixels: torch.Tensor | None
    reason: str | None = None


@dataclass(eq=False)
class _Run:
    """One process's part of the work."""

    encoder: VisionEncoder
    spec: FeatureSpec
    cache: FeatureCache
    processes: Accelerator | PartialState
    batch_size: int
    num_workers: int | None
    progress: bool
    on_bad_image: str
    shard_size: int

    def all_of(self, data: ImageData) -> int:
        """Computes the shards of this process that are missing. Returns the number of images of all processes."""
        if not len(data):
            raise ValueError(f"{data.display_name} has no images.")
        missing = [
            range(number * self.shard_size, min((number + 1) * self.shard_size, len(data)))
            for number in self._own(math.ceil(len(data) / self.shard_size))
            if not self.cache.has(number)
        ]
        jobs = (
            _Job(index, index // self.shard_size, partial(data.image, index))
            for indices in missing
            for index in indices
        )
        if missing:
            self._compute(jobs, data.display_name, total=sum(map(len, missing)))
        return len(data)

    def all_as_they_come(self, data: StreamedData) -> int:
        """The same of a stream, unless all are there already: who came to its end has noted how many images it has."""
        num_images = self.cache.num_images()
        if num_images and all(map(self.cache.has, self._own(math.ceil(num_images / self.shard_size)))):
            return num_images
        self._num_seen = 0
        self._compute(self._jobs_of_stream(data), data.display_name, total=None)
        if not self._num_seen:
            raise ValueError(f"{data.display_name} has no images.")
        return self._num_seen

    def _jobs_of_stream(self, data: StreamedData) -> Iterator[_Job]:
        is_wanted = False
        for index, (name, content, label) in enumerate(data):
            number = index // self.shard_size
            if index % self.shard_size == 0:
                is_wanted = number in self._own(number + 1) and not self.cache.has(number)
            if is_wanted:
                label = NO_LABEL if label is None else label
                yield _Job(index, number, partial(decode, content, name), label)
            self._num_seen = index + 1

    def _own(self, num_shards: int) -> range:
        return range(self.processes.process_index, num_shards, self.processes.num_processes)

    def _compute(self, jobs: Iterable[_Job], title: str, total: int | None) -> None:
        num_workers = self.num_workers or max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if self.processes.num_processes > 1:
            title = f"{title}, process 1 of {self.processes.num_processes}"
        is_shown = self.progress and self.processes.is_main_process
        with ThreadPoolExecutor(num_workers) as pool, progress_bar(is_shown) as bar:
            task = bar.add_task(title, total=total)
            # the next batch is made while the model is busy with this one
            prepared = read_ahead(self._prepare, jobs, pool, ahead=self.batch_size)
            for number, images in groupby(prepared, key=lambda each: each.job.shard):
                self.cache.write(self._shard(number, images, lambda count: bar.advance(task, count)))

    def _prepare(self, job: _Job) -> _Prepared:
        try:
            return _Prepared(job, preprocess(self.encoder, job.read(), self.spec))
        except ValueError as error:
            if self.on_bad_image == "raise":
                raise
            return _Prepared(job, None, str(error))

    def _shard(self, number: int, images: Iterable[_Prepared], advance: Callable[[int], object]) -> Shard:
        """Runs the model on the images of one shard."""
        left_out, read, stored = {}, [], _Rows(self.shard_size)
        images = iter(images)
        while batch := list(islice(images, self.batch_size)):
            left_out |= {each.job.index: each.reason for each in batch if each.pixels is None}
            batch = [each for each in batch if each.pixels is not None]
            if batch:
                pixel_values = torch.stack([each.pixels for each in batch])
                stored.add(batch_features(self.encoder, pixel_values, self.spec))
            read += [each.job for each in batch]
            advance(len(batch))
        tensors = {
            INDICES: torch.tensor([job.index for job in read], dtype=torch.int64),
            LABELS: torch.tensor([job.label for job in read], dtype=torch.int64),
            **stored.tensors(),
        }
        return Shard(number, tensors, left_out, len(read) + len(left_out))


class _Rows:
    """Rows of several tensors, collected where they are to stay, since a copy of a shard is large."""

    def __init__(self, capacity: int):
        self.capacity, self.length, self.buffers = capacity, 0, {}

    def add(self, rows: dict[str, torch.Tensor]) -> None:
        for name, values in rows.items():
            if name not in self.buffers:
                self.buffers[name] = values.new_empty(self.capacity, *values.shape[1:])
            self.buffers[name][self.length : self.length + len(values)] = values
        self.length += len(next(iter(rows.values())))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: buffer[: self.length] for name, buffer in self.buffers.items()}


def _refuse_left_out(data: ImageData | StreamedData, shards: Sequence[Shard], on_bad_image: str) -> None:
    """Raises `ValueError` where images are missing that must not be, or all are."""
    reasons = [reason for shard in shards for reason in shard.left_out.values()]
    if reasons and on_bad_image == "raise":
        raise ValueError(f"{len(reasons)} images of {data.display_name} were left out before. The first: {reasons[0]}")
    if len(reasons) == sum(shard.num_images for shard in shards):
        raise ValueError(f"No image of {data.display_name} can be read. The first: {reasons[0]}")


def _features(
    encoder: VisionEncoder,
    data: ImageData | StreamedData,
    spec: FeatureSpec,
    cache: FeatureCache,
    shards: Sequence[Shard],
    is_temporary: bool,
) -> Features:
    # a shard whose images were all left out has no features
    filled = [shard.tensors for shard in shards if len(shard.tensors[INDICES])]
    indices = torch.cat([tensors[INDICES] for tensors in filled])
    return Features(
        tensors={kind: MappedTensor([tensors[kind] for tensors in filled]) for kind in spec.kinds},
        layers=spec.layers,
        grid=encoder.grid(*spec.size),
        indices=indices,
        labels=_labels(data, indices, torch.cat([tensors[LABELS] for tensors in filled])),
        class_names=list(getattr(data, "class_names", ())),
        left_out={index: reason for shard in shards for index, reason in shard.left_out.items()},
        folder=cache.folder.parent if is_temporary else cache.folder,
        name_of=data.name,
        is_temporary=is_temporary,
    )


def _labels(data: ImageData | StreamedData, indices: torch.Tensor, stored: torch.Tensor) -> torch.Tensor | None:
    """The classes of these images: of a stream as they were stored, else as the data has them now."""
    if not _has_length(data):
        return stored if data.class_names else None
    labels = getattr(data, "labels", None)
    if labels is None:
        return None
    if len(labels) != len(data):
        raise ValueError(f"{data.display_name} has {len(labels)} labels for {len(data)} images.")
    return torch.as_tensor(labels)[indices]
