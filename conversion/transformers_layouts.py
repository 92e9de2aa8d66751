# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The models of transformers that a ViTReg can be: what their configs say, and where their tensors go.

Files have two spellings of names: those of today's models, and older ones that `save_pretrained` still writes for some
of them (transformers/conversion_mapping.py). Every table has both.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPImageProcessor,
    CLIPPreTrainedModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTImageProcessor,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from conversion.family import ConversionError
from conversion.renaming import Rules
from conversion.vit_layout import NEW, image_processor
from hf_vitreg import ViTRegConfig


PERIODS = "rope_embeddings.periods"  # of our own making: no file has them


def in_layers(places: Iterable[str], *tables: Mapping[str, str | tuple[str, ...]]) -> Rules:
    """Rules of one layer as those of all, wherever the layers are."""

    def inside(new: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return f"{NEW}.{new}" if isinstance(new, str) else tuple(f"{NEW}.{part}" for part in new)

    return {f"{place}.{old}": inside(new) for place in places for table in tables for old, new in table.items()}


def _kept(*names: str) -> dict[str, str]:
    return {name: name for name in names}


OLD_ATTENTION = {
    "attention.attention.query.{param}": "attention.q_proj.{param}",
    "attention.attention.key.{param}": "attention.k_proj.{param}",
    "attention.attention.value.{param}": "attention.v_proj.{param}",
    "attention.output.dense.{param}": "attention.o_proj.{param}",
}
ATTENTION = _kept(*(f"attention.{part}_proj.{{param}}" for part in "qkvo"))
MLP = _kept("mlp.fc1.{param}", "mlp.fc2.{param}")
EMBEDDINGS = _kept(
    "embeddings.cls_token",
    "embeddings.mask_token",
    "embeddings.position_embeddings",
    "embeddings.patch_embeddings.projection.{param}",
    "layernorm.{param}",
    "classifier.{param}",
)

VIT_RULES: Rules = {
    **EMBEDDINGS,
    **in_layers(
        ("encoder.layer.{layer}", "layers.{layer}"),
        {"layernorm_before.{param}": "norm1.{param}", "layernorm_after.{param}": "norm2.{param}"},
        OLD_ATTENTION,
        {"intermediate.dense.{param}": "mlp.fc1.{param}", "output.dense.{param}": "mlp.fc2.{param}"},
        ATTENTION,
        MLP,
    ),
}
DEIT_RULES: Rules = {
    **VIT_RULES,
    **_kept("embeddings.distillation_token", "distillation_classifier.{param}"),
    "cls_classifier.{param}": "classifier.{param}",
}
# As `save_pretrained` writes it, in the first place: the other direction takes what it finds first.
DINOV2_RULES: Rules = {
    **EMBEDDINGS,
    **_kept("embeddings.register_tokens"),
    **in_layers(
        ("encoder.layer.{layer}",),
        _kept("norm1.{param}", "norm2.{param}"),
        {"layer_scale1.lambda1": "residual1.lambda1", "layer_scale2.lambda1": "residual2.lambda1"},
        OLD_ATTENTION,
        MLP,
        {
            "mlp.weights_in.{param}": ("mlp.gate_proj.{param}", "mlp.up_proj.{param}"),
            "mlp.weights_out.{param}": "mlp.down_proj.{param}",
        },
        ATTENTION,
        _kept("mlp.gate_proj.{param}", "mlp.up_proj.{param}", "mlp.down_proj.{param}"),
    ),
}
DINOV3_RULES: Rules = {
    **_kept("embeddings.cls_token", "embeddings.mask_token", "embeddings.register_tokens"),
    "embeddings.patch_embeddings.{param}": "embeddings.patch_embeddings.projection.{param}",
    PERIODS: "encoder.rotary_embeddings.periods",
    "norm.{param}": "layernorm.{param}",
    **in_layers(
        ("[model.]layer.{layer}",),
        _kept("norm1.{param}", "norm2.{param}"),
        {"layer_scale1.lambda1": "residual1.lambda1", "layer_scale2.lambda1": "residual2.lambda1"},
        ATTENTION,
        {"mlp.up_proj.{param}": "mlp.fc1.{param}", "mlp.down_proj.{param}": "mlp.fc2.{param}"},
    ),
}
DINOV3_GATED_RULES: Rules = {
    **DINOV3_RULES,
    **in_layers(("[model.]layer.{layer}",), _kept(*(f"mlp.{part}_proj.{{param}}" for part in ("gate", "up", "down")))),
}
CLIP_RULES: Rules = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.patch_embedding.weight": "embeddings.patch_embeddings.projection.weight",
    "embeddings.position_embedding.weight": "embeddings.position_embeddings",
    "pre_layrnorm.{param}": "embeddings.pre_layernorm.{param}",
    "post_layernorm.{param}": "layernorm.{param}",
    "visual_projection.weight": "projection.weight",
    "classifier.{param}": "classifier.{param}",
    **in_layers(
        ("encoder.layers.{layer}",),
        {"layer_norm1.{param}": "norm1.{param}", "layer_norm2.{param}": "norm2.{param}"},
        {f"self_attn.{part}_proj.{{param}}": f"attention.{part}_proj.{{param}}" for part in "qkv"},
        {"self_attn.out_proj.{param}": "attention.o_proj.{param}"},
        MLP,
    ),
}


@dataclass(frozen=True)
class Layout:
    """A model type of transformers.

    Attributes:
        title: As people write it.
        config_class: What its config.json is.
        fields: From a config, and the names in the file, to the fields of `ViTRegConfig`.
        rules: From the names in a file to those of ViTReg, by whether the MLP has a gate.
        models: The class that holds a file with this head; that of `""` one without.
        image_processor: What a model of this config has by default, for folders without one.
        left_aside: What files may hold that no ViTReg has: the part that names it.
        options: Of the constructors of models without a head.
        not_in_reference: Tensors that these classes have no place for, and that no output depends on.
    """

    title: str
    config_class: type[PreTrainedConfig]
    fields: Callable[[PreTrainedConfig, Collection[str]], dict]
    rules: Callable[[bool], Rules]
    models: Mapping[str, type[PreTrainedModel]]
    image_processor: Callable[[ViTRegConfig], BaseImageProcessor]
    left_aside: re.Pattern = re.compile(r"(?!)")
    options: Mapping[str, bool] = field(default_factory=dict)
    not_in_reference: Collection[str] = ()

    def head(self, names: Collection[str]) -> str:
        """Which of its heads is among the names."""
        return next((head for head in self.models if f"{head}.weight" in names), "")

    def has_classifier(self, names: Collection[str]) -> bool:
        """Whether one of them is a classifier."""
        return self.head(names).endswith("classifier")

    def prefix(self, head: str) -> str:
        """What the backbone's names start with in the class with this head."""
        if head == "":
            return ""
        # the classifier of CLIP says another one, and does not mean it
        is_clip = issubclass(self.models[head], CLIPPreTrainedModel)
        return "vision_model." if is_clip else f"{self.models[head].base_model_prefix}."


def _one_side(config: PreTrainedConfig, name: str, title: str) -> int:
    """A length that ViTReg has one of, and transformers one or two."""
    value = getattr(config, name)
    sides = [value] if isinstance(value, int) else list(value or ())
    if len(set(sides)) != 1:
        raise ConversionError(
            f"The {title} has {name} {value} in its config.json. ViTReg reads one number, or two that are equal."
        )
    return sides[0]


def _common(config: PreTrainedConfig, title: str) -> dict:
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": config.hidden_act,
        "initializer_range": config.initializer_range,
        "layer_norm_eps": config.layer_norm_eps,
        "num_channels": config.num_channels,
        "patch_size": _one_side(config, "patch_size", title),
        "num_register_tokens": 0,
        # every one of them interpolates to a size
        "interpolate_offset": 0.0,
        "interpolate_antialias": False,
    }


def _image_size(config: PreTrainedConfig) -> int | tuple[int, int]:
    size = config.image_size
    if isinstance(size, int):
        return size
    height, width = size
    return height if height == width else (height, width)


def _vit(config: ViTConfig | DeiTConfig, names: Collection[str]) -> dict:
    return {
        **_common(config, "ViT"),
        "image_size": _image_size(config),
        "intermediate_size": config.intermediate_size,
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "layerscale_value": None,
        "use_mask_token": "embeddings.mask_token" in names,
        "classifier_layout": "cls",
    }


def _deit(config: DeiTConfig, names: Collection[str]) -> dict:
    return {
        **_vit(config, names),
        "use_distillation_token": True,
        "position_embedding_type": "prefix_patches",
        "classifier_layout": "cls_distillation" if "cls_classifier.weight" in names else "cls",
    }


def _dinov2(config: Dinov2Config | Dinov2WithRegistersConfig, names: Collection[str]) -> dict:
    has_registers = isinstance(config, Dinov2WithRegistersConfig)
    return {
        **_common(config, "DINOv2"),
        "image_size": _one_side(config, "image_size", "DINOv2"),
        "mlp_ratio": config.mlp_ratio,
        "use_swiglu_ffn": config.use_swiglu_ffn,
        "qkv_bias": config.qkv_bias,
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "drop_path_rate": config.drop_path_rate,
        "layerscale_value": config.layerscale_value,
        "num_register_tokens": config.num_register_tokens if has_registers else 0,
        "interpolate_antialias": has_registers,
        "use_mask_token": "embeddings.mask_token" in names,
        "classifier_layout": "cls_mean",
        **_as_backbone(config),
    }


def _dinov3(config: DINOv3ViTConfig, names: Collection[str]) -> dict:
    if config.query_bias != config.value_bias or (config.key_bias and not config.query_bias):
        raise ConversionError(
            f"The DINOv3 has query_bias={config.query_bias}, key_bias={config.key_bias} and "
            f"value_bias={config.value_bias} in its config.json. ViTReg has the biases of queries and values, or of "
            "all three, or none."
        )
    if config.use_gated_mlp and config.hidden_act != "silu":
        raise ConversionError(
            f"The DINOv3 has a gated MLP with hidden_act={config.hidden_act!r} in its config.json. The gate of ViTReg "
            "is SwiGLU, 'silu'."
        )
    return {
        **_common(config, "DINOv3"),
        "image_size": _image_size(config),
        "intermediate_size": config.intermediate_size,
        "use_swiglu_ffn": config.use_gated_mlp,
        # beside a gate it says how the gate is activated, which is fixed here
        "hidden_act": "gelu" if config.use_gated_mlp else config.hidden_act,
        "qkv_bias": config.query_bias,
        "key_bias": config.key_bias,
        "proj_bias": config.proj_bias,
        "mlp_bias": config.mlp_bias,
        "attention_probs_dropout_prob": config.attention_dropout,
        "drop_path_rate": config.drop_path_rate,
        "layerscale_value": config.layerscale_value,
        "num_register_tokens": config.num_register_tokens,
        "register_init_std": config.initializer_range,
        "use_mask_token": "embeddings.mask_token" in names,
        "position_embedding_type": "rope",
        "rope_theta": config.rope_theta,
        "pos_embed_shift": config.pos_embed_shift,
        "pos_embed_jitter": config.pos_embed_jitter,
        "pos_embed_rescale": config.pos_embed_rescale,
        **_as_backbone(config),
    }


def _as_backbone(config: PreTrainedConfig) -> dict:
    return {
        "apply_layernorm": config.apply_layernorm,
        "reshape_hidden_states": config.reshape_hidden_states,
        "out_indices": config.out_indices,
    }


def _clip(config: CLIPConfig | CLIPVisionConfig, names: Collection[str]) -> dict:
    vision = getattr(config, "vision_config", config)
    projects = "visual_projection.weight" in names
    fields = {
        **_common(vision, "CLIP"),
        "image_size": _one_side(vision, "image_size", "CLIP"),
        "intermediate_size": vision.intermediate_size,
        "attention_probs_dropout_prob": vision.attention_dropout,
        "layerscale_value": None,
        "patch_bias": False,
        "use_pre_layernorm": True,
        # of a dual encoder that of both
        "projection_dim": config.projection_dim if projects else None,
        "classifier_layout": "cls",
    }
    if "classifier.weight" in names:
        # on the mean of the patches, which CLIP does not norm
        fields |= {"final_norm": "none", "pooler_type": "mean", "classifier_layout": "pooled"}
    return fields


def _sides(config: ViTRegConfig) -> dict[str, int]:
    """Of the images that the model was trained on, in pixels."""
    rows, cols = config.grid_size
    return {"height": rows * config.patch_size, "width": cols * config.patch_size}


def _clip_processor(config: ViTRegConfig) -> CLIPImageProcessor:
    sides = _sides(config)
    return CLIPImageProcessor(size={"shortest_edge": sides["height"]}, crop_size=sides)


def _deit_processor(config: ViTRegConfig) -> DeiTImageProcessor:
    sides = _sides(config)
    return DeiTImageProcessor(size={side: length * 8 // 7 for side, length in sides.items()}, crop_size=sides)


def _dinov2_processor(config: ViTRegConfig) -> BitImageProcessor:
    return image_processor(resize=256, crop=max(224 // config.patch_size, 1) * config.patch_size)


CLIP = Layout(
    title="CLIP",
    config_class=CLIPConfig,
    fields=_clip,
    rules=lambda has_gate: CLIP_RULES,
    models={
        "": CLIPVisionModel,
        "classifier": CLIPForImageClassification,
        "visual_projection": CLIPVisionModelWithProjection,
    },
    image_processor=_clip_processor,
    left_aside=re.compile(r"(text_model|text_projection|logit_scale|embeddings\.position_ids)(?=\.|$)"),
)
# By the `model_type` of a config.json.
LAYOUTS = {
    "vit": Layout(
        title="ViT",
        config_class=ViTConfig,
        fields=_vit,
        rules=lambda has_gate: VIT_RULES,
        models={"": ViTModel, "classifier": ViTForImageClassification},
        image_processor=lambda config: ViTImageProcessor(size=_sides(config)),
        left_aside=re.compile(r"(pooler|decoder)(?=\.)"),
        options={"add_pooling_layer": False},
        not_in_reference=("embeddings.mask_token",),
    ),
    "deit": Layout(
        title="DeiT",
        config_class=DeiTConfig,
        fields=_deit,
        rules=lambda has_gate: DEIT_RULES,
        models={
            "": DeiTModel,
            "classifier": DeiTForImageClassification,
            "cls_classifier": DeiTForImageClassificationWithTeacher,
        },
        image_processor=_deit_processor,
        left_aside=re.compile(r"(pooler|decoder)(?=\.)"),
        options={"add_pooling_layer": False},
        not_in_reference=("embeddings.mask_token",),
    ),
    "dinov2": Layout(
        title="DINOv2",
        config_class=Dinov2Config,
        fields=_dinov2,
        rules=lambda has_gate: DINOV2_RULES,
        models={"": Dinov2Model, "classifier": Dinov2ForImageClassification},
        image_processor=_dinov2_processor,
    ),
    "dinov2_with_registers": Layout(
        title="DINOv2 with registers",
        config_class=Dinov2WithRegistersConfig,
        fields=_dinov2,
        rules=lambda has_gate: DINOV2_RULES,
        models={"": Dinov2WithRegistersModel, "classifier": Dinov2WithRegistersForImageClassification},
        image_processor=_dinov2_processor,
    ),
    "dinov3_vit": Layout(
        title="DINOv3",
        config_class=DINOv3ViTConfig,
        fields=_dinov3,
        rules=lambda has_gate: DINOV3_GATED_RULES if has_gate else DINOV3_RULES,
        models={"": DINOv3ViTModel},
        image_processor=lambda config: DINOv3ViTImageProcessor(size=_sides(config)),
    ),
    "clip": CLIP,
    "clip_vision_model": replace(CLIP, config_class=CLIPVisionConfig),
}


def periods(config: ViTRegConfig | DINOv3ViTConfig) -> torch.Tensor:
    """Of DINOv3's rotation, `(head_dim / 4,)`: the inverse of the frequencies that transformers computes."""
    head_dim = config.hidden_size // config.num_attention_heads
    return config.rope_theta ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float32)
