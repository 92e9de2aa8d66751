# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Weighted nearest-neighbour classification on frozen features, as DINO and DINOv2 report it.

The similarity of two images is the cosine of their features. The `k` most similar training images of a test image vote
for their classes with weights `softmax(similarity / temperature)`, the softmax being over the neighbours of the
largest `k` (Wu et al., 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4;
DINOv2, section 7.1).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.nn.functional import normalize

from .labelled import (
    chunks_on,
    gathered,
    own_share,
    probe_device,
    require_every_class,
    require_features,
    require_labels,
    require_width,
    rows_in_chunks,
)


KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
# similarities that exist at once: 4 MB in float32, which a core's cache still holds
TRAIN_CHUNK_SIZE, TEST_CHUNK_SIZE = 4096, 256
NUM_RANKED = 5  # classes that are kept of each vote


class KNNScore(NamedTuple):
    """Shares of the test images whose class got the most votes, and was among the five with the most."""

    top1: float
    top5: float


def knn_classify(
    train_features: torch.Tensor,
    train_labels: torch.Tensor | Sequence[int],
    test_features: torch.Tensor,
    num_classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    *,
    device: torch.device | str | None = None,
    accelerator: Accelerator | None = None,
    train_chunk_size: int = TRAIN_CHUNK_SIZE,
    test_chunk_size: int = TEST_CHUNK_SIZE,
) -> dict[int, torch.Tensor]:
    """The classes that the nearest training images vote for.

    Every test image is compared with every training image, in chunks of both. Equally similar training images are
    taken in their order, equal votes go to the lower class: nothing depends on the device's way with ties. Several
    processes share the chunks of test images and get all predictions; their number changes none.

    Args:
        train_features: `(num_train, hidden_size)`, in memory or memory-mapped; they need not be normalized.
        train_labels: `(num_train,)`, 0 to `num_classes - 1`.
        test_features: `(num_test, hidden_size)`.
        num_classes: Number of classes.
        ks: Numbers of neighbours.
        temperature: Of the votes: the smaller, the more the nearest count.
        device: Where to compute; by default the accelerator's, else that of the training features.
        accelerator: Of the processes that share the work.
        train_chunk_size, test_chunk_size: Images of each kind that are compared at once.

    Returns:
        For each k `(num_test, 5)` classes on the CPU, most votes first; -1 where fewer classes got one, and no more
        columns than classes.

    Raises:
        ValueError: If features are NaN or shapes do not fit, a label is out of range, a class has no training image,
            or a k is larger than the training set.
    """
    require_features(train_features, "training")
    require_features(test_features, "test")
    require_width(test_features, train_features.shape[1], "test")
    labels = require_labels(train_labels, len(train_features), num_classes, "training")
    require_every_class(labels, num_classes, "training")
    _require_ks(ks, len(labels))
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}. DINOv2 uses 0.07.")
    device = probe_device(device, accelerator, train_features)
    chunks = own_share(list(enumerate(rows_in_chunks(len(test_features), test_chunk_size))), accelerator)
    tests = [test_features[rows] for _, rows in chunks]
    neighbours = _neighbours(train_features, tests, max(ks), device, train_chunk_size)
    votes = [_ranked_classes(*found, labels, num_classes, ks, temperature) for found in neighbours]
    ordered = sorted(gathered([(index, vote) for (index, _), vote in zip(chunks, votes)], accelerator))
    return {k: torch.cat([vote[k] for _, vote in ordered]) for k in ks}


def knn_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor | Sequence[int],
    test_features: torch.Tensor,
    test_labels: torch.Tensor | Sequence[int],
    num_classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    **options,
) -> dict[int, KNNScore]:
    """The score of each k; arguments and errors as in `knn_classify`, and `test_labels` of shape `(num_test,)`."""
    true = require_labels(test_labels, len(test_features), num_classes, "test")
    predictions = knn_classify(train_features, train_labels, test_features, num_classes, ks, temperature, **options)
    return {k: _score(ranked == true[:, None]) for k, ranked in predictions.items()}


def _score(is_true: torch.Tensor) -> KNNScore:
    return KNNScore(is_true[:, 0].double().mean().item(), is_true.any(dim=1).double().mean().item())


def _require_ks(ks: Sequence[int], num_train: int) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be numbers of neighbours, each 1 or more, got {tuple(ks)}.")
    if max(ks) > num_train:
        raise ValueError(
            f"{max(ks)} neighbours were asked for, but there are only {num_train} training images. Give ks of at most "
            f"{num_train}, or more images."
        )


def _neighbours(
    train_features: torch.Tensor, tests: list[torch.Tensor], k: int, device: torch.device, chunk_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Similarities and indices of the k nearest, `(chunk, k)` each, for each chunk of test images.

    The training images are the outer loop: they are the many, and are read and normalized once.
    """
    nearest = [torch.empty(len(test), 0, dtype=torch.int64, device=device) for test in tests]
    for rows, train in chunks_on(train_features, chunk_size, device, torch.float32):
        train, indices = normalize(train), torch.arange(rows.start, rows.stop, device=device)
        for position, test in enumerate(tests):
            similarity = normalize(test.to(device=device, dtype=torch.float32)) @ train.T
            keys = torch.cat([nearest[position], _sortable(similarity, indices)], dim=1)
            nearest[position] = keys.topk(min(k, keys.shape[1]), sorted=False).values
    return [_from_sortable(keys.sort(dim=1, descending=True).values.cpu()) for keys in nearest]


def _sortable(similarity: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Integers that are ordered as (similarity, -index): `topk` of them knows no ties, and carries the indices along.

    The bits of a float32, read as an integer, are ordered as the float is if those of negative ones are flipped.
    """
    bits = (similarity + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0xFFFFFFFF - indices)


def _from_sortable(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The similarities and indices that the keys were made of."""
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _ranked_classes(
    similarity: torch.Tensor,
    neighbours: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
) -> dict[int, torch.Tensor]:
    """`(chunk, 5)` classes for each k, on the CPU, whose sums are the same every time."""
    # a weight that underflows is still a vote
    weights = (similarity.double() / temperature).softmax(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    voted = labels[neighbours]
    ranked = {}
    for k in ks:
        votes = torch.zeros(len(voted), num_classes, dtype=weights.dtype)
        votes.scatter_add_(1, voted[:, :k], weights[:, :k])
        ranked[k] = _most_voted(votes)
    return ranked


def _most_voted(votes: torch.Tensor) -> torch.Tensor:
    """`(images, num_classes) -> (images, 5)`. One maximum after another: the lower class comes first among equals."""
    ranked = []
    for _ in range(min(NUM_RANKED, votes.shape[1])):
        most, classes = votes.max(dim=1)
        ranked.append(classes.masked_fill(most <= 0, -1))
        votes = votes.scatter(1, classes[:, None], -1.0)
    return torch.stack(ranked, dim=1)
