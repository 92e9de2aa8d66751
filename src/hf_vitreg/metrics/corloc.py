# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""CorLoc, the share of images in which one box finds an object, as an `evaluate.Metric`."""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Share of the images whose predicted box overlaps a true one with an IoU of 0.5 or more."
INPUTS = (
    "predictions: one box of each image, (left, top, right, bottom) in pixels. references: the true boxes of each "
    "image, a list of such; images without any are left out."
)
CITATION = "Deselaers, Alexe, Ferrari: Localizing Objects While Learning Their Appearance, ECCV 2010"
EPSILON = np.float32(1e-7)  # which the published code of LOST has in its IoU


def box_iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of one box with others, in the float32 of the published code of LOST: at 0.5 rounding decides.

    Args:
        box: `(4,)`, left, top, right, bottom.
        boxes: `(num_boxes, 4)`.

    Returns:
        `(num_boxes,)`, in `[0, 1]`.
    """
    box, boxes = np.asarray(box, dtype=np.float32), np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    left_top, right_bottom = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    intersection = np.clip(right_bottom - left_top, 0, None).prod(axis=1)
    union = _area(box[None]) + _area(boxes) - intersection + EPSILON
    return intersection / union


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1] + EPSILON)


def is_found(box: np.ndarray, boxes: np.ndarray) -> bool:
    """Whether a box overlaps one of the others with an IoU of 0.5 or more."""
    return bool((box_iou(box, boxes) >= 0.5).any())


class CorLoc(evaluate.Metric):
    """CorLoc over all images added, in `[0, 1]`; papers print it in percent. Images without a true box do not count.

    Raises:
        ValueError: at `compute`, where no image is left to count.
    """

    def _info(self) -> evaluate.MetricInfo:
        box = datasets.Sequence(datasets.Value("float64"), length=4)
        features = datasets.Features({"predictions": box, "references": datasets.Sequence(box)})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions: list[list[float]], references: list[list[list[float]]]) -> dict[str, float]:
        found = [is_found(box, boxes) for box, boxes in zip(predictions, references) if len(boxes)]
        if not found:
            raise ValueError("There is no image with a true box to compute CorLoc of.")
        return {"corloc": float(np.mean(found))}
