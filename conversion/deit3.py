# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""DeiT-III (Touvron et al., ECCV 2022): S, M, B, L and H, classifiers of ImageNet-1k, some trained on 21k before.

Names, addresses and sizes are those of https://github.com/facebookresearch/deit: README_revenge.md for the files (for
H of 1k models_v2.py has another address), models_v2.py for the sizes. Images are prepared as datasets.py does for
evaluation, and positions interpolated as main.py does before it fine-tunes.
"""

from collections.abc import Mapping
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
    NEW,
    OLD,
    fields_with_grid,
    image_processor,
    prepare_with_timm,
    read_backbone,
)
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification


ARCHITECTURES = {
    "small_patch16_224": Architecture(384, 12, 1536, patch_size=16, image_size=224),
    "small_patch16_384": Architecture(384, 12, 1536, patch_size=16, image_size=384),
    "medium_patch16_224": Architecture(512, 12, 2048, patch_size=16, image_size=224),
    "base_patch16_224": Architecture(768, 12, 3072, patch_size=16, image_size=224),
    "base_patch16_384": Architecture(768, 12, 3072, patch_size=16, image_size=384),
    "large_patch16_224": Architecture(1024, 24, 4096, patch_size=16, image_size=224),
    "large_patch16_384": Architecture(1024, 24, 4096, patch_size=16, image_size=384),
    "huge_patch14_224": Architecture(1280, 32, 5120, patch_size=14, image_size=224),
}
# The data that they were trained on, and how the same weights are called in timm.
TRAINED_ON = {"1k": "fb_in1k", "21k": "fb_in22k_ft_in1k"}
NUM_HEADS = {1280: 16}  # by width, where a head has not the usual 64 channels

RULES: Rules = {
    **BACKBONE_RULES,
    **CLASSIFIER_RULES,
    OLD + ".gamma_1": NEW + ".residual1.lambda1",
    OLD + ".gamma_2": NEW + ".residual2.lambda1",
}


def config(fields: Mapping) -> ViTRegConfig:
    """DeiT-III adds positions to its patches, and CLS comes after that."""
    width = fields["hidden_size"]
    return ViTRegConfig(
        num_attention_heads=NUM_HEADS.get(width, width // HEAD_DIM),
        position_embedding_type="patches",
        interpolate_antialias=False,
        interpolate_offset=0.0,
        classifier_layout="cls",
        **fields,
    )


def _published(arch: str, data: str) -> tuple[str, Published]:
    """A name, that of its file, and what is known of it."""
    size, _, pixels = arch.split("_")
    name = f"deit_3_{size}_{pixels}_{data}"
    file = f"{name}_v1.pth" if name == "deit_3_huge_224_21k" else f"{name}.pth"
    return name, Published(arch, file, APACHE_2, f"timm/deit3_{arch}.{TRAINED_ON[data]}")


FAMILY = Family(
    name="deit3",
    title="DeiT-III",
    architectures=ARCHITECTURES,
    published=dict(_published(arch, data) for data in TRAINED_ON for arch in ARCHITECTURES),
    base_url="https://dl.fbaipublicfiles.com/deit",
    config=lambda arch: config({**vars(arch), "num_labels": 1000}),
    model_class=ViTRegForImageClassification,
    spelled=lambda name: name.replace("deit3_", "deit_3_"),
)


def prepare(
    checkpoint: str,
    arch: str | None = None,
    image_size: int | None = None,
    base_url: str | None = None,
    cache_dir: Path | None = None,
    license: str | None = None,
) -> Prepared:
    """A DeiT-III checkpoint as ViTReg, with timm's model beside it: a classifier, or a backbone where it has no head.

    Args:
        checkpoint: A file, or a published name such as "deit_3_base_224_21k".
        arch: The architecture that the shapes must be of, e.g. "large_patch16_384"; "custom" allows any.
        image_size: In pixels. What the position embeddings must be for; the shapes decide where not given.
        base_url: Where the published files are.
        cache_dir: Where downloads go; the folder of torch.hub where not given.
        license: Of the weights, for the card. Published ones are Apache-2.0; that of a file is "unknown" if not given.

    Raises:
        ConversionError: for everything that is not a whole DeiT-III checkpoint of this architecture.
    """
    require_timm()
    located = locate(FAMILY, checkpoint, arch, base_url, cache_dir, license)
    # training checkpoints hold a moving average too, which main.py does not evaluate
    backbone = read_backbone(located.file, preferred="model")
    required = (*EVERY_BACKBONE_HAS, "blocks.0.gamma_1")
    fields = fields_with_grid(located.file, backbone.tensors, FAMILY.title, required, num_prefix_positions=0)
    own_config = config(fields)
    # README_revenge.md trains with --eval-crop-ratio 1.0, at 224 and at 384: nothing is cut from square images
    processor = image_processor(resize=own_config.image_size, crop=own_config.image_size)
    return prepare_with_timm(FAMILY, located, backbone, own_config, RULES, processor, image_size)
