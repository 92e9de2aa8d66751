# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""DeiT, plain and distilled (Touvron et al., ICML 2021): tiny, small and base, classifiers of ImageNet-1k.

Names and addresses are those of https://github.com/facebookresearch/deit: models.py and README_deit.md. Images are
prepared as datasets.py does for evaluation, and positions interpolated as main.py does before it fine-tunes.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from conversion.family import APACHE_2, Architecture, Family, Prepared, Published
from conversion.published import locate
from conversion.renaming import Rules
from conversion.timm_reference import require_timm
from conversion.vit_layout import (
    BACKBONE_RULES,
    CLASSIFIER_RULES,
    EVERY_BACKBONE_HAS,
    HEAD_DIM,
    fields_with_grid,
    image_processor,
    prepare_with_timm,
    read_backbone,
)
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification


PLAIN = {
    "tiny_patch16_224": Architecture(192, 12, 768, patch_size=16, image_size=224),
    "small_patch16_224": Architecture(384, 12, 1536, patch_size=16, image_size=224),
    "base_patch16_224": Architecture(768, 12, 3072, patch_size=16, image_size=224),
    "base_patch16_384": Architecture(768, 12, 3072, patch_size=16, image_size=384),
}
ARCHITECTURES = PLAIN | {
    name.replace("_patch", "_distilled_patch"): replace(arch, use_distillation_token=True)
    for name, arch in PLAIN.items()
}
# The start of their sha256, which the names of the files end with.
HASHES = {
    "tiny_patch16_224": "a1311bcf",
    "small_patch16_224": "cd65a155",
    "base_patch16_224": "b5f2ef4d",
    "base_patch16_384": "8de9b5d1",
    "tiny_distilled_patch16_224": "b40b3cf7",
    "small_distilled_patch16_224": "649709d9",
    "base_distilled_patch16_224": "df68dfff",
    "base_distilled_patch16_384": "d0272ac0",
}
EVAL_CROP_RATIO = 0.875  # main.py's default, with which README_deit.md evaluates at 224 and at 384
LOOKS_LIKE_DINO = (
    "The checkpoint has no classifier, and then nothing tells DeiT from DINO, which interpolates positions by another "
    "rule. If it is DINO, convert it with `convert.py dino`."
)

RULES: Rules = {
    **BACKBONE_RULES,
    **CLASSIFIER_RULES,
    "dist_token": "embeddings.distillation_token",
    "head_dist.{param}": "distillation_classifier.{param}",
}


def config(fields: Mapping) -> ViTRegConfig:
    """DeiT has no LayerScale. Its distillation token has a position and a classifier."""
    distilled = fields["use_distillation_token"]
    return ViTRegConfig(
        num_attention_heads=fields["hidden_size"] // HEAD_DIM,
        layerscale_value=None,
        position_embedding_type="prefix_patches" if distilled else "cls_patches",
        interpolate_antialias=False,
        interpolate_offset=0.0,
        classifier_layout="cls_distillation" if distilled else "cls",
        **fields,
    )


FAMILY = Family(
    name="deit",
    title="DeiT",
    architectures=ARCHITECTURES,
    published={
        f"deit_{arch}": Published(
            arch, f"deit_{arch}-{HASHES[arch]}.pth", APACHE_2, f"facebook/deit-{arch.replace('_', '-')}"
        )
        for arch in ARCHITECTURES
    },
    base_url="https://dl.fbaipublicfiles.com/deit",
    config=lambda arch: config({**vars(arch), "num_labels": 1000}),
    model_class=ViTRegForImageClassification,
)


def prepare(
    checkpoint: str,
    arch: str | None = None,
    image_size: int | None = None,
    base_url: str | None = None,
    cache_dir: Path | None = None,
    license: str | None = None,
) -> Prepared:
    """A DeiT checkpoint as ViTReg, with timm's model beside it: a classifier, or a backbone where it has no head.

    Args:
        checkpoint: A file, or a published name such as "deit_small_distilled_patch16_224".
        arch: The architecture that the shapes must be of, e.g. "base_patch16_384"; "custom" allows any.
        image_size: In pixels. What the position embeddings must be for; the shapes decide where not given.
        base_url: Where the published files are.
        cache_dir: Where downloads go; the folder of torch.hub where not given.
        license: Of the weights, for the card. Published ones are Apache-2.0; that of a file is "unknown" if not given.

    Raises:
        ConversionError: for everything that is not a whole DeiT checkpoint of this architecture.
    """
    require_timm()
    located = locate(FAMILY, checkpoint, arch, base_url, cache_dir, license)
    # training checkpoints hold a moving average too, which main.py does not evaluate
    backbone = read_backbone(located.file, preferred="model")
    distilled = "dist_token" in backbone.tensors
    fields = fields_with_grid(located.file, backbone.tensors, FAMILY.title, EVERY_BACKBONE_HAS, 1 + distilled)
    own_config = config({**fields, "use_distillation_token": distilled})
    processor = image_processor(resize=int(own_config.image_size / EVAL_CROP_RATIO), crop=own_config.image_size)
    prepared = prepare_with_timm(FAMILY, located, backbone, own_config, RULES, processor, image_size)
    looks_like_dino = not distilled and "head.weight" not in backbone.tensors
    return replace(prepared, remarks=[*prepared.remarks, LOOKS_LIKE_DINO]) if looks_like_dino else prepared
