# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Linear classifiers that are published beside a backbone, and the names of their classes."""

from pathlib import Path

import torch

from conversion.family import ConversionError
from conversion.reading import read_leaves
from conversion.timm_reference import imagenet_labels
from hf_vitreg import ViTRegConfig


# What each layout reads, and how many times the width of the model that is.
WIDTHS = {"cls": 1, "cls_mean": 2, "last4_cls": 4, "last4_cls_mean": 5}
WORDS = {
    "cls": "CLS",
    "cls_mean": "CLS and the mean of the patches",
    "last4_cls": "CLS of four layers",
    "last4_cls_mean": "CLS of four layers and the mean",
}


def read_linear_head(
    file: Path, config: ViTRegConfig, layouts: tuple[str, ...] = ("cls_mean", "last4_cls_mean"), prefix: str = ""
) -> dict[str, torch.Tensor]:
    """`weight` and `bias` of a head; the config learns what it reads and what its classes are called.

    Args:
        file: Of the head.
        config: Of the backbone.
        layouts: Which the head may have (`ViTRegConfig.classifier_layout`): its width says which it has.
        prefix: What stands before the names; everything else in the file is then ignored.

    Raises:
        ConversionError: where the file is no linear head, or one of another width.
    """
    head = {name.removeprefix(prefix): leaf for name, leaf in read_leaves(file).items() if name.startswith(prefix)}
    shapes = {name: tuple(getattr(leaf, "shape", ())) for name, leaf in head.items()}
    if shapes.keys() != {"weight", "bias"} or len(shapes["weight"]) != 2 or shapes["bias"] != shapes["weight"][:1]:
        raise ConversionError(
            f"{file} is no linear head: it must hold {prefix}weight (classes, width) and {prefix}bias (classes), and "
            f"holds {shapes}."
        )
    num_labels, width = shapes["weight"]
    readable = [one for one in layouts if not one.startswith("last4") or config.num_hidden_layers >= 4]
    found = [layout for layout in readable if width == WIDTHS[layout] * config.hidden_size]
    if not found:
        heads = ", ".join(f"{WIDTHS[layout] * config.hidden_size} ({WORDS[layout]})" for layout in layouts)
        raise ConversionError(
            f"{file} is a head on {width} features, and this backbone has {config.num_hidden_layers} layers, each "
            f"{config.hidden_size} wide: heads read {heads} features. Give the head that was trained on this backbone."
        )
    config.classifier_layout = found[0]
    set_labels(config, num_labels)
    return head


def set_labels(config: ViTRegConfig, num_labels: int):
    """Names the classes. A head with 1000 is taken for one of ImageNet-1k."""
    labels = imagenet_labels() if num_labels == 1000 else [f"LABEL_{index}" for index in range(num_labels)]
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
