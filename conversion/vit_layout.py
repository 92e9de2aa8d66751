# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The layout that DINO, DINOv2, DINOv3, DeiT and timm share: `blocks.{layer}.attn.qkv` and its like.

From a file to the backbone's tensors, and from their shapes to a config. What a family has beside this is in its file.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import BitImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from conversion.family import CUSTOM, ConversionError, Family, Prepared
from conversion.linear_heads import read_linear_head, set_labels
from conversion.parity import comparison_sizes
from conversion.published import Located
from conversion.reading import describe_source, in_one_dtype, read_leaves
from conversion.renaming import Rules, fill, shown
from conversion.timm_reference import TimmReference
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel


HEAD_DIM = 64  # channels of an attention head in most published sizes

# Sharded training keeps layers in chunks, `blocks.{chunk}.{layer}.`; the number of the layer counts on through them.
OLD, NEW = "blocks.[{chunk}.]{layer}", "encoder.layer.{layer}"
BACKBONE_RULES: Rules = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.{param}": "embeddings.patch_embeddings.projection.{param}",
    OLD + ".norm1.{param}": NEW + ".norm1.{param}",
    OLD + ".attn.qkv.{param}": (
        NEW + ".attention.q_proj.{param}",
        NEW + ".attention.k_proj.{param}",
        NEW + ".attention.v_proj.{param}",
    ),
    OLD + ".attn.proj.{param}": NEW + ".attention.o_proj.{param}",
    OLD + ".norm2.{param}": NEW + ".norm2.{param}",
    OLD + ".mlp.fc1.{param}": NEW + ".mlp.fc1.{param}",
    OLD + ".mlp.fc2.{param}": NEW + ".mlp.fc2.{param}",
    "norm.{param}": "layernorm.{param}",
}
LAYER_SCALE_RULES: Rules = {
    OLD + ".ls1.gamma": NEW + ".residual1.lambda1",
    OLD + ".ls2.gamma": NEW + ".residual2.lambda1",
}
CLASSIFIER_RULES: Rules = {"head.{param}": "classifier.{param}"}
# One tensor of every kind that no backbone of this layout is without.
EVERY_BACKBONE_HAS = ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight")
REGISTERS = ("register_tokens", "storage_tokens", "reg_token")

# What a training checkpoint holds beside the backbone. A projection head is under "head" in DINO.
TRAINING_PART = re.compile(
    r"(?:[^.]+\.)*(?:student|model_ema|(?:(?:dino|ibot)_)?head(?=\.(?:mlp|last_layer)\.)|dino_loss|ibot_patch_loss"
    r"|optimizer|(?:fp16_)?scaler|(?:lr_)?scheduler|args)(?=\.|$)"
)
PROJECTION_HEAD = re.compile(r"((?:dino_|ibot_)?head)\.((?:mlp|last_layer)\..+)")
# The old and the new spelling of weight normalization in torch: magnitude and direction.
WEIGHT_NORM = {
    "last_layer.weight_g": "last_layer.parametrizations.weight.original0",
    "last_layer.weight_v": "last_layer.parametrizations.weight.original1",
}


@dataclass(frozen=True)
class Backbone:
    """What was found in a file.

    Attributes:
        prefix: What stands before the backbone's names.
        tensors: The backbone's, without the prefix, and every tensor that nobody knows, for `rename` to refuse.
        heads: Projection heads of the same network, `dino_head.…` and `ibot_head.…`, in torch's present names.
        left_aside: Everything else, by name.
    """

    prefix: str
    tensors: dict[str, torch.Tensor]
    heads: dict[str, torch.Tensor]
    left_aside: list[str]


def read_backbone(file: Path, training_part: re.Pattern = TRAINING_PART, preferred: str = "teacher") -> Backbone:
    """The backbone in a file, of teacher and student the teacher's.

    Args:
        file: A state dict, alone or in a training checkpoint.
        training_part: What the names of a training checkpoint's other parts start with.
        preferred: What the one to evaluate is under where there are several.

    Raises:
        ConversionError: where there are several backbones, and none or several of them are under `preferred`.
    """
    leaves = read_leaves(file)
    prefix = _backbone_prefix(file, leaves, preferred)
    network = re.sub(r"(?:^|(?<=\.))(?:backbone|module)\.$", "", prefix)
    tensors, heads, left_aside = {}, {}, Counter()
    for name, leaf in leaves.items():
        own_name = name.removeprefix(prefix)
        head = PROJECTION_HEAD.fullmatch(name.removeprefix(network)) if name.startswith(network) else None
        part = training_part.match(own_name)
        if head is not None and isinstance(leaf, torch.Tensor):
            kind = "dino_head" if head[1] == "head" else head[1]
            heads[f"{kind}.{WEIGHT_NORM.get(head[2], head[2])}"] = leaf
        elif part is not None:
            left_aside[name.removesuffix(own_name) + part[0]] += 1
        elif isinstance(leaf, torch.Tensor):
            tensors[own_name] = leaf
        else:
            left_aside[name] += 1
    parts = [f"{part} ({number} entries)" if number > 1 else part for part, number in left_aside.items()]
    return Backbone(prefix, tensors, heads, parts)


def _backbone_prefix(file: Path, names: Iterable[str], preferred: str) -> str:
    """What stands before the names of the backbone."""
    found = [re.fullmatch(r"((?:.*\.)?)(?:cls_token|pos_embed|patch_embed\.proj\.weight)", name) for name in names]
    prefixes = list(dict.fromkeys(match[1] for match in found if match))
    prefixes = [prefix for prefix in prefixes if preferred in prefix.split(".")] or prefixes
    if len(prefixes) > 1:
        raise ConversionError(
            f"{file} holds several backbones, under {', '.join(map(repr, prefixes))}. Save the one to convert alone."
        )
    return prefixes[0] if prefixes else ""


def unchunked(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with layers that are not in chunks."""
    return {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", name): tensor for name, tensor in tensors.items()}


def shapes_of(
    file: Path, tensors: Mapping[str, torch.Tensor], title: str, required: Iterable[str] = EVERY_BACKBONE_HAS
) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape. `ConversionError` where one that no backbone of the family is without is not there."""
    shapes = _shapes(unchunked(tensors))
    absent = [name for name in required if name not in shapes]
    if absent:
        raise ConversionError(
            f"{file} is no {title} checkpoint, or only a part of one: it has no {', '.join(absent)}. "
            f"It has {shown(list(tensors))}."
        )
    return shapes


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def fields_from_shapes(shapes: Mapping[str, tuple[int, ...]], title: str) -> dict:
    """The fields of `ViTRegConfig` that shapes tell, the image size and the number of heads apart.

    Raises:
        ConversionError: where a tensor is missing, or has not the number of dimensions that it must have.
    """
    hidden_size, num_channels, _, patch_size = dimensions(shapes, "patch_embed.proj.weight", 4, title)
    if "cls_token" in shapes:
        _, _, hidden_size = dimensions(shapes, "cls_token", 3, title)
    layers = [int(match[1]) for match in map(re.compile(r"blocks\.(\d+)\.").match, shapes) if match]
    use_swiglu_ffn = "blocks.0.mlp.w3.weight" in shapes
    registers = [name for name in REGISTERS if name in shapes]
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(layers),
        "intermediate_size": dimensions(shapes, f"blocks.0.mlp.{'w3' if use_swiglu_ffn else 'fc2'}.weight", 2, title)[
            1
        ],
        "patch_size": patch_size,
        "num_channels": num_channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "use_swiglu_ffn": use_swiglu_ffn,
        "num_register_tokens": dimensions(shapes, registers[0], 3, title)[1] if registers else 0,
        "use_mask_token": "mask_token" in shapes,
    }


def fields_with_grid(
    file: Path, tensors: Mapping[str, torch.Tensor], title: str, required: Iterable[str], num_prefix_positions: int = 1
) -> dict:
    """The fields of `ViTRegConfig` that shapes tell, the number of heads apart, of a model with position embeddings.

    Raises:
        ConversionError: see `shapes_of`, `fields_from_shapes` and `side_of_grid`.
    """
    shapes = shapes_of(file, tensors, title, (*required, "pos_embed"))
    fields = fields_from_shapes(shapes, title)
    side = side_of_grid(file, shapes, fields["hidden_size"], num_prefix_positions, title)
    return {**fields, "image_size": side * fields["patch_size"]}


def dimensions(shapes: Mapping[str, tuple[int, ...]], name: str, number: int, title: str) -> tuple[int, ...]:
    """The shape of a tensor. `ConversionError` where it is missing or has another number of dimensions."""
    shape = shapes.get(name)
    if shape is None or len(shape) != number:
        was = "is missing" if shape is None else f"has shape {shape}"
        raise ConversionError(f"The checkpoint is not whole: {name} {was}, where {title} has {number} dimensions.")
    return shape


def side_of_grid(
    file: Path, shapes: Mapping[str, tuple[int, ...]], hidden_size: int, num_prefix_positions: int, title: str
) -> int:
    """Rows, and columns, of the square grid that the position embeddings are for.

    Raises:
        ConversionError: where they are for no square grid, or the width is no multiple of the heads'.
    """
    num_positions = dimensions(shapes, "pos_embed", 3, title)[1]
    num_patches = num_positions - num_prefix_positions
    side = math.isqrt(max(num_patches, 0))
    if hidden_size % HEAD_DIM or side**2 != num_patches or side == 0:
        prefix = {0: "those", 1: "one for CLS and those"}.get(
            num_prefix_positions, f"{num_prefix_positions} for the tokens before the patches and those"
        )
        raise ConversionError(
            f"{file} is no {title} checkpoint: its width must be a multiple of {HEAD_DIM} (it is {hidden_size}), and "
            f"its position embeddings {prefix} of a square grid (there are {num_positions})."
        )
    return side


def matching_arch(config: ViTRegConfig, arch: str | None, family: Family) -> str:
    """The name of the architecture: the one asked for, or the one that the shapes are of.

    Raises:
        ConversionError: where the shapes are of another than was asked for, or seem to be a part of one.
    """

    def told(architecture) -> dict:
        return {name: value for name, value in asdict(architecture).items() if value is not None}

    def found(architecture) -> dict:
        return {name: getattr(config, name) for name in told(architecture)}

    names = [name for name, architecture in family.architectures.items() if told(architecture) == found(architecture)]
    if arch is None:
        _check_not_cut_short(config, family)
    if arch in (None, CUSTOM) or arch in names:
        return arch if arch in names else next(iter(names), CUSTOM)
    differences = [
        f"{field} is {getattr(config, field)}, not {expected}"
        for field, expected in told(family.architectures[arch]).items()
        if getattr(config, field) != expected
    ]
    raise ConversionError(
        f"The checkpoint is not {arch}: {', '.join(differences)}. Give --arch {next(iter(names), CUSTOM)}, or leave "
        "it out."
    )


def _check_not_cut_short(config: ViTRegConfig, family: Family):
    """Refuses a published width with too few layers: every layer that is there is whole, so nothing else would."""
    same_width = {
        name: architecture.num_hidden_layers
        for name, architecture in family.architectures.items()
        if architecture.hidden_size == config.hidden_size
    }
    if same_width and config.num_hidden_layers < min(same_width.values()):
        name, num_layers = next(iter(same_width.items()))
        raise ConversionError(
            f"The checkpoint has the width of {name} ({config.hidden_size}), but only {config.num_hidden_layers} of "
            f"its {num_layers} layers. Is it a part of one? If it is whole, say --arch custom."
        )


def check_image_size(config: ViTRegConfig, image_size: int | None, title: str):
    """Raises `ConversionError` where the stored position embeddings are for another size than the user says."""
    if image_size not in (None, config.image_size):
        rows, cols = config.grid_size
        raise ConversionError(
            f"--image-size {image_size} does not fit: the checkpoint's position embeddings are a {rows}x{cols} grid "
            f"of {config.patch_size}-pixel patches, {config.image_size} pixels. Leave it out. The model takes every "
            f"size that is a multiple of the patch, interpolating as {title} does; the size that images are brought "
            "to is in preprocessor_config.json."
        )


def image_processor(
    resize: int,
    crop: int,
    mean: Iterable[float] = IMAGENET_DEFAULT_MEAN,
    std: Iterable[float] = IMAGENET_DEFAULT_STD,
    resample: PILImageResampling = PILImageResampling.BICUBIC,
) -> BitImageProcessor:
    """Shorter side to `resize` pixels, a square of `crop` pixels from the middle, mean and std of the family."""
    return BitImageProcessor(
        size={"shortest_edge": resize},
        crop_size={"height": crop, "width": crop},
        resample=resample,
        image_mean=list(mean),
        image_std=list(std),
    )


def prepare_with_timm(
    family: Family,
    located: Located,
    backbone: Backbone,
    config: ViTRegConfig,
    rules: Rules,
    processor: BitImageProcessor,
    image_size: int | None = None,
    head_file: Path | None = None,
    read_head: Callable[[Path, ViTRegConfig], dict[str, torch.Tensor]] = read_linear_head,
) -> Prepared:
    """The model with timm's beside it: what the families that timm's VisionTransformer can hold end with.

    Args:
        family: Of the checkpoint.
        located: What the user asked for.
        backbone: What was found there.
        config: What its shapes and its family say; it learns what the classifier reads and its classes are called.
        rules: Old names to new ones; with `CLASSIFIER_RULES` in families whose checkpoints have a classifier.
        processor: What turns images into the model's input.
        image_size: In pixels. What the user says that the position embeddings are for.
        head_file: A linear head that was trained apart.
        read_head: Reads it.

    Raises:
        ConversionError: where the checkpoint is not of the architecture or the size asked for, or not whole.
    """
    is_supervised = rules.keys() >= CLASSIFIER_RULES.keys()
    if is_supervised and backbone.heads:
        raise ConversionError(
            f"{located.file} is no {family.title} checkpoint: it has projection heads of self-supervised training, "
            f"{shown(list(backbone.heads))}."
        )
    arch = matching_arch(config, located.arch, family)
    check_image_size(config, image_size, family.title)
    head = {} if head_file is None else read_head(head_file, config)
    has_classifier = is_supervised and "head.weight" in backbone.tensors
    if has_classifier:
        set_labels(config, dimensions(_shapes(backbone.tensors), "head.weight", 2, family.title)[0])
    tensors, head = in_one_dtype(backbone.tensors, head)
    reference = TimmReference(config, unchunked(tensors), head)
    model_class = ViTRegForImageClassification if head or has_classifier else ViTRegModel
    return Prepared(
        model=fill(model_class, config, tensors, rules, head),
        image_processor=processor,
        reference=reference,
        reference_name=reference.name,
        sizes=comparison_sizes(config),
        arch=arch,
        sources=[describe_source(located.file) | {"backbone": f"{backbone.prefix}*"}]
        + ([describe_source(head_file)] if head_file is not None else []),
        left_aside=backbone.left_aside,
        license=located.license,
        base_model=located.base_model,
        heads=backbone.heads,
    )
