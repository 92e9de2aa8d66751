# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""How well the directions that weights predict are those of the outliers that images show."""

from dataclasses import dataclass

import numpy as np
import torch

from ..features import VisionEncoder
from .accumulate import add_to_bins, in_float64
from .norms import BinnedValues, Side
from .outliers import outlier_mask
from .run import Run
from .singular_defects import SingularDefects


# Of the angle between token and direction, 0 to 90 degrees: cosines would be coarse near 1, where artifacts are
NUM_BINS = 4096
EDGES = np.linspace(0, np.pi / 2, NUM_BINS + 1)
NUM_STDS = 4.0  # of the published rule, by which a token is defective
GROUPS = ("outliers", "rest")


@dataclass(frozen=True)
class Cosines:
    """|cos| of a group of patches with the direction of their layer: count, mean, and quantiles.

    Numbers are NaN where there is no patch.
    """

    count: int
    mean: float
    quantile_05: float
    median: float
    quantile_95: float


@dataclass(frozen=True)
class LayerPrediction:
    """What the direction of one layer tells of the outliers after it. NaN where there are none, or nothing else.

    Attributes:
        cos_outlier_direction: |cos| of the direction with the outliers' mean direction, the mean of their unit
            vectors.
        cos_rest_direction: The same of all other patches: as high where all patches point there.
        outlier_alignment: Length of the outliers' mean unit vector, 1 where all point the same way. Where it is small
            some may point the opposite way, and the mean says less than `outliers`, where signs do not matter.
        outliers, rest: |cos| of single patches.
        auroc: Area under the ROC curve of |cos| of single patches as a score for being an outlier, 0.5 for chance.
        recall, precision: Of the published rule: a patch is defective whose |cos| is more than 4 standard deviations
            above the mean over its image.
    """

    cos_outlier_direction: float
    cos_rest_direction: float
    outlier_alignment: float
    outliers: Cosines
    rest: Cosines
    auroc: float
    recall: float
    precision: float


class DefectPrediction:
    """Compares the patches of every layer with its direction, image by image; sums are kept and no tokens.

    Args:
        encoder: The model.
        defects: Of the model.
        layer: After which layer outliers are outliers, from 1.
        threshold: As a norm.
        side: Of the threshold that outliers are on.
    """

    def __init__(self, encoder: VisionEncoder, defects: SingularDefects, layer: int, threshold: float, side: Side):
        self.encoder, self.layer, self.threshold, self.side = encoder, layer, threshold, side
        self._directions = defects.directions
        self._sums = [_LayerSums(encoder.hidden_size) for _ in range(encoder.num_layers)]

    def update(self, pixel_values: torch.Tensor) -> None:
        """Adds a batch, in two forward passes: which patches are outliers is known after the last layer only."""
        last = self.encoder.layers(pixel_values, [self.layer - 1])[self.layer - 1]
        norms = torch.linalg.vector_norm(self.encoder.split(last).patches, dim=-1, dtype=torch.float32)
        outliers = outlier_mask(norms, self.threshold, self.side)

        def on_layer(index: int, tokens: torch.Tensor) -> None:
            self._sums[index].update(self.encoder.split(tokens).patches, self._directions[index], outliers)

        self.encoder.observe(pixel_values, on_layer=on_layer)

    def result(self) -> list[LayerPrediction]:
        """One a layer."""
        pairs = zip(self._sums, self._directions)
        return [sums.result(direction) for sums, direction in pairs]


class _LayerSums:
    """What `DefectPrediction` keeps of one layer: outliers first, then the rest."""

    def __init__(self, hidden_size: int):
        self._bins = torch.zeros(2, NUM_BINS, dtype=torch.float64)
        self._counts, self._cosines, self._flagged = torch.zeros(3, 2, dtype=torch.float64)
        self._unit_vectors = torch.zeros(2, hidden_size, dtype=torch.float64)

    def update(self, patches: torch.Tensor, direction: torch.Tensor, outliers: torch.Tensor) -> None:
        """Adds `(batch_size, patches, hidden_size)`; `outliers` is `(batch_size, patches)`."""
        # an image at a time: float64 tokens of a batch would be the largest tensor of the inspection
        for tokens, is_outlier in zip(patches, outliers):
            unit_vectors = torch.nn.functional.normalize(in_float64(tokens), dim=-1)
            cosines = (unit_vectors @ direction.to(unit_vectors)).abs().clamp(max=1)
            flagged = cosines > cosines.mean() + NUM_STDS * (cosines.std() if len(cosines) > 1 else 0)
            bins = cosines.acos() / EDGES[-1] * NUM_BINS - 0.5
            is_outlier = is_outlier.to(cosines.device)
            for group, mask in enumerate((is_outlier, ~is_outlier)):
                add_to_bins(self._bins[group : group + 1], bins[mask][None].cpu())
                self._counts[group] += mask.sum().cpu()
                self._cosines[group] += cosines[mask].sum().cpu()
                self._flagged[group] += flagged[mask].sum().cpu()
                self._unit_vectors[group] += unit_vectors[mask].sum(0).cpu()

    def result(self, direction: torch.Tensor) -> LayerPrediction:
        means = self._unit_vectors / self._counts[:, None]
        alignment = means.norm(dim=1)
        cosines = (means @ direction).abs() / alignment
        return LayerPrediction(
            cos_outlier_direction=cosines[0].item(),
            cos_rest_direction=cosines[1].item(),
            outlier_alignment=alignment[0].item(),
            outliers=self._summary(0),
            rest=self._summary(1),
            auroc=auroc_of_histograms(*self._bins.flip(1)),
            recall=(self._flagged[0] / self._counts[0]).item(),
            precision=(self._flagged[0] / self._flagged.sum()).item() if self._counts[0] else float("nan"),
        )

    def _summary(self, group: int) -> Cosines:
        count = int(self._counts[group])
        if not count:
            return Cosines(0, *[float("nan")] * 4)
        angles = BinnedValues(EDGES, self._bins[group].numpy(), EDGES[1])
        quantiles = [float(np.cos(angles.quantile(1 - share))) for share in (0.05, 0.5, 0.95)]
        return Cosines(count, self._cosines[group].item() / count, *quantiles)


def auroc_of_histograms(positives: torch.Tensor, negatives: torch.Tensor) -> float:
    """Share of the pairs of a positive and a negative where the positive is in the higher bin; half of equal ones.

    Args:
        positives, negatives: Counts in the same ascending bins, `(num_bins,)`.

    Returns:
        Between 0 and 1, NaN where one of them has no count.
    """
    below = negatives.cumsum(0) - negatives / 2
    return (positives @ below / (positives.sum() * negatives.sum())).item()


def predict_outliers(run: Run, defects: SingularDefects, threshold: float) -> list[LayerPrediction]:
    """A pass over the images of a run, whose norms were surveyed, for `DefectPrediction`."""
    prediction = DefectPrediction(run.encoder, defects, run.layer, threshold, run.side)
    for _, pixel_values in run.stream.batches("Directions"):
        prediction.update(pixel_values)
    return prediction.result()
