# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Mean intersection over union of segmentation masks as an `evaluate.Metric`."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Intersection over union of predicted and true masks, by class and on average over the classes."
INPUTS = "predictions: predicted class of each pixel, a mask an image. references: the true masks, of the same sizes."


def confusion_matrix(
    prediction: np.ndarray, target: np.ndarray, num_classes: int, ignore_index: int = 255
) -> np.ndarray:
    """How many pixels of each true class are predicted as each class.

    Args:
        prediction: `(height, width)`, or any other shape, of integers. Where the target is ignored it may be anything.
        target: Of the same shape.
        num_classes: Classes are 0 to `num_classes - 1`.
        ignore_index: Pixels with this target are not counted.

    Returns:
        `(num_classes, num_classes)`, int64: true classes in rows, predicted ones in columns.

    Raises:
        ValueError: where shapes differ, or a pixel that counts has no class.
    """
    prediction, target = np.asarray(prediction), np.asarray(target)
    if prediction.shape != target.shape:
        raise ValueError(f"A mask of {_size(target)} pixels has a prediction of {_size(prediction)}. Resize it first.")
    counted = target != ignore_index
    true, predicted = _classes(target[counted], "target"), _classes(prediction[counted], "prediction")
    for name, values in (("target", true), ("prediction", predicted)):
        if values.size and not 0 <= values.min() <= values.max() < num_classes:
            outside = sorted({*values[(values < 0) | (values >= num_classes)].tolist()})
            raise ValueError(
                f"The {name} has {', '.join(map(str, outside[:5]))} among its values. Allowed are the classes 0 to "
                f"{num_classes - 1}, and in targets {ignore_index}, which is ignored."
            )
    counts = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def _size(mask: np.ndarray) -> str:
    return "x".join(map(str, mask.shape))


def _classes(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind not in "biu":
        raise ValueError(f"The {name} must hold integers, the classes of the pixels, got {values.dtype}.")
    return values.astype(np.int64)


def iou_scores(
    correct: np.ndarray, predicted: np.ndarray, target: np.ndarray, ignore_index: int | None = None
) -> dict[str, float | list[float | None]]:
    """The scores of pixel counts by class, each `(num_classes,)`, summed over all images.

    Args:
        correct: Pixels of the class that are predicted as such, the diagonal of the confusion matrix.
        predicted: Pixels that are predicted as the class, its column sums.
        target: Pixels of the class, its row sums.
        ignore_index: Where it is one of the classes, this one is none.

    Returns:
        See `MeanIoU`.

    Raises:
        ValueError: where there is no pixel.
    """
    if not np.sum(target):
        raise ValueError("There is no pixel to compute the IoU of: every one is ignored.")
    union = predicted + target - correct
    if ignore_index is not None and 0 <= ignore_index < len(union):
        union = np.where(np.arange(len(union)) == ignore_index, 0, union)
    ious, accuracies = _shares(correct, union), _shares(correct, target)
    return {
        "mean_iou": float(np.nanmean(ious)),
        "mean_accuracy": float(np.nanmean(accuracies)),
        "overall_accuracy": float(np.sum(correct) / np.sum(target)),
        "per_category_iou": _or_none(ious),
        "per_category_accuracy": _or_none(accuracies),
    }


def _shares(counts: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """NaN where the total is zero."""
    return np.divide(counts, totals, out=np.full(len(totals), np.nan), where=totals > 0)


def _or_none(scores: np.ndarray) -> list[float | None]:
    """JSON has no NaN."""
    return [None if np.isnan(score) else score for score in scores.tolist()]


class MeanIoU(evaluate.Metric):
    """Mean IoU over all pixels added, and what goes with it. Masks may be of any sizes, each pair of the same.

    A class's intersections and unions are summed over all images before they are divided; images are not averaged. The
    mean is over the classes that occur in a target or in a prediction, as in mmsegmentation. Pixels whose target is
    `ignore_index` do not count, whatever is predicted there.

    What is stored of an image is three counts a class, not its masks: 3.6 kB for 150 classes.

    Args:
        num_classes: Classes are 0 to `num_classes - 1`.
        ignore_index: Value of target pixels that do not count.
        kwargs: Of `evaluate.Metric`. With `num_process` and `process_id` each process adds its own images; one that
            has none calls `add_batch(predictions=[], references=[])`.

    `compute` returns what evaluate's own metric of this name does:
        mean_iou, mean_accuracy: Mean over the classes; of the accuracy, over those in a target.
        overall_accuracy: Share of all pixels that are predicted right, also known as pixel accuracy.
        per_category_iou, per_category_accuracy: By class; `None` for one that does not occur.

    Raises:
        ValueError: at `add` and `add_batch` where shapes differ or a value is no class, at `compute` where no pixel
            is left to count.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, **kwargs):
        if num_classes < 1:
            raise ValueError(f"num_classes must be 1 or more, got {num_classes}.")
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def _info(self) -> evaluate.MetricInfo:
        counts = datasets.List(datasets.Value("int64"))
        features = datasets.Features({"predictions": datasets.List(counts), "references": counts})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def add(self, *, prediction: np.ndarray, reference: np.ndarray) -> None:
        """Adds the mask of an image, `(height, width)`."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> None:
        """Adds masks, each `(height, width)`."""
        if len(predictions) != len(references):
            raise ValueError(f"There are {len(predictions)} predictions for {len(references)} references.")
        matrices = [
            confusion_matrix(prediction, reference, self.num_classes, self.ignore_index)
            for prediction, reference in zip(predictions, references)
        ]
        super().add_batch(
            predictions=[[matrix.diagonal(), matrix.sum(axis=0)] for matrix in matrices],
            references=[matrix.sum(axis=1) for matrix in matrices],
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float | list[float | None]]:
        if not len(references):
            raise ValueError("There is no image to compute the IoU of.")
        correct, predicted = np.sum(predictions, axis=0)
        return iou_scores(correct, predicted, np.sum(references, axis=0), self.ignore_index)
