# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A folded model computes what the model computes, with fewer steps."""

import dual_encoders
import pytest
import torch
from reference import HEIGHT, PATCH_SIZE, VARIANTS, WIDTH, images, randomize, relative_error, tiny_config
from transformers import ViTConfig, ViTModel

from hf_vitreg import (
    ViTRegBackbone,
    ViTRegForDepthEstimation,
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)
from hf_vitreg.deployment import folding
from hf_vitreg.deployment.folding import fold


SIZES = [(HEIGHT, WIDTH), (5 * PATCH_SIZE, 2 * PATCH_SIZE)]
CASES = {
    **VARIANTS,
    "default": {},
    "swiglu": {"use_swiglu_ffn": True},
    "swiglu_without_bias": {"use_swiglu_ffn": True, "mlp_bias": False},
    "without_registers": {"num_register_tokens": 0, "interpolate_offset": 0.1},
    "test_time": {"num_test_time_registers": 2, "register_neurons": {1: [3, 5]}},
    "test_time_swiglu": {"num_test_time_registers": 2, "register_neurons": {1: [3, 5]}, "use_swiglu_ffn": True},
}


def make(model_class=ViTRegModel, **overrides):
    # four, which some layouts of classifiers read
    return randomize(model_class(tiny_config(num_hidden_layers=4, **overrides)))


def tensors(output) -> list[torch.Tensor]:
    """One or several, without those that hold nothing."""
    return [tensor for tensor in (output if isinstance(output, tuple) else [output]) if tensor.numel()]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_all_outputs_are_those_of_the_model(case):
    model = make(**CASES[case])
    folded = fold(model)
    for height, width in SIZES:
        pixel_values = images(height, width)
        expected, actual = (
            each(pixel_values, output_hidden_states=True, output_attentions=True) for each in (model, folded)
        )
        assert list(actual) == list(expected)
        for name in expected:
            for one, other in zip(tensors(actual[name]), tensors(expected[name])):
                assert relative_error(one, other) < 1e-5, name


@pytest.mark.parametrize(
    "model_class",
    [ViTRegForImageClassification, ViTRegForSemanticSegmentation, ViTRegForDepthEstimation, ViTRegBackbone],
)
@torch.no_grad()
def test_heads_read_the_same(model_class):
    model = make(model_class, out_indices=[1, 2])
    pixel_values = images()
    actual, expected = fold(model)(pixel_values)[0], model(pixel_values)[0]
    for one, other in zip(tensors(actual), tensors(expected)):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("case", ["default", "rope", "normed_queries"])
def test_attention_maps_are_the_same(case):
    model, pixel_values = make(**CASES[case]), images()
    for queries in ("cls", "all"):
        expected = model.get_attention_maps(pixel_values, layer=-1, queries=queries)
        assert relative_error(fold(model).get_attention_maps(pixel_values, -1, queries), expected) < 1e-5


def test_there_is_less_to_compute():
    parameters = dict(fold(make()).named_parameters())
    assert not [name for name in parameters if "lambda1" in name or ".q_proj." in name]
    assert parameters["encoder.layer.0.attention.qkv_proj.weight"].shape == (3 * 48, 48)
    assert not any(parameter.requires_grad for parameter in parameters.values())


def test_the_model_is_left_as_it_is():
    model = make().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold(model, torch.bfloat16)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_positions_are_computed_once_for_every_size(monkeypatch):
    folded, calls = fold(make()), []
    interpolate = torch.nn.functional.interpolate
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda *args, **kwargs: calls.append(0) or interpolate(*args, **kwargs)
    )
    first = folded(images(*SIZES[1]))
    for _ in range(3):
        folded(images(*SIZES[1]))
    assert len(calls) == 1
    monkeypatch.setattr(folding, "MAX_SIZES", 1)
    folded(images(3 * PATCH_SIZE, 5 * PATCH_SIZE))
    assert len(folded.embeddings._by_size) == 1, "the sizes that are kept are bounded"
    assert first.last_hidden_state.isfinite().all()


def test_rotations_keep_their_periods_in_another_dtype():
    model = make(**VARIANTS["rope"])
    folded = fold(model, torch.bfloat16)
    assert torch.equal(folded.encoder.rotary_embeddings.periods, model.encoder.rotary_embeddings.periods)
    assert folded.dtype == torch.bfloat16


@torch.no_grad()
def test_half_precision_is_as_close_as_the_model_in_it():
    model, pixel_values = make(), images()
    expected = model(pixel_values).last_hidden_state
    folded = fold(model, torch.bfloat16)(pixel_values.bfloat16()).last_hidden_state
    assert torch.nn.functional.cosine_similarity(folded.float(), expected, dim=-1).min() > 0.999


@torch.no_grad()
def test_a_model_around_a_vitreg_is_folded_too():
    model = randomize(dual_encoders.objective().exportable())
    pixel_values = images(dual_encoders.HEIGHT, dual_encoders.WIDTH)
    expected, actual = (each.get_image_features(pixel_values).pooler_output for each in (model, fold(model)))
    assert relative_error(actual, expected) < 1e-5


def test_a_model_without_vitreg_is_refused():
    config = ViTConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    with pytest.raises(ValueError, match="no ViTReg in this ViTModel"):
        fold(ViTModel(config))


def test_what_is_folded_is_not_folded_again():
    with pytest.raises(ValueError, match="optimized already: give the model that it was made from"):
        fold(fold(make()))
