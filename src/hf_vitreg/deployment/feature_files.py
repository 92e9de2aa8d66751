# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Features of many images in one file: written in shards that survive an interruption, then put together.

What is put together depends on the images alone, and not on where a shard ended.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..atomic import atomic_file


FORMAT = 1
SUFFIXES = (".parquet", ".safetensors")
DTYPES = ("float32", "float16")
MANIFEST = "manifest.json"
METADATA = "hf_vitreg"  # the key of a file's metadata
SIZES, GRIDS, PATCHES = "sizes", "grids", "patches"

GROUP_IMAGES = 1000  # of a row group
GROUP_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 100_000_000  # safetensors reads no longer ones


@dataclass(frozen=True)
class Rows:
    """Features of consecutive images, all after the model's final norm; N images, D the hidden size.

    Attributes:
        names: Of the images.
        sizes: `(N, 2)`, int32, height and width of each image in pixels, upright, before it was resized.
        grids: `(N, 2)`, int32, rows and columns of its patches as the model saw it.
        tensors: By kind: `cls` and `patch_mean` `(N, D)`, `registers` `(N, num_registers, D)`; `patches` of all
            images one after another, `(sum of rows * columns, D)`.
    """

    names: Sequence[str]
    sizes: np.ndarray
    grids: np.ndarray
    tensors: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def patch_starts(self) -> np.ndarray:
        """`(N + 1,)`, where the patches of each image begin, and where the last end."""
        return np.concatenate([[0], np.cumsum(self.grids.prod(axis=1, dtype=np.int64))])

    def __getitem__(self, rows: slice) -> "Rows":
        start, stop, _ = rows.indices(len(self))
        patches = slice(*self.patch_starts[[start, stop]])
        tensors = {kind: values[patches if kind == PATCHES else rows] for kind, values in self.tensors.items()}
        return Rows(self.names[start:stop], self.sizes[rows], self.grids[rows], tensors)

    def bytes_each(self) -> np.ndarray:
        """`(N,)`, what the features of each take."""
        each = np.zeros(len(self), dtype=np.int64)
        for kind, values in self.tensors.items():
            vectors = self.grids.prod(axis=1, dtype=np.int64) if kind == PATCHES else 1
            each += vectors * values[:1].nbytes if len(values) else 0
        return each


def concatenated(parts: Sequence[Rows]) -> Rows:
    """Rows one after another. There must be at least one part."""
    return Rows(
        [name for part in parts for name in part.names],
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.grids for part in parts]),
        {kind: np.concatenate([part.tensors[kind] for part in parts]) for kind in parts[0].tensors},
    )


@dataclass(frozen=True)
class Shard:
    """What one file of a run that is not finished holds.

    Attributes:
        start, stop: Which images of the source it is of.
        left_out: Why an image was left out, by its name.
        rows: Of all others. `None` where they were all left out.
    """

    start: int
    stop: int
    left_out: Mapping[str, str]
    rows: Rows | None


class PartialFeatures:
    """The folder `OUTPUT.partial` of a run that is not finished: a manifest and shards, each whole or not there.

    Args:
        output: The file that it is to become.
        description: All that the features depend on, as JSON takes it.
        overwrite: Begin again where what is there is of something else, or damaged.

    Attributes:
        folder: Where it is.
        num_shards: How many are written.
        stop: The first image that is in no shard.
        num_images: How many images have features.
        left_out: Why an image was left out, by its name.

    Raises:
        ValueError: where what is there depends on something else, which is named, or is damaged.
    """

    def __init__(self, output: Path, description: Mapping, overwrite: bool = False):
        self.folder = output.with_name(f"{output.name}.partial")
        # as it is read back
        self.description = json.loads(json.dumps({"format": FORMAT, **description}))
        self.num_shards, self.stop, self.num_images, self.left_out = 0, 0, 0, {}
        self._require_own()
        try:
            self._go_on()
        except ValueError:
            if not overwrite:
                raise
            shutil.rmtree(self.folder)
            self.num_shards, self.stop, self.num_images, self.left_out = 0, 0, 0, {}
        self._write_manifest()

    def _require_own(self) -> None:
        """No folder but one of a run is ever begun again, which empties it."""
        found = self.folder.exists() and (not self.folder.is_dir() or any(map(_is_whole, self.folder.iterdir())))
        if found and not (self.folder / MANIFEST).is_file():
            raise ValueError(f"{self.folder} holds other things than an unfinished run. Give another output.")

    def _go_on(self) -> None:
        if (self.folder / MANIFEST).exists():
            self._require_same()
        for path in self.folder.glob(".*.partial"):  # of writers that were killed
            path.unlink()
        while (path := self._path(self.num_shards)).exists():
            shard = self._read(path)
            if shard.start != self.stop:
                raise ValueError(
                    f"{path} begins at image {shard.start}, and those before stop at {self.stop}. {self._mend}"
                )
            self._note(shard)

    def _require_same(self) -> None:
        path = self.folder / MANIFEST
        try:
            before = json.loads(path.read_text(encoding="utf-8"))["features"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The manifest {path} is damaged: {error}. {self._mend}") from error
        differences = list(_differences(before, self.description))
        if differences:
            raise ValueError(
                f"{self.folder} was begun with something else: {'; '.join(differences)}. Go on as it was begun, or "
                "begin again with --overwrite."
            )

    @property
    def _mend(self) -> str:
        return f"Delete {self.folder}, or begin again with --overwrite."

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.safetensors"

    def _note(self, shard: Shard) -> None:
        self.num_shards += 1
        self.stop = shard.stop
        self.num_images += len(shard.rows or ())
        self.left_out |= shard.left_out

    def _write_manifest(self) -> None:
        with atomic_file(self.folder / MANIFEST) as path:
            path.write_text(json.dumps({"features": self.description}, indent=1) + "\n", encoding="utf-8")

    def write(self, shard: Shard) -> None:
        """Adds a shard. It must begin where the last one stopped."""
        if shard.start != self.stop:
            raise RuntimeError(f"A shard of image {shard.start} was to follow one that stopped at {self.stop}.")
        rows = shard.rows
        metadata = {
            "start": str(shard.start),
            "stop": str(shard.stop),
            "left_out": json.dumps(dict(shard.left_out)),
            "names": json.dumps(list(rows.names) if rows else []),
        }
        tensors = {**rows.tensors, SIZES: rows.sizes, GRIDS: rows.grids} if rows else {}
        with atomic_file(self._path(self.num_shards)) as path:
            save_file({kind: np.ascontiguousarray(values) for kind, values in tensors.items()}, path, metadata)
        self._note(shard)

    def _read(self, path: Path) -> Shard:
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata()
                tensors = {kind: file.get_tensor(kind) for kind in list(file.keys())}
            start, stop = int(metadata["start"]), int(metadata["stop"])
            names, left_out = json.loads(metadata["names"]), json.loads(metadata["left_out"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"The features {path} are damaged: {error}. {self._mend}") from error
        rows = Rows(names, tensors.pop(SIZES), tensors.pop(GRIDS), tensors) if names else None
        return Shard(start, stop, left_out, rows)

    def filled(self) -> Iterator[Rows]:
        """The rows of all shards that have any, read one at a time."""
        for number in range(self.num_shards):
            rows = self._read(self._path(number)).rows
            if rows is not None:
                yield rows

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder)


def _is_whole(path: Path) -> bool:
    return not path.name.endswith(".partial")


def _differences(before: object, now: object, name: str = "") -> Iterator[str]:
    """What is not equal, in words; of long values, as hashes, no more than that they differ."""
    if before == now:
        return
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{name} {key}".strip())
    elif max(len(_shown(before)), len(_shown(now))) > 40:
        yield f"other {name}"
    else:
        yield f"{name} {_shown(before)} then, {_shown(now)} now"


def _shown(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


# The file


def require_output(output: Path, overwrite: bool) -> None:
    """Raises `ValueError` for a file that cannot be written: of another format, or there already."""
    if output.suffix not in SUFFIXES:
        raise ValueError(f"{output} is a file of no format that features are written in: {' or '.join(SUFFIXES)}.")
    if output.is_dir():
        raise ValueError(f"{output} is a folder. Give a file, as {output}/features.parquet.")
    if output.exists() and not overwrite:
        raise ValueError(f"There is a file {output} already. Give another one, or --overwrite.")


def require_stackable(output: Path, before: Sequence[int], now: Sequence[int], name: str) -> None:
    """Raises `ValueError` where patches of two grids were to go into one tensor, as safetensors has them."""
    if output.suffix == ".safetensors" and tuple(before) != tuple(now):
        raise ValueError(
            f"{name} has {now[0]}x{now[1]} patches, those before have {before[0]}x{before[1]}, which make no one "
            "tensor. Write a .parquet file, or leave patches out, or give one --size to all images."
        )


def write_features(output: Path, parts: Callable[[], Iterable[Rows]], about: Mapping) -> None:
    """Writes features to a file of either format, whole or not at all. No more than a part is in memory.

    Args:
        output: `.parquet`: a row an image with `name`, `height` and `width` in pixels, and a column a kind of
            features: `cls` and `patch_mean` as lists of a fixed size, `registers` and `patches` as lists of such; with
            `patches` also `rows` and `cols` of their grid. `.safetensors`: a tensor a kind, `(N, D)`, `(N,
            num_registers, D)` or `(N, rows * cols, D)`, and `height` and `width`, `(N,)`; `names`, as JSON, in the
            metadata.
        parts: Gives the rows, as often as it is called.
        about: Put into the metadata as JSON, under `hf_vitreg`.

    Raises:
        ValueError: where safetensors cannot hold them.
    """
    with atomic_file(output) as path:
        if output.suffix == ".parquet":
            _write_parquet(path, parts(), about)
        else:
            _write_safetensors(path, parts, about)


def _write_parquet(path: Path, parts: Iterable[Rows], about: Mapping) -> None:
    writer = None
    try:
        for rows in _regrouped(parts):
            table = _table(rows, about)
            if writer is None:
                plain = {"use_dictionary": ["name"], "write_statistics": ["name", "height", "width"]}
                # features are noise to a compressor
                writer = pq.ParquetWriter(path, table.schema, compression="none", **plain)
            writer.write_table(table, row_group_size=len(rows))
    finally:
        if writer is not None:
            writer.close()


def _regrouped(parts: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows in groups whose ends depend on the rows alone."""
    waiting, num_rows, num_bytes = [], 0, 0
    for part in parts:
        start = 0
        for row, size in enumerate(part.bytes_each().tolist()):
            if num_rows and (num_rows == GROUP_IMAGES or num_bytes + size > GROUP_BYTES):
                yield concatenated([*waiting, part[start:row]])
                waiting, start, num_rows, num_bytes = [], row, 0, 0
            num_rows, num_bytes = num_rows + 1, num_bytes + size
        waiting.append(part[start:])
    yield concatenated(waiting)


def _table(rows: Rows, about: Mapping) -> pa.Table:
    columns = {"name": pa.array(rows.names, pa.string())}
    columns |= {"height": pa.array(rows.sizes[:, 0]), "width": pa.array(rows.sizes[:, 1])}
    if PATCHES in rows.tensors:
        columns |= {"rows": pa.array(rows.grids[:, 0]), "cols": pa.array(rows.grids[:, 1])}
    for kind, values in rows.tensors.items():
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[-1])
        if kind == PATCHES:
            vectors = pa.ListArray.from_arrays(pa.array(rows.patch_starts, pa.int32()), vectors)
        elif values.ndim == 3:
            vectors = pa.FixedSizeListArray.from_arrays(vectors, values.shape[1])
        columns[kind] = vectors
    return pa.table(columns, metadata={METADATA: json.dumps(about)})


def _write_safetensors(path: Path, parts: Callable[[], Iterable[Rows]], about: Mapping) -> None:
    """The format by hand (https://huggingface.co/docs/safetensors), as its writer wants all tensors in memory."""
    names, shapes, dtypes = [], {}, {}
    for part in parts():
        names += part.names
        for kind, values in _stacked(part).items():
            dtypes[kind] = {"int32": "I32", "float32": "F32", "float16": "F16"}[values.dtype.name]
            shapes[kind] = [shapes.get(kind, [0])[0] + len(values), *values.shape[1:]]
    header = {"__metadata__": {"format": "pt", "names": json.dumps(names), METADATA: json.dumps(about)}}
    ends = list(accumulate(int(np.prod(shapes[kind])) * int(dtypes[kind][1:]) // 8 for kind in shapes))
    for kind, start, end in zip(shapes, [0, *ends], ends):
        header[kind] = {"dtype": dtypes[kind], "shape": shapes[kind], "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(
            f"The names of {len(names)} images take {len(text)} bytes, and the header of safetensors no more than "
            f"{MAX_HEADER_BYTES}. Write a .parquet file: what was computed is kept."
        )
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for kind in shapes:
            for part in parts():
                file.write(np.ascontiguousarray(_stacked(part)[kind]).data)


def _stacked(rows: Rows) -> dict[str, np.ndarray]:
    """Tensors with an image a row, those of four bytes a value first, so that all are aligned."""
    tensors = {"height": rows.sizes[:, 0], "width": rows.sizes[:, 1], **rows.tensors}
    if PATCHES in tensors:
        patches = tensors[PATCHES]
        tensors[PATCHES] = patches.reshape(len(rows), -1, patches.shape[-1])
    return tensors
