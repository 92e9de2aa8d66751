# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch

from hf_vitreg.evaluation.labelled import ImageFeatures
from hf_vitreg.evaluation.out_of_distribution import AnomalyScore, anomaly_score, out_of_distribution


NUM_IMAGES, NUM_LAYERS, HIDDEN_SIZE, NUM_CLASSES = 120, 3, 11, 5
QUICK = {"logistic": {"Cs": (0.01, 1.0)}, "linear": {"learning_rates": (0.01, 1.0), "num_epochs": 20}}


def features_of(cls_noise: float = 1.0, signal: float = 1.0, labelled: bool = True) -> ImageFeatures:
    """CLS loses the class in noise; registers keep it in any case. Other layers hold nothing."""
    labels = torch.randperm(NUM_IMAGES) % NUM_CLASSES
    means = torch.randn(NUM_CLASSES, 2 * HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))
    cls, registers = torch.randn(2, NUM_IMAGES, NUM_LAYERS, HIDDEN_SIZE)
    cls[:, -1] = signal * means[labels, :HIDDEN_SIZE] + cls_noise * cls[:, -1]
    registers[:, -1] = signal * means[labels, HIDDEN_SIZE:] + 0.3 * registers[:, -1]
    return ImageFeatures(cls, labels if labelled else None, register_mean=registers)


@pytest.mark.parametrize("probe", ["logistic", "linear"])
def test_registers_help_where_cls_fails(probe):
    shifted = {"noise": features_of(cls_noise=4.0), "none": features_of()}
    outliers = {"nothing": features_of(signal=0.0, labelled=False)}
    results = out_of_distribution(
        features_of(), features_of(), NUM_CLASSES, shifted=shifted, outliers=outliers, probe=probe, **QUICK[probe]
    )
    assert list(results) == ["cls", "cls + register mean"]
    cls, both = results.values()
    assert both.accuracy >= cls.accuracy > 0.7
    assert set(cls.shifted_accuracies) == {"noise", "none"}
    assert both.shifted_accuracies["noise"] > cls.shifted_accuracies["noise"] + 0.1
    assert cls.shifted_accuracies["noise"] < cls.shifted_accuracies["none"]
    assert both.anomalies["nothing"].auroc > cls.anomalies["nothing"].auroc > 0.5
    assert both.anomalies["nothing"].fpr95 < cls.anomalies["nothing"].fpr95
    assert both.chosen in {"C = 0.01", "C = 1", "lr 0.01", "lr 1"}


def test_features_of_one_layer_and_no_further_sets_do():
    train, test = (
        ImageFeatures(features.cls[:, -1], features.labels, register_mean=features.register_mean[:, -1])
        for features in (features_of(), features_of())
    )
    result = out_of_distribution(train, test, NUM_CLASSES, Cs=(1.0,))["cls"]
    assert result.shifted_accuracies == result.anomalies == {}


def test_anomaly_score_counts():
    """With 20 known images, 95 % are 19: all but the lowest, which lies at 0; the threshold is the next, 10."""
    known = torch.cat([torch.zeros(1), 10 + torch.arange(19)])
    outliers = torch.tensor([-1.0, 5.0, 10.5, 11.5])
    below = (known[:, None] > outliers).double().mean().item()
    assert anomaly_score(known, outliers) == AnomalyScore(fpr95=0.5, auroc=pytest.approx(below))
    # an equal score is taken for known
    assert anomaly_score(known, torch.tensor([10.0, 9.0])).fpr95 == 0.5


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"register_mean": None}, "test features have no register_mean: the model has no registers"),
        ({"register_mean": torch.zeros(NUM_IMAGES, 7)}, r"register_mean of the test features .* \(120, 7\)"),
        ({"register_mean": torch.full((NUM_IMAGES, HIDDEN_SIZE), torch.nan)}, "test features of image 0 are NaN"),
        ({"labels": None}, "test images have no labels"),
    ],
)
def test_what_cannot_be_is_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        out_of_distribution(features_of(), features_of()._replace(**changes), NUM_CLASSES, Cs=(1.0,))


def test_sets_and_probes_are_named():
    train = features_of()
    with pytest.raises(ValueError, match="shifted 'night' images have no labels"):
        out_of_distribution(train, train, NUM_CLASSES, shifted={"night": features_of(labelled=False)})
    with pytest.raises(ValueError, match="outlier 'noise' features have no register_mean"):
        out_of_distribution(train, train, NUM_CLASSES, outliers={"noise": train._replace(register_mean=None)})
    with pytest.raises(ValueError, match="got 'knn'"):
        out_of_distribution(train, train, NUM_CLASSES, probe="knn")
