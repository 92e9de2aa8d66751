# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What is measured while a model trains: features, outliers among the norms, accuracy; without a trace in the run."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm as main_process_tqdm
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis.norms import NormStatistics, token_norms
from ..analysis.outliers import ThresholdMethod, outlier_threshold
from ..analysis.rank import effective_rank
from ..data.image_data import ImageData, read_ahead
from ..data.labelled_images import MappedImages
from ..distributed import forked_rng, num_cores, whole
from ..modeling_vitreg import ViTRegForImageClassification, ViTRegModel
from .knn import knn_classify
from .labelled import gathered, own_share
from .zero_shot import class_embeddings, zero_shot_logits


logger = logging.getLogger(__name__)

NUM_NEIGHBOURS = 20  # what DINO found best nearly everywhere (Caron et al., 2021, section 4.1)


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How images come to the model.

    Attributes:
        transform: What an image processor does: an RGB image to `(num_channels, height, width)`.
        accelerator: Of the processes that share the images.
        batch_size: Images at once, on each process.
    """

    transform: Callable[[PIL.Image.Image], torch.Tensor]
    accelerator: Accelerator
    batch_size: int = 64


def measure_features(
    backbone: ViTRegModel, validation: ImageData, train: MappedImages | None, how: Measuring
) -> dict[str, float]:
    """Nearest neighbours on CLS, and outliers among the patches. Collective; the same numbers on every process.

    Args:
        backbone: As it trains; measured in eval mode.
        validation: Images to classify, with labels where there is `train`, and to take norms of.
        train: The neighbours; `None` measures no accuracy. Of a class that has no image here none is recognized.
        how: How images come to the model.

    Returns:
        `knn_accuracy`, by the 20 nearest (`evaluation.knn`), where there is `train`; as `patch_outliers`; and
        `feature_rank`, the effective rank of CLS as a share of the most it could be for so many images.

    Raises:
        ValueError: where no image can be read, or what the model makes of them is not finite.
    """
    with _measured(backbone) as model:
        compute = functools.partial(_cls_and_norms, model)
        found = _of_images(validation, compute, how, "measuring features")
        cls = found.values[0]
        metrics = {**patch_outliers(found.values[1]), "feature_rank": (effective_rank(cls) / min(cls.shape)).item()}
        if train is not None:
            neighbours = _of_images(train, compute, how, "measuring neighbours")
            metrics = {"knn_accuracy": _knn_accuracy(train, neighbours, validation, found, how), **metrics}
    return metrics


def patch_outliers(norms: torch.Tensor, threshold: float | ThresholdMethod = "mad") -> dict[str, float]:
    """How far the largest norms are from the rest, as `hf-vitreg inspect` measures it (`analysis.outliers`).

    Args:
        norms: Of patches at the output of the last layer, before the final norm; of any shape.
        threshold: As for `outlier_threshold`.

    Returns:
        `outlier_share` of the patches beyond the threshold, `max_norm_ratio`, the largest norm over the median, and
        the `median_norm`.

    Raises:
        ValueError: where a norm is not finite.
    """
    statistics = NormStatistics()
    statistics.update({"patch": norms.flatten()[None]})
    (distribution,) = statistics.distributions()
    median = distribution.quantile(0.5)
    return {
        "outlier_share": distribution.share_beyond(outlier_threshold(distribution, threshold)),
        "max_norm_ratio": distribution.maximum / median,
        "median_norm": median,
    }


def classifier_accuracy(
    model: ViTRegForImageClassification, validation: MappedImages, how: Measuring
) -> dict[str, float]:
    """Of a classifier on labelled images; arguments, errors and processes as in `measure_features`.

    Returns:
        `validation_accuracy` and `validation_loss`, the cross-entropy in nats, over the images that can be read.
    """
    with _measured(model) as model:
        found = _of_images(validation, lambda pixel_values: [model(pixel_values).logits.float()], how, "validating")
    (logits,), labels = found.values, _labels(validation, found)
    return {
        "validation_accuracy": _share(logits.argmax(dim=-1) == labels),
        "validation_loss": cross_entropy(logits, labels).item(),
    }


def zero_shot_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    validation: MappedImages,
    how: Measuring,
    template: str = "a photo of a {}.",
    class_names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Of classes by their names alone; other arguments, errors and processes as in `measure_features`.

    Args:
        model: With `get_image_features` and `get_text_features`, as `evaluation.zero_shot` takes it.
        tokenizer: Of its texts.
        validation: Labelled images.
        how: How images come to the model.
        template: Sentence with one `{}`.
        class_names: As people write them, by label; by default what the data call them.

    Returns:
        `zero_shot_accuracy`.
    """
    with _measured(model) as model:
        classes = class_embeddings(model, tokenizer, class_names or validation.class_names, [template])
        found = _of_images(
            validation,
            lambda pixel_values: [model.get_image_features(pixel_values=pixel_values).pooler_output.float()],
            how,
            "validating without examples",
        )
    predicted = zero_shot_logits(found.values[0], classes).argmax(dim=-1)
    return {"zero_shot_accuracy": _share(predicted == _labels(validation, found))}


# One pass over images


@contextmanager
def _measured(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, whole where it is sharded; then its modes and the random state as they were."""
    modes = {module: module.training for module in model.modules()}
    with forked_rng(0), torch.no_grad():
        try:
            yield _whole(model.eval())
        finally:
            for module, mode in modes.items():
                module.training = mode


def _whole(model: nn.Module) -> nn.Module:
    """A copy without shards: a part of a sharded model cannot run alone, nor for images of one process."""
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model
    state = {name: whole(each) for name, each in state.items()}
    copy = type(model)(model.config)
    copy.load_state_dict(state, assign=True)
    return copy.eval()


@dataclass(frozen=True)
class _Found:
    """Of the images that can be read: their numbers, `(num_images,)`, and tensors with as many rows."""

    indices: torch.Tensor
    values: list[torch.Tensor]


def _of_images(
    images: ImageData, compute: Callable[[torch.Tensor], list[torch.Tensor]], how: Measuring, title: str
) -> _Found:
    """What is computed of batches, for all images on every process; each process reads and computes every n-th."""
    accelerator, parts = how.accelerator, []
    own = own_share(range(len(images)), accelerator)
    bar = main_process_tqdm(total=len(own), desc=title, unit="image", leave=False)
    for indices, pixel_values in _batches(images, own, how):
        with accelerator.autocast():
            values = compute(pixel_values.to(accelerator.device))
        parts.append((indices, [value.cpu() for value in values]))
        bar.update(len(indices))
    bar.close()
    parts = gathered(parts, accelerator)
    if not parts:
        raise ValueError(f"None of the {len(images)} images of {images.display_name} can be read.")
    indices = torch.tensor([index for indices, _ in parts for index in indices])
    order = indices.argsort()
    columns = zip(*(values for _, values in parts))
    return _Found(indices[order], [torch.cat(column)[order] for column in columns])


def _batches(images: ImageData, indices: Sequence[int], how: Measuring) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Numbers and pixels of images, decoded while the model computes; without those that cannot be read."""

    def read(index: int) -> tuple[int, torch.Tensor | None]:
        try:
            image = images.image(index)
        except ValueError as error:
            _warn_once(f"Left out of what is measured: {error}")
            return index, None
        return index, how.transform(image)

    with ThreadPoolExecutor(num_cores()) as pool:
        batch = {}
        for index, pixels in read_ahead(read, indices, pool, ahead=how.batch_size):
            if pixels is not None:
                batch[index] = pixels
            if batch and (len(batch) == how.batch_size or index == indices[-1]):
                yield list(batch), torch.stack(list(batch.values()))
                batch = {}


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _cls_and_norms(model: ViTRegModel, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """CLS after the final norm, or where there is none the mean of the patches; and norms of patches before it."""
    outputs = model(pixel_values, output_hidden_states=[-1])
    features = outputs.last_hidden_state[:, 0] if model.config.use_cls_token else outputs.patch_tokens.mean(dim=1)
    patches = outputs.hidden_states[-1][:, model.config.num_prefix_tokens :]
    return [features.float(), token_norms(patches)]


def _labels(images: MappedImages, found: _Found) -> torch.Tensor:
    return torch.tensor(images.labels)[found.indices]


def _share(correct: torch.Tensor) -> float:
    return correct.double().mean().item()


def _knn_accuracy(
    train: MappedImages, neighbours: _Found, validation: MappedImages, found: _Found, how: Measuring
) -> float:
    """Share of the validation images that the neighbours give their class."""
    # a class of many may have no image among the neighbours
    classes, labels = _labels(train, neighbours).unique(return_inverse=True)
    k = min(NUM_NEIGHBOURS, len(labels))
    features = neighbours.values[0], labels, found.values[0]
    predicted = knn_classify(*features, len(classes), ks=[k], accelerator=how.accelerator)[k]
    return _share(classes[predicted[:, 0]] == _labels(validation, found))
