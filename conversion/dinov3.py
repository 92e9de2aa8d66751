# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""DINOv3 (Siméoni et al., 2025): the vision transformers, pretrained on web images and on satellite images.

Sizes and names are those of https://github.com/facebookresearch/dinov3: dinov3/hub/backbones.py for the architectures
and files, dinov3/models/vision_transformer.py for the tensors, README.md for the image transforms.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from transformers import BitImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from conversion.family import CUSTOM, Architecture, ConversionError, Family, License, Prepared, Published
from conversion.linear_heads import read_linear_head
from conversion.parity import comparison_sizes
from conversion.published import Located, locate, looks_like_name
from conversion.reading import describe_source, in_one_dtype
from conversion.renaming import Rules, fill, shown
from conversion.transformers_reference import DINOv3Reference
from conversion.vit_layout import (
    BACKBONE_RULES,
    EVERY_BACKBONE_HAS,
    HEAD_DIM,
    LAYER_SCALE_RULES,
    NEW,
    OLD,
    TRAINING_PART,
    dimensions,
    fields_from_shapes,
    matching_arch,
    read_backbone,
    shapes_of,
)
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel


ARCHITECTURES = {
    "vits16": Architecture(384, 12, 1536, num_register_tokens=4, patch_size=16),
    "vits16plus": Architecture(384, 12, 1536, use_swiglu_ffn=True, num_register_tokens=4, patch_size=16),
    "vitb16": Architecture(768, 12, 3072, num_register_tokens=4, patch_size=16),
    "vitl16": Architecture(1024, 24, 4096, num_register_tokens=4, patch_size=16),
    "vitl16plus": Architecture(1024, 24, 4096, use_swiglu_ffn=True, num_register_tokens=4, patch_size=16),
    "vith16plus": Architecture(1280, 32, 5120, use_swiglu_ffn=True, num_register_tokens=4, patch_size=16),
    "vit7b16": Architecture(4096, 40, 8192, use_swiglu_ffn=True, num_register_tokens=4, patch_size=16),
}
LVD, SAT = "lvd1689m", "sat493m"
# How the names of the files end: the first digits of their sha256.
HASHES = {
    "vits16": {LVD: "08c60483"},
    "vits16plus": {LVD: "4057cbaa"},
    "vitb16": {LVD: "73cec8be"},
    "vitl16": {LVD: "8aa4cbdd", SAT: "eadcf0ff"},
    "vitl16plus": {LVD: "46503df0"},
    "vith16plus": {LVD: "7c1da9a5"},
    "vit7b16": {LVD: "a955f4ea", SAT: "a6675841"},
}
NOT_ON_THE_HUB = ("vitl16plus",)
ACCESS = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
DINOV3_LICENSE = License(
    "other", "dinov3-license", "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
)
# Mean and standard deviation of the images, a dataset each.
NORMALIZATION = {
    LVD: (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    SAT: ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
}
PERIODS = "rope_embed.periods"

ATTENTION = NEW + ".attention."
RULES: Rules = {
    **{old: new for old, new in BACKBONE_RULES.items() if old not in ("pos_embed", OLD + ".attn.qkv.{param}")},
    **LAYER_SCALE_RULES,
    "storage_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    PERIODS: "encoder.rotary_embeddings.periods",
    OLD + ".attn.qkv.weight": tuple(f"{ATTENTION}{part}_proj.weight" for part in "qkv"),
    # a mask turns off the bias of the keys
    OLD + ".attn.qkv.bias": (ATTENTION + "q_proj.bias", None, ATTENTION + "v_proj.bias"),
    OLD + ".mlp.w1.{param}": NEW + ".mlp.gate_proj.{param}",
    OLD + ".mlp.w2.{param}": NEW + ".mlp.up_proj.{param}",
    OLD + ".mlp.w3.{param}": NEW + ".mlp.down_proj.{param}",
    "cls_norm.{param}": "prefix_layernorm.{param}",
}
RULES_WITH_KEY_BIAS: Rules = {**RULES, OLD + ".attn.qkv.bias": tuple(f"{ATTENTION}{part}_proj.bias" for part in "qkv")}
REQUIRED = (*EVERY_BACKBONE_HAS, PERIODS, "blocks.0.ls1.gamma")
# Beside what DINOv2's training holds: the teacher of the Gram matrices.
OTHER_PARTS = re.compile(rf"(?:[^.]+\.)*gram_teacher(?=\.|$)|{TRAINING_PART.pattern}")
# Other implementations, by names that only they have together.
PUBLISHED_FILE = "Give the file that DINOv3 was published in: `convert.py --list` has its name."
FOREIGN = {
    ("reg_token", "blocks.0.gamma_1"): f"of timm's, which keeps no periods and no mask token. {PUBLISHED_FILE}",
    ("layer.0.norm1.bias",): "of transformers. `convert.py transformers` converts it.",
    ("model.layer.0.norm1.bias",): "of transformers. `convert.py transformers` converts it.",
}


def _name(arch: str, dataset: str) -> str:
    return f"dinov3_{arch}" + ("_sat493m" if dataset == SAT else "")


def _published(arch: str, dataset: str) -> Published:
    name = f"dinov3_{arch}"
    hub_id = None if arch in NOT_ON_THE_HUB else f"facebook/dinov3-{arch}-pretrain-{dataset}"
    path = f"{name}/{name}_pretrain_{dataset}-{HASHES[arch][dataset]}.pth"
    return Published(arch, path, DINOV3_LICENSE, hub_id)


def config(fields: Mapping, head_dim: int = HEAD_DIM, key_bias: bool = False) -> ViTRegConfig:
    """What shapes say, and what they do not: as published."""
    return ViTRegConfig(
        num_attention_heads=fields["hidden_size"] // head_dim,
        key_bias=key_bias,
        position_embedding_type="rope",
        pos_embed_rescale=2.0,
        layerscale_value=1e-5,
        register_init_std=0.02,
        **{"layer_norm_eps": 1e-5, "image_size": 224, **fields},
    )


def _published_config(architecture: Architecture) -> ViTRegConfig:
    is_7b = architecture == ARCHITECTURES["vit7b16"]
    fields = {**vars(architecture), "image_size": 224, "use_mask_token": True, "qkv_bias": not is_7b}
    return config(fields, head_dim=128 if is_7b else HEAD_DIM)


FAMILY = Family(
    name="dinov3",
    title="DINOv3",
    architectures=ARCHITECTURES,
    published={_name(arch, dataset): _published(arch, dataset) for arch in HASHES for dataset in HASHES[arch]},
    base_url="https://dl.fbaipublicfiles.com/dinov3",
    config=_published_config,
    spelled=lambda name: name.removesuffix("_lvd1689m"),
)


def prepare(
    checkpoint: str,
    arch: str | None = None,
    linear_head: str | None = None,
    pretrained_on: Literal["lvd1689m", "sat493m"] | None = None,
    layer_norm_eps: float | None = None,
    base_url: str | None = None,
    cache_dir: Path | None = None,
    license: str | None = None,
) -> Prepared:
    """A DINOv3 checkpoint as ViTReg, with transformers' model beside it.

    Args:
        checkpoint: A file, or a published name such as "dinov3_vits16" or "dinov3_vitl16_sat493m". A published file is
            recognized by its content, whatever it is called.
        arch: The architecture that the shapes must be of, e.g. "vitb16"; "custom" allows any.
        linear_head: A file with a linear head on CLS and the mean of the patches.
        pretrained_on: "lvd1689m" or "sat493m", whose mean and standard deviation the images get. Where not given,
            those of the published file, else the first.
        layer_norm_eps: See `ViTRegConfig`. Where not given as published: 1e-5.
        base_url: Where the published files are. They have no address that is open to all.
        cache_dir: Where downloads go; the folder of torch.hub where not given.
        license: Of the weights, for the card. Published ones have DINOv3's; that of a file is "unknown" if not given.

    Raises:
        ConversionError: for everything that is not a whole DINOv3 checkpoint of this architecture.
    """
    located = _locate(checkpoint, arch, base_url, cache_dir, license)
    backbone = read_backbone(located.file, OTHER_PARTS)
    own_config = _config(located.file, backbone.tensors, layer_norm_eps)
    source = describe_source(located.file) | {"backbone": f"{backbone.prefix}*"}
    located = _recognized(located, source["sha256"], license)
    arch = matching_arch(own_config, located.arch, FAMILY)
    _check_heads(own_config, arch)
    dataset = _dataset(located.published, pretrained_on)

    head = {} if linear_head is None else read_linear_head(Path(linear_head), own_config, ("cls_mean",))
    used, left_aside = _without_unused(backbone.tensors, own_config.key_bias, backbone.prefix)
    [periods] = in_one_dtype({PERIODS: used.pop(PERIODS)})
    tensors, head = in_one_dtype(used, head)
    # in float32 whatever the others are: in less they would be other periods
    tensors[PERIODS] = periods[PERIODS].float()
    rules = RULES_WITH_KEY_BIAS if own_config.key_bias else RULES
    model_class = ViTRegForImageClassification if head else ViTRegModel
    model = fill(model_class, own_config, tensors, rules, head)
    reference = DINOv3Reference(own_config, tensors, head)
    return Prepared(
        model=model,
        image_processor=_image_processor(dataset),
        reference=reference,
        reference_name=reference.name,
        sizes=comparison_sizes(own_config),
        arch=arch,
        sources=[source] + ([describe_source(Path(linear_head))] if linear_head is not None else []),
        left_aside=backbone.left_aside + left_aside,
        license=located.license,
        base_model=located.base_model,
        heads=backbone.heads,
    )


def _locate(
    checkpoint: str, arch: str | None, base_url: str | None, cache_dir: Path | None, license: str | None
) -> Located:
    """As in every family, but published files are downloaded from the user's own address only."""
    name = FAMILY.spelled(checkpoint)
    if looks_like_name(checkpoint) and name in FAMILY.published and base_url is None:
        path = FAMILY.published[name].path
        cached = (cache_dir or Path(torch.hub.get_dir()) / "checkpoints") / path.rsplit("/", 1)[-1]
        if not cached.exists():
            raise ConversionError(
                f"{checkpoint} has no address that is open to all: everybody accepts its licence for themselves. Ask "
                f"for access at {ACCESS}, fetch the file with wget from the address in the answer, and give its path "
                f"as CHECKPOINT, or put it at {cached}. From a mirror of your own, --base-url fetches {path}."
            )
    if (Path(checkpoint) / ".metadata").exists():
        raise ConversionError(
            f"{checkpoint} is a sharded checkpoint. Join it to one file first: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {checkpoint} joined.pth"
        )
    return locate(FAMILY, checkpoint, arch, base_url, cache_dir, license)


def _recognized(located: Located, sha256: str, license: str | None) -> Located:
    """With what is known of the published file, where it is one under whatever name."""
    for name, published in FAMILY.published.items():
        if located.published is None and published.path.endswith(f"-{sha256[:8]}.pth"):
            own = located.license if license else published.license
            return Located(located.file, located.arch or published.arch, name, own, published.base_model)
    return located


def _config(file: Path, tensors: Mapping[str, torch.Tensor], layer_norm_eps: float | None) -> ViTRegConfig:
    for names, whose in FOREIGN.items():
        if tensors.keys() >= set(names):
            raise ConversionError(f"{file} is a DINOv3 {whose}")
    shapes = shapes_of(file, tensors, FAMILY.title, REQUIRED)
    fields = fields_from_shapes(shapes, FAMILY.title)
    head_dim = 4 * dimensions(shapes, PERIODS, 1, FAMILY.title)[0]
    if head_dim == 0 or fields["hidden_size"] % head_dim:
        raise ConversionError(
            f"{file} is no {FAMILY.title} checkpoint: {PERIODS} are for heads of {head_dim} channels, which its width "
            f"of {fields['hidden_size']} is no multiple of."
        )
    fields["final_norm"] = "untied" if "cls_norm.weight" in shapes else "tokens"
    if layer_norm_eps is not None:
        fields["layer_norm_eps"] = layer_norm_eps
    return config(fields, head_dim, key_bias=fields["qkv_bias"] and not _has_masks(tensors))


def _check_heads(own_config: ViTRegConfig, arch: str):
    """Raises `ConversionError` where a published size has other heads than published."""
    if arch == CUSTOM:
        return
    found, expected = own_config.num_attention_heads, FAMILY.config(ARCHITECTURES[arch]).num_attention_heads
    if found != expected:
        raise ConversionError(
            f"The checkpoint is not {arch}: {PERIODS} are for {found} heads, not {expected}. Say --arch custom where "
            "that is meant."
        )


def _has_masks(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the biases of the keys are masked: of all layers, or of none.

    Raises:
        ConversionError: where a mask is anything but 1 for queries and values and 0 for keys.
    """
    masks = {name: tensor for name, tensor in tensors.items() if name.endswith(".attn.qkv.bias_mask")}
    biases = {f"{name}_mask" for name in tensors if name.endswith(".attn.qkv.bias")}
    if masks and masks.keys() != biases:
        alone = sorted(masks.keys() ^ biases)
        raise ConversionError(
            f"The checkpoint is not whole: of biases and their masks one is missing: {shown(alone)}."
        )
    for name, mask in masks.items():
        if mask.isnan().any():
            raise ConversionError(
                f"{name} is not a number: the model was saved as its class builds it, neither initialized "
                "(init_weights) nor filled with weights. Save it after one of the two."
            )
        expected = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(mask.numel() // 3)
        if not torch.equal(mask.float(), expected):
            raise ConversionError(f"{name} is another mask than DINOv3's, 1 for queries and values and 0 for keys.")
    return bool(masks)


def _without_unused(
    tensors: Mapping[str, torch.Tensor], key_bias: bool, prefix: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors that an image goes through, and the others by name."""
    used, unused = {}, Counter()
    for name, tensor in tensors.items():
        kind = prefix + re.sub(r"^blocks\.[\d.]+\.", "blocks.*.", name)
        if kind.endswith(".bias_mask"):
            unused[kind] += 1
        elif name.startswith("local_cls_norm."):
            unused[prefix + "local_cls_norm"] += 1
        else:
            used[name] = tensor
            if kind.endswith(".qkv.bias") and not key_bias:
                unused[f"{kind} of the keys"] += 1
    return used, [f"{kind} ({number} entries)" for kind, number in unused.items()]


def _dataset(published: str | None, pretrained_on: str | None) -> str:
    """Whose statistics the images are normalized with."""
    if pretrained_on not in (None, *NORMALIZATION):
        raise ConversionError(f"--pretrained-on {pretrained_on} is not known. There are {', '.join(NORMALIZATION)}.")
    known = None if published is None else SAT if published.endswith(SAT) else LVD
    if None not in (known, pretrained_on) and known != pretrained_on:
        raise ConversionError(f"{published} was pretrained on {known}, not on {pretrained_on}. Leave the option out.")
    return known or pretrained_on or LVD


def _image_processor(dataset: str) -> BitImageProcessor:
    """As README.md says, "Image transforms": to a square of 256 pixels, bilinear, and nothing is cropped."""
    square = {"height": 256, "width": 256}
    mean, std = NORMALIZATION[dataset]
    return BitImageProcessor(
        size=square,
        crop_size=square,
        do_center_crop=False,
        resample=PILImageResampling.BILINEAR,
        image_mean=list(mean),
        image_std=list(std),
    )
