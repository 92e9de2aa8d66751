# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Labelled images for evaluation: a split of folders, parquet files, the Hub or scikit-learn, mapped or streamed."""

import glob
import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import NamedTuple

import datasets
import PIL.Image
import pyarrow.parquet
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ..recipe import DataOptions
from .columns import choose_column
from .datasets import (
    SPLIT_NAMES,
    class_folders,
    limited,
    load_labelled_images,
    require_same_classes,
    standard_columns,
    with_class_names,
)
from .image_data import SPLITS, ContentHashed, StreamedImage, combined_hash, decode, read_file


@dataclass(eq=False)
class MappedImages(ContentHashed):
    """Labelled images of a memory-mapped dataset.

    Attributes:
        dataset: Columns `image` (undecoded), `label` (a ClassLabel) and `name`.
        display_name: What people call them.
        split: What the split is called at its source; `None` where there was none to choose.
    """

    dataset: datasets.Dataset
    display_name: str
    split: str | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def class_names(self) -> list[str]:
        """Of the labels, by their index."""
        return self.dataset.features["label"].names

    @cached_property
    def labels(self) -> list[int]:
        """Class of each image, an index into `class_names`."""
        return list(self.dataset["label"])

    @cached_property
    def _names(self) -> datasets.Dataset:
        # a row of all columns would read the image too
        return self.dataset.select_columns("name")

    def name(self, index: int) -> str:
        """Its path, or its file and row."""
        return self._names[index]["name"]

    def content(self, index: int) -> bytes:
        """Its encoded bytes. Raises `ValueError` where its file cannot be read."""
        return _bytes(self.dataset[index]["image"])

    def image(self, index: int) -> PIL.Image.Image:
        """RGB and upright. Raises `ValueError` for what is no image."""
        return decode(self.content(index), self.name(index))


@dataclass(eq=False)
class StreamedImages:
    """Labelled images of a dataset that is read as it arrives.

    Attributes:
        dataset: Columns with images, undecoded, and with labels.
        image_column, label_column: Which these are.
        display_name: What people call them.
        identity: Of the images and their order: the hashes of files, or the commit on the Hub.
        class_names: Of the labels.
        source_class_names: Of the labels as the dataset numbers them.
        name: What an image is called, by its number.
        split: What the split is called at its source.
        max_images: Where to stop.
    """

    dataset: datasets.IterableDataset
    image_column: str
    label_column: str
    display_name: str
    identity: str
    class_names: Sequence[str]
    source_class_names: Sequence[str]
    name: Callable[[int], str]
    split: str | None = None
    max_images: int | None = None

    def __iter__(self) -> Iterator[StreamedImage]:
        """Raises `ValueError` for a row without an image or with a label outside the classes."""
        indices = [self.class_names.index(name) for name in self.source_class_names]
        for row, values in enumerate(islice(self.dataset, self.max_images)):
            name, image, label = self.name(row), values[self.image_column], values[self.label_column]
            if image is None:
                raise ValueError(f"{name} has no image. Remove the row.")
            if label is None or not 0 <= label < len(indices):
                raise ValueError(
                    f"{name} has the label {label}, outside 0 to {len(indices) - 1}, as unlabelled test splits do. "
                    "Choose a split with labels."
                )
            yield StreamedImage(name, _bytes(image), indices[label])


def _bytes(encoded: Mapping) -> bytes:
    return read_file(encoded["path"]) if encoded["bytes"] is None else encoded["bytes"]


# Loading


def load_image_data(
    source: str | Path | Mapping[str, str | Path],
    split: str | None = "validation",
    *,
    class_names: Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    config_name: str | None = None,
    max_images: int | None = None,
    seed: int = 0,
    streaming: bool = False,
) -> MappedImages | StreamedImages:
    """Labelled images of one split.

    Args:
        source: A folder with a folder a split (`train`, and `validation`, `val` or `test`) of a folder a class; a
            folder of parquet files that are named after their split, or are in a folder that is; a pattern of such
            files; the id of a dataset on the Hub; `"digits"`; or a mapping from split to any of these, of which it is
            taken where they are divided themselves.
        split: `"train"`, `"validation"` (where there is none, the test split), `"test"`, or what a dataset on the Hub
            calls its own. `None` for a source that is not split.
        class_names: Those of training, whose numbers the labels get; by default as the source numbers them.
        image_column, label_column: Of parquet files and of the Hub; by default the only one of its kind.
        config_name: Of a dataset on the Hub.
        max_images: Take no more than this many at random; of a stream, the first.
        seed: Of the choice, and of the fifth of `"digits"` that is its validation split.
        streaming: Read parquet files or a dataset on the Hub as they come, without a copy on this machine.

    Returns:
        The images in the order of their source.

    Raises:
        ValueError: for a source that is not there or has no such split, images without labels or with -1 for one, a
            class without an image in training, other classes than `class_names`.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"The largest number of images must be 1 or more, got {max_images}.")
    found = _locate(source, split, config_name)
    columns = _Columns(image_column, label_column)
    if streaming:
        return _streamed(found, columns, config_name, class_names, max_images)
    dataset = _mapped(found, columns, config_name, seed)
    if split in SPLITS["train"]:
        _require_every_class(dataset, found.place)
    if class_names is not None:
        dataset = with_class_names(dataset, list(class_names))
    return MappedImages(limited(dataset, max_images, seed), found.display_name, found.split)


class _Columns(NamedTuple):
    image: str | None
    label: str | None


@dataclass(frozen=True)
class _Found:
    """Where images are: a folder of class folders, parquet files, the Hub, or digits."""

    kind: str
    places: tuple[str, ...]
    display_name: str
    split: str | None

    @property
    def place(self) -> str:
        """Where to look when something is wrong."""
        others = f" and {len(self.places) - 1} more" if len(self.places) > 1 else ""
        return f"{self.places[0]}{others}" if self.places else self.display_name


def _locate(source: str | Path | Mapping, split: str | None, config_name: str | None) -> _Found:
    if isinstance(source, Mapping):
        name = _choose(list(source), split, f"The mapping {dict(source)}")
        inner = None if is_one_split(source[name]) else split
        return replace(_locate(source[name], inner, config_name), split=name)
    path = Path(source)
    if str(source) == "digits":
        return _Found(
            "digits", (), "scikit-learn digits", _choose(["train", "validation"], split or "train", "digits")
        )
    if path.is_dir():
        return _in_folder(path, split)
    if files := sorted(glob.glob(str(source), recursive=True)):
        return _of_files([Path(file) for file in files], path.parent, str(source), split)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) and path.suffix != ".parquet":
        name = _choose(hub_splits(str(source), config_name), split or "train", str(source))
        return _Found("hub", (str(source),), str(source), name)
    raise ValueError(f"There is no {source}. {_EXPECTED}")


_EXPECTED = (
    "Expected a folder with train and validation folders of class folders, parquet files named after their split, the "
    "id of a dataset on the Hub, or digits."
)


def _in_folder(folder: Path, split: str | None) -> _Found:
    # as people and as the Hub lay them out
    layouts = ["*.parquet", "data/*.parquet", *(f"{name}/*.parquet" for name in sorted(SPLIT_NAMES))]
    files = sorted(path for layout in layouts for path in folder.glob(layout))
    if files:
        return _of_files(files, folder, str(folder), split)
    if split is None:
        return _Found("folder", (str(folder),), _display_name(folder), None)
    children = [path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    name = _choose(children, split, f"The folder {folder}")
    return _Found("folder", (str(folder / name),), _display_name(folder), name)


def is_one_split(source: str | Path) -> bool:
    """Whether all of it is of one split: files, and a folder that has no splits. The Hub and digits have some."""
    folder = Path(source)
    if not folder.is_dir():
        return bool(glob.glob(str(source), recursive=True))
    files = [*folder.glob("*.parquet"), *folder.glob("data/*.parquet"), *folder.glob("*/*.parquet")]
    words = [word for file in files for word in (file.parent.name, re.match(r"[a-zA-Z]*", file.name)[0])]
    # a class may be called train, and has no folders within
    words += [path.parent.name for path in folder.glob("*/*/")]
    return SPLIT_NAMES.isdisjoint(word.lower() for word in words)


def _display_name(folder: Path) -> str:
    """Of a folder, and of a split of it, its name."""
    folder = folder.resolve()
    return folder.parent.name if folder.name.lower() in SPLIT_NAMES else folder.name


def _of_files(files: Sequence[Path], folder: Path, source: str, split: str | None) -> _Found:
    """Parquet files by the split that each is named after, or is in a folder of."""
    other = [file for file in files if file.suffix != ".parquet"]
    if other:
        raise ValueError(f"{other[0]} is no parquet file. {_EXPECTED}")
    display_name = _display_name(folder)
    if split is None:
        return _Found("parquet", tuple(map(str, files)), display_name, None)
    by_split = {}
    for file in files:
        words = [*file.relative_to(folder).parent.parts, re.match(r"[a-zA-Z]*", file.name)[0]]
        for word in words:
            by_split.setdefault(word, []).append(str(file))
    name = _choose(list(by_split), split, source)
    return _Found("parquet", tuple(by_split[name]), display_name, name)


def _choose(names: Sequence[str], split: str | None, source: str) -> str:
    """What a split is called here."""
    by_lower_case = {name.lower(): name for name in names if name}
    accepted = SPLITS.get(split, (split,))
    name = next((by_lower_case[name] for name in accepted if name in by_lower_case), None)
    if name is None:
        raise ValueError(
            f"{source} has no {split} split: found {', '.join(sorted(by_lower_case.values())) or 'nothing'}, expected "
            f"{' or '.join(map(str, accepted))}."
        )
    return name


def _mapped(found: _Found, columns: _Columns, config_name: str | None, seed: int) -> datasets.Dataset:
    if found.kind == "digits":
        return getattr(load_labelled_images(DataOptions(), seed), found.split)
    if found.kind == "folder":
        return class_folders(*found.places)
    if found.kind == "parquet":
        dataset, source = _load(found, data_files=list(found.places), split="train"), found.place
    else:
        dataset, source = _load(found, name=config_name, split=found.split), f"{found.places[0]} {found.split}"
    dataset = standard_columns(dataset, DataOptions(**_column_names(dataset, columns, source)), source)
    names = list(map(_row_names(found), range(len(dataset))))
    return dataset.remove_columns("name").add_column("name", names)


def _streamed(
    found: _Found,
    columns: _Columns,
    config_name: str | None,
    class_names: Sequence[str] | None,
    max_images: int | None,
) -> StreamedImages:
    if found.kind not in ("parquet", "hub"):
        raise ValueError(f"{found.display_name} cannot be streamed: only parquet files and datasets on the Hub can.")
    if found.kind == "parquet":
        dataset = _load(found, data_files=list(found.places), split="train", streaming=True)
        identity = combined_hash(map(_file_digest, found.places))
    else:
        commit = hub_commit(found.places[0])
        dataset = _load(found, name=config_name, split=found.split, revision=commit, streaming=True)
        identity = f"{found.places[0]} {config_name} {found.split} at {commit}"
    if dataset.features is None:
        raise ValueError(f"{found.display_name} does not say what its columns hold: load it without streaming.")
    names = _column_names(dataset, columns, found.display_name)
    label_feature = dataset.features[names["label_column"]]
    if not isinstance(label_feature, datasets.ClassLabel):
        raise ValueError(
            f"{found.display_name} names no classes for its labels ({names['label_column']}: {label_feature}), and a "
            "stream cannot be searched for them: load it without streaming."
        )
    class_names = list(label_feature.names if class_names is None else class_names)
    require_same_classes(class_names, label_feature.names)
    dataset = dataset.select_columns(list(names.values()))
    return StreamedImages(
        dataset.cast_column(names["image_column"], datasets.Image(decode=False)),
        **names,
        display_name=found.display_name,
        identity=f"{identity} {names['image_column']} {max_images}",
        class_names=class_names,
        source_class_names=label_feature.names,
        split=found.split,
        name=_row_names(found),
        max_images=max_images,
    )


def _row_names(found: _Found) -> Callable[[int], str]:
    """A function from the number of a row to its file and the number there; on the Hub to the split and the number."""
    if found.kind == "hub":
        return lambda row: f"{found.places[0]} {found.split}, row {row}"
    starts = [0, *accumulate(pyarrow.parquet.read_metadata(file).num_rows for file in found.places)]

    def name(row: int) -> str:
        file = bisect_right(starts, row) - 1
        return f"{found.places[file]}, row {row - starts[file]}"

    return name


def _load(found: _Found, **arguments) -> datasets.Dataset | datasets.IterableDataset:
    path = "parquet" if found.kind == "parquet" else found.places[0]
    try:
        return datasets.load_dataset(path, **arguments)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{found.place} could not be loaded: {cause}. {_EXPECTED}") from error


def hub_splits(repository: str, config_name: str | None) -> list[str]:
    """Names of the splits of a dataset on the Hub. Raises `ValueError` where it is not there."""
    try:
        return datasets.get_dataset_split_names(repository, config_name)
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise ValueError(f"There is no {repository} here, nor on the Hub: {cause}. {_EXPECTED}") from error


def hub_commit(repository: str) -> str:
    """The commit that a dataset on the Hub is at. Raises `ValueError` where the Hub does not tell it."""
    try:
        return HfApi().dataset_info(repository).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(f"The Hub does not tell the commit of {repository}: {error}.") from error


def _file_digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _column_names(dataset, columns: _Columns, source: str) -> dict[str, str]:
    kinds = {"image": datasets.Image, "label": datasets.ClassLabel}
    return {
        f"{what}_column": choose_column(dataset.features, what, given, [what], kinds[what], f"{what}_column", source)
        for what, given in columns._asdict().items()
    }


def _require_every_class(dataset: datasets.Dataset, source: str) -> None:
    names = dataset.features["label"].names
    empty = sorted(set(range(len(names))) - set(dataset["label"]))
    if empty:
        raise ValueError(
            f"{source} has no training image of {len(empty)} of its {len(names)} classes, {names[empty[0]]!r} first. "
            "Add images or remove the class."
        )
