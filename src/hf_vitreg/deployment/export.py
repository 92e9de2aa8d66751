# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A ViTReg as the kind of file that its name asks for."""

from pathlib import Path

from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .onnx import data_file, export_onnx, require_onnx
from .program import Exported, export_program


EXPORTERS = {".onnx": export_onnx, ".pt2": export_program}


def check_output(path: str | Path, overwrite: bool = False) -> None:
    """Makes sure, before anything is loaded, that a model can be exported to `path`.

    Raises:
        ValueError: where its suffix is neither `.onnx` nor `.pt2`, what such a file needs is not installed, or it is
            there and `overwrite` is false.
    """
    path = Path(path)
    if path.suffix not in EXPORTERS:
        raise ValueError(
            f"{path} does not say what it is to be. Name it .onnx for ONNX Runtime and others, or .pt2 for a program "
            "of torch."
        )
    if path.suffix == ".onnx":
        require_onnx()
    there = [file for file in (path, data_file(path)) if file.exists()]
    if path.is_dir() or (there and not overwrite):
        raise ValueError(f"There is {there[0]} already. Choose another name, or replace a file with --overwrite.")


def export_model(
    model: PreTrainedModel,
    path: str | Path,
    image_processor: BaseImageProcessor | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a ViTReg of any head as an ONNX file (`.onnx`, `export_onnx`) or a program (`.pt2`, `export_program`).

    Args:
        model: A ViTReg, or a dual encoder around one.
        path: The file; its suffix chooses.
        image_processor: Of the model, whose mean and standard deviation go into the metadata.
        overwrite: Whether a file that is there is replaced.

    Raises:
        ValueError: as `check_output`, and where the file would not do what the model does.
    """
    check_output(path, overwrite)
    return EXPORTERS[Path(path).suffix](model, path, image_processor)
