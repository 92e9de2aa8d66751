# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a family's file hands to the command, and how it refuses."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor


class ConversionError(ValueError):
    """The user's input cannot be converted: what was given, what is allowed, what to do next."""


@dataclass(frozen=True)
class Prepared:
    """A filled model, and everything that is needed to compare it and to write it.

    Attributes:
        model: ViTReg, filled, in eval mode.
        image_processor: What turns images into its input.
        reference: An implementation that nobody here wrote, filled from the same file. Takes `pixel_values` and
            returns `"tokens"`, `(batch_size, sequence_length, hidden_size)` in ViTReg's order, and `"logits"`,
            `(batch_size, num_labels)`, where the model is a classifier.
        reference_name: Its name and version.
        sizes: Height and width in pixels of the images to compare on.
        arch: The architecture's published name, or "custom".
        sources: One entry a file read: name, bytes, sha256, and the names that were taken for the backbone's.
        left_aside: What the files hold beside the model, by name.
        license: Of the weights, as an id that the Hub knows; "unknown" where only the user can know it.
        base_model: The published weights on the Hub, where these are known to be the same.
    """

    model: PreTrainedModel
    image_processor: BaseImageProcessor
    reference: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    reference_name: str
    sizes: list[tuple[int, int]]
    arch: str
    sources: list[dict]
    left_aside: list[str] = field(default_factory=list)
    license: str = "unknown"
    base_model: str | None = None
