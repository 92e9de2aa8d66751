# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Where the layouts that benchmarks come in keep images and their targets, and which belong together."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .datasets import IMAGE_SUFFIXES, SPLIT_NAMES
from .image_data import SPLITS


logger = logging.getLogger(__name__)

# JPEG is not among them: it changes values
MASK_SUFFIXES = frozenset((".bmp", ".gif", ".png", ".tif", ".tiff"))
DEPTH_SUFFIXES = frozenset((".npy", ".png"))
MASK_FOLDERS = ("labels", "masks", "annotations")
DEPTH_FOLDERS = ("depth",)
VOID = 255  # VOC's borders, and what most benchmarks call a pixel without a class

# fmt: off
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)
# fmt: on
NUM_ADE20K_CLASSES = 150

Pairs = list[tuple[Path, Path]]


class Layout(NamedTuple):
    """A way to arrange images and targets.

    Attributes:
        expected: It, in words.
        fits: Whether a folder is arranged so.
        pairs: Images of a split of a folder, each with its target.
        num_classes, class_names: Of all data in it; `None` where each has its own.
        void: What masks have for no class; `None` where each has its own.
        reduce_labels: Whether masks count classes from 1 and have 0 for none.
    """

    expected: str
    fits: Callable[[Path], bool]
    pairs: Callable[[Path, str | None], Pairs]
    num_classes: int | None = None
    class_names: Sequence[str] | None = None
    void: int | None = None
    reduce_labels: bool = False


def find_layout(path: Path, task: str, name: str | None) -> Layout:
    """The layout of a folder: the one that is named, or the first that fits.

    Raises:
        ValueError: where it is none that is understood, with those that are and what was found.
    """
    if task not in LAYOUTS:
        raise ValueError(f"task must be one of {', '.join(map(repr, LAYOUTS))}, got {task!r}.")
    layouts = LAYOUTS[task]
    if name is not None and name not in layouts:
        raise ValueError(f"layout must be one of {', '.join(map(repr, layouts))} for {task}, got {name!r}.")
    if not path.is_dir():
        raise ValueError(f"There is no folder {path}.")
    fitting = [layout for key, layout in layouts.items() if layout.fits(path) and name in (None, key)]
    if not fitting:
        known = {name: layouts[name]} if name else layouts
        expected = "; ".join(f"{key}: {layout.expected}" for key, layout in known.items())
        raise ValueError(f"{path} has no layout of {task} that is understood. {expected}. Found: {_content(path)}.")
    return fitting[0]


def _content(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def _fits_folder(path: Path) -> bool:
    folders = [path, *(child for child in path.iterdir() if child.name.lower() in SPLIT_NAMES)]
    return any((folder / "images").is_dir() for folder in folders)


def _folder_pairs(target_names: Sequence[str], suffixes: frozenset[str]) -> Callable[[Path, str | None], Pairs]:
    """Reads folders of images and targets, whose names say what belongs together."""

    def pairs(path: Path, split: str | None) -> Pairs:
        images, targets = _split_folders(path, split, target_names)
        if targets is None:
            raise ValueError(f"{images} has no targets beside it: there is no folder {' or '.join(target_names)}.")
        return _paired(_by_stem(images, IMAGE_SUFFIXES), _by_stem(targets, suffixes), images, targets)

    return pairs


def _split_folders(path: Path, split: str | None, target_names: Sequence[str]) -> tuple[Path, Path | None]:
    for images, beside in _candidates(path, split):
        if images.is_dir():
            return images, next((folder for folder in map(beside, target_names) if folder.is_dir()), None)
    if split is None:
        raise ValueError(f"{path} has no folder images. Found: {_content(path)}.")
    hint = ""
    if (path / "images").is_dir():
        hint = f" Found in images: {_content(path / 'images')}. Where it is one split itself, set split=None."
    raise ValueError(
        f"{path} has no {split} split: expected {' or '.join(_accepted(split))}. Found: {_content(path)}.{hint}"
    )


def _candidates(path: Path, split: str | None) -> Iterator[tuple[Path, Callable[[str], Path]]]:
    """Where the images of a split may be, and there a folder of targets by its name."""
    if split is None:
        yield path / "images", lambda name: path / name
        return
    for folder in _accepted(split):
        yield path / folder / "images", lambda name, folder=folder: path / folder / name
        yield path / "images" / folder, lambda name, folder=folder: path / name / folder


def _accepted(split: str) -> Sequence[str]:
    """What a split may be called."""
    return SPLITS.get(split, (split,))


def _by_stem(folder: Path, suffixes: frozenset[str]) -> dict[str, Path]:
    """The files of a folder, to any depth, by their path in it without the suffix."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    found, others = {}, 0
    for path in files:
        if path.suffix.lower() not in suffixes:
            others += 1
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise ValueError(f"{found[stem]} and {path} are both called {stem}. Remove one.")
        found[stem] = path
    if not found:
        raise ValueError(f"{folder} has no file to use. Expected {', '.join(sorted(suffixes))}.")
    if others:
        logger.warning("%s: %d files are none of %s and left out.", folder, others, ", ".join(sorted(suffixes)))
    return found


def _paired(images: Mapping[str, Path], targets: Mapping[str, Path], image_folder: Path, target_folder: Path) -> Pairs:
    for ours, theirs, folder in ((images, targets, target_folder), (targets, images, image_folder)):
        alone = [path for stem, path in ours.items() if stem not in theirs]
        if alone:
            others = f", nor have {len(alone) - 1} others" if len(alone) > 1 else ""
            raise ValueError(
                f"{alone[0]} has no file of its name in {folder}{others}. Every image needs its target, and every "
                "target its image."
            )
    return [(images[stem], targets[stem]) for stem in images]


def _voc_pairs(path: Path, split: str | None) -> Pairs:
    _require_split(path, split)
    lists = path / "ImageSets" / "Segmentation"
    file = _first_file(lists, [f"{name}.txt" for name in _accepted(split)], split)
    names = [fields[0] for _, fields in _rows(file)]
    pairs = [(path / "JPEGImages" / f"{name}.jpg", path / "SegmentationClass" / f"{name}.png") for name in names]
    return _existing(pairs, file)


def _ade20k_pairs(path: Path, split: str | None) -> Pairs:
    if split not in SPLITS or split == "test":
        raise ValueError(f"ADE20K has the splits train and validation with masks, not {split}.")
    return _folder_pairs(("annotations",), MASK_SUFFIXES)(path, split)


def _nyu_pairs(path: Path, split: str | None) -> Pairs:
    _require_split(path, split)
    files = sorted(path.glob("nyu*.txt"))
    fitting = [[file.name for file in files if name in file.stem.lower()] for name in _accepted(split)]
    names = next(filter(None, fitting), [f"nyu_{split}.txt"])
    if len(names) > 1:
        raise ValueError(f"{path} has several lists of its {split} split: {', '.join(names)}. Keep one.")
    file = _first_file(path, names, split)
    pairs = []
    for row, fields in _rows(file):
        if len(fields) not in (2, 3):
            raise ValueError(f"{file}, row {row}, must be `rgb_path depth_path focal_length`, got {' '.join(fields)}.")
        # lists begin paths with a slash, though they are within the folder
        pairs.append(tuple(path / field.lstrip("/") for field in fields[:2]))
    return _existing(pairs, file)


def _require_split(path: Path, split: str | None) -> None:
    if split is None:
        raise ValueError(f"{path} has lists of its splits: name one, train or validation.")


def _first_file(folder: Path, names: Sequence[str], split: str) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        content = _content(folder) if folder.is_dir() else "no such folder"
        raise ValueError(f"{folder} has no list of a {split} split: expected {' or '.join(names)}. Found: {content}.")
    return found


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    """Number of each row that is not empty, from 1, and its words."""
    rows = [(row, line.split()) for row, line in enumerate(_lines(file), 1)]
    return [(row, fields) for row, fields in rows if fields]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as text: {error}.") from error


def _existing(pairs: Pairs, listed_in: Path) -> Pairs:
    missing = [path for pair in pairs for path in pair if not path.is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is in {listed_in} and does not exist; {len(missing)} files are missing.")
    return pairs


LAYOUTS: Mapping[str, Mapping[str, Layout]] = {
    "segmentation": {
        "voc": Layout(
            "JPEGImages, SegmentationClass and ImageSets/Segmentation/train.txt and val.txt",
            lambda path: (path / "SegmentationClass").is_dir(),
            _voc_pairs,
            num_classes=len(VOC_CLASSES),
            class_names=VOC_CLASSES,
            void=VOID,
        ),
        "ade20k": Layout(
            "images/training, images/validation, annotations/training and annotations/validation",
            lambda path: (path / "images" / "training").is_dir() and (path / "annotations" / "training").is_dir(),
            _ade20k_pairs,
            num_classes=NUM_ADE20K_CLASSES,
            void=VOID,
            reduce_labels=True,
        ),
        "folder": Layout(
            "train/images/NAME.jpg and train/labels/NAME.png, or images/train and labels/train (labels, masks or "
            "annotations), and the same of validation",
            _fits_folder,
            _folder_pairs(MASK_FOLDERS, MASK_SUFFIXES),
        ),
    },
    "depth": {
        "nyu": Layout(
            "nyu_train.txt and nyu_test.txt, of lines `rgb_path depth_path focal_length`",
            lambda path: any(path.glob("nyu*.txt")),
            _nyu_pairs,
        ),
        "folder": Layout(
            "train/images/NAME.jpg and train/depth/NAME.png or NAME.npy, or images/train and depth/train, and the "
            "same of validation",
            _fits_folder,
            _folder_pairs(DEPTH_FOLDERS, DEPTH_SUFFIXES),
        ),
    },
}


def find_class_names(path: Path, layout: Layout, num_classes: int | None) -> list[str] | None:
    """By class; their numbers where there are no names, `None` where not even their number is known.

    Names are those of the layout, or the lines of `classes.txt` in the folder or in the one that it is a split of.

    Raises:
        ValueError: where layout, file and `num_classes` do not agree, or a name is there twice.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more, got {num_classes}.")
    if layout.num_classes is not None and num_classes not in (None, layout.num_classes):
        raise ValueError(
            f"{path} has the layout of a benchmark with {layout.num_classes} classes, and num_classes is "
            f"{num_classes}. Leave it out, or say layout='folder' where it is other data."
        )
    num_classes = num_classes or layout.num_classes
    if layout.class_names:
        return list(layout.class_names)
    folders = [path, path.resolve().parent] if path.resolve().name.lower() in SPLIT_NAMES else [path]
    file = next((folder / "classes.txt" for folder in folders if (folder / "classes.txt").is_file()), None)
    if file is None:
        return None if num_classes is None else [str(index) for index in range(num_classes)]
    names = [line.strip() for line in _lines(file) if line.strip()]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{file} names {repeated[0]!r} twice.")
    if not names or num_classes not in (None, len(names)):
        raise ValueError(f"{file} names {len(names)} classes, and num_classes is {num_classes}.")
    return names
