# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The neurons that make outliers of patches, by how active they are where outliers are.

"Vision Transformers Don't Need Trained Registers" (Jiang et al., 2025), algorithm 1. A neuron is a channel of an MLP
between its activation and its last linear map; of SwiGLU, of the gated product.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch

from ..analysis.image_files import ImageFiles, ImageStream
from ..analysis.norms import NormStatistics, token_norms
from ..analysis.outliers import ThresholdMethod, outlier_mask, outlier_threshold
from ..features import VisionEncoder
from ..modeling_vitreg import ViTRegPreTrainedModel
from .neuron_scores import NeuronScores
from .test_time import with_test_time_registers
from .test_time_hooks import attach_test_time_registers


# What was published, as arguments of `find_register_neurons`: in the paper, and where they differ in the released code
# (github.com/nickjiang2378/test-time-registers, configs/*.yaml) under "-code".
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "dinov2-large": {"threshold": 150.0, "detect_layer": -2, "highest_layer": 17, "num_neurons": 45},
    "dinov2-large-code": {"threshold": 150.0, "detect_layer": -2, "highest_layer": 17, "num_neurons": 50},
    "openclip-base": {"threshold": 75.0, "detect_layer": -1, "highest_layer": 5, "num_neurons": 10},
    "openclip-base-code": {"threshold": 30.0, "detect_layer": -1, "highest_layer": 5, "num_neurons": 10},
}
TARGET = 0.05  # of the outliers that there were
MAX_SHARE, LEAST_MAX = 0.01, 16  # of all neurons, where nobody says how many to try


@dataclass(frozen=True, eq=False)
class RegisterNeurons:
    """What was found, and what was chosen or measured on the way.

    Attributes:
        neurons: The register neurons: from a layer, counted from 0, to channels of its MLP, most active first.
        ranking: The same as pairs of layer and channel, most active of all first.
        scores: Mean magnitude at outliers, `(num_layers, num_neurons)`, float64, of the layers above the highest too.
        threshold: The norm beyond which a patch is an outlier.
        detect_layer: After which layer, counted from 0.
        highest_layer: The last layer that neurons were taken from, counted from 0.
        num_images, num_images_with_outliers: That were looked at.
        outlier_share: Of all patches, as the model is.
        target_share: Which the share was to fall to with the shift; `None` where the number of neurons was given.
        tried: With so many neurons shifted, the share that is left. Empty where the number was given.
    """

    neurons: dict[int, list[int]]
    ranking: list[tuple[int, int]]
    scores: torch.Tensor
    threshold: float
    detect_layer: int
    highest_layer: int
    num_images: int
    num_images_with_outliers: int
    outlier_share: float
    target_share: float | None
    tried: Mapping[int, float]

    @property
    def shifted_share(self) -> float | None:
        """Share of outliers that is left when these neurons are shifted; `None` where it was not measured."""
        return self.tried.get(len(self.ranking))

    @property
    def reaches_target(self) -> bool | None:
        """Whether that is no more than the target; `None` where there was none."""
        return None if self.target_share is None else self.shifted_share <= self.target_share


def find_register_neurons(
    encoder: VisionEncoder,
    images: ImageFiles | Sequence[Path | PIL.Image.Image],
    *,
    threshold: float | ThresholdMethod = "mean+3std",
    detect_layer: int = -1,
    highest_layer: int | None = None,
    num_neurons: int | None = None,
    target_share: float | None = None,
    max_neurons: int | None = None,
    num_registers: int = 1,
    reduce: Literal["neuron", "layer"] = "neuron",
    only_patches: bool = True,
    only_sparse: bool = False,
    size: tuple[int, int] | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> RegisterNeurons:
    """Finds register neurons on some hundred images: those with the largest mean activation at outliers.

    The defaults find settings for any model. `PUBLISHED` has those of the paper: `find_register_neurons(encoder,
    images, **PUBLISHED["dinov2-large"])`. Where threshold, highest layer and number are given, that is one pass over
    the images, as long as a forward pass; a threshold by a method takes another, and so does every number of neurons
    that is tried.

    Args:
        encoder: A ViTReg, or a model of transformers or timm, without test-time registers.
        images: Some hundred files or images (500 in the paper).
        threshold: Beyond which norm a patch is an outlier, or how to find it from the norms, see `outlier_threshold`.
        detect_layer: After which layer, from 0, or from the end with -1 the last. DINOv2's last layer lowers norms.
        highest_layer: Neurons are of this layer, from 0, or those before it: what is behind reads outliers and does
            not make them. By default the first after which half of the outliers are beyond the threshold.
        num_neurons: How many. By default as few as make the outliers fall to `target_share`: their number is doubled
            until they do, then the least number is looked for in between.
        target_share: Of all patches; by default a twentieth of the share of outliers without registers.
        max_neurons: How many are tried at most; by default a hundredth of those up to the highest layer.
        num_registers, reduce: Of the shift that is tried: see `with_test_time_registers`.
        only_patches: Whether scores are of patches alone. The released code takes CLS too where its norm is beyond
            the threshold (`False`).
        only_sparse: Whether a neuron counts in those images alone where its activation is below 0.5 in half of the
            tokens: a filter of the released code, where it is off by default as here.
        size: Height and width in pixels that images are brought to; by default those of the model.
        batch_size: Only for speed and memory.
        progress: Show progress bars on stderr.

    Returns:
        The neurons. Where the outliers never fell to the target, those with which the fewest were left, and
            `reaches_target` is false.

    Raises:
        ValueError: where no image can be used, there are no outliers, or those beyond a threshold that a method found
            are no group of their own; for a model with test-time registers or with layers that are not one attention
            and one MLP; and for numbers that there cannot be.
    """
    images = images if isinstance(images, ImageFiles) else ImageFiles(images)
    numbers = {"num_neurons": num_neurons, "max_neurons": max_neurons, "num_registers": num_registers}
    _check(encoder, images, threshold, highest_layer, target_share, {**numbers, "batch_size": batch_size})
    detect_layer = encoder.layer_index(detect_layer)
    stream = ImageStream(encoder, images, encoder.image_size if size is None else size, batch_size, progress)
    by_method = isinstance(threshold, str)
    if by_method:
        threshold = _found_threshold(encoder, stream, detect_layer, threshold)
    scores = NeuronScores(encoder, threshold, detect_layer, only_patches, only_sparse)
    for _, pixel_values in stream.batches("Register neurons"):
        scores.update(pixel_values)
    scores.require_outliers(apart=by_method)
    highest_layer = scores.first_layer() if highest_layer is None else highest_layer
    ranking = _ranking(scores.mean[: highest_layer + 1])
    tried, target = {}, None
    if num_neurons is None:
        target = TARGET * scores.outlier_share if target_share is None else target_share
        most = max(LEAST_MAX, int(MAX_SHARE * len(ranking))) if max_neurons is None else max_neurons

        def share_left(number: int) -> float:
            with _shifted(encoder, _by_layer(ranking[:number]), num_registers, reduce) as shifted:
                return _outlier_share(shifted, stream, detect_layer, threshold, f"{number} neurons")

        num_neurons, tried = _raise_number(share_left, target, min(most, len(ranking)))
    elif num_neurons > len(ranking):
        raise ValueError(f"Layers 0 to {highest_layer} have {len(ranking)} neurons, {num_neurons} were asked for.")
    chosen = ranking[:num_neurons]
    return RegisterNeurons(
        neurons=_by_layer(chosen),
        ranking=chosen,
        scores=scores.mean,
        threshold=threshold,
        detect_layer=detect_layer,
        highest_layer=highest_layer,
        num_images=scores.num_images,
        num_images_with_outliers=scores.num_images_with_outliers,
        outlier_share=scores.outlier_share,
        target_share=target,
        tried=tried,
    )


def _patch_norms(encoder: VisionEncoder, stream: ImageStream, layer: int, title: str) -> Iterator[torch.Tensor]:
    """After a layer, `(batch_size, rows * cols)` of each batch."""
    for _, pixel_values in stream.batches(title):
        yield token_norms(encoder.split(encoder.layers(pixel_values, [layer])[layer]).patches)


def _found_threshold(encoder: VisionEncoder, stream: ImageStream, layer: int, method: ThresholdMethod) -> float:
    statistics = NormStatistics()
    for norms in _patch_norms(encoder, stream, layer, "Norms"):
        statistics.update({"patch": norms[None]})
    return outlier_threshold(statistics.distributions()[0], method)


def _outlier_share(encoder: VisionEncoder, stream: ImageStream, layer: int, threshold: float, title: str) -> float:
    num_outliers = num_patches = 0
    for norms in _patch_norms(encoder, stream, layer, title):
        num_outliers += int(outlier_mask(norms, threshold).sum())
        num_patches += norms.numel()
    return num_outliers / num_patches


@contextmanager
def _shifted(
    encoder: VisionEncoder, neurons: Mapping[int, Sequence[int]], num_registers: int, reduce: str
) -> Iterator[VisionEncoder]:
    """The same model with test-time registers, of the same weights."""
    if isinstance(encoder.model, ViTRegPreTrainedModel):
        model = with_test_time_registers(encoder.model, neurons, num_registers, reduce, copy_weights=False)
        yield VisionEncoder.wrap(model, encoder.name, encoder.mean, encoder.std)
        return
    with attach_test_time_registers(encoder.model, neurons, num_registers, reduce):
        yield encoder


def _ranking(scores: torch.Tensor) -> list[tuple[int, int]]:
    """Layer and channel of every score, the largest first; of equal ones the first."""
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return [divmod(index, scores.shape[1]) for index in order]


def _by_layer(ranking: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    return {layer: [neuron for its_layer, neuron in ranking if its_layer == layer] for layer in sorted(dict(ranking))}


def _raise_number(share_left: Callable[[int], float], target: float, most: int) -> tuple[int, dict[int, float]]:
    """The least number found with which no more than the target is left, and all that were tried.

    Where there is none up to the most, the number with which the least is left. The share does not have to fall with
    every neuron; between a number that does and half of it that does not, the least is looked for as if it did.
    """
    tried, number = {}, 1
    while True:
        tried[number] = share_left(number)
        if tried[number] <= target:
            break
        if number == most:
            return min(tried, key=lambda each: (tried[each], each)), tried
        number = min(2 * number, most)
    too_few = max((each for each in tried if each < number), default=0)
    while number - too_few > 1:
        middle = (number + too_few) // 2
        tried[middle] = share_left(middle)
        if tried[middle] <= target:
            number = middle
        else:
            too_few = middle
    return number, tried


def _check(
    encoder: VisionEncoder,
    images: ImageFiles,
    threshold: float | ThresholdMethod,
    highest_layer: int | None,
    target_share: float | None,
    numbers: Mapping[str, int | None],
) -> None:
    """Raises `ValueError`: see `find_register_neurons`."""
    if not len(images):
        raise ValueError("There are no images to find register neurons on.")
    # mistakes are found before the images are read
    one_norm = NormStatistics()
    one_norm.update({"patch": torch.ones(1, 1)})
    outlier_threshold(one_norm.distributions()[0], threshold)
    present = getattr(getattr(encoder.model, "config", None), "num_test_time_registers", 0)
    if present:
        raise ValueError(
            f"{encoder.name} has {present} test-time registers already. Find neurons on the model without them."
        )
    if highest_layer is not None and not 0 <= highest_layer < encoder.num_layers:
        raise ValueError(
            f"{encoder.name} has layers 0 to {encoder.num_layers - 1}, got highest_layer={highest_layer}."
        )
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be 1 or more, got {number}.")
    if target_share is not None and not 0 <= target_share < 1:
        raise ValueError(f"target_share must be 0 or more and below 1, got {target_share}.")
