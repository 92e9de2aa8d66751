# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A ViTReg as an ONNX file, by torch's own exporter, compared with torch by ONNX Runtime before it is written."""

import importlib
import json
import re
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch.export import ExportedProgram
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..atomic import atomic_file
from .program import INPUT, Exported, NamedOutputs, compare, metadata, trace


# what torch's exporter is written for, and the first with a GELU
OPSET = 20
# a file of protocol buffers holds 2 GiB
MAX_BYTES_INSIDE = 1_800_000_000
STACK_TRACE = "pkg.torch.onnx.stack_trace"


def require_onnx() -> ModuleType:
    """ONNX Runtime. Raises `ValueError` where it, or what torch's exporter needs, is not installed."""
    try:
        for package in ("onnx", "onnxscript"):
            importlib.import_module(package)
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install hf-vitreg[onnx]") from error


def data_file(path: Path) -> Path:
    """Where the weights of a large ONNX file are; it names them so."""
    return path.with_name(f"{path.name}.data")


def export_onnx(
    model: PreTrainedModel, path: str | Path, image_processor: BaseImageProcessor | None = None
) -> Exported:
    """Writes a model as an ONNX file, with the input `pixel_values` and the outputs of `NamedOutputs` by their names.

    Batch size, height and width are free. Height and width have to be multiples of the patch size: a file does not
    refuse others, and leaves out the pixels that fill no patch. `metadata` is in its `metadata_props`, each value as
    JSON. Weights of more than 1.8 GB are beside it, in a file of the same name with `.data` at the end.

    Args:
        model: As `NamedOutputs` takes it.
        path: The file, replaced where there is one. It is there whole or not at all.
        image_processor: Of the model, for the metadata.

    Raises:
        ValueError: where the packages of the extra `onnx` are not installed, or where ONNX Runtime, on two sizes not
            seen at the export, differs from the model by more than 1e-4 of the largest value of an output; nothing is
            written then.
    """
    runtime = require_onnx()
    # where it is, not what points there: the data lie beside it
    path, named = Path(path).resolve(), NamedOutputs(model)
    program = _onnx_program(trace(named))
    for name, value in metadata(named, image_processor).items():
        program.model.metadata_props[name] = json.dumps(value, ensure_ascii=False)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in named.state_dict().values())
    data = data_file(path)
    # A file of its final name, because it names its data. The other takes its place at once, or vanishes.
    with atomic_file(path) as partial, tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        program.save(written, external_data=num_bytes > MAX_BYTES_INSIDE)
        exported = _compare(runtime, written, named, path)
        # never new data under an old file, nor old data beside a new one
        if data.exists() or data_file(written).exists():
            path.unlink(missing_ok=True)
            data.unlink(missing_ok=True)
        if data_file(written).exists():
            data_file(written).rename(data)
        written.replace(partial)
    return exported


def _onnx_program(program: ExportedProgram) -> torch.onnx.ONNXProgram:
    names = list(program.call_spec.out_spec.context)
    converted = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=names, verbose=False
    )
    _name_dimensions(converted)
    for node in converted.model.graph:
        # where the code lies on this machine
        node.metadata_props.pop(STACK_TRACE, None)
    return converted


def _name_dimensions(program: torch.onnx.ONNXProgram) -> None:
    """Calls free dimensions by their names, `rows*cols + 5`, which torch numbers: `s30*s68 + 5`."""
    from onnx_ir import Shape

    graph = program.model.graph
    batch, _, height, width = (str(dimension) for dimension in graph.inputs[0].shape)
    sizes = {height: "height", width: "width"}
    symbols = {
        re.search(r"s\d+", size)[0]: side for size, side in zip((batch, height, width), ("batch", "rows", "cols"))
    }

    def name(dimension):
        if isinstance(dimension, int) or dimension.value is None or dimension.value in sizes:
            return dimension if isinstance(dimension, int) else sizes.get(dimension.value)
        return re.sub(r"s\d+", lambda found: symbols.get(found[0], found[0]), dimension.value)

    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = Shape([name(dimension) for dimension in value.shape])


def _compare(runtime: ModuleType, file: Path, named: NamedOutputs, path: Path) -> Exported:
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = session.run(None, {INPUT: pixel_values.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs)}

    return compare(run, named, path, "ONNX Runtime")
