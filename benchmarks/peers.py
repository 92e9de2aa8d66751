# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The same DINOv2 architecture, with the same weights, in hf_vitreg, in transformers and in timm."""

import re

import timm
import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from hf_vitreg import ViTRegConfig, ViTRegModel


SIZES = {
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
PATCH_SIZE = 14
NUM_REGISTER_TOKENS = 4


def build(
    size: str, image_size: int, attention: str, dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Module]:
    """Models whose outputs are equal: all tokens, `(batch, 1 + 4 + num_patches, hidden_size)`, by `tokens`."""
    torch.manual_seed(0)
    shared = {**SIZES[size], "image_size": image_size, "patch_size": PATCH_SIZE, "attn_implementation": attention}
    ours = ViTRegModel(ViTRegConfig(num_register_tokens=NUM_REGISTER_TOKENS, **shared))
    for parameter in ours.parameters():  # the norms and LayerScale too, or an error there would not show
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.05)
    theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=NUM_REGISTER_TOKENS, **shared))
    theirs.load_state_dict(_transformers_names(ours.state_dict(), theirs.embeddings.mask_token))
    models = {"hf_vitreg": ours, "transformers": theirs, "timm": _timm(size, image_size, attention, ours.state_dict())}
    return {name: model.to(device, dtype) for name, model in models.items()}


def tokens(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """All tokens after the final norm."""
    if isinstance(model, timm.models.VisionTransformer):
        return model.forward_features(pixel_values)
    return model(pixel_values).last_hidden_state


def check_equal(models: dict[str, nn.Module], pixel_values: torch.Tensor, tolerance: float) -> dict[str, float]:
    """Largest difference from ours, relative to the largest magnitude. Raises `ValueError` above the tolerance."""
    with torch.no_grad():
        outputs = {name: tokens(model, pixel_values).float() for name, model in models.items()}
    expected = outputs["hf_vitreg"]
    differences = {
        name: ((output - expected).abs().max() / expected.abs().max()).item() for name, output in outputs.items()
    }
    if max(differences.values()) > tolerance:
        raise ValueError(f"The models are not the same: {differences}. Their times cannot be compared.")
    return differences


def _transformers_names(state: dict[str, torch.Tensor], mask_token: torch.Tensor) -> dict[str, torch.Tensor]:
    renamed = {re.sub(r"residual([12])\.", r"layer_scale\1.", name): tensor for name, tensor in state.items()}
    return {**renamed, "embeddings.mask_token": mask_token.detach()}


def _timm(size: str, image_size: int, attention: str, state: dict[str, torch.Tensor]) -> nn.Module:
    model = timm.create_model(f"vit_{size}_patch14_reg4_dinov2", img_size=image_size, num_classes=0)
    original = {"mask_token": torch.zeros(1, model.embed_dim), **_dinov2_names(state)}
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(original, model))
    for block in model.blocks:
        block.attn.fused_attn = attention == "sdpa"
    return model


def _dinov2_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original layout, which timm reads: fused q, k, v, and its own names."""
    renamed = {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat(
                [state[name.replace("q_proj", projection)] for projection in ("q_proj", "k_proj", "v_proj")]
            )
        renamed[_dinov2_name(name)] = tensor
    return renamed


def _dinov2_name(name: str) -> str:
    for ours, original in (
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.", ""),
        ("encoder.layer.", "blocks."),
        ("attention.q_proj", "attn.qkv"),
        ("attention.o_proj", "attn.proj"),
        ("residual1.lambda1", "ls1.gamma"),
        ("residual2.lambda1", "ls2.gamma"),
        ("layernorm.", "norm."),
    ):
        name = name.replace(ours, original)
    return name
