# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What conversions from ViTReg to other layouts share: what they refuse, and how they look at what they wrote."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from conversion.family import ConversionError, Outputs
from conversion.renaming import shown
from hf_vitreg import ViTRegConfig


@dataclass(frozen=True)
class Written:
    """A model in another layout, as it was read back from the disk.

    Attributes:
        what: In a few words.
        implementation: The model that was given, with the weights that were written. See `parity.compare`.
        reference: An implementation of the other layout that nobody here wrote, with the same weights.
        reference_name: Its name and version.
        sizes: Height and width in pixels of the images to compare on.
        num_channels: Of these.
        num_tensors: How many were written.
        left_aside: What of the model was not written.
        remarks: Sentences that the user must read.
    """

    what: str
    implementation: Callable[[torch.Tensor], Outputs]
    reference: Callable[[torch.Tensor], Outputs]
    reference_name: str
    sizes: list[tuple[int, int]]
    num_channels: int
    num_tensors: int
    left_aside: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


# What every DINOv2 is, by the options of `ViTRegConfig`: what is allowed, and why others are not.
DINOV2_HAS = {
    "use_cls_token": (True, "there is a CLS token"),
    "use_distillation_token": (False, "there is no distillation token"),
    "position_embedding_type": ("cls_patches", "CLS and the patches have learned positions, and no other token"),
    "use_pre_layernorm": (False, "nothing is normed before the first layer"),
    "final_norm": ("tokens", "one norm is applied to all tokens after the last layer"),
    "pooler_type": ("cls", "the pooled output is CLS"),
    "patch_bias": (True, "the patch embedding has a bias"),
    "proj_bias": (True, "the projection of the attention has a bias"),
    "mlp_bias": (True, "the MLP has biases"),
    "use_qk_norm": (False, "queries and keys are not normed"),
    "projection_dim": (None, "nothing is projected"),
    "num_test_time_registers": (0, "every register is trained, and no neuron is shifted to one"),
}


def check_is_dinov2(config: ViTRegConfig, layout: str, more_reasons: Collection[str] = ()):
    """Raises `ConversionError` with all reasons why the layout could not hold the model, or would compute otherwise.

    Args:
        config: Of the model.
        layout: The other layout, as people write it.
        more_reasons: What beside these is in the way.
    """
    reasons = [
        f"{name}={getattr(config, name)!r}: in {layout} {rule}"
        for name, (allowed, rule) in DINOV2_HAS.items()
        if getattr(config, name) != allowed
    ]
    if config.qkv_bias and not config.key_bias:
        reasons.append(f"key_bias=False: in {layout} queries, keys and values all have a bias or none has")
    if config.layerscale_value is None:
        # ones would compute the same, and train
        reasons.append(f"layerscale_value=None: {layout} has LayerScale, whose parameters this model has not")
    rows, cols = config.grid_size
    if rows != cols:
        reasons.append(
            f"image_size={config.image_size}: {layout} takes position embeddings for those of a square grid"
        )
    if reasons := [*reasons, *more_reasons]:
        raise ConversionError(f"The model cannot be written as {layout}.\n  " + "\n  ".join(reasons))


def check_same_weights(written: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]):
    """Raises `ConversionError` where what was read back is not what was given, to the last bit."""
    different = [
        name
        for name in sorted(written.keys() | given.keys())
        if name not in written or name not in given or not _same_bits(written[name], given[name])
    ]
    if different:
        raise ConversionError(f"What was written is not what was given: {shown(different)}. Is the disk sound?")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """NaN is no number, but it has bits."""
    one, other = one.contiguous(), other.contiguous()
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    )


def own_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of a model under the names of the families' rules."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}
