# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Ridge regression from streamed sums, with a penalty chosen between two folds, solved exactly."""

import math
from dataclasses import dataclass

import torch

from .accumulate import ROWS_AT_ONCE, Moments


PENALTIES = tuple(10.0**exponent for exponent in range(-8, 3))  # in units of the variance of a feature
PENALTY_WITHOUT_FOLDS = 1e-2  # where there is only one fold


@dataclass(frozen=True, eq=False)
class LinearMap:
    """`features @ weight + bias`, with weight `(dim, num_targets)` and the ridge penalty it was fitted with."""

    weight: torch.Tensor
    bias: torch.Tensor
    penalty: float

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        return features.double() @ self.weight + self.bias


class RidgeRegression:
    """Least squares with an intercept and a penalty on the weights, from sums over two folds.

    For the standardized features `z` it minimizes `mean |y - b - W z|^2 + penalty * |W|^2`.

    Args:
        num_classes: Where given, targets are classes and regressed as one-hot vectors.
    """

    def __init__(self, num_classes: int | None = None):
        self._num_classes = num_classes
        self._folds = (Moments(), Moments())

    @property
    def count(self) -> int:
        """Number of feature vectors seen."""
        return sum(fold.count for fold in self._folds)

    def update(self, features: torch.Tensor, targets: torch.Tensor, fold: int) -> None:
        """Adds features `(number, dim)` and targets `(number, num_targets)`, or classes `(number,)`.

        The fold is 0 or 1; tokens of one image belong into one.
        """
        for x, y in zip(features.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE)):
            if self._num_classes is not None:
                y = torch.nn.functional.one_hot(y, self._num_classes)
            self._folds[fold].update(x, y)

    def best_penalty(self) -> float:
        """The one that predicts either fold best from the other."""
        first, second = self._folds
        if not (first.count and second.count):
            return PENALTY_WITHOUT_FOLDS
        errors = _path_errors(first, second) + _path_errors(second, first)
        # the largest of those that are equally good but for rounding
        rounding = 1e-9 * errors.min().abs() + 1e-12 * sum(fold.target_variance * fold.count for fold in self._folds)
        return PENALTIES[int((errors <= errors.min() + rounding).nonzero().max())]

    def fit(self, penalty: float | None = None) -> LinearMap:
        """The solution for the features of both folds, with `best_penalty` where none is given."""
        return _Problem(self._folds[0] + self._folds[1]).solve(self.best_penalty() if penalty is None else penalty)


class _Problem:
    """The regression on standardized features."""

    def __init__(self, moments: Moments):
        self.feature_mean, self.target_mean = moments.mean, moments.target_mean
        covariance = moments.covariance
        variance = covariance.diagonal()
        # what is left of a constant channel is rounding
        is_constant = variance <= 1e-24 * self.feature_mean.square()
        self.scale = variance.sqrt().masked_fill(is_constant, math.inf)
        self.correlation = covariance / torch.outer(self.scale, self.scale)
        self.cross = moments.cross_covariance / self.scale[:, None]

    def solve(self, penalty: float) -> LinearMap:
        penalized = self.correlation + penalty * torch.eye(len(self.scale), dtype=torch.float64)
        weight = torch.cholesky_solve(self.cross, torch.linalg.cholesky(penalized)) / self.scale[:, None]
        return LinearMap(weight, self.target_mean - self.feature_mean @ weight, penalty)

    def path_errors(self, other: Moments) -> torch.Tensor:
        """Mean squared error on the vectors of other moments, which are all that it takes, for every penalty.

        In the basis that makes the correlation diagonal, where a penalty shrinks every direction for itself.
        """
        values, vectors = torch.linalg.eigh(self.correlation)
        basis = vectors / self.scale[:, None]
        targets = vectors.T @ self.cross
        feature_shift, target_shift = other.mean - self.feature_mean, other.target_mean - self.target_mean
        second_moment = basis.T @ (other.covariance + torch.outer(feature_shift, feature_shift)) @ basis
        cross = basis.T @ (other.cross_covariance + torch.outer(feature_shift, target_shift))
        quadratic, linear = second_moment * (targets @ targets.T), (cross * targets).sum(1)
        shrunk = 1 / (values.clamp(min=0) + torch.tensor(PENALTIES, dtype=torch.float64)[:, None])
        explained = 2 * shrunk @ linear - ((shrunk @ quadratic) * shrunk).sum(1)
        return other.target_variance + target_shift.square().sum() - explained


def _path_errors(fitted: Moments, tested: Moments) -> torch.Tensor:
    """Squared errors of every penalty, summed over the tested fold."""
    return _Problem(fitted).path_errors(tested) * tested.count
