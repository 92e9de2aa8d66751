# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Linear classifiers that are published beside a backbone, and the names of their classes."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from conversion.family import ConversionError, Family
from conversion.published import address, download
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


def locate_linear_head(
    family: Family,
    linear_head: str | None,
    published: Mapping[str, str],
    path: Callable[[str, str], str],
    arch: str | None,
    base_url: str | None = None,
    cache_dir: Path | None = None,
) -> Path | None:
    """The file that is meant by `--linear-head`; a published one is downloaded.

    Args:
        family: Of the backbone.
        linear_head: A file, or a key of `published`.
        published: What the user types, and the kind of head that is meant.
        path: From an architecture and a kind to the file, from the family's `base_url` on.
        arch: The architecture of the backbone, where one is known.
        base_url: Where the published files are, if not at the family's own address.
        cache_dir: Where downloads go; the folder of torch.hub where not given.

    Raises:
        ConversionError: where there is no such file, and where nobody says which published head is meant.
    """
    if linear_head is None:
        return None
    if linear_head not in published:
        if not Path(linear_head).exists():
            raise ConversionError(
                f"--linear-head {linear_head} is no file. Give one, or {' or '.join(published)} for a published head."
            )
        return Path(linear_head)
    if arch not in family.architectures:
        raise ConversionError(
            f"--linear-head {linear_head} asks for a published head, which fits a published backbone only. Give that "
            "one's name as CHECKPOINT, or say with --arch which one your file is."
        )
    return download(address(family, path(arch, published[linear_head]), base_url), cache_dir)


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
