# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Whether the models of `peers.py` learn the same: their losses, and the gradients of all parameters."""

from collections.abc import Mapping

import torch
from peers import timm_names, transformers_names
from torch import nn


# of the largest value of a tensor; a gradient of bfloat16 is a sum of many rounded numbers
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the parameters that have one, by their names."""
    named = dict(model.named_parameters()).items()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def check_same_gradients(
    losses: Mapping[str, float],
    gradients: Mapping[str, Mapping[str, torch.Tensor]],
    libraries: Mapping[str, str],
    models: Mapping[str, nn.Module],
    dtype: torch.dtype,
) -> dict[str, float]:
    """The largest difference of each to hf_vitreg, in loss and gradients, relative to the largest value of a tensor.

    Args:
        losses, gradients: Of every candidate, hf_vitreg among them.
        libraries: That it is of.
        models: One of every library, whose names and shapes count.
        dtype: Of the models.

    Raises:
        ValueError: where one differs by more than the tolerance.
    """
    differences = {}
    for name, library in libraries.items():
        difference = _difference(library, gradients[name], gradients["hf_vitreg"], models[library])
        loss = abs(losses[name] / losses["hf_vitreg"] - 1)
        differences[name] = max(difference, loss)
        if not differences[name] <= TOLERANCE[dtype]:
            raise ValueError(
                f"{name} does not train the same: loss and gradients differ by {loss:.1e} and {difference:.1e}, "
                f"{TOLERANCE[dtype]:.0e} is allowed. Its time and memory cannot be compared."
            )
    return differences


def _difference(
    library: str, actual: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor], model: nn.Module
) -> float:
    """Of gradients. Raises `ValueError` where one has a gradient that the other one has not."""
    if library == "transformers":
        ours = transformers_names(ours)
    elif library == "timm":
        ours = timm_names(_without_summands(ours), model)
    if set(actual) != set(ours):
        raise ValueError(f"Only one of {library} and hf_vitreg has a gradient of {set(actual) ^ set(ours)}.")
    pairs = [[_without_key_bias(name, gradients[name]) for gradients in (actual, ours)] for name in ours]
    return max(((theirs - own).abs().max() / own.abs().max()).item() for theirs, own in pairs if own.any())


def _without_summands(gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm has the sum of CLS and its position embedding as one parameter: its gradient is that of either."""
    positions = gradients["embeddings.position_embeddings"].clone()
    positions[:, 0] = 0
    return {**gradients, "embeddings.position_embeddings": positions}


def _without_key_bias(name: str, gradient: torch.Tensor) -> torch.Tensor:
    """With 0 for it: what is added to all keys of a query is nothing to softmax, and its gradient rounding alone."""
    if name.endswith("k_proj.bias"):
        return torch.zeros_like(gradient)
    if name.endswith("qkv.bias"):
        query, key, value = gradient.chunk(3)
        return torch.cat([query, torch.zeros_like(key), value])
    return gradient
