# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Published names: what the user typed, the download into torch.hub's cache, and the list of all there are."""

import difflib
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from conversion.family import (
    CUSTOM,
    UNKNOWN_LICENSE,
    ConversionError,
    Family,
    KnownCheckpoint,
    License,
)
from conversion.reading import PROGRESS, check_not_a_page


TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Located:
    """What the user asked for.

    Attributes:
        file: To convert.
        arch: The architecture that it must be of, where one is known.
        published: The name, where it was one.
        license: Of the weights.
        base_model: The same weights on the Hub.
    """

    file: Path
    arch: str | None
    published: str | None
    license: License
    base_model: str | None


def locate(
    family: Family,
    checkpoint: str,
    arch: str | None = None,
    base_url: str | None = None,
    cache_dir: Path | None = None,
    license: str | None = None,
) -> Located:
    """The file that is meant by a path, or by a published name; that one is downloaded.

    Args:
        family: Whose names they are.
        checkpoint: A file, or a published name.
        arch: The architecture that the shapes must be of; "custom" allows any.
        base_url: Where the published files are, if not at the family's own address.
        cache_dir: Where downloads go; the folder of torch.hub where not given.
        license: Of the weights. Published ones have their own; that of a file is unknown if not given.

    Raises:
        ConversionError: where nothing is called so, and where name and architecture do not fit each other.
    """
    if arch is not None:
        arch = _known_arch(family, arch)
    name = _published_name(family, checkpoint)
    if name is None:
        return Located(Path(checkpoint), arch, None, License(license) if license else UNKNOWN_LICENSE, None)
    published = family.published[name]
    if arch not in (None, CUSTOM, published.arch):
        raise ConversionError(f"{checkpoint} is {published.arch}, not {arch}. Leave --arch out.")
    if family.fetch is not None:
        file = family.fetch(published.path, base_url, cache_dir)
    else:
        file = download(address(family, published.path, base_url), cache_dir)
    own = License(license) if license else published.license
    return Located(file, published.arch, name, own, published.base_model)


def address(family: Family, path: str, base_url: str | None = None) -> str:
    """Of a published file."""
    return f"{(base_url or family.base_url).rstrip('/')}/{path}"


def known_checkpoints(family: Family) -> list[KnownCheckpoint]:
    """Every checkpoint of a family, for the list."""
    counts = {arch: _num_parameters(family, arch) for arch in {one.arch for one in family.published.values()}}
    return [
        KnownCheckpoint(
            family=family.name,
            name=name,
            arch=published.arch,
            source=address(family, published.path),
            num_registers=family.architectures[published.arch].num_register_tokens,
            patch_size=family.architectures[published.arch].patch_size,
            num_parameters=counts[published.arch],
            license=str(published.license),
        )
        for name, published in family.published.items()
    ]


def _num_parameters(family: Family, arch: str) -> int:
    with torch.device("meta"):
        model = family.model_class(family.config(family.architectures[arch]))
    return sum(parameter.numel() for parameter in model.parameters())


def _known_arch(family: Family, arch: str) -> str:
    name = family.spelled(arch.removeprefix(f"{family.name}_"))
    if name not in (*family.architectures, CUSTOM):
        raise ConversionError(f"--arch {arch} is not known. {nearest(name, [*family.architectures, CUSTOM])}")
    return name


def _published_name(family: Family, checkpoint: str) -> str | None:
    """A published name as it is in the table, `None` for a path."""
    name = family.spelled(checkpoint)
    # a published name may have a slash in it
    if not looks_like_name(checkpoint) and (name not in family.published or Path(checkpoint).exists()):
        return None
    if name not in family.published:
        raise ConversionError(
            f"{checkpoint} is neither a file nor a published name. {nearest(name, family.published)}"
        )
    return name


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message: the nearest of the allowed names, or all of them."""
    allowed = list(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"Did you mean {close[0]}?" if close else f"There are {', '.join(allowed)}."


def looks_like_name(given: str) -> bool:
    """Whether this can only be meant as a published name: it names no folder, and no file is called so."""
    path = Path(given)
    return path.name == given and not path.exists()


def download(url: str, cache_dir: Path | None = None) -> Path:
    """The file at this address, from the cache (torch.hub's unless given) where it is there already.

    Raises:
        ConversionError: where the address cannot be reached, or answers with something else than the whole file.
            Nothing is left in the cache then.
    """
    folder = cache_dir or Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{path.name}.{uuid.uuid4().hex}.partial"
    try:
        _fetch(url, partial)
        check_not_a_page(partial)
        partial.rename(path)
    except (OSError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(
            f"{url} could not be downloaded: {getattr(error, 'reason', error)}. Check the network, or fetch the file "
            f"elsewhere and give its path, or put it at {path}."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _fetch(url: str, path: Path):
    request = urllib.request.Request(url, headers={"User-Agent": "hf-vitreg"})
    columns = (TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn())
    with (
        urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer,
        path.open("wb") as file,
        Progress(*columns, **PROGRESS) as progress,
    ):
        expected = answer.headers.get("Content-Length")
        task = progress.add_task(f"Downloading {url}", total=int(expected) if expected else None)
        while block := answer.read(2**20):
            file.write(block)
            progress.update(task, advance=len(block))
    received = path.stat().st_size
    # urllib does not mind a connection that ends early
    if expected and received != int(expected):
        raise OSError(f"it ended after {received} of {expected} bytes")
