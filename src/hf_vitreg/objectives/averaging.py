# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Exponential moving averages of weights, which teachers and exported models are."""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(model: Module) -> Module:
    """What an average starts from: the same weights, in eval mode, of which none learns."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model, in place, of the parameters; buffers are copied.

    Weights that are sharded alike are averaged where they are, without communication.

    Args:
        average: What is moved. With a decay of 0 it becomes the model.
        model: With the same parameters and buffers.
        decay: 0 to 1.

    Raises:
        ValueError: where the two have not the same parameters and buffers, and for a decay outside of 0 to 1.
    """
    parameters, buffers = dict(average.named_parameters()), dict(average.named_buffers())
    new_parameters, new_buffers = dict(model.named_parameters()), dict(model.named_buffers())
    if parameters.keys() != new_parameters.keys() or buffers.keys() != new_buffers.keys():
        raise ValueError("A moving average has the parameters and buffers of its model, and these two differ.")
    if parameters:
        move = get_ema_multi_avg_fn(decay)
        move(list(parameters.values()), [new_parameters[name] for name in parameters], None)
    for name, buffer in buffers.items():
        buffer.copy_(new_buffers[name])
