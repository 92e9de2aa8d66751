# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Images without labels: of folders, files and patterns, of parquet files and tars, of the Hub, mapped or streamed.

They come in an order that does not change, so that what was begun can go on at any image.
"""

import glob
import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import datasets
import PIL.Image
import pyarrow.parquet

from ..analysis.image_files import find_images
from ..data.columns import choose_column
from ..data.datasets import IMAGE_SUFFIXES
from ..data.image_data import decode, read_file
from ..data.labelled_images import hub_commit
from ..data.tables import KEY, URL, Table, open_table


# what files of other suffixes are to `datasets.load_dataset`
TABLES = {".parquet": "parquet", ".tar": "webdataset"}
FILES, HUB = "files", "hub"


class SourceImage(NamedTuple):
    """One image that was not read yet.

    Attributes:
        index: Its number, from 0.
        name: Its path relative to its source; of a table its file or dataset, and its row or key.
        read: Decodes it, RGB and upright. Raises `ValueError`, which names it, where it cannot be read.
    """

    index: int
    name: str
    read: Callable[[], PIL.Image.Image]


@dataclass(frozen=True)
class ImageSource:
    """Images in their order.

    Attributes:
        display_name: What people call them.
        identity: Equal for two sources only where their images are: of files their names, sizes and times of change,
            of the Hub the commit.
        count: How many; `None` where nobody knows, as of a stream.
        since: The images from a number on.
    """

    display_name: str
    identity: str
    count: int | None
    since: Callable[[int], Iterator[SourceImage]]


def open_images(
    sources: Sequence[str | Path],
    *,
    split: str = "train",
    config_name: str | None = None,
    image_column: str | None = None,
    streaming: bool = False,
) -> ImageSource:
    """The images of some sources, all of one kind.

    Args:
        sources: Folders, which are searched to any depth, files, or patterns as `"photos/*.jpg"`; parquet files or
            WebDataset tars, so given, or a folder with nothing else; or the id of one dataset on the Hub.
        split: Of a dataset on the Hub.
        config_name: Of a dataset on the Hub.
        image_column: Of tables; by default the only one of its kind.
        streaming: Read tables as they come, without a copy on this machine.

    Returns:
        Image files in the order of their names, rows in theirs.

    Raises:
        ValueError: where there is no image, sources are of several kinds, a table cannot be loaded, or it does not
            say which column holds the images; and for image files that are to be streamed.
    """
    sources = [str(source) for source in sources]
    kinds = {_kind(source) for source in sources} or {FILES}
    if len(kinds) > 1 or (kinds == {HUB} and len(sources) > 1):
        raise ValueError(
            f"{', '.join(sources)} are sources of several kinds. Give image files, or parquet files, or tars, or one "
            "dataset on the Hub."
        )
    (kind,) = kinds
    if kind == FILES:
        if streaming:
            raise ValueError("Image files are read as they come anyway: leave --streaming out.")
        return _files(sources)
    if kind == HUB:
        return _of_hub(sources[0], split, config_name, image_column, streaming)
    return _table_files(kind, sources, image_column, streaming)


def _kind(source: str) -> str:
    if Path(source).is_dir():
        suffixes = {path.suffix.lower() for path in Path(source).rglob("*")}
        tables = [TABLES[suffix] for suffix in suffixes if suffix in TABLES]
        return tables[0] if len(tables) == 1 and suffixes.isdisjoint(IMAGE_SUFFIXES) else FILES
    found = glob.glob(source, recursive=True)
    if found:
        return TABLES.get(Path(found[0]).suffix.lower(), FILES)
    is_file = Path(source).suffix.lower() in {*IMAGE_SUFFIXES, *TABLES}
    return HUB if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not is_file else FILES


def _relative_to(sources: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Names of files in the one folder that was given, or else in the folder that all of them are in."""
    if len(sources) == 1 and Path(sources[0]).is_dir():
        root = os.path.abspath(sources[0])
    else:
        root = os.path.commonpath([path.absolute().parent for path in paths])
    return [path.absolute().relative_to(root).as_posix() for path in paths]


def _files_identity(names: Iterable[str], paths: Iterable[Path]) -> str:
    """By their size and time of change, as make does: to hash what is in them would be to read everything twice."""
    digest = hashlib.sha256()
    for name, path in zip(names, paths):
        status = path.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(sources: Sequence[str]) -> ImageSource:
    paths = find_images(sources).items
    names = _relative_to(sources, paths)

    def since(start: int) -> Iterator[SourceImage]:
        for index in range(start, len(paths)):
            yield SourceImage(index, names[index], partial(_read_file, paths[index]))

    return ImageSource(", ".join(sources), _files_identity(names, paths), len(paths), since)


def _read_file(path: Path) -> PIL.Image.Image:
    return decode(read_file(str(path)), str(path))


# Tables


def _table_files(kind: str, sources: Sequence[str], image_column: str | None, streaming: bool) -> ImageSource:
    suffix = next(suffix for suffix, name in TABLES.items() if name == kind)
    found = {path for source in sources for path in _files_of(source) if path.suffix.lower() == suffix}
    paths = sorted(path for path in found if not path.name.startswith("."))
    names, display_name = _relative_to(sources, paths), ", ".join(sources)
    table = _open(kind, display_name, streaming, data_files=list(map(str, paths)), split="train")
    rows = _rows_of_parquet(names, paths) if kind == "parquet" else str
    return _of_table(table, display_name, _files_identity(names, paths), rows, image_column)


def _files_of(source: str) -> Iterator[Path]:
    return Path(source).rglob("*") if Path(source).is_dir() else map(Path, glob.glob(source, recursive=True))


def _rows_of_parquet(names: Sequence[str], paths: Sequence[Path]) -> Callable[[int], str]:
    """A function from the number of a row to its file and the number there."""
    starts = [0, *accumulate(pyarrow.parquet.read_metadata(path).num_rows for path in paths)]

    def name(row: int) -> str:
        file = bisect_right(starts, row) - 1
        return f"{names[file]}, row {row - starts[file]}"

    return name


def _of_hub(
    repository: str, split: str, config_name: str | None, image_column: str | None, streaming: bool
) -> ImageSource:
    arguments = {"name": config_name, "split": split}
    if streaming:
        arguments["revision"] = commit = hub_commit(repository)
    table = _open(repository, repository, streaming, **arguments)
    # what is on this machine can be used without the Hub, which alone knows the commit
    state = commit if streaming else table._fingerprint
    identity = f"{repository} {config_name} {split} at {state}"
    return _of_table(table, repository, identity, lambda row: f"{repository} {split}, row {row}", image_column)


def _open(path: str, source: str, streaming: bool, **arguments) -> Table:
    try:
        return open_table(path, source, streaming, **arguments)
    except ValueError as error:
        if error.__cause__ is None:
            raise
        # open_table advises by the flags of the scripts
        cause = " ".join(str(error.__cause__.__cause__ or error.__cause__).split())
        raise ValueError(
            f"{source} could not be loaded: {cause}. Give folders, image files, parquet files, WebDataset tars, or "
            "the id of a dataset on the Hub, with its --split."
        ) from error


def _of_table(
    table: Table, display_name: str, identity: str, row_name: Callable[[int], str], image_column: str | None
) -> ImageSource:
    column = choose_column(
        table.features, "image", image_column, ["image"], datasets.Image, "--image-column", display_name
    )
    table = table.select_columns([column, *(key for key in (KEY, URL) if key in table.features)])
    table = table.cast_column(column, datasets.Image(decode=False))

    def image(index: int, row: Mapping) -> SourceImage:
        name = f"{Path(row[URL]).name}, {row[KEY]}" if KEY in row else row_name(index)
        return SourceImage(index, name, partial(_decode, row[column], name))

    def since(start: int) -> Iterator[SourceImage]:
        # what is skipped of a stream is not decoded
        rows = enumerate(table) if count is None else ((index, table[index]) for index in range(start, count))
        return (image(index, row) for index, row in rows if index >= start)

    count = len(table) if isinstance(table, datasets.Dataset) else None
    return ImageSource(display_name, f"{identity} {column}", count, since)


def _decode(encoded: Mapping | None, name: str) -> PIL.Image.Image:
    if encoded is None:
        raise ValueError(f"{name} has no image. Remove it.")
    return decode(read_file(encoded["path"]) if encoded["bytes"] is None else encoded["bytes"], name)
