# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Parameter groups: who gets weight decay, and who which share of the learning rate."""

import re

import torch
from torch import nn

from ..recipe import OptimizerOptions


# what is learned as a token, and not as a matrix that maps one
TOKENS = ("cls_token", "distillation_token", "register_tokens", "mask_token", "position_embeddings", "pooler.latent")


def layer_index(name: str, num_hidden_layers: int) -> int:
    """Depth of a parameter: 0 for the embeddings, 1 to L for the layers, L + 1 for the final norm and the head.

    Registers are embeddings: timm once gave them the learning rate of the head.
    """
    if match := re.search(r"encoder\.layer\.(\d+)\.", name):
        return int(match[1]) + 1
    return 0 if "embeddings." in name else num_hidden_layers + 1


def parameter_groups(model: nn.Module, num_hidden_layers: int, options: OptimizerOptions) -> list[dict]:
    """The trainable parameters, each in exactly one group of equal `lr_scale` and `weight_decay`.

    Matrices decay; biases, norms and LayerScale do not; CLS, registers, mask token and position embeddings as
    `decay_tokens` says. `lr_scale` is `layer_decay` to the power of the distance from the head.
    """
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_token = name.endswith(TOKENS)
        decays = options.decay_tokens if is_token else parameter.ndim > 1
        lr_scale = options.layer_decay ** (num_hidden_layers + 1 - layer_index(name, num_hidden_layers))
        key = (lr_scale, options.weight_decay if decays else 0.0)
        group = groups.setdefault(key, {"params": [], "names": [], "lr_scale": key[0], "weight_decay": key[1]})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def adamw(model: nn.Module, num_hidden_layers: int, options: OptimizerOptions) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; `set_learning_rate` gives each group its rate at every step."""
    groups = parameter_groups(model, num_hidden_layers, options)
    for group in groups:
        del group["names"]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(options.adam_beta1, options.adam_beta2))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets every group's learning rate to its share of this one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
