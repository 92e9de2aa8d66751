# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Quantized models do nearly what the models do. Most are not compiled here: their graphs run as torch runs them."""

import copy
import functools
import sys

import pytest
import torch
from reference import HEIGHT, PATCH_SIZE, VARIANTS, WIDTH, images, randomize, tiny_config
from torch._dynamo.utils import counters
from torch.nn.functional import cosine_similarity, gelu

from hf_vitreg import ViTRegForImageClassification, ViTRegForSemanticSegmentation, ViTRegModel
from hf_vitreg.deployment import quantize
from hf_vitreg.deployment.agreement import agreement, outputs_of
from hf_vitreg.deployment.folding import fold
from hf_vitreg.deployment.optimize import CompiledForward
from hf_vitreg.deployment.quantize import (
    Int8Linear,
    PolynomialGELU,
    check_gpu,
    num_steps,
    quantize_by_torchao,
)


SIZES = [(HEIGHT, WIDTH), (5 * PATCH_SIZE, 2 * PATCH_SIZE), (4 * PATCH_SIZE, 4 * PATCH_SIZE)]
CASES = {
    "default": {},
    "swiglu": {"use_swiglu_ffn": True},
    "without_bias": {"use_swiglu_ffn": True, "mlp_bias": False, "qkv_bias": False, "proj_bias": False},
    "rope": VARIANTS["rope"],
    "quick_gelu": VARIANTS["projected"],
    "register_neurons": {"num_test_time_registers": 2, "register_neurons": {1: [3, 5]}},
    "odd_sizes": {"hidden_size": 39, "intermediate_size": 53},
}


@pytest.fixture
def traced(monkeypatch):
    """Layers are traced and guarded as ever, and the graphs are not compiled."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(CompiledForward, "_can_compile", True)  # which takes no C++ compiler here
    yield counters["stats"]
    torch._dynamo.reset()


@pytest.fixture
def untraced(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, **kwargs: forward)


def make(model_class=ViTRegModel, **overrides):
    return randomize(model_class(tiny_config(**{"num_hidden_layers": 2, **overrides})))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_close(case, dtype, untraced):
    model = make(**CASES[case])
    quantized = quantize(model, dtype)
    for size in SIZES:
        pixel_values = images(*size)
        found = agreement(outputs_of(quantized, pixel_values), outputs_of(model, pixel_values))
        assert found.suffices(torch.int8), found


@torch.no_grad()
def test_registers_have_their_name(untraced):
    model, pixel_values = make(), images()
    actual, expected = quantize(model, torch.float32)(pixel_values), model(pixel_values)
    assert list(actual) == list(expected)
    assert actual.register_tokens.shape == expected.register_tokens.shape
    assert cosine_similarity(actual.register_tokens, expected.register_tokens, dim=-1).min() > 0.999
    assert cosine_similarity(actual.register_tokens, actual.patch_tokens[:, :1], dim=-1).max() < 0.9


@pytest.mark.parametrize("norm", [30, 300, 3000])
def test_tokens_of_high_norm_cost_the_others_nothing(norm, untraced):
    model = make()
    with torch.no_grad():
        model.embeddings.position_embeddings[0, 3] += norm * torch.nn.functional.normalize(torch.randn(48), dim=0)
    pixel_values = images()
    found = agreement(outputs_of(quantize(model), pixel_values), outputs_of(model, pixel_values))
    assert found.suffices(torch.int8), found


@torch.no_grad()
def test_weights_have_a_scale_for_every_channel(untraced):
    """As LayerScale makes them, which is folded into them."""
    linear = torch.nn.Linear(64, 31)
    linear.weight *= torch.logspace(-6, 3, 31)[:, None]
    linear.bias *= torch.logspace(-6, 3, 31)
    hidden_states = torch.randn(3, 7, 64)
    actual, expected = Int8Linear(linear)(hidden_states), linear(hidden_states)
    assert actual.shape == expected.shape
    errors = (actual - expected).flatten(0, 1).norm(dim=0) / expected.flatten(0, 1).norm(dim=0)
    assert errors.max() < 0.02


@torch.no_grad()
def test_a_product_is_exact_where_8_bits_hold_it():
    linear = torch.nn.Linear(5, 3)
    linear.weight.copy_(torch.tensor([[127.0, 0, 1, -5, 7], [0, 0, 0, 0, 0], [-254, 2, 4, -6, 8]]))
    hidden_states = torch.tensor([[3.0, 258.0, 4.0, 77.0, 200.0], [4.0, 4.0, 4.0, 4.0, 4.0]])
    torch.testing.assert_close(Int8Linear(linear)(hidden_states), linear(hidden_states))


def test_without_vnni_products_do_not_overflow():
    assert num_steps(["avx2", "avx512f", "avx512_vnni"]) == num_steps(["avx2", "avx_vnni"]) == 255
    assert num_steps(["asimddp", "i8mm"]) == 255
    assert 2 * num_steps(["avx2", "avx512f"]) * 127 < 2**15


def test_gelu_is_close():
    values = torch.cat([torch.linspace(-20, 20, 100_001), torch.tensor([-1e4, 1e4])])
    assert ((PolynomialGELU()(values) - gelu(values)).abs() < 6e-5 + 3e-6 * values.abs()).all()


@torch.no_grad()
def test_one_compilation_serves_all_sizes(traced):
    model = make()
    quantized = quantize(model, example=images())
    for batch_size in (2, 3):
        for size in SIZES:
            pixel_values = images(*size, batch_size=batch_size)
            assert quantized(pixel_values).last_hidden_state.shape == model(pixel_values).last_hidden_state.shape
    assert traced["unique_graphs"] == 1


@torch.no_grad()
def test_what_else_is_asked_for_is_given(untraced):
    model, pixel_values = make(), images()
    quantized = quantize(model)
    expected = model(pixel_values, output_hidden_states=True, output_attentions=True)
    actual = quantized(pixel_values, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert len(actual[name]) == len(expected[name])
        for one, other in zip(actual[name], expected[name]):
            assert cosine_similarity(one.float(), other, dim=-1).min() > 0.99
    maps = quantized.get_attention_maps(pixel_values, -1, "all")
    assert cosine_similarity(maps.float(), expected.attentions[-1], dim=-1).min() > 0.99


@pytest.mark.parametrize("model_class", [ViTRegForImageClassification, ViTRegForSemanticSegmentation])
def test_heads_are_served(model_class, untraced):
    model, pixel_values = make(model_class, out_indices=[1, 2]), images()
    found = agreement(outputs_of(quantize(model), pixel_values), outputs_of(model, pixel_values))
    assert found.suffices(torch.int8), found


@torch.no_grad()
def test_the_model_is_left_as_it_is_and_copies_work(untraced):
    model, pixel_values = make(), images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = quantize(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    projections = [name for name, module in quantized.named_modules() if isinstance(module, Int8Linear)]
    assert len(projections) == 2 * 4
    assert all(name.startswith("encoder.layer.") for name in projections)
    expected = quantized(pixel_values).last_hidden_state
    del model
    assert torch.equal(copy.deepcopy(quantized)(pixel_values).last_hidden_state, expected)


def test_what_a_quantized_model_cannot_do_is_refused(tmp_path, untraced):
    quantized = quantize(make())
    for call in (quantized.train, lambda: quantized.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="for inference"):
            call()


def test_wrong_arguments_are_named():
    model = make()
    with pytest.raises(ValueError, match="scheme must be among int8, fp8, got 'int4'"):
        quantize(model, scheme="int4")
    with pytest.raises(ValueError, match="A CPU multiplies no fp8"):
        quantize(model, scheme="fp8")
    with pytest.raises(ValueError, match=r"dtype must be .* got torch\.int8"):
        quantize(model, torch.int8)
    with pytest.raises(ValueError, match="this one is on meta"):
        quantize(model.to("meta"))


def test_what_a_gpu_cannot_do_is_named():
    check_gpu((8, 0), torch.float16, "int8")
    check_gpu((9, 0), torch.bfloat16, "fp8")
    with pytest.raises(ValueError, match=r"fp8 needs a GPU of compute capability 8\.9 or later, this one has 8\.6"):
        check_gpu((8, 6), torch.bfloat16, "fp8")
    with pytest.raises(ValueError, match=r"goes with dtype=torch\.bfloat16, got torch\.float32"):
        check_gpu((9, 0), torch.float32, "fp8")
    with pytest.raises(ValueError, match="multiples of 16 in 8 bits"):
        quantize_by_torchao([torch.nn.Sequential(torch.nn.Linear(32, 24))], "int8")


def test_torchao_is_asked_for_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="pip install torchao"):
        quantize_by_torchao([], "int8")


@torch.no_grad()
def test_torchao_quantizes_the_same_projections():
    """On a CPU, where it is not used."""
    model, pixel_values = make(), images()
    folded = fold(model)
    quantize_by_torchao(list(folded.encoder.layer), "int8")
    found = agreement(outputs_of(folded, pixel_values), outputs_of(model, pixel_values))
    assert found.suffices(torch.int8), found
    assert found.relative_error > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("case", ["default", "swiglu", "register_neurons"])
def test_compiled_it_is_as_close(case):
    model = make(**CASES[case])
    quantized = quantize(model, torch.float32, images())
    for size in SIZES:
        pixel_values = images(*size)
        found = agreement(outputs_of(quantized, pixel_values), outputs_of(model, pixel_values))
        assert found.suffices(torch.int8), found
