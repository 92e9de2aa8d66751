# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Small models, full random weights, and the names that other implementations give to them."""

import re

import torch

from hf_vitreg import ViTRegConfig


BATCH_SIZE, NUM_REGISTERS, PATCH_SIZE, ROWS, COLS = 2, 5, 7, 3, 7
HEIGHT, WIDTH = ROWS * PATCH_SIZE, COLS * PATCH_SIZE
# every axis has a length of its own, so that a swapped axis is an error and not a different number
TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "patch_size": PATCH_SIZE,
    "image_size": (HEIGHT, WIDTH),
    "num_register_tokens": NUM_REGISTERS,
    "num_labels": 11,
}


def tiny_config(**overrides) -> ViTRegConfig:
    return ViTRegConfig(**{**TINY, **overrides})


def images(height: int = HEIGHT, width: int = WIDTH, batch_size: int = BATCH_SIZE) -> torch.Tensor:
    return torch.randn(batch_size, 3, height, width)


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every parameter, large enough that none of them could be left out unnoticed, and sets eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim in (2, 4) and name.endswith("weight"):
            parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "lambda1")):
            parameter.copy_(1 + 0.3 * noise)
        else:
            parameter.copy_(0.5 * noise)
    return model.eval()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest value; a different shape is an error, never broadcast."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return ((actual - expected).abs().max() / expected.abs().max()).item()


DINOV2_NAMES = [
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"attention\.o_proj\.", "attn.proj."),
    (r"attention\.(qkv)\.", r"attn.\1."),
    (r"residual(\d)\.lambda1", r"ls\1.gamma"),
    (r"mlp\.down_proj\.", "mlp.w3."),
]


def dinov2_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ViTReg state dict under the names of the original DINOv2 checkpoints, with their fused projections."""
    fused = {}
    for name, tensor in state_dict.items():
        if ".q_proj." in name:
            rest = [state_dict[name.replace("q_proj", other)] for other in ("k_proj", "v_proj")]
            fused[name.replace("q_proj", "qkv")] = torch.cat([tensor, *rest])
        elif ".gate_proj." in name:
            fused[name.replace("gate_proj", "w12")] = torch.cat([tensor, state_dict[name.replace("gate", "up")]])
        elif not re.search(r"\.(k|v|up)_proj\.", name):
            fused[name] = tensor
    for pattern, replacement in DINOV2_NAMES:
        fused = {re.sub(pattern, replacement, name): tensor for name, tensor in fused.items()}
    return {name: tensor.clone() for name, tensor in fused.items()}


def transformers_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ViTReg state dict under the names of transformers' Dinov2 models."""
    return {re.sub(r"residual(\d)\.", r"layer_scale\1.", name): tensor for name, tensor in state_dict.items()}
