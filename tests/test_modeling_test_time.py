# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Test-time registers as a part of the model, against the published formula written out for one image."""

import json

import pytest
import torch
from reference import HEIGHT, ROPE, TINY, VARIANTS, WIDTH, images, randomize, relative_error, tiny_config
from test_auto_classes import run_without_hf_vitreg
from torch.export import Dim

from hf_vitreg import ViTRegBackbone, ViTRegConfig, ViTRegForImageClassification, ViTRegModel
from hf_vitreg.modeling_vitreg import ViTRegNeuronShift
from hf_vitreg.objectives.packing import forward_crops, prepare_for_crops


NEURONS = {1: [11, 40, 7], 3: [100]}
NUM_NEW = 2
SHIFTED = {"num_test_time_registers": NUM_NEW, "register_neurons": NEURONS}
# 5 registers, of which these are the last 2
TOTAL = TINY["num_register_tokens"]
SWIGLU = {"use_swiglu_ffn": True}
OPEN_CLIP = {
    "use_pre_layernorm": True,
    "patch_bias": False,
    "layerscale_value": None,
    "layer_norm_eps": 1e-5,
    "classifier_layout": "pooled",
}
# shapes of DINOv2-S/14 and OpenCLIP-B/16 in all but the number of layers
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "patch_size": 14, "image_size": (70, 98)}
BASE = {**OPEN_CLIP, "hidden_size": 768, "num_attention_heads": 12, "patch_size": 16, "image_size": (64, 80)}


def make(model_class=ViTRegModel, **overrides):
    return randomize(model_class(tiny_config(**{**SHIFTED, **overrides})))


def without(model: ViTRegModel) -> ViTRegModel:
    """The same weights without test-time registers."""
    values = {"num_test_time_registers": 0, "register_neurons": None}
    number = model.config.num_register_tokens - model.config.num_test_time_registers
    plain = ViTRegModel(ViTRegConfig(**{**model.config.to_dict(), **values, "num_register_tokens": number})).eval()
    plain.load_state_dict(model.state_dict())
    return plain


@torch.no_grad()
def published(model: ViTRegModel, image: torch.Tensor, neurons, num_registers: int, reduce: str) -> torch.Tensor:
    """What the paper and its code do to a model without registers, for one image, the new tokens at its end.

    The tokens after the last layer, `(1 + num_patches + num_registers, hidden_size)`.
    """
    tokens = []
    pre_norm, model.embeddings.pre_layernorm = model.embeddings.pre_layernorm, torch.nn.Identity()
    tokens = model.embeddings(image[None])[0]
    model.embeddings.pre_layernorm = pre_norm
    tokens = pre_norm(torch.cat([tokens, torch.zeros(num_registers, tokens.shape[1])]))
    for index, layer in enumerate(model.encoder.layer):
        tokens = tokens + scaled(layer.residual1, attention(layer.attention, layer.norm1(tokens)))
        mlp, normed = layer.mlp, layer.norm2(tokens)
        if model.config.use_swiglu_ffn:
            hidden, last = torch.nn.functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed), mlp.down_proj
        else:
            hidden, last = mlp.activation_fn(mlp.fc1(normed)), mlp.fc2
        chosen = neurons.get(index, [])
        values = {neuron: signed_maximum(hidden[:, neuron].tolist()) for neuron in chosen}
        if reduce == "layer" and chosen:
            values = dict.fromkeys(chosen, signed_maximum(list(values.values())))
        for neuron, value in values.items():
            hidden[1:-num_registers, neuron] = 0
            hidden[-num_registers:, neuron] = value
        tokens = tokens + scaled(layer.residual2, last(hidden))
    return tokens


def signed_maximum(values: list[float]) -> float:
    return max(values) if abs(max(values)) > abs(min(values)) else min(values)


def scaled(residual, branch: torch.Tensor) -> torch.Tensor:
    return branch if residual.lambda1 is None else residual.lambda1 * branch


def attention(module, tokens: torch.Tensor) -> torch.Tensor:
    heads = []
    width = module.head_dim
    query, key, value = module.q_proj(tokens), module.k_proj(tokens), module.v_proj(tokens)
    for start in range(0, query.shape[1], width):
        part = slice(start, start + width)
        heads.append((query[:, part] @ key[:, part].T / width**0.5).softmax(dim=-1) @ value[:, part])
    return module.o_proj(torch.cat(heads, dim=1))


def in_our_order(tokens: torch.Tensor, num_registers: int) -> torch.Tensor:
    return torch.cat([tokens[:1], tokens[-num_registers:], tokens[1:-num_registers]])


@torch.no_grad()
def last_layer(model: ViTRegModel, pixel_values: torch.Tensor) -> torch.Tensor:
    return model(pixel_values, output_hidden_states=True).hidden_states[-1]


# The formula


@pytest.mark.parametrize("reduce", ["neuron", "layer"])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("values", [{}, SWIGLU, OPEN_CLIP, SMALL, BASE], ids=["tiny", "swiglu", "clip", "S", "B"])
def test_shift_is_the_published_one_image_by_image(values, number, reduce):
    model = make(
        **{"num_hidden_layers": 4, **values},
        num_register_tokens=number,
        num_test_time_registers=number,
        register_neuron_reduce=reduce,
    )
    height, width = model.config.image_size
    pixel_values = torch.randn(3, 3, height, width)
    actual = last_layer(model, pixel_values)
    for image, tokens in zip(pixel_values, actual):
        expected = in_our_order(published(without(model), image, NEURONS, number, reduce), number)
        assert relative_error(tokens, expected) < 1e-5


@pytest.mark.parametrize("reduce", ["neuron", "layer"])
def test_tokens_before_the_new_registers_keep_their_activations(reduce):
    shift = ViTRegNeuronShift([1, 3], num_kept=4, num_registers=2, reduce=reduce)
    activations = torch.randn(3, 11, 5)
    activations[1, 2, 1], activations[2, 9, 3] = -9, 7
    for may_overwrite in (False, True):
        given = activations.clone()
        shifted = shift(given, may_overwrite)
        assert (shifted is given) == may_overwrite
        assert torch.equal(shifted[:, :4], activations[:, :4])
        assert torch.equal(shifted[:, 4:, [0, 2, 4]], activations[:, 4:, [0, 2, 4]])
        assert not shifted[:, 6:, [1, 3]].any()
        assert torch.equal(shifted[:, 4, [1, 3]], shifted[:, 5, [1, 3]])
        # of the two neurons each has its own number in one variant, and one for both in the other
        assert shifted[1, 4, 1] == -9 and shifted[2, 4, 3] == 7
        assert (shifted[1, 4, 3] == -9) == (shifted[2, 4, 1] == 7) == (reduce == "layer")


def test_of_equal_magnitudes_the_negative_one_is_shifted():
    """As in the published code."""
    shift = ViTRegNeuronShift([0], num_kept=1, num_registers=1, reduce="neuron")
    assert shift(torch.tensor([[[0.5], [0.0], [2.0], [-2.0]]]))[0, :, 0].tolist() == [0.5, -2.0, 0.0, 0.0]


@pytest.mark.parametrize("variant", ["default", "swiglu", *VARIANTS])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_a_batch_is_its_images_in_every_attention_implementation(variant, implementation):
    values = SWIGLU if variant == "swiglu" else VARIANTS.get(variant, {})
    model, pixel_values = make(**values), images(batch_size=3)
    model.set_attn_implementation("eager")
    alone = torch.cat([model(image[None]).last_hidden_state for image in pixel_values])
    model.set_attn_implementation(implementation)
    assert relative_error(model(pixel_values).last_hidden_state, alone) < 1e-5


# Tokens


@pytest.mark.parametrize("variant", ["default", *VARIANTS])
def test_new_registers_are_zeros_behind_the_trained_ones(variant):
    model = make(**VARIANTS.get(variant, {}))
    config, plain = model.config, without(model)
    assert config.num_prefix_positions == plain.config.num_prefix_positions
    assert config.num_prefix_tokens == plain.config.num_prefix_tokens + NUM_NEW
    assert model.embeddings.register_tokens.shape[1] == TOTAL - NUM_NEW
    assert model.state_dict().keys() == plain.state_dict().keys()
    tokens, before = model.embeddings(images()), plain.embeddings(images())
    new = slice(config.num_prefix_tokens - NUM_NEW, config.num_prefix_tokens)
    zeros = torch.zeros(2, NUM_NEW, config.hidden_size)
    # what is normed before the first layer is the bias of this norm
    assert torch.equal(tokens[:, new], model.embeddings.pre_layernorm(zeros))
    torch.manual_seed(1)
    pixel_values = images()
    rest = torch.cat(
        [model.embeddings(pixel_values)[:, : new.start], model.embeddings(pixel_values)[:, new.stop :]], 1
    )
    assert torch.equal(rest, plain.embeddings(pixel_values)) and before.shape == rest.shape


def test_a_model_may_have_no_other_registers():
    model = make(num_register_tokens=NUM_NEW, position_embedding_type="prefix_patches")
    assert model.embeddings.register_tokens is None and model.config.num_prefix_positions == 1
    assert model(images()).register_tokens.shape[1] == NUM_NEW


def test_outputs_name_the_new_registers_with_the_others():
    outputs = make()(images())
    assert outputs.register_tokens.shape[1] == TOTAL and outputs.patch_tokens.shape[1] == 21
    backbone = make(ViTRegBackbone, return_prefix_tokens=True)(images())
    assert backbone.feature_maps[0].shape[-2:] == (3, 7) and backbone.register_tokens[0].shape[1] == TOTAL


def test_other_layers_have_nothing_of_it():
    model = make()
    assert [layer.mlp.shift is not None for layer in model.encoder.layer] == [False, True, False, True, False]


# Gradients


@pytest.mark.parametrize("values", [{}, SWIGLU, {"hidden_act": "relu"}, {"hidden_act": "linear"}])
def test_inference_that_reuses_memory_equals_training_mode_arithmetic(values):
    model, pixel_values = make(**values), images()
    kept = []
    model.encoder.layer[1].norm2.register_forward_hook(lambda module, args, output: kept.append(output))
    with_gradients = model(pixel_values).last_hidden_state
    with torch.no_grad():
        assert torch.equal(model(pixel_values).last_hidden_state, with_gradients)
    # of tanh, say, the output is kept for the backward pass, and must not be overwritten
    with_gradients.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


@pytest.mark.parametrize("name", ["fc1", "activation_fn"])
def test_inference_leaves_what_a_hook_keeps_alone(name):
    model, kept = make(hidden_act="linear" if name == "fc1" else "gelu"), []
    mlp = model.encoder.layer[1].mlp
    getattr(mlp, name).register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    with torch.no_grad():
        model(images())
    assert torch.equal(*kept[0])


def test_gradients_are_those_of_the_formula():
    shift = ViTRegNeuronShift([1, 3], num_kept=2, num_registers=1, reduce="neuron").double()
    activations = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(shift, activations)


# Saving and loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_class", [ViTRegModel, ViTRegForImageClassification, ViTRegBackbone])
def test_saved_and_loaded_model_shifts_the_same(tmp_path, model_class, dtype):
    model = make(model_class, register_neuron_reduce="layer").to(dtype)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["register_neurons"] == {"1": [11, 40, 7], "3": [100]}
    loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.config.register_neurons == NEURONS and loaded.dtype == dtype
    shifts = [module.neurons for module in loaded.modules() if isinstance(module, ViTRegNeuronShift)]
    assert [neurons.tolist() for neurons in shifts] == [[11, 40, 7], [100]]
    pixel_values = images()
    with torch.no_grad():
        actual, expected = (
            part[0][0] if isinstance(part[0], tuple) else part[0]
            for part in (loaded(pixel_values), model(pixel_values))
        )
    assert torch.equal(actual, expected)


def test_a_model_made_on_the_meta_device_knows_its_neurons(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = ViTRegModel(model.config)
    loaded = ViTRegModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert empty.encoder.layer[1].mlp.shift.neurons.is_meta
    assert loaded.encoder.layer[1].mlp.shift.neurons.tolist() == NEURONS[1]
    moved = loaded.to(torch.float16).encoder.layer[1].mlp.shift.neurons
    assert moved.dtype == torch.int64


REMOTE = """
    import sys, warnings

    sys.modules["hf_vitreg"] = None
    warnings.simplefilter("error")
    import torch
    from transformers import AutoModel

    home = sys.argv[1]
    model = AutoModel.from_pretrained(f"{home}/model", trust_remote_code=True)
    with torch.no_grad():
        torch.save(model(torch.load(f"{home}/images.pt")).last_hidden_state, f"{home}/tokens.pt")
"""


def test_it_is_remote_code_where_hf_vitreg_is_absent(tmp_path):
    model, pixel_values = make(), images()
    model.save_pretrained(tmp_path / "model")
    torch.save(pixel_values, tmp_path / "images.pt")
    run_without_hf_vitreg(REMOTE, tmp_path, str(tmp_path))
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state
    assert relative_error(torch.load(tmp_path / "tokens.pt"), expected) < 1e-5


# Compilation and export


@pytest.mark.parametrize(
    "values", [pytest.param({}, marks=pytest.mark.slow), {**ROPE, **SWIGLU, "register_neuron_reduce": "layer"}]
)
@torch.no_grad()
@pytest.mark.slow
def test_compiled_model_equals_eager(values):
    torch.compiler.reset()
    model = make(num_hidden_layers=4, **values)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((28, 42), (63, 70), (49, 21)):
        pixel_values = images(*size)
        assert relative_error(compiled(pixel_values)[0], model(pixel_values)[0]) < 1e-5


@pytest.mark.slow
def test_compiled_training_step_has_the_gradients_of_an_eager_one():
    torch.compiler.reset()
    model, pixel_values = make(num_hidden_layers=4).train(), images()
    gradients = []
    for step in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        step(pixel_values).last_hidden_state.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.encoder.parameters()])
    assert all(relative_error(*pair) < 1e-4 for pair in zip(*gradients))


@pytest.mark.parametrize("values", [{}, {**ROPE, **SWIGLU}])
@torch.no_grad()
def test_exported_model_serves_every_size_and_batch(values):
    model = make(num_hidden_layers=4, **values)
    dynamic = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(model, (images(28, 42),), dynamic_shapes=(dynamic,)).module()
    for size, batch_size in (((HEIGHT, WIDTH), 3), ((63, 35), 2), ((14, 56), 5)):
        pixel_values = images(*size, batch_size=batch_size)
        assert relative_error(program(pixel_values)[0], model(pixel_values)[0]) < 1e-5


# Training by crops


def test_crops_that_are_whole_are_what_the_model_makes_of_them():
    model, crops = make().train(), [images(), images(14, 28, batch_size=3)]
    expected = [model(pixel_values).last_hidden_state for pixel_values in crops]
    prepare_for_crops(model, pack_crops=False)
    torch.testing.assert_close(forward_crops(model, crops, [None, None]), expected, rtol=1e-5, atol=1e-5)


def test_packed_crops_are_refused_before_they_are_made():
    with pytest.raises(ValueError, match="train without --pack_crops"):
        prepare_for_crops(make(), pack_crops=True)


def test_tokens_picked_in_a_layer_with_register_neurons_are_refused():
    model = make(register_neurons={4: [3]}).train()
    prepare_for_crops(model)
    with pytest.raises(ValueError, match=r"need all tokens of an image together.*got \(\d+, 192\)"):
        forward_crops(model, [images()], [None], [torch.tensor([0, 27])])
