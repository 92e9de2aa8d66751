# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""ONNX files: what ONNX Runtime makes of them is what torch makes of the model, at every size."""

import json
import sys

import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from reference import (
    HEIGHT,
    NUM_REGISTERS,
    PATCH_SIZE,
    ROPE,
    VARIANTS,
    WIDTH,
    images,
    randomize,
    relative_error,
    tiny_config,
)
from transformers import BitImageProcessor

from hf_vitreg import (
    ViTRegBackbone,
    ViTRegForDepthEstimation,
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)
from hf_vitreg.deployment import onnx as onnx_files
from hf_vitreg.deployment.export import check_output, export_model
from hf_vitreg.deployment.onnx import export_onnx
from hf_vitreg.deployment.program import NamedOutputs


# also the grid of the config, fewer and more patches than it has, and a single one along one side and both
SIZES = [(HEIGHT, WIDTH), (14, 28), (63, 70), (21, 7), (7, 7)]
MEAN, STD = [0.5, 0.25, 0.125], [0.25, 0.5, 0.75]
TOKENS = ["last_hidden_state", "pooler_output", "register_tokens", "patch_tokens"]
TEST_TIME = {"num_test_time_registers": 2, "register_neurons": {0: [3, 11]}}


def make(model_class=ViTRegModel, **overrides):
    return randomize(model_class(tiny_config(**{"num_hidden_layers": 1, **overrides})))


def outputs_of(path, pixel_values):
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"pixel_values": pixel_values.numpy()}))))


def assert_serves_every_size(path, model):
    named = NamedOutputs(model)
    for index, size in enumerate(SIZES):
        pixel_values = images(*size, batch_size=1 + index)
        actual, expected = outputs_of(path, pixel_values), named(pixel_values)
        assert list(actual) == list(expected)
        for name in expected:
            assert relative_error(actual[name], expected[name]) < 1e-5, (name, size)


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    processor = BitImageProcessor(image_mean=MEAN, image_std=STD)
    return export_onnx(model, tmp_path_factory.mktemp("onnx") / "model.onnx", processor)


@pytest.fixture
def converted(exported, monkeypatch):
    """The program is not made again."""
    program = torch.onnx.ONNXProgram(onnx_ir.load(exported.path), None)
    monkeypatch.setattr(onnx_files, "trace", lambda named: None)
    monkeypatch.setattr(onnx_files, "_onnx_program", lambda traced: program)


def test_onnx_runtime_equals_torch_at_every_size(model, exported):
    """DINOv2's position embeddings with antialias, to smaller grids and to larger ones."""
    assert_serves_every_size(exported.path, model)
    expected = model(pixel_values := images(28, 42))
    for name, tensor in outputs_of(exported.path, pixel_values).items():
        assert relative_error(tensor, expected[name]) < 1e-5


def test_dimensions_and_outputs_have_names(exported):
    graph = onnx.load(exported.path).graph
    shapes = {
        value.name: [each.dim_param or each.dim_value for each in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "pixel_values": ["batch", 3, "height", "width"],
        "last_hidden_state": ["batch", f"rows*cols + {1 + NUM_REGISTERS}", 48],
        "pooler_output": ["batch", 48],
        "register_tokens": ["batch", NUM_REGISTERS, 48],
        "patch_tokens": ["batch", "rows*cols", 48],
    }
    assert list(exported.outputs) == TOKENS and len(exported.shapes) == 2 and exported.difference < 1e-5


def test_file_says_what_its_images_are(exported):
    found = {each.key: json.loads(each.value) for each in onnx.load(exported.path).metadata_props}
    expected = {"image_size": [HEIGHT, WIDTH], "patch_size": PATCH_SIZE, "image_mean": MEAN, "image_std": STD}
    assert found == expected
    assert b"program.py" not in exported.path.read_bytes(), "where the code lay"


VARIED = {
    "rope, SwiGLU and test-time registers": (
        ViTRegForImageClassification,
        {**ROPE, **TEST_TIME, "use_swiglu_ffn": True, "rope_normalize_coords": "max"},
    ),
    "without CLS and registers": (
        ViTRegBackbone,
        {**VARIANTS["mean"], "num_register_tokens": 0, "interpolate_offset": 0.1, "interpolate_antialias": False},
    ),
}
SLOW = {name: (ViTRegForImageClassification, {"num_hidden_layers": 4, **values}) for name, values in VARIANTS.items()}
SLOW |= {
    "segmentation": (ViTRegForSemanticSegmentation, {"num_hidden_layers": 4}),
    "depth": (ViTRegForDepthEstimation, {"interpolate_antialias": False, "num_depth_bins": 13}),
    "one number for a layer": (ViTRegModel, {**TEST_TIME, "register_neuron_reduce": "layer"}),
}


@pytest.mark.parametrize(
    ("model_class", "values"),
    [*VARIED.values(), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW.values())],
    ids=[*VARIED, *SLOW],
)
def test_every_model_can_be_exported(tmp_path, model_class, values):
    model = make(model_class, **values)
    export_onnx(model, tmp_path / "model.onnx")
    assert_serves_every_size(tmp_path / "model.onnx", model)


def test_weights_too_large_for_one_file_are_beside_it(model, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "MAX_BYTES_INSIDE", 0)
    path = tmp_path / "new" / "large.onnx"
    export_onnx(model, path)
    assert sorted(each.name for each in path.parent.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert path.stat().st_size < path.with_name("large.onnx.data").stat().st_size
    assert_serves_every_size(path, model)


def test_new_file_has_no_old_data_beside_it(model, converted, tmp_path):
    path = tmp_path / "model.onnx"
    (tmp_path / "model.onnx.data").write_text("of an older one")
    export_onnx(model, path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    assert_serves_every_size(path, model)


def test_file_that_is_not_the_model_is_not_written(model, converted, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("an older one")
    with torch.no_grad():
        other = make()
        # what nothing but the last of the outputs to be compared shows, and not by much
        other.layernorm.weight[3] *= 1.001
    with pytest.raises(ValueError, match=r"Nothing was written: ONNX Runtime and torch differ by \d\.\de-0[34] of"):
        export_onnx(other, path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"] and path.read_text() == "an older one"


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"^{package} is not installed: pip install hf-vitreg\[onnx\]$"):
        check_output(tmp_path / "model.onnx")
    check_output(tmp_path / "model.pt2")


def test_name_of_the_file_chooses(tmp_path):
    for name in ("model", "model.safetensors", "onnx"):
        with pytest.raises(ValueError, match=r"\.onnx for ONNX Runtime.*\.pt2 for a program"):
            export_model(None, tmp_path / name)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "model.pt2"])
def test_file_that_is_there_stays(tmp_path, name):
    (tmp_path / name).write_text("mine")
    path = tmp_path / name.removesuffix(".data")
    with pytest.raises(ValueError, match=rf"There is .*{name} already"):
        export_model(None, path)
    check_output(path, overwrite=True)


def test_folder_is_no_file(tmp_path):
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(ValueError, match="already"):
        check_output(tmp_path / "model.onnx", overwrite=True)
