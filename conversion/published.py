# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Published names into files: what the user typed, and the download into torch.hub's cache."""

import difflib
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.progress import DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from conversion.family import ConversionError
from conversion.reading import PROGRESS, check_not_a_page


TIMEOUT_SECONDS = 30


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
