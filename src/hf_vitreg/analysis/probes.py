# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Linear probes on single frozen tokens: their position, their pixels, and the class of their image.

"Vision Transformers Need Registers", section 2.1: outliers know less of their position and pixels than other patches,
and more of the image. The probes are ridge regressions with an intercept, on channels of unit variance, solved exactly
from streamed sums: nothing depends on the order or the batches that images come in, and memory does not grow with
their number. Classes (cells of the grid, classes of images) are regressed as one-hot vectors, and the largest wins.
The paper trains its probes by gradient descent, so compare kinds of tokens with each other rather than with its table.

Images, not tokens, are split: a fifth is held out for the scores, the others are two folds, between which the penalty
is chosen; it is the one with the smallest squared error on the fold that it was not fitted to. Which part an image is
in follows from the seed and its id alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..distributed import derived_seed
from .accumulate import require_finite, require_shape
from .ridge import LinearMap, RidgeRegression


HELD_OUT = 2  # the part that scores are measured on; 0 and 1 are the folds
SPLIT, SAMPLE, DRAW, MATCH = range(4)  # what a seed is derived for


def image_part(image_id: int, seed: int, test_share: float) -> int:
    """0 or 1, the folds of the training images, or `HELD_OUT`."""
    position = derived_seed(int(seed), SPLIT, int(image_id)) / 2**63
    if position < test_share:
        return HELD_OUT
    return int(position >= (1 + test_share) / 2)


def patch_pixels(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The pixels of every patch, channel by channel and row by row.

    Args:
        pixel_values: `(batch, channels, height, width)`, as the model sees them.
        patch_size: In pixels. What is left over at the right and at the bottom belongs to no patch.

    Returns:
        `(batch, rows * cols, channels * patch_size**2)`, patches in rows.
    """
    rows, cols = (pixels // patch_size for pixels in pixel_values.shape[-2:])
    whole = pixel_values[..., : rows * patch_size, : cols * patch_size]
    patches = whole.unflatten(3, (cols, patch_size)).unflatten(2, (rows, patch_size))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def matched_mask(image_ids: Sequence[int], outliers: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """As many other patches of each image as it has outliers, drawn at random; all where it has fewer.

    A probe on them has seen as many tokens as one on the outliers, so that what differs is not the number.

    Args:
        image_ids: One integer an image, the same in every run.
        outliers: `(batch, num_patches)`.
        seed: Of the draw.

    Returns:
        `(batch, num_patches)`, true where a patch was drawn.
    """
    require_shape(outliers, "outliers", len(image_ids), "num_patches")
    outliers = outliers.bool().cpu()
    drawn = torch.zeros_like(outliers)
    for row, is_outlier, image_id in zip(drawn, outliers, image_ids):
        order = _uniform(len(row), seed, MATCH, image_id).masked_fill(is_outlier, 2).argsort()
        row[order[: min(int(is_outlier.sum()), int((~is_outlier).sum()))]] = True
    return drawn


@dataclass(frozen=True)
class PositionScore:
    """How well tokens tell where they are.

    Attributes:
        top1: Share of the held-out tokens whose cell is predicted.
        mean_distance: Mean Euclidean distance between the predicted and the true cell, in patches.
        num_train_tokens, num_test_tokens: What the probe was fitted to, and measured on.
        penalty: That was chosen.
    """

    top1: float
    mean_distance: float
    num_train_tokens: int
    num_test_tokens: int
    penalty: float


@dataclass(frozen=True)
class ReconstructionScore:
    """How well tokens tell the pixels of their patch.

    Attributes:
        l2_error: Mean over held-out patches of the Euclidean length of the error, over all pixels and channels of a
            patch, in the units of the pixels given (the paper's are normalized).
        rmse: Root of the mean squared error of a single pixel value, which does not grow with the patch size.
        num_train_tokens, num_test_tokens: What the probe was fitted to, and measured on.
        penalty: That was chosen.
    """

    l2_error: float
    rmse: float
    num_train_tokens: int
    num_test_tokens: int
    penalty: float


@dataclass(frozen=True)
class ImageClassScore:
    """How well one token tells the class of its image.

    Attributes:
        accuracy: Share of the held-out images whose class is predicted, mean over the draws.
        std: Its standard deviation over the draws.
        accuracies: Of each draw.
        num_train_images, num_test_images: That had such a token.
        num_left_out: Images that had none.
    """

    accuracy: float
    std: float
    accuracies: tuple[float, ...]
    num_train_images: int
    num_test_images: int
    num_left_out: int


class PositionProbe:
    """A linear map from a patch token to its cell of the grid.

    Args:
        rows, cols: Of the grid, the same for all images.
        seed: Of the split, and of the sample of held-out tokens.
        test_share: Of the images that are held out.
        max_test_tokens: Held-out tokens that are kept, a random sample of all.
    """

    def __init__(self, rows: int, cols: int, seed: int = 0, test_share: float = 0.2, max_test_tokens: int = 4096):
        self.rows, self.cols = rows, cols
        self._probe = _TokenProbe(seed, test_share, max_test_tokens, num_classes=rows * cols)

    def update(self, image_ids: Sequence[int], patch_tokens: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Adds a batch.

        Args:
            image_ids: One integer an image, different for all.
            patch_tokens: `(batch, rows * cols, dim)`.
            mask: Which tokens take part, `(batch, rows * cols)`: outliers, or all others. `None` is all.

        Raises:
            ValueError: If shapes do not fit, or a value is NaN or infinite.
        """
        require_shape(patch_tokens, "patch_tokens", len(image_ids), self.rows * self.cols, "dim")
        cells = torch.arange(self.rows * self.cols, device=patch_tokens.device).expand(len(image_ids), -1)
        self._probe.update(image_ids, patch_tokens, cells, mask)

    def result(self) -> PositionScore | None:
        """The score, or `None` where there are no tokens to train on or none to test on."""
        if not self._probe.is_ready:
            return None
        linear, predicted, cells = self._probe.predictions()
        predicted = predicted.argmax(1)
        rows_off = (predicted // self.cols - cells // self.cols).double()
        cols_off = (predicted % self.cols - cells % self.cols).double()
        return PositionScore(
            top1=(predicted == cells).double().mean().item(),
            mean_distance=torch.hypot(rows_off, cols_off).mean().item(),
            num_train_tokens=self._probe.num_train_tokens,
            num_test_tokens=len(cells),
            penalty=linear.penalty,
        )


class ReconstructionProbe:
    """A linear map from a patch token to the pixels of its patch.

    Args:
        seed: Of the split, and of the sample of held-out tokens.
        test_share: Of the images that are held out.
        max_test_tokens: Held-out tokens that are kept with their pixels, a random sample of all.
    """

    def __init__(self, seed: int = 0, test_share: float = 0.2, max_test_tokens: int = 4096):
        self._probe = _TokenProbe(seed, test_share, max_test_tokens)

    def update(
        self,
        image_ids: Sequence[int],
        patch_tokens: torch.Tensor,
        pixels: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            image_ids: One integer an image, different for all.
            patch_tokens: `(batch, num_patches, dim)`.
            pixels: `(batch, num_patches, channels * patch_size**2)`, from `patch_pixels`.
            mask: Which tokens take part, `(batch, num_patches)`: outliers, or all others. `None` is all.

        Raises:
            ValueError: If shapes do not fit, or a value is NaN or infinite.
        """
        require_shape(patch_tokens, "patch_tokens", len(image_ids), "num_patches", "dim")
        require_shape(pixels, "pixels", *patch_tokens.shape[:2], "channels * patch_size**2")
        require_finite(pixels, "pixels")
        self._probe.update(image_ids, patch_tokens, pixels, mask)

    def result(self) -> ReconstructionScore | None:
        """The score, or `None` where there are no tokens to train on or none to test on."""
        if not self._probe.is_ready:
            return None
        linear, predicted, pixels = self._probe.predictions()
        errors = predicted - pixels
        return ReconstructionScore(
            l2_error=torch.linalg.vector_norm(errors, dim=1).mean().item(),
            rmse=errors.square().mean().sqrt().item(),
            num_train_tokens=self._probe.num_train_tokens,
            num_test_tokens=len(pixels),
            penalty=linear.penalty,
        )


class ImageClassProbe:
    """A linear map from one token, drawn at random among those of a kind, to the class of its image.

    Least squares in place of the paper's logistic regression: that one would need all tokens at once. The penalty is
    chosen on the first draw.

    Args:
        num_classes: Of the images.
        num_draws: How often tokens are drawn, to see how much depends on the draw. 1 for CLS, of which there is one.
        seed: Of the split and the draws.
        test_share: Of the images that are held out.
        max_test_images: Held-out images that are kept, a random sample of all.
        penalty_of: A probe on the same images whose penalty is taken in place of one of its own, which saves half of
            the memory.
    """

    def __init__(
        self,
        num_classes: int,
        num_draws: int = 5,
        seed: int = 0,
        test_share: float = 0.2,
        max_test_images: int = 2048,
        penalty_of: "ImageClassProbe | None" = None,
    ):
        if num_draws < 1:
            raise ValueError(f"num_draws must be 1 or more, got {num_draws}.")
        self.num_classes = num_classes
        self._seed = seed
        self._num_left_out = 0
        self._penalty_of = penalty_of
        # the first draw chooses the penalty for all, which saves the others half of their memory
        self._probes = [
            _TokenProbe(seed, test_share, max_test_images, num_classes, 2 if draw == 0 and penalty_of is None else 1)
            for draw in range(num_draws)
        ]

    @property
    def penalty(self) -> float:
        """The one that is chosen, or was taken."""
        return self._probes[0].best_penalty() if self._penalty_of is None else self._penalty_of.penalty

    def update(
        self, image_ids: Sequence[int], labels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None
    ) -> None:
        """Adds a batch.

        Args:
            image_ids: One integer an image, different for all.
            labels: Class of each image, `(batch,)`.
            tokens: Of one kind, `(batch, num_tokens, dim)`: CLS with `num_tokens` 1, registers, or patches.
            mask: Which of them are of the kind, `(batch, num_tokens)`. `None` is all. Images without one are left out.

        Raises:
            ValueError: If shapes do not fit, a label is no class, or a value is NaN or infinite.
        """
        require_shape(tokens, "tokens", len(image_ids), "num_tokens", "dim")
        require_shape(labels, "labels", len(image_ids))
        labels = labels.cpu()
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"Labels must be 0 to {self.num_classes - 1}, got {int(labels.min())} to {int(labels.max())}."
            )
        require_finite(tokens, "tokens")
        mask = _full_mask(mask, tokens).cpu()
        images = mask.any(1).nonzero().flatten()
        self._num_left_out += len(mask) - len(images)
        if not len(images):
            return
        ids = [image_ids[image] for image in images.tolist()]
        for draw, probe in enumerate(self._probes):
            order = torch.stack([_uniform(mask.shape[1], self._seed, DRAW, draw, image_id) for image_id in ids])
            drawn = order.masked_fill(~mask[images], 2).argmin(1)
            probe.update(ids, tokens[images.to(tokens.device), drawn.to(tokens.device), None], labels[images, None])

    def result(self) -> ImageClassScore | None:
        """The score, or `None` where there are no images to train on or none to test on."""
        first = self._probes[0]
        if not first.is_ready:
            return None
        accuracies, penalty = [], self.penalty
        for probe in self._probes:
            _, predicted, labels = probe.predictions(penalty)
            accuracies.append((predicted.argmax(1) == labels).double().mean().item())
        mean = math.fsum(accuracies) / len(accuracies)
        return ImageClassScore(
            accuracy=mean,
            std=math.sqrt(math.fsum((accuracy - mean) ** 2 for accuracy in accuracies) / len(accuracies)),
            accuracies=tuple(accuracies),
            num_train_images=first.num_train_tokens,
            num_test_images=first.num_test_tokens,
            num_left_out=self._num_left_out,
        )


class _TokenProbe:
    """A ridge regression on the tokens of training images, and a sample of the tokens of the others."""

    def __init__(
        self, seed: int, test_share: float, max_test_tokens: int, num_classes: int | None = None, num_folds: int = 2
    ):
        if not 0 < test_share < 1:
            raise ValueError(f"test_share must be between 0 and 1, got {test_share}.")
        self._seed, self._test_share, self._num_folds = seed, test_share, num_folds
        self._regression = RidgeRegression(num_classes)
        self._test = _Sample(max_test_tokens)

    @property
    def num_train_tokens(self) -> int:
        return self._regression.count

    @property
    def num_test_tokens(self) -> int:
        return len(self._test)

    @property
    def is_ready(self) -> bool:
        return bool(self.num_train_tokens and self.num_test_tokens)

    def update(
        self,
        image_ids: Sequence[int],
        tokens: torch.Tensor,
        targets: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Adds `(batch, num_tokens, dim)` with their targets `(batch, num_tokens, ...)`."""
        require_finite(tokens, "tokens")
        targets = targets.to(tokens.device)
        mask = _full_mask(mask, tokens)
        parts = torch.tensor([image_part(image_id, self._seed, self._test_share) for image_id in image_ids])
        for fold in (0, 1):
            chosen = mask & (parts == fold).to(mask.device)[:, None]
            if chosen.any():
                self._regression.update(tokens[chosen], targets[chosen], fold % self._num_folds)
        held_out = parts == HELD_OUT
        if held_out.any():
            chosen = mask & held_out.to(mask.device)[:, None]
            seeds = ((self._seed, SAMPLE, image_id) for image_id, is_out in zip(image_ids, held_out) if is_out)
            keys = torch.stack([_uniform(mask.shape[1], *seed) for seed in seeds])
            self._test.update(keys[mask[held_out.to(mask.device)].cpu()], tokens[chosen], targets[chosen])

    def best_penalty(self) -> float:
        """The one that predicts either fold best from the other."""
        return self._regression.best_penalty()

    def predictions(self, penalty: float | None = None) -> tuple[LinearMap, torch.Tensor, torch.Tensor]:
        """The fitted map, what it predicts for the held-out tokens, and their true targets."""
        linear = self._regression.fit(penalty)
        tokens, targets = self._test.tensors
        return linear, linear(tokens), targets


class _Sample:
    """The rows with the smallest of their random keys, so that the sample does not depend on their order."""

    def __init__(self, size: int):
        self._size = size
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows: tuple[torch.Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The rows, in the order of their keys."""
        order = self._keys.argsort()
        return tuple(rows[order] for rows in self._rows)

    def update(self, keys: torch.Tensor, *tensors: torch.Tensor) -> None:
        """Adds rows of tensors, with one key each, in place of rows with larger keys."""
        if not self._rows:
            # in float32 or as integers, as they are kept for long; memory is taken as it fills
            self._rows = tuple(
                torch.empty(
                    (self._size, *tensor.shape[1:]),
                    dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype,
                )
                for tensor in tensors
            )
        number = len(self)
        kept = torch.cat([self._keys, keys]).argsort()[: self._size]
        added = kept[kept >= number] - number
        is_free = torch.ones(self._size, dtype=torch.bool)
        is_free[kept[kept < number]] = False
        slots = is_free.nonzero().flatten()[: len(added)]
        self._keys = torch.cat([self._keys, keys.new_empty(len(kept) - number)])
        self._keys[slots] = keys[added]
        for rows, tensor in zip(self._rows, tensors):
            rows[slots] = tensor[added.to(tensor.device)].to(rows.device, rows.dtype)


def _uniform(number: int, *keys: int) -> torch.Tensor:
    """Random numbers between 0 and 1 in float64 that only these keys decide, on the CPU."""
    generator = torch.Generator().manual_seed(derived_seed(*map(int, keys)))
    return torch.rand(number, generator=generator, dtype=torch.float64)


def _full_mask(mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    require_shape(mask, "mask", *tokens.shape[:2])
    return mask.to(tokens.device).bool()
