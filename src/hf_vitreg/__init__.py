# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""ViTReg: vision transformers with register tokens for the Hugging Face ecosystem."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BitImageProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.models.bit import BitImageProcessorPil

from .configuration_vitreg import ViTRegConfig
from .modeling_vitreg import (
    ViTRegBackbone,
    ViTRegForDepthEstimation,
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
    ViTRegPreTrainedModel,
)
from .original_layouts import register_original_layouts


AutoConfig.register("vitreg", ViTRegConfig)
AutoModel.register(ViTRegConfig, ViTRegModel)
AutoModelForImageClassification.register(ViTRegConfig, ViTRegForImageClassification)
AutoModelForSemanticSegmentation.register(ViTRegConfig, ViTRegForSemanticSegmentation)
# the image-segmentation pipeline looks for names here, and for no registered class, before it logs that one is unknown
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["vitreg"] = "ViTRegForSemanticSegmentation"
AutoModelForDepthEstimation.register(ViTRegConfig, ViTRegForDepthEstimation)
AutoBackbone.register(ViTRegConfig, ViTRegBackbone)
AutoImageProcessor.register(
    ViTRegConfig, image_processor_classes={"torchvision": BitImageProcessor, "pil": BitImageProcessorPil}
)

register_original_layouts()

# save_pretrained then writes the two Hub files beside the weights
ViTRegConfig.register_for_auto_class()
ViTRegModel.register_for_auto_class("AutoModel")
ViTRegForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ViTRegForSemanticSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
ViTRegForDepthEstimation.register_for_auto_class("AutoModelForDepthEstimation")
ViTRegBackbone.register_for_auto_class("AutoBackbone")

__version__ = "0.1.0"

__all__ = [
    "ViTRegBackbone",
    "ViTRegConfig",
    "ViTRegForDepthEstimation",
    "ViTRegForImageClassification",
    "ViTRegForSemanticSegmentation",
    "ViTRegModel",
    "ViTRegPreTrainedModel",
]
