# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Boxes of discovered objects as files: in COCO's format, and drawn on their images."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from ..atomic import atomic_file
from ..data.image_data import ImageData
from .object_discovery import DiscoveredObjects


# Okabe and Ito's orange and blue, which lines of different kinds tell apart in grey
PREDICTED = {"edgecolor": "#E69F00", "linestyle": "-", "linewidth": 2}
TRUE = {"edgecolor": "#56B4E9", "linestyle": "--", "linewidth": 1.5}


def write_coco(path: str | Path, data: ImageData, objects: DiscoveredObjects) -> None:
    """Writes boxes as a COCO annotation file, which `pycocotools.coco.COCO` reads.

    Its `annotations` are also what `COCO.loadRes` takes. LOST has no confidence: every score is 1. Images have the
    numbers of `data.image_ids`, or from 1.

    Args:
        path: A JSON file.
        data: The images.
        objects: Their boxes.
    """
    image_ids = list(getattr(data, "image_ids", range(1, len(data) + 1)))
    images = [
        {"id": image_id, "file_name": Path(data.name(index)).name, "height": int(height), "width": int(width)}
        for index, (image_id, (height, width)) in enumerate(zip(image_ids, objects.image_sizes))
    ]
    annotations = [
        {"id": number, "image_id": image_id, "category_id": 1, **_coco_box(box), "iscrowd": 0, "score": 1.0}
        for number, (image_id, box) in enumerate(zip(image_ids, objects.boxes.tolist()), start=1)
    ]
    content = {
        "info": {"description": f"Objects discovered in {data.display_name}", **objects.summary()},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    with atomic_file(Path(path)) as file:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _coco_box(box: Sequence[float]) -> dict:
    left, top, right, bottom = box
    return {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}


def draw_boxes(
    path: str | Path, data: ImageData, objects: DiscoveredObjects, max_images: int = 24, columns: int = 6
) -> None:
    """Draws boxes on their images, with the true ones where they are known, as one picture.

    Args:
        path: A PNG file.
        data: The images.
        objects: Their boxes.
        max_images: Where there are more, as many at even distances.
        columns: Images side by side.

    Raises:
        ValueError: where matplotlib is not installed, or an image cannot be read.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("Boxes are drawn by matplotlib, which is not installed: pip install matplotlib") from None
    shown = np.unique(np.linspace(0, len(data) - 1, min(max_images, len(data))).round().astype(int)).tolist()
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.3 * rows + 0.8), layout="constrained")
    corloc = "" if objects.corloc is None else f", CorLoc {100 * objects.corloc:.1f} %"
    figure.suptitle(f"{data.display_name}: {len(shown)} of {len(data)} images{corloc}", fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, index in zip(axes, shown):
        _draw_image(axis, data, objects, index)
    figure.legend(*_legend(data), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    with atomic_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=100)


def _draw_image(axis, data: ImageData, objects: DiscoveredObjects, index: int) -> None:
    axis.imshow(_reduced(data.image(index)), extent=(0, *objects.image_sizes[index][::-1], 0))
    for box in data.boxes(index) if hasattr(data, "boxes") else ():
        _draw_box(axis, box, TRUE)
    _draw_box(axis, objects.boxes[index], PREDICTED)
    verdict = {True: ": found", False: ": missed", None: ""}[objects.found[index]]
    # names are no formulas
    axis.set_title(f"{_shortened(Path(data.name(index)).name)}{verdict}", fontsize=7, parse_math=False)


def _reduced(image: PIL.Image.Image) -> PIL.Image.Image:
    """No larger than it is drawn, or memory would hold every photograph."""
    image = image.copy()
    image.thumbnail((440, 440))
    return image


def _shortened(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"


def _draw_box(axis, box: Sequence[float], style: dict) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))


def _legend(data: ImageData) -> tuple[list, list[str]]:
    from matplotlib.patches import Patch

    styles = {"discovered": PREDICTED} | ({"true": TRUE} if hasattr(data, "boxes") else {})
    return [Patch(fill=False, **style) for style in styles.values()], list(styles)
