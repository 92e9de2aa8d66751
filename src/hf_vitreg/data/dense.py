# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Images with a target for every pixel, a class or a depth, in the layouts that benchmarks come in.

Segmentation: folders of masks, Pascal VOC 2012 (Everingham et al., IJCV 2015), ADE20K (Zhou et al., CVPR 2017). Depth:
folders of depth maps, NYU Depth V2 (Silberman et al., ECCV 2012) with the split files of BTS and mmsegmentation.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from rich.console import Console
from rich.progress import Progress

from ..distributed import num_cores
from .datasets import DEEP_MODES, SPLIT_NAMES
from .dense_layouts import VOID, find_class_names, find_layout
from .image_data import FileImages, read_ahead, upright_size


DEEP_INTEGERS = DEEP_MODES - {"F"}
# of one channel that holds whole numbers; of a palette the indices, not the colours
MASK_MODES = DEEP_INTEGERS | {"1", "L", "P"}


@dataclass(eq=False)
class SegmentationImages(FileImages):
    """Images with a class for every pixel.

    Attributes:
        paths: Of the images.
        display_name: What people call them.
        target_paths: Of the masks, one an image.
        class_names: By class; their numbers where nobody named them.
        ignore_index: What `target` has for a pixel that does not count.
        void: What the masks have there.
        reduce_labels: Whether the masks count classes from 1 and have 0 for none.
    """

    target_paths: Sequence[Path]
    class_names: Sequence[str]
    ignore_index: int = VOID
    void: int = VOID
    reduce_labels: bool = False

    @property
    def num_classes(self) -> int:
        """Classes are 0 to `num_classes - 1`."""
        return len(self.class_names)

    def target(self, index: int) -> np.ndarray:
        """Class of each pixel of an image, `(height, width)`, int64, `ignore_index` where it does not count.

        Raises:
            ValueError: which names the mask, where it cannot be read, has several channels, another size than its
                image, or a value that is no class.
        """
        path = self.target_paths[index]
        values = _read_mask(path)
        _require_same_size(values, path, self.paths[index])
        ignored = values == self.void
        if self.reduce_labels:
            ignored |= values == 0
            values = values - 1
        values = np.where(ignored, self.ignore_index, values)
        outside = values[~ignored & ((values < 0) | (values >= self.num_classes))]
        if outside.size:
            first = int(self.reduce_labels)
            found = sorted({value + first for value in outside.tolist()})
            raise ValueError(
                f"The mask {path} has {', '.join(map(str, found[:5]))} among its values. Allowed are the classes "
                f"{first} to {self.num_classes - 1 + first} and {self.void}{' and 0' if first else ''} for what does "
                "not count. Set num_classes and ignore_index as the masks have them."
            )
        return values

    def select(self, indices: Sequence[int]) -> "SegmentationImages":
        """Some of the images, in this order."""
        return _select(self, indices)

    def check(self, progress: bool = False) -> np.ndarray:
        """Reads every mask, a few at a time.

        Args:
            progress: Show a bar.

        Returns:
            Number of pixels of each class, `(num_classes,)`, int64. A class without any cannot be learned.

        Raises:
            ValueError: which names the masks that cannot be used.
        """

        def count(index: int) -> np.ndarray:
            target = self.target(index)
            return np.bincount(target[target != self.ignore_index], minlength=self.num_classes)

        return sum(_checked(self, count, progress))


@dataclass(eq=False)
class DepthImages(FileImages):
    """Images with a depth for every pixel.

    Attributes:
        paths: Of the images.
        display_name: What people call them.
        target_paths: Of the depth maps, one an image: 16-bit PNG, or NPY in metres.
        depth_scale: What a PNG has for one metre; 1000 where it holds millimetres.
    """

    target_paths: Sequence[Path]
    depth_scale: float = 1000.0

    def target(self, index: int) -> np.ndarray:
        """Depth of each pixel of an image in metres, `(height, width)`, float32, 0 where none was measured.

        Raises:
            ValueError: which names the depth map, where it cannot be read, is none, has another size than its image,
                values that are negative or not finite, or no value but 0.
        """
        path = self.target_paths[index]
        depth = _read_npy(path) if path.suffix.lower() == ".npy" else _read_depth_png(path) / self.depth_scale
        _require_same_size(depth, path, self.paths[index])
        if not np.isfinite(depth).all():
            raise ValueError(f"The depth map {path} has values that are not finite. Write 0 where there is no depth.")
        if (depth < 0).any():
            raise ValueError(f"The depth map {path} has negative values. Write 0 where there is no depth.")
        if not depth.any():
            raise ValueError(f"The depth map {path} has no depth: every value is 0. Remove it and its image.")
        return depth.astype(np.float32)

    def select(self, indices: Sequence[int]) -> "DepthImages":
        """Some of the images, in this order."""
        return _select(self, indices)

    def check(self, progress: bool = False) -> tuple[float, float]:
        """Reads every depth map, a few at a time.

        Args:
            progress: Show a bar.

        Returns:
            The smallest and the largest depth there is, in metres. Those of thousands are millimetres: then
            `depth_scale` is wrong.

        Raises:
            ValueError: which names the depth maps that cannot be used.
        """

        def extent(index: int) -> tuple[float, float]:
            depth = self.target(index)
            return float(depth[depth > 0].min()), float(depth.max())

        smallest, largest = zip(*_checked(self, extent, progress))
        return min(smallest), max(largest)


def load_dense(
    path: str | Path,
    split: str | None = "train",
    task: str = "segmentation",
    layout: str | None = None,
    num_classes: int | None = None,
    ignore_index: int = VOID,
    reduce_labels: bool | None = None,
    depth_scale: float = 1000.0,
) -> SegmentationImages | DepthImages:
    """The images of a split and what is known of their pixels. Masks and depth maps are read when they are asked for.

    Args:
        path: A folder in one of the layouts below.
        split: `"train"`, `"validation"`, which is the test split where there is no other, or `"test"`. `None` for a
            folder that is one split.
        task: `"segmentation"` or `"depth"`.
        layout: One of those below; by default it is recognised.
        num_classes: By default that of the layout, or as many as `classes.txt` in the folder has lines.
        ignore_index: Value of pixels that do not count, in the masks of folders and in targets. Where it is the last
            of the classes, as of CamVid's 12, it is none of them, and there is one less.
        reduce_labels: Whether masks count classes from 1 and have 0 for none. By default only ADE20K's do.
        depth_scale: What a depth PNG has for one metre.

    Layouts of segmentation:
        folder: `SPLIT/images/NAME.jpg` and `SPLIT/labels/NAME.png`, or `images/SPLIT` and `labels/SPLIT`; instead of
            `labels` also `masks` or `annotations`.
        voc: `JPEGImages`, `SegmentationClass` and `ImageSets/Segmentation/train.txt`.
        ade20k: `images/training`, `annotations/training` and the same of `validation`.

    Layouts of depth:
        folder: `SPLIT/images/NAME.jpg` and `SPLIT/depth/NAME.png` or `.npy`, or `images/SPLIT` and `depth/SPLIT`.
        nyu: `nyu_train.txt` and `nyu_test.txt` with lines `rgb_path depth_path focal_length`.

    Raises:
        ValueError: for an unknown layout, a split that is not there or is empty, images and targets that do not go
            together, or classes whose number is not known or not that of the layout.
    """
    path = Path(path)
    chosen = find_layout(path, task, layout)
    pairs = chosen.pairs(path, split)
    if not pairs:
        raise ValueError(f"The split {split} of {path} is empty. Expected {chosen.expected}.")
    images, targets = map(list, zip(*pairs))
    display_name = _display_name(path)
    if task == "depth":
        if not depth_scale > 0:
            raise ValueError(f"depth_scale must be above 0, 1000 for millimetres, got {depth_scale}.")
        return DepthImages(images, display_name, targets, depth_scale)
    reduce_labels = chosen.reduce_labels if reduce_labels is None else reduce_labels
    names = find_class_names(path, chosen, num_classes)
    if names is None:
        raise ValueError(_values_without_classes(path, targets))
    if chosen.void is None and not reduce_labels and ignore_index == len(names) - 1:
        names = names[:-1]
    elif (chosen.void is not None or reduce_labels) and 0 <= ignore_index < len(names):
        raise ValueError(f"ignore_index must be none of the classes 0 to {len(names) - 1}, got {ignore_index}.")
    void = ignore_index if chosen.void is None else chosen.void
    return SegmentationImages(images, display_name, targets, names, ignore_index, void, reduce_labels)


def _values_without_classes(path: Path, targets: Sequence[Path], num_read: int = 20) -> str:
    values = sorted(set().union(*(np.unique(_read_mask(target)).tolist() for target in targets[:num_read])))
    return (
        f"How many classes {path} has is not known: it has no classes.txt with a name a line. Write one, or set "
        f"num_classes, and ignore_index where it is not {VOID}. The first {min(num_read, len(targets))} masks have "
        f"the values {', '.join(map(str, values[:30]))}{' …' * (len(values) > 30)}."
    )


def _display_name(path: Path) -> str:
    """Of the folder, or of the one that it is a split of."""
    path = path.resolve()
    return path.parent.name if path.name.lower() in SPLIT_NAMES else path.name


# Reading


def _read_mask(path: Path) -> np.ndarray:
    """Its values, `(height, width)`, int64."""
    values, mode = _read_pixels(path)
    if mode not in MASK_MODES:
        raise ValueError(
            f"The mask {path} has mode {mode}, and must have one channel that holds classes (L, P or 16 bits). Save "
            "the classes, not the colours that they are shown in."
        )
    return values.astype(np.int64)


def _read_depth_png(path: Path) -> np.ndarray:
    """Its values, `(height, width)`, float64."""
    values, mode = _read_pixels(path)
    if mode not in DEEP_INTEGERS:
        raise ValueError(f"The depth map {path} has mode {mode}, and must have one channel of 16 bits.")
    return values.astype(np.float64)


def _read_pixels(path: Path) -> tuple[np.ndarray, str]:
    try:
        with PIL.Image.open(path) as image:
            return np.asarray(image), image.mode
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{path} is no image that Pillow knows.") from error
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error


def _read_npy(path: Path) -> np.ndarray:
    try:
        depth = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"The depth map {path} is no NPY file of numbers: {error}") from error
    if not isinstance(depth, np.ndarray) or depth.ndim != 2 or depth.dtype.kind != "f":
        found = f"shape {depth.shape} of {depth.dtype}" if isinstance(depth, np.ndarray) else "several arrays"
        raise ValueError(f"The depth map {path} must hold metres, (height, width) of float32, got {found}.")
    return depth


def _require_same_size(target: np.ndarray, path: Path, image_path: Path) -> None:
    size = upright_size(image_path)
    if target.shape != size:
        height, width = target.shape
        raise ValueError(
            f"{path} has {height}x{width} pixels (height x width), and its image {image_path} {size[0]}x{size[1]}. "
            "Both must be of one size."
        )


def _select(data: Any, indices: Sequence[int]) -> Any:
    paths, targets = ([paths[index] for index in indices] for paths in (data.paths, data.target_paths))
    return replace(data, paths=paths, target_paths=targets)


def _checked(data: Any, look: Callable[[int], Any], progress: bool) -> list:
    """What `look` says of each image. `ValueError` where it raises one, with the first and how many others."""

    def outcome(index: int) -> Any:
        try:
            return look(index)
        except ValueError as error:
            return error

    results = []
    with ThreadPoolExecutor(num_cores()) as pool, Progress(console=Console(stderr=True), disable=not progress) as bar:
        indices = bar.track(range(len(data)), description=f"Checking {data.display_name}")
        results.extend(read_ahead(outcome, indices, pool, ahead=64))
    errors = [result for result in results if isinstance(result, ValueError)]
    if errors:
        others = f" There are {len(errors) - 1} others like it." if len(errors) > 1 else ""
        raise ValueError(f"{errors[0]}{others}") from errors[0]
    return results
