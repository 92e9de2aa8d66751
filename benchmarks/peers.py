# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The same DINOv2 architecture, with the same weights, in hf_vitreg, in transformers and in timm."""

import re
from collections.abc import Mapping, Sequence

import timm
import torch
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.deployment.agreement import Agreement, agreement, tolerance


SIZES = {
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
LIBRARIES = ("hf_vitreg", "transformers", "timm")
TIMM_NAME = "vit_{}_patch14_reg4_dinov2"
PATCH_SIZE = 14
NUM_REGISTER_TOKENS = 4
LAYER_SCALE = 0.3  # the mean; a residual branch of 1 would drown the tokens that it is added to


def build(
    size: str,
    image_size: int,
    attention: str,
    dtype: torch.dtype,
    device: torch.device,
    libraries: Sequence[str] = LIBRARIES,
) -> dict[str, nn.Module]:
    """Models whose outputs are equal: all tokens, `(batch, 1 + 4 + num_patches, hidden_size)`, by `tokens`."""
    torch.manual_seed(0)
    shared = {**SIZES[size], "image_size": image_size, "patch_size": PATCH_SIZE, "attn_implementation": attention}
    ours = ViTRegModel(ViTRegConfig(num_register_tokens=NUM_REGISTER_TOKENS, **shared))
    for name, parameter in ours.named_parameters():
        _draw(name, parameter)
    makers = {
        "hf_vitreg": lambda: ours,
        "transformers": lambda: _transformers(shared, ours.state_dict()),
        "timm": lambda: _timm(size, image_size, attention, ours.state_dict()),
    }
    return {library: makers[library]().to(device, dtype) for library in libraries}


def describe(size: str, image_size: int, batch_size: int, attention: str) -> str:
    """Models and images in words."""
    registers = f"{NUM_REGISTER_TOKENS} registers"
    return f"ViT-{size}/{PATCH_SIZE}, {registers}, {image_size} px, batch {batch_size}, {attention}"


def _draw(name: str, parameter: nn.Parameter) -> None:
    """So that an error anywhere shows in the output, norms and LayerScale too, and tokens differ from one another.

    Where all parameters of a layer have a mean of their own, all tokens point one way, and a cosine says nothing.
    """
    if parameter.ndim == 1 and not name.endswith("bias"):
        mean = LAYER_SCALE if name.endswith("lambda1") else 1.0
        nn.init.normal_(parameter, mean, 0.1 * mean)
    elif parameter.ndim == 1:
        nn.init.normal_(parameter, 0.0, 0.1)
    elif name.endswith("weight"):
        nn.init.normal_(parameter, 0.0, parameter[0].numel() ** -0.5)
    else:
        nn.init.normal_(parameter, 0.0, 0.5)


def tokens(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """All tokens after the final norm."""
    if hasattr(model, "forward_features"):
        return model.forward_features(pixel_values.to(model.patch_embed.proj.weight.dtype))
    return model(pixel_values).last_hidden_state


def compiled(model: nn.Module) -> nn.Module:
    """The model itself, with what `tokens` calls compiled."""
    if hasattr(model, "forward_features"):
        model.forward_features = torch.compile(model.forward_features)
    else:
        model.compile()
    return model


def kinds(all_tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """CLS, registers and patches of `tokens`, as `ViTRegModel` names them, in float32."""
    cls_token, registers, patches = all_tokens.float().split(
        [1, NUM_REGISTER_TOKENS, all_tokens.shape[1] - 1 - NUM_REGISTER_TOKENS], dim=1
    )
    return {"pooler_output": cls_token[:, 0], "register_tokens": registers, "patch_tokens": patches}


def check_equal(
    models: Mapping[str, nn.Module], pixel_values: torch.Tensor, dtypes: Mapping[str, torch.dtype], exact: nn.Module
) -> dict[str, Agreement]:
    """How well models agree with `exact`, in float32. Raises `ValueError` where one does not by its dtype."""
    with torch.no_grad():
        expected = kinds(tokens(exact, pixel_values))
        found = {name: agreement(kinds(tokens(model, pixel_values)), expected) for name, model in models.items()}
    for name, agreed in found.items():
        if not agreed.suffices(dtypes[name]):
            raise ValueError(
                f"{name} is not the same model: {agreed.describe(dtypes[name])}, where {tolerance(dtypes[name])} is "
                "needed. Its time cannot be compared."
            )
    return found


def _transformers(shared: dict, state: Mapping[str, torch.Tensor]) -> nn.Module:
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=NUM_REGISTER_TOKENS, **shared))
    mask_token = {"embeddings.mask_token": model.embeddings.mask_token.detach()}
    model.load_state_dict({**transformers_names(state), **mask_token})
    return model


def transformers_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors under the names of transformers."""
    return {re.sub(r"residual([12])\.", r"layer_scale\1.", name): tensor for name, tensor in state.items()}


def _timm(size: str, image_size: int, attention: str, state: Mapping[str, torch.Tensor]) -> nn.Module:
    model = timm.create_model(TIMM_NAME.format(size), img_size=image_size, num_classes=0)
    model.load_state_dict(timm_names(state, model))
    for block in model.blocks:
        block.attn.fused_attn = attention == "sdpa"
    return model


def timm_names(state: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Our tensors under the names of timm, and in the shapes of a model of it."""
    original = {"mask_token": torch.zeros(1, model.embed_dim), **_dinov2_names(state)}
    return timm.models.vision_transformer.checkpoint_filter_fn(original, model)


def _dinov2_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
