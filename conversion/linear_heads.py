# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Linear classifiers that are published beside a backbone."""

from pathlib import Path

import torch

from conversion.family import ConversionError
from conversion.reading import read_leaves
from conversion.timm_reference import imagenet_labels
from hf_vitreg import ViTRegConfig


# The width of a head, over the width of the model, and what it reads (dinov2/hub/classifiers.py).
LAYOUTS = {2: "cls_mean", 5: "last4_cls_mean"}


def read_linear_head(file: Path, config: ViTRegConfig) -> dict[str, torch.Tensor]:
    """`weight` and `bias` of a head; the config learns what it reads and what its classes are called.

    A head with 1000 classes is taken for one of ImageNet-1k.

    Raises:
        ConversionError: where the file is no linear head, or one of another width than 1 or 4 layers of this backbone.
    """
    head = read_leaves(file)
    shapes = {name: tuple(getattr(leaf, "shape", ())) for name, leaf in head.items()}
    if shapes.keys() != {"weight", "bias"} or len(shapes["weight"]) != 2 or shapes["bias"] != shapes["weight"][:1]:
        raise ConversionError(
            f"{file} is no linear head: it must hold weight (classes, width) and bias (classes), and holds {shapes}."
        )
    num_labels, width = shapes["weight"]
    one, four = (multiple * config.hidden_size for multiple in LAYOUTS)
    if width not in (one, four) or (width == four and config.num_hidden_layers < 4):
        raise ConversionError(
            f"{file} is a head on {width} features, and this backbone has {config.num_hidden_layers} layers, each "
            f"{config.hidden_size} wide: a 1-layer head reads {one} (CLS and the mean of the patches), a 4-layer head "
            f"{four} (CLS of four layers and the mean). Give the head that was trained on this backbone."
        )
    labels = imagenet_labels() if num_labels == 1000 else [f"LABEL_{index}" for index in range(num_labels)]
    config.classifier_layout = LAYOUTS[width // config.hidden_size]
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    return head
