# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What models are exported as: their outputs by name, and a program of torch that needs none of their code."""

import subprocess
import sys

import dual_encoders
import pytest
import torch
from reference import (
    HEIGHT,
    NUM_REGISTERS,
    PATCH_SIZE,
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
from hf_vitreg.deployment import program
from hf_vitreg.deployment.export import export_model
from hf_vitreg.deployment.program import NamedOutputs, compare, export_program, metadata, trace


TOKENS = ["last_hidden_state", "pooler_output", "register_tokens", "patch_tokens"]
TOKENS_OF_DENSE = ["last_hidden_state", "register_tokens", "patch_tokens"]


def make(model_class=ViTRegModel, **overrides):
    return randomize(model_class(tiny_config(**{"num_hidden_layers": 2, **overrides})))


@pytest.mark.parametrize(
    ("model_class", "values", "names"),
    [
        (ViTRegModel, {}, TOKENS),
        (ViTRegModel, {"num_register_tokens": 0}, ["last_hidden_state", "pooler_output", "patch_tokens"]),
        (ViTRegModel, VARIANTS["projected"], [*TOKENS, "image_embeds"]),
        (ViTRegModel, VARIANTS["mean"], TOKENS),
        (ViTRegForImageClassification, {}, ["logits", *TOKENS]),
        (ViTRegForSemanticSegmentation, {}, ["logits", *TOKENS_OF_DENSE]),
        (ViTRegForDepthEstimation, {}, ["predicted_depth", *TOKENS_OF_DENSE]),
        (
            ViTRegBackbone,
            {"out_indices": [1, 2]},
            [f"{name}_stage{idx}" for name in ("feature_maps", "cls_tokens", "register_tokens") for idx in (1, 2)],
        ),
        (
            ViTRegBackbone,
            {**VARIANTS["mean"], "num_register_tokens": 0, "out_indices": [2]},
            ["feature_maps_stage2"],
        ),
    ],
)
def test_outputs_are_those_of_the_model_and_tokens_of_what_is_below_a_head(model_class, values, names):
    model, pixel_values = make(model_class, **values), images()
    # what a config may ask for is of every layer, or without names
    model.config.output_hidden_states, model.config.return_dict = True, False
    actual = NamedOutputs(model)(pixel_values)
    assert list(actual) == names
    expected = model(pixel_values, return_dict=True, output_hidden_states=False)
    base = model.base_model(pixel_values, return_dict=True)
    for name, tensor in actual.items():
        if model_class is ViTRegBackbone:
            continue
        assert relative_error(tensor, expected.get(name, base.get(name))) < 1e-6, name
    assert model.config.output_hidden_states is True, "the model itself stays as it was"


def test_backbone_names_its_stages():
    model, pixel_values = make(ViTRegBackbone, out_indices=[1, 2]), images()
    actual, expected = NamedOutputs(model)(pixel_values), model(pixel_values, return_prefix_tokens=True)
    for name in ("feature_maps", "cls_tokens", "register_tokens"):
        for stage, tensor in zip(("stage1", "stage2"), expected[name], strict=True):
            assert relative_error(actual[f"{name}_{stage}"], tensor) < 1e-6


def test_half_precision_and_training_are_exported_as_float32_for_use():
    model = make().to(torch.bfloat16).train()
    output = NamedOutputs(model)(images())
    assert {tensor.dtype for tensor in output.values()} == {torch.float32}
    assert model.training and model.dtype == torch.bfloat16


def test_of_a_dual_encoder_it_is_the_image_half():
    model = randomize(dual_encoders.objective().exportable())
    pixel_values = images(dual_encoders.HEIGHT, dual_encoders.WIDTH)
    output = NamedOutputs(model)(pixel_values)
    assert list(output) == [*TOKENS, "image_embeds"]
    expected = model.get_image_features(pixel_values)
    assert relative_error(output["image_embeds"], expected.pooler_output) < 1e-6


def test_metadata_are_what_no_program_says():
    processor = BitImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    names = {"num_labels": 2, "id2label": {0: "Amsel", 1: "Kohlmeise"}}
    classifier = NamedOutputs(make(ViTRegForImageClassification, **names))
    assert metadata(classifier, processor) == {
        "image_size": [HEIGHT, WIDTH],
        "patch_size": PATCH_SIZE,
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
        "class_names": ["Amsel", "Kohlmeise"],
    }
    plain = metadata(classifier, BitImageProcessor(do_normalize=False))
    assert (plain["image_mean"], plain["image_std"]) == ([0.0] * 3, [1.0] * 3)
    assert sorted(metadata(NamedOutputs(make()))) == ["image_size", "patch_size"]


# runs where nothing but torch is
ELSEWHERE = """
import json, sys
for name in ("hf_vitreg", "transformers", "onnx", "onnxruntime"):
    sys.modules[name] = None
import torch
extra = {"metadata.json": ""}
module = torch.export.load(sys.argv[1], extra_files=extra).module()
assert json.loads(extra["metadata.json"])["patch_size"] == 7
torch.save([module(pixel_values) for pixel_values in torch.load(sys.argv[2])], sys.argv[3])
"""


@torch.no_grad()
def test_program_needs_no_code_and_serves_every_size(tmp_path):
    model = make(ViTRegForImageClassification)
    done = export_model(model, tmp_path / "model.pt2")
    assert done.difference < 1e-5 and done.outputs == ("logits", *TOKENS)
    batches = [images(*size, batch_size=1 + index) for index, size in enumerate(((HEIGHT, WIDTH), (14, 63), (70, 35)))]
    torch.save(batches, tmp_path / "images.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "images.pt", "outputs.pt")]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *files], check=True, timeout=300)
    for pixel_values, actual in zip(batches, torch.load(tmp_path / "outputs.pt"), strict=True):
        assert relative_error(actual["logits"], model(pixel_values).logits) < 1e-5
        assert actual["register_tokens"].shape[1] == NUM_REGISTERS


def test_program_that_is_not_the_model_is_not_written(tmp_path, monkeypatch):
    model, other = NamedOutputs(make()), NamedOutputs(make(use_swiglu_ffn=True))
    monkeypatch.setattr(program, "trace", lambda named: traced)
    traced = trace(other)
    with pytest.raises(ValueError, match="Nothing was written: the exported program and torch differ by"):
        export_program(model.model, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
    pixel_values, module = images(23, 52), traced.module()
    for name, tensor in module(pixel_values).items():
        assert torch.equal(tensor, module(pixel_values[:, :, :21, :49])[name]), "what fills no patch is left out"


@pytest.mark.parametrize("spoil", ["number", "shape", "nan", "name"])
def test_comparison_sees_every_difference(tmp_path, spoil):
    model = NamedOutputs(make())

    def run(pixel_values):
        outputs = {name: tensor.clone() for name, tensor in model(pixel_values).items()}
        if pixel_values.shape[0] == 1:
            return outputs
        tokens = outputs.pop("patch_tokens")
        tokens[0, 0, 0] += {"number": 2e-4 * tokens.abs().max(), "nan": float("nan")}.get(spoil, 0)
        tokens = tokens[:, 1:] if spoil == "shape" else tokens
        return {**outputs, "patches" if spoil == "name" else "patch_tokens": tokens}

    with pytest.raises(ValueError, match="the copy"):
        compare(run, model, tmp_path / "copy", "the copy")


def test_what_has_no_form_for_every_size_is_refused(tmp_path):
    model = make(interpolate_offset=0.1, interpolate_antialias=True)
    with pytest.raises(ValueError, match="Set interpolate_offset=0"):
        export_program(model, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
