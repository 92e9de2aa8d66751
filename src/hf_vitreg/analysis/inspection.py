# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Everything that the registers paper measured, on any ViT and any images, in two passes over them.

The first pass finds the norm beyond which a patch is an outlier, the second what outliers are. Sums are kept and never
tokens, so that memory does not grow with the number of images; results do not depend on the batch size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from ..features import VisionEncoder
from .image_files import ImageFiles
from .measurements import Measurements, plain
from .norms import NormDistribution, Side
from .outliers import ThresholdMethod, outlier_threshold
from .passes import Picture
from .run import Run


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was measured.

    Attributes:
        metrics: All numbers, as JSON can say them; what there is none of is `None`.
        distributions: Norms of patches, CLS and every register after each layer, of patches from the embedding on.
        arrays: What figures need beside: outlier frequency over the grid, densities of neighbour similarity.
        pictures: Maps of a few images.
    """

    metrics: dict
    distributions: Mapping[str, list[NormDistribution]]
    arrays: Mapping[str, np.ndarray]
    pictures: Sequence[Picture]


def inspect(
    encoder: VisionEncoder,
    images: ImageFiles | Sequence[Path | PIL.Image.Image],
    *,
    threshold: float | ThresholdMethod = "mad",
    side: Side = "high",
    layer: int | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
    all_layers: bool = False,
) -> Inspection:
    """Measures whether a ViT has artifacts, where, and what they carry.

    Args:
        encoder: From `load_vit` or `VisionEncoder.wrap`.
        images: Files or images; from `find_images` they come with classes, which one of the probes needs.
        threshold: Beyond which norm a patch is an outlier: a number or a method, see `outlier_threshold`.
        side: Of the threshold that outliers are on.
        layer: After which layer patches are looked at, 1 to `num_layers`; by default the last.
        size: Height and width in pixels that images are brought to; by default those of the model.
        batch_size: Only for speed and memory.
        seed: Of the probes' split and draws.
        progress: Show progress bars on stderr.
        all_layers: Keep the attention maps of every head at every layer for the pictures.

    Returns:
        The measurements.

    Raises:
        ValueError: where no image can be used, or there is no such layer, size, threshold or side.
    """
    images = images if isinstance(images, ImageFiles) else ImageFiles(images)
    run = Run(encoder, images, threshold, side, layer, size, batch_size, seed, progress, all_layers)
    survey = run.survey()
    norm = outlier_threshold(survey.norms.distributions()[run.layer], threshold, side)
    examination = run.examine(survey, norm)
    distributions = {kind: survey.norms.distributions(kind) for kind in survey.norms.kinds}
    metrics = Measurements(run, survey, examination).collect()
    densities = examination.similarity["patch"]
    arrays = {
        "outlier_frequency": examination.frequency.frequency.numpy(),
        "similarity_edges": densities.rest.edges.numpy(),
        "similarity_outliers": densities.outliers.density.numpy(),
        "similarity_rest": densities.rest.density.numpy(),
    }
    return Inspection(plain(metrics), distributions, arrays, examination.pictures)
