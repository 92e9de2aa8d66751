# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""How well a faster model agrees with the model, and how well it has to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel


# of float32
MAX_RELATIVE_ERROR = 1e-5
# of what computes in fewer bits
MIN_COSINE = {torch.bfloat16: 0.9999, torch.float16: 0.9999, torch.int8: 0.999}
# the tolerance of fewer bits is of CLS and patches, which are outputs of their own
WITH_REGISTERS = ("last_hidden_state", "register_tokens")


@dataclass(frozen=True)
class Agreement:
    """How well outputs agree with those of the model in float32.

    Attributes:
        relative_error: The largest difference over the largest value of its output; of all outputs the largest.
        cosine: Of CLS, and on average of the patches of an image, or of what a head makes of them; of all images and
            outputs the least.
        least_cosine: Of any single token.
    """

    relative_error: float
    cosine: float
    least_cosine: float

    def suffices(self, dtype: torch.dtype) -> bool:
        """Whether it is within the tolerance of what computes in this dtype. What is no number is not."""
        if dtype in MIN_COSINE:
            return self.cosine >= MIN_COSINE[dtype]
        return self.relative_error <= MAX_RELATIVE_ERROR

    def describe(self, dtype: torch.dtype) -> str:
        """In words, by the measure that counts for the dtype."""
        if dtype in MIN_COSINE:
            return f"cosine {self.cosine:.5f}"
        return f"relative error {self.relative_error:.1e}"


def tolerance(dtype: torch.dtype) -> str:
    """In words."""
    if dtype in MIN_COSINE:
        return f"a cosine of {MIN_COSINE[dtype]} or more"
    return f"a relative error of {MAX_RELATIVE_ERROR:.0e} or less"


@torch.no_grad()
def outputs_of(model: PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that a model returns, in float32, the stages of a backbone numbered: `feature_maps.0`."""
    return {name: tensor.float() for name, tensor in _tensors(model(pixel_values, return_dict=True))}


def _tensors(output: Mapping[str, torch.Tensor | tuple[torch.Tensor, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            yield name, value
        else:
            yield from ((f"{name}.{index}", tensor) for index, tensor in enumerate(value))


def agreement(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> Agreement:
    """Compares outputs by their names.

    Args:
        actual: `(batch_size, ..., size)`, as tokens and logits are, or `(batch_size, channels, rows, cols)`.
        expected: Of the same names and shapes.

    Raises:
        ValueError: where names or shapes differ.
    """
    shapes = [{name: tuple(tensor.shape) for name, tensor in outputs.items()} for outputs in (actual, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"Outputs have the shapes {shapes[0]}, expected are {shapes[1]}.")
    names = [name for name, tensor in expected.items() if tensor.numel()]
    errors = [(actual[name] - expected[name]).abs().max() / expected[name].abs().max() for name in names]
    cosines = [
        functional.cosine_similarity(actual[name], expected[name], dim=1 if actual[name].ndim == 4 else -1)
        for name in names
        if name not in WITH_REGISTERS
    ]
    # by torch, whose minimum of what is no number is none
    return Agreement(
        relative_error=torch.stack(errors).max().item(),
        cosine=torch.stack([each.reshape(len(each), -1).mean(1).min() for each in cosines]).min().item(),
        least_cosine=torch.stack([each.min() for each in cosines]).min().item(),
    )
