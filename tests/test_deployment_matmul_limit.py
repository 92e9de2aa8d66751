# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch

from hf_vitreg.deployment import matmul_limit as module
from hf_vitreg.deployment.matmul_limit import fastest_product, matmul_limit


CPU = torch.device("cpu")
SHAPE = (29, 48, 17)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(module, "CPU_SHAPES", (SHAPE,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@torch.no_grad()
def test_libraries_compute_one_product(dtype, tolerance):
    products = {library: multiply() for library, multiply in module._libraries(CPU, dtype, SHAPE)}
    expected = products["torch's default"]
    assert expected.shape == (29, 17) and expected.dtype == dtype
    for library, product in products.items():
        error = (product.float() - expected.float()).norm() / expected.float().norm()
        assert product.dtype == dtype and error < tolerance, library


def test_integers_are_summed_in_32_bits():
    [(library, multiply)] = module._libraries(CPU, torch.int8, SHAPE)
    assert library == "torch._int_mm" and multiply().shape == (29, 17) and multiply().dtype == torch.int32


def test_limit_is_the_highest_rate(monkeypatch):
    monkeypatch.setattr(module, "CPU_SHAPES", (SHAPE, (58, 48, 17)))
    monkeypatch.setattr(module, "_median_seconds", lambda multiply, device: 1.0)
    fastest = fastest_product(CPU, torch.int8)
    assert (fastest.shape, fastest.flops) == ((58, 48, 17), 2 * 58 * 48 * 17)
    assert matmul_limit(CPU, torch.int8) == 2 * 58 * 48 * 17
    assert str(fastest) == "torch._int_mm, 58x48x17"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_measuring_changes_nothing(dtype):
    before = torch.get_float32_matmul_precision()
    assert matmul_limit(CPU, dtype) > 0
    assert torch.get_float32_matmul_precision() == before and torch.is_grad_enabled()


def test_other_types_are_refused():
    with pytest.raises(ValueError, match=r"torch.int8 or floating point, as torch.bfloat16, got torch.int64"):
        matmul_limit(CPU, torch.int64)
