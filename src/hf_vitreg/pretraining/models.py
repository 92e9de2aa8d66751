# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The model that a pretraining recipe asks for: a new one, or a checkpoint, with registers either way."""

import dataclasses
import logging
import re

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BitImageProcessor,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.utils import cached_file

from ..configuration_vitreg import ViTRegConfig
from ..data.transforms import new_image_processor, resized_image_processor
from ..hub.export import PRETRAINING_HEADS
from ..modeling_vitreg import ViTRegForImageClassification, ViTRegModel
from ..objectives.dino import DINONetwork
from ..pretrain_recipe import PretrainModelOptions, PretrainRecipe
from ..registers.warm_start import add_registers


logger = logging.getLogger(__name__)

NEW_MODEL_REGISTERS = 4
NEW_MODEL_ONLY = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "initializer_range",
    "layerscale_value",
    "use_swiglu_ffn",
    "use_pre_layernorm",
    "patch_bias",
    "position_embedding_type",
)
# of a checkpoint these may be new
NEW_PARTS = re.compile(
    r"(vitreg\.|vision_model\.)?(embeddings\.(mask_token|distillation_token)|(distillation_)?classifier\.\w+|projection\.weight)"
)
NEW_IMAGE_SIZE = 32
STATISTICS = {
    "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}


def image_processor(recipe: PretrainRecipe) -> BaseImageProcessor:
    """What images go through at evaluation: the checkpoint's, at the recipe's size where it has one, or a new one."""
    if recipe.model_name_or_path is None:
        mean, std = STATISTICS[recipe.pixel_statistics]
        settings = new_image_processor(recipe.image_size or NEW_IMAGE_SIZE).to_dict()
        return BitImageProcessor.from_dict({**settings, "image_mean": list(mean), "image_std": list(std)})
    try:
        processor = AutoImageProcessor.from_pretrained(recipe.model_name_or_path, revision=recipe.revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{recipe.model_name_or_path} has no image processor that loads: {error}") from error
    return resized_image_processor(processor, recipe.image_size) if recipe.image_size else processor


def require_whole_patches(recipe: PretrainRecipe, config: ViTRegConfig) -> None:
    """Raises `ValueError` for images that no whole number of patches fills."""
    if recipe.image_size % config.patch_size:
        raise ValueError(
            f"--image_size {recipe.image_size} is no multiple of the patch size: give one of {config.patch_size}."
        )


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


def build_with_new_registers(recipe: PretrainRecipe) -> tuple[ViTRegModel, ViTRegModel]:
    """The recipe's checkpoint as it is, and the same model with new registers.

    Raises:
        ValueError: without a checkpoint, for one that has registers, and as `build_backbone`.
    """
    path = recipe.model_name_or_path
    if path is None:
        raise ValueError(
            "--objective post_hoc gives registers to a model that was trained without: name one as "
            "--model_name_or_path."
        )
    _refuse_sizes(recipe)
    model = _load(ViTRegModel, path, recipe.revision, _settings(recipe))
    if present := model.config.num_register_tokens:
        raise ValueError(
            f"{path} has {present} registers already, and --objective post_hoc gives new ones to a model without: "
            "name another one as --model_name_or_path."
        )
    return model, _with_registers(model, recipe)


def _build(model_class: type, recipe: PretrainRecipe, settings: dict):
    settings = {**_settings(recipe), **settings}
    if recipe.model_name_or_path is not None:
        _refuse_sizes(recipe)
        model = _load(model_class, recipe.model_name_or_path, recipe.revision, settings)
        return _with_registers(model, recipe)
    sizes = {name: getattr(recipe, name) for name in NEW_MODEL_ONLY}
    sizes["layerscale_value"] = recipe.layerscale_value or None
    config = ViTRegConfig(
        image_size=recipe.image_size or NEW_IMAGE_SIZE,
        num_register_tokens=NEW_MODEL_REGISTERS if recipe.num_register_tokens is None else recipe.num_register_tokens,
        register_init_std=recipe.register_init_std,
        **sizes,
        **settings,
    )
    return model_class(config)


def _settings(recipe: PretrainRecipe) -> dict[str, object]:
    """Of the config, that new models and checkpoints have of the recipe."""
    return {
        "drop_path_rate": recipe.drop_path_rate,
        "attn_implementation": recipe.attn_implementation,
        **_rope_settings(recipe),
    }


def _rope_settings(recipe: PretrainRecipe) -> dict[str, float]:
    """How rotary positions are augmented, where the recipe says so; a checkpoint keeps what it has."""
    names = {"pos_embed_shift": "rope_shift", "pos_embed_jitter": "rope_jitter", "pos_embed_rescale": "rope_rescale"}
    given = {name: getattr(recipe, flag) for name, flag in names.items() if getattr(recipe, flag) is not None}
    if given and recipe.model_name_or_path is None and recipe.position_embedding_type != "rope":
        raise ValueError("--rope_shift, --rope_jitter and --rope_rescale need --position_embedding_type rope.")
    return given


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
    if isinstance(config, VisionTextDualEncoderConfig) and model_class is ViTRegModel:
        return _vision_tower(path, revision, config, settings)
    if not isinstance(config, ViTRegConfig):
        raise ValueError(
            f"{path} is a {config.model_type}, not a vitreg: convert it with conversion/convert.py first."
        )
    return _complete(model_class, path, revision, **settings)


def _vision_tower(path: str, revision: str | None, config: VisionTextDualEncoderConfig, settings: dict) -> ViTRegModel:
    """The images' side of a dual encoder, with its projection."""
    if not isinstance(config.vision_config, ViTRegConfig):
        raise ValueError(f"The vision tower of {path} is a {config.vision_config.model_type}, not a vitreg.")
    attention = settings.pop("attn_implementation", None)
    for name, value in settings.items():
        setattr(config.vision_config, name, value)
    model = _complete(VisionTextDualEncoderModel, path, revision, config=config)
    vision = model.vision_model
    vision.projection, vision.config.projection_dim = model.visual_projection, config.projection_dim
    if attention is not None:
        vision.set_attn_implementation(attention)
    return vision


def _complete(model_class: type, path: str, revision: str | None, **settings):
    """Loads a checkpoint that has all but what may be new."""
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
    lacking = sorted(key for key in [*report["missing_keys"], *mismatched] if not NEW_PARTS.fullmatch(key))
    if lacking:
        raise ValueError(f"{path} is incomplete or foreign. Missing: {lacking}.")
    return model


def load_heads(network: DINONetwork, path: str, revision: str | None) -> None:
    """Fills the heads with those that a converted checkpoint brings along, where it does and they are of one size."""
    file = cached_file(path, PRETRAINING_HEADS, revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return
    tensors = load_file(file)
    for prefix, head in (("dino_head.", network.head), ("ibot_head.", network.ibot_head)):
        found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if head is None or not found:
            continue
        sizes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        wanted = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
        if sizes == wanted:
            head.load_state_dict(found)
        else:
            logger.warning("%s has a head that is not used: %s, and the recipe's is %s.", path, sizes, wanted)


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
