# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A ViTReg as a checkpoint of the original DINOv2: for its own code, and for everything that reads its files.

Names and shapes are those of dinov2/models/vision_transformer.py in https://github.com/facebookresearch/dinov2, with
projection heads those of a teacher checkpoint (dinov2/train/train.py).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from conversion.dinov2 import RULES
from conversion.exporting import Written, check_is_dinov2, check_same_weights, own_state
from conversion.family import ConversionError
from conversion.parity import comparison_sizes, vitreg_outputs
from conversion.renaming import fill, restore
from conversion.timm_reference import TimmReference, require_timm
from conversion.vit_layout import WEIGHT_NORM, read_backbone
from conversion.vitreg_folder import OpenModel, open_model
from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.hub.export import PRETRAINING_HEADS


LAYER_NORM_EPS = 1e-6  # fixed in the original
MASK_TOKEN = "mask_token"
CLASSIFIER = "classifier."


def write(model: str, file: Path, with_heads: bool = False) -> Written:
    """Writes a state dict, and reads it back.

    Args:
        model: The folder of a ViTReg model, or its name on the Hub.
        file: To write.
        with_heads: Whether to write a teacher checkpoint, with the projection heads that lie beside the model.

    Raises:
        ConversionError: where this is no ViTReg model, or has no heads that are asked for; and where the original
            cannot hold it, or would compute something else.
    """
    require_timm()
    given = open_model(model)
    check_is_dinov2(given.config, "the original DINOv2", _reasons(given.config))
    heads = _heads(model) if with_heads else {}
    _write(given, heads, file)
    left_aside = _classifier(given)
    if not with_heads and (Path(model) / PRETRAINING_HEADS).is_file():
        left_aside.append(PRETRAINING_HEADS)
    return _read_back(given, heads, file, left_aside)


def _reasons(config: ViTRegConfig) -> list[str]:
    """What the original fixes and transformers does not."""
    reasons = []
    if config.layer_norm_eps != LAYER_NORM_EPS:
        reasons.append(f"layer_norm_eps={config.layer_norm_eps}: in the original DINOv2 it is {LAYER_NORM_EPS}")
    if config.hidden_act != "gelu" and not config.use_swiglu_ffn:
        reasons.append(f"hidden_act={config.hidden_act!r}: in the original DINOv2 it is 'gelu'")
    if config.use_swiglu_ffn and config.intermediate_size % 8:
        reasons.append(
            f"intermediate_size={config.intermediate_size}: in the original DINOv2 that of SwiGLU is a multiple of 8"
        )
    return reasons


def _backbone(given: OpenModel) -> Mapping[str, torch.Tensor]:
    """Its tensors, each read when it is asked for."""
    return given.tensors.without(*_classifier(given))


def _classifier(given: OpenModel) -> list[str]:
    return [name for name in given.tensors if name.startswith(CLASSIFIER)]


def _write(given: OpenModel, heads: Mapping[str, torch.Tensor], file: Path):
    tensors = restore(_backbone(given), RULES)
    tensors.setdefault(MASK_TOKEN, torch.zeros_like(tensors["cls_token"][0]))
    if heads:
        spelled = {new: old for old, new in WEIGHT_NORM.items()}
        teacher = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
        for name, tensor in heads.items():
            head, rest = name.split(".", 1)
            teacher[f"{head}.{spelled.get(rest, rest)}"] = tensor
        tensors = {"teacher": teacher}
    torch.save(tensors, file)


def _heads(model: str) -> dict[str, torch.Tensor]:
    path = Path(model) / PRETRAINING_HEADS
    try:
        path = path if Path(model).is_dir() else Path(hf_hub_download(model, PRETRAINING_HEADS))
        return load_file(path)
    except OSError as error:
        raise ConversionError(
            f"{model} has no {PRETRAINING_HEADS}: its projection heads were not kept. Leave --with-heads out."
        ) from error


def _read_back(given: OpenModel, heads: Mapping[str, torch.Tensor], file: Path, left_aside: list[str]) -> Written:
    """The given model and timm's, both with the weights that are on the disk now."""
    config = given.config
    backbone = read_backbone(file)
    check_same_weights(backbone.heads, heads)
    own = dict(backbone.tensors)
    if not config.use_mask_token:
        del own[MASK_TOKEN]
    model = fill(ViTRegModel, config, own, RULES)
    check_same_weights(own_state(model), _backbone(given))
    reference = TimmReference(config, backbone.tensors, {})
    return Written(
        what="a teacher checkpoint of DINOv2" if heads else "a state dict of DINOv2",
        implementation=vitreg_outputs(model),
        reference=reference,
        reference_name=reference.name,
        sizes=comparison_sizes(config),
        num_channels=config.num_channels,
        num_tensors=len(backbone.tensors) + len(backbone.heads),
        left_aside=left_aside,
        remarks=_remarks(config),
    )


def _remarks(config: ViTRegConfig) -> list[str]:
    arguments = {
        "img_size": config.grid_size[0] * config.patch_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": _mlp_ratio(config),
        "qkv_bias": config.qkv_bias,
        "init_values": float(config.layerscale_value),
        "ffn_layer": "swiglufused" if config.use_swiglu_ffn else "mlp",
        "block_chunks": 0,
        "num_register_tokens": config.num_register_tokens,
        "interpolate_antialias": config.interpolate_antialias,
        "interpolate_offset": float(config.interpolate_offset),
    }
    written_out = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    remarks = [f"It is for dinov2.models.vision_transformer.DinoVisionTransformer({written_out})."]
    if not config.use_mask_token:
        remarks.insert(
            0,
            f"The model has no mask token, without which the original cannot be: {MASK_TOKEN} is written as zeros. "
            "Images must not be masked with it.",
        )
    return remarks


def _mlp_ratio(config: ViTRegConfig) -> float:
    """From which the original computes the width of the MLP; of SwiGLU it takes two thirds, rounded up."""
    width = 1.5 * config.intermediate_size if config.use_swiglu_ffn else config.intermediate_size
    ratio = width / config.hidden_size
    # the product is cut, and rounding may have made it smaller
    return ratio if int(config.hidden_size * ratio) == width else (width + 0.5) / config.hidden_size
