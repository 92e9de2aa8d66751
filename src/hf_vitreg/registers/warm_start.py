# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""New registers for a model that has none: everything that it learned stays, and training goes on from there."""

import copy
from typing import TypeVar

import torch
from torch import nn

from ..configuration_vitreg import ViTRegConfig
from ..modeling_vitreg import ViTRegEmbeddings, ViTRegPreTrainedModel


Model = TypeVar("Model", bound=ViTRegPreTrainedModel)


@torch.no_grad()
def add_registers(model: Model, num_register_tokens: int, init_std: float = 0.02) -> Model:
    """A copy with new registers before the patches, normal with mean 0, drawn from torch's generator.

    The model computes something else from now on, since patches attend to the registers too: it has to be trained on.
    Where every token before the patches has a position embedding (`"prefix_patches"`), that of a register is 0.

    Args:
        model: Without registers; of any head. It is left as it is.
        num_register_tokens: How many; of 0 the copy is the same model.
        init_std: Standard deviation. Registers that start equal would stay one register.

    Raises:
        ValueError: for a model that has registers, a number below 0, or a standard deviation that is not positive.
    """
    present = model.config.num_register_tokens
    if present:
        raise ValueError(
            f"The model has {present} registers already. Train it on as it is, or start from one without registers."
        )
    if num_register_tokens < 0 or init_std <= 0:
        raise ValueError(
            "There can be 0 or more registers, with a positive standard deviation, got "
            f"num_register_tokens={num_register_tokens}, init_std={init_std}."
        )
    model = copy.deepcopy(model)
    if not num_register_tokens:
        return model
    num_positions = model.config.num_prefix_positions
    configs = [
        module.config for module in model.modules() if isinstance(getattr(module, "config", None), ViTRegConfig)
    ]
    for config in configs:
        config.num_register_tokens, config.register_init_std = num_register_tokens, init_std
    num_new_positions = model.config.num_prefix_positions - num_positions
    for embeddings in (module for module in model.modules() if isinstance(module, ViTRegEmbeddings)):
        weight = embeddings.patch_embeddings.projection.weight
        registers = init_std * torch.randn(1, num_register_tokens, model.config.hidden_size)
        embeddings.register_tokens = nn.Parameter(registers.to(weight), requires_grad=weight.requires_grad)
        if num_new_positions:
            _insert_positions(embeddings, num_positions, num_new_positions)
    return model


def _insert_positions(embeddings: ViTRegEmbeddings, index: int, count: int) -> None:
    """Zeros for new tokens, behind the positions of those before them."""
    before = embeddings.position_embeddings
    prefix, patches = before.tensor_split([index], dim=1)
    positions = torch.cat([prefix, before.new_zeros(1, count, before.shape[-1]), patches], dim=1)
    embeddings.position_embeddings = nn.Parameter(positions, requires_grad=before.requires_grad)
