# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Images with the boxes of their objects, in the layouts of Pascal VOC and of COCO, COCO20k among them."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ..distributed import num_cores
from .datasets import IMAGE_SUFFIXES
from .image_data import FileImages, read_ahead, upright_size


logger = logging.getLogger(__name__)

TOLERANCE = 1  # pixels that a box may reach over the edge of its image: annotators count from 0 and from 1
VOC_FOLDERS = ("JPEGImages", "Annotations", "ImageSets/Main")


@dataclass(eq=False)
class BoxImages(FileImages):
    """Images, each with one object at least.

    Attributes:
        all_boxes: Of each image, `(num_boxes, 4)` float64: left, top, right and bottom, in pixels from 0.
        image_ids: What the images are numbered by, in the annotations or from 1.
    """

    all_boxes: Sequence[np.ndarray]
    image_ids: Sequence[int]

    def boxes(self, index: int) -> np.ndarray:
        """The boxes of an image, `(num_boxes, 4)`: left, top, right and bottom, in pixels."""
        return self.all_boxes[index]


def load_boxes(
    path: str | Path,
    *,
    split: str = "trainval",
    no_hard: bool = False,
    annotations: str | Path | None = None,
    selection: str | Path | None = None,
) -> BoxImages:
    """Images with boxes: of a VOC folder, or where annotations are given, of COCO.

    Args:
        path: The folder with `JPEGImages`, `Annotations` and `ImageSets`; for COCO the folder that the file names of
            the annotations start from.
        split: Of VOC.
        no_hard: Of VOC, see `load_voc_boxes`.
        annotations, selection: Of COCO, see `load_coco_boxes`.

    Raises:
        ValueError: as `load_voc_boxes` and `load_coco_boxes` do.
    """
    if annotations is None:
        return load_voc_boxes(path, split=split, no_hard=no_hard)
    return load_coco_boxes(path, annotations, selection)


# Pascal VOC


def load_voc_boxes(folder: str | Path, split: str = "trainval", no_hard: bool = False) -> BoxImages:
    """The images that `ImageSets/Main/SPLIT.txt` lists, with the boxes of their XML files.

    VOC counts pixels from 1 and includes the last: left and top become one less. Images without an object are left
    out.

    Args:
        folder: With `JPEGImages`, `Annotations` and `ImageSets/Main`, as VOC2007 and VOC2012.
        split: Whose list.
        no_hard: Leave out objects that are marked truncated or difficult, and images with no others.

    Raises:
        ValueError: for a folder, list, image or XML file that is not there, what is no XML or no image, a box outside
            its image, an empty box, or a list without an image with an object.
    """
    folder = Path(folder)
    for name in VOC_FOLDERS:
        if not (folder / name).is_dir():
            raise ValueError(f"{folder} has no {name}. VOC's layout is {', '.join(VOC_FOLDERS)}, as VOC2007 has it.")
    images = {path.stem: path for path in (folder / "JPEGImages").iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    listed = _voc_list(folder, split)
    items = []
    for number, name in enumerate(listed, start=1):
        annotation = folder / "Annotations" / f"{name}.xml"
        if name not in images:
            raise ValueError(f"{folder / 'JPEGImages'} has no image {name}, which {split}.txt lists.")
        if not annotation.is_file():
            raise ValueError(f"{images[name]} has no boxes: there is no {annotation}.")
        items.append(_Annotated(images[name], number, _voc_boxes(annotation, no_hard), annotation))
    return _box_images(items, f"{_voc_name(folder)} {split}" + (" without hard objects" if no_hard else ""))


def _voc_list(folder: Path, split: str) -> list[str]:
    file = folder / "ImageSets/Main" / f"{split}.txt"
    if not file.is_file():
        splits = sorted(path.stem for path in file.parent.glob("*.txt"))
        raise ValueError(f"There is no {file}. The splits that {folder} has: {', '.join(splits) or 'none'}.")
    # the lists of a class have a second column
    names = [line.split()[0] for line in _text(file).splitlines() if line.strip()]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{file} lists {repeated} more than once. Remove the repetition: it would count twice.")
    return names


def _voc_boxes(file: Path, no_hard: bool) -> np.ndarray:
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise ValueError(f"{file} is no XML that could be read: {error}.") from error
    objects = [each for each in root.iter("object") if not (no_hard and _is_hard(each))]
    return _array([_voc_box(each, file) for each in objects])


def _is_hard(found: ElementTree.Element) -> bool:
    return any(found.findtext(mark, "0").strip() == "1" for mark in ("truncated", "difficult"))


def _voc_box(found: ElementTree.Element, file: Path) -> list[float]:
    try:
        left, top, right, bottom = (float(found.findtext(f"bndbox/{side}")) for side in _SIDES)
    except (TypeError, ValueError):
        raise ValueError(f"{file} has an object without a bndbox of four numbers, {', '.join(_SIDES)}.") from None
    return [left - 1, top - 1, right, bottom]


_SIDES = ("xmin", "ymin", "xmax", "ymax")


def _voc_name(folder: Path) -> str:
    return folder.resolve().name


# COCO


def load_coco_boxes(
    images: str | Path, annotations: str | Path, selection: str | Path | Sequence[str | int] | None = None
) -> BoxImages:
    """Images with the boxes of a COCO annotation file, those of crowds left out.

    Corners are rounded to whole pixels, as the published code of LOST does. Images without an object are left out.

    Args:
        images: The folder that file names start from, as `train2014`.
        annotations: The JSON file, as `instances_train2014.json`.
        selection: The images to take, in this order: a text file with a name or number a line (COCO20k is the list
            `coco_20k_filenames.txt` of the LOST repository), or names or numbers. By default all.

    Raises:
        ValueError: for a file or image that is not there, JSON that is none or not COCO's, a selected image that is
            not annotated, what is no image, a box outside its image, an empty box, or no image with an object.
    """
    folder, file = Path(images), Path(annotations)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    described, boxes = _coco_content(file)
    if selection is not None:
        described = _selected(described, selection, file)
    items = [
        _Annotated(_coco_image(folder, name, file), image_id, _array(boxes[image_id]), f"{file}, image {image_id}")
        for image_id, name in described.items()
    ]
    return _box_images(items, file.stem if selection is None else f"{file.stem}, {len(described)} selected")


def _coco_content(file: Path) -> tuple[dict[int, str], Mapping[int, list]]:
    """File name and boxes of each image, by its number."""
    try:
        content = json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    try:
        described = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        boxes = defaultdict(list)
        for each in content["annotations"]:
            if not each.get("iscrowd"):
                boxes[int(each["image_id"])].append(_coco_box(each["bbox"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{file} is not in COCO's format, {{images: [{{id, file_name}}], annotations: [{{image_id, bbox}}]}}: "
            f"{type(error).__name__} {error}."
        ) from error
    unknown = sorted(boxes.keys() - described.keys())
    if unknown:
        raise ValueError(f"{file} has boxes of image {unknown[0]}, which is not among its images.")
    return described, boxes


def _coco_box(box: Sequence[float]) -> list[float]:
    left, top, width, height = map(float, box)
    # halves to the even pixel, as Python's round
    return np.rint([left, top, left + width, top + height]).tolist()


def _selected(described: Mapping[int, str], selection: Any, file: Path) -> dict[int, str]:
    if isinstance(selection, (str, Path)):
        source, selection = str(selection), _text(Path(selection)).split()
    else:
        source = "The selection"
    by_name = {Path(name).name: image_id for image_id, name in described.items()}
    chosen = {}
    for each in selection:
        name = Path(str(each)).name
        image_id = int(name) if name.isdecimal() else by_name.get(name)
        if image_id not in described:
            raise ValueError(f"{source} has {each}, which is not among the images of {file}.")
        if image_id in chosen:
            raise ValueError(f"{source} has {each} more than once. Remove the repetition: it would count twice.")
        chosen[image_id] = described[image_id]
    return chosen


def _coco_image(folder: Path, name: str, file: Path) -> Path:
    # file names with their folder, as COCO20k's list has them, may start at that folder or above it
    for path in (folder / name, folder / Path(name).name):
        if path.is_file():
            return path
    raise ValueError(f"There is no image {folder / name}, which {file} lists.")


# What both have in common


@dataclass(frozen=True, eq=False)
class _Annotated:
    """An image, its number, its boxes, and where these are from."""

    path: Path
    image_id: int
    boxes: np.ndarray
    source: str | Path


def _box_images(items: Sequence[_Annotated], display_name: str) -> BoxImages:
    with_objects = [item for item in items if len(item.boxes)]
    if not with_objects:
        raise ValueError(f"{display_name}: none of {len(items)} images has an object.")
    if len(with_objects) < len(items):
        logger.info("%s: %d images without an object are left out.", display_name, len(items) - len(with_objects))
    with ThreadPoolExecutor(num_cores()) as pool:
        for _ in read_ahead(_require_inside, with_objects, pool, ahead=64):
            pass
    return BoxImages(
        paths=[item.path for item in with_objects],
        display_name=display_name,
        all_boxes=[item.boxes for item in with_objects],
        image_ids=[item.image_id for item in with_objects],
    )


def _require_inside(item: _Annotated) -> None:
    height, width = upright_size(item.path)
    for box in item.boxes:
        left, top, right, bottom = box
        shown = f"{item.source} has the box {[float(side) for side in box]} (left, top, right, bottom)"
        if not (right > left and bottom > top):
            raise ValueError(f"{shown}, which is empty. Correct or remove it.")
        if min(left, top) < -TOLERANCE or right > width + TOLERANCE or bottom > height + TOLERANCE:
            raise ValueError(
                f"{shown} outside its image {item.path} of {height}x{width} pixels (height x width). Correct or "
                "remove it."
            )


def _array(boxes: Iterable[Sequence[float]]) -> np.ndarray:
    return np.array(list(boxes), dtype=np.float64).reshape(-1, 4)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}.") from error
