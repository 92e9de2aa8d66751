# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What measurements that see images batch by batch share: sums in float64, smooth histograms, and inputs refused.

Sums of float32 values in float64 lose nothing that shows, so it does not matter how the images are cut into batches.
"""

from collections.abc import Iterator

import torch


ROWS_AT_ONCE = 1024  # of float64 copies: 6 MB at 768 channels


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Raises `ValueError` where a value is NaN or infinite."""
    finite = torch.isfinite(tensor)
    if not finite.all():
        raise ValueError(
            f"{name} must be finite, but {int((~finite).sum())} of {tensor.numel()} values are NaN or infinite. "
            "Check the model and its input; in float16 tokens overflow easily, bfloat16 and float32 hold them."
        )


def require_shape(tensor: torch.Tensor, name: str, *sizes: int | str) -> None:
    """Raises `ValueError` unless the tensor has these sizes; a word in place of a number stands for any size."""
    if tensor.ndim != len(sizes) or any(
        isinstance(size, int) and size != actual for size, actual in zip(sizes, tensor.shape)
    ):
        expected = ", ".join(map(str, sizes))
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(tensor.shape)}.")


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """Without its graph, and on the CPU where its own device has no float64."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def float64_rows(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of equally many rows, some rows at a time, in float64."""
    for rows in zip(*(tensor.split(ROWS_AT_ONCE) for tensor in tensors)):
        yield tuple(in_float64(part) for part in rows)


def add_to_bins(counts: torch.Tensor, positions: torch.Tensor) -> None:
    """Counts every value in the two bins whose centres are nearest, in proportion, so that bins fill smoothly.

    Where a value moves by the last bits that another batch size changes in a forward pass, counts move as little;
    with one bin a value, a token at the border of two would change bins.

    Args:
        counts: `(series, num_bins)` in float64, changed in place.
        positions: `(series, number)` in float64, in units of bins: 0 is the centre of the first. What lies outside is
            counted in the first or the last bin.
    """
    positions = positions.clamp(0, counts.shape[1] - 1)
    lower = positions.long()
    upper = (lower + 1).clamp(max=counts.shape[1] - 1)
    upper_share = positions - lower
    counts.scatter_add_(1, lower, 1 - upper_share)
    counts.scatter_add_(1, upper, upper_share)


class Moments:
    """Means and covariances of feature vectors, and of targets that go with them.

    Parts are centred before they are added (Chan et al., 1979), so that no precision goes where means are large beside
    standard deviations, as in some channels of tokens.
    """

    def __init__(self):
        self.count = 0
        # filled at the first vectors, on their device
        self._feature_mean = self._target_mean = self._features = self._cross = self._targets = None

    def update(self, features: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """Adds `(number, dim)` with, in every update or in none, `(number, num_targets)`."""
        for x, y in float64_rows(features, features[:, :0] if targets is None else targets):
            if not len(x):
                continue
            means = x.mean(0), y.mean(0)
            x, y = x - means[0], y - means[1]
            self._move_means(len(x), *means)
            # in place: there are dozens of these, and new ones in every batch would leave the memory in pieces
            self._features.addmm_(x.T, x)
            self._cross.addmm_(x.T, y)
            self._targets += y.square().sum()

    def __add__(self, other: "Moments") -> "Moments":
        total = Moments()
        for part in (self, other):
            if part.count:
                total._move_means(part.count, part._feature_mean, part._target_mean)
                total._features += part._features
                total._cross += part._cross
                total._targets += part._targets
        return total

    def _move_means(self, count: int, feature_mean: torch.Tensor, target_mean: torch.Tensor) -> None:
        """To those of all vectors, with what the distance between both means adds to the sums of squares."""
        if not self.count:
            dim, num_targets = len(feature_mean), len(target_mean)
            self._feature_mean, self._target_mean = feature_mean.clone(), target_mean.clone()
            self._features = feature_mean.new_zeros(dim, dim)
            self._cross = feature_mean.new_zeros(dim, num_targets)
            self._targets = feature_mean.new_zeros(())
        feature_shift, target_shift = feature_mean - self._feature_mean, target_mean - self._target_mean
        weight = self.count * count / (self.count + count)
        self.count += count
        self._feature_mean += feature_shift * (count / self.count)
        self._target_mean += target_shift * (count / self.count)
        self._features.addr_(feature_shift, feature_shift, alpha=weight)
        self._cross.addr_(feature_shift, target_shift, alpha=weight)
        self._targets += weight * target_shift.square().sum()

    @property
    def mean(self) -> torch.Tensor:
        """Of the features, `(dim,)`. All results are in float64 and on the CPU, over the count and not one less."""
        return self._feature_mean.cpu()

    @property
    def covariance(self) -> torch.Tensor:
        """Of the features, `(dim, dim)`."""
        return self._features.cpu() / self.count

    @property
    def target_mean(self) -> torch.Tensor:
        """`(num_targets,)`"""
        return self._target_mean.cpu()

    @property
    def cross_covariance(self) -> torch.Tensor:
        """`(dim, num_targets)`"""
        return self._cross.cpu() / self.count

    @property
    def target_variance(self) -> torch.Tensor:
        """Summed over the targets."""
        return self._targets.cpu() / self.count
