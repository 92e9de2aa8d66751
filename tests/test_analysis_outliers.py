# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from reference import images, tiny_config

from hf_vitreg import ViTRegModel
from hf_vitreg.analysis.norms import RESOLUTION, NormDistribution, NormStatistics, token_norms
from hf_vitreg.analysis.outliers import (
    Separation,
    artifact_verdict,
    bimodality,
    outlier_mask,
    outlier_threshold,
    separation,
    split_off_layer,
)


METHODS = ["mean+3std", "mad", "otsu"]
SIDES = ["high", "low"]
NUM_TOKENS = 10_000


def distribution(norms: torch.Tensor) -> NormDistribution:
    measured = NormStatistics()
    measured.update({"patch": norms[None]})
    return measured.distributions()[0]


def bulk(number: int = NUM_TOKENS, variation: float = 0.1) -> torch.Tensor:
    return 40 * (1 + variation * torch.randn(number))


def planted(share: float, factor: float, variation: float = 0.1) -> torch.Tensor:
    """A bulk of norms 40, and a share of norms this many times as large."""
    number = round(share * NUM_TOKENS)
    return torch.cat([bulk(NUM_TOKENS - number, variation), factor * bulk(number, variation)])


def otsu_by_trying(values: np.ndarray) -> tuple[float, float]:
    """The two neighbouring values between which the best split is."""
    values = np.sort(values)
    sums, counts = values.cumsum()[:-1], np.arange(1, len(values))
    below, above = sums / counts, (values.sum() - sums) / (len(values) - counts)
    best = (counts * (len(values) - counts) * (below - above) ** 2).argmax()
    return values[best], values[best + 1]


# Thresholds


def test_a_number_is_its_own_threshold():
    assert outlier_threshold(distribution(bulk()), 150) == 150.0
    assert outlier_threshold(distribution(bulk()), 12.5, "low") == 12.5


def test_mean_and_3_standard_deviations_are_exact():
    norms = planted(0.02, 5)
    expected = norms.double().mean() + 3 * norms.double().std(correction=0)
    assert outlier_threshold(distribution(norms), "mean+3std") == pytest.approx(expected.item(), rel=1e-9)


def test_mad_is_five_robust_standard_deviations():
    norms = planted(0.02, 5).numpy()
    median = np.median(norms)
    expected = median + 5 * 1.4826 * np.median(np.abs(norms - median))
    assert outlier_threshold(distribution(torch.from_numpy(norms)), "mad") == pytest.approx(expected, rel=RESOLUTION)


def test_low_side_is_measured_on_logarithms():
    norms = planted(0.02, 0.2).numpy()
    logarithms = np.log(norms)
    median = np.median(logarithms)
    by_mad = np.exp(median - 5 * 1.4826 * np.median(np.abs(logarithms - median)))
    by_std = np.exp(logarithms.mean() - 3 * logarithms.std())
    measured = distribution(torch.from_numpy(norms))
    assert outlier_threshold(measured, "mad", "low") == pytest.approx(by_mad, rel=5e-3)
    assert outlier_threshold(measured, "mean+3std", "low") == pytest.approx(by_std, rel=1e-3)


@pytest.mark.parametrize(("side", "factor"), [("high", 6), ("low", 1 / 6)])
def test_otsu_splits_in_the_middle_of_the_gap(side, factor):
    norms = planted(0.05, factor).double().numpy()
    low, high = otsu_by_trying(norms if side == "high" else np.log(norms))
    middle = (low + high) / 2
    threshold = outlier_threshold(distribution(torch.from_numpy(norms)), "otsu", side)
    assert threshold == pytest.approx(middle if side == "high" else np.exp(middle), rel=RESOLUTION)


def test_otsu_without_a_gap_is_the_best_split():
    norms = torch.rand(NUM_TOKENS) + 1
    low, high = otsu_by_trying(norms.double().numpy())
    # around the best split others are nearly as good
    assert outlier_threshold(distribution(norms), "otsu") == pytest.approx((low + high) / 2, rel=5e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", SIDES)
def test_equal_norms_have_no_outliers(method, side):
    measured = distribution(torch.full((50,), 7.0))
    assert outlier_threshold(measured, method, side) == pytest.approx(7, rel=0.02)
    assert not artifact_verdict(measured, method, side).has_artifacts


def test_thresholds_scale_with_the_norms():
    norms = planted(0.02, 5)
    for method in METHODS:
        one, hundred = (outlier_threshold(distribution(scale * norms), method) for scale in (1, 128))
        assert hundred == pytest.approx(128 * one, rel=1e-9)


def test_mask_is_strict_and_has_a_side():
    norms = torch.tensor([[1.0, 5.0], [5.5, 9.0]])
    assert outlier_mask(norms, 5.0).tolist() == [[False, False], [True, True]]
    assert outlier_mask(norms, 5.0, "low").tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("threshold", [0.0, -3, math.nan, math.inf])
def test_thresholds_that_are_no_norms_are_refused(threshold):
    with pytest.raises(ValueError, match="positive and finite"):
        outlier_threshold(distribution(bulk(5)), threshold)


def test_unknown_words_and_no_tokens_are_refused():
    with pytest.raises(ValueError, match="a number or one of 'mean\\+3std', 'mad', 'otsu', got 'median'"):
        outlier_threshold(distribution(bulk(5)), "median")
    with pytest.raises(ValueError, match='side must be "high" or "low", got \'both\''):
        outlier_threshold(distribution(bulk(5)), "mad", "both")
    with pytest.raises(ValueError, match="no tokens"):
        outlier_threshold(distribution(torch.empty(0)), "mad")


# Verdict


CLEAN = {
    "normal": bulk,
    "narrow": lambda number: bulk(number, 0.01),
    "wide": lambda number: bulk(number, 0.25).abs(),
    "log-normal": lambda number: torch.randn(number).exp(),
    "exponential": lambda number: -torch.rand(number).log(),
    "uniform": lambda number: 1 + 9 * torch.rand(number),
    "left-skewed": lambda number: torch.rand(number).sqrt(),
    "power law": lambda number: torch.rand(number).clamp(min=1e-6) ** -0.5,
}


@pytest.mark.parametrize("name", CLEAN)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", SIDES)
def test_a_single_mode_has_no_artifacts(name, method, side):
    for number in (30, 300, 3000, NUM_TOKENS):
        verdict = artifact_verdict(distribution(CLEAN[name](number)), method, side)
        assert not verdict.has_artifacts, verdict


def test_counting_alone_would_flag_the_tail_of_a_normal_distribution():
    verdict = artifact_verdict(distribution(bulk(100_000)), "mean+3std")
    assert verdict.share > 0.001 and not verdict.has_artifacts
    assert verdict.bimodality < 0.1


@pytest.mark.parametrize("share", [0.005, 0.01, 0.02, 0.05])
@pytest.mark.parametrize(
    ("factor", "methods"), [(2.5, METHODS[:2]), (4, METHODS), (10, METHODS), (1 / 2.5, METHODS[:2]), (0.1, METHODS)]
)
def test_planted_outliers_are_artifacts(share, factor, methods):
    measured = distribution(planted(share, factor))
    side = "high" if factor > 1 else "low"
    for method in methods:
        verdict = artifact_verdict(measured, method, side)
        assert verdict.has_artifacts, verdict
        # three standard deviations leave some of them out, or take tokens of the bulk in
        assert verdict.share == pytest.approx(share, abs=0.003)
        assert verdict.separation.ratio == pytest.approx(max(factor, 1 / factor), rel=0.1)
    other_side = {"high": "low", "low": "high"}[side]
    assert not artifact_verdict(measured, "mad", other_side).has_artifacts


def test_artifacts_have_a_range_of_shares_and_ratios():
    few = torch.cat([bulk(100_000), torch.full((30,), 400.0)])
    assert artifact_verdict(distribution(few)).share < 0.001
    assert not artifact_verdict(distribution(few)).has_artifacts
    # 30 standard deviations away, and yet 1.3 times the norm
    near = torch.cat([bulk(9800, 0.01), 1.3 * bulk(200, 0.01)])
    assert artifact_verdict(distribution(near)).separation.distance > 25
    assert not artifact_verdict(distribution(near)).has_artifacts
    # most tokens are beyond
    assert not artifact_verdict(distribution(planted(0.02, 5)), 10.0).has_artifacts


def test_an_empty_gap_takes_nine_outliers():
    for number, has_artifacts in [(8, False), (9, True)]:
        norms = torch.cat([bulk(500, 0.05), torch.full((number,), 400.0)])
        assert artifact_verdict(distribution(norms)).has_artifacts is has_artifacts


def test_bimodality_is_one_with_an_empty_gap_and_zero_with_one_mode():
    assert bimodality(distribution(planted(0.005, 10, 0.05)), 150.0) == 1
    assert bimodality(distribution(torch.linspace(1, 9, 10_001)), 4.0) == pytest.approx(0, abs=0.01)
    assert math.isnan(bimodality(distribution(bulk()), 1000.0))
    assert math.isnan(bimodality(distribution(torch.empty(0)), 1000.0))


def test_bimodality_of_three_levels_is_known():
    """Even between 0 and 1, 1 and 2, 2 and 3, with 6, 1 and 3 tokens of 10: the windows hold what lies in them."""
    norms = 1 + torch.cat([torch.linspace(0, 1, 6001), 1 + torch.linspace(0, 1, 1001), 2 + torch.linspace(0, 1, 3001)])
    # medians are at 1.5 and about 3.5 (tokens beyond 2.9 are 100 of the middle and all of the last), the window is 0.5
    assert bimodality(distribution(norms), 2.9) == pytest.approx(1 - 1 / 3, abs=0.01)


def test_untrained_models_have_no_artifacts():
    model = ViTRegModel(tiny_config(num_hidden_layers=3)).eval()
    with torch.no_grad():
        tokens = model(images(batch_size=64), output_hidden_states=True).hidden_states[-1]
    measured = distribution(token_norms(tokens[:, model.config.num_prefix_tokens :]).flatten())
    assert not any(artifact_verdict(measured, method, side).has_artifacts for method in METHODS for side in SIDES)


# The layer


def test_distance_and_ratio_are_those_of_the_medians():
    rest, outliers = bulk(2001), 3 * bulk(101)
    measured = separation(distribution(outliers), distribution(rest))
    median = rest.median().item()
    spread = 1.4826 * (rest - median).abs().median().item()
    assert measured.distance == pytest.approx((outliers.median().item() - median) / spread, rel=0.02)
    assert measured.ratio == pytest.approx(outliers.median().item() / median, rel=5e-3)
    assert measured.is_clear
    inverse = separation(distribution(40**2 / outliers), distribution(40**2 / rest), "low")
    assert inverse.ratio == pytest.approx(measured.ratio, rel=5e-3)
    # on their logarithms wide groups are nearer
    assert 5 < inverse.distance < measured.distance


@pytest.mark.parametrize("layer", [1, 2, 4, 5])
def test_split_off_layer_is_where_norms_were_planted(layer):
    num_layers, num_images, num_patches = 6, 11, 35
    is_outlier = torch.rand(num_images, num_patches) < 0.05
    norms = 10 * (1 + torch.arange(num_layers))[:, None, None] * (bulk(6 * 11 * 35).view(6, 11, 35) / 40)
    norms[layer:, is_outlier] *= 5
    # for one layer, and then no more: not yet where they split off
    norms[max(layer - 2, 0), is_outlier] *= 5 if layer > 2 else 1
    measured = NormStatistics()
    for number in range(num_images):
        mask = is_outlier[number]
        measured.update({"outlier": norms[:, number][:, mask], "rest": norms[:, number][:, ~mask]})
    layers = zip(measured.distributions("outlier"), measured.distributions("rest"))
    assert split_off_layer([separation(outlier, rest) for outlier, rest in layers]) == layer


def test_nothing_splits_off_where_nothing_is_separated():
    clear, near, none = Separation(9.0, 3.0), Separation(9.0, 1.2), Separation(math.nan, math.nan)
    assert split_off_layer([near, near, clear, clear]) == 2
    assert split_off_layer([near, clear, clear, near]) is None
    assert split_off_layer([none, none]) is None
    assert split_off_layer([]) is None
    assert separation(distribution(torch.empty(0)), distribution(bulk(9))).is_clear is False


def test_norms_that_patches_bring_along_are_no_artifacts():
    at_first, later = Separation(30.0, 3.0), Separation(30.0, 4.4)
    assert split_off_layer([at_first, later, later]) is None
    assert split_off_layer([at_first, later, Separation(30.0, 4.6)]) == 2
    # what comes with smaller norms has nothing to make up for
    assert split_off_layer([Separation(-30.0, 0.3), Separation(9.0, 1.6)]) == 1


@pytest.mark.parametrize("layer", [None, 1, 3])
def test_white_patches_are_artifacts_only_where_a_layer_makes_them(layer):
    """An untrained model hands their large norm through; a layer may add to it what artifacts are made of."""
    model = ViTRegModel(tiny_config(num_hidden_layers=4, num_register_tokens=2)).eval()
    is_white = torch.rand(64, 3 * 7) < 0.04
    pixels = is_white.view(64, 1, 3, 7).repeat_interleave(7, 2).repeat_interleave(7, 3)
    prefix = model.config.num_prefix_tokens

    def plant(module, arguments, tokens):
        tokens[:, prefix:][is_white] += 20 * torch.nn.functional.one_hot(torch.tensor(5), tokens.shape[-1])

    if layer is not None:
        model.encoder.layer[layer - 1].register_forward_hook(plant)
    with torch.no_grad():
        states = model(images(batch_size=64).masked_fill(pixels, 3), output_hidden_states=True).hidden_states
    norms = torch.stack([token_norms(tokens[:, prefix:]) for tokens in states])
    threshold = outlier_threshold(distribution(norms[-1].flatten()), "mad")
    is_outlier = outlier_mask(norms[-1], threshold)
    assert torch.equal(is_outlier, is_white)
    measured = NormStatistics()
    measured.update({"outlier": norms[:, is_outlier], "rest": norms[:, ~is_outlier]})
    pairs = zip(measured.distributions("outlier"), measured.distributions("rest"))
    separations = [separation(outlier, rest) for outlier, rest in pairs]
    verdict = artifact_verdict(distribution(norms[-1].flatten()), separations=separations)
    assert (verdict.has_artifacts, verdict.split_off_layer) == (layer is not None, layer)
    assert verdict.share == pytest.approx(is_white.double().mean().item(), abs=1e-9)
    assert artifact_verdict(distribution(norms[-1].flatten())).has_artifacts


@pytest.mark.parametrize("batch_size", [1, 7])
def test_verdict_does_not_depend_on_batches(batch_size):
    norms = planted(0.02, 4)[torch.randperm(NUM_TOKENS)].view(1, 100, 100)
    measured = NormStatistics()
    for part in norms.split(batch_size, dim=1):
        measured.update({"patch": part})
    for method in METHODS:
        expected = artifact_verdict(distribution(norms.flatten()), method)
        actual = artifact_verdict(measured.distributions()[0], method)
        assert asdict(actual.separation) == pytest.approx(asdict(expected.separation), rel=1e-9)
        for name in ("has_artifacts", "threshold", "share", "bimodality", "significance"):
            assert getattr(actual, name) == pytest.approx(getattr(expected, name), rel=1e-9)
