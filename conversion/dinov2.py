# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""DINOv2, with and without registers (Oquab et al., TMLR 2024; Darcet et al., ICLR 2024).

Sizes, names and rules are those of https://github.com/facebookresearch/dinov2: dinov2/hub/backbones.py for the
architectures, dinov2/hub/classifiers.py for the heads, dinov2/models/vision_transformer.py for the names.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from conversion.family import APACHE_2, Architecture, Family, Prepared, Published
from conversion.linear_heads import locate_linear_head
from conversion.published import locate
from conversion.renaming import Rules
from conversion.timm_reference import require_timm
from conversion.vit_layout import (
    BACKBONE_RULES,
    EVERY_BACKBONE_HAS,
    HEAD_DIM,
    LAYER_SCALE_RULES,
    NEW,
    OLD,
    fields_with_grid,
    image_processor,
    prepare_with_timm,
    read_backbone,
)
from hf_vitreg import ViTRegConfig


WITHOUT_REGISTERS = {
    "vits14": Architecture(384, 12, 1536),
    "vitb14": Architecture(768, 12, 3072),
    "vitl14": Architecture(1024, 24, 4096),
    "vitg14": Architecture(1536, 40, 4096, use_swiglu_ffn=True),
}
ARCHITECTURES = WITHOUT_REGISTERS | {
    f"{name}_reg4": replace(arch, num_register_tokens=4) for name, arch in WITHOUT_REGISTERS.items()
}
HUB_SIZES = {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}

RULES: Rules = {
    **BACKBONE_RULES,
    **LAYER_SCALE_RULES,
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    OLD + ".mlp.w12.{param}": (NEW + ".mlp.gate_proj.{param}", NEW + ".mlp.up_proj.{param}"),
    OLD + ".mlp.w3.{param}": NEW + ".mlp.down_proj.{param}",
}
REQUIRED = (*EVERY_BACKBONE_HAS, "blocks.0.ls1.gamma")
PUBLISHED_HEADS = {"1": "linear_head", "4": "linear4_head"}


def _path(arch: str, suffix: str) -> str:
    """Models with registers lie in the folder of those without."""
    return f"dinov2_{arch.removesuffix('_reg4')}/dinov2_{arch}_{suffix}.pth"


def _hub_id(arch: str) -> str:
    """Where the same weights are on the Hub."""
    size, _, registers = arch.partition("_")
    return f"facebook/dinov2-{'with-registers-' if registers else ''}{HUB_SIZES[size]}"


def config(fields: Mapping, antialias: bool | None = None, offset: float | None = None) -> ViTRegConfig:
    """What the shapes say, and the two conventions that they do not, which go by the registers where not given."""
    has_registers = fields["num_register_tokens"] > 0
    return ViTRegConfig(
        num_attention_heads=fields["hidden_size"] // HEAD_DIM,
        interpolate_antialias=has_registers if antialias is None else antialias,
        interpolate_offset=(0.0 if has_registers else 0.1) if offset is None else offset,
        **fields,
    )


FAMILY = Family(
    name="dinov2",
    title="DINOv2",
    architectures=ARCHITECTURES,
    published={
        f"dinov2_{arch}": Published(arch, _path(arch, "pretrain"), APACHE_2, _hub_id(arch)) for arch in ARCHITECTURES
    },
    base_url="https://dl.fbaipublicfiles.com/dinov2",
    config=lambda arch: config({**vars(arch), "image_size": 518, "use_mask_token": True}),
    # torch.hub's spelling: "dinov2_vits14_reg" is "dinov2_vits14_reg4"
    spelled=lambda name: re.sub("_reg$", "_reg4", name),
)


def prepare(
    checkpoint: str,
    arch: str | None = None,
    linear_head: str | None = None,
    image_size: int | None = None,
    interpolate_antialias: bool | None = None,
    interpolate_offset: float | None = None,
    base_url: str | None = None,
    cache_dir: Path | None = None,
    license: str | None = None,
) -> Prepared:
    """A DINOv2 checkpoint as ViTReg, with timm's model beside it.

    Args:
        checkpoint: A file, or a published name such as "dinov2_vits14_reg4".
        arch: The architecture that the shapes must be of, e.g. "vitl14_reg4"; "custom" allows any. Where not given,
            the shapes decide, and a published width with too few layers is taken for a part of a checkpoint.
        linear_head: A file, or "1" or "4" for the published head on that many layers.
        image_size: In pixels. What the position embeddings must be for; the shapes decide where not given.
        interpolate_antialias: See `ViTRegConfig`. Where not given as published: with registers `True`, else `False`.
        interpolate_offset: See `ViTRegConfig`. Where not given as published: with registers 0.0, else 0.1.
        base_url: Where the published files are.
        cache_dir: Where downloads go; the folder of torch.hub where not given.
        license: Of the weights, for the card. Published ones are Apache-2.0; that of a file is "unknown" if not given.

    Raises:
        ConversionError: for everything that is not a whole DINOv2 checkpoint of this architecture.
    """
    require_timm()
    located = locate(FAMILY, checkpoint, arch, base_url, cache_dir, license)
    head_file = locate_linear_head(FAMILY, linear_head, PUBLISHED_HEADS, _path, located.arch, base_url, cache_dir)
    backbone = read_backbone(located.file)
    fields = fields_with_grid(located.file, backbone.tensors, FAMILY.title, REQUIRED)
    own_config = config(fields, interpolate_antialias, interpolate_offset)
    # dinov2/data/transforms.py, for evaluation
    crop = max(224 // own_config.patch_size, 1) * own_config.patch_size
    processor = image_processor(resize=256, crop=crop)
    return prepare_with_timm(FAMILY, located, backbone, own_config, RULES, processor, image_size, head_file)
