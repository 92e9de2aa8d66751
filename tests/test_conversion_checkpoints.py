# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Random DINOv2 checkpoints in the layouts of the original repository, for the other conversion tests."""

import pytest
import torch

import hf_vitreg
from conversion.dinov2 import ARCHITECTURES, RULES
from conversion.renaming import rename


# distinct, so that no axis can stand for another: 64 wide, 5x5 patches, 3 registers, 88 in the MLP, 4 layers
TINY = {"hidden_size": 64, "num_layers": 4, "intermediate_size": 88, "side": 5, "num_registers": 3}


def original_checkpoint(
    hidden_size: int,
    num_layers: int,
    intermediate_size: int,
    side: int = 37,
    num_registers: int = 0,
    swiglu: bool = False,
    patch_size: int = 14,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """A flat state dict, its values scaled so that activations keep their size through the layers."""
    generator = torch.Generator().manual_seed(hidden_size + num_layers) if device == "cpu" else None

    def weight(*shape, std=None, mean=0.0):
        fan_in = torch.Size(shape[1:]).numel()
        return torch.randn(shape, generator=generator, device=device).mul_(std or fan_in**-0.5).add_(mean)

    def linear(name, out_features, in_features):
        return {f"{name}.weight": weight(out_features, in_features), f"{name}.bias": weight(out_features, std=0.1)}

    def norm(name):
        return {f"{name}.weight": weight(hidden_size, std=0.1, mean=1.0), f"{name}.bias": weight(hidden_size, std=0.1)}

    def mlp(name):
        if swiglu:
            return linear(f"{name}.w12", 2 * intermediate_size, hidden_size) | linear(
                f"{name}.w3", hidden_size, intermediate_size
            )
        return linear(f"{name}.fc1", intermediate_size, hidden_size) | linear(
            f"{name}.fc2", hidden_size, intermediate_size
        )

    tensors = {
        "cls_token": weight(1, 1, hidden_size, std=0.5),
        "pos_embed": weight(1, side * side + 1, hidden_size, std=0.5),
        "mask_token": weight(1, hidden_size, std=0.5),
        "patch_embed.proj.weight": weight(hidden_size, 3, patch_size, patch_size),
        "patch_embed.proj.bias": weight(hidden_size, std=0.1),
    }
    if num_registers:
        tensors["register_tokens"] = weight(1, num_registers, hidden_size, std=0.5)
    for layer in range(num_layers):
        block = f"blocks.{layer}"
        tensors |= norm(f"{block}.norm1") | linear(f"{block}.attn.qkv", 3 * hidden_size, hidden_size)
        tensors |= linear(f"{block}.attn.proj", hidden_size, hidden_size)
        tensors |= {f"{block}.ls1.gamma": weight(hidden_size, std=0.1, mean=1.0)}
        tensors |= norm(f"{block}.norm2") | mlp(f"{block}.mlp")
        tensors |= {f"{block}.ls2.gamma": weight(hidden_size, std=0.1, mean=1.0)}
    return tensors | norm("norm")


def published_checkpoint(name: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A checkpoint in the size of a published architecture."""
    arch = ARCHITECTURES[name]
    return original_checkpoint(
        hidden_size=arch.hidden_size,
        num_layers=arch.num_hidden_layers,
        intermediate_size=arch.intermediate_size,
        num_registers=arch.num_register_tokens,
        swiglu=arch.use_swiglu_ffn,
        device=device,
    )


def linear_head(num_labels: int, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_labels)
    return {
        "weight": torch.randn(num_labels, width, generator=generator) * width**-0.5,
        "bias": torch.randn(num_labels, generator=generator),
    }


def in_chunks(tensors: dict[str, torch.Tensor], layers_in_chunk: int) -> dict[str, torch.Tensor]:
    """As sharded training names the layers: the number of the chunk first, then that of the layer in the model."""

    def chunked(name: str) -> str:
        if not name.startswith("blocks."):
            return name
        _, layer, rest = name.split(".", 2)
        return f"blocks.{int(layer) // layers_in_chunk}.{layer}.{rest}"

    return {chunked(name): tensor for name, tensor in tensors.items()}


def training_part(tensors: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Backbone and projection heads of a teacher or a student, weight-normalized as in training."""
    heads = {
        f"{prefix}{head}.{name}": torch.randn(3, 7)
        for head in ("dino_head", "ibot_head")
        for name in ("mlp.0.weight", "mlp.0.bias", "last_layer.weight_g", "last_layer.weight_v")
    }
    return {f"{prefix}backbone.{name}": tensor for name, tensor in tensors.items()} | heads


# Counted with dinov2/models/vision_transformer.py on the meta device: tensors and parameters.
PUBLISHED_COUNTS = {
    "vits14": (175, 22_056_576),
    "vits14_reg4": (176, 22_058_112),
    "vitb14": (175, 86_580_480),
    "vitb14_reg4": (176, 86_583_552),
    "vitl14": (343, 304_368_640),
    "vitl14_reg4": (344, 304_372_736),
    "vitg14": (567, 1_136_480_768),
    "vitg14_reg4": (568, 1_136_486_912),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_published_sizes_are_those_of_the_original_and_every_tensor_has_a_place(name):
    tensors = published_checkpoint(name, device="meta")
    assert (len(tensors), sum(tensor.numel() for tensor in tensors.values())) == PUBLISHED_COUNTS[name]
    arch = ARCHITECTURES[name]
    config = hf_vitreg.ViTRegConfig(
        hidden_size=arch.hidden_size,
        num_hidden_layers=arch.num_hidden_layers,
        num_attention_heads=arch.hidden_size // 64,
        use_swiglu_ffn=arch.use_swiglu_ffn,
        num_register_tokens=arch.num_register_tokens,
        image_size=518,
        use_mask_token=True,
    )
    # from the ratio of 4 by the rules of the original
    assert config.intermediate_size == arch.intermediate_size
    with torch.device("meta"):
        targets = {name: tensor.shape for name, tensor in hf_vitreg.ViTRegModel(config).state_dict().items()}
    assert rename(tensors, RULES, targets).keys() == targets.keys()
