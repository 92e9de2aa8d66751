# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Where other people's ViTs keep their parts: families of ViTReg, transformers and timm, known by their classes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Layout:
    """Where a class of models keeps its parts, and whether it must be asked to resize its position embeddings.

    The norm before the first layer is there where somebody else's model may have one.
    """

    layers: str
    attention: str
    patch_embeddings: str
    final_norm: str
    asks_to_resize: bool = False
    pre_norm: str | None = None


_VITREG = Layout("encoder.layer", "attention", "embeddings.patch_embeddings", "layernorm")
_DINOV3 = replace(_VITREG, layers="model.layer", final_norm="norm")
_VIT = replace(_VITREG, layers="layers", asks_to_resize=True)
_SIGLIP = Layout("encoder.layers", "self_attn", "embeddings.patch_embedding", "post_layernorm", asks_to_resize=True)
_CLIP = replace(_SIGLIP, pre_norm="pre_layrnorm")
_TIMM = Layout("blocks", "attn", "patch_embed", "norm", pre_norm="norm_pre")
# By package and class, so that no family is imported to find another. A class of the same name elsewhere, as
# torchvision's VisionTransformer, is another model.
LAYOUTS = {
    "hf_vitreg.ViTRegModel": _VITREG,
    "transformers_modules.ViTRegModel": _VITREG,
    "transformers.ViTModel": _VIT,
    "transformers.ViTMSNModel": _VIT,
    "transformers.IJepaModel": _VIT,
    "transformers.DeiTModel": _VIT,
    "transformers.Dinov2Model": _VITREG,
    "transformers.Dinov2WithRegistersModel": _VITREG,
    "transformers.DINOv3ViTModel": _DINOV3,
    "transformers.CLIPVisionModel": _CLIP,
    "transformers.SiglipVisionModel": _SIGLIP,
    "timm.VisionTransformer": _TIMM,
    "timm.Eva": _TIMM,
}
MODEL_TYPES = ["vitreg", "vit", "vit_msn", "ijepa", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit"]
MODEL_TYPES += ["clip", "clip_vision_model", "siglip", "siglip_vision_model"]
_WITHOUT_CLS = {"ijepa", "siglip_vision_model"}
SUPPORTED = (
    f"There are ViTReg, the ViTs of transformers ({', '.join(MODEL_TYPES[1:])}), these inside a "
    "vision-text-dual-encoder, and timm's VisionTransformer and Eva. Each of their layers sees the same tokens; "
    "models with windows, stages or convolutions have none to follow."
)


def layout_name(module: nn.Module) -> str | None:
    """The key of a module in `LAYOUTS`, where it or what it derives from is there."""
    names = (f"{each.__module__.split('.')[0]}.{each.__name__}" for each in type(module).__mro__)
    return next((name for name in names if name in LAYOUTS), None)


def sizes_of_transformers(config: PreTrainedConfig) -> dict[str, Any]:
    """Attributes of a `VisionEncoder`."""
    has_cls = getattr(config, "use_cls_token", config.model_type not in _WITHOUT_CLS)
    num_registers = getattr(config, "num_register_tokens", 0)
    num_prefix_tokens = has_cls + (config.model_type == "deit") + num_registers
    return {
        "source": config.model_type if config.model_type == "vitreg" else f"transformers {config.model_type}",
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "hidden_size": config.hidden_size,
        "has_cls": has_cls,
        "num_registers": num_registers,
        "num_prefix_tokens": getattr(config, "num_prefix_tokens", num_prefix_tokens),
        **_pixels(config.image_size, config.patch_size),
    }


def sizes_of_timm(model: nn.Module) -> dict[str, Any]:
    """Attributes of a `VisionEncoder`. Raises `ValueError` where patches are not made by a linear map."""
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture", type(model).__name__)
    if type(model.patch_embed).__name__ != "PatchEmbed":
        found = type(model.patch_embed).__name__
        raise ValueError(f"{architecture} makes its patches by a {found}, not by a linear map. {SUPPORTED}")
    return {
        "source": f"timm {architecture}",
        "num_layers": len(model.blocks),
        "num_heads": next(module.num_heads for module in model.blocks.modules() if hasattr(module, "num_heads")),
        "hidden_size": model.embed_dim,
        "has_cls": model.cls_token is not None,
        "num_registers": 0 if model.reg_token is None else model.reg_token.shape[1],
        "num_prefix_tokens": model.num_prefix_tokens,
        **_pixels(model.patch_embed.img_size, model.patch_embed.patch_size),
    }


def _pixels(image_size: int | Sequence[int], patch_size: int | Sequence[int]) -> dict[str, Any]:
    """Both as they are used here. Pixels that fill no patch, as of SigLIP's 384 with patches of 14, are left out."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    patch_height, patch_width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if patch_height != patch_width:
        raise ValueError(f"Patches must be square, got {patch_height}x{patch_width} pixels.")
    whole = (height - height % patch_height, width - width % patch_width)
    return {"image_size": whole, "patch_size": patch_height}


def show_patches(on_patches: Callable, module: nn.Module, args: tuple, patches: torch.Tensor) -> None:
    """Patches come as a sequence, as the map of a convolution, or from timm as rows and columns."""
    if patches.ndim == 4:
        patches = patches.flatten(2).mT if isinstance(module, nn.Conv2d) else patches.flatten(1, 2)
    on_patches(patches)


def show_output(on_layer: Callable, index: int, module: nn.Module, args: tuple, tokens: torch.Tensor) -> None:
    on_layer(index, tokens)


@contextmanager
def through_sdpa(model: nn.Module) -> Iterator[None]:
    """Whatever its attention is implemented by, here it is torch's scaled_dot_product_attention."""
    settings = []
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            settings.append((module.config, "_attn_implementation", "sdpa"))
        elif hasattr(module, "fused_attn"):
            settings.append((module, "fused_attn", True))
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before):
            setattr(owner, name, value)


class AttentionObserver(TorchFunctionMode):
    """Keeps queries, keys and scale of scaled_dot_product_attention until their layer ends, then shows them.

    There they are as they meet, whatever norms and rotations a family has.
    """

    def __init__(self, layers: nn.Module, show: Callable[[int, torch.Tensor, torch.Tensor, float], None]):
        super().__init__()
        self.layers, self.show, self.calls, self.hooks = layers, show, [], []

    def __enter__(self):
        self.hooks = [
            layer.register_forward_hook(partial(self._layer_ends, index)) for index, layer in enumerate(self.layers)
        ]
        return super().__enter__()

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*exception)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            query, key = args[:2]
            self.calls.append((query, key, kwargs.get("scale") or query.shape[-1] ** -0.5))
        return function(*args, **kwargs)

    def _layer_ends(self, index: int, layer: nn.Module, args: tuple, tokens: torch.Tensor) -> None:
        calls, self.calls = self.calls, []
        if len(calls) != 1:
            raise ValueError(
                f"Layer {index}, a {type(layer).__name__}, computes attention {len(calls)} times; only a layer that "
                "does so once has attention maps."
            )
        self.show(index, *calls[0])


def projected(attention: nn.Module, facet: str, hidden_states: torch.Tensor) -> torch.Tensor:
    """Queries, keys or values as they leave their projection, `(batch_size, tokens, hidden_size)` like the input."""
    if getattr(attention, "qkv", None) is None:
        return getattr(attention, f"{facet[0]}_proj")(hidden_states)
    part = ("query", "key", "value").index(facet)
    projected = attention.qkv(hidden_states).chunk(3, dim=-1)[part]
    # timm's EVA keeps the biases beside the projection
    bias = getattr(attention, f"{facet[0]}_bias", None)
    return projected if bias is None else projected + bias
