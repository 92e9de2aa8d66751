# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""transformers' models, filled with an original checkpoint: the independent side of a comparison."""

import inspect
from collections.abc import Mapping

import torch
import transformers
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel, PreTrainedConfig, PreTrainedModel

from conversion.family import ConversionError, Outputs
from conversion.reading import without_progress_bars
from conversion.renaming import Rules, rename, shown
from conversion.vit_layout import OLD
from hf_vitreg import ViTRegConfig


NAME = f"transformers {transformers.__version__}"


def filled(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """A model of transformers whose parameters are these tensors: it has no memory of its own.

    Buffers that are in no checkpoint, such as frequencies and position ids, get the values of a new model.

    Args:
        model_class: Any, with a head or without.
        config: Its config.
        tensors: Every one that the model stores, under the names of its `state_dict()`. Files may have others.

    Raises:
        RuntimeError: where a tensor is missing, or one too many, or of another shape.
    """
    model = empty(model_class, config)
    model.load_state_dict(dict(tensors), assign=True)
    _compute_buffers(model)
    return model.eval()


def empty(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The same without values, on the meta device."""
    with torch.device("meta"):
        return model_class(config)


def loaded(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, torch.Tensor],
    options: Mapping[str, bool] = {},
) -> PreTrainedModel:
    """A model of transformers, filled by transformers' own loading of a file, without copies.

    Args:
        model_class: Any, with a head or without.
        config: Its config.
        tensors: Those of a file, of one dtype, under the names of any version that transformers reads.
        options: Of the model's constructor.

    Raises:
        ConversionError: where transformers finds a tensor missing, one too many, or one of another shape.
    """
    dtype = next(iter(tensors.values())).dtype
    with without_progress_bars():
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True, **options
        )
    problems = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if problems:
        lines = [f"{kind.replace('_', ' ')}: {shown(names)}" for kind, names in problems.items()]
        raise ConversionError(f"{NAME} does not read these weights as a {model_class.__name__}. {'; '.join(lines)}.")
    return model.eval()


class TransformersReference:
    """A model of transformers as `parity.compare` calls it.

    ViT, DeiT and CLIP interpolate their position embeddings where they are asked to, which they are; but theirs can
    only be those of a square grid, whatever the config says, and models for others take images of one size.

    Args:
        model: With a head or without.
        base_model: The part of it that returns the tokens.
        norms_cls_only: Whether its last norm is for the pooled CLS alone (CLIP); here all tokens go through it.
    """

    name = NAME

    def __init__(self, model: PreTrainedModel, base_model: PreTrainedModel, norms_cls_only: bool = False):
        self.model = model
        self.base_model = base_model
        self.norm = base_model.post_layernorm if norms_cls_only else nn.Identity()
        image_size = base_model.config.image_size
        is_square = isinstance(image_size, int) or image_size[0] == image_size[1]
        asks = "interpolate_pos_encoding" in inspect.signature(base_model.forward).parameters
        self.options = {"interpolate_pos_encoding": is_square} if asks else {}

    def __call__(self, pixel_values: torch.Tensor) -> Outputs:
        """`(batch_size, num_channels, height, width)` to tokens and what the heads make of them."""
        seen = []
        hook = self.base_model.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            returned = self.model(pixel_values, **self.options)
        finally:
            hook.remove()
        heads = {name: returned[name] for name in ("logits", "image_embeds") if name in returned}
        return {"tokens": self.norm(seen[0].last_hidden_state), **heads}


def _compute_buffers(model: PreTrainedModel):
    """Gives the buffers that were not filled their values, by the model's own initialization."""
    for tensor in (*model.parameters(), *model.buffers()):
        # what transformers' initialization functions leave alone
        tensor._is_hf_initialized = not tensor.is_meta
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
                module._is_hf_initialized = False
    model.initialize_weights()


LAYER = "model.layer.{layer}"
DINOV3_RULES: Rules = {
    "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj.{param}": "embeddings.patch_embeddings.{param}",
    OLD + ".norm1.{param}": LAYER + ".norm1.{param}",
    OLD + ".attn.qkv.weight": (
        LAYER + ".attention.q_proj.weight",
        LAYER + ".attention.k_proj.weight",
        LAYER + ".attention.v_proj.weight",
    ),
    OLD + ".attn.proj.{param}": LAYER + ".attention.o_proj.{param}",
    OLD + ".ls1.gamma": LAYER + ".layer_scale1.lambda1",
    OLD + ".norm2.{param}": LAYER + ".norm2.{param}",
    OLD + ".mlp.fc1.{param}": LAYER + ".mlp.up_proj.{param}",
    OLD + ".mlp.fc2.{param}": LAYER + ".mlp.down_proj.{param}",
    OLD + ".mlp.w1.{param}": LAYER + ".mlp.gate_proj.{param}",
    OLD + ".mlp.w2.{param}": LAYER + ".mlp.up_proj.{param}",
    OLD + ".mlp.w3.{param}": LAYER + ".mlp.down_proj.{param}",
    OLD + ".ls2.gamma": LAYER + ".layer_scale2.lambda1",
    "norm.{param}": "norm.{param}",
}


def dinov3_rules(key_bias: bool) -> Rules:
    """These, and the biases of queries, keys and values. Where the keys' is masked, it is dropped."""
    bias = tuple(LAYER + f".attention.{part}_proj.bias" if key_bias or part != "k" else None for part in "qkv")
    return {**DINOV3_RULES, OLD + ".attn.qkv.bias": bias}


class DINOv3Reference:
    """transformers' DINOv3 as `parity.compare` calls it.

    It would compute the periods of its rotation anew, and has no norm of their own for CLS and registers: it gets the
    stored periods, and that norm is applied here to what its last layer returns.

    Args:
        config: Of the ViTReg model on the other side.
        tensors: The backbone under its original names, without masks. They are shared, not copied.
        head: `weight` and `bias` of a linear head on CLS and the mean of the patches; empty where there is none.
    """

    name = NAME

    def __init__(self, config: ViTRegConfig, tensors: Mapping[str, torch.Tensor], head: Mapping[str, torch.Tensor]):
        apart = ("rope_embed.periods", "cls_norm.weight", "cls_norm.bias")
        self.head = head
        self.num_prefix_tokens = config.num_prefix_tokens
        self.prefix_norm = {name: tensors[f"cls_norm.{name}"] for name in ("weight", "bias") if apart[1] in tensors}
        self.layer_norm_eps = config.layer_norm_eps
        own = {name: tensor for name, tensor in tensors.items() if name not in apart}
        # with two dimensions in one and three in the other, and always there in transformers
        own["mask_token"] = own.get("mask_token", torch.zeros(1, config.hidden_size))[None]
        own.setdefault("storage_tokens", torch.zeros(1, 0, config.hidden_size))
        model_config = _dinov3_config(config)
        targets = {name: tensor.shape for name, tensor in empty(DINOv3ViTModel, model_config).state_dict().items()}
        self.model = filled(DINOv3ViTModel, model_config, rename(own, dinov3_rules(config.key_bias), targets))
        self.model.rope_embeddings.inv_freq.copy_(1 / tensors["rope_embed.periods"].float())

    def __call__(self, pixel_values: torch.Tensor) -> Outputs:
        """`(batch_size, num_channels, height, width)` to tokens and, with a head, logits."""
        returned = self.model(pixel_values, output_hidden_states=True)
        prefix, patches = returned.last_hidden_state.tensor_split([self.num_prefix_tokens], dim=1)
        if self.prefix_norm:
            # the last of the hidden states is not normed yet
            prefix = returned.hidden_states[-1][:, : self.num_prefix_tokens]
            prefix = nn.functional.layer_norm(prefix, prefix.shape[-1:], **self.prefix_norm, eps=self.layer_norm_eps)
        outputs = {"tokens": torch.cat([prefix, patches], dim=1)}
        if self.head:
            features = torch.cat([prefix[:, 0], patches.mean(dim=1)], dim=-1)
            outputs["logits"] = nn.functional.linear(features, self.head["weight"], self.head["bias"])
        return outputs


def _dinov3_config(config: ViTRegConfig) -> DINOv3ViTConfig:
    return DINOv3ViTConfig(
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        layer_norm_eps=config.layer_norm_eps,
        query_bias=config.qkv_bias,
        key_bias=config.qkv_bias and config.key_bias,
        value_bias=config.qkv_bias,
        use_gated_mlp=config.use_swiglu_ffn,
        # the gate's activation; without a gate that of the MLP
        hidden_act="silu" if config.use_swiglu_ffn else "gelu",
        num_register_tokens=config.num_register_tokens,
    )
