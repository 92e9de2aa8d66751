# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""DINOv2, with and without registers (Oquab et al., TMLR 2024; Darcet et al., ICLR 2024).

Sizes, names and rules are those of https://github.com/facebookresearch/dinov2: dinov2/hub/backbones.py for the
architectures, dinov2/hub/classifiers.py for the heads, dinov2/models/vision_transformer.py for the names.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import BitImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from conversion.family import ConversionError, Prepared
from conversion.linear_heads import read_linear_head
from conversion.parity import comparison_sizes
from conversion.published import download, looks_like_name, nearest
from conversion.reading import describe_source, in_one_dtype, read_leaves
from conversion.renaming import Rules, fill, shown
from conversion.timm_reference import TimmReference, require_timm
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel


BASE_URL = "https://dl.fbaipublicfiles.com/dinov2"
HEAD_DIM = 64  # channels of an attention head in every size
CUSTOM = "custom"


@dataclass(frozen=True)
class Architecture:
    """A published size: the fields of `ViTRegConfig` that the shapes of a checkpoint tell."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 0
    patch_size: int = 14


WITHOUT_REGISTERS = {
    "vits14": Architecture(384, 12, 1536),
    "vitb14": Architecture(768, 12, 3072),
    "vitl14": Architecture(1024, 24, 4096),
    "vitg14": Architecture(1536, 40, 4096, use_swiglu_ffn=True),
}
ARCHITECTURES = WITHOUT_REGISTERS | {
    f"{name}_reg4": replace(arch, num_register_tokens=4) for name, arch in WITHOUT_REGISTERS.items()
}
PUBLISHED = {f"dinov2_{name}": name for name in ARCHITECTURES}
HUB_SIZES = {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}

# Sharded training keeps layers in chunks, `blocks.{chunk}.{layer}.`; the number of the layer counts on through them.
OLD, NEW = "blocks.[{chunk}.]{layer}", "encoder.layer.{layer}"
RULES: Rules = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.{param}": "embeddings.patch_embeddings.projection.{param}",
    OLD + ".norm1.{param}": NEW + ".norm1.{param}",
    OLD + ".attn.qkv.{param}": (
        NEW + ".attention.q_proj.{param}",
        NEW + ".attention.k_proj.{param}",
        NEW + ".attention.v_proj.{param}",
    ),
    OLD + ".attn.proj.{param}": NEW + ".attention.o_proj.{param}",
    OLD + ".ls1.gamma": NEW + ".residual1.lambda1",
    OLD + ".norm2.{param}": NEW + ".norm2.{param}",
    OLD + ".mlp.fc1.{param}": NEW + ".mlp.fc1.{param}",
    OLD + ".mlp.fc2.{param}": NEW + ".mlp.fc2.{param}",
    OLD + ".mlp.w12.{param}": (NEW + ".mlp.gate_proj.{param}", NEW + ".mlp.up_proj.{param}"),
    OLD + ".mlp.w3.{param}": NEW + ".mlp.down_proj.{param}",
    OLD + ".ls2.gamma": NEW + ".residual2.lambda1",
    "norm.{param}": "layernorm.{param}",
}
# One tensor of every kind that no DINOv2 backbone is without.
EVERY_BACKBONE_HAS = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj.weight",
    "blocks.0.attn.qkv.weight",
    "blocks.0.ls1.gamma",
    "norm.weight",
)
# What a training checkpoint holds beside the teacher's backbone.
TRAINING_PART = re.compile(
    r"(?:[^.]+\.)*(?:student|dino_head|ibot_head|dino_loss|ibot_patch_loss|optimizer|fp16_scaler|(?:lr_)?scheduler)"
    r"(?=\.|$)"
)
PUBLISHED_LICENSE = "apache-2.0"
PUBLISHED_HEADS = {"1": "linear_head", "4": "linear4_head"}


def prepare(
    checkpoint: str,
    arch: str | None = None,
    linear_head: str | None = None,
    image_size: int | None = None,
    interpolate_antialias: bool | None = None,
    interpolate_offset: float | None = None,
    base_url: str = BASE_URL,
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
    arch, published = _requested_arch(arch), _published_arch(checkpoint)
    if published is not None and arch not in (None, CUSTOM, published):
        raise ConversionError(f"{checkpoint} is {published}, not {arch}. Leave --arch out.")
    arch = published or arch
    file = Path(checkpoint) if published is None else download(_url(base_url, published, "pretrain"), cache_dir)
    head_file = None if linear_head is None else _head_file(linear_head, arch, base_url, cache_dir)

    prefix, tensors, left_aside = _backbone(file)
    config = _config(file, tensors, interpolate_antialias, interpolate_offset)
    arch = _matching_arch(config, arch)
    _check_image_size(config, image_size)
    head = {} if head_file is None else read_linear_head(head_file, config)
    tensors, head = in_one_dtype(tensors, head)
    reference = TimmReference(config, {_unchunked(name): tensor for name, tensor in tensors.items()}, head)
    model_class = ViTRegForImageClassification if head else ViTRegModel
    return Prepared(
        model=fill(model_class, config, tensors, RULES, head),
        image_processor=_image_processor(config),
        reference=reference,
        reference_name=reference.name,
        sizes=comparison_sizes(config),
        arch=arch,
        sources=[describe_source(file) | {"backbone": f"{prefix}*"}]
        + ([describe_source(head_file)] if head_file is not None else []),
        left_aside=left_aside,
        license=license or ("unknown" if published is None else PUBLISHED_LICENSE),
        base_model=None if published is None else _hub_id(published),
    )


def _requested_arch(arch: str | None) -> str | None:
    """torch.hub's spellings are understood too: "dinov2_vits14_reg" is "vits14_reg4"."""
    if arch is None:
        return None
    name = re.sub("_reg$", "_reg4", arch.removeprefix("dinov2_"))
    if name not in (*ARCHITECTURES, CUSTOM):
        raise ConversionError(f"--arch {arch} is not known. {nearest(name, [*ARCHITECTURES, CUSTOM])}")
    return name


def _published_arch(checkpoint: str) -> str | None:
    """The architecture of a published name, `None` for a path."""
    if not looks_like_name(checkpoint):
        return None
    name = re.sub("_reg$", "_reg4", checkpoint)
    if name not in PUBLISHED:
        raise ConversionError(f"{checkpoint} is neither a file nor a published name. {nearest(name, PUBLISHED)}")
    return PUBLISHED[name]


def _hub_id(arch: str) -> str:
    """Where the same weights are on the Hub."""
    size, _, registers = arch.partition("_")
    return f"facebook/dinov2-{'with-registers-' if registers else ''}{HUB_SIZES[size]}"


def _url(base_url: str, arch: str, suffix: str) -> str:
    """Models with registers lie in the folder of those without."""
    return f"{base_url.rstrip('/')}/dinov2_{arch.removesuffix('_reg4')}/dinov2_{arch}_{suffix}.pth"


def _head_file(linear_head: str, arch: str | None, base_url: str, cache_dir: Path | None) -> Path:
    if linear_head not in PUBLISHED_HEADS:
        if not Path(linear_head).exists():
            raise ConversionError(f"--linear-head {linear_head} is no file. Give one, or 1 or 4 for a published head.")
        return Path(linear_head)
    if arch not in ARCHITECTURES:
        raise ConversionError(
            f"--linear-head {linear_head} asks for a published head, which fits a published backbone only. Give that "
            "one's name as CHECKPOINT, or say with --arch which one your file is."
        )
    return download(_url(base_url, arch, PUBLISHED_HEADS[linear_head]), cache_dir)


def _backbone(file: Path) -> tuple[str, dict[str, torch.Tensor], list[str]]:
    """What stands before the backbone's names, its tensors without that, and what the file holds beside them.

    A tensor that is neither is among the first, for `rename` to refuse.
    """
    leaves = read_leaves(file)
    prefix = _backbone_prefix(file, leaves)
    tensors, left_aside = {}, Counter()
    for name, leaf in leaves.items():
        own_name = name.removeprefix(prefix)
        part = TRAINING_PART.match(own_name)
        if part is not None:
            left_aside[name.removesuffix(own_name) + part[0]] += 1
        elif isinstance(leaf, torch.Tensor):
            tensors[own_name] = leaf
        else:
            left_aside[name] += 1
    parts = [f"{part} ({number} entries)" if number > 1 else part for part, number in left_aside.items()]
    return prefix, tensors, parts


def _backbone_prefix(file: Path, names: Iterable[str]) -> str:
    """What stands before the names of the backbone. Of teacher and student the teacher's, the one to evaluate."""
    found = [re.fullmatch(r"((?:.*\.)?)(?:cls_token|pos_embed|patch_embed\.proj\.weight)", name) for name in names]
    prefixes = list(dict.fromkeys(match[1] for match in found if match))
    prefixes = [prefix for prefix in prefixes if "teacher" in prefix.split(".")] or prefixes
    if len(prefixes) > 1:
        raise ConversionError(
            f"{file} holds several backbones, under {', '.join(map(repr, prefixes))}. Save the one to convert alone."
        )
    return prefixes[0] if prefixes else ""


def _unchunked(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name)


def _config(
    file: Path, tensors: dict[str, torch.Tensor], antialias: bool | None, offset: float | None
) -> ViTRegConfig:
    """What the shapes say, and the two conventions that they do not."""
    shapes = {_unchunked(name): tuple(tensor.shape) for name, tensor in tensors.items()}
    absent = [name for name in EVERY_BACKBONE_HAS if name not in shapes]
    if absent:
        raise ConversionError(
            f"{file} is no DINOv2 checkpoint, or only a part of one: it has no {', '.join(absent)}. "
            f"It has {shown(list(tensors))}."
        )
    _, _, hidden_size = _dimensions(shapes, "cls_token", 3)
    _, num_channels, _, patch_size = _dimensions(shapes, "patch_embed.proj.weight", 4)
    num_patches = _dimensions(shapes, "pos_embed", 3)[1] - 1
    side = math.isqrt(max(num_patches, 0))
    if hidden_size % HEAD_DIM or side**2 != num_patches or side == 0:
        raise ConversionError(
            f"{file} is no DINOv2 checkpoint: its width must be a multiple of {HEAD_DIM} (it is {hidden_size}), and "
            f"its position embeddings one for CLS and those of a square grid (there are {num_patches + 1})."
        )
    use_swiglu_ffn = "blocks.0.mlp.w3.weight" in shapes
    has_registers = "register_tokens" in shapes
    return ViTRegConfig(
        hidden_size=hidden_size,
        num_hidden_layers=1
        + max(int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if match),
        num_attention_heads=hidden_size // HEAD_DIM,
        intermediate_size=_dimensions(shapes, f"blocks.0.mlp.{'w3' if use_swiglu_ffn else 'fc2'}.weight", 2)[1],
        image_size=side * patch_size,
        patch_size=patch_size,
        num_channels=num_channels,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        use_swiglu_ffn=use_swiglu_ffn,
        num_register_tokens=_dimensions(shapes, "register_tokens", 3)[1] if has_registers else 0,
        use_mask_token="mask_token" in shapes,
        interpolate_antialias=has_registers if antialias is None else antialias,
        interpolate_offset=(0.0 if has_registers else 0.1) if offset is None else offset,
    )


def _dimensions(shapes: dict[str, tuple[int, ...]], name: str, number: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != number:
        was = "is missing" if shape is None else f"has shape {shape}"
        raise ConversionError(f"The checkpoint is not whole: {name} {was}, where DINOv2 has {number} dimensions.")
    return shape


def _matching_arch(config: ViTRegConfig, arch: str | None) -> str:
    """The name of the architecture: the one asked for, or the one that the shapes are of."""
    found = Architecture(**{name: getattr(config, name) for name in asdict(WITHOUT_REGISTERS["vits14"])})
    name = next((name for name, published in ARCHITECTURES.items() if published == found), CUSTOM)
    if arch is None:
        _check_not_cut_short(found)
    if arch in (None, name, CUSTOM):
        return name
    differences = [
        f"{field} is {value}, not {expected}"
        for (field, value), expected in zip(asdict(found).items(), asdict(ARCHITECTURES[arch]).values())
        if value != expected
    ]
    raise ConversionError(
        f"The checkpoint is not {arch}: {', '.join(differences)}. Give --arch {name}, or leave it out."
    )


def _check_not_cut_short(found: Architecture):
    """Refuses a published width with too few layers: every layer that is there is whole, so nothing else would."""
    for name, published in WITHOUT_REGISTERS.items():
        if found.hidden_size == published.hidden_size and found.num_hidden_layers < published.num_hidden_layers:
            raise ConversionError(
                f"The checkpoint has the width of {name} ({found.hidden_size}), but only {found.num_hidden_layers} of "
                f"its {published.num_hidden_layers} layers. Is it a part of one? If it is whole, say --arch custom."
            )


def _check_image_size(config: ViTRegConfig, image_size: int | None):
    if image_size not in (None, config.image_size):
        rows, cols = config.grid_size
        raise ConversionError(
            f"--image-size {image_size} does not fit: the checkpoint's position embeddings are a {rows}x{cols} grid "
            f"of {config.patch_size}-pixel patches, {config.image_size} pixels. Leave it out. The model takes every "
            "size that is a multiple of the patch, interpolating as DINOv2 does; the size that images are brought to "
            "is in preprocessor_config.json."
        )


def _image_processor(config: ViTRegConfig) -> BitImageProcessor:
    """The transform that DINOv2 evaluates with (dinov2/data/transforms.py)."""
    crop = max(224 // config.patch_size, 1) * config.patch_size
    return BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": crop, "width": crop},
        resample=PILImageResampling.BICUBIC,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
