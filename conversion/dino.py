# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""DINO, the first (Caron et al., ICCV 2021): ViT-S and ViT-B with patches of 16 and 8 pixels.

Names and addresses are those of https://github.com/facebookresearch/dino: hubconf.py and README.md; what the linear
classifiers read is in eval_linear.py.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from conversion.family import APACHE_2, Architecture, Family, Prepared, Published
from conversion.linear_heads import locate_linear_head, read_linear_head
from conversion.published import locate
from conversion.timm_reference import require_timm
from conversion.vit_layout import (
    BACKBONE_RULES,
    EVERY_BACKBONE_HAS,
    HEAD_DIM,
    fields_with_grid,
    image_processor,
    prepare_with_timm,
    read_backbone,
)
from hf_vitreg import ViTRegConfig


ARCHITECTURES = {
    "vits16": Architecture(384, 12, 1536, patch_size=16),
    "vits8": Architecture(384, 12, 1536, patch_size=8),
    "vitb16": Architecture(768, 12, 3072, patch_size=16),
    "vitb8": Architecture(768, 12, 3072, patch_size=8),
}
# The files have older names than the models.
FILES = {"vits16": "deitsmall16", "vits8": "deitsmall8", "vitb16": "vitbase16", "vitb8": "vitbase8"}
PUBLISHED_HEADS = {"imagenet": "linearweights"}


def _path(arch: str, suffix: str) -> str:
    return f"dino_{FILES[arch]}_pretrain/dino_{FILES[arch]}_{suffix}.pth"


def config(fields: Mapping) -> ViTRegConfig:
    """DINO has no LayerScale, and interpolates as DINOv2 without registers does."""
    return ViTRegConfig(
        num_attention_heads=fields["hidden_size"] // HEAD_DIM,
        layerscale_value=None,
        interpolate_antialias=False,
        interpolate_offset=0.1,
        classifier_layout="cls",
        **fields,
    )


FAMILY = Family(
    name="dino",
    title="DINO",
    architectures=ARCHITECTURES,
    published={
        f"dino_{arch}": Published(arch, _path(arch, "pretrain"), APACHE_2, f"facebook/dino-{arch}") for arch in FILES
    }
    | {f"dino_{arch}_full": Published(arch, _path(arch, "pretrain_full_checkpoint"), APACHE_2) for arch in FILES},
    base_url="https://dl.fbaipublicfiles.com/dino",
    config=lambda arch: config({**vars(arch), "image_size": 224}),
)


def prepare(
    checkpoint: str,
    arch: str | None = None,
    linear_head: str | None = None,
    image_size: int | None = None,
    base_url: str | None = None,
    cache_dir: Path | None = None,
    license: str | None = None,
) -> Prepared:
    """A DINO checkpoint as ViTReg, with timm's model beside it.

    Args:
        checkpoint: A file, or a published name: "dino_vits16", or "dino_vits16_full" with its projection head.
        arch: The architecture that the shapes must be of, e.g. "vitb8"; "custom" allows any.
        linear_head: A file, or "imagenet" for the published one.
        image_size: In pixels. What the position embeddings must be for; the shapes decide where not given.
        base_url: Where the published files are.
        cache_dir: Where downloads go; the folder of torch.hub where not given.
        license: Of the weights, for the card. Published ones are Apache-2.0; that of a file is "unknown" if not given.

    Raises:
        ConversionError: for everything that is not a whole DINO checkpoint of this architecture.
    """
    require_timm()
    located = locate(FAMILY, checkpoint, arch, base_url, cache_dir, license)
    head_file = locate_linear_head(FAMILY, linear_head, PUBLISHED_HEADS, _path, located.arch, base_url, cache_dir)
    backbone = read_backbone(located.file)
    own_config = config(fields_with_grid(located.file, backbone.tensors, FAMILY.title, EVERY_BACKBONE_HAS))
    # eval_linear.py, for validation
    crop = max(224 // own_config.patch_size, 1) * own_config.patch_size
    processor = image_processor(resize=256, crop=crop)
    return prepare_with_timm(
        FAMILY, located, backbone, own_config, BACKBONE_RULES, processor, image_size, head_file, _read_linear_head
    )


def _read_linear_head(file: Path, own_config: ViTRegConfig) -> dict[str, torch.Tensor]:
    """Linear classifier as eval_linear.py saves it: on CLS and the mean, it reads them channel by channel in turn."""
    head = read_linear_head(file, own_config, ("cls", "cls_mean", "last4_cls"), prefix="state_dict.module.linear.")
    if own_config.classifier_layout == "cls_mean":
        head["weight"] = head["weight"].unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)
    return head
