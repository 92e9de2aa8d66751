# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a family is, what its file hands to the command, and how it refuses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from hf_vitreg import ViTRegModel


CUSTOM = "custom"  # the architecture of what was not published

Outputs = dict[str, torch.Tensor]


class ConversionError(ValueError):
    """The user's input cannot be converted: what was given, what is allowed, what to do next."""


@dataclass(frozen=True)
class License:
    """Of weights, as the Hub's metadata has it: an id it knows, or "other" with a name and an address."""

    id: str
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        return self.name or self.id


APACHE_2, MIT, UNKNOWN_LICENSE = License("apache-2.0"), License("mit"), License("unknown")


@dataclass(frozen=True)
class Architecture:
    """A published size: the fields of `ViTRegConfig` that the shapes of a checkpoint tell.

    `image_size` is given where it tells two architectures apart, `None` where weights of any size may have this name.
    """

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    use_swiglu_ffn: bool = False
    num_register_tokens: int = 0
    patch_size: int = 14
    image_size: int | None = None
    use_distillation_token: bool = False


@dataclass(frozen=True)
class Published:
    """A checkpoint that can be asked for by its name.

    Attributes:
        arch: The name of its architecture.
        path: Of the file, from the family's `base_url` on.
        license: Of the weights.
        base_model: The same weights on the Hub, where they are there.
    """

    arch: str
    path: str
    license: License
    base_model: str | None = None


@dataclass(frozen=True)
class Family:
    """Checkpoints of one layout that came out of one repository.

    Attributes:
        name: Of its command.
        title: As people write it.
        architectures: By name.
        published: By the name that a user types.
        base_url: Where the published files are.
        config: Of a model of a published architecture, before a checkpoint is seen.
        model_class: What a published checkpoint becomes.
        spelled: Brings other spellings of names to the one in the tables.
        fetch: Gets what is not a file below an address: from the path of a published checkpoint, the base URL and the
            folder of the cache, where these were given.
    """

    name: str
    title: str
    architectures: Mapping[str, Architecture]
    published: Mapping[str, Published]
    base_url: str
    config: Callable[[Architecture], PreTrainedConfig]
    model_class: type[PreTrainedModel] = ViTRegModel
    spelled: Callable[[str], str] = str
    fetch: Callable[[str, str | None, Path | None], Path] | None = None


@dataclass(frozen=True)
class KnownCheckpoint:
    """A line of the list of all that can be asked for by name."""

    family: str
    name: str
    arch: str
    source: str
    num_registers: int
    patch_size: int
    num_parameters: int
    license: str


@dataclass(frozen=True)
class Prepared:
    """A filled model, and everything that is needed to compare it and to write it.

    Attributes:
        model: ViTReg, or a dual encoder around one; filled, in eval mode.
        image_processor: What turns images into its input.
        reference: An implementation that nobody here wrote, filled from the same file. Takes `pixel_values` and
            returns named outputs: `"tokens"`, `(batch_size, sequence_length, hidden_size)` in ViTReg's order, and
            `"logits"`, `(batch_size, num_labels)`, where the model is a classifier.
        reference_name: Its name and version.
        sizes: Height and width in pixels of the images to compare on.
        arch: The architecture's published name, or "custom".
        sources: One entry a file read: name, bytes, sha256, and the names that were taken for the backbone's.
        left_aside: What the files hold beside the model, by name.
        license: Of the weights; unknown where only the user can know it.
        base_model: The published weights on the Hub, where these are known to be the same.
        heads: Projection heads of self-supervised training, which are written beside the model.
        tokenizer: Of the text tower, where there is one.
        implementation: What is compared with the reference, and returns outputs of the same names. Where not given,
            the model's tokens and logits.
        remarks: Sentences on what neither the weights nor the comparison show.
    """

    model: PreTrainedModel
    image_processor: BaseImageProcessor
    reference: Callable[[torch.Tensor], Outputs]
    reference_name: str
    sizes: list[tuple[int, int]]
    arch: str
    sources: list[dict]
    left_aside: list[str] = field(default_factory=list)
    license: License = UNKNOWN_LICENSE
    base_model: str | None = None
    heads: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    implementation: Callable[[torch.Tensor], Outputs] | None = None
    remarks: list[str] = field(default_factory=list)
