# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The model that a pretraining recipe asks for: a new one, or a checkpoint, with registers either way."""

import dataclasses

import torch
from transformers import AutoConfig, AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from ..configuration_vitreg import ViTRegConfig
from ..data.transforms import new_image_processor, resized_image_processor
from ..modeling_vitreg import ViTRegForImageClassification, ViTRegModel
from ..pretrain_recipe import PretrainModelOptions, PretrainRecipe
from ..registers.warm_start import add_registers


NEW_MODEL_REGISTERS = 4
NEW_MODEL_ONLY = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "layerscale_value",
    "use_swiglu_ffn",
    "position_embedding_type",
)
# of a checkpoint these may be new
NEW_PARTS = ("mask_token", "classifier.", "distillation_classifier.", "distillation_token", "projection.")


def image_processor(recipe: PretrainRecipe) -> BaseImageProcessor:
    """What images go through at evaluation: the checkpoint's, at the recipe's size, or a new one."""
    if recipe.model_name_or_path is None:
        return new_image_processor(recipe.image_size)
    try:
        processor = AutoImageProcessor.from_pretrained(recipe.model_name_or_path, revision=recipe.revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{recipe.model_name_or_path} has no image processor that loads: {error}") from error
    return resized_image_processor(processor, recipe.image_size)


def build_backbone(recipe: PretrainRecipe, **settings) -> ViTRegModel:
    """A new backbone of the recipe's sizes, or its checkpoint; one without registers gets some.

    Args:
        recipe: Of the run.
        settings: Of the config, such as `use_mask_token`.

    Raises:
        ValueError: for a checkpoint that is no ViTReg, damaged or incomplete, or has another number of registers than
            was asked for.
    """
    return _build(ViTRegModel, recipe, settings)


def build_classifier(recipe: PretrainRecipe, class_names: list[str], **settings) -> ViTRegForImageClassification:
    """As `build_backbone`, with a classifier of these classes, which is new."""
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: label for label, name in enumerate(class_names)},
    }
    model = _build(ViTRegForImageClassification, recipe, {**labels, **settings})
    if recipe.model_name_or_path is not None:
        for head in (model.classifier, model.distillation_classifier):
            if head is not None:
                head.reset_parameters()
    return model


def _build(model_class: type, recipe: PretrainRecipe, settings: dict):
    settings = {
        "drop_path_rate": recipe.drop_path_rate,
        "attn_implementation": recipe.attn_implementation,
        "pos_embed_shift": recipe.rope_shift,
        "pos_embed_jitter": recipe.rope_jitter,
        "pos_embed_rescale": recipe.rope_rescale,
        **settings,
    }
    if recipe.model_name_or_path is not None:
        _refuse_sizes(recipe)
        model = _load(model_class, recipe.model_name_or_path, recipe.revision, settings)
        return _with_registers(model, recipe)
    sizes = {name: getattr(recipe, name) for name in NEW_MODEL_ONLY}
    sizes["layerscale_value"] = recipe.layerscale_value or None
    config = ViTRegConfig(
        image_size=recipe.image_size,
        num_register_tokens=NEW_MODEL_REGISTERS if recipe.num_register_tokens is None else recipe.num_register_tokens,
        register_init_std=recipe.register_init_std,
        **sizes,
        **settings,
    )
    return model_class(config)


def load_backbone(path: str) -> ViTRegModel:
    """A checkpoint as it is. Raises `ValueError` as `build_backbone` does."""
    return _load(ViTRegModel, path, None, {})


def _refuse_sizes(recipe: PretrainRecipe) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(PretrainModelOptions)}
    changed = [name for name in NEW_MODEL_ONLY if getattr(recipe, name) != defaults[name]]
    if changed:
        raise ValueError(
            f"--{', --'.join(changed)} belong to a new model, but --model_name_or_path {recipe.model_name_or_path} "
            "was given."
        )


def _load(model_class: type, path: str, revision: str | None, settings: dict):
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no model folder and no repository that loads: {error}") from error
    if not isinstance(config, ViTRegConfig):
        raise ValueError(
            f"{path} is a {config.model_type}, not a vitreg: convert it with conversion/convert.py first."
        )
    try:
        model, report = model_class.from_pretrained(
            path,
            revision=revision,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            **settings,
        )
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    mismatched = [key for key, *_ in report["mismatched_keys"]]
    lacking = sorted(key for key in [*report["missing_keys"], *mismatched] if not any(p in key for p in NEW_PARTS))
    if lacking:
        raise ValueError(f"{path} is incomplete or foreign. Missing: {lacking}.")
    return model


def _with_registers(model, recipe: PretrainRecipe):
    """The checkpoint with as many registers as the recipe says."""
    present, wanted = model.config.num_register_tokens, recipe.num_register_tokens
    if not present:
        wanted = NEW_MODEL_REGISTERS if wanted is None else wanted
        return add_registers(model, wanted, recipe.register_init_std) if wanted else model
    if wanted not in (None, present):
        raise ValueError(
            f"{recipe.model_name_or_path} has {present} registers, which training goes on with: leave "
            f"--num_register_tokens {wanted} out, or start from a checkpoint without registers."
        )
    return model
