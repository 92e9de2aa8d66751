# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Is it the same model? Two implementations on the same images, at several sizes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from rich.progress import track
from rich.table import Table
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from conversion.family import ConversionError, Outputs
from conversion.reading import PROGRESS
from hf_vitreg import ViTRegConfig


TOLERANCE = 1e-5
MAX_FLOPS = 1e12


@dataclass(frozen=True)
class Row:
    """One output at one size.

    Attributes:
        output: "tokens" or "logits".
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        max_abs_diff: The largest difference between the two implementations.
        relative: That difference over the largest magnitude in the reference.
        cosine: The smallest cosine between a token (or a row of logits) and its counterpart.
    """

    output: str
    height: int
    width: int
    max_abs_diff: float
    relative: float
    cosine: float

    @property
    def passed(self) -> bool:
        # in this form, because NaN passes no comparison
        return self.relative <= TOLERANCE and self.cosine >= 1 - TOLERANCE


def comparison_sizes(config: ViTRegConfig) -> list[tuple[int, int]]:
    """Heights and widths to compare a model at: its native size, smaller, larger, and images that are not square.

    Those that would cost more than `MAX_FLOPS` are left out, unless they are the smallest two.
    """
    side, patch = max(config.grid_size), config.patch_size
    small = max(side // 5, 2)
    grids = [(small, small), (small, small + 2), (16, 16), (side, side), (side + 3, side + 2)]
    mlp = (3 if config.use_swiglu_ffn else 2) * config.intermediate_size
    flops_per_token = 2 * config.num_hidden_layers * config.hidden_size * (4 * config.hidden_size + mlp)
    grids = [grid for grid in grids if grid in grids[:2] or math.prod(grid) * flops_per_token <= MAX_FLOPS]
    return [(rows * patch, cols * patch) for rows, cols in dict.fromkeys(grids)]


@torch.inference_mode()
def compare(
    implementation: Callable[[torch.Tensor], Outputs],
    reference: Callable[[torch.Tensor], Outputs],
    sizes: Iterable[tuple[int, int]],
    num_channels: int = 3,
) -> list[Row]:
    """One row for every output and size, computed in float32 whatever the dtype of the weights.

    Both are called with the same normally distributed `pixel_values` of shape `(1, num_channels, height, width)`.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for height, width in track(list(sizes), "Comparing", **PROGRESS):
        pixel_values = torch.randn(1, num_channels, height, width, generator=generator)
        with Float32Arithmetic():
            ours, theirs = implementation(pixel_values), reference(pixel_values)
        if ours.keys() != theirs.keys():
            raise AssertionError(f"The implementations return {list(ours)} and {list(theirs)}.")
        rows += [_row(output, height, width, ours[output], theirs[output]) for output in ours]
    return rows


def _row(output: str, height: int, width: int, ours: torch.Tensor, theirs: torch.Tensor) -> Row:
    if ours.shape != theirs.shape:
        raise AssertionError(f"{output} are {tuple(ours.shape)} here and {tuple(theirs.shape)} in the reference.")
    ours, theirs = ours.double(), theirs.double()
    max_abs_diff = (ours - theirs).abs().max().item()
    relative = max_abs_diff / max(theirs.abs().max().item(), torch.finfo(torch.float32).tiny)
    # written out, since cosine_similarity takes tokens that are zero in both for unlike ones
    norms = (ours.norm(dim=-1) * theirs.norm(dim=-1)).clamp_min(torch.finfo(torch.float32).tiny)
    cosine = torch.where((ours == theirs).all(dim=-1), 1.0, (ours * theirs).sum(dim=-1) / norms).min().item()
    return Row(output, height, width, max_abs_diff, relative, cosine)


def check(rows: list[Row], reference_name: str):
    """Raises `ConversionError` where a row is over the tolerance, or not finite."""
    failed = [row for row in rows if not row.passed]
    if failed:
        worst = max(failed, key=lambda row: (row.relative != row.relative, row.relative))
        raise ConversionError(
            f"The converted model is not the same as {reference_name}'s: {len(failed)} of {len(rows)} comparisons are "
            f"over the tolerance of {TOLERANCE:g}, the worst at {worst.height}x{worst.width} with a relative "
            f"difference of {worst.relative:.2g} in the {worst.output}. Either the weights are not finite, or the "
            "checkpoint is of another architecture than its names and shapes say."
        )


def table(rows: list[Row], reference_name: str) -> Table:
    """The rows for people."""
    shown = Table("output", "height", "width", "max abs diff", "relative", "cosine", title=f"Against {reference_name}")
    for row in rows:
        style = None if row.passed else "red"
        figures = (f"{row.max_abs_diff:.2e}", f"{row.relative:.2e}", f"{row.cosine:.9f}")
        shown.add_row(row.output, str(row.height), str(row.width), *figures, style=style)
    return shown


def vitreg_outputs(model: PreTrainedModel) -> Callable[[torch.Tensor], Outputs]:
    """A ViTReg model as `compare` calls it: all tokens after the final norm and, of a classifier, the logits."""

    def outputs(pixel_values: torch.Tensor) -> Outputs:
        seen = []
        hook = model.base_model.register_forward_hook(lambda module, args, output: seen.append(output))
        try:
            result = model(pixel_values)
        finally:
            hook.remove()
        named = {"tokens": seen[0].last_hidden_state}
        return named if "logits" not in result else {**named, "logits": result.logits}

    return outputs


class Float32Arithmetic(TorchFunctionMode):
    """Computes in float32 with weights of any dtype, one at a time, so that no second copy of them is held.

    In half precision two implementations differ by rounding, as much as two models may.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*tree_map(self._float32, args), **tree_map(self._float32, kwargs or {}))

    @staticmethod
    def _float32(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.float() if value.is_floating_point() else value
        return torch.float32 if isinstance(value, torch.dtype) and value.is_floating_point else value
