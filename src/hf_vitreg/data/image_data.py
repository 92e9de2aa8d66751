# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Images by number or one after another, known by the hash of their content.

Whatever has the methods of `ImageData` can be looked at with a model. Labels, masks or boxes are beside them, as each
task has its own.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import fsspec
import PIL.ExifTags
import PIL.Image
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from ..distributed import num_cores
from .datasets import read_image


Item = TypeVar("Item")
Result = TypeVar("Result")

# what each split is called, the usual first; where there is no validation split the test split is taken for it
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "test", "testing"),
    "test": ("test", "testing"),
}


@runtime_checkable
class ImageData(Protocol):
    """Images by number, of which nothing is in memory but what was asked for.

    Attributes:
        display_name: What people call them.
    """

    display_name: str

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The path of an image, or `FILE, row 3`."""

    def content(self, index: int) -> bytes:
        """Its encoded bytes. They are hashed, and are all that `image` depends on."""

    def image(self, index: int) -> PIL.Image.Image:
        """RGB and upright. Raises `ValueError`, which names the file, for what is no image."""


class StreamedImage(NamedTuple):
    """One image of a stream: its name, its encoded bytes, and its class where that is known."""

    name: str
    content: bytes
    label: int | None


class StreamedData(Protocol):
    """Images one after another, of which nobody knows how many there are.

    Attributes:
        display_name: What people call them.
        identity: Equal for two streams only where their images are: of files their hashes, on the Hub the commit.
        class_names: Of the labels; empty where there are none.
    """

    display_name: str
    identity: str
    class_names: Sequence[str]

    def __iter__(self) -> Iterator[StreamedImage]: ...

    def name(self, index: int) -> str:
        """What an image is called."""


def decode(content: bytes, name: str) -> PIL.Image.Image:
    """An encoded image as RGB, upright as its EXIF says.

    Args:
        content: Its bytes, of any format that Pillow reads.
        name: To say where it is from.

    Raises:
        ValueError: where they are no image, a damaged one, or one with more than 8 bits a channel.
    """
    try:
        return read_image({"bytes": content, "path": None})
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{name} is no image that Pillow knows. Replace or remove it.") from error
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be read as an image: {reason}. Repair or remove it.") from error


def upright_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an image as it is looked at, from its header.

    Raises:
        ValueError: where it cannot be read as an image.
    """
    try:
        with PIL.Image.open(path) as image:
            width, height = image.size
            is_turned = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) >= 5
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise ValueError(f"{path} cannot be read as an image: {' '.join(str(error).split())}.") from error
    return (width, height) if is_turned else (height, width)


def read_ahead(function: Callable[[Item], Result], items: Iterable[Item], pool: ThreadPoolExecutor, ahead: int):
    """What a function makes of each item, in order, computed by a pool while the caller is busy.

    Args:
        function: Of one item.
        items: Read as they are needed.
        pool: That computes.
        ahead: No more than this many results are computed before they are asked for.

    Yields:
        The results. An error of the function is raised where its result would have been.
    """
    items, waiting = iter(items), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def content_digests(data: ImageData, indices: Sequence[int], num_threads: int | None = None) -> list[bytes]:
    """SHA-256 of the content of some images, 32 bytes each, read by a few threads; zeros for what cannot be read."""

    def digest(index: int) -> bytes:
        try:
            return hashlib.sha256(data.content(index)).digest()
        except ValueError:
            return bytes(hashlib.sha256().digest_size)

    with ThreadPoolExecutor(num_threads or num_cores()) as pool:
        return list(read_ahead(digest, indices, pool, ahead=64))


def content_hash(data: ImageData, processes: Accelerator | PartialState | None = None) -> str:
    """SHA-256 of the content of all images in their order.

    Args:
        data: Images.
        processes: Each of them reads its share.
    """
    known = data.known_hash if isinstance(data, ContentHashed) else None
    if known is None:
        known = combined_hash(_all_digests(data, processes))
    if isinstance(data, ContentHashed):
        data.known_hash = known
    return known


def _all_digests(data: ImageData, processes: Accelerator | PartialState | None) -> list[bytes]:
    if processes is None or processes.num_processes == 1:
        return content_digests(data, range(len(data)))
    # neighbours on one process, so that gathered they are in order
    rank, count = processes.process_index, processes.num_processes
    share = range(len(data) * rank // count, len(data) * (rank + 1) // count)
    return gather_object(content_digests(data, share))


def combined_hash(digests: Iterable[bytes]) -> str:
    """One hash of the hashes of images, in their order."""
    digest = hashlib.sha256()
    for each in digests:
        digest.update(each)
    return digest.hexdigest()


class ContentHashed:
    """For data that does not change once it is loaded: `content_hash` reads it once.

    Attributes:
        known_hash: Once it is.
    """

    known_hash: str | None = None

    def sha256(self) -> str:
        """SHA-256 of the content of all images in their order."""
        return content_hash(self)


@dataclass(eq=False)
class FileImages(ContentHashed):
    """Image files, in this order."""

    paths: Sequence[Path]
    display_name: str

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.paths[index])

    def content(self, index: int) -> bytes:
        """Its bytes. Raises `ValueError` where it cannot be read."""
        return read_file(self.name(index))

    def image(self, index: int) -> PIL.Image.Image:
        """RGB and upright. Raises `ValueError` for what is no image."""
        return decode(self.content(index), self.name(index))


def read_file(path: str) -> bytes:
    """Of a path on this machine, or one as `hf://datasets/…` of a streamed dataset."""
    try:
        with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
