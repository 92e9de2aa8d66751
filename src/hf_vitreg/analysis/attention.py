# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What tokens attend to, how alike registers are, and patch features and norms as maps.

Probabilities are `(batch, heads, queries, tokens)`, the softmax of the attention for any queries: CLS, registers or
all tokens. Prefix tokens (CLS, distillation, registers) come before the patches, patches are in rows.
"""

from dataclasses import dataclass

import torch

from .accumulate import Moments, in_float64, require_finite, require_shape
from .norms import token_norms


def attention_maps(probabilities: torch.Tensor, num_prefix_tokens: int, rows: int, cols: int) -> torch.Tensor:
    """Attention of every query to the patches, renormalized over them ("Vision Transformers Need Registers", fig. 1).

    Args:
        probabilities: `(batch, heads, queries, num_prefix_tokens + rows * cols)`.
        num_prefix_tokens: Tokens before the first patch.
        rows, cols: Of the patch grid.

    Returns:
        `(batch, heads, queries, rows, cols)`, float32. A map sums to 1, or is 0 where nothing goes to the patches.

    Raises:
        ValueError: If shapes do not fit, or a value is NaN, infinite or negative.
    """
    _require_probabilities(probabilities, num_prefix_tokens + rows * cols)
    to_patches = probabilities[..., num_prefix_tokens:].detach().float()
    total = to_patches.sum(-1, keepdim=True)
    return (to_patches / total.masked_fill(total == 0, 1)).unflatten(-1, (rows, cols))


def prefix_mass(probabilities: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """Share of the attention that goes to tokens before the patches: `(batch, heads, queries)`, float32."""
    _require_probabilities(probabilities)
    return probabilities[..., :num_prefix_tokens].detach().float().sum(-1)


def attention_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy over all tokens in nats, 0 to `log(tokens)`: `(batch, heads, queries)`, float32."""
    _require_probabilities(probabilities)
    return torch.special.entr(probabilities.detach().float()).sum(-1)


class MeanAttention:
    """Mean over images of what every query attends to, head by head.

    Of registers, it shows whether each looks at a place of its own (figures 9 and 16 of the paper).

    Args:
        num_prefix_tokens: Tokens before the first patch.
        rows, cols: Of the patch grid, the same for all images.
    """

    def __init__(self, num_prefix_tokens: int, rows: int, cols: int):
        self.num_prefix_tokens, self.rows, self.cols = num_prefix_tokens, rows, cols
        self.num_images = 0
        self._maps = self._masses = self._entropies = 0

    def update(self, probabilities: torch.Tensor) -> None:
        """Adds `(batch, heads, queries, num_prefix_tokens + rows * cols)`. Raises as `attention_maps`."""
        self._maps = self._maps + self._sum(
            attention_maps(probabilities, self.num_prefix_tokens, self.rows, self.cols)
        )
        self._masses = self._masses + self._sum(prefix_mass(probabilities, self.num_prefix_tokens))
        self._entropies = self._entropies + self._sum(attention_entropy(probabilities))
        self.num_images += len(probabilities)

    @staticmethod
    def _sum(values: torch.Tensor) -> torch.Tensor:
        return in_float64(values).sum(0).cpu()

    @property
    def maps(self) -> torch.Tensor:
        """Mean of the maps, `(heads, queries, rows, cols)`, float64; for one map a query, take the mean over heads."""
        return self._mean(self._maps)

    @property
    def prefix_mass(self) -> torch.Tensor:
        """Mean share that goes to prefix tokens, `(heads, queries)`, float64."""
        return self._mean(self._masses)

    @property
    def entropy(self) -> torch.Tensor:
        """Mean entropy in nats, `(heads, queries)`, float64."""
        return self._mean(self._entropies)

    def _mean(self, total: torch.Tensor) -> torch.Tensor:
        _require_images(self.num_images)
        return total / self.num_images


class PrefixSimilarity:
    """Mean over images of the cosine similarity of prefix tokens to each other: registers to CLS, and among them."""

    def __init__(self):
        self.num_images = 0
        self._cosines: torch.Tensor | int = 0

    def update(self, prefix_tokens: torch.Tensor) -> None:
        """Adds `(batch, num_prefix_tokens, dim)`. Raises `ValueError` for other shapes, NaN and infinite values."""
        require_shape(prefix_tokens, "prefix_tokens", "batch", "num_prefix_tokens", "dim")
        require_finite(prefix_tokens, "prefix_tokens")
        directions = torch.nn.functional.normalize(in_float64(prefix_tokens), dim=-1)
        self._cosines = self._cosines + (directions @ directions.mT).sum(0).cpu()
        self.num_images += len(prefix_tokens)

    @property
    def matrix(self) -> torch.Tensor:
        """`(num_prefix_tokens, num_prefix_tokens)`, float64, -1 to 1; a zero vector has 0 with all, itself too."""
        _require_images(self.num_images)
        return self._cosines / self.num_images


class PatchComponents:
    """First principal components of patch features, fitted on several images together.

    The covariance is streamed, so images may be any number, and the components do not depend on their batches.

    Args:
        num_components: 3, for red, green and blue, or any other number.
    """

    def __init__(self, num_components: int = 3):
        self.num_components = num_components
        self._moments = Moments()

    def update(self, patch_tokens: torch.Tensor) -> None:
        """Adds `(..., dim)`.

        Raises:
            ValueError: If a value is NaN or infinite, or `dim` is smaller than the number of components.
        """
        if patch_tokens.shape[-1] < self.num_components:
            raise ValueError(
                f"{self.num_components} components need at least as many channels, got {patch_tokens.shape[-1]}."
            )
        require_finite(patch_tokens, "patch_tokens")
        self._moments.update(patch_tokens.flatten(0, -2))

    def fit(self) -> "Components":
        """The components. Raises `ValueError` where there are fewer than two tokens."""
        if self._moments.count < 2:
            raise ValueError("Principal components need two tokens or more.")
        variances, vectors = torch.linalg.eigh(self._moments.covariance)
        variances = variances.flip(0)[: self.num_components].clamp(min=0)
        directions = vectors.T.flip(0)[: self.num_components]
        # either sign is an eigenvector: the largest entry is made positive
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        share = variances / self._moments.covariance.trace().clamp(min=torch.finfo(torch.float64).tiny)
        return Components(self._moments.mean, directions * largest.sign(), variances.sqrt(), share)


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components, the largest first, all in float64.

    Attributes:
        mean: `(dim,)`
        directions: `(num_components, dim)`, of length 1, the entry with the largest magnitude positive.
        std: Standard deviation of the tokens along each, `(num_components,)`.
        variance_share: Of the whole variance, `(num_components,)`.
    """

    mean: torch.Tensor
    directions: torch.Tensor
    std: torch.Tensor
    variance_share: torch.Tensor

    def whitened(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        """Coordinates in standard deviations, `(..., dim) -> (..., num_components)`; 0 where there is no variance."""
        projected = (in_float64(patch_tokens).cpu() - self.mean) @ self.directions.T
        # next to the first, what is below is rounding
        has_variance = self.std > 1e-7 * self.std[0]
        return torch.where(has_variance, projected / self.std.masked_fill(~has_variance, 1), 0.0)

    def colours(self, patch_tokens: torch.Tensor, num_std: float = 3.0) -> torch.Tensor:
        """Coordinates as colours, -3 to 3 standard deviations as 0 to 1 (figure 20 of the paper).

        Args:
            patch_tokens: `(..., dim)`, of images that took part in the fit or of others.
            num_std: Where colours end.

        Returns:
            `(..., num_components)`, float32, 0 to 1.
        """
        return (self.whitened(patch_tokens) / (2 * num_std) + 0.5).clamp(0, 1).float()


def norm_maps(patch_tokens: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Norms on the grid (figure 21 of the paper): `(batch, rows * cols, dim) -> (batch, rows, cols)`, float32.

    Raises:
        ValueError: If the shape is another, or a value is NaN or infinite.
    """
    require_shape(patch_tokens, "patch_tokens", "batch", rows * cols, "dim")
    require_finite(patch_tokens, "patch_tokens")
    return token_norms(patch_tokens).unflatten(1, (rows, cols))


def _require_probabilities(probabilities: torch.Tensor, num_tokens: int | str = "tokens") -> None:
    require_shape(probabilities, "probabilities", "batch", "heads", "queries", num_tokens)
    require_finite(probabilities, "probabilities")
    if probabilities.numel() and probabilities.min() < 0:
        raise ValueError(f"probabilities must not be negative, got {probabilities.min().item()}: apply softmax first.")


def _require_images(num_images: int) -> None:
    if not num_images:
        raise ValueError("There is no image to take a mean over.")
