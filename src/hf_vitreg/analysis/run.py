# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What was asked of an inspection, checked before anything is read, and the passes over the images."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch

from ..features import VisionEncoder
from .image_files import ImageFiles, ImageStream
from .norms import NormDistribution, NormStatistics, Side
from .outliers import ThresholdMethod, outlier_threshold
from .passes import Examination, Survey


NUM_PICTURES = 4
NUM_ABLATED_IMAGES = 1000  # each takes a forward pass a register


class Run:
    """What was asked for, checked, and the two passes over the images."""

    def __init__(
        self,
        encoder: VisionEncoder,
        images: ImageFiles,
        threshold: float | ThresholdMethod,
        side: Side,
        layer: int | None,
        size: tuple[int, int] | None,
        batch_size: int,
        seed: int,
        progress: bool,
        all_layers: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"The batch size must be 1 or more, got {batch_size}.")
        if not len(images):
            raise ValueError("There are no images to inspect the model with.")
        layer = encoder.num_layers if layer is None else layer
        if not 1 <= layer <= encoder.num_layers:
            raise ValueError(f"{encoder.name} has layers 1 to {encoder.num_layers}, got {layer}.")
        self.encoder, self.images, self.threshold, self.side = encoder, images, threshold, side
        self.layer, self.seed, self.batch_size, self.all_layers = layer, seed, batch_size, all_layers
        self.size = encoder.image_size if size is None else size
        self.grid = encoder.grid(*self.size)
        # mistakes are found before the images are read
        outlier_threshold(_one_norm(), threshold, side)
        encoder.preprocess([PIL.Image.new("RGB", (1, 1))], self.size)
        self.stream = ImageStream(encoder, images, self.size, batch_size, progress)
        self.notes: list[str] = []

    def survey(self) -> Survey:
        survey = Survey(self.encoder, self.layer)
        for _, pixel_values in self.stream.batches("Norms"):
            survey.update(pixel_values)
        return survey

    def examine(self, survey: Survey, norm: float) -> Examination:
        readable = [index for index in range(len(self.images)) if index not in self.stream.unreadable]
        pictures = {index: self.images.name(index) for index in _evenly(readable, NUM_PICTURES)}
        ablated = _evenly(readable, NUM_ABLATED_IMAGES)
        num_classes = 0 if self.images.labels is None else len(self.images.class_names)
        examination = Examination(
            survey,
            norm,
            self.side,
            self.grid,
            num_classes,
            self.seed,
            pictures,
            ablated,
            self._sees_attention(),
            self.all_layers,
        )
        for ids, pixel_values in self.stream.batches("Outliers"):
            labels = torch.tensor([self.images.labels[index] for index in ids]) if num_classes else None
            examination.update(ids, pixel_values, labels)
        return examination

    def _sees_attention(self) -> bool:
        """Whether all layers show it; they do not where they compute none, or several."""
        try:
            blank = torch.zeros(1, 3, *self.size)
            self.encoder.observe(blank, on_attention=lambda index, weights: None)
        except ValueError as error:
            self.notes.append(f"Attention is left out: {error}")
            return False
        return True


def _evenly(indices: Sequence[int], number: int) -> list[int]:
    """Some of them, the first and the last among them, or all where there are no more."""
    positions = np.linspace(0, len(indices) - 1, min(number, len(indices))).round().astype(int)
    return [indices[position] for position in positions]


def _one_norm() -> NormDistribution:
    statistics = NormStatistics()
    statistics.update({"patch": torch.ones(1, 1)})
    return statistics.distributions()[0]
