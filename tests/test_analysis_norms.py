# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import math

import numpy as np
import pytest
import torch

from hf_vitreg.analysis.norms import EDGES, NUM_BINS, RESOLUTION, NormStatistics, token_norms


NUM_LAYERS, NUM_IMAGES, NUM_PATCHES, NUM_REGISTERS = 3, 23, 35, 2


def layer_norms(*shape: int) -> torch.Tensor:
    """Norms that grow with the layer and have a long tail."""
    layers = torch.tensor([0.5, 10.0, 700.0]).view(-1, *[1] * (len(shape) - 1))
    return layers * torch.randn(shape).mul(0.4).exp()


def statistics(norms: dict[str, torch.Tensor], batch_size: int = NUM_IMAGES) -> NormStatistics:
    """Of images, the second axis, in batches."""
    measured = NormStatistics()
    for start in range(0, NUM_IMAGES, batch_size):
        measured.update({kind: values[:, start : start + batch_size] for kind, values in norms.items()})
    return measured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_are_lengths_in_float32(dtype):
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[200.0, 200.0], [1.0, -1.0]]], dtype=dtype)
    norms = token_norms(tokens)
    assert norms.dtype == torch.float32
    # 200 * 200 is beyond float16
    torch.testing.assert_close(norms, torch.tensor([[5.0, 0.0], [200 * 2**0.5, 2**0.5]]))


def test_moments_and_extremes_are_exact():
    norms = {"patch": layer_norms(NUM_LAYERS, NUM_IMAGES, NUM_PATCHES), "cls": layer_norms(NUM_LAYERS, NUM_IMAGES)}
    measured = statistics(norms, batch_size=4)
    assert measured.kinds == ["patch", "cls"]
    for kind, values in norms.items():
        for layer, distribution in enumerate(measured.distributions(kind)):
            exact = values[layer].double().flatten()
            assert distribution.count == len(exact)
            assert distribution.mean == pytest.approx(exact.mean().item(), rel=1e-12)
            assert distribution.std == pytest.approx(exact.std(correction=0).item(), rel=1e-9)
            assert (distribution.minimum, distribution.maximum) == (exact.min().item(), exact.max().item())
            assert distribution.counts.sum() == len(exact)


def test_bins_are_a_fifth_of_a_percent_at_most_and_ascend():
    assert len(EDGES) == NUM_BINS + 1
    widths = np.diff(EDGES) / EDGES[:-1]
    assert widths.min() > 0 and widths.max() == RESOLUTION == 1 / 512
    assert EDGES[0] < 1e-6 and EDGES[-1] > 1e6


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.975, 1.0])
def test_quantiles_are_those_of_numpy_to_a_bin(share):
    norms = layer_norms(NUM_LAYERS, 97, 101)
    measured = NormStatistics()
    measured.update({"patch": norms})
    for layer, distribution in enumerate(measured.distributions()):
        exact = np.quantile(norms[layer].numpy(), share, method="inverted_cdf")
        assert distribution.quantile(share) == pytest.approx(exact, rel=RESOLUTION)


def test_median_of_equal_norms_is_that_norm():
    measured = NormStatistics()
    measured.update({"patch": torch.full((1, 7), 3.3)})
    (distribution,) = measured.distributions()
    assert distribution.quantile(0.5) == distribution.minimum == pytest.approx(3.3)
    assert distribution.std == pytest.approx(0, abs=1e-6)


def test_quantiles_move_no_more_than_norms_do():
    """A token that sits at the border of two bins must not jump where rounding moves it."""
    norms = layer_norms(NUM_LAYERS, 31, 17)
    exact, disturbed = NormStatistics(), NormStatistics()
    exact.update({"patch": norms})
    disturbed.update({"patch": norms * (1 + 1e-6 * torch.randn(norms.shape))})
    for before, after in zip(exact.distributions(), disturbed.distributions()):
        assert after.quantile(0.5) == pytest.approx(before.quantile(0.5), rel=5e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 22])
def test_neither_batches_nor_their_order_matter(batch_size):
    norms = {
        "patch": layer_norms(NUM_LAYERS, NUM_IMAGES, NUM_PATCHES),
        "register": layer_norms(NUM_LAYERS, NUM_IMAGES, 2),
    }
    permuted = {kind: values[:, torch.randperm(NUM_IMAGES)] for kind, values in norms.items()}
    whole, cut = statistics(norms), statistics(permuted, batch_size)
    for kind in norms:
        for expected, actual in zip(whole.distributions(kind), cut.distributions(kind)):
            assert (actual.counts == expected.counts).all()
            assert actual.summary() == pytest.approx(expected.summary(), rel=1e-12)


def test_histogram_counts_between_any_edges():
    measured = NormStatistics()
    measured.update({"patch": torch.tensor([[1.0, 2.0, 2.1, 7.0, 900.0]])})
    (distribution,) = measured.distributions()
    np.testing.assert_allclose(distribution.histogram([0.5, 1.5, 3, 8, 50, 1e5]), [1, 2, 1, 0, 1])


@pytest.mark.parametrize(("threshold", "side", "share"), [(5.0, "high", 0.4), (1.5, "low", 0.2), (1e9, "high", 0.0)])
def test_share_beyond_a_threshold_is_exact_in_a_gap(threshold, side, share):
    measured = NormStatistics()
    measured.update({"patch": torch.tensor([[1.0, 2.0, 2.1, 7.0, 900.0]])})
    assert measured.distributions()[0].share_beyond(threshold, side) == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize("value", [0.0, 1e-9, 1e12])
def test_norms_beyond_the_bins_are_counted_at_their_ends(value):
    measured = NormStatistics()
    measured.update({"patch": torch.tensor([[value, 1.0, 1.0]])})
    (distribution,) = measured.distributions()
    assert distribution.counts.sum() == 3
    assert min(value, 1) == pytest.approx(distribution.minimum) and max(value, 1) == pytest.approx(
        distribution.maximum
    )
    assert distribution.quantile(0.5) == pytest.approx(1, rel=RESOLUTION)


def test_a_kind_may_have_no_tokens():
    measured = NormStatistics()
    measured.update({"patch": torch.ones(NUM_LAYERS, 2, 5), "register": torch.ones(NUM_LAYERS, 2, 0)})
    empty = measured.distributions("register")
    assert len(empty) == NUM_LAYERS and empty[0].count == 0
    assert all(math.isnan(value) for name, value in empty[0].summary().items() if name != "count")
    assert math.isnan(empty[0].share_beyond(1.0)) and empty[0].histogram([0, 1, 2]).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"no 'cls' tokens, only 'patch', 'register'"):
        measured.distributions("cls")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norms_that_are_no_numbers_are_refused(value):
    with pytest.raises(ValueError, match="Norms of register tokens must be finite, but 1 of 4 values"):
        NormStatistics().update({"patch": torch.ones(2, 3), "register": torch.tensor([[1.0, value], [1, 1]])})


def test_negative_norms_and_other_numbers_of_layers_are_refused():
    measured = NormStatistics()
    measured.update({"patch": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="negative"):
        measured.update({"patch": -torch.ones(3, 2)})
    with pytest.raises(ValueError, match="patch tokens had 3 layers before and have 2 now"):
        measured.update({"patch": torch.ones(2, 2)})


def test_memory_does_not_grow_with_images():
    measured = NormStatistics()
    sizes = []
    for _ in range(3):
        measured.update({"patch": layer_norms(NUM_LAYERS, 50, NUM_PATCHES)})
        tensors = [value for value in vars(measured._kinds["patch"]).values() if torch.is_tensor(value)]
        sizes.append(sum(tensor.nbytes for tensor in tensors))
    assert sizes[0] == sizes[1] == sizes[2] < NUM_LAYERS * 170_000
