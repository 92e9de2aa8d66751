# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Whether registers help a linear probe away from its training distribution.

A probe on CLS is compared with one on CLS and the mean of the registers, side by side ("Leveraging Registers in
Vision Transformers for Robust Adaptation", arXiv:2501.04784): accuracy on images of the training distribution and on
shifted ones, and how well the largest logit tells images of unknown classes.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from sklearn.metrics import roc_auc_score, roc_curve

from .labelled import ImageFeatures, require_features, require_labels, require_width
from .linear import linear_sweep
from .logistic import logistic_sweep


CLS, CLS_AND_REGISTERS = "cls", "cls + register mean"
TRUE_POSITIVE_RATE = 0.95


class AnomalyScore(NamedTuple):
    """How well a score tells images of known classes from outliers.

    Attributes:
        fpr95: Share of the outliers that are taken for known where 95 % of the known images are; smaller is better.
        auroc: Probability that a known image scores higher than an outlier; 0.5 is chance.
    """

    fpr95: float
    auroc: float


class ProbeResult(NamedTuple):
    """What a probe achieved.

    Attributes:
        accuracy: Share of the test images that are classified correctly.
        shifted_accuracies: The same of each shifted set.
        anomalies: Of each set of outliers, against the test images.
        chosen: What the probe chose on held-out training images, for people: `C = 1`.
    """

    accuracy: float
    shifted_accuracies: dict[str, float]
    anomalies: dict[str, AnomalyScore]
    chosen: str


def out_of_distribution(
    train: ImageFeatures,
    test: ImageFeatures,
    num_classes: int,
    *,
    shifted: Mapping[str, ImageFeatures] | None = None,
    outliers: Mapping[str, ImageFeatures] | None = None,
    probe: Literal["logistic", "linear"] = "logistic",
    seed: int = 0,
    device: torch.device | str | None = None,
    accelerator: Accelerator | None = None,
    **options: Any,
) -> dict[str, ProbeResult]:
    """Trains both probes on the last layer and measures them on all sets.

    What a probe has to choose, its C or its learning rate, it chooses on held-out training images: neither the test
    images nor any shifted set has a part in it.

    Args:
        train, test: Of one distribution, with labels and `register_mean`.
        num_classes: Number of classes.
        shifted: Other images of the same classes, by name, with their labels.
        outliers: Images of none of the classes, by name; labels are not read.
        probe: `"logistic"`, `logistic_sweep`, or `"linear"`, the heads of `linear_sweep`.
        seed: Of the held-out images, and of the linear heads.
        device: Where to compute; by default the accelerator's, else that of the features.
        accelerator: Of the processes that share the linear heads.
        options: Further ones of the sweep.

    Returns:
        `"cls"` and `"cls + register mean"`, each with its result.

    Raises:
        ValueError: If a set has no registers or no labels, or for what the sweeps refuse.
    """
    fits = {"logistic": _logistic_probe, "linear": _linear_probe}
    if probe not in fits:
        raise ValueError(f'probe must be "logistic" or "linear", got {probe!r}.')
    shifted, outliers = shifted or {}, outliers or {}
    images = {"training": train, "test": test}
    images |= {f"shifted {name!r}": features for name, features in shifted.items()}
    images |= {f"outlier {name!r}": features for name, features in outliers.items()}
    inputs = {name: _probe_inputs(features, name) for name, features in images.items()}
    labels = {
        name: require_labels(features.labels, len(features.cls), num_classes, name)
        for name, features in images.items()
        if not name.startswith("outlier")
    }
    device = accelerator.device if device is None and accelerator is not None else device
    results = {}
    for kind in (CLS, CLS_AND_REGISTERS):
        of_kind = {name: features[kind] for name, features in inputs.items()}
        _require_sets(of_kind)
        fit = fits[probe](of_kind, labels, num_classes, accelerator, {"seed": seed, "device": device, **options})
        results[kind] = _measure(fit, of_kind, labels, shifted, outliers)
    return results


def anomaly_score(known: torch.Tensor, outliers: torch.Tensor) -> AnomalyScore:
    """Scores from one number an image, larger for images that look known, `(num_images,)` each."""
    is_known = torch.cat([torch.ones(len(known)), torch.zeros(len(outliers))]).numpy()
    scores = torch.cat([known, outliers]).double().cpu().numpy()
    false_positives, true_positives, _ = roc_curve(is_known, scores, drop_intermediate=False)
    fpr95 = false_positives[(true_positives >= TRUE_POSITIVE_RATE).argmax()]
    return AnomalyScore(float(fpr95), float(roc_auc_score(is_known, scores)))


def _last_layer(features: torch.Tensor) -> torch.Tensor:
    return features[:, -1] if features.ndim == 3 else features


def _probe_inputs(features: ImageFeatures, name: str) -> dict[str, torch.Tensor]:
    """What each probe reads of a set, `(images, hidden_size)` and `(images, 2 * hidden_size)`."""
    if features.register_mean is None or not features.register_mean.numel():
        raise ValueError(
            f"The {name} features have no register_mean: the model has no registers, or they were not extracted. "
            "This comparison needs a model with register tokens."
        )
    cls, registers = _last_layer(features.cls), _last_layer(features.register_mean)
    if cls.shape != registers.shape:
        raise ValueError(
            f"cls and register_mean of the {name} features must be of the same images and channels, got "
            f"{tuple(cls.shape)} and {tuple(registers.shape)}."
        )
    return {CLS: cls, CLS_AND_REGISTERS: torch.cat([cls, registers], dim=1)}


def _require_sets(inputs: Mapping[str, torch.Tensor]) -> None:
    for name, features in inputs.items():
        require_features(features, name)
        require_width(features, inputs["training"].shape[1], name)


class _Fit(NamedTuple):
    logits: Callable[[torch.Tensor], torch.Tensor]
    chosen: str


def _logistic_probe(
    inputs: Mapping[str, torch.Tensor],
    labels: Mapping[str, torch.Tensor],
    num_classes: int,
    accelerator: Accelerator | None,
    options: dict[str, Any],
) -> _Fit:
    """Every process fits it whole."""
    sets = (inputs["training"], labels["training"], inputs["test"], labels["test"])
    best = logistic_sweep(*sets, num_classes, **options).best
    return _Fit(lambda features: best.logits(features, options["device"]), f"C = {best.C:g}")


def _linear_probe(
    inputs: Mapping[str, torch.Tensor],
    labels: Mapping[str, torch.Tensor],
    num_classes: int,
    accelerator: Accelerator | None,
    options: dict[str, Any],
) -> _Fit:
    """The heads of the linear sweep on one vector, which they take for the CLS of one layer."""
    train, test = (ImageFeatures(inputs[name], labels[name]) for name in ("training", "test"))
    fixed = {"layers": (1,), "patch_mean": (False,), "selection": "held_out"}
    best = linear_sweep(train, test, num_classes, accelerator=accelerator, **fixed, **options).best
    return _Fit(best.logits, f"lr {best.settings.learning_rate:g}")


def _measure(
    fit: _Fit,
    inputs: Mapping[str, torch.Tensor],
    labels: Mapping[str, torch.Tensor],
    shifted: Mapping[str, ImageFeatures],
    outliers: Mapping[str, ImageFeatures],
) -> ProbeResult:
    logits = {name: fit.logits(features) for name, features in inputs.items() if name != "training"}
    accuracies = {name: _accuracy(logits[name], labels[name]) for name in logits if name in labels}
    known = logits["test"].amax(dim=1)
    return ProbeResult(
        accuracy=accuracies["test"],
        shifted_accuracies={name: accuracies[f"shifted {name!r}"] for name in shifted},
        anomalies={name: anomaly_score(known, logits[f"outlier {name!r}"].amax(dim=1)) for name in outliers},
        chosen=fit.chosen,
    )


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(dim=1) == labels).double().mean().item()
