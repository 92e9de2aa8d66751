# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch

from hf_vitreg.analysis import accumulate
from hf_vitreg.analysis.accumulate import Moments, add_to_bins, require_finite, require_shape


def test_moments_are_those_of_all_vectors_together(monkeypatch):
    # chunks that do not divide the batches
    monkeypatch.setattr(accumulate, "ROWS_AT_ONCE", 7)
    vectors = 100 + torch.randn(53, 5) @ torch.randn(5, 5)
    moments = Moments()
    for part in vectors.split(19):
        moments.update(part)
    assert moments.count == 53
    torch.testing.assert_close(moments.mean, vectors.double().mean(0))
    torch.testing.assert_close(moments.covariance, torch.cov(vectors.double().T, correction=0))


def test_moments_of_two_parts_add_up():
    vectors = torch.randn(11, 3)
    first, second, whole = Moments(), Moments(), Moments()
    first.update(vectors[:4])
    second.update(vectors[4:])
    whole.update(vectors)
    total = first + second
    assert total.count == 11
    torch.testing.assert_close(total.covariance, whole.covariance)


def test_a_value_is_shared_by_the_two_nearest_bins():
    counts = torch.zeros(2, 4, dtype=torch.float64)
    add_to_bins(counts, torch.tensor([[1.25, 2.0], [-7.0, 3.5]], dtype=torch.float64))
    assert counts.tolist() == [[0, 0.75, 1.25, 0], [1, 0, 0, 1]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_counted_in_the_error(value):
    with pytest.raises(ValueError, match=r"tokens must be finite, but 2 of 6 values"):
        require_finite(torch.tensor([0, value, 1, value, 2, 3]), "tokens")


def test_shapes_are_named_in_the_error():
    require_shape(torch.empty(2, 3, 5), "tokens", "batch", 3, "dim")
    for shape in [(2, 4, 5), (2, 3)]:
        with pytest.raises(ValueError, match=r"tokens must have shape \(batch, 3, dim\), got \(2, "):
            require_shape(torch.empty(shape), "tokens", "batch", 3, "dim")
