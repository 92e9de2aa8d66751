# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What test-time registers do to a model whose register neurons are known."""

import pytest
import torch
from planted import MANY_COLS, MANY_ROWS, NUM_LAYERS, REGISTER_NEURONS, patchy_image, planted_neurons
from reference import VARIANTS, images, randomize, relative_error, tiny_config
from transformers import Dinov2Config, Dinov2Model

from hf_vitreg import ViTRegBackbone, ViTRegForImageClassification, ViTRegForSemanticSegmentation, ViTRegModel
from hf_vitreg.features import VisionEncoder
from hf_vitreg.registers.test_time import with_test_time_registers
from hf_vitreg.registers.warm_start import add_registers


NEURONS = {3: [100], 1: [11, 40, 7]}
NUM_IMAGES, THRESHOLD = 10, 30.0
FIRST = min(REGISTER_NEURONS)
PLANTED = {
    "default": {},
    "rope": {"position_embedding_type": "rope"},
    "swiglu": {"use_swiglu_ffn": True},
    "trained registers": {"num_registers": 3},
    "two with trained ones and positions": {"num_registers": 3, "position_embedding_type": "prefix_patches"},
}


def tiny(model_class=ViTRegModel, **overrides):
    return randomize(model_class(tiny_config(**overrides)))


@pytest.fixture(scope="module")
def photos():
    return [patchy_image(index, MANY_ROWS, MANY_COLS)[0] for index in range(NUM_IMAGES)]


def neurons_of(kind: str) -> dict[int, list[int]]:
    """Rotary models have no places that position embeddings could mark."""
    return {1: REGISTER_NEURONS[1]} if kind == "rope" else REGISTER_NEURONS


# The planted phenomenon


@pytest.mark.parametrize("reduce", ["neuron", "layer"])
@pytest.mark.parametrize("kind", PLANTED)
def test_outliers_move_to_the_new_register(photos, kind, reduce):
    encoder, number = planted_neurons(**PLANTED[kind]), 2 if "two" in kind else 1
    model = with_test_time_registers(encoder.model, neurons_of(kind), number, reduce)
    shifted, pixel_values = VisionEncoder.wrap(model), encoder.preprocess(photos)
    layers = range(NUM_LAYERS)
    before, after = encoder.layers(pixel_values, layers), shifted.layers(pixel_values, layers)
    norms, norms_after = (each[-1].norm(dim=-1) for each in (list(before.values()), list(after.values())))
    outliers = norms[:, encoder.patch_slice] > THRESHOLD
    assert outliers.float().mean() > 0.01
    assert (norms_after[:, shifted.patch_slice] > THRESHOLD).sum() <= 0.05 * outliers.sum()
    new = norms_after[:, shifted.register_slice][:, -number:]
    assert (new > 0.95 * norms.amax(1, keepdim=True)).all()
    # a token more is all that the layers before the first neuron see
    for layer in range(FIRST):
        clean, clean_after = (
            each.split(tokens[layer]).patches[~outliers] for each, tokens in ((encoder, before), (shifted, after))
        )
        assert ((clean_after - clean).norm(dim=-1) / clean.norm(dim=-1)).max() < 1e-4
    alone = torch.cat([shifted.layers(image[None], [-1])[-1] for image in pixel_values])
    assert relative_error(after[NUM_LAYERS - 1], alone) < 1e-5


# The copy


@pytest.mark.parametrize("variant", ["default", *VARIANTS])
def test_the_copy_is_the_model_that_its_config_makes(variant, tmp_path):
    model = tiny(**VARIANTS.get(variant, {}))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    more = with_test_time_registers(model, NEURONS, 2, "layer")
    assert (more.config.num_register_tokens, more.config.num_test_time_registers) == (7, 2)
    assert more.config.register_neurons == NEURONS and more.config.register_neuron_reduce == "layer"
    more.save_pretrained(tmp_path)
    loaded = ViTRegModel.from_pretrained(tmp_path)
    with torch.no_grad():
        pixel_values = images()
        assert torch.equal(loaded(pixel_values).last_hidden_state, more(pixel_values).last_hidden_state)
    # the model itself is as it was
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.config.num_test_time_registers == 0 and model.config.register_neurons is None
    assert all(layer.mlp.shift is None for layer in model.encoder.layer)


@pytest.mark.parametrize(
    "model_class", [ViTRegModel, ViTRegForImageClassification, ViTRegForSemanticSegmentation, ViTRegBackbone]
)
def test_any_head_reads_the_shifted_tokens(model_class):
    model, pixel_values = tiny(model_class), images()
    more = with_test_time_registers(model, NEURONS)
    before, after = (
        part[0] if isinstance(part, tuple) else part for part in (model(pixel_values)[0], more(pixel_values)[0])
    )
    if model_class is ViTRegModel:
        before, after = model(pixel_values).patch_tokens, more(pixel_values).patch_tokens
    assert before.shape == after.shape and relative_error(after, before) > 1e-3


def test_weights_are_copied_or_shared():
    model = tiny()
    for copy_weights in (True, False):
        more = with_test_time_registers(model, NEURONS, copy_weights=copy_weights)
        pairs = zip(model.parameters(), more.parameters(), strict=True)
        assert all((one is other) != copy_weights for one, other in pairs)


def test_the_copy_is_of_the_same_dtype_and_learns():
    more = with_test_time_registers(tiny().to(torch.bfloat16), NEURONS)
    tokens = more(images()).last_hidden_state
    assert tokens.dtype == torch.bfloat16
    tokens.square().mean().backward()
    assert more.encoder.layer[1].mlp.fc1.weight.grad[NEURONS[1]].any()


# What makes no sense


def test_registers_are_not_given_twice():
    more = with_test_time_registers(tiny(), NEURONS)
    with pytest.raises(ValueError, match="has 1 test-time registers already"):
        with_test_time_registers(more, NEURONS)
    bare = with_test_time_registers(tiny(num_register_tokens=0), NEURONS)
    with pytest.raises(ValueError, match="has 1 registers already"):
        add_registers(bare, 4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((NEURONS, 0), "1 or more test-time registers, got 0"),
        (({},), "do not go together"),
        (({1: [192]},), "of layer 1 are 0 to 191.*got 192"),
        (({5: [1]},), "layers 0 to 4.*got 5"),
        ((NEURONS, 1, "image"), "reduce must be"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        with_test_time_registers(tiny(), *arguments)


def test_other_models_are_told_what_is_for_them():
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 35, "patch_size": 7}
    with pytest.raises(ValueError, match="Dinov2Model is no ViTReg"):
        with_test_time_registers(Dinov2Model(Dinov2Config(**sizes)), NEURONS)
