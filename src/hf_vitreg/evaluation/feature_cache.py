# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Features on disk, in shards that are memory-mapped, and never taken for those of anything else.

A cache is a folder named after its key, the hash of all that features depend on. Each shard repeats the key: a file
that was copied from another cache, or is cut short, is refused.
"""

import contextlib
import hashlib
import json
import re
import shutil
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from ..atomic import atomic_file
from ..features import VisionEncoder, model_hash


FORMAT = 1
LEFTOVER_SECONDS = 3600
MANIFEST = "manifest.json"
INDICES, LABELS = "indices", "labels"
# of a config, what no output depends on
_NOT_OF_THE_FORWARD = ("_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id", "torch_dtype")
_NOT_OF_THE_FORWARD += ("transformers_version",)
# of a module, what changes how it computes and not what
_HOW = ("training", "fused_attn", "gradient_checkpointing", "grad_checkpointing")


def encoder_key(encoder: VisionEncoder) -> dict:
    """All that the forward pass of a model depends on, as JSON takes it: its weights, and beside them its settings.

    Raises:
        ValueError: where somebody's hooks change what it computes, which no hash can tell.
    """
    config = getattr(encoder.model, "config", None)
    settings = config.to_dict() if isinstance(config, PreTrainedConfig) else {}
    for name in _NOT_OF_THE_FORWARD:
        settings.pop(name, None)
    _refuse_hooks(encoder)
    modules = {name: _module_key(module) for name, module in encoder.model.named_modules()}
    sizes = ("source", "patch_size", "num_layers", "num_heads", "hidden_size", "has_cls", "num_registers")
    return {
        "weights": model_hash(encoder.model),
        "settings": _sha256({"config": settings, "modules": modules}),
        **{name: getattr(encoder, name) for name in (*sizes, "num_prefix_tokens")},
    }


def _module_key(module: torch.nn.Module) -> list:
    """Its class and the plain values it holds, as epsilons and sizes, and what else it says of itself."""
    plain = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, tuple)) and not name.startswith("_") and name not in _HOW
    }
    said = re.sub(r" at 0x[0-9a-f]+", "", module.extra_repr())
    return [type(module).__name__, said, sorted((name, repr(value)) for name, value in plain.items())]


def _refuse_hooks(encoder: VisionEncoder) -> None:
    for name, module in encoder.model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            # transformers leaves hooks behind that only look
            if not getattr(hook, "__module__", "").startswith("transformers."):
                raise ValueError(
                    f"{encoder.name} has a hook on {name or 'itself'} that may change its features, which a cache "
                    "could not tell. Extract them with cache_dir=None."
                )


def _sha256(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class MappedTensor(Sequence):
    """A tensor in several files, concatenated along its first axis: only what is asked for is read.

    Args:
        parts: Of the same dtype and, but for the first axis, shape; memory-mapped.

    Attributes:
        shape, dtype: Of the whole.
    """

    def __init__(self, parts: Sequence[torch.Tensor]):
        self.parts = parts
        self.starts = [0, *accumulate(len(part) for part in parts)]
        self.shape = torch.Size([self.starts[-1], *parts[0].shape[1:]])
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.starts[-1]

    def __repr__(self) -> str:
        return f"MappedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, parts={len(self.parts)})"

    def __getitem__(self, index: int | slice | Sequence[int] | torch.Tensor) -> torch.Tensor:
        """One row; a slice, without a copy where it lies in one file; or rows by number or by a mask."""
        if isinstance(index, int):
            return self._row(index)
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._range(start, max(start, stop))
            index = range(start, stop, step)
        return self._rows(index)

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """All rows in order, `size` at a time, the last with what is left."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def tensor(self) -> torch.Tensor:
        """All of it in memory."""
        return torch.cat(list(self.parts))

    def _row(self, index: int) -> torch.Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Row {index} does not exist: there are {len(self)}.")
        index %= len(self)
        part = bisect_right(self.starts, index) - 1
        return self.parts[part][index - self.starts[part]]

    def _range(self, start: int, stop: int) -> torch.Tensor:
        # of what begins before the end and ends after the beginning
        pieces = [
            part[max(start - first, 0) : stop - first]
            for part, first in zip(self.parts, self.starts)
            if first < stop and start < first + len(part)
        ]
        if not pieces:
            return self.parts[0][:0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _rows(self, index: Sequence[int] | torch.Tensor) -> torch.Tensor:
        index = torch.as_tensor(index)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
        outside = index[(index < -len(self)) | (index >= len(self))]
        if len(outside):
            raise IndexError(f"Row {outside[0]} does not exist: there are {len(self)}.")
        index = index % len(self)
        rows = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
        parts = torch.bucketize(index, torch.tensor(self.starts[1:]), right=True)
        for part in parts.unique().tolist():
            of_part = parts == part
            rows[of_part] = self.parts[part][index[of_part] - self.starts[part]]
        return rows


@dataclass(eq=False)
class Features(contextlib.AbstractContextManager):
    """Features of N images by their kind, `features["cls"]`, as `MappedTensor`s; a context that ends with them.

    Attributes:
        tensors: By kind.
        layers: Which are along the second axis, counted from 0.
        grid: Rows and columns of the patches, as dense kinds have them row by row along the third axis.
        indices: `(N,)`, which of the images these are: all but those that were left out.
        labels: `(N,)`, their classes; `None` where the data has none.
        class_names: Of the labels; empty where there are none.
        left_out: Why an image was left out, by its index.
        folder: The files.
        name_of: What an image is called, by its index.
        is_temporary: Whether the folder is removed with the features.
    """

    tensors: Mapping[str, MappedTensor]
    layers: tuple[int, ...]
    grid: tuple[int, int]
    indices: torch.Tensor = field(repr=False)
    labels: torch.Tensor | None = field(repr=False)
    class_names: Sequence[str] = field(repr=False)
    left_out: Mapping[int, str]
    folder: Path
    name_of: Callable[[int], str] = field(repr=False)
    is_temporary: InitVar[bool] = False

    def __post_init__(self, is_temporary: bool):
        # tensors that somebody still holds stay readable
        remove = shutil.rmtree if is_temporary else _keep
        self._finalizer = weakref.finalize(self, remove, self.folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, kind: str) -> MappedTensor:
        if kind not in self.tensors:
            raise ValueError(f"There are no features of the kind {kind!r}, only {', '.join(self.tensors)}.")
        return self.tensors[kind]

    @cached_property
    def names(self) -> list[str]:
        """What the images are called."""
        return [self.name_of(index) for index in self.indices.tolist()]

    def close(self) -> None:
        """Removes files that were to be temporary."""
        self._finalizer()

    def __exit__(self, *exception):
        self.close()


def _keep(folder: Path, ignore_errors: bool) -> None:
    pass


@dataclass(frozen=True)
class Shard:
    """What one file holds.

    Attributes:
        number: Which one, from 0.
        tensors: By kind, `indices` `(rows,)` of the images, and `labels` where the cache has to know them.
        left_out: Why an image was left out, by its index.
        num_images: How many images it is of, with those.
    """

    number: int
    tensors: Mapping[str, torch.Tensor]
    left_out: Mapping[int, str]
    num_images: int


class FeatureCache:
    """The folder of one key: shards that are written once, by whichever process, and read by all.

    Args:
        parent: Where caches are.
        description: All that the features depend on, as JSON takes it; its hash is the key.

    Attributes:
        key: SHA-256 of the description.
        folder: `parent/KEY`, the first 16 digits of it.
    """

    def __init__(self, parent: Path, description: Mapping):
        self.description = {"format": FORMAT, **description}
        self.key = _sha256(self.description)
        self.folder = Path(parent) / self.key[:16]

    def path(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"shard-{number:06d}.safetensors"

    def has(self, number: int) -> bool:
        """Whether a shard is there. Raises `ValueError` where it is not whole, or of another cache."""
        return self.path(number).exists() and self.read(number) is not None

    def write(self, shard: Shard) -> None:
        """Writes a shard, so that it is there whole or not at all."""
        metadata = {
            "key": self.key,
            "shard": str(shard.number),
            "num_images": str(shard.num_images),
            "left_out": json.dumps({str(index): reason for index, reason in shard.left_out.items()}),
        }
        with atomic_file(self.path(shard.number)) as path:
            save_file(dict(shard.tensors), path, metadata)

    def read(self, number: int) -> Shard:
        """A shard, its tensors memory-mapped.

        Raises:
            ValueError: where it is missing, cut short, or of another cache.
        """
        path = self.path(number)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                self._check(path, number, metadata)
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except FileNotFoundError:
            raise ValueError(
                f"The features {path} are not there. Several machines must share the folder {self.folder.parent}."
            ) from None
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"The features {path} are cut short or cannot be read: {error}. {_delete(path)}"
            ) from error
        left_out = {int(index): reason for index, reason in json.loads(metadata["left_out"]).items()}
        return Shard(number, tensors, left_out, int(metadata["num_images"]))

    def _check(self, path: Path, number: int, metadata: Mapping[str, str]) -> None:
        if metadata.get("key") != self.key:
            raise ValueError(
                f"The features {path} are of another model, preprocessing or data than their folder. {_delete(path)}"
            )
        if metadata.get("shard") != str(number):
            raise ValueError(f"The features {path} are those of shard {metadata.get('shard')}. {_delete(path)}")

    def write_manifest(self, about: Mapping) -> None:
        """What the folder holds, for people, and for a stream how many images it had.

        Args:
            about: What no feature depends on: names, and the number of images where it is known.
        """
        manifest = {"key": self.key, **about, "features": self.description}
        with atomic_file(self.folder / MANIFEST) as path:
            path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    def has_manifest(self) -> bool:
        """Whether there is one. Raises `ValueError` where it is damaged, or that of another cache."""
        self.num_images()
        return (self.folder / MANIFEST).exists()

    def num_images(self) -> int | None:
        """How many images the manifest says there are; `None` where nobody came to the end of them yet.

        Raises:
            ValueError: where the manifest is damaged, or that of another cache.
        """
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            key, num_images = manifest["key"], manifest["num_images"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The manifest {path} is damaged: {error}. {_delete(path)}") from error
        if key != self.key:
            raise ValueError(f"The manifest {path} is that of other features than its folder. {_delete(path)}")
        return num_images

    def remove_leftovers(self) -> None:
        """Removes what writers left that were killed; a file of the last hour may be that of one who is at work."""
        for path in self.folder.glob(".*.partial"):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink(missing_ok=True)


def _delete(path: Path) -> str:
    return f"Delete {path}, and run again: only what it held is computed again."
