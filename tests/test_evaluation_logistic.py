# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize

from hf_vitreg.evaluation import logistic
from hf_vitreg.evaluation.labelled import held_out_split
from hf_vitreg.evaluation.logistic import CS, fit_logistic, logistic_sweep


NUM_IMAGES, HIDDEN_SIZE, NUM_CLASSES = 151, 13, 5


def features_of(num_classes: int, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that overlap, channels of different means and scales."""
    labels = (torch.arange(NUM_IMAGES) + offset) % num_classes
    means = torch.randn(num_classes, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))
    features = means[labels] + 1.5 * torch.randn(NUM_IMAGES, HIDDEN_SIZE)
    return 2 + features * torch.linspace(0.5, 3, HIDDEN_SIZE), labels


@pytest.fixture
def problem():
    return features_of(NUM_CLASSES)


def by_sklearn(features, labels, C):
    return LogisticRegression(C=C, tol=1e-9, max_iter=10_000).fit(features, labels)


@pytest.mark.parametrize("C", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("normalization", ["none", "l2", "standardize"])
def test_model_is_that_of_sklearn(problem, C, normalization):
    features, labels = problem
    model = fit_logistic(features, labels, NUM_CLASSES, C, normalization=normalization, tolerance=1e-7)
    prepare = {"none": np.asarray, "l2": normalize, "standardize": StandardScaler().fit_transform}[normalization]
    reference = by_sklearn(prepare(features.double().numpy()), labels, C)
    torch.testing.assert_close(model.weight, torch.from_numpy(reference.coef_), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.bias, torch.from_numpy(reference.intercept_), atol=1e-4, rtol=1e-4)
    expected = torch.from_numpy(reference.predict_proba(prepare(features.double().numpy())))
    torch.testing.assert_close(model.logits(features).softmax(dim=1), expected, atol=1e-5, rtol=0)
    assert model.max_gradient <= 1e-7 and model.C == C


def test_two_classes_are_as_in_sklearn():
    """Its penalty is on the one vector between the classes, ours on two."""
    features, labels = features_of(2)
    model = fit_logistic(features, labels, 2, 0.01, tolerance=1e-9)
    reference = by_sklearn(features.double().numpy(), labels, 0.01)
    torch.testing.assert_close(model.weight[1:] - model.weight[:1], torch.from_numpy(reference.coef_))
    expected = torch.from_numpy(reference.predict_proba(features.double().numpy()))
    torch.testing.assert_close(model.logits(features).softmax(dim=1), expected, atol=1e-6, rtol=0)


def test_digits_are_classified_as_by_sklearn():
    values, labels = load_digits(return_X_y=True)
    model = fit_logistic(torch.from_numpy(values[:1200] / 16), labels[:1200], 10, 0.5, tolerance=1e-8)
    reference = by_sklearn(values[:1200] / 16, labels[:1200], 0.5)
    probabilities = model.logits(torch.from_numpy(values[1200:] / 16)).softmax(dim=1)
    np.testing.assert_allclose(probabilities, reference.predict_proba(values[1200:] / 16), atol=1e-4)
    assert probabilities.argmax(dim=1).tolist() == reference.predict(values[1200:] / 16).tolist()


def test_chunks_and_where_they_are_kept_do_not_matter(problem, monkeypatch):
    whole = fit_logistic(*problem, NUM_CLASSES, normalization="standardize", tolerance=1e-9)
    monkeypatch.setattr(logistic, "CHUNK_SIZE", 17)
    kept = fit_logistic(*problem, NUM_CLASSES, normalization="standardize", tolerance=1e-9)
    monkeypatch.setattr(logistic, "MAX_RESIDENT_BYTES", 0)
    read = fit_logistic(*problem, NUM_CLASSES, normalization="standardize", tolerance=1e-9)
    torch.testing.assert_close(whole.weight, kept.weight, atol=1e-7, rtol=0)
    assert torch.equal(kept.weight, read.weight) and torch.equal(kept.logits(problem[0]), read.logits(problem[0]))


def test_float32_comes_close(problem):
    model = fit_logistic(*problem, NUM_CLASSES, 0.1, dtype=torch.float32)
    expected = fit_logistic(*problem, NUM_CLASSES, 0.1, tolerance=1e-9)
    assert model.weight.dtype == model.logits(problem[0]).dtype == torch.float32
    torch.testing.assert_close(model.weight.double(), expected.weight, atol=5e-3, rtol=0)


def test_a_start_saves_steps_and_changes_nothing(problem, monkeypatch):
    evaluations = []
    original = logistic._Problem._evaluate
    monkeypatch.setattr(
        logistic._Problem, "_evaluate", lambda self, *arguments: evaluations.append(1) or original(self, *arguments)
    )
    near = fit_logistic(*problem, NUM_CLASSES, 0.09, tolerance=1e-7)
    evaluations.clear()
    cold = fit_logistic(*problem, NUM_CLASSES, 0.1, tolerance=1e-7)
    num_cold, weight = len(evaluations), near.weight.clone()
    evaluations.clear()
    warm = fit_logistic(*problem, NUM_CLASSES, 0.1, tolerance=1e-7, start=near)
    assert len(evaluations) < 0.8 * num_cold and torch.equal(near.weight, weight)
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-5, rtol=0)


def test_a_channel_that_never_changes_is_standardized_to_nothing(problem):
    features = problem[0].index_fill(1, torch.tensor(4), 0.1)
    model = fit_logistic(features, problem[1], NUM_CLASSES, normalization="standardize")
    assert model.scale[4] == 1 and (model.weight[:, 4] == 0).all()


def test_sweep_chooses_on_held_out_images_and_fits_to_all(problem):
    features, labels = problem
    validation, validation_labels = features_of(NUM_CLASSES, offset=2)
    Cs, fits = (1e-5, 1e-3, 1e-1, 10.0), []
    sweep = logistic_sweep(
        features,
        labels,
        validation,
        validation_labels,
        NUM_CLASSES,
        Cs=Cs[::-1],
        held_out_share=0.3,
        tolerance=1e-7,
        on_fit=lambda *fit: fits.append(fit),
    )
    kept, held_out = held_out_split(labels, 0.3, seed=0)
    expected = {C: by_sklearn(features[kept].double(), labels[kept], C) for C in Cs}
    expected = {C: model.score(features[held_out].double(), labels[held_out]) for C, model in expected.items()}
    assert sweep.held_out_accuracies == pytest.approx(expected) and tuple(sweep.held_out_accuracies) == Cs
    assert max(Cs, key=expected.get) == sweep.best.C and len(set(expected.values())) > 1
    reference = by_sklearn(features.double(), labels, sweep.best.C)
    torch.testing.assert_close(sweep.best.weight, torch.from_numpy(reference.coef_), atol=1e-4, rtol=0)
    assert sweep.top1 == pytest.approx(reference.score(validation.double(), validation_labels))
    assert sweep.top5 == 1 and fits == [(fit, 5) for fit in range(1, 6)]


def test_default_values_of_c_are_dinov2s():
    assert len(CS) == 45 and CS[0] == pytest.approx(1e-6) and CS[-1] == pytest.approx(1e5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"C": 0}, "C must be positive.* got 0"),
        ({"max_iterations": 0}, "max_iterations 1 or more"),
        ({"normalization": "L2"}, "normalization must be one of none, l2, standardize, got 'L2'"),
        ({"num_classes": 1}, "two classes or more"),
        ({"num_classes": 4}, "image 4 has 4"),
        ({"num_classes": 6}, "1 of 6 classes have no image among the training images: 5"),
        ({"features": torch.full((NUM_IMAGES, 3), torch.nan)}, "training features of image 0 are NaN"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "must be 151 integers"),
    ],
)
def test_what_cannot_be_is_refused(problem, changes, named):
    arguments = {"features": problem[0], "labels": problem[1], "num_classes": NUM_CLASSES}
    with pytest.raises(ValueError, match=named):
        fit_logistic(**{**arguments, **changes})


def test_validation_of_another_model_and_no_c_are_refused(problem):
    with pytest.raises(ValueError, match="validation features have 3 channels"):
        logistic_sweep(*problem, torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64), NUM_CLASSES)
    with pytest.raises(ValueError, match="Cs must hold"):
        logistic_sweep(*problem, *problem, NUM_CLASSES, Cs=())
