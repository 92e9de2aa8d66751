# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Multinomial logistic regression on frozen features by L-BFGS, with the penalty chosen on held-out images.

The objective is scikit-learn's, `C * sum of cross entropies + ||weight||^2 / 2` with an unpenalized bias, so that a C
means the same in both; the values of C and how one is chosen are DINOv2's, on many data sets (section 7.1).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import cross_entropy, normalize

from .labelled import (
    held_out_split,
    probe_device,
    require_every_class,
    require_features,
    require_labels,
    require_width,
    rows_in_chunks,
)


CS = tuple((10 ** torch.linspace(-6, 5, 45, dtype=torch.float64)).tolist())
Normalization = Literal["none", "l2", "standardize"]
NORMALIZATIONS = ("none", "l2", "standardize")
CHUNK_SIZE = 8192
# features smaller than this are converted once and stay on the device; larger ones anew in every evaluation
MAX_RESIDENT_BYTES = 4 << 30
HISTORY_SIZE = 10
# torch's L-BFGS forgets steps whose product with the change of the gradient is below 1e-10, as those of a mean over
# images are long before it has converged. Scaled by this it takes as few evaluations as scipy's.
OBJECTIVE_SCALE = 1e6


class LogisticModel(NamedTuple):
    """A fitted classifier. It reads `(features - shift) / scale`, after L2 normalization where that was asked for.

    Attributes:
        weight: `(num_classes, hidden_size)` on the CPU: scikit-learn's `coef_`. With two classes its rows are minus
            and plus one half of scikit-learn's only row.
        bias: `(num_classes,)`.
        C: Inverse strength of the penalty.
        normalization: Of the features: `"none"`, `"l2"` or `"standardize"`.
        shift, scale: `(hidden_size,)`; 0 and 1 unless standardized.
        max_gradient: Largest element of the gradient of the mean objective at the end; more than the tolerance where
            the iterations did not suffice, or nothing more could be gained.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    C: float
    normalization: Normalization
    shift: torch.Tensor
    scale: torch.Tensor
    max_gradient: float

    def logits(self, features: torch.Tensor, device: torch.device | str | None = None) -> torch.Tensor:
        """`(images, hidden_size) -> (images, num_classes)` on the CPU, in the dtype of the weights."""
        device = probe_device(device, None, features)
        prepare = _Preparation(self.normalization, self.shift, self.scale, device)
        weight, bias = self.weight.to(device), self.bias.to(device)
        chunks = (prepare(features[rows]) for rows in rows_in_chunks(len(features), CHUNK_SIZE))
        return torch.cat([torch.addmm(bias, chunk, weight.T).cpu() for chunk in chunks])

    def accuracies(
        self, features: torch.Tensor, labels: torch.Tensor, device: torch.device | str | None = None
    ) -> tuple[float, float]:
        """Shares of the images whose class is predicted, and is among the five likeliest (or all, if fewer)."""
        likeliest = self.logits(features, device).topk(min(5, len(self.bias)), dim=1).indices
        is_true = likeliest == torch.as_tensor(labels).cpu()[:, None]
        return is_true[:, 0].double().mean().item(), is_true.any(dim=1).double().mean().item()


class LogisticSweep(NamedTuple):
    """What a sweep over C found.

    Attributes:
        held_out_accuracies: Of each C, in ascending order, on the held-out images.
        best: Fitted to all training images with the best C, the smallest among equals.
        top1, top5: Shares of the validation images whose class is predicted, and is among the five likeliest.
    """

    held_out_accuracies: dict[float, float]
    best: LogisticModel
    top1: float
    top5: float


def fit_logistic(
    features: torch.Tensor,
    labels: torch.Tensor | Sequence[int],
    num_classes: int,
    C: float = 1.0,
    *,
    normalization: Normalization = "none",
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    start: LogisticModel | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> LogisticModel:
    """Minimizes `C * sum of cross entropies + ||weight||^2 / 2` by L-BFGS with a strong Wolfe line search.

    With two classes the penalty is doubled, which gives the probabilities of scikit-learn's binary regression.

    Args:
        features: `(num_images, hidden_size)`, in memory or memory-mapped.
        labels: `(num_images,)`, 0 to `num_classes - 1`.
        num_classes: Number of classes.
        C: Inverse strength of the penalty.
        normalization: `"l2"` makes every image's features a unit vector; `"standardize"` gives every channel mean 0
            and variance 1 over the training images.
        max_iterations: Of L-BFGS.
        tolerance: It stops where no element of the gradient of the mean objective is larger. Rounding ends the
            descent near 1e-8 in float64.
        start: A model of the same sizes, from which it goes on.
        dtype: To compute in. DINOv2 takes float64, which MPS has not.
        device: Where to compute; by default that of the features.

    Raises:
        ValueError: If features are NaN or shapes do not fit, a label is out of range, a class has no image, or an
            option is not among those allowed.
    """
    labels = _checked(features, labels, num_classes)
    images = torch.arange(len(labels))
    device = probe_device(device, None, features)
    problem = _Problem(features, labels, images, num_classes, normalization, dtype, device)
    return problem.minimize(C, max_iterations, tolerance, start)


def logistic_sweep(
    train_features: torch.Tensor,
    train_labels: torch.Tensor | Sequence[int],
    validation_features: torch.Tensor,
    validation_labels: torch.Tensor | Sequence[int],
    num_classes: int,
    *,
    Cs: Sequence[float] = CS,
    held_out_share: float = 0.1,
    normalization: Normalization = "none",
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
    on_fit: Callable[[int, int], None] | None = None,
) -> LogisticSweep:
    """Chooses C on a share of the training images, fits to all of them, and scores on the validation images.

    From the smallest C to the largest each fit starts where the last one ended. That makes them one sequence: of
    several processes each would do all of it, and get the same.

    Args:
        train_features, validation_features: `(images, hidden_size)`, in memory or memory-mapped.
        train_labels, validation_labels: `(images,)`, 0 to `num_classes - 1`.
        num_classes: Number of classes.
        Cs: To choose from.
        held_out_share: Of the training images of each class.
        normalization, max_iterations, tolerance, dtype, device: As in `fit_logistic`.
        seed: Of the images that are held out.
        on_fit: Called with the fits done and their number.

    Raises:
        ValueError: As `fit_logistic`, for both sets.
    """
    labels = _checked(train_features, train_labels, num_classes)
    require_features(validation_features, "validation")
    require_width(validation_features, train_features.shape[1], "validation")
    validation_labels = require_labels(validation_labels, len(validation_features), num_classes, "validation")
    if not Cs:
        raise ValueError("Cs must hold at least one value to choose from.")
    kept, held_out = held_out_split(labels, held_out_share, seed)
    device = probe_device(device, None, train_features)
    problem = _Problem(train_features, labels, kept, num_classes, normalization, dtype, device)
    models, scores = {}, {}
    model = None
    for C in sorted(set(Cs)):
        models[C] = model = problem.minimize(C, max_iterations, tolerance, model)
        scores[C] = _accuracy_of(model, train_features, labels, held_out, device)
        if on_fit is not None:
            on_fit(len(models), len(set(Cs)) + 1)
    best_C = max(scores, key=lambda C: (scores[C], -C))
    everything = torch.arange(len(labels))
    problem = _Problem(train_features, labels, everything, num_classes, normalization, dtype, device)
    best = problem.minimize(best_C, max_iterations, tolerance, models[best_C])
    if on_fit is not None:
        on_fit(len(models) + 1, len(models) + 1)
    return LogisticSweep(scores, best, *best.accuracies(validation_features, validation_labels, device))


def _checked(features: torch.Tensor, labels: torch.Tensor | Sequence[int], num_classes: int) -> torch.Tensor:
    require_features(features, "training")
    if num_classes < 2:
        raise ValueError(f"There must be two classes or more to tell apart, got num_classes={num_classes}.")
    labels = require_labels(labels, len(features), num_classes, "training")
    require_every_class(labels, num_classes, "training")
    return labels


def _accuracy_of(
    model: LogisticModel, features: torch.Tensor, labels: torch.Tensor, images: torch.Tensor, device: torch.device
) -> float:
    """Top-1 on the images with these indices, which are read in chunks."""
    correct = 0.0
    for rows in rows_in_chunks(len(images), CHUNK_SIZE):
        chosen = images[rows]
        correct += model.accuracies(features[chosen.to(features.device)], labels[chosen], device)[0] * len(chosen)
    return correct / len(images)


class _Preparation(NamedTuple):
    """What happens to features before the linear layer."""

    normalization: Normalization
    shift: torch.Tensor
    scale: torch.Tensor
    device: torch.device

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        features = features.to(device=self.device, dtype=self.shift.dtype)
        if self.normalization == "l2":
            return normalize(features)
        if self.normalization == "standardize":
            return (features - self.shift.to(self.device)) / self.scale.to(self.device)
        return features


class _Problem:
    """The mean cross entropy of the images with these indices, its gradient, and its minimum under a penalty."""

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        images: torch.Tensor,
        num_classes: int,
        normalization: Normalization,
        dtype: torch.dtype,
        device: torch.device,
    ):
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}.")
        self.features, self.images, self.num_classes = features, images, num_classes
        self.sizes = {"dtype": dtype, "device": device}
        self.labels = labels[images].to(device)
        hidden_size = features.shape[1]
        shift, scale = torch.zeros(hidden_size, dtype=dtype), torch.ones(hidden_size, dtype=dtype)
        self.prepare = _Preparation(normalization, shift, scale, device)
        if normalization == "standardize":
            self.prepare = self.prepare._replace(**_moments(self._read, len(images), hidden_size, dtype, device))
        self.resident = None
        if len(images) * hidden_size * dtype.itemsize <= MAX_RESIDENT_BYTES:
            self.resident = list(self._chunks())

    def _read(self) -> Iterator[torch.Tensor]:
        for rows in rows_in_chunks(len(self.images), CHUNK_SIZE):
            yield self.features[self.images[rows].to(self.features.device)]

    def _chunks(self) -> Iterator[torch.Tensor]:
        return (self.prepare(chunk) for chunk in self._read())

    def minimize(self, C: float, max_iterations: int, tolerance: float, start: LogisticModel | None) -> LogisticModel:
        """The minimum of the cross entropy plus `||weight||^2 / (2 * C * num_images)`."""
        if not (0 < C < float("inf") and max_iterations >= 1 and tolerance >= 0):
            raise ValueError(
                f"C must be positive, max_iterations 1 or more and tolerance 0 or more, got {C}, {max_iterations} "
                f"and {tolerance}."
            )
        penalty = (2 if self.num_classes == 2 else 1) / (C * len(self.images))
        weight = torch.zeros(self.num_classes, self.features.shape[1], **self.sizes)
        bias = torch.zeros(self.num_classes, **self.sizes)
        if start is not None:
            weight, bias = start.weight.to(**self.sizes, copy=True), start.bias.to(**self.sizes, copy=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=max_iterations,
            max_eval=25 * max_iterations,
            tolerance_grad=tolerance * OBJECTIVE_SCALE,
            tolerance_change=0,
            history_size=HISTORY_SIZE,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: self._evaluate(weight, bias, penalty))
        self._evaluate(weight, bias, penalty)  # the last evaluation may have been a point of the line search
        max_gradient = max(weight.grad.abs().max().item(), bias.grad.abs().max().item()) / OBJECTIVE_SCALE
        normalization, shift, scale, _ = self.prepare
        return LogisticModel(weight.detach().cpu(), bias.detach().cpu(), C, normalization, shift, scale, max_gradient)

    def _evaluate(self, weight: torch.Tensor, bias: torch.Tensor, penalty: float) -> torch.Tensor:
        """The scaled objective; its gradient is left in `grad`. In closed form: no graph is kept for any chunk."""
        weight.grad, bias.grad = penalty * weight, torch.zeros_like(bias)
        loss = penalty / 2 * weight.square().sum()
        start = 0
        for chunk in self._chunks() if self.resident is None else self.resident:
            labels = self.labels[start : start + len(chunk)]
            start += len(chunk)
            logits = torch.addmm(bias, chunk, weight.T)
            loss += cross_entropy(logits, labels, reduction="sum") / len(self.images)
            gradient = logits.softmax(dim=1)
            gradient[torch.arange(len(chunk), device=labels.device), labels] -= 1
            gradient /= len(self.images)
            weight.grad.addmm_(gradient.T, chunk)
            bias.grad += gradient.sum(dim=0)
        weight.grad *= OBJECTIVE_SCALE
        bias.grad *= OBJECTIVE_SCALE
        return OBJECTIVE_SCALE * loss


def _moments(
    read: Callable[[], Iterator[torch.Tensor]],
    num_images: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Mean and standard deviation of every channel, on the CPU; 1 for a channel that never changes.

    In two passes: a mean that is far from 0 would take the precision of the variance with it.
    """
    mean = torch.zeros(hidden_size, dtype=dtype, device=device)
    for chunk in read():
        mean += chunk.to(device=device, dtype=dtype).sum(dim=0) / num_images
    variance = torch.zeros_like(mean)
    for chunk in read():
        variance += (chunk.to(device=device, dtype=dtype) - mean).square().sum(dim=0) / num_images
    # what rounding leaves of a constant channel is no signal
    is_constant = variance.sqrt() <= 10 * torch.finfo(dtype).eps * mean.abs().clamp_min(torch.finfo(dtype).tiny)
    return {"shift": mean.cpu(), "scale": variance.sqrt().masked_fill(is_constant, 1).cpu()}
