# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Attention by our kernel is that of the formula, whatever the shape, the dtype and the processor."""

import logging
import shutil

import pytest
import torch

from hf_vitreg.deployment import cpu_attention as module
from hf_vitreg.deployment.cpu_attention import cpu_attention, load_kernel


needs_compiler = pytest.mark.skipif(module.compiler() is None, reason="there is no C++ compiler")
# what a rounding of the output costs, and of what is multiplied
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}
# of no block's size, of one, of more than one; of whole vectors, and of a channel less or more
SHAPES = [(1, 64), (21, 17), (64, 64), (261, 64), (130, 80), (530, 33), (1029, 16)]


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Kernels that are built here are not optimized, which takes the compiler half of the time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "FLAGS", tuple(flag.replace("-O3", "-O0") for flag in module.FLAGS))
    load_kernel.cache_clear()
    yield tmp_path / "hf_vitreg"
    load_kernel.cache_clear()


def inputs(tokens: int, head_dim: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """As they come from one projection: `(2, 3, tokens, head_dim)`, with strides."""
    projected = 2 * torch.randn(2, tokens, 3, 3, head_dim)
    return [each.transpose(1, 2) for each in projected.to(dtype).unbind(2)]


def relative_error(tokens: int, head_dim: int, dtype: torch.dtype) -> float:
    query, key, value = inputs(tokens, head_dim, dtype)
    exact = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    actual = cpu_attention(query, key, value, head_dim**-0.5)
    assert actual.dtype == dtype and actual.is_contiguous()
    return ((actual - exact.transpose(1, 2)).abs().max() / exact.abs().max()).item()


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "head_dim"), SHAPES)
def test_attention_is_that_of_the_formula(tokens, head_dim, dtype):
    assert relative_error(tokens, head_dim, dtype) < TOLERANCE[dtype]


@needs_compiler
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_processors_with_other_vectors_compute_the_same(processor, own_cache, monkeypatch):
    features = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}
    if features[processor] not in module.processor_features():
        pytest.skip(f"this is no {processor}")
    monkeypatch.setattr(module, "FLAGS", [flag.replace("native", processor) for flag in module.FLAGS])
    for dtype, tolerance in TOLERANCE.items():
        assert relative_error(133, 40, dtype) < tolerance


@needs_compiler
def test_several_threads_compute_the_same():
    query, key, value = inputs(261, 64)
    expected = cpu_attention(query, key, value, 0.125)
    torch.set_num_threads(3)
    try:
        actual = cpu_attention(query, key, value, 0.125)
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_large_logits_do_not_overflow_and_what_is_no_number_shows():
    query, key, value = inputs(70, 64)
    expected = torch.nn.functional.scaled_dot_product_attention(query * 1e3, key * 1e3, value).transpose(1, 2)
    torch.testing.assert_close(cpu_attention(query * 1e3, key * 1e3, value, 0.125), expected, rtol=1e-4, atol=1e-4)
    query[0, 1, 5] = torch.nan
    rows_with_nan = cpu_attention(query, key, value, 0.125).isnan().any(-1)
    assert rows_with_nan[0, 5, 1] and rows_with_nan.sum() == 1


@needs_compiler
def test_the_operator_is_one_that_torch_can_compile():
    torch.library.opcheck(cpu_attention, (*inputs(9, 8), 0.3))


@needs_compiler
def test_a_kernel_is_built_once(own_cache, monkeypatch):
    assert load_kernel() is not None
    (built,) = own_cache.iterdir()
    before = built.stat().st_mtime_ns
    load_kernel.cache_clear()
    assert load_kernel() is not None
    assert [path.stat().st_mtime_ns for path in own_cache.iterdir()] == [before]
    load_kernel.cache_clear()
    monkeypatch.setattr(module, "FLAGS", (*module.FLAGS, "-DOTHER"))
    load_kernel()
    assert len(list(own_cache.iterdir())) == 2, "other flags are another kernel"


def test_without_a_compiler_there_is_none(own_cache, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert load_kernel() is None
    assert "no C++ compiler" in caplog.text and "Install g++" in caplog.text


@needs_compiler
def test_what_a_compiler_says_is_told_and_nothing_is_left(own_cache, monkeypatch, caplog):
    monkeypatch.setattr(module, "FLAGS", (*module.FLAGS, "-Dfloat=nonsense"))
    with caplog.at_level(logging.WARNING):
        assert load_kernel() is None
    assert "nonsense" in caplog.text
    assert not list(own_cache.iterdir())
