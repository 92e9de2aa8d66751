# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Images to look at a model with: found in folders, read one at a time, hashed as they are read."""

import glob
import hashlib
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import torch
from rich.console import Console
from rich.progress import Progress

from ..data.datasets import IMAGE_SUFFIXES, read_image
from ..distributed import num_cores
from ..features import VisionEncoder


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images and, where they come from class folders, their classes.

    Attributes:
        items: Paths, or images in memory.
        labels: Class of each, an index into `class_names`; `None` where classes are not known.
        class_names: Names of the folders.
        why_no_labels: In words, where there are none.
    """

    items: Sequence[Path | PIL.Image.Image]
    labels: Sequence[int] | None = None
    class_names: Sequence[str] = ()
    why_no_labels: str | None = "the images were given without classes"

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        """The path, or `image 3`."""
        item = self.items[index]
        return f"image {index}" if isinstance(item, PIL.Image.Image) else str(item)


def find_images(sources: Sequence[str | Path], max_images: int | None = None, seed: int = 0) -> ImageFiles:
    """The images of folders, files and patterns, in the order of their names.

    Args:
        sources: Folders, which are searched to any depth, files, or patterns as `"photos/*.jpg"`.
        max_images: Take a random sample where there are more.
        seed: Of the sample.

    Returns:
        Them, with the names of their folders as classes where they lie in two or more folders of one source.

    Raises:
        ValueError: where there is no image.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"The largest number of images must be 1 or more, got {max_images}.")
    paths = sorted({path for source in sources for path in _paths(str(source))})
    if not paths:
        raise ValueError(
            f"There is no image in {', '.join(map(str, sources)) or 'nothing'}. Give a folder with images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}), files, or a pattern in quotes."
        )
    if max_images is not None and max_images < len(paths):
        paths = sorted(random.Random(seed).sample(paths, max_images))
    folders, why_no_labels = _classes(sources, paths)
    if why_no_labels:
        return ImageFiles(paths, why_no_labels=why_no_labels)
    class_names = sorted(set(folders))
    return ImageFiles(paths, [class_names.index(folder) for folder in folders], class_names, None)


def _paths(source: str) -> list[Path]:
    if Path(source).is_file():
        return [Path(source)]
    found = Path(source).rglob("*") if Path(source).is_dir() else map(Path, glob.glob(source, recursive=True))
    visible = (path for path in found if not path.name.startswith("."))
    return [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]


def _classes(sources: Sequence[str | Path], paths: list[Path]) -> tuple[list[str], str | None]:
    """The folder that each image is in, and in words why these are no classes."""
    if len(sources) != 1 or not Path(sources[0]).is_dir():
        return [], "the images are not those of one folder with class folders"
    if any(path.parent == Path(sources[0]) for path in paths):
        return [], "some images lie in no class folder"
    folders = [path.parent.name for path in paths]
    if len(set(folders)) < 2:
        return [], f"all images lie in one folder, {folders[0]}"
    if len(set(folders)) > len(folders) / 2:
        return [], "there are less than two images a folder"
    return folders, None


@dataclass(eq=False)
class ImageStream:
    """Images batch by batch as a model takes them, as often as they are wanted.

    What cannot be read the first time is left out from then on. Each image is resized as soon as it is decoded, so
    that no more than one photograph a core is in memory.

    Attributes:
        unreadable: Why an image was left out, by its index.
        sha256: Of all bytes of the files that could be read, after the first time.
    """

    encoder: VisionEncoder
    images: ImageFiles
    size: tuple[int, int]
    batch_size: int
    progress: bool = False
    unreadable: dict[int, str] = field(default_factory=dict)
    sha256: str | None = None

    def batches(self, title: str) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Indices of images, and their `pixel_values`.

        Raises:
            ValueError: where no image can be read, or one could be before and cannot now.
        """
        digest, is_first = hashlib.sha256(), self.sha256 is None
        indices = [index for index in range(len(self.images)) if index not in self.unreadable]
        console = Console(stderr=True)
        with ThreadPoolExecutor(num_cores()) as pool, Progress(console=console, disable=not self.progress) as progress:
            task = progress.add_task(title, total=len(indices))
            for start in range(0, len(indices), self.batch_size):
                chosen = indices[start : start + self.batch_size]
                found, pixels = [], []
                for index, (content_hash, image) in zip(chosen, pool.map(self._read, chosen)):
                    if isinstance(image, str):
                        self._leave_out(index, image, is_first)
                    else:
                        digest.update(content_hash)
                        found.append(index)
                        pixels.append(image)
                if found:
                    yield found, torch.stack(pixels)
                progress.advance(task, len(chosen))
        if len(self.unreadable) == len(self.images):
            index, reason = next(iter(self.unreadable.items()))
            raise ValueError(
                f"None of {len(self.images)} images can be used. The first, {self.images.name(index)}: {reason}."
            )
        self.sha256 = digest.hexdigest()

    def _leave_out(self, index: int, reason: str, is_first: bool) -> None:
        if not is_first:
            raise ValueError(f"{self.images.name(index)} could be read before, and cannot now: {reason}.")
        self.unreadable[index] = reason

    def _read(self, index: int) -> tuple[bytes, torch.Tensor | str]:
        """Hash of the content, and what the model takes, or why not."""
        item = self.images.items[index]
        try:
            if isinstance(item, PIL.Image.Image):
                image, content = item.convert("RGB"), item.tobytes()
            else:
                content = Path(item).read_bytes()
                image = read_image({"bytes": content, "path": None})
        except PIL.UnidentifiedImageError:
            return b"", "no image that Pillow knows"
        except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
            return b"", f"{type(error).__name__}: {error}".replace("\n", " ")
        patch_size = self.encoder.patch_size
        if min(image.size) < patch_size:
            width, height = image.size
            return b"", f"{height}x{width} pixels, smaller than a patch of {patch_size}x{patch_size}"
        return hashlib.sha256(content).digest(), self.encoder.preprocess([image], self.size)[0]
