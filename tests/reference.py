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


ROPE = {"position_embedding_type": "rope", "key_bias": False, "layer_norm_eps": 1e-5}
WITHOUT_CLS = {"use_cls_token": False, "position_embedding_type": "patches", "classifier_layout": "pooled"}
# what one family or another has and the default has not, each with a classifier that reads it
VARIANTS = {
    "rope": {**ROPE, "pos_embed_rescale": 2.0},
    "rope_untied": {**ROPE, "final_norm": "untied", "use_swiglu_ffn": True, "classifier_layout": "last4_cls_mean"},
    "distilled": {
        "use_distillation_token": True,
        "position_embedding_type": "prefix_patches",
        "layerscale_value": None,
        "classifier_layout": "cls_distillation",
    },
    "without_cls_position": {"position_embedding_type": "patches", "classifier_layout": "last4_cls"},
    "projected": {
        "use_pre_layernorm": True,
        "patch_bias": False,
        "hidden_act": "quick_gelu",
        "projection_dim": 29,
        "classifier_layout": "pooled",
    },
    "mean": {**WITHOUT_CLS, "pooler_type": "mean", "position_embedding_type": "prefix_patches"},
    "mean_normed": {**WITHOUT_CLS, "pooler_type": "mean", "final_norm": "pooled"},
    "attended": {**WITHOUT_CLS, "pooler_type": "map", "hidden_act": "gelu_pytorch_tanh"},
    "normed_queries": {
        "use_qk_norm": True,
        "qkv_bias": False,
        "proj_bias": False,
        "mlp_bias": False,
        "final_norm": "none",
        "classifier_layout": "pooled",
    },
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


TIMM_NAMES = [
    (r"^classifier\.", "head."),
    (r"^register_tokens", "reg_token"),
    (r"^pre_layernorm\.", "norm_pre."),
    (r"attention\.([qk])_norm\.", r"attn.\1_norm."),
    (r"^pooler\.o_proj\.", "attn_pool.proj."),
    (r"^pooler\.", "attn_pool."),
]


def timm_state_dict(state_dict: dict[str, torch.Tensor], final_norm: str) -> dict[str, torch.Tensor]:
    """A ViTReg classifier's state dict under the names of timm's VisionTransformer."""
    renamed = dinov2_state_dict({name.removeprefix("vitreg."): tensor for name, tensor in state_dict.items()})
    for pattern, replacement in [*TIMM_NAMES, *([(r"^norm\.", "fc_norm.")] if final_norm == "pooled" else [])]:
        renamed = {re.sub(pattern, replacement, name): tensor for name, tensor in renamed.items()}
    # the query of timm's attention pooling is apart from its keys and values
    for name in [name for name in renamed if name.startswith("attn_pool.qkv.")]:
        query, key, value = renamed.pop(name).chunk(3)
        renamed |= {name.replace("qkv", "q"): query, name.replace("qkv", "kv"): torch.cat([key, value])}
    return renamed


TRANSFORMERS_DINOV3_NAMES = [
    (r"^encoder\.layer\.", "model.layer."),
    (r"^layernorm\.", "norm."),
    (r"patch_embeddings\.projection\.", "patch_embeddings."),
    (r"residual(\d)\.", r"layer_scale\1."),
    (r"mlp\.fc1\.", "mlp.up_proj."),
    (r"mlp\.fc2\.", "mlp.down_proj."),
]


def transformers_dinov3_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ViTReg state dict under the names of transformers' DINOv3, which computes its periods and stores none."""
    renamed = {name: tensor for name, tensor in state_dict.items() if "rotary_embeddings" not in name}
    for pattern, replacement in TRANSFORMERS_DINOV3_NAMES:
        renamed = {re.sub(pattern, replacement, name): tensor for name, tensor in renamed.items()}
    mask_token = renamed["embeddings.mask_token"][None]
    # theirs has registers even where they are none
    return {"embeddings.register_tokens": mask_token[:, :0], **renamed, "embeddings.mask_token": mask_token}


TRANSFORMERS_DEIT_NAMES = [
    (r"^vitreg\.encoder\.layer\.", "deit.layers."),
    (r"^vitreg\.", "deit."),
    (r"norm1\.", "layernorm_before."),
    (r"norm2\.", "layernorm_after."),
    (r"^classifier\.", "cls_classifier."),
]


def transformers_deit_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ViTReg classifier's state dict under the names of transformers' DeiT with a teacher."""
    for pattern, replacement in TRANSFORMERS_DEIT_NAMES:
        state_dict = {re.sub(pattern, replacement, name): tensor for name, tensor in state_dict.items()}
    return state_dict


ORIGINAL_DINOV3_NAMES = [
    (r"^(cls_token|mask_token)", r"embeddings.\1"),
    (r"^storage_tokens", "embeddings.register_tokens"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^rope_embed\.", "encoder.rotary_embeddings."),
    (r"^blocks\.", "encoder.layer."),
    (r"^norm\.", "layernorm."),
    (r"^cls_norm\.", "prefix_layernorm."),
    (r"attn\.proj\.", "attention.o_proj."),
    (r"attn\.([qkv])_proj\.", r"attention.\1_proj."),
    (r"ls(\d)\.gamma", r"residual\1.lambda1"),
    (r"mlp\.w1\.", "mlp.gate_proj."),
    (r"mlp\.w2\.", "mlp.up_proj."),
    (r"mlp\.w3\.", "mlp.down_proj."),
]


def from_original_dinov3(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the original DINOv3 under our names.

    Left behind: the norm of local crops, which only training uses, and the bias of the keys with the mask that
    silences it.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        if ".qkv.weight" in name or name.endswith(".qkv.bias"):
            parts = dict(zip("qkv", tensor.chunk(3)))
            parts = parts if name.endswith("weight") else {"q": parts["q"], "v": parts["v"]}
            renamed |= {name.replace("qkv", f"{part}_proj"): chunk.clone() for part, chunk in parts.items()}
        elif not name.startswith("local_cls_norm.") and not name.endswith(".bias_mask"):
            renamed[name] = tensor
    for pattern, replacement in ORIGINAL_DINOV3_NAMES:
        renamed = {re.sub(pattern, replacement, name): tensor for name, tensor in renamed.items()}
    return renamed
