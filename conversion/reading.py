# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Checkpoint files into tensors: nothing in them is run, and their bytes stay in the file until they are used."""

import argparse
import contextlib
import functools
import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging

from conversion.family import ConversionError


# Progress is for people who watch: not in what is piped on, and not in a log.
progress_console = Console(stderr=True)
PROGRESS = {"console": progress_console, "transient": True, "disable": not progress_console.is_terminal}

# Schedules put their NumPy scalars into the optimizer's state, and DINO its command line into the file. These are
# numbers and a bag of attributes: reading them runs nothing.
HARMLESS = [
    argparse.Namespace,
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")),
]


def read_leaves(path: Path) -> dict[str, Any]:
    """Everything a checkpoint holds, nested dictionaries flattened to dotted names.

    `{"teacher": {"backbone.cls_token": t}, "iteration": 7}` gives `teacher.backbone.cls_token` and `iteration`.
    Tensors of .safetensors and of zip-based .pth files are mapped from the file, not read.

    Raises:
        ConversionError: where the file does not exist, is cut short, is no checkpoint, or would run code.
    """
    content = _load_safetensors(path) if _kind(path) == "safetensors" else _load_pickle(path)
    if not isinstance(content, Mapping):
        raise ConversionError(
            f"{path} holds a {type(content).__name__}, not a state dict (names with their tensors). "
            "Save one with torch.save(model.state_dict(), ...)."
        )
    leaves = dict(_leaves(content))
    if not any(isinstance(leaf, torch.Tensor) for leaf in leaves.values()):
        names = ", ".join(map(repr, list(leaves)[:5])) or "nothing"
        raise ConversionError(f"{path} is no state dict: it holds {names} and not one tensor.")
    return leaves


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Without transformers' own, which would cross ours."""
    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bar:
            logging.enable_progress_bar()


def describe_source(path: Path) -> dict:
    """Name, size in bytes and sha256 of a file, for the record."""
    with (
        Progress(**PROGRESS) as progress,
        progress.open(path, "rb", description=f"Reading {path.name}") as file,
    ):
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256}


def in_one_dtype(*groups: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """All in the narrowest dtype that holds each exactly, since a folder has one. Where they agree, nothing is copied.

    Raises:
        ConversionError: where a tensor is not of floating point.
    """
    dtypes = {name: tensor.dtype for group in groups for name, tensor in group.items()}
    for name, dtype in dtypes.items():
        if not dtype.is_floating_point:
            raise ConversionError(f"{name} is {dtype}, no weight. Save the model in floating point, not quantized.")
    dtype = functools.reduce(torch.promote_types, dtypes.values())
    return [{name: tensor.to(dtype) for name, tensor in group.items()} for group in groups]


def check_not_a_page(path: Path):
    """Raises `ConversionError` for a web page or a Git LFS pointer under the name of a checkpoint."""
    with path.open("rb") as file:
        start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"<"):
        raise ConversionError(
            f"{path} is a web page (HTML or XML), not a checkpoint: the download was answered by a login, an error or "
            "a proxy. Open the address in a browser, and download the file itself."
        )
    if start.startswith(b"version https://git-lfs"):
        raise ConversionError(f"{path} is a Git LFS pointer, not the checkpoint. Fetch the file itself: git lfs pull.")


def is_torchscript(path: Path) -> bool:
    """Whether it is a program with its weights, as torch.jit.save writes it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # arbitrary bytes raise arbitrary errors, and are named when they are read
        return False


def _kind(path: Path) -> str:
    """By its first bytes, since names lie: "safetensors" or "pickle"."""
    if not path.is_file():
        what = "is a folder, not a checkpoint file" if path.is_dir() else "does not exist"
        raise ConversionError(f"{path} {what}. Give a .pth, .pt or .safetensors file.")
    if path.stat().st_size == 0:
        raise ConversionError(f"{path} is empty. Download it again.")
    check_not_a_page(path)
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":
        return "safetensors"
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise _damaged(path, "its end is missing")
    if not start.startswith((b"PK", b"\x80")):
        raise ConversionError(f"{path} is neither a PyTorch nor a safetensors file: it starts with {start!r}.")
    return "pickle"


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _load_pickle(path: Path) -> Any:
    # files from before PyTorch 1.6 are no zip archives, and cannot be mapped
    is_zip = zipfile.is_zipfile(path)
    if is_torchscript(path):
        raise ConversionError(
            f"{path} is a TorchScript archive: reading one runs the code in it. Nothing was run. Where you trust it, "
            "write its state dict with torch.save(torch.jit.load(file).state_dict(), ...)."
        )
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            # of an unusual pickle protocol; what matters of it becomes an error
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ConversionError(_refusal(path, str(error))) from error
    except Exception as error:  # arbitrary bytes raise arbitrary errors
        raise _damaged(path, error) from error


def _refusal(path: Path, message: str) -> str:
    blocked = re.search(r"GLOBAL (\S+)", message)
    if blocked is None:
        return f"{path} is a pickle, but no PyTorch checkpoint. Save the state dict with torch.save."
    return (
        f"{path} was refused: it is a pickle that asks for {blocked[1].rstrip(',')}, and reading it would run that "
        "code. Nothing was run. A state dict needs none: in the program that wrote the file, save it alone with "
        "torch.save(model.state_dict(), ...)."
    )


def _damaged(path: Path, reason: object) -> ConversionError:
    first_line = (str(reason).strip() or type(reason).__name__).splitlines()[0].rstrip(".")
    return ConversionError(f"{path} is cut short or damaged: {first_line}. Download or copy it again.")


def _leaves(content: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value.detach() if isinstance(value, torch.Tensor) else value
