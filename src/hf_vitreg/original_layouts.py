# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""`from_pretrained` on a folder that has a ViTReg config, and weights as DINO, DINOv2, DINOv3, DeiT or DeiT-III were
published.

What is saved has ViTReg's names again. The names of these layouts do not collide, so that one table serves them all,
and it changes none of ViTReg's own.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming


class OneWayRenaming(WeightRenaming):
    """Renames what is loaded, and nothing that is saved.

    transformers would write the source's names back, and for every model that a ViTReg is a part of. Where this table
    is not registered, as with remote code, such weights load as random ones without an error.
    """

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return _no_change()


class OneWayConverter(WeightConverter):
    """The same for tensors that are split, joined or dropped."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return _no_change()


def _no_change() -> WeightRenaming:
    # fits no name
    return WeightRenaming(r"(?!)", "")


class SplitMaskedBias(ConversionOps):
    """The biases of queries, keys and values. DINOv3 has a mask beside them, which makes that of the keys zero.

    A model without `key_bias` does not get it then. Without a mask it is reported as unexpected, because it counts.
    """

    supports_many_to_many = True

    @torch.no_grad()
    def convert(
        self,
        input_dict: Mapping[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        model: nn.Module,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        bias, mask = (input_dict.get(pattern, [None])[0] for pattern in source_patterns)
        if bias is None:
            raise ValueError("bias_mask has no bias beside it that it could mask.")
        if mask is not None and mask.isnan().any():
            raise ValueError("bias_mask is not a number: the model was saved before it was initialized.")
        parts = dict(zip(target_patterns, (bias if mask is None else bias * mask).chunk(3)))
        query, key, _ = target_patterns
        k_proj = model.get_submodule(full_layer_name.replace(query, key).rpartition(".")[0])
        if mask is not None and k_proj.bias is None and not parts[key].any():
            del parts[key]
        return parts


class KeepFirst(ConversionOps):
    """The first of several tensors. The others are used in training only."""

    def convert(
        self,
        input_dict: Mapping[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        return {target_patterns[0]: input_dict[source_patterns[0]][0]}


RENAMINGS = {
    "^cls_token": "embeddings.cls_token",
    "^dist_token": "embeddings.distillation_token",
    "^register_tokens": "embeddings.register_tokens",
    "^storage_tokens": "embeddings.register_tokens",
    "^mask_token": "embeddings.mask_token",
    "^pos_embed": "embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^rope_embed\.periods": "encoder.rotary_embeddings.periods",
    r"^cls_norm\.": "prefix_layernorm.",
    r"^head\.": "classifier.",
    r"^head_dist\.": "distillation_classifier.",
    r"^blocks\.": "encoder.layer.",
    # of what follows ViTReg has no name either
    r"\.attn\.proj\.": ".attention.o_proj.",
    r"\.(?:ls1\.gamma|gamma_1)": ".residual1.lambda1",
    r"\.(?:ls2\.gamma|gamma_2)": ".residual2.lambda1",
    r"\.mlp\.w1\.": ".mlp.gate_proj.",
    r"\.mlp\.w2\.": ".mlp.up_proj.",
    r"\.mlp\.w3\.": ".mlp.down_proj.",
}


def _converters() -> list[OneWayConverter]:
    attention = [f".attention.{part}_proj" for part in "qkv"]
    converters = [
        OneWayConverter(r"\.attn\.qkv\.weight", [f"{name}.weight" for name in attention], [Chunk(dim=0)]),
        OneWayConverter(
            [r"\.attn\.qkv\.bias", r"\.attn\.qkv\.bias_mask"],
            [f"{name}.bias" for name in attention],
            [SplitMaskedBias()],
        ),
    ]
    for param in ("weight", "bias"):
        gate_and_up = [f".mlp.gate_proj.{param}", f".mlp.up_proj.{param}"]
        converters.append(OneWayConverter(rf"\.mlp\.w12\.{param}", gate_and_up, [Chunk(dim=0)]))
        # DINOv3's norm of local crops
        norms = [rf"^norm\.{param}", rf"^local_cls_norm\.{param}"]
        converters.append(OneWayConverter(norms, f"layernorm.{param}", [KeepFirst()]))
    return converters


def register_original_layouts() -> None:
    """Lets every ViTReg class load these layouts, also inside a model of another kind."""
    renamings = [OneWayRenaming(old, new) for old, new in RENAMINGS.items()]
    register_checkpoint_conversion_mapping("vitreg", [*renamings, *_converters()], overwrite=True)
