# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Optimized models do what the models do. Most are not compiled here: their graphs run as torch runs them."""

import copy
import functools

import dual_encoders
import pytest
import torch
from reference import HEIGHT, PATCH_SIZE, VARIANTS, WIDTH, images, randomize, relative_error, tiny_config
from torch._dynamo.utils import counters

from hf_vitreg import ViTRegBackbone, ViTRegForImageClassification, ViTRegForSemanticSegmentation, ViTRegModel
from hf_vitreg.deployment import cpu_attention, optimize
from hf_vitreg.deployment.optimize import CompiledForward, fastest_dtype


SIZES = [(HEIGHT, WIDTH), (5 * PATCH_SIZE, 2 * PATCH_SIZE), (4 * PATCH_SIZE, 4 * PATCH_SIZE)]


@pytest.fixture
def traced(monkeypatch):
    """Layers are traced and guarded as ever, and the graphs are not compiled."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(CompiledForward, "_can_compile", True)  # which takes no C++ compiler here
    yield counters["stats"]
    torch._dynamo.reset()


def make(model_class=ViTRegModel, **overrides):
    return randomize(model_class(tiny_config(**{"num_hidden_layers": 2, **overrides})))


@torch.no_grad()
def test_one_compilation_serves_all_sizes(traced):
    model = make()
    optimized = optimize(model, example=images(*SIZES[0]))
    assert traced["unique_graphs"] == 1
    for batch_size in (2, 3):
        for size in SIZES:
            pixel_values = images(*size, batch_size=batch_size)
            actual, expected = optimized(pixel_values), model(pixel_values)
            assert list(actual) == list(expected)
            for name, tensor in expected.items():
                assert relative_error(actual[name], tensor) < 1e-5, name
    assert traced["unique_graphs"] == 1


@pytest.mark.parametrize("variant", ["rope", "normed_queries"])
@torch.no_grad()
def test_families_are_traced_whole(variant, traced):
    model, pixel_values = make(**VARIANTS[variant]), images()
    actual = optimize(model)(pixel_values)
    assert relative_error(actual.last_hidden_state, model(pixel_values).last_hidden_state) < 1e-5
    assert traced["unique_graphs"] == 1


@pytest.mark.parametrize("model_class", [ViTRegForImageClassification, ViTRegForSemanticSegmentation, ViTRegBackbone])
@torch.no_grad()
def test_heads_that_read_hidden_states_are_served(model_class, traced):
    model, pixel_values = make(model_class, out_indices=[1, 2]), images()
    actual, expected = (each(pixel_values)[0] for each in (optimize(model), model))
    for one, other in zip(*(each if isinstance(each, tuple) else (each,) for each in (actual, expected))):
        assert relative_error(one, other) < 1e-5


@torch.no_grad()
def test_what_else_is_asked_for_is_given(traced):
    model, pixel_values = make(), images()
    optimized = optimize(model)
    expected = model(pixel_values, output_hidden_states=True, output_attentions=True)
    actual = optimized(pixel_values, output_hidden_states=True, output_attentions=True)
    for name in ("hidden_states", "attentions"):
        assert len(actual[name]) == len(expected[name])
        for one, other in zip(actual[name], expected[name]):
            assert relative_error(one, other) < 1e-5
    assert relative_error(optimized.get_attention_maps(pixel_values, -1), expected.attentions[-1][:, :, :1]) < 1e-5
    assert optimized(pixel_values).hidden_states is None


@torch.no_grad()
def test_texts_beside_images_keep_their_masks(traced):
    model = randomize(dual_encoders.objective().exportable())
    batch = dual_encoders.batch()
    optimized = optimize(model, example=batch["pixel_values"])
    expected, actual = model(**batch), optimized(**batch)
    for name in ("text_embeds", "image_embeds", "logits_per_image"):
        assert relative_error(actual[name], expected[name]) < 1e-5, name
    assert optimized.text_model.config._attn_implementation == model.text_model.config._attn_implementation


def test_no_setting_is_left_changed(traced):
    from torch._inductor import config

    settings = torch.get_float32_matmul_precision(), config.freezing, torch.is_grad_enabled()
    model = make()
    implementation = model.config._attn_implementation
    optimize(model, torch.bfloat16, images())
    assert (torch.get_float32_matmul_precision(), config.freezing, torch.is_grad_enabled()) == settings
    assert model.config._attn_implementation == implementation


@torch.no_grad()
def test_models_of_two_dtypes_work_side_by_side(traced):
    model, pixel_values = make(), images()
    exact, rounded = optimize(model), optimize(model, torch.bfloat16)
    expected = model(pixel_values).last_hidden_state
    for _ in range(2):
        assert relative_error(exact(pixel_values).last_hidden_state, expected) < 1e-5
        half = rounded(pixel_values.bfloat16()).last_hidden_state
        assert torch.nn.functional.cosine_similarity(half.float(), expected, dim=-1).min() > 0.999


@torch.no_grad()
def test_without_a_compiler_it_is_folded_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(cpu_attention, "compiler", lambda: None)
    monkeypatch.setattr(cpu_attention, "load_kernel", lambda: None)
    model, pixel_values = make(), images()
    optimized = optimize(model, example=pixel_values)
    assert "not compiled" in caplog.text
    assert relative_error(optimized(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state) < 1e-5


def test_what_an_optimized_model_cannot_do_is_refused(tmp_path, traced):
    optimized = optimize(make())
    for name, call in {
        "train": lambda: optimized.train(),
        "save_pretrained": lambda: optimized.save_pretrained(tmp_path),
        "load_state_dict": lambda: optimized.load_state_dict({}),
    }.items():
        with pytest.raises(ValueError, match=f"call {name} of the original"):
            call()
    assert not optimized.eval().training
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16", "fast"])
def test_a_dtype_that_is_none_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be a floating point type"):
        optimize(make(), dtype)


def test_the_fastest_dtype_is_that_of_the_processor(monkeypatch):
    module = __import__("hf_vitreg.deployment.optimize", fromlist=["optimize"])
    for features, dtype in (["avx2"], torch.float32), (["avx2", "avx512_bf16"], torch.bfloat16):
        monkeypatch.setattr(module, "processor_features", lambda features=features: features)
        assert fastest_dtype(torch.device("cpu")) == dtype


@pytest.mark.slow
@pytest.mark.parametrize("case", [{}, {"use_swiglu_ffn": True}, VARIANTS["rope"]], ids=["gelu", "swiglu", "rope"])
@torch.no_grad()
def test_compiled_models_are_exact(case):
    model = make(**case)
    for dtype, tolerance in (torch.float32, 1e-5), (torch.bfloat16, 5e-2):
        optimized = optimize(model, dtype)
        for size in SIZES:
            pixel_values = images(*size)
            actual = optimized(pixel_values.to(dtype)).last_hidden_state.float()
            assert relative_error(actual, model(pixel_values).last_hidden_state) < tolerance
    copied = copy.deepcopy(optimized)
    assert torch.equal(copied(pixel_values.to(dtype)).last_hidden_state.float(), actual)
