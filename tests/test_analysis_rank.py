# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch

from hf_vitreg.analysis.rank import effective_rank


@pytest.mark.parametrize("shape", [(11, 5), (5, 11), (7, 7)])
def test_equals_the_entropy_of_the_singular_values(shape):
    features = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    shares = torch.linalg.svdvals(features.double())
    shares = shares / shares.sum()
    expected = math.exp(-(shares * shares.log()).sum())
    assert effective_rank(features).item() == pytest.approx(expected, rel=1e-5)


def test_orthogonal_rows_use_as_many_directions_as_there_are():
    assert effective_rank(3 * torch.eye(5, 13)).item() == pytest.approx(5)


def test_equal_rows_use_one():
    assert effective_rank(torch.ones(7, 3)).item() == pytest.approx(1)


def test_half_precision_is_enough_and_what_is_not_finite_is_told():
    assert effective_rank(torch.eye(3, dtype=torch.bfloat16)).item() == pytest.approx(3)
    assert effective_rank(torch.tensor([[1.0, float("nan")], [1.0, 2.0]])).isnan()
