# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import inspect
import json
from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest
import sklearn.metrics

from hf_vitreg.metrics import mean_iou
from hf_vitreg.metrics.mean_iou import MeanIoU, confusion_matrix, iou_scores


NUM_CLASSES, IGNORED = 7, 11


def masks(count=5, seed=0):
    """Masks of different sizes, without class 4 in any target and class 6 anywhere, a tenth ignored."""
    generator = np.random.default_rng(seed)
    targets = [generator.choice([0, 1, 2, 3, 5], size=(13 + index, 17)).astype("uint8") for index in range(count)]
    predictions = [np.where(generator.random(each.shape) < 0.6, each, generator.integers(0, 6)) for each in targets]
    for target in targets:
        target[generator.random(target.shape) < 0.1] = IGNORED
    return predictions, targets


def flat(predictions, targets):
    prediction, target = (np.concatenate([mask.ravel() for mask in each]) for each in (predictions, targets))
    return prediction[target != IGNORED], target[target != IGNORED]


def metric(**kwargs):
    return MeanIoU(NUM_CLASSES, IGNORED, **kwargs)


def test_confusion_matrix_is_that_of_scikit_learn():
    [prediction], [target] = masks(1)
    expected = sklearn.metrics.confusion_matrix(*reversed(flat([prediction], [target])), labels=range(NUM_CLASSES))
    found = confusion_matrix(prediction, target, NUM_CLASSES, IGNORED)
    assert found.dtype == np.int64 and np.array_equal(found, expected)


def test_scores_are_those_of_scikit_learn():
    predictions, targets = masks()
    prediction, target = flat(predictions, targets)
    found = metric(keep_in_memory=True).compute(predictions=predictions, references=targets)
    occurring = sorted({*prediction.tolist(), *target.tolist()})
    ious = sklearn.metrics.jaccard_score(target, prediction, labels=occurring, average=None)
    assert found["mean_iou"] == pytest.approx(ious.mean(), abs=1e-12)
    assert [found["per_category_iou"][label] for label in occurring] == pytest.approx(ious.tolist(), abs=1e-12)
    assert found["overall_accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(target, prediction), abs=1e-12)
    labels = sorted(set(target.tolist()))
    recalls = sklearn.metrics.recall_score(target, prediction, labels=labels, average=None)
    assert found["mean_accuracy"] == pytest.approx(recalls.mean(), abs=1e-12)
    assert [found["per_category_accuracy"][label] for label in labels] == pytest.approx(recalls.tolist(), abs=1e-12)


def test_by_hand():
    prediction, target = np.array([[0, 0, 1], [2, 1, 1]]), np.array([[0, 1, 1], [0, 9, 1]])
    # class 0: 1 of 3 pixels in either, class 1: 2 of 3, class 2 is predicted and nowhere true, class 3 does not occur
    assert MeanIoU(4, 9, keep_in_memory=True).compute(predictions=[prediction], references=[target]) == {
        "mean_iou": pytest.approx((1 / 3 + 2 / 3 + 0) / 3),
        "mean_accuracy": pytest.approx((1 / 2 + 2 / 3) / 2),
        "overall_accuracy": 3 / 5,
        "per_category_iou": [pytest.approx(1 / 3), pytest.approx(2 / 3), 0.0, None],
        "per_category_accuracy": [0.5, pytest.approx(2 / 3), None, None],
    }


def test_the_same_however_images_are_added():
    predictions, targets = masks()
    together = metric(keep_in_memory=True).compute(predictions=predictions, references=targets)
    batches, one_by_one = metric(keep_in_memory=True), metric(keep_in_memory=True)
    for part in (slice(0, 2), slice(2, 5)):
        batches.add_batch(predictions=predictions[part], references=targets[part])
    for prediction, target in zip(predictions, targets):
        one_by_one.add(prediction=prediction, reference=target)
    assert batches.compute() == one_by_one.compute() == together
    json.dumps(together, allow_nan=False)


def test_loads_from_its_file_without_a_network(tmp_path):
    loaded = evaluate.load(inspect.getfile(mean_iou), cache_dir=str(tmp_path), num_classes=3, ignore_index=7)
    scores = loaded.compute(predictions=[np.array([[0, 1]])], references=[np.array([[0, 7]])])
    assert scores["mean_iou"] == 1.0


@pytest.mark.parametrize("num_processes", [2, 6])
def test_several_processes_count_every_image_once(tmp_path, num_processes):
    """With 5 images over 6 processes one has none. evaluate's processes meet in files, so that threads are as good."""
    predictions, targets = masks()

    def process(rank):
        part = metric(cache_dir=str(tmp_path), num_process=num_processes, process_id=rank)
        part.add_batch(predictions=predictions[rank::num_processes], references=targets[rank::num_processes])
        return part.compute()

    with ThreadPoolExecutor(num_processes) as pool:
        first, *others = pool.map(process, range(num_processes))
    assert first == metric(keep_in_memory=True).compute(predictions=predictions, references=targets)
    assert others == [None] * (num_processes - 1)


def test_what_is_stored_of_an_image_is_small():
    target = np.zeros((600, 700), dtype="uint8")
    stored = MeanIoU(150, keep_in_memory=True)
    for _ in range(8):
        stored.add(prediction=target, reference=target)
    stored.writer.finalize()
    assert stored.buf_writer.getvalue().size / 8 < 5000


def test_an_ignored_class_is_none():
    prediction, target = np.array([[0, 2, 1, 2]]), np.array([[0, 2, 1, 1]])
    scores = MeanIoU(3, ignore_index=2, keep_in_memory=True).compute(predictions=[prediction], references=[target])
    assert scores["per_category_iou"] == [1.0, 0.5, None] and scores["mean_iou"] == 0.75


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        ([[0, 7]], [[0, 1]], r"prediction has 7 among its values. Allowed are the classes 0 to 6"),
        ([[0, IGNORED]], [[0, 1]], "prediction has 11 among"),
        ([[0, -1]], [[0, 1]], "prediction has -1 among"),
        ([[0, 1]], [[0, 255]], "target has 255 among its values.*and in targets 11, which is ignored"),
        ([[0, 1]], [[0, 1, 2]], "A mask of 1x3 pixels has a prediction of 1x2"),
        ([[0.0, 1.0]], [[0, 1]], "prediction must hold integers.*got float64"),
    ],
)
def test_values_outside_the_classes_are_errors(prediction, target, message):
    with pytest.raises(ValueError, match=message):
        metric(keep_in_memory=True).add(prediction=np.array(prediction), reference=np.array(target))


def test_predictions_where_nothing_counts_may_be_anything():
    assert confusion_matrix(np.array([3, 99]), np.array([3, 255]), 5).sum() == 1


def test_nothing_to_count_is_an_error():
    everything_ignored = np.full((3, 5), IGNORED)
    with pytest.raises(ValueError, match="no pixel"):
        metric(keep_in_memory=True).compute(predictions=[everything_ignored], references=[everything_ignored])
    with pytest.raises(ValueError, match="no image"):
        metric(keep_in_memory=True).compute(predictions=[], references=[])
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        metric(keep_in_memory=True).compute(predictions=[everything_ignored], references=[everything_ignored] * 2)
    with pytest.raises(ValueError, match="num_classes must be 1 or more, got 0"):
        MeanIoU(0)


def test_scores_of_a_confusion_matrix():
    matrix = np.array([[3, 1], [2, 4]])
    scores = iou_scores(matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1))
    assert scores["per_category_iou"] == [pytest.approx(3 / 6), pytest.approx(4 / 7)]
