# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What single tokens tell: of the class of their image, of their position, and of the pixels of their patch.

"Vision Transformers Need Registers" (Darcet et al., 2024), section 2.1 and tables 1, 4 and 5: an outlier knows the
image as CLS does, and little of its own patch.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..distributed import derived_seed
from .labelled import probe_device
from .logistic import CS, fit_logistic, logistic_sweep
from .single_tokens import DrawnTokens


POSITION_CS = (1e-2, 1e-1, 1.0, 1e1, 1e2)
HELD_OUT_SHARE = 0.1  # of the images, on which the penalty of the position probe is chosen
HOLD_OUT = 12  # what a seed is derived for, beside other choices
RIDGE = 1e-6  # of the mean variance of a channel: enough to solve, too little to see


class ClassScore(NamedTuple):
    """How well one token tells the class of its image.

    Attributes:
        accuracy: Share of the validation images whose class is predicted, mean over the draws.
        std: Its standard deviation over the draws; `None` where there is one.
        accuracies: Of each draw.
        C: Inverse strength of the penalty, chosen on the first draw.
    """

    accuracy: float
    std: float | None
    accuracies: tuple[float, ...]
    C: float


class PositionScore(NamedTuple):
    """How well tokens tell where they are.

    Attributes:
        top1: Share of the validation tokens whose cell is predicted.
        mean_distance: Mean Euclidean distance from the true cell to the predicted one, in patches.
        C: Inverse strength of the penalty.
    """

    top1: float
    mean_distance: float
    C: float


def class_score(
    train: DrawnTokens,
    train_labels: torch.Tensor | Sequence[int],
    validation: DrawnTokens,
    validation_labels: torch.Tensor | Sequence[int],
    num_classes: int,
    *,
    Cs: Sequence[float] = CS,
    seed: int = 0,
    device: torch.device | str | None = None,
    on_fit: Callable[[int, int], None] | None = None,
) -> ClassScore:
    """Logistic regression from one token to the class of its image, once for every draw.

    The penalty is chosen on the first draw, on held-out training images, and taken for the others.

    Args:
        train, validation: Of one kind, as drawn.
        train_labels, validation_labels: Of all images, also of those without a token of the kind.
        num_classes: Number of classes.
        Cs, seed, device, on_fit: As in `logistic_sweep`.

    Raises:
        ValueError: where no image has such a token, or none of a class.
    """
    for drawn, split in ((train, "training"), (validation, "validation")):
        if not len(drawn):
            raise ValueError(f"None of the {drawn.num_without} {split} images has such a token.")
    labels = torch.as_tensor(train_labels)[train.images]
    true = torch.as_tensor(validation_labels)[validation.images]
    sweep = logistic_sweep(
        train.tokens[:, 0],
        labels,
        validation.tokens[:, 0],
        true,
        num_classes,
        Cs=Cs,
        seed=seed,
        device=device,
        on_fit=on_fit,
    )
    accuracies = [sweep.top1]
    for draw in range(1, train.tokens.shape[1]):
        model = fit_logistic(train.tokens[:, draw], labels, num_classes, sweep.best.C, start=sweep.best, device=device)
        accuracies.append(model.accuracies(validation.tokens[:, draw], true, device)[0])
    std = statistics.pstdev(accuracies) if len(accuracies) > 1 else None
    return ClassScore(statistics.fmean(accuracies), std, tuple(accuracies), sweep.best.C)


def position_score(
    train: DrawnTokens,
    validation: DrawnTokens,
    *,
    Cs: Sequence[float] = POSITION_CS,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> PositionScore:
    """Softmax regression from a patch to its cell of the grid, its penalty chosen on held-out training images.

    Args:
        train, validation: Patches of one kind; all draws are used.
        Cs: To choose from.
        seed: Of the images that are held out.
        device: Where to compute.

    Raises:
        ValueError: where there are too few images, or no training patch in a cell.
    """
    rows, cols = train.grid
    _require_patches(train, validation)
    tokens, cells = train.tokens.flatten(0, 1), train.cells.flatten()
    missing = sorted(set(range(rows * cols)) - set(cells.tolist()))
    if missing:
        raise ValueError(
            f"{len(missing)} of the {rows}x{cols} cells have no training patch of the kind, row {missing[0] // cols}, "
            f"column {missing[0] % cols} first. Take more images."
        )
    chosen = _best_C(train, sorted(Cs), seed, device)
    model = fit_logistic(tokens, cells, rows * cols, chosen, device=device)
    predicted = model.logits(validation.tokens.flatten(0, 1), device).argmax(dim=1)
    true = validation.cells.flatten()
    distance = torch.hypot((predicted // cols - true // cols).double(), (predicted % cols - true % cols).double())
    return PositionScore((predicted == true).double().mean().item(), distance.mean().item(), chosen)


def _best_C(train: DrawnTokens, Cs: Sequence[float], seed: int, device: torch.device | str | None) -> float:
    """The one that predicts the cells of held-out images best; the middle one where there are too few images to tell.

    Images are held out, not tokens: two draws of an image may be one token.
    """
    rows, cols = train.grid
    generator = torch.Generator().manual_seed(derived_seed(seed, HOLD_OUT))
    is_held_out = torch.rand(len(train), generator=generator) < HELD_OUT_SHARE
    fitted, cells = (values[~is_held_out].flatten(0, 1) for values in (train.tokens, train.cells))
    held_out, true = (values[is_held_out].flatten(0, 1) for values in (train.tokens, train.cells))
    if not len(true) or len(cells.unique()) < rows * cols:
        return Cs[len(Cs) // 2]
    model, scores = None, {}
    for C in Cs:
        model = fit_logistic(fitted, cells, rows * cols, C, start=model, device=device)
        scores[C] = model.accuracies(held_out, true, device)[0]
    return max(scores, key=lambda C: (scores[C], -C))


def reconstruction_error(
    train: DrawnTokens, validation: DrawnTokens, *, device: torch.device | str | None = None
) -> float:
    """Least squares from a patch to its pixels: the mean over validation patches of the length of the error.

    Args:
        train, validation: Patches of one kind, with pixels; all draws are used.
        device: Where to compute.

    Raises:
        ValueError: where there are no patches, or fewer to train on than channels.
    """
    _require_patches(train, validation)
    device = probe_device(device, None, train.tokens)
    tokens, pixels = train.tokens.flatten(0, 1).to(device), train.pixels.flatten(0, 1).to(device)
    if len(tokens) <= tokens.shape[1]:
        raise ValueError(
            f"{len(tokens)} patches are too few to fit {tokens.shape[1]} channels to pixels. Take more images."
        )
    mean, target_mean = tokens.mean(dim=0, dtype=torch.float64), pixels.mean(dim=0, dtype=torch.float64)
    covariance = tokens.new_zeros(tokens.shape[1], tokens.shape[1], dtype=torch.float64)
    cross = tokens.new_zeros(tokens.shape[1], pixels.shape[1], dtype=torch.float64)
    for chunk, targets in zip(tokens.split(8192), pixels.split(8192)):
        centred = chunk.double() - mean
        covariance += centred.T @ centred
        cross += centred.T @ (targets.double() - target_mean)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    weight = torch.linalg.solve(covariance, cross)
    total, number = 0.0, 0
    seen, true = validation.tokens.flatten(0, 1), validation.pixels.flatten(0, 1)
    for chunk, targets in zip(seen.split(8192), true.split(8192)):
        errors = (chunk.to(device).double() - mean) @ weight + target_mean - targets.to(device)
        total += torch.linalg.vector_norm(errors, dim=1).sum().item()
        number += len(chunk)
    return total / number


def _require_patches(train: DrawnTokens, validation: DrawnTokens) -> None:
    for drawn, split in ((train, "training"), (validation, "validation")):
        if not len(drawn):
            raise ValueError(f"None of the {drawn.num_without} {split} images has such a patch.")
    if train.grid != validation.grid:
        raise ValueError(f"Both splits must have one grid, got {train.grid} and {validation.grid}.")
