# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Errors of monocular depth estimation (Eigen et al., NeurIPS 2014, section 4) as an `evaluate.Metric`."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Errors of predicted depth where the true depth was measured."
INPUTS = "predictions: predicted depth of each pixel in metres, a map an image. references: true depth, 0 for none."
# of NYU's frames, height and width, the part that Eigen et al. evaluate: rows and columns
EIGEN_SIZE = (480, 640)
EIGEN_CROP = (slice(45, 471), slice(41, 601))
# what is summed over the pixels of an image, and what becomes of its mean
SUMS = ("squared_error", "abs_rel", "log10", "delta1", "delta2", "delta3")


def valid_pixels(
    target: np.ndarray, min_depth: float = 1e-3, max_depth: float = 10.0, eigen_crop: bool = False
) -> np.ndarray:
    """The pixels that count: those with `min_depth <= target <= max_depth`, in NYU's frames within Eigen's crop.

    Args:
        target: True depth in metres, `(height, width)`.
        min_depth, max_depth: In metres; NYU's are the defaults.
        eigen_crop: Only rows 45 to 470 and columns 41 to 600 of 480x640 pixels, where Kinect's depth is whole.

    Returns:
        `(height, width)`, bool.

    Raises:
        ValueError: where the crop is asked for and the target is not of 480x640 pixels.
    """
    target = np.asarray(target)
    valid = (target >= min_depth) & (target <= max_depth)
    if not eigen_crop:
        return valid
    if target.shape != EIGEN_SIZE:
        raise ValueError(
            f"Eigen's crop is one of {_size(EIGEN_SIZE)} pixels, got depth of {_size(target.shape)}. Evaluate at the "
            "size of NYU's frames, or without the crop."
        )
    inside = np.zeros_like(valid)
    inside[EIGEN_CROP] = valid[EIGEN_CROP]
    return inside


def depth_error_sums(prediction: np.ndarray, target: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, int]:
    """What the errors of one image are means of, summed over its valid pixels.

    Args:
        prediction, target: Depth in metres, `(height, width)`.
        valid: The pixels that count, `(height, width)`, bool.

    Returns:
        `(len(SUMS),)`, float64, in the order of `SUMS`, and the number of pixels.

    Raises:
        ValueError: where shapes differ, or a prediction that counts is not positive and finite.
    """
    prediction, target = np.asarray(prediction), np.asarray(target)
    if prediction.shape != target.shape:
        raise ValueError(
            f"A depth map of {_size(target.shape)} pixels has a prediction of {_size(prediction.shape)}. Resize it "
            "first."
        )
    predicted, true = prediction[valid].astype(np.float64), target[valid].astype(np.float64)
    bad = ~(np.isfinite(predicted) & (predicted > 0))
    if bad.any():
        raise ValueError(
            f"{bad.sum()} of {bad.size} predicted depths are no positive numbers, {predicted[bad][0]} among them. "
            "Clamp predictions to the smallest and largest depth that count."
        )
    error, ratio = predicted - true, np.maximum(predicted / true, true / predicted)
    pixels = [error**2, np.abs(error) / true, np.abs(np.log10(predicted / true))]
    pixels += [ratio < 1.25**power for power in (1, 2, 3)]
    return np.array([values.sum() for values in pixels], dtype=np.float64), predicted.size


def depth_errors(sums: Sequence[Sequence[float]], counts: Sequence[int], average: str = "images") -> dict[str, float]:
    """The errors of images by what `depth_error_sums` says of each.

    Args:
        sums: `(num_images, len(SUMS))`.
        counts: Number of valid pixels of each, above 0.
        average: `"images"` or `"pixels"`, see `DepthErrors`.

    Returns:
        See `DepthErrors`.

    Raises:
        ValueError: where there is no image, or no such average.
    """
    if average not in ("images", "pixels"):
        raise ValueError(f'average must be "images" or "pixels", got {average!r}.')
    if not len(counts):
        raise ValueError("There is no image to compute the errors of.")
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts)
    if average == "pixels":
        sums, counts = sums.sum(axis=0, keepdims=True), counts.sum(keepdims=True)
    means = dict(zip(SUMS, (sums / counts[:, None]).T))
    errors = {"rmse": np.sqrt(means.pop("squared_error"))} | means
    return {name: float(values.mean()) for name, values in errors.items()}


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


class DepthErrors(evaluate.Metric):
    """RMSE, AbsRel, log10 and the accuracies delta of Eigen et al., where the true depth is valid.

    What is stored of an image is six sums, not its depth maps.

    Args:
        min_depth, max_depth: Of the true depth of pixels that count, in metres. The defaults are NYU's.
        eigen_crop: Whether only the middle of NYU's 480x640 pixels counts; see `valid_pixels`.
        kwargs: Of `evaluate.Metric`. With `num_process` and `process_id` each process adds its own images; one that
            has none calls `add_batch(predictions=[], references=[])`.

    `compute(average=...)` returns these, `"images"` for each image over its valid pixels and then the mean of the
    images, which is what DINOv2 and "Vision Transformers Need Registers" report, `"pixels"` over the valid pixels of
    all images at once, which counts images with many of them more and gives another RMSE:
        rmse: Root of the mean squared error, in metres.
        abs_rel: Mean of |prediction - target| / target.
        log10: Mean of |log10(prediction) - log10(target)|.
        delta1, delta2, delta3: Share of pixels where max(prediction / target, target / prediction) is below 1.25,
            1.25² and 1.25³.

    Raises:
        ValueError: at `add` and `add_batch` where shapes differ, an image has no valid pixel, or a prediction is not
            positive and finite; at `compute` where there is no image.
    """

    def __init__(self, min_depth: float = 1e-3, max_depth: float = 10.0, eigen_crop: bool = False, **kwargs):
        if not 0 < min_depth < max_depth:
            raise ValueError(f"Depths must be 0 < min_depth < max_depth, got {min_depth} and {max_depth}.")
        super().__init__(**kwargs)
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.eigen_crop = eigen_crop

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def add(self, *, prediction: np.ndarray, reference: np.ndarray) -> None:
        """Adds the depth of an image in metres, `(height, width)`."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> None:
        """Adds depth maps in metres, each `(height, width)`."""
        if len(predictions) != len(references):
            raise ValueError(f"There are {len(predictions)} predictions for {len(references)} references.")
        sums = [self._sums(*pair, index) for index, pair in enumerate(zip(predictions, references), len(self))]
        super().add_batch(predictions=[sum_ for sum_, _ in sums], references=[count for _, count in sums])

    def _sums(self, prediction: np.ndarray, target: np.ndarray, index: int) -> tuple[np.ndarray, int]:
        valid = valid_pixels(target, self.min_depth, self.max_depth, self.eigen_crop)
        if not valid.any():
            where = " within Eigen's crop" if self.eigen_crop else ""
            raise ValueError(
                f"Image {index} of those added, counted from 0, has no depth between {self.min_depth:g} and "
                f"{self.max_depth:g} m{where}. Leave it out, or allow other depths."
            )
        return depth_error_sums(prediction, target, valid)

    def _compute(self, predictions: list, references: list, average: str = "images") -> dict[str, float]:
        return depth_errors(predictions, references, average)
