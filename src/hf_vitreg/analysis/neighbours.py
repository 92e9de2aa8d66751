# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Where outliers fall: on patches that look like their neighbours, and how often on every cell of the grid.

"Vision Transformers Need Registers", section 2.1: artifacts appear on patches that hold little beyond what their
neighbours hold. Similarity is measured right after the patch embedding and before position embeddings are added,
which are the same for every image and tell neighbours apart that are equal.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from .accumulate import add_to_bins, in_float64, require_finite, require_shape


def neighbour_cosines(patch_embeddings: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every patch to the patches above, below, left and right of it.

    Args:
        patch_embeddings: `(batch, rows, cols, dim)`, right after the patch embedding.

    Returns:
        `(batch, rows, cols, 4)` in that order, float64. NaN where there is no neighbour, and where one of the two is
        the zero vector, which has no direction.

    Raises:
        ValueError: If the shape is another, or a value is NaN or infinite.
    """
    require_shape(patch_embeddings, "patch_embeddings", "batch", "rows", "cols", "dim")
    require_finite(patch_embeddings, "patch_embeddings")
    embeddings = in_float64(patch_embeddings)
    directions = embeddings / torch.linalg.vector_norm(embeddings, dim=-1, keepdim=True)
    cosines = embeddings.new_full((*embeddings.shape[:-1], 4), math.nan)
    vertical = (directions[:, 1:] * directions[:, :-1]).sum(-1).clamp(-1, 1)
    horizontal = (directions[:, :, 1:] * directions[:, :, :-1]).sum(-1).clamp(-1, 1)
    cosines[:, 1:, :, 0] = vertical
    cosines[:, :-1, :, 1] = vertical
    cosines[:, :, 1:, 2] = horizontal
    cosines[:, :, :-1, 3] = horizontal
    return cosines


def neighbour_similarity(patch_embeddings: torch.Tensor) -> torch.Tensor:
    """The mean of the cosines that a patch has: `(batch, rows, cols, dim) -> (batch, rows, cols)`.

    At the border it is of three, in a corner of two; NaN where there is none. Raises as `neighbour_cosines`.
    """
    return neighbour_cosines(patch_embeddings).nanmean(dim=-1)


@dataclass(frozen=True, eq=False)
class SimilarityDensity:
    """Similarities of one group of patches.

    Attributes:
        count: Number of similarities.
        mean, std: NaN where there is none.
        edges: Of the bins, `(num_bins + 1,)`, from -1 to 1.
        density: `(num_bins,)`. Its integral is 1, or 0 where there is no similarity.
    """

    count: int
    mean: float
    std: float
    edges: torch.Tensor
    density: torch.Tensor


class NeighbourSimilarity:
    """Densities of the similarity to the neighbours, of outliers and of all other patches.

    Args:
        values: `"patch"` counts the mean of each patch once, `"pair"` every patch with every neighbour.
        num_bins: Of the densities, between -1 and 1.
    """

    def __init__(self, values: Literal["patch", "pair"] = "patch", num_bins: int = 200):
        if values not in ("patch", "pair"):
            raise ValueError(f'values must be "patch" or "pair", got {values!r}.')
        self._measure = neighbour_similarity if values == "patch" else neighbour_cosines
        self._groups = {False: _Similarities(num_bins), True: _Similarities(num_bins)}

    def update(self, patch_embeddings: torch.Tensor, outliers: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            patch_embeddings: `(batch, rows, cols, dim)`, right after the patch embedding. Grids may differ.
            outliers: Which patches are outliers at the last layer, `(batch, rows, cols)`.

        Raises:
            ValueError: If shapes do not fit, or a value is NaN or infinite.
        """
        require_shape(patch_embeddings, "patch_embeddings", "batch", "rows", "cols", "dim")
        require_shape(outliers, "outliers", *patch_embeddings.shape[:3])
        # image by image, for the sake of their copies in float64
        for image, is_outlier in zip(patch_embeddings.split(1), outliers.bool().split(1)):
            similarities = self._measure(image)
            is_outlier = is_outlier.to(similarities.device)
            for key, group in self._groups.items():
                chosen = similarities[is_outlier == key]
                group.update(chosen[~chosen.isnan()])

    @property
    def outliers(self) -> SimilarityDensity:
        """Of the outliers."""
        return self._groups[True].result()

    @property
    def rest(self) -> SimilarityDensity:
        """Of all other patches."""
        return self._groups[False].result()


class _Similarities:
    """Count, sums and histogram of one group."""

    def __init__(self, num_bins: int):
        self._count, self._sum, self._squares = 0, 0.0, 0.0
        self._counts = torch.zeros(1, num_bins, dtype=torch.float64)

    def update(self, similarities: torch.Tensor) -> None:
        """Adds a vector of them, in float64."""
        similarities = similarities.cpu()
        self._count += len(similarities)
        self._sum += similarities.sum().item()
        self._squares += similarities.square().sum().item()
        add_to_bins(self._counts, (similarities[None] + 1) / 2 * self._counts.shape[1] - 0.5)

    def result(self) -> SimilarityDensity:
        num_bins = self._counts.shape[1]
        edges = torch.linspace(-1, 1, num_bins + 1, dtype=torch.float64)
        density = self._counts[0] / max(self._count, 1) * num_bins / 2
        if not self._count:
            return SimilarityDensity(0, math.nan, math.nan, edges, density)
        mean = self._sum / self._count
        std = math.sqrt(max(self._squares / self._count - mean**2, 0))
        return SimilarityDensity(self._count, mean, std, edges, density)


class OutlierFrequency:
    """How often every cell of the patch grid is an outlier.

    The paper's models have more at the borders, at some positions in over 20 % of the images.
    """

    def __init__(self):
        self.num_images = 0
        self.num_images_with_outliers = 0
        self._counts: torch.Tensor | None = None

    def update(self, outliers: torch.Tensor) -> None:
        """Adds a batch.

        Args:
            outliers: Which patches are outliers, `(batch, rows, cols)`.

        Raises:
            ValueError: If the grid is not that of the images before.
        """
        if self._counts is None:
            require_shape(outliers, "outliers", "batch", "rows", "cols")
            self._counts = torch.zeros(outliers.shape[1:], dtype=torch.int64)
        if outliers.shape[1:] != self._counts.shape:
            raise ValueError(
                f"Frequencies are over one grid: outliers must have shape (batch, {', '.join(map(str, self.grid))}), "
                f"got {tuple(outliers.shape)}. Resize or crop all images to one size."
            )
        outliers = outliers.bool().cpu()
        self.num_images += len(outliers)
        self.num_images_with_outliers += int(outliers.flatten(1).any(1).sum())
        self._counts += outliers.sum(0)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        return tuple(self._seen().shape)

    @property
    def frequency(self) -> torch.Tensor:
        """Share of the images in which each cell is an outlier, `(rows, cols)`, float64."""
        return self._seen() / self.num_images

    @property
    def num_outliers(self) -> int:
        """Over all images and cells."""
        return int(self._seen().sum())

    @property
    def share(self) -> float:
        """Share of all patches that are outliers."""
        return self.frequency.mean().item()

    @property
    def border_share(self) -> float:
        """Share of the patches in the first and last rows and columns that are outliers."""
        return self.frequency[self._is_border()].mean().item()

    @property
    def inner_share(self) -> float:
        """Share of all other patches that are outliers; NaN where there are no others."""
        return self.frequency[~self._is_border()].mean().item()

    def _is_border(self) -> torch.Tensor:
        is_border = torch.ones(self.grid, dtype=torch.bool)
        is_border[1:-1, 1:-1] = False
        return is_border

    def _seen(self) -> torch.Tensor:
        if self._counts is None or not self.num_images:
            raise ValueError("There is no image to count outliers in.")
        return self._counts.double()
