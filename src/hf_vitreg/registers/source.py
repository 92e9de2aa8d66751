# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The model that is given registers, with all that stands beside it: heads, image processor, tokenizer, licence."""

import copy
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionTextDualEncoderModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file

from ..configuration_vitreg import ViTRegConfig
from ..features import VisionEncoder
from ..hub.card import published_architecture
from ..hub.export import CARD, DUAL_TYPE, MODEL_CLASSES
from ..modeling_vitreg import ViTRegBackbone, ViTRegModel, ViTRegPreTrainedModel


@dataclass(frozen=True, eq=False)
class Source:
    """A ViTReg of any head, or a dual encoder around one.

    Attributes:
        name: What it was loaded from.
        model: As it was saved.
        image_processor, tokenizer: Beside it; the tokenizer of a dual encoder.
        origin: What the model card says of licence and origin, as `CardFacts` takes it; nothing without a card.
    """

    name: str
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    tokenizer: PreTrainedTokenizerBase | None
    origin: Mapping[str, str]

    @property
    def vision(self) -> ViTRegPreTrainedModel:
        """What gets registers: the model, or the vision tower."""
        return self.model.vision_model if isinstance(self.model, VisionTextDualEncoderModel) else self.model

    def with_vision(self, vision: ViTRegPreTrainedModel) -> PreTrainedModel:
        """The model with another one in the place of `vision`; of a dual encoder the rest is shared."""
        if not isinstance(self.model, VisionTextDualEncoderModel):
            return vision
        model = copy.copy(self.model)
        # the modules of a copy would be those of the model
        model._modules = {**self.model._modules, "vision_model": vision}
        model.config = copy.deepcopy(self.model.config)
        model.config.vision_config = vision.config
        return model

    def encoder(self, vision: ViTRegPreTrainedModel | None = None, name: str | None = None) -> VisionEncoder:
        """`vision`, by default its own, to look at; normalized as the image processor says."""
        vision = self.vision if vision is None else vision
        processor = self.image_processor
        mean, std = processor.image_mean, processor.image_std
        if not processor.do_normalize:
            mean, std = (0.0,) * len(mean), (1.0,) * len(std)
        return VisionEncoder.wrap(_readable(vision), name or self.name, mean, std)


def load_source(name: str | Path, device: str | torch.device = "cpu") -> Source:
    """Loads a ViTReg as what it was saved, in its dtype. No code of a repository is run.

    Args:
        name: A folder, or a repository of the Hub.
        device: Where to.

    Raises:
        ValueError: where there is none, it is of another architecture, its weights are not complete, or it has no
            image processor, a dual encoder no tokenizer.
    """
    name = str(name)
    try:
        model = _load(name).to(device).eval()
        image_processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        is_dual = isinstance(model, VisionTextDualEncoderModel)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False) if is_dual else None
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        # some list every weight that is missing
        raise ValueError(f"Cannot load {name}: {textwrap.shorten(str(error), 800)}") from error
    return Source(name, model, image_processor, tokenizer, _origin(name))


def _load(name: str) -> PreTrainedModel:
    convert = "Convert it first: python conversion/convert.py, see its --help."
    if Path(name).is_file():
        raise ValueError("it is a file. Give the folder of a ViTReg model.")
    if name.startswith("timm:"):
        raise ValueError(f"it is timm's, not a vitreg. {convert}")
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError("there is no such folder.")
    # not AutoConfig, which would first ask for leave to run the code of models that nobody knows
    config, _ = PreTrainedConfig.get_config_dict(name)
    if not config:
        raise ValueError("there is no config.json in it.")
    is_dual = config.get("model_type") == DUAL_TYPE
    model_type = (config["vision_config"] if is_dual else config).get("model_type")
    if model_type != ViTRegConfig.model_type:
        found = model_type or ", ".join(config.get("architectures") or [config.get("architecture", "model")])
        raise ValueError(f"it is a {found}, not a {ViTRegConfig.model_type}. {convert}")
    architecture = published_architecture(config.get("architectures"))
    model_class = VisionTextDualEncoderModel if is_dual else MODEL_CLASSES[architecture]
    model, report = model_class.from_pretrained(name, dtype="auto", output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} of its weights are missing, {missing[0]} among them. They would be random.")
    return model


def _readable(vision: ViTRegPreTrainedModel) -> ViTRegPreTrainedModel:
    """The same, as something that `VisionEncoder` knows."""
    if not isinstance(vision, ViTRegBackbone):
        return vision
    weight = vision.embeddings.patch_embeddings.projection.weight
    model = ViTRegModel(vision.config, add_pooling_layer=False).to(weight.device, weight.dtype)
    model.load_state_dict(vision.state_dict(), strict=False)
    return model


def _origin(name: str) -> dict[str, str]:
    """Licence and base model of the card beside a model, where there is one that can be read."""
    try:
        path = cached_file(name, CARD, _raise_exceptions_for_missing_entries=False)
        data = ModelCard.load(path).data if path else None
    except (OSError, ValueError, TypeError, AttributeError):  # no card, or none that can be read
        return {}
    if data is None:
        return {}
    base_models = data.get("base_model")
    base_model = base_models[0] if isinstance(base_models, list) and base_models else base_models
    names = ("license", "license_name", "license_link")
    found = {each: data.get(each) for each in names} | {"base_model": base_model}
    if found["license"] == "other" and not (found["license_name"] and found["license_link"]):
        found["license"] = None
    return {each: value for each, value in found.items() if isinstance(value, str) and value}
