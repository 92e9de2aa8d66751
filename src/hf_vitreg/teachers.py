# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Classifiers to distil from, of transformers or of timm, which see the images that a student is trained on."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedConfig

from .data.transforms import input_size
from .features import quiet_loading


class Classifier(NamedTuple):
    """A model as it was loaded.

    Attributes:
        model: Gives logits, or an output that has them.
        num_labels: Classes that it knows.
        class_names: Their names, in their order; empty where it has none.
        size: Height and width of the images that it was trained on, in pixels.
        mean, std: What it wants each channel normalized with.
    """

    model: nn.Module
    num_labels: int
    class_names: Sequence[str]
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]


class Teacher(nn.Module):
    """A classifier in eval mode, without gradient, for the images that a student gets.

    Args:
        classifier: Images of another size are resized for it, those of other statistics normalized anew.
        mean, std: What each channel of the student's images is normalized with.
    """

    def __init__(self, classifier: Classifier, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = classifier.model.eval().requires_grad_(False)
        self.size = classifier.size
        mean, std, own_mean, own_std = (
            torch.tensor(list(values))[:, None, None] for values in (mean, std, classifier.mean, classifier.std)
        )
        self.register_buffer("factor", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits, `(batch, num_labels)`, of pixel values `(batch, 3, height, width)`."""
        pixel_values = pixel_values * self.factor + self.shift
        if tuple(pixel_values.shape[-2:]) != self.size:
            pixel_values = F.interpolate(pixel_values, self.size, mode="bicubic", antialias=True)
        outputs = self.model(pixel_values)
        return getattr(outputs, "logits", outputs)

    def train(self, mode: bool = True) -> "Teacher":
        """It has no training mode."""
        return super().train(False)


def load_classifier(name: str, class_names: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> Teacher:
    """A classifier to distil from. No code of a repository is run.

    Args:
        name: A folder or id of transformers, ViTReg's among them; or `timm:NAME` with its published weights, where
            NAME may also be `hf-hub:ORG/NAME` or `local-dir:FOLDER`.
        class_names: Of the data, in whose order the classifier must have its own.
        mean, std: What each channel of the student's images is normalized with.

    Raises:
        ValueError: where there is no such classifier, its weights are not complete, it has another number of classes
            or the same ones in another order, or timm is not installed.
    """
    load = _load_timm if name.startswith("timm:") else _load_transformers
    try:
        with quiet_loading():
            classifier = load(name.removeprefix("timm:"))
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = textwrap.shorten(str(error), 800)
        raise ValueError(f"Cannot load --distillation_teacher {name}: {reason}") from error
    if classifier.num_labels != len(class_names):
        raise ValueError(
            f"--distillation_teacher {name} knows {classifier.num_labels} classes, and the data has "
            f"{len(class_names)}. Choose one that was trained on the same classes."
        )
    theirs, ours = list(classifier.class_names), list(class_names)
    if theirs != ours and sorted(theirs) == sorted(ours):
        place = next(index for index, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1])
        raise ValueError(
            f"--distillation_teacher {name} has the classes of the data in another order: its class {place} is "
            f"{theirs[place]!r}, and that of the data {ours[place]!r}. Choose one that was trained on this data."
        )
    return Teacher(classifier, mean, std)


def _load_transformers(name: str) -> Classifier:
    # not AutoConfig, which would first ask for leave to run the code of models that nobody knows
    if not PreTrainedConfig.get_config_dict(name)[0].get("model_type"):
        raise ValueError(f"its config.json is none of transformers'. For a model of timm write timm:hf-hub:{name}.")
    model, report = AutoModelForImageClassification.from_pretrained(
        name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} of its weights are missing, {missing[0]} among them. They would be random.")
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    class_names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    return Classifier(model, model.config.num_labels, class_names, input_size(processor), mean, std)


def _load_timm(name: str) -> Classifier:
    try:
        import timm
    except ImportError:
        raise ValueError("timm is not installed: pip install hf-vitreg[timm]") from None
    model = timm.create_model(name, pretrained=True)
    settings = timm.data.resolve_model_data_config(model)
    class_names = (model.pretrained_cfg or {}).get("label_names") or ()
    return Classifier(
        model, model.num_classes, class_names, settings["input_size"][1:], settings["mean"], settings["std"]
    )
