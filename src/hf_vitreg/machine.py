# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What results were computed with: the machine in words, and the versions of packages."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from .distributed import num_cores


PACKAGES = ("hf-vitreg", "torch", "torchvision", "transformers", "timm", "pillow", "numpy")


def package_versions() -> dict[str, str]:
    """Of Python and the packages that numbers depend on, where they are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ImportError:  # PackageNotFoundError, where it is not installed
            continue
    return versions


def usable_device(name: str | None = None) -> torch.device:
    """A device by its name, as `cuda:1`; by default a GPU where there is one. Raises `ValueError` for one not here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    # torch that was built without a backend raises AssertionError for it, or NotImplementedError, a RuntimeError
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {name!r} here: {str(error).splitlines()[0]}") from error


@contextmanager
def memory_errors() -> Iterator[None]:
    """In this context a GPU that is full is a `ValueError` that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"The device has too little memory; lower --batch-size or --size. {error}") from error


def describe_machine(device: torch.device) -> str:
    """The machine in words, for cards and results: `2 cores of an AMD EPYC, 24 GB, torch 2.15.0`."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        cores = num_cores()
        processor = f"{cores} core{'s' * (cores > 1)} of {processor_name()}"
    return f"{processor}, {psutil.virtual_memory().total / 1e9:.0f} GB, torch {torch.__version__}"


def processor_name() -> str:
    """The model of the CPU as the system tells it, `AMD EPYC 9354`."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_family() -> int | None:
    """The number that its maker gives to processors of one design, where the system tells it."""
    family = _cpuinfo("cpu family")
    return int(family) if family else None


def processor_features() -> list[str]:
    """What instructions the CPU has, `avx512_bf16` among them, where the system tells it."""
    return (_cpuinfo("flags") or _cpuinfo("Features") or "").split()


def _cpuinfo(key: str) -> str | None:
    """Of the first core, as Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith(key)), None)
