# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Parameter groups: who gets weight decay, and who which share of the learning rate."""

import re

import torch
from torch import nn

from ..pretrain_recipe import PretrainOptimizerOptions
from ..recipe import OptimizerOptions
from .schedules import cosine


# what is learned as a token, and not as a matrix that maps one
TOKENS = ("cls_token", "distillation_token", "register_tokens", "mask_token", "position_embeddings", "pooler.latent")

# that torch has a fused AdamW for, whatever the weights' layout
FUSED_DEVICES = ("cpu", "cuda")


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


# what only training knows: prototypes that DINOv2 holds back at the start, heads that learn before the backbone does
LAST_LAYER = "last_layer."
# text towers have layers of other names and numbers, and are not decayed by layer
TEXT = ".text."
HEADS = ("head.", "ibot_head.")


def pretraining_groups(model: nn.Module, num_hidden_layers: int, options: PretrainOptimizerOptions) -> list[dict]:
    """The trainable parameters of an objective, each in exactly one group of what its schedules have in common.

    As `parameter_groups`, and the patch embedding has `patch_embed_lr_ratio`. The keys beside `params` and `names`:
    `lr_scale`, `decays`, `is_last_layer`, `is_backbone`.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        of_text = TEXT in name
        depth = num_hidden_layers + 1 if of_text else layer_index(name, num_hidden_layers)
        lr_scale = options.layer_decay ** (num_hidden_layers + 1 - depth)
        if "patch_embeddings." in name:
            lr_scale *= options.patch_embed_lr_ratio
        is_token = name.endswith(TOKENS) or (of_text and "embedding" in name)
        traits = {
            "lr_scale": lr_scale,
            "decays": options.decay_tokens if is_token else parameter.ndim > 1,
            "is_last_layer": LAST_LAYER in name,
            "is_backbone": not any(f".{head}" in f".{name}" for head in HEADS),
        }
        group = groups.setdefault(tuple(traits.values()), {"params": [], "names": [], **traits})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def pretraining_optimizer(
    model: nn.Module, num_hidden_layers: int, options: PretrainOptimizerOptions
) -> torch.optim.Optimizer:
    """AdamW or LAMB over `pretraining_groups`; `Schedule` gives each group its values at every step.

    Raises:
        ImportError: for LAMB without timm.
    """
    groups = pretraining_groups(model, num_hidden_layers, options)
    for group in groups:
        del group["names"]
    settings = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.weight_decay,
    }
    if options.optimizer == "adamw":
        # one pass over memory in place of one for each operation: a sixth of the time on a CPU
        fused = all(parameter.device.type in FUSED_DEVICES for group in groups for parameter in group["params"])
        return torch.optim.AdamW(groups, **settings, fused=fused or None)
    try:
        from timm.optim import Lamb
    except ImportError as error:
        raise ImportError("--optimizer lamb is timm's: pip install 'hf-vitreg[timm]'.") from error
    # the loop clips each module on its own; Lamb would clip all at 1 besides
    return Lamb(groups, **settings, max_grad_norm=None)


class Schedule:
    """Learning rate and weight decay of every group at every step.

    Args:
        options: Where the curves start and end.
        total_steps: Steps of the run.
        batch_size: Images a step, over all processes and accumulated batches, that the learning rate is scaled by.
        frozen_last_layer_ratio: Share of the steps in which the prototypes stay.
        head_warmup_ratio: Share of the steps in which the heads alone learn.
    """

    def __init__(
        self,
        options: PretrainOptimizerOptions,
        total_steps: int,
        batch_size: int,
        frozen_last_layer_ratio: float = 0.0,
        head_warmup_ratio: float = 0.0,
    ):
        self.options = options
        self.total_steps = total_steps
        self.peak = options.learning_rate * _batch_factor(options, batch_size)
        self.warmup_steps = round(options.warmup_ratio * total_steps)
        self.frozen_last_layer_steps = round(frozen_last_layer_ratio * total_steps)
        self.head_warmup_steps = round(head_warmup_ratio * total_steps)

    def learning_rate(self, step: int) -> float:
        """Of a group whose `lr_scale` is 1; `step` counts from 0."""
        end = self.peak if self.options.constant_learning_rate else self.options.min_learning_rate
        start = self.options.warmup_learning_rate
        return cosine(step, self.total_steps, self.peak, end, self.warmup_steps, start)

    def weight_decay(self, step: int) -> float:
        """Of a group that decays."""
        start, end = self.options.weight_decay, self.options.weight_decay_end
        return cosine(step, self.total_steps, start, start if end is None else end)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Sets what the groups made by `pretraining_groups` have at this step, from 0."""
        learning_rate, weight_decay = self.learning_rate(step), self.weight_decay(step)
        for group in optimizer.param_groups:
            held_back = (group["is_last_layer"] and step < self.frozen_last_layer_steps) or (
                group["is_backbone"] and step < self.head_warmup_steps
            )
            group["lr"] = 0.0 if held_back else learning_rate * group["lr_scale"]
            group["weight_decay"] = weight_decay if group["decays"] else 0.0


def _batch_factor(options: PretrainOptimizerOptions, batch_size: int) -> float:
    """What the learning rate is multiplied with for a batch of this size."""
    exponent = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[options.learning_rate_scaling]
    return (batch_size / options.learning_rate_batch_size) ** exponent
