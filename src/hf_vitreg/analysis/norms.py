# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Norms of tokens and their statistics at every layer, over any number of images in one pass.

Tokens are taken before the final norm, which hides the outliers ("Vision Transformers Need Registers", section 2.1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from .accumulate import add_to_bins, in_float64, require_finite


Side = Literal["high", "low"]

MAD_TO_STD = 1.4826  # of a normal distribution
# Bins are the leading bits of a float32: 512 between two powers of two, of a width of 1/512 to 1/1024 of their norm
MANTISSA_BITS = 9
DROPPED_BITS = 23 - MANTISSA_BITS
FIRST_OCTAVE, LAST_OCTAVE = -20, 20
FIRST_BIN = (127 + FIRST_OCTAVE) << MANTISSA_BITS
NUM_BINS = (LAST_OCTAVE - FIRST_OCTAVE) << MANTISSA_BITS
EDGES = ((np.arange(NUM_BINS + 1, dtype=np.int32) + FIRST_BIN) << DROPPED_BITS).view(np.float32).astype(np.float64)
RESOLUTION = 2.0**-MANTISSA_BITS


def token_norms(tokens: torch.Tensor) -> torch.Tensor:
    """Euclidean length of every token in float32, whatever the dtype: `(..., dim) -> (...)`."""
    return torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=torch.float32)


class NormStatistics:
    """Norms of tokens at every layer, over any number of images, in 160 KB a layer and kind.

    Count, mean, standard deviation, minimum and maximum are exact. The histogram has bins of at most 0.2 % of their
    norm, between 1e-6 and 1e6; a norm is counted in the two nearest bins in proportion, one and a half bins away at
    most. So a quantile is off by at most 0.3 %, typically by a tenth of that, and the share beyond a threshold is
    exact where no norm lies within 0.3 % of it.
    """

    def __init__(self):
        self._kinds: dict[str, _LayerSums] = {}

    def update(self, norms: Mapping[str, torch.Tensor]) -> None:
        """Adds a batch.

        Args:
            norms: For every kind of token (`"patch"`, `"cls"`, `"register_1"` …, or any other name) the norms at every
                layer, `(num_layers, ...)`; the other axes are images and tokens, and may be of length 0.

        Raises:
            ValueError: If a norm is negative, NaN or infinite, or a kind comes with another number of layers.
        """
        _require_norms(norms)
        for kind, values in norms.items():
            sums = self._kinds.setdefault(kind, _LayerSums(len(values)))
            if len(values) != sums.num_layers:
                raise ValueError(f"{kind} tokens had {sums.num_layers} layers before and have {len(values)} now.")
            sums.update(in_float64(values.float()).reshape(len(values), math.prod(values.shape[1:])))

    @property
    def kinds(self) -> list[str]:
        """The kinds of tokens seen."""
        return list(self._kinds)

    def distributions(self, kind: str = "patch") -> list["NormDistribution"]:
        """One for every layer.

        Raises:
            ValueError: If there were no tokens of this kind.
        """
        if kind not in self._kinds:
            raise ValueError(
                f"There are no {kind!r} tokens, only {', '.join(map(repr, self._kinds)) or 'none at all'}."
            )
        return self._kinds[kind].distributions()


def _require_norms(norms: Mapping[str, torch.Tensor]) -> None:
    # asked once for all kinds, because a GPU waits for every answer
    if norms and not torch.stack([((values >= 0) & (values < math.inf)).all() for values in norms.values()]).all():
        for kind, values in norms.items():
            require_finite(values, f"Norms of {kind} tokens")
        raise ValueError("Norms must not be negative.")


class _LayerSums:
    """What `NormStatistics` keeps of one kind of token."""

    def __init__(self, num_layers: int):
        self.num_layers = num_layers
        self._count = 0
        # filled at the first tokens, on their device
        self._counts = self._sums = self._squares = self._minima = self._maxima = None

    def update(self, norms: torch.Tensor) -> None:
        """Adds `(num_layers, number)` in float64, of float32 values."""
        if not norms.shape[1]:
            return
        if self._counts is None:
            self._counts = norms.new_zeros(self.num_layers, NUM_BINS)
            self._sums, self._squares = norms.new_zeros(2, self.num_layers)
            self._minima, self._maxima = norms[:, 0], norms[:, 0]
        self._count += norms.shape[1]
        self._sums += norms.sum(1)
        self._squares += norms.square().sum(1)
        self._minima = torch.minimum(self._minima, norms.amin(1))
        self._maxima = torch.maximum(self._maxima, norms.amax(1))
        # all terms are multiples of 2**-14, so their sums are exact in any order, on a GPU too
        bits = norms.float().view(torch.int32).double()
        add_to_bins(self._counts, bits / 2**DROPPED_BITS - FIRST_BIN - 0.5)

    def distributions(self) -> list["NormDistribution"]:
        if self._counts is None:
            return [NormDistribution(np.zeros(NUM_BINS), 0, *[math.nan] * 4)] * self.num_layers
        means = self._sums / self._count
        # never below 0, where rounding would put equal norms
        deviations = (self._squares / self._count - means.square()).clamp(min=0).sqrt()
        columns = (means, deviations, self._minima, self._maxima)
        rows = zip(self._counts.cpu().numpy().copy(), *(column.tolist() for column in columns))
        return [NormDistribution(counts, self._count, *numbers) for counts, *numbers in rows]


@dataclass(frozen=True, eq=False)
class NormDistribution:
    """The norms of one kind of token at one layer: see `NormStatistics` for what is exact.

    Attributes:
        counts: Tokens in every bin between `EDGES`, `(NUM_BINS,)`.
        count: Number of tokens.
        mean, std: Of the norms; the standard deviation is over `count`. NaN where there is no token.
        minimum, maximum: Likewise.
    """

    counts: np.ndarray
    count: int
    mean: float
    std: float
    minimum: float
    maximum: float

    def quantile(self, share: float) -> float:
        """The norm that this share of the tokens does not exceed; NaN where there is no token."""
        if not self.count:
            return math.nan
        return float(np.clip(self.on("high").quantile(share), self.minimum, self.maximum))

    def histogram(self, edges: Sequence[float]) -> np.ndarray:
        """Tokens between any ascending norms, as for a plot: `len(edges) - 1` counts."""
        return np.diff(self.on("high").cumulative(edges))

    def share_beyond(self, threshold: float, side: Side = "high") -> float:
        """Share of the tokens above a norm, on the low side below it; NaN where there is no token."""
        if not self.count:
            return math.nan
        below, beyond = self.on(side).split(scaled(threshold, side))
        return float(beyond.total / (below.total + beyond.total))

    def summary(self) -> dict[str, float]:
        """The numbers of a table."""
        return {
            "count": self.count,
            "mean": self.mean,
            "std": self.std,
            "min": self.minimum,
            "median": self.quantile(0.5),
            "max": self.maximum,
        }

    def on(self, side: Side) -> "BinnedValues":
        """The counts on the scale of a side, see `scaled`."""
        if require_side(side) == "low":
            return _trimmed(scaled(EDGES, side)[::-1], self.counts[::-1], RESOLUTION)
        values = _trimmed(EDGES, self.counts, 0.0)
        return BinnedValues(values.edges, values.counts, RESOLUTION * values.quantile(0.5) if self.count else 0.0)


def require_side(side: str) -> Side:
    """The side. Raises `ValueError` for other words."""
    if side not in ("high", "low"):
        raise ValueError(f'side must be "high" or "low", got {side!r}.')
    return side


def scaled(norms: np.ndarray | float, side: Side) -> np.ndarray | float:
    """Norms on the scale that a side is measured on, where outliers are far up.

    On the high side they are what they are, on the low side the negative of their logarithms: norms end at 0, so that
    on their own scale no token could be far below the others. Everything else is then the same on both sides.
    """
    return norms if side == "high" else -np.log(np.maximum(norms, EDGES[0]))


def unscaled(value: float, side: Side) -> float:
    """The norm that `scaled` made this of."""
    return float(value if side == "high" else np.exp(-value))


@dataclass(frozen=True, eq=False)
class BinnedValues:
    """Counts between ascending edges; within a bin values are spread evenly.

    Attributes:
        edges: `(num_bins + 1,)`, on the scale of a side.
        counts: `(num_bins,)`, none at the ends 0. Empty where there is no token.
        resolution: The smallest spread that the bins can tell.
    """

    edges: np.ndarray
    counts: np.ndarray
    resolution: float

    @property
    def total(self) -> float:
        """Number of tokens."""
        return float(self.counts.sum())

    def cumulative(self, values: np.ndarray | Sequence[float] | float) -> np.ndarray:
        """Number of tokens up to each of these values."""
        return np.interp(values, self.edges, np.concatenate([[0], self.counts.cumsum()]))

    def quantile(self, share: float) -> float:
        """The value that this share of the tokens does not exceed."""
        cumulative = self.counts.cumsum()
        target = share * cumulative[-1]
        index = min(np.searchsorted(cumulative, target), len(self.counts) - 1)
        within = 1 - (cumulative[index] - target) / self.counts[index]
        return float(self.edges[index] + within * (self.edges[index + 1] - self.edges[index]))

    def split(self, value: float) -> tuple["BinnedValues", "BinnedValues"]:
        """The tokens up to a value, and those beyond."""
        value = np.clip(value, self.edges[0], self.edges[-1])
        below = np.append(self.edges[self.edges < value], value)
        beyond = np.insert(self.edges[self.edges > value], 0, value)
        return tuple(_trimmed(edges, np.diff(self.cumulative(edges)), self.resolution) for edges in (below, beyond))

    @property
    def spread(self) -> float:
        """Standard deviation by the median absolute deviation, but no less than the resolution."""
        median = self.quantile(0.5)
        low, high = 0.0, float(self.edges[-1] - self.edges[0])
        for _ in range(60):
            deviation = (low + high) / 2
            inside = self.cumulative(median + deviation) - self.cumulative(median - deviation)
            low, high = (deviation, high) if inside < self.total / 2 else (low, deviation)
        return max(MAD_TO_STD * high, self.resolution)


def _trimmed(edges: np.ndarray, counts: np.ndarray, resolution: float) -> BinnedValues:
    """Without the empty bins at both ends."""
    filled = np.flatnonzero(counts)
    if not len(filled):
        return BinnedValues(edges[:1], counts[:0], resolution)
    return BinnedValues(edges[filled[0] : filled[-1] + 2], counts[filled[0] : filled[-1] + 1], resolution)
