# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch

from hf_vitreg import matmul
from hf_vitreg.matmul import use_fast_float32_matmul


@pytest.fixture(autouse=True)
def slow_mkl(monkeypatch):
    monkeypatch.setattr(matmul, "_mkl_is_slow", lambda: True)


def test_products_stay_float32():
    use_fast_float32_matmul()
    left, right = torch.randn(333, 97), torch.randn(97, 211)
    exact = left.double() @ right.double()
    assert (left @ right - exact).norm() / exact.norm() < matmul.MAX_RELATIVE_ERROR


def test_less_than_float32_is_not_taken(monkeypatch):
    monkeypatch.setattr(matmul, "_relative_error", lambda: 2e-3)
    assert not use_fast_float32_matmul()
    assert torch.get_float32_matmul_precision() == "highest"


def test_what_the_user_set_is_kept():
    torch.set_float32_matmul_precision("high")
    assert not use_fast_float32_matmul()
    assert torch.get_float32_matmul_precision() == "high"


def test_processors_that_multiply_well_keep_the_default(monkeypatch):
    monkeypatch.setattr(matmul, "_mkl_is_slow", lambda: False)
    assert not use_fast_float32_matmul()
    assert torch.get_float32_matmul_precision() == "highest"
