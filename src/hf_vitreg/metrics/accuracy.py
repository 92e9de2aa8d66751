# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Top-1 accuracy as an `evaluate.Metric`."""

import datasets
import evaluate
import numpy as np


DESCRIPTION = "Share of the images whose predicted class is the true one."
INPUTS = "predictions: predicted class of each image. references: true class; images with -100 are left out."


class Accuracy(evaluate.Metric):
    """Top-1 accuracy over all images added, in `[0, 1]`. A reference of -100 (an unreadable image) is not counted.

    Raises:
        ValueError: at `compute`, where no image is left to count.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features, format="numpy"
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        counted = references != -100
        if not counted.any():
            raise ValueError("There is no image to compute the accuracy of.")
        return {"accuracy": float((predictions == references)[counted].mean())}
