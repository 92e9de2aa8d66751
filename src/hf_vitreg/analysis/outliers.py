# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Outliers among the norms of tokens: the threshold, the layer where they split off, and whether they are artifacts.

Artifacts have high norms in most models and low norms in some CLIPs, so that there is a high and a low side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from .norms import BinnedValues, NormDistribution, Side, require_side, scaled, unscaled


ThresholdMethod = Literal["mean+3std", "mad", "otsu"]

# A normal distribution has 3 tokens in 10 million beyond 5 standard deviations, so what is beyond is not its tail. Of
# norms that vary by a fifth it is twice the median, where the models of the paper have their gap (figure 7).
MAD_FACTOR = 5.0
MIN_DISTANCE = MAD_FACTOR
MIN_RATIO = 1.5  # the smallest that the paper shows is about 2 (DeiT-III-B)
MIN_SHARE, MAX_SHARE = 0.001, 0.5  # the paper's DINOv2-g has 0.0237
MIN_BIMODALITY = 0.5
MIN_SIGNIFICANCE = 3.0
VALLEY_WINDOWS = 4  # windows between the two medians, where the valley is looked for


def outlier_threshold(
    distribution: NormDistribution, threshold: float | ThresholdMethod = "mad", side: Side = "high"
) -> float:
    """The norm beyond which a token is an outlier.

    Args:
        distribution: The norms of the tokens at one layer.
        threshold: A number, which is returned (150 in the paper, chosen by eye for DINOv2-g), or a method:

            - `"mean+3std"`: mean plus 3 standard deviations. Outliers widen it: a group that holds a tenth of the
              tokens can never be beyond. A normal distribution has 0.13 % of its tokens beyond.
            - `"mad"`: median plus 5 times 1.4826 times the median absolute deviation, which is 5 standard deviations
              of a normal distribution. Outliers hardly widen it as long as they are few, however far they are. Where
              nearly all norms are equal the standard deviation is taken as 0.2 %, what the histogram can tell.
            - `"otsu"`: the split with the largest variance between both groups, in the middle of an empty gap (Otsu,
              1979). It always splits: one group in its middle, and so a group with outliers that are few or near. (A
              share of 0.5 % has to be about 12 standard deviations away.)
        side: `"low"` measures downwards, on logarithms: for `"mad"`, say, the median divided by
            `exp(5 * 1.4826 * MAD of the logarithms)`.

    Returns:
        The threshold as a norm.

    Raises:
        ValueError: If there is no token, or the threshold is neither a positive number nor one of the methods.
    """
    require_side(side)
    if not isinstance(threshold, str):
        if not (math.isfinite(threshold) and threshold > 0):
            raise ValueError(f"The threshold must be positive and finite, got {threshold}.")
        return float(threshold)
    if threshold not in _METHODS:
        raise ValueError(
            f"The threshold must be a number or one of {', '.join(map(repr, _METHODS))}, got {threshold!r}."
        )
    if not distribution.count:
        raise ValueError("There are no tokens whose norms could give a threshold.")
    if threshold == "mean+3std" and side == "high":
        return distribution.mean + 3 * distribution.std
    return unscaled(_METHODS[threshold](distribution.on(side)), side)


def outlier_mask(norms: torch.Tensor, threshold: float, side: Side = "high") -> torch.Tensor:
    """Which norms are beyond the threshold, of the same shape."""
    require_side(side)
    return norms > threshold if side == "high" else norms < threshold


@dataclass(frozen=True)
class Separation:
    """How far outliers are from the rest.

    Attributes:
        distance: From the median of the rest to the median of the outliers, in standard deviations of the rest
            (1.4826 times the median absolute deviation, which has no share in far values). On the low side of the
            logarithms. NaN where one of them has no tokens.
        ratio: The median norm of the outliers over that of the rest; on the low side its inverse.
    """

    distance: float
    ratio: float

    @property
    def is_clear(self) -> bool:
        """Whether both are what artifacts have: 5 standard deviations, and 1.5 times the norm.

        The first alone would do for tokens of a wide distribution; but norms of random models vary by one or two
        percent, and there 5 standard deviations are next to nothing.
        """
        return self.distance >= MIN_DISTANCE and self.ratio >= MIN_RATIO


def separation(outliers: NormDistribution, rest: NormDistribution, side: Side = "high") -> Separation:
    """How far two groups of tokens are apart at one layer, wherever they were told apart."""
    require_side(side)
    if not (outliers.count and rest.count):
        return Separation(math.nan, math.nan)
    return _separation(outliers.on(side), rest.on(side), side)


def split_off_layer(separations: Sequence[Separation]) -> int | None:
    """The first layer from which on, to the last, the outliers of the last layer are clearly separated from the rest.

    They must have got there inside the model: their norm over that of the rest is 1.5 times what it is at index 0,
    where they are patch embeddings. A white patch among dark ones has a large norm from the start, and in a model that
    adds little to it, an untrained one, to the end.

    Args:
        separations: Of the tokens that are outliers at the last layer from all others, first of the embeddings and
            then after every layer. (Of two kinds of `NormStatistics`, in a second pass over the images, when the
            threshold is known.)

    Returns:
        The index in `separations`, 1 for the first layer, or `None` where they are not separated after the last.
    """
    first = None
    for layer in reversed(range(1, len(separations))):
        brought_along = max(1.0, separations[0].ratio)
        if not (separations[layer].is_clear and separations[layer].ratio >= MIN_RATIO * brought_along):
            break
        first = layer
    return first


def bimodality(distribution: NormDistribution, threshold: float, side: Side = "high") -> float:
    """How deep the valley is between the norms on both sides of a threshold: 0 for one mode, 1 for an empty gap.

    A window as wide as a quarter of the distance between both medians is moved from one to the other. The measure is 1
    less the fewest tokens seen in it over those seen at its start or its end, whichever are fewer. For every
    distribution with a single mode (normal, uniform, exponential, however long its tail) it is 0 but for chance,
    since there the fewest are at one of the ends. It is as clear for 0.5 % of outliers as for half of them, unlike
    measures of the whole distribution, as Sarle's coefficient or the variance between groups.

    Returns:
        Between 0 and 1, or NaN where all tokens are on one side of the threshold.
    """
    return _valley(distribution, threshold, side)[0]


@dataclass(frozen=True)
class ArtifactVerdict:
    """Whether norms show artifacts, and by what: see `artifact_verdict`.

    Attributes:
        has_artifacts: The verdict.
        threshold: As a norm.
        side: Which side of it outliers are on.
        share: Of the tokens that are outliers.
        separation: Of the outliers from the rest.
        bimodality: Depth of the valley between both.
        significance: By how many standard deviations the valley is deeper than chance makes it.
        split_off_layer: Where separations were given, the layer from which on outliers are separated, 1 or more.
    """

    has_artifacts: bool
    threshold: float
    side: Side
    share: float
    separation: Separation
    bimodality: float
    significance: float
    split_off_layer: int | None


def artifact_verdict(
    distribution: NormDistribution,
    threshold: float | ThresholdMethod = "mad",
    side: Side = "high",
    separations: Sequence[Separation] | None = None,
) -> ArtifactVerdict:
    """Whether the tokens beyond the threshold are artifacts: a group of their own, and not the tail of the others.

    Every distribution has tokens beyond three standard deviations, so that counting them decides nothing. There are
    artifacts where all of this holds:

    - The outliers are at least 0.1 % of the tokens and less than half. (In the paper 2.37 %.)
    - They are clearly separated: medians 5 standard deviations of the rest and a factor of 1.5 apart.
    - There is a valley between them and the rest, at most half as high as the lower of the two (`bimodality` of 0.5 or
      more). A long tail has none.
    - The valley is not there by chance: if the windows with `end` and `valley` tokens were equally likely, their
      difference would have a standard deviation of `sqrt(end + valley)`; it must be 3 of these. With an empty gap that
      takes 9 outliers of about the same norm.
    - Where separations are given: outliers split off inside the model, and did not come with the image (see
      `split_off_layer`). Without them that is not asked, and white patches of an untrained model can pass.

    Of 10,000 tokens, a group of 0.5 % to 5 % at 2.5 times the norm is found by `"mad"` and `"mean+3std"`, where norms
    vary by a tenth in both groups, and from four times the norm by `"otsu"` too.

    Args:
        distribution: The norms of all patches at the last layer.
        threshold: As for `outlier_threshold`.
        side: Where artifacts are looked for.
        separations: As for `split_off_layer`.

    Raises:
        ValueError: As `outlier_threshold`.
    """
    norm = outlier_threshold(distribution, threshold, side)
    share = distribution.share_beyond(norm, side)
    apart = Separation(math.nan, math.nan)
    depth, significance = _valley(distribution, norm, side)
    if not math.isnan(depth):
        rest, outliers = distribution.on(side).split(scaled(norm, side))
        apart = _separation(outliers, rest, side)
    has_artifacts = (
        MIN_SHARE <= share < MAX_SHARE
        and apart.is_clear
        and depth >= MIN_BIMODALITY
        and significance >= MIN_SIGNIFICANCE
    )
    layer = None
    if separations is not None:
        layer = split_off_layer(separations)
        has_artifacts = has_artifacts and layer is not None
    return ArtifactVerdict(has_artifacts, norm, side, share, apart, depth, significance, layer)


def _mean_and_3std(values: BinnedValues) -> float:
    centres = (values.edges[1:] + values.edges[:-1]) / 2
    mean = np.average(centres, weights=values.counts)
    return mean + 3 * math.sqrt(np.average((centres - mean) ** 2, weights=values.counts))


def _median_and_mad(values: BinnedValues) -> float:
    return values.quantile(0.5) + MAD_FACTOR * values.spread


def _otsu(values: BinnedValues) -> float:
    if len(values.counts) == 1:
        return values.edges[-1]
    below = values.counts.cumsum()
    sums = (values.counts * (values.edges[1:] + values.edges[:-1]) / 2).cumsum()
    total, below = below[-1], below[:-1]
    between = (sums[-1] / total * below - sums[:-1]) ** 2 / (below * (total - below))
    best = np.flatnonzero(between == between.max())  # all edges of an empty gap are equally good
    return (values.edges[1 + best[0]] + values.edges[1 + best[-1]]) / 2


_METHODS = {"mean+3std": _mean_and_3std, "mad": _median_and_mad, "otsu": _otsu}


def _separation(outliers: BinnedValues, rest: BinnedValues, side: Side) -> Separation:
    apart, median = outliers.quantile(0.5), rest.quantile(0.5)
    ratio = apart / median if side == "high" else math.exp(apart - median)
    return Separation(float((apart - median) / rest.spread), float(ratio))


def _valley(distribution: NormDistribution, threshold: float, side: Side) -> tuple[float, float]:
    """`bimodality`, and by how many standard deviations it is more than chance."""
    require_side(side)
    if not distribution.count:
        return math.nan, math.nan
    values = distribution.on(side)
    rest, outliers = values.split(scaled(threshold, side))
    if not (rest.total and outliers.total):
        return math.nan, math.nan
    medians = rest.quantile(0.5), outliers.quantile(0.5)
    centres = np.linspace(*medians, 1 + 40 * VALLEY_WINDOWS)
    half = (medians[1] - medians[0]) / VALLEY_WINDOWS / 2
    seen = values.cumulative(centres + half) - values.cumulative(centres - half)
    valley, end = seen.min(), min(seen[0], seen[-1])
    return float(1 - valley / end), float((end - valley) / math.sqrt(end + valley))
