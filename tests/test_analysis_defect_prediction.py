# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Predicted directions beside those of outliers, against the library's own hidden states and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from planted import COLS, NEURON, NUM_LAYERS, NUM_REGISTERS, PLANTED_LAYER, ROWS, neuron, patchy_image, planted_encoder
from sklearn.metrics import roc_auc_score

from hf_vitreg.analysis.defect_prediction import auroc_of_histograms, predict_outliers
from hf_vitreg.analysis.image_files import ImageFiles
from hf_vitreg.analysis.outliers import outlier_threshold
from hf_vitreg.analysis.run import Run
from hf_vitreg.analysis.singular_defects import SingularDefects, singular_defects


NUM_IMAGES, SCALE = 12, 500.0


@pytest.fixture(scope="module")
def images():
    return [patchy_image(index)[0] for index in range(NUM_IMAGES)]


def run_of(encoder, images, batch_size=16, layer=None):
    return Run(encoder, ImageFiles(images), "mad", "high", layer, None, batch_size, 0, False)


def random_directions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(NUM_LAYERS, 48, dtype=torch.float64, generator=generator)
    return SingularDefects(torch.nn.functional.normalize(directions, dim=1), torch.zeros(NUM_LAYERS, 2))


def patches_of(encoder, images):
    """`(num_layers, images, patches, hidden_size)`"""
    with torch.no_grad():
        states = encoder.model(encoder.preprocess(images), output_hidden_states=True).hidden_states
    return torch.stack(states[1:])[:, :, 1 + NUM_REGISTERS :].double()


def flat(prediction):
    numbers = vars(prediction) | {"outliers": 0.0, "rest": 0.0}
    return [*numbers.values(), *vars(prediction.outliers).values(), *vars(prediction.rest).values()]


def test_numbers_are_those_of_the_tokens_themselves(images):
    encoder, defects = planted_encoder(SCALE), random_directions()
    results = predict_outliers(run_of(encoder, images), defects, 10.0)
    patches = patches_of(encoder, images)
    is_outlier = patches[-1].norm(dim=-1) > 10.0
    assert 0 < is_outlier.sum() < is_outlier.numel() / 2
    for tokens, direction, result in zip(patches, defects.directions, results):
        units = torch.nn.functional.normalize(tokens, dim=-1)
        cosines = (units @ direction).abs()
        for group, mask, cosine in (
            (result.outliers, is_outlier, result.cos_outlier_direction),
            (result.rest, ~is_outlier, result.cos_rest_direction),
        ):
            mean = units[mask].mean(0)
            assert cosine == pytest.approx(((mean @ direction).abs() / mean.norm()).item(), abs=1e-5)
            assert group.count == mask.sum() and group.mean == pytest.approx(cosines[mask].mean().item(), abs=1e-5)
            quantiles = group.quantile_05, group.median, group.quantile_95
            # between the same neighbours of what are few
            np.testing.assert_allclose(quantiles, np.quantile(cosines[mask], (0.05, 0.5, 0.95)), atol=0.05)
        assert result.outlier_alignment == pytest.approx(units[is_outlier].mean(0).norm().item(), abs=1e-5)
        expected = roc_auc_score(is_outlier.flatten(), cosines.flatten())
        assert result.auroc == pytest.approx(expected, abs=2e-3)
        limits = cosines.mean(1, keepdim=True) + 4 * cosines.std(1, keepdim=True)
        flagged = cosines > limits
        assert result.recall == pytest.approx(((flagged & is_outlier).sum() / is_outlier.sum()).item())
        if flagged.any():
            assert result.precision == pytest.approx(((flagged & is_outlier).sum() / flagged.sum()).item())
        else:
            assert math.isnan(result.precision)


def test_what_weights_predict_is_where_planted_outliers_point(images):
    encoder = planted_encoder(1e8)
    up, down = neuron(encoder.model)
    up.bias.data[NEURON] = -18  # fires for more normal inputs, and still not for other patches
    written = torch.nn.functional.normalize(down.weight[:, NEURON].double(), dim=0)
    defects, run = singular_defects(encoder), run_of(encoder, images)
    assert abs(defects.directions[PLANTED_LAYER - 1] @ written) > 0.99
    threshold = outlier_threshold(run.survey().norms.distributions()[NUM_LAYERS], "mad")
    is_outlier = patches_of(encoder, images)[-1].norm(dim=-1) > threshold
    # patches of a constant colour, and what is a little like them
    assert is_outlier[np.stack([patchy_image(index)[1].ravel() for index in range(NUM_IMAGES)])].all()
    for layer, result in enumerate(predict_outliers(run, defects, threshold), start=1):
        assert result.outliers.count == is_outlier.sum()
        if layer < PLANTED_LAYER:
            assert result.cos_outlier_direction < 0.7 and result.auroc < 0.9
        else:
            assert result.cos_outlier_direction > 0.99 > 0.5 > result.cos_rest_direction
            assert result.auroc > 0.99 and result.outliers.quantile_05 > 0.9


def test_published_rule_finds_a_single_outlier_in_each_image():
    encoder = planted_encoder(SCALE)
    images = [patchy_image(index, 8, 12)[0] for index in range(0, 8, 2)]
    run = Run(encoder, ImageFiles(images), "mad", "high", None, (56, 84), 3, 0, False)
    written = torch.nn.functional.normalize(neuron(encoder.model)[1].weight[:, NEURON].double(), dim=0)
    told = SingularDefects(written.expand(NUM_LAYERS, -1), torch.zeros(NUM_LAYERS, 2))
    result = predict_outliers(run, told, 10.0)[PLANTED_LAYER - 1]
    assert (result.recall, result.precision, result.outliers.count) == (1, 1, 4)
    assert result.auroc == pytest.approx(1, abs=1e-6)


def test_results_are_the_same_for_any_batch_size(images):
    encoder = planted_encoder(SCALE)
    results = [predict_outliers(run_of(encoder, images, size), random_directions(), 10.0) for size in (5, 12)]
    for first, second in zip(*results):
        np.testing.assert_allclose(flat(first), flat(second), atol=1e-5)


def test_outliers_are_those_of_the_layer_asked_for(images):
    encoder = planted_encoder(SCALE)
    before = predict_outliers(run_of(encoder, images, layer=PLANTED_LAYER - 1), random_directions(), 10.0)
    assert all(result.outliers.count == 0 for result in before)


def test_without_outliers_there_is_nothing_to_compare_with(images):
    for threshold, group in ((1e9, "outliers"), (1e-9, "rest")):
        results = predict_outliers(run_of(planted_encoder(1.0), images), random_directions(), threshold)
        for result in results:
            assert math.isnan(result.auroc) and vars(result)[group].count == 0
            assert math.isnan(vars(result)[group].mean) and math.isnan(vars(result)[group].median)
    assert result.outliers.count == NUM_IMAGES * ROWS * COLS and not math.isnan(result.cos_outlier_direction)


def test_area_under_the_curve_by_hand():
    counts = torch.tensor([[0.0, 1, 2], [3, 1, 0]], dtype=torch.float64)
    # of 12 pairs one is equal, all others are in order
    assert auroc_of_histograms(*counts) == pytest.approx(11.5 / 12)
    assert auroc_of_histograms(*counts.flip(0)) == pytest.approx(0.5 / 12)
    assert math.isnan(auroc_of_histograms(0 * counts[0], counts[1]))
