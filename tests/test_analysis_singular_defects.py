# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Directions by the weights alone: of models that are linear, of planted ones, and against the published procedure."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted import NEURON, PLANTED_LAYER, neuron, planted_encoder
from reference import VARIANTS, randomize, relative_error, tiny_config
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from hf_vitreg import ViTRegModel
from hf_vitreg.analysis.singular_defects import (
    attention_map,
    gated_gaussian_fit,
    gaussian_fit,
    mlp_map,
    singular_defects,
)
from hf_vitreg.features import VisionEncoder


def encoder_of(**overrides) -> VisionEncoder:
    return VisionEncoder.wrap(randomize(ViTRegModel(tiny_config(**overrides))))


def linear(out_features, in_features, seed=0, std=1.0, bias=True):
    torch.manual_seed(seed)
    layer = nn.Linear(in_features, out_features, bias=bias)
    layer.weight.data = std * torch.randn(out_features, in_features) / in_features**0.5
    if bias:
        layer.bias.data = torch.randn(out_features)
    return layer


def drawn_fit(hidden, in_features, number, seed=0):
    """As the published code: normal inputs, and torch's least squares."""
    inputs = torch.randn(number, in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return torch.linalg.lstsq(inputs, hidden(inputs)).solution.T


def naive_layer(layer, fit):
    """Matrix by matrix, `fit` being the linear map in the place of all before the MLP's last one."""
    size = layer.norm1.weight.numel()
    eye = torch.eye(size, dtype=torch.float64)
    centre = eye - torch.ones(size, size, dtype=torch.float64) / size
    down = layer.mlp.down_proj if hasattr(layer.mlp, "down_proj") else layer.mlp.fc2
    branches = [
        (
            layer.residual1,
            layer.attention.o_proj.weight.double() @ layer.attention.v_proj.weight.double(),
            layer.norm1,
        ),
        (layer.residual2, down.weight.double() @ fit, layer.norm2),
    ]
    product = eye
    for residual, branch, norm in branches:
        scale = eye if residual.lambda1 is None else torch.diag(residual.lambda1.double())
        product = (eye + scale @ branch @ torch.diag(norm.weight.double()) @ centre) @ product
    return product


# The maps of one layer


@pytest.mark.parametrize("overrides", [{}, {"layerscale_value": None}, {"mlp_bias": False}])
def test_linear_mlp_and_attention_to_oneself_are_the_layer_without_its_biases(overrides):
    encoder = encoder_of(hidden_act="linear", num_hidden_layers=1, **overrides)
    layer = encoder.model.encoder.layer[0].double()
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    attended, mapped = attention_map(layer), mlp_map(layer)

    def scaled(norm, tokens):
        # LayerNorm does not divide tokens that have a variance of 1
        return torch.cat([norm(token[None] / token.std(correction=0)) * token.std(correction=0) for token in tokens])

    tokens = torch.randn(7, 48, dtype=torch.float64)
    with torch.no_grad():
        # a token that is alone attends to itself
        branch = torch.cat([layer.attention(token[None, None])[0][0] for token in scaled(layer.norm1, tokens)])
        assert relative_error(tokens @ attended.T, layer.residual1(tokens[None], branch[None])[0]) < 1e-4
        branch = layer.mlp(scaled(layer.norm2, tokens))
        assert relative_error(tokens @ mapped.T, layer.residual2(tokens[None], branch[None])[0]) < 1e-4


def test_units_that_are_linear_are_fitted_exactly():
    up, gate = linear(31, 13), linear(31, 13, seed=1)
    assert relative_error(gaussian_fit(nn.Identity(), up), up.weight.double()) < 1e-12
    # (a + g.x) (b + u.x): the square in x has no linear part
    expected = gate.bias[:, None].double() * up.weight + up.bias[:, None].double() * gate.weight
    assert relative_error(gated_gaussian_fit(nn.Identity(), gate, up), expected) < 1e-12


@pytest.mark.parametrize("std", [0.01, 1.0, 10.0])
def test_fit_of_gelu_is_the_integral_in_closed_form(std):
    up = linear(31, 13, std=std)
    weight, bias = up.weight.double(), up.bias.double()
    width = (1 + weight.square().sum(1)).sqrt()
    normal = torch.distributions.Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64))
    slope = normal.cdf(bias / width) + normal.log_prob(bias / width).exp() * bias / width**3
    assert relative_error(gaussian_fit(nn.functional.gelu, up), weight * slope[:, None]) < 1e-12


def test_fit_of_relu_is_how_often_it_fires():
    up = linear(31, 13)
    slope = torch.special.ndtr(up.bias.double() / up.weight.double().norm(dim=1))
    assert relative_error(gaussian_fit(torch.relu, up), up.weight * slope[:, None]) < 1e-4


@pytest.mark.parametrize("is_gated", [False, True])
def test_fit_is_what_drawn_inputs_come_to(is_gated):
    up, gate = linear(31, 13, bias=not is_gated).double(), linear(31, 13, seed=1, std=2.0).double()
    fitted = gated_gaussian_fit(nn.functional.silu, gate, up) if is_gated else gaussian_fit(nn.functional.gelu, up)

    def hidden(inputs):
        return nn.functional.silu(gate(inputs)) * up(inputs) if is_gated else nn.functional.gelu(up(inputs))

    few, many = ((drawn_fit(hidden, 13, number) - fitted).norm() / fitted.norm() for number in (2_000, 128_000))
    # an error of chance: an eighth with 64 times as many
    assert many < 0.03 and 4 < few / many < 16


def test_unit_without_weights_is_no_trouble():
    up = linear(31, 13)
    up.weight.data[4] = 0
    fitted = gaussian_fit(nn.functional.gelu, up)
    assert fitted.isfinite().all() and (fitted[4] == 0).all()


# All layers


@pytest.mark.parametrize("variant", [None, "rope_untied", "distilled", "projected", "normed_queries", "attended"])
@torch.no_grad()
def test_directions_are_those_of_the_whole_decomposition(variant):
    encoder = encoder_of(**{} if variant is None else VARIANTS[variant])
    defects, product = singular_defects(encoder), torch.eye(48, dtype=torch.float64)
    for index, layer in enumerate(encoder.model.encoder.layer):
        mlp = layer.mlp
        if hasattr(mlp, "gate_proj"):
            fit = gated_gaussian_fit(nn.functional.silu, mlp.gate_proj, mlp.up_proj)
        else:
            fit = gaussian_fit(mlp.activation_fn, mlp.fc1)
        product = naive_layer(layer, fit) @ product
        left, values, _ = torch.linalg.svd(product)
        assert abs(left[:, 0] @ defects.directions[index]) > 1 - 1e-10
        np.testing.assert_allclose(defects.log10_singular_values[index], values[:2].log10(), atol=1e-10)
        assert defects.dominance[index].item() == pytest.approx((values[0] / values[1]).item(), rel=1e-9)
    assert (defects.directions.norm(dim=1) - 1).abs().max() < 1e-12
    largest = defects.directions.abs().argmax(1, keepdim=True)
    assert (defects.directions.gather(1, largest) > 0).all()
    np.testing.assert_allclose(defects.cosines(-1), (defects.directions @ defects.directions[-1]).abs(), atol=1e-12)


@pytest.mark.parametrize("use_swiglu_ffn", [False, True])
@torch.no_grad()
def test_directions_are_those_of_the_published_procedure(use_swiglu_ffn):
    """But for the chance in its draws."""
    encoder = encoder_of(use_swiglu_ffn=use_swiglu_ffn, num_hidden_layers=3, hidden_size=12)
    defects, product = singular_defects(encoder), torch.eye(12, dtype=torch.float64)
    for index, layer in enumerate(encoder.model.double().encoder.layer):
        mlp = layer.mlp

        def hidden(inputs, mlp=mlp):
            if use_swiglu_ffn:
                return nn.functional.silu(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
            return nn.functional.gelu(mlp.fc1(inputs))

        product = naive_layer(layer, drawn_fit(hidden, 12, 40_000, seed=index)) @ product
        left, values, _ = torch.linalg.svd(product)
        assert abs(left[:, 0] @ defects.directions[index]) > 0.99
        assert defects.dominance[index].item() == pytest.approx((values[0] / values[1]).item(), rel=0.05)


@torch.no_grad()
def test_direction_that_values_write_is_found():
    encoder = encoder_of()
    attention, written = encoder.model.encoder.layer[2].attention, nn.functional.normalize(torch.randn(48), dim=0)
    attention.o_proj.weight += 2000 * torch.outer(written, nn.functional.normalize(torch.randn(48), dim=0))
    residual = encoder.model.encoder.layer[2].residual1.lambda1
    # the MLP of this layer is between what attention writes and the layer's end
    expected = nn.functional.normalize(mlp_map(encoder.model.encoder.layer[2]) @ (residual * written).double(), dim=0)
    defects = singular_defects(encoder)
    assert abs(defects.directions[2] @ expected) > 0.9999 and defects.dominance[2] > 100
    assert abs(defects.directions[1] @ expected) < 0.9


@pytest.mark.parametrize("overrides", [{}, {"use_swiglu_ffn": True}])
def test_direction_that_a_neuron_writes_is_found_in_its_layer(overrides):
    encoder = encoder_of(**overrides)
    mlp = encoder.model.encoder.layer[PLANTED_LAYER - 1].mlp
    down = mlp.down_proj if overrides else mlp.fc2
    down.weight.data[:, NEURON] *= 1000
    scale = encoder.model.encoder.layer[PLANTED_LAYER - 1].residual2.lambda1
    written = nn.functional.normalize((scale * down.weight[:, NEURON]).double(), dim=0)
    defects = singular_defects(encoder)
    assert abs(defects.directions[PLANTED_LAYER - 1] @ written) > 0.99
    assert defects.dominance[PLANTED_LAYER - 1] > 10 > defects.dominance[PLANTED_LAYER - 2]


def test_neuron_that_no_draw_would_show_is_seen():
    """It fires for one input in 30 million, and the integral has these."""
    encoder = planted_encoder(1e10)
    written = neuron(encoder.model)[1].weight[:, NEURON].double()
    direction = singular_defects(encoder).directions[PLANTED_LAYER - 1]
    assert abs(direction @ written) / written.norm() > 0.99


@torch.no_grad()
def test_register_neurons_write_nothing_to_patches():
    layer, without = (encoder_of().model.encoder.layer[0] for _ in range(2))
    layer.mlp.shift = SimpleNamespace(neurons=torch.tensor([2, 7]))
    without.mlp.fc2.weight[:, [2, 7]] = 0
    assert relative_error(mlp_map(layer), mlp_map(without)) < 1e-12


def test_many_layers_do_not_overflow():
    encoder = encoder_of(num_hidden_layers=60)
    for layer in encoder.model.encoder.layer:
        layer.attention.o_proj.weight.data *= 1e7
    defects = singular_defects(encoder)
    assert defects.log10_singular_values[-1].min() > 400 and defects.dominance.isfinite().all()
    assert (defects.dominance >= 1).all()


def test_half_precision_weights_are_taken_as_they_are():
    encoder = encoder_of()
    halved = VisionEncoder.wrap(encoder.model.bfloat16())
    directions = singular_defects(halved).directions
    assert directions.dtype == torch.float64
    np.testing.assert_array_equal(directions, singular_defects(VisionEncoder.wrap(encoder.model.float())).directions)


def test_weights_stay_as_they_were():
    encoder = encoder_of(use_swiglu_ffn=True)
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    singular_defects(encoder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.model.state_dict().items())


# Bad input


def test_other_models_are_to_be_converted_first():
    config = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, patch_size=7, image_size=35)
    with pytest.raises(ValueError, match=r"transformers dinov2; .* Convert it first.*conversion/convert.py"):
        singular_defects(VisionEncoder.wrap(Dinov2Model(config)))


def test_weights_that_are_no_numbers_are_named():
    encoder = encoder_of()
    encoder.model.encoder.layer[1].mlp.fc2.weight.data[3, 5] = math.nan
    with pytest.raises(ValueError, match="weights of layer 2"):
        singular_defects(encoder)
