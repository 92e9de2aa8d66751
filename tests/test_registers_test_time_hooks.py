# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Models of transformers and timm with attached registers compute what ViTReg does with its own."""

import copy

import pytest
import timm
import torch
from reference import (
    dinov2_state_dict,
    randomize,
    relative_error,
    transformers_dinov3_state_dict,
    transformers_state_dict,
)
from test_features import FAMILIES, TIMM, make, resized
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.registers.test_time import with_test_time_registers
from hf_vitreg.registers.test_time_hooks import attach_test_time_registers


NEURONS = {0: [3, 50, 17], 2: [9]}
NATIVE, OTHER, TOLERANCE = (35, 35), (42, 63), 1e-5
SIZES = {"hidden_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 7, "image_size": 35}
THEIRS = [name for name in FAMILIES if not name.startswith("vitreg") and name != "timm parallel"]


def ours(**overrides) -> ViTRegModel:
    return randomize(ViTRegModel(ViTRegConfig(**{**SIZES, "num_register_tokens": 3, **overrides})))


def dinov2(model):
    theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3))
    return loaded(theirs, transformers_state_dict(model.state_dict()))


def dinov2_swiglu(model):
    theirs = Dinov2Model(Dinov2Config(**SIZES, use_swiglu_ffn=True))
    return loaded(theirs, transformers_state_dict(model.state_dict()))


def dinov3(model):
    config = DINOv3ViTConfig(**SIZES, intermediate_size=160, num_register_tokens=3, rope_theta=100.0)
    return loaded(DINOv3ViTModel(config), transformers_dinov3_state_dict(model.state_dict()))


def timm_dinov2(model):
    sizes = {"embed_dim": 40, "depth": 3, "num_heads": 2, "img_size": 35, "reg_tokens": 3, "num_classes": 0}
    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", **sizes, patch_size=7, dynamic_img_size=True)
    return loaded(theirs, checkpoint_filter_fn(dinov2_state_dict(model.state_dict()), theirs))


def loaded(theirs, weights):
    if "embeddings.mask_token" in theirs.state_dict():
        weights = {"embeddings.mask_token": torch.zeros(1, 40), **weights}
    else:
        weights.pop("mask_token", None)
    theirs.load_state_dict(weights)
    return theirs.eval()


# beside each, the same model of ours
TWINS = {
    "transformers dinov2": (dinov2, {}),
    "transformers swiglu": (
        dinov2_swiglu,
        {"num_register_tokens": 0, "use_swiglu_ffn": True, "interpolate_antialias": False},
    ),
    "transformers dinov3": (
        dinov3,
        {"position_embedding_type": "rope", "key_bias": False, "layer_norm_eps": 1e-5, "use_mask_token": True},
    ),
    "timm dinov2": (timm_dinov2, {"use_mask_token": True}),
}


def tokens_of(model, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(model, VisionTransformer):
            return model.forward_features(pixel_values)
        return model(pixel_values).last_hidden_state


# Equality


@pytest.mark.parametrize("reduce", ["neuron", "layer"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("twin", TWINS)
def test_attached_registers_are_those_of_vitreg(twin, number, reduce):
    build, values = TWINS[twin]
    model = ours(**values)
    theirs, more = build(model), with_test_time_registers(model, NEURONS, number, reduce)
    for size in (NATIVE, OTHER):
        pixel_values = torch.randn(2, 3, *size)
        before = tokens_of(theirs, pixel_values)
        with torch.no_grad():
            expected = more(pixel_values, output_hidden_states=True)
        new = more.config.register_slice.stop - number, more.config.register_slice.stop
        with attach_test_time_registers(theirs, NEURONS, number, reduce) as attached:
            actual = tokens_of(theirs, pixel_values)
            registers = attached.register_tokens
        rest = torch.cat([expected.last_hidden_state[:, : new[0]], expected.last_hidden_state[:, new[1] :]], dim=1)
        # transformers' DINOv2 without registers interpolates in another way
        if size == NATIVE or "swiglu" not in twin:
            assert relative_error(actual, rest) < TOLERANCE
            assert relative_error(registers, expected.hidden_states[-1][:, new[0] : new[1]]) < TOLERANCE
        assert relative_error(actual, before) > 1e-3
        assert torch.equal(tokens_of(theirs, pixel_values), before)


@torch.no_grad()
def test_timm_rotates_patches_alone():
    """With neurons that are never active, an attached register is a register of zeros."""
    sizes = {"embed_dim": 40, "depth": 3, "num_heads": 2, "img_size": 35, "patch_size": 7, "num_classes": 0}
    rotary = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_type": "dinov3", "dynamic_img_size": True}
    more = randomize(Eva(**sizes, **rotary, num_reg_tokens=4))
    more.reg_token[:, 3] = 0
    more.blocks[1].mlp.fc1.weight[7], more.blocks[1].mlp.fc1.bias[7] = 0, 0
    model = Eva(**sizes, **rotary, num_reg_tokens=3).eval()
    model.load_state_dict({**more.state_dict(), "reg_token": more.reg_token[:, :3]})
    for size in (NATIVE, OTHER):
        pixel_values = torch.randn(2, 3, *size)
        expected = more.forward_features(pixel_values)
        with attach_test_time_registers(model, {1: [7]}):
            actual = model.forward_features(pixel_values)
        assert relative_error(actual, torch.cat([expected[:, :4], expected[:, 5:]], dim=1)) < TOLERANCE


# Every family


@pytest.mark.parametrize("family", THEIRS)
@torch.no_grad()
def test_whoever_looks_finds_the_tokens_that_were_there_before(family):
    encoder = make(family)
    pixel_values = torch.randn(3, 3, *NATIVE)
    before = encoder.layers(pixel_values, range(encoder.num_layers))
    with attach_test_time_registers(encoder.model, NEURONS, 2) as attached:
        after = encoder.layers(pixel_values, range(encoder.num_layers))
        assert attached.register_tokens.shape == (3, 2, encoder.hidden_size)
        alone = torch.cat([encoder.layers(image[None], [-1])[-1] for image in pixel_values])
        if family in TIMM:
            outputs = encoder.model.forward_intermediates(pixel_values, return_prefix_tokens=True)[1]
            assert all(each[0].shape[1:] == (encoder.hidden_size, 5, 5) for each in outputs)
        else:
            outputs = encoder.model(pixel_values, output_hidden_states=True, **resized(encoder))
            shapes = {states.shape for states in outputs.hidden_states}
            assert shapes == {outputs.last_hidden_state.shape} == {before[0].shape}
            assert torch.equal(outputs.hidden_states[-1], after[encoder.num_layers - 1])
    for index, tokens in after.items():
        assert tokens.shape == before[index].shape and not torch.equal(tokens, before[index])
    assert relative_error(after[encoder.num_layers - 1], alone) < TOLERANCE
    again = encoder.layers(pixel_values, range(encoder.num_layers))
    assert all(torch.equal(again[index], tokens) for index, tokens in before.items())


@pytest.mark.parametrize("family", ["dinov2", "dinov3_vit", "clip_vision_model", "timm", "timm pre-norm", "timm eva"])
@torch.no_grad()
def test_new_registers_are_zeros_before_the_norm_before_the_first_layer(family):
    encoder, seen = make(family), []
    pixel_values = torch.randn(2, 3, *NATIVE)
    inner = next(
        each for name, each in encoder.blocks[0].named_modules() if name.startswith("norm") or "norm1" in name
    )
    with attach_test_time_registers(encoder.model, NEURONS, 2):
        inner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        encoder.layers(pixel_values, [0])
    new = seen[0][:, encoder.num_prefix_tokens : encoder.num_prefix_tokens + 2]
    if family in ("clip_vision_model", "timm pre-norm"):
        norm = encoder.model.pre_layrnorm if family == "clip_vision_model" else encoder.model.norm_pre
        assert norm.bias.any() and torch.equal(new, norm.bias.expand(2, 2, -1))
    else:
        assert not new.any()


# In use


def test_a_head_reads_the_shifted_tokens():
    model = randomize(Dinov2ForImageClassification(Dinov2Config(**SIZES, num_labels=5)))
    pixel_values = torch.randn(2, 3, *NATIVE)
    with torch.no_grad():
        before = model(pixel_values).logits
        attached = attach_test_time_registers(model, NEURONS)
        after = model(pixel_values).logits
        attached.remove()
        attached.remove()
        assert torch.equal(model(pixel_values).logits, before)
    assert relative_error(after, before) > 1e-3


@torch.no_grad()
def test_a_copy_is_a_model_of_its_own():
    model, pixel_values = make("dinov2").model, torch.randn(2, 3, *NATIVE)
    with attach_test_time_registers(model, NEURONS):
        expected = tokens_of(model, pixel_values)
        other = copy.deepcopy(model)
        randomize(model, seed=1)
        assert torch.equal(tokens_of(other, pixel_values), expected)


def test_gradients_flow_through_attached_registers():
    model = make("dinov2").model
    with attach_test_time_registers(model, NEURONS):
        model(torch.randn(2, 3, *NATIVE)).last_hidden_state.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


def test_layers_that_are_run_again_are_refused():
    model = make("timm").model.train()
    attached = attach_test_time_registers(model, NEURONS)
    model.train().set_grad_checkpointing()
    tokens = model.forward_features(torch.randn(2, 3, *NATIVE))
    with pytest.raises(RuntimeError, match="without gradient checkpointing"):
        tokens.sum().backward()
    attached.remove()


def test_what_was_put_on_top_is_removed_first():
    encoder = make("dinov2")
    attached = attach_test_time_registers(encoder.model, NEURONS)
    forward = encoder.blocks[1].forward
    encoder.blocks[1].forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(RuntimeError, match="Something else was put around the layers"):
        attached.remove()
    encoder.blocks[1].forward = forward
    attached.remove()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (({},), "There are no neurons to shift"),
        (({3: [1]},), "has layers 0 to 2, got neurons of layer 3"),
        (({0: [160]},), "Neurons of layer 0 .* must be different ones of 0 to 159"),
        (({0: [1, 1]},), "must be different ones"),
        ((NEURONS, 0), "1 or more test-time registers, got 0"),
        ((NEURONS, 1, "image"), "reduce must be"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        attach_test_time_registers(make("dinov2").model, *arguments)


def test_registers_are_not_attached_twice_or_to_a_vitreg():
    encoder = make("dinov2")
    with attach_test_time_registers(encoder.model, NEURONS), pytest.raises(ValueError, match="attached already"):
        attach_test_time_registers(encoder.model, NEURONS)
    with pytest.raises(ValueError, match=r"is a ViTReg.*with_test_time_registers"):
        attach_test_time_registers(ours(), NEURONS)
