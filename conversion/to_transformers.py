# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A ViTReg as transformers' own DINOv2, with registers or without, which loads without `trust_remote_code`.

Names are those that `save_pretrained` of `Dinov2WithRegistersModel` and `Dinov2Model` writes, which every version of
transformers with these models reads.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2WithRegistersConfig, PreTrainedConfig, PreTrainedModel

from conversion.exporting import Written, check_is_dinov2, check_same_weights, own_state
from conversion.parity import comparison_sizes, vitreg_outputs
from conversion.renaming import fill, restore
from conversion.transformers_hub import Source
from conversion.transformers_layouts import DINOV2_RULES, LAYOUTS
from conversion.transformers_models import own_tensors, read_config, read_tensors, reference_of
from conversion.vitreg_folder import OpenModel, local_folder, open_model, short_card
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification
from hf_vitreg.hub.export import CARD, CONFIG, WEIGHTS


MAX_MLP_RATIO = 64
MASK_TOKEN = "embeddings.mask_token"
KEPT = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "patch_size",
    "num_channels",
    "qkv_bias",
    "drop_path_rate",
    "use_swiglu_ffn",
    "apply_layernorm",
    "reshape_hidden_states",
    "out_indices",
    "id2label",
    "label2id",
    "problem_type",
)


def write(model: str, folder: Path) -> Written:
    """Writes config, weights and image processor, and reads them back.

    Args:
        model: The folder of a ViTReg model, or its name on the Hub.
        folder: To write in.

    Raises:
        ConversionError: where this is no ViTReg model, and where transformers' DINOv2 cannot hold it, or would compute
            something else.
    """
    given = open_model(model)
    config = their_config(given.config, given.model_class)
    _write_config(given, config, folder)
    _write_weights(given, config, folder)
    if given.image_processor is not None:
        given.image_processor.save_pretrained(folder)
    source = local_folder(model)
    if card := short_card(source, f"`{config.architectures[0]}` of transformers, written from a ViTReg model."):
        card.save(folder / CARD)
    return _read_back(given, folder)


def their_config(config: ViTRegConfig, model_class: type[PreTrainedModel]) -> Dinov2Config | Dinov2WithRegistersConfig:
    """The same model as transformers describes it.

    Raises:
        ConversionError: where it has no words for it.
    """
    has_registers = config.num_register_tokens > 0
    layout = LAYOUTS["dinov2_with_registers" if has_registers else "dinov2"]
    mlp_ratio = _mlp_ratio(config)
    reasons = []
    if model_class is ViTRegForImageClassification and config.classifier_layout != "cls_mean":
        reasons.append(
            f"classifier_layout={config.classifier_layout!r}: in transformers the classifier reads CLS and the mean "
            "of the patches. To write the backbone alone, save it alone first: "
            "ViTRegModel.from_pretrained(folder).save_pretrained(other)"
        )
    if config.interpolate_antialias != has_registers:
        does = "antialiases" if has_registers else "does not antialias"
        reasons.append(
            f"interpolate_antialias={config.interpolate_antialias}: {layout.title} in transformers {does} position "
            "embeddings"
        )
    if has_registers and config.interpolate_offset != 0:
        reasons.append(
            f"interpolate_offset={config.interpolate_offset}: {layout.title} in transformers interpolates position "
            "embeddings to a size"
        )
    if mlp_ratio is None:
        rounded = ", of which two thirds are taken and rounded up to a multiple of 8" * config.use_swiglu_ffn
        reasons.append(
            f"intermediate_size={config.intermediate_size}: in transformers it is an integer times hidden_size "
            f"({config.hidden_size}){rounded}"
        )
    check_is_dinov2(config, f"{layout.title} in transformers", reasons)
    fields = {name: getattr(config, name) for name in KEPT}
    if has_registers:
        fields["num_register_tokens"] = config.num_register_tokens
    return layout.config_class(
        **fields,
        mlp_ratio=mlp_ratio,
        image_size=config.grid_size[0] * config.patch_size,
        layerscale_value=float(config.layerscale_value),
    )


def _mlp_ratio(config: ViTRegConfig) -> int | None:
    """The integer that transformers computes the width of the MLP from, `None` where none gives it."""
    for ratio in range(1, MAX_MLP_RATIO + 1):
        width = ratio * config.hidden_size
        if config.use_swiglu_ffn:
            width = (int(width * 2 / 3) + 7) // 8 * 8
        if width == config.intermediate_size:
            return ratio
    return None


def _model_class(given: OpenModel, config: PreTrainedConfig) -> tuple[str, type[PreTrainedModel]]:
    """transformers' class, and its head."""
    head = "classifier" if given.model_class is ViTRegForImageClassification else ""
    return head, LAYOUTS[config.model_type].models[head]


def _write_config(given: OpenModel, config: PreTrainedConfig, folder: Path):
    config.architectures = [_model_class(given, config)[1].__name__]
    config.dtype = _dtype(given)
    config.save_pretrained(folder)


def _write_weights(given: OpenModel, config: PreTrainedConfig, folder: Path):
    head, _ = _model_class(given, config)
    prefix = LAYOUTS[config.model_type].prefix(head)
    tensors = restore(given.tensors, DINOV2_RULES)
    tensors.setdefault(MASK_TOKEN, torch.zeros(1, config.hidden_size, dtype=_dtype(given)))
    tensors = {name if head and name.startswith(head) else prefix + name: each for name, each in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors writes what only its owner may read


def _dtype(given: OpenModel) -> torch.dtype:
    return given.tensors["embeddings.cls_token"].dtype


def _read_back(given: OpenModel, folder: Path) -> Written:
    """The given model and transformers', both with the weights that are on the disk now."""
    source = Source(folder, None)
    layout, config = read_config(source)
    _, tensors, _ = read_tensors(source.weight_files(), layout)
    own = own_tensors(tensors, given.config)
    if not given.config.use_mask_token:
        del own[MASK_TOKEN]
    model = fill(given.model_class, given.config, own, DINOV2_RULES)
    check_same_weights(own_state(model), given.tensors)
    reference = reference_of(layout, config, tensors)
    side = given.config.grid_size[0] * given.config.patch_size
    return Written(
        what=f"{type(reference.model).__name__} of transformers",
        implementation=vitreg_outputs(model),
        reference=reference,
        reference_name=reference.name,
        sizes=comparison_sizes(given.config) if given.config.interpolate_offset == 0 else [(side, side)],
        num_channels=given.config.num_channels,
        num_tensors=len(tensors),
        remarks=_remarks(given, side),
    )


def _remarks(given: OpenModel, side: int) -> list[str]:
    """What the other layout has and this model has not, and the other way round."""
    config = given.config
    remarks = {
        f"The model has no mask token, which transformers always reads: {MASK_TOKEN} is written as zeros. Images must "
        "not be masked with it.": not config.use_mask_token,
        f"The outputs are the same at {side}x{side} pixels only, where they were compared: at other sizes "
        f"transformers' DINOv2 without registers interpolates position embeddings to a size, and this model, like the "
        f"original, by scale factors with an offset (interpolate_offset={config.interpolate_offset}). ViTReg and the "
        "original layout (to-dinov2) hold it exactly.": config.interpolate_offset != 0,
        "drop_path_schedule='linear' is not kept: in training transformers drops all layers with drop_path_rate="
        f"{config.drop_path_rate}.": config.drop_path_schedule == "linear" and config.drop_path_rate > 0,
        "The model has no image processor, so none is written.": given.image_processor is None,
    }
    return [remark for remark, applies in remarks.items() if applies]
