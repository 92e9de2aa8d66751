# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch
from sklearn.linear_model import Ridge

from hf_vitreg.analysis import accumulate, ridge
from hf_vitreg.analysis.ridge import PENALTIES, RidgeRegression


NUM_FEATURES, NUM_TARGETS = 13, 5


@pytest.fixture
def problem():
    """Features of very different scales and means, two folds, targets with noise."""
    features = 30 + torch.randn(97, NUM_FEATURES) * torch.logspace(-2, 3, NUM_FEATURES)
    targets = features @ torch.randn(NUM_FEATURES, NUM_TARGETS) / torch.logspace(-2, 3, NUM_FEATURES).mean()
    return features, targets + 3 * torch.randn_like(targets), torch.arange(97) % 3 // 2


def fitted(features: torch.Tensor, targets: torch.Tensor, folds: torch.Tensor, batch_size: int = 97, **values):
    regression = RidgeRegression(**values)
    for rows in torch.arange(len(features)).split(batch_size):
        for fold in (0, 1):
            chosen = rows[folds[rows] == fold]
            regression.update(features[chosen], targets[chosen], fold)
    assert regression.count == len(features)
    return regression.fit()


def by_sklearn(features: torch.Tensor, targets: torch.Tensor, penalty: float) -> tuple[Ridge, torch.Tensor]:
    """The same objective, which theirs divides by nothing, and the scale of the features."""
    scale = features.double().std(0, correction=0)
    return Ridge(alpha=penalty * len(features)).fit((features.double() / scale).numpy(), targets.double()), scale


def test_solution_is_that_of_sklearn(problem):
    features, targets, folds = problem
    linear = fitted(features, targets, folds)
    reference, scale = by_sklearn(features, targets, linear.penalty)
    torch.testing.assert_close(linear.weight * scale[:, None], torch.from_numpy(reference.coef_.T))
    torch.testing.assert_close(linear.bias, torch.from_numpy(reference.intercept_))
    expected = torch.from_numpy(reference.predict((features.double() / scale).numpy()))
    torch.testing.assert_close(linear(features), expected)


def test_penalty_is_the_best_between_the_folds(problem):
    features, targets, folds = problem
    errors = []
    for penalty in PENALTIES:
        total = 0
        for fold in (0, 1):
            reference, scale = by_sklearn(features[folds != fold], targets[folds != fold], penalty)
            predicted = reference.predict((features[folds == fold].double() / scale).numpy())
            total += (torch.from_numpy(predicted) - targets[folds == fold]).square().sum().item()
        errors.append(total)
    linear = fitted(features, targets, folds)
    assert linear.penalty == PENALTIES[errors.index(min(errors))]
    # neither the first nor the last, or the choice would be none
    assert PENALTIES[0] < linear.penalty < PENALTIES[-1]


def test_noise_gets_a_large_penalty_and_a_function_a_small_one(problem):
    features, _, folds = problem
    assert fitted(features, torch.randn(97, 2), folds).penalty >= 1
    exact = fitted(features, features[:, :2], folds)
    assert exact.penalty <= 1e-5
    torch.testing.assert_close(exact(features), features[:, :2].double(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 10])
@pytest.mark.parametrize("rows_at_once", [3, 4096])
def test_neither_batches_nor_chunks_matter(monkeypatch, problem, batch_size, rows_at_once):
    whole = fitted(*problem)
    monkeypatch.setattr(accumulate, "ROWS_AT_ONCE", rows_at_once)
    cut = fitted(*problem, batch_size=batch_size)
    assert cut.penalty == whole.penalty
    torch.testing.assert_close(cut(problem[0]), whole(problem[0]), rtol=1e-9, atol=1e-9)


def test_classes_are_one_hot_vectors(problem):
    features, _, folds = problem
    labels = torch.randint(NUM_TARGETS, (97,))
    one_hot = torch.nn.functional.one_hot(labels, NUM_TARGETS)
    by_class = fitted(features, labels, folds, num_classes=NUM_TARGETS)
    torch.testing.assert_close(by_class.weight, fitted(features, one_hot, folds).weight)


def test_constant_features_have_no_weight(problem):
    features, targets, folds = problem
    constant = torch.cat([features, torch.full((97, 1), 1234.5), torch.zeros(97, 1)], dim=1)
    linear = fitted(constant, targets, folds)
    assert (linear.weight[-2:] == 0).all()
    torch.testing.assert_close(linear(constant), fitted(features, targets, folds)(features))


def test_fewer_rows_than_features_have_a_solution():
    features, targets = torch.randn(8, 50), torch.randn(8, 3)
    linear = fitted(features, targets, torch.arange(8) % 2)
    assert linear(features).isfinite().all()


def test_one_fold_has_the_fixed_penalty(problem):
    features, targets, folds = problem
    assert fitted(features, targets, torch.ones_like(folds)).penalty == ridge.PENALTY_WITHOUT_FOLDS
