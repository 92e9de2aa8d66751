# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""ViTReg: vision transformers with register tokens for the Hugging Face ecosystem."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessor,
)
from transformers.models.bit import BitImageProcessorPil

from .configuration_vitreg import ViTRegConfig
from .modeling_vitreg import ViTRegBackbone, ViTRegForImageClassification, ViTRegModel, ViTRegPreTrainedModel
from .original_layouts import register_original_layouts


AutoConfig.register("vitreg", ViTRegConfig)
AutoModel.register(ViTRegConfig, ViTRegModel)
AutoModelForImageClassification.register(ViTRegConfig, ViTRegForImageClassification)
AutoBackbone.register(ViTRegConfig, ViTRegBackbone)
AutoImageProcessor.register(
    ViTRegConfig, image_processor_classes={"torchvision": BitImageProcessor, "pil": BitImageProcessorPil}
)

register_original_layouts()

# save_pretrained then writes the two Hub files beside the weights
ViTRegConfig.register_for_auto_class()
ViTRegModel.register_for_auto_class("AutoModel")
ViTRegForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ViTRegBackbone.register_for_auto_class("AutoBackbone")

__version__ = "0.1.0"

__all__ = [
    "ViTRegBackbone",
    "ViTRegConfig",
    "ViTRegForImageClassification",
    "ViTRegModel",
    "ViTRegPreTrainedModel",
]
