# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The layout of OpenCLIP's checkpoints: `visual.transformer.resblocks.{layer}` and the text tower's names.

From a file to the tensors of both towers, from their shapes to configs, and from these to a filled model. The names
are those of open_clip/model.py and open_clip/transformer.py.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import (
    CLIPTextConfig,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from conversion.family import Architecture, ConversionError
from conversion.reading import is_torchscript, read_leaves
from conversion.recognize import hint
from conversion.renaming import Rules, fill, shown
from conversion.vit_layout import HEAD_DIM, dimensions, shapes_of, side_of_grid
from hf_vitreg import ViTRegConfig, ViTRegModel


TITLE = "OpenCLIP"
QUICK_GELU = "quick_gelu"
# Channels of an attention head in the vision tower, by its width; in every other and in every text tower 64.
HEAD_DIMS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}


@dataclass(frozen=True)
class DualArchitecture(Architecture):
    """Both towers. The text tower's fields are `None` where there is only the vision tower."""

    projection_dim: int | None = None
    hidden_act: str = "gelu"
    text_hidden_size: int | None = None
    text_num_hidden_layers: int | None = None
    text_intermediate_size: int | None = None
    vocab_size: int | None = 49408
    context_length: int | None = 77

    def without_text(self) -> "DualArchitecture":
        """The vision tower alone."""
        return replace(self, **{name: None for name in asdict(self) if name.startswith(("text_", "vocab", "context"))})


OLD, NEW = "visual.transformer.resblocks.{layer}", "encoder.layer.{layer}"
VISION_RULES: Rules = {
    "visual.conv1.weight": "embeddings.patch_embeddings.projection.weight",
    "visual.class_embedding": "embeddings.cls_token",
    "visual.positional_embedding": "embeddings.position_embeddings",
    "visual.ln_pre.{param}": "embeddings.pre_layernorm.{param}",
    OLD + ".ln_1.{param}": NEW + ".norm1.{param}",
    OLD + ".attn.in_proj_weight": tuple(NEW + f".attention.{part}_proj.weight" for part in "qkv"),
    OLD + ".attn.in_proj_bias": tuple(NEW + f".attention.{part}_proj.bias" for part in "qkv"),
    OLD + ".attn.out_proj.{param}": NEW + ".attention.o_proj.{param}",
    OLD + ".ln_2.{param}": NEW + ".norm2.{param}",
    OLD + ".mlp.c_fc.{param}": NEW + ".mlp.fc1.{param}",
    OLD + ".mlp.c_proj.{param}": NEW + ".mlp.fc2.{param}",
    "visual.ln_post.{param}": "layernorm.{param}",
}
# The text tower is in a module of its own where training asked for that.
TEXT_OLD, TEXT_NEW = "[text.]transformer.resblocks.{layer}", "encoder.layers.{layer}"
TEXT_RULES: Rules = {
    "[text.]token_embedding.weight": "embeddings.token_embedding.weight",
    "[text.]positional_embedding": "embeddings.position_embedding.weight",
    TEXT_OLD + ".ln_1.{param}": TEXT_NEW + ".layer_norm1.{param}",
    TEXT_OLD + ".attn.in_proj_weight": tuple(TEXT_NEW + f".self_attn.{part}_proj.weight" for part in "qkv"),
    TEXT_OLD + ".attn.in_proj_bias": tuple(TEXT_NEW + f".self_attn.{part}_proj.bias" for part in "qkv"),
    TEXT_OLD + ".attn.out_proj.{param}": TEXT_NEW + ".self_attn.out_proj.{param}",
    TEXT_OLD + ".ln_2.{param}": TEXT_NEW + ".layer_norm2.{param}",
    TEXT_OLD + ".mlp.c_fc.{param}": TEXT_NEW + ".mlp.fc1.{param}",
    TEXT_OLD + ".mlp.c_proj.{param}": TEXT_NEW + ".mlp.fc2.{param}",
    "[text.]ln_final.{param}": "final_layer_norm.{param}",
}


def _within(module: str, rules: Rules) -> Rules:
    """The same for a model that has theirs as a module."""
    return {
        old: f"{module}.{new}" if isinstance(new, str) else tuple(f"{module}.{part}" for part in new)
        for old, new in rules.items()
    }


RULES: Rules = {
    **_within("vision_model", VISION_RULES),
    "visual.proj": "visual_projection.weight",
    **_within("text_model", TEXT_RULES),
    "[text.]text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
VISION_ONLY_RULES: Rules = {**VISION_RULES, "visual.proj": "projection.weight"}
# What has another shape there: `x @ proj` is a linear layer's weight transposed, and ViTReg counts the batch.
SHAPED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "visual.class_embedding": lambda tensor: tensor[None, None],
    "visual.positional_embedding": lambda tensor: tensor[None],
    "visual.proj": lambda tensor: tensor.T.contiguous(),
    "text_projection": lambda tensor: tensor.T.contiguous(),
    "logit_scale": torch.squeeze,
}

VISION_PREFIX = re.compile(r"((?:.*\.)?)visual\.(?:class_embedding|positional_embedding|conv1\.weight)")
EVERY_VISION_TOWER_HAS = (
    "visual.class_embedding",
    "visual.positional_embedding",
    "visual.conv1.weight",
    "visual.ln_pre.weight",
    "visual.transformer.resblocks.0.attn.in_proj_weight",
    "visual.proj",
)
EVERY_TEXT_TOWER_HAS = (
    "token_embedding.weight",
    "positional_embedding",
    "transformer.resblocks.0.attn.in_proj_weight",
    "text_projection",
    "logit_scale",
)
# What OpenAI's state dicts hold beside the weights.
OPENAI_ENTRIES = ("input_resolution", "context_length", "vocab_size")


def head_dim(hidden_size: int) -> int:
    """Channels of an attention head in the vision tower, which no shape tells."""
    return HEAD_DIMS.get(hidden_size, HEAD_DIM)


def vision_config(architecture: DualArchitecture) -> ViTRegConfig:
    """Of a vision tower without its projection."""
    return ViTRegConfig(
        hidden_size=architecture.hidden_size,
        num_hidden_layers=architecture.num_hidden_layers,
        num_attention_heads=architecture.hidden_size // head_dim(architecture.hidden_size),
        intermediate_size=architecture.intermediate_size,
        hidden_act=architecture.hidden_act,
        image_size=architecture.image_size,
        patch_size=architecture.patch_size,
        num_register_tokens=0,
        layer_norm_eps=1e-5,
        layerscale_value=None,
        patch_bias=False,
        use_pre_layernorm=True,
        # open_clip/model.py, resize_pos_embed
        interpolate_antialias=True,
        interpolate_offset=0.0,
        classifier_layout="cls",
    )


def text_config(architecture: DualArchitecture) -> CLIPTextConfig:
    """Of a text tower. The end of text has the highest id, which is where OpenCLIP pools."""
    return CLIPTextConfig(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.text_hidden_size,
        intermediate_size=architecture.text_intermediate_size,
        num_hidden_layers=architecture.text_num_hidden_layers,
        num_attention_heads=architecture.text_hidden_size // HEAD_DIM,
        max_position_embeddings=architecture.context_length,
        hidden_act=architecture.hidden_act,
        projection_dim=architecture.projection_dim,
        layer_norm_eps=1e-5,
        bos_token_id=architecture.vocab_size - 2,
        eos_token_id=architecture.vocab_size - 1,
        pad_token_id=architecture.vocab_size - 1,
    )


def dual_config(architecture: DualArchitecture) -> VisionTextDualEncoderConfig:
    """Of both towers and their projections."""
    return VisionTextDualEncoderConfig.from_vision_text_configs(
        vision_config(architecture), text_config(architecture), projection_dim=architecture.projection_dim
    )


@dataclass(frozen=True)
class Towers:
    """What was found in a file.

    Attributes:
        prefix: What stands before the names of the towers.
        tensors: The towers', without the prefix, and every tensor that nobody knows, for `rename` to refuse.
        left_aside: Everything else, by name.
        is_openai: Whether there are the entries that only OpenAI's state dicts have.
    """

    prefix: str
    tensors: dict[str, torch.Tensor]
    left_aside: list[str]
    is_openai: bool


def read_towers(file: Path, vision_only: bool) -> Towers:
    """Both towers, or the vision tower alone, from a state dict that may be in a training checkpoint."""
    if is_torchscript(file):
        raise ConversionError(
            f"{file} is a TorchScript archive, as OpenAI publishes its models: reading one runs the code in it. "
            "Nothing was run. The same weights are on the Hub as a plain state dict: give their name, like "
            "ViT-B-32/openai, or the open_clip_model.safetensors of timm/vit_base_patch32_clip_224.openai. Or, where "
            "you trust the file, write its state dict: torch.save(torch.jit.load(file).state_dict(), ...)."
        )
    leaves = read_leaves(file)
    prefix = _prefix(file, leaves)
    tensors, left_aside = {}, Counter()
    for name, leaf in leaves.items():
        own_name = name.removeprefix(prefix)
        if not name.startswith(prefix):
            left_aside[name.split(".")[0]] += 1
        elif own_name in OPENAI_ENTRIES or not isinstance(leaf, torch.Tensor):
            left_aside[name] += 1
        elif vision_only and not own_name.startswith("visual."):
            left_aside[prefix + own_name.split(".")[0]] += 1
        else:
            tensors[own_name] = leaf
    parts = [f"{part} ({number} entries)" if number > 1 else part for part, number in left_aside.items()]
    is_openai = any(prefix + name in leaves for name in OPENAI_ENTRIES)
    return Towers(prefix, tensors, parts, is_openai)


def _prefix(file: Path, names: Mapping) -> str:
    """What stands before the names of the towers."""
    prefixes = list(dict.fromkeys(match[1] for match in map(VISION_PREFIX.fullmatch, names) if match))
    if len(prefixes) > 1:
        raise ConversionError(
            f"{file} holds several models, under {', '.join(map(repr, prefixes))}. Save the one to convert alone."
        )
    return prefixes[0] if prefixes else ""


def flat(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same where the text tower is in no module of its own, and the scale is a plain number."""
    names = {name: name.removeprefix("text.") for name in tensors}
    return {new: tensors[old].squeeze() if new == "logit_scale" else tensors[old] for old, new in names.items()}


def architecture_from_shapes(file: Path, towers: Towers) -> DualArchitecture:
    """What the shapes tell, which is everything but the activation.

    Raises:
        ConversionError: where a tower is not whole, or is none of OpenCLIP's own.
    """
    trunk = [name for name in towers.tensors if name.startswith("visual.trunk.")]
    if trunk:
        raise ConversionError(f"{file} has a vision tower of timm's ({shown(trunk)}), not OpenCLIP's own ViT.")
    try:
        shapes = shapes_of(file, towers.tensors, TITLE, EVERY_VISION_TOWER_HAS)
    except ConversionError as error:
        raise ConversionError(f"{error}{hint(towers.tensors, 'open_clip')}") from error
    hidden_size, num_channels, _, patch_size = dimensions(shapes, "visual.conv1.weight", 4, TITLE)
    num_positions, _ = dimensions(shapes, "visual.positional_embedding", 2, TITLE)
    dimensions(shapes, "visual.class_embedding", 1, TITLE)
    if num_channels != 3:
        raise ConversionError(f"{file} is for images of {num_channels} channels, and OpenCLIP has 3.")
    side = side_of_grid(file, {"pos_embed": (1, num_positions, hidden_size)}, hidden_size, 1, TITLE)
    vision = DualArchitecture(
        hidden_size=hidden_size,
        num_hidden_layers=_num_layers(shapes, "visual."),
        intermediate_size=dimensions(shapes, OLD.format(layer=0) + ".mlp.c_fc.weight", 2, TITLE)[0],
        patch_size=patch_size,
        image_size=side * patch_size,
        projection_dim=dimensions(shapes, "visual.proj", 2, TITLE)[1],
    )
    if all(name.startswith("visual.") for name in shapes):
        return vision.without_text()
    return replace(vision, **_text_fields(file, {name.removeprefix("text."): shapes[name] for name in shapes}))


def _text_fields(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    absent = [name for name in EVERY_TEXT_TOWER_HAS if name not in shapes]
    if absent:
        others = [name for name in shapes if not name.startswith("visual.")]
        raise ConversionError(
            f"{file} has no whole text tower of CLIP's own: it has no {', '.join(absent)}. Beside the vision tower it "
            f"has {shown(others)}. --vision-only converts the vision tower alone."
        )
    vocab_size, hidden_size = dimensions(shapes, "token_embedding.weight", 2, TITLE)
    dimensions(shapes, "text_projection", 2, TITLE)
    if hidden_size % HEAD_DIM:
        raise ConversionError(
            f"{file} is no OpenCLIP checkpoint: the width of its text tower must be a multiple of {HEAD_DIM}, and is "
            f"{hidden_size}."
        )
    return {
        "vocab_size": vocab_size,
        "text_hidden_size": hidden_size,
        "text_num_hidden_layers": _num_layers(shapes),
        "text_intermediate_size": dimensions(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2, TITLE)[0],
        "context_length": dimensions(shapes, "positional_embedding", 2, TITLE)[0],
    }


def _num_layers(names: Mapping, prefix: str = "") -> int:
    pattern = re.compile(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    return 1 + max(int(match[1]) for match in map(pattern.match, names) if match)


def filled(architecture: DualArchitecture, tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A dual encoder or, of a vision tower alone, a ViTReg with its projection; its large tensors are views.

    Raises:
        ConversionError: see `renaming.rename`.
    """
    shaped = {name: SHAPED.get(name.removeprefix("text."), _as_it_is)(tensor) for name, tensor in tensors.items()}
    if architecture.text_hidden_size is None:
        config = vision_config(architecture)
        config.projection_dim = architecture.projection_dim
        return fill(ViTRegModel, config, shaped, VISION_ONLY_RULES)
    model = fill(VisionTextDualEncoderModel, dual_config(architecture), shaped, RULES)
    # a buffer that is in no checkpoint
    model.text_model.embeddings.position_ids = torch.arange(architecture.context_length)[None]
    return model


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
