# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from hf_vitreg.evaluation.knn import KS, TEMPERATURE, KNNScore, knn_accuracy, knn_classify


NUM_TRAIN, NUM_TEST, HIDDEN_SIZE, NUM_CLASSES = 211, 53, 17, 7
CHUNKS = {"train_chunk_size": 31, "test_chunk_size": 11}


@pytest.fixture
def problem():
    """Features of two sets whose classes overlap, none of them normalized."""
    labels = torch.arange(NUM_TRAIN + NUM_TEST) % NUM_CLASSES
    features = 5 * torch.randn(len(labels), HIDDEN_SIZE) + 3 * torch.randn(NUM_CLASSES, HIDDEN_SIZE)[labels]
    return features[:NUM_TRAIN], labels[:NUM_TRAIN], features[NUM_TRAIN:], labels[NUM_TRAIN:]


def votes_by_formula(train_features, train_labels, test_features, num_classes, ks, temperature):
    """What DINOv2 computes, all at once and in float64: `(num_test, num_classes)` for each k."""
    train, test = (features / features.norm(dim=1, keepdim=True) for features in (train_features, test_features))
    similarity, nearest = (test.double() @ train.double().T).sort(dim=1, descending=True)
    similarity, nearest = similarity[:, : max(ks)], nearest[:, : max(ks)]
    weights = (similarity / temperature).exp() / (similarity / temperature).exp().sum(dim=1, keepdim=True)
    one_hot = torch.eye(num_classes, dtype=torch.float64)[train_labels[nearest]]
    return {k: (weights[:, :k, None] * one_hot[:, :k]).sum(dim=1) for k in ks}


def test_votes_are_those_of_the_formula(problem):
    train_features, train_labels, test_features, _ = problem
    ks = (1, 10, 20, 100, 200)
    predictions = knn_classify(train_features, train_labels, test_features, NUM_CLASSES, ks, 0.3, **CHUNKS)
    expected = votes_by_formula(train_features, train_labels, test_features, NUM_CLASSES, ks, 0.3)
    for k in ks[1:]:
        assert torch.equal(
            predictions[k],
            expected[k]
            .argsort(dim=1, descending=True)[:, :5]
            .where(expected[k].sort(dim=1, descending=True).values[:, :5] > 0, -1),
        )
    # one neighbour votes for one class
    assert torch.equal(predictions[1][:, 0], expected[1].argmax(dim=1)) and (predictions[1][:, 1:] == -1).all()


@pytest.mark.parametrize("k", [10, 200])
def test_predictions_are_those_of_sklearn(k):
    features, labels = load_digits(return_X_y=True)
    train_features, test_features = features[:1200].astype(np.float32), features[1200:].astype(np.float32)
    reference = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    ).fit(train_features, labels[:1200])
    ranked = knn_classify(
        torch.from_numpy(train_features),
        labels[:1200],
        torch.from_numpy(test_features),
        10,
        (k,),
        train_chunk_size=500,
    )
    assert ranked[k][:, 0].tolist() == reference.predict(test_features).tolist()


def test_scores_count_the_first_and_the_first_five(problem):
    train_features, train_labels, test_features, test_labels = problem
    scores = knn_accuracy(*problem, NUM_CLASSES, ks=(20, 100), **CHUNKS)
    expected = votes_by_formula(train_features, train_labels, test_features, NUM_CLASSES, (20, 100), TEMPERATURE)
    for k, score in scores.items():
        better = (expected[k] > expected[k].gather(1, test_labels[:, None])).sum(dim=1)
        voted = expected[k].gather(1, test_labels[:, None])[:, 0] > 0
        assert score.top1 == (better == 0).double().mean().item()
        assert score.top5 == ((better < 5) & voted).double().mean().item()
    assert 0.3 < scores[20].top1 < scores[20].top5 <= 1


@pytest.mark.parametrize("train_chunk_size", [1, 5, 1000])
def test_equal_images_are_taken_in_their_order(train_chunk_size):
    """All neighbours are the same image, so that those of the lowest indices are the nearest."""
    train_features, train_labels = torch.ones(12, 3), torch.tensor([2, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2])
    predictions = knn_classify(
        train_features, train_labels, torch.ones(2, 3), 3, (1, 2, 3, 6, 12), train_chunk_size=train_chunk_size
    )
    # of votes 1:1 the lower class is first
    assert {k: ranked[0].tolist() for k, ranked in predictions.items()} == {
        1: [2, -1, -1],
        2: [0, 2, -1],
        3: [0, 2, -1],
        6: [1, 0, 2],
        12: [2, 1, 0],
    }


def test_opposite_and_orthogonal_images_come_in_order():
    """Negative similarities, zeros of both signs and vectors of zeros are similarities like others."""
    train_features = torch.tensor([[-1.0, 0.0], [0.0, -1.0], [0.0, 0.0], [-1.0, 1.0], [1.0, 1.0]])
    ranked = knn_classify(train_features, torch.arange(5), torch.tensor([[2.0, 0.0]]), 5, (5,))
    assert ranked[5].tolist() == [[4, 1, 2, 3, 0]]


def test_chunks_do_not_matter(problem):
    whole = knn_classify(*problem[:3], NUM_CLASSES)
    assert tuple(whole) == KS
    chunked = knn_classify(*problem[:3], NUM_CLASSES, **CHUNKS)
    assert all(torch.equal(whole[k], chunked[k]) for k in KS)


def test_a_weight_that_underflows_is_a_vote():
    ranked = knn_classify(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), [1, 0], torch.tensor([[1.0, 0.1]]), 2, (2,), 1e-5)
    assert ranked[2].tolist() == [[1, 0]]


def test_memory_mapped_features_of_half_precision_are_read(problem, tmp_path):
    train_features, train_labels, test_features, test_labels = problem
    np.save(tmp_path / "train.npy", train_features.half().numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "train.npy", mmap_mode="r+"))
    scores = knn_accuracy(mapped, train_labels, test_features, test_labels, NUM_CLASSES, ks=(5,))
    assert scores == knn_accuracy(mapped.float(), train_labels, test_features, test_labels, NUM_CLASSES, ks=(5,))
    assert isinstance(scores[5], KNNScore)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ks": (10, 212)}, "212 neighbours were asked for, but there are only 211 training images"),
        ({"ks": ()}, "ks must be numbers of neighbours"),
        ({"ks": (0, 5)}, r"each 1 or more, got \(0, 5\)"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"num_classes": 6}, r"training labels must lie in 0 ... 5, but image 6 has 6"),
        ({"num_classes": 8}, "1 of 8 classes have no image among the training images: 7"),
        ({"test_features": torch.zeros(5, 3)}, "test features have 3 channels"),
        ({"test_features": torch.full((5, HIDDEN_SIZE), torch.nan)}, "test features of image 0 are NaN"),
        ({"train_labels": torch.arange(5)}, "training labels must be 211 integers"),
    ],
)
def test_what_cannot_be_is_refused(problem, changes, named):
    arguments = dict(zip(("train_features", "train_labels", "test_features"), problem), num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match=named):
        knn_classify(**{**arguments, **changes})


def test_test_labels_are_checked_too(problem):
    with pytest.raises(ValueError, match="test labels must be 53 integers"):
        knn_accuracy(*problem[:3], problem[3][:-1], NUM_CLASSES)
