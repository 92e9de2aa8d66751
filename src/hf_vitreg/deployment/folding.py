# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The same model with less to compute: for inference with weights that do not change."""

import copy
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..modeling_vitreg import (
    ViTRegAttention,
    ViTRegEmbeddings,
    ViTRegEncoder,
    ViTRegLayer,
    ViTRegResidual,
    ViTRegRotaryEmbeddings,
    ViTRegSwiGLUFFN,
)


MAX_SIZES = 64  # whose position embeddings are kept


def fold(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A copy of a ViTReg, of any head, that computes the same with fewer steps.

    LayerScale is a part of the projection before it; queries, keys and values come from one matrix, and so do the two
    halves of SwiGLU; position embeddings and rotations are computed once for every size. Parameters are frozen.

    Args:
        model: A ViTReg, or a model that contains one. It is left as it is.
        dtype: Of the copy; by default that of the model. Folding is in float32 at least.

    Raises:
        ValueError: where there is no ViTReg in the model, or it is folded already.
    """
    if not any(isinstance(module, ViTRegEncoder) for module in model.modules()):
        raise ValueError(f"There is no ViTReg in this {type(model).__name__}: nothing in it can be folded.")
    if any(isinstance(module, FusedAttention) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} is optimized already: give the model that it was made from.")
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for module in folded.modules():
        if isinstance(module, ViTRegLayer):
            _fold_layer(module)
    for parent in list(folded.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ViTRegEmbeddings):
                setattr(parent, name, CachedEmbeddings(child))
            elif isinstance(child, ViTRegRotaryEmbeddings):
                setattr(parent, name, CachedRotaryEmbeddings(child))
    if dtype is not None:
        _cast(folded, dtype)
    return folded


def _fold_layer(layer: ViTRegLayer) -> None:
    last = layer.mlp.down_proj if isinstance(layer.mlp, ViTRegSwiGLUFFN) else layer.mlp.fc2
    _fold_scale(layer.residual1, layer.attention.o_proj)
    _fold_scale(layer.residual2, last)
    layer.attention = FusedAttention(layer.attention)
    if isinstance(layer.mlp, ViTRegSwiGLUFFN):
        layer.mlp = FusedSwiGLUFFN(layer.mlp)


def _fold_scale(residual: ViTRegResidual, projection: nn.Linear) -> None:
    """`residual + scale * (weight x + bias)` with the scale in weight and bias."""
    if residual.lambda1 is None:
        return
    for tensor, scale in ((projection.weight, residual.lambda1[:, None]), (projection.bias, residual.lambda1)):
        if tensor is not None:
            # a product of two numbers of half precision fits float32, and is rounded once
            tensor.copy_(tensor.float() * scale.float())
    residual.lambda1 = None


def _stacked(projections: list[nn.Linear]) -> nn.Linear:
    """One projection that computes all of them; what has no bias where others have gets one of 0."""
    weights = [each.weight for each in projections]
    biases = [each.bias for each in projections]
    outputs = sum(map(len, weights))
    stacked = nn.Linear(weights[0].shape[1], outputs, bias=any(bias is not None for bias in biases), device="meta")
    stacked.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    if stacked.bias is not None:
        filled = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in zip(weights, biases)]
        stacked.bias = nn.Parameter(torch.cat(filled), requires_grad=False)
    return stacked


class FusedAttention(ViTRegAttention):
    """A `ViTRegAttention` with one projection for queries, keys and values."""

    def __init__(self, attention: ViTRegAttention):
        _take_over(self, attention)
        projections = [self._modules.pop(name) for name in ("q_proj", "k_proj", "v_proj")]
        self.qkv_proj = _stacked(projections)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        projected = self.qkv_proj(hidden_states).chunk(3, dim=-1)
        attention_output, weights = self.attend(*projected, position_embeddings, **kwargs)
        return self.o_proj(attention_output), weights

    # What `rows` reads of all tokens, or of some. The whole projection, since a quantized one has no parts.
    def q_proj(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.qkv_proj(hidden_states).chunk(3, dim=-1)[0]

    def k_proj(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.qkv_proj(hidden_states).chunk(3, dim=-1)[1]


class FusedSwiGLUFFN(ViTRegSwiGLUFFN):
    """A `ViTRegSwiGLUFFN` with one projection for its gate and what the gate lets through."""

    def __init__(self, mlp: ViTRegSwiGLUFFN):
        _take_over(self, mlp)
        self.gate_up_proj = _stacked([self._modules.pop("gate_proj"), self._modules.pop("up_proj")])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        hidden_states = nn.functional.silu(gate) * up
        if self.shift is not None:
            hidden_states = self.shift(hidden_states)
        return self.down_proj(hidden_states)


class CachedEmbeddings(ViTRegEmbeddings):
    """`ViTRegEmbeddings` that interpolate their positions once for every size."""

    def __init__(self, embeddings: ViTRegEmbeddings):
        _take_over(self, embeddings)
        self._by_size = {}

    def interpolated_position_embeddings(self, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _cached(self._by_size, self.position_embeddings, super().interpolated_position_embeddings, rows, cols)


class CachedRotaryEmbeddings(ViTRegRotaryEmbeddings):
    """`ViTRegRotaryEmbeddings` that compute their angles once for every size."""

    def __init__(self, embeddings: ViTRegRotaryEmbeddings):
        _take_over(self, embeddings)
        self._by_size = {}

    def forward(self, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _cached(self._by_size, self.periods, super().forward, rows, cols)


def _take_over(module: nn.Module, original: nn.Module) -> None:
    """Makes `module` what `original` is, with the same parameters, submodules and hooks."""
    nn.Module.__init__(module)
    module.__dict__.update(original.__dict__)


def _cached(by_size: dict, source: torch.Tensor, compute: Callable, rows: int, cols: int) -> tuple[torch.Tensor, ...]:
    """What `compute` makes of `source` for a size, from the cache where it is there."""
    if torch.compiler.is_exporting():  # a program has no sizes yet
        return compute(rows, cols)
    key = (rows, cols, source.device, source.dtype)
    if key not in by_size:
        if len(by_size) >= MAX_SIZES:
            by_size.pop(next(iter(by_size)))
        by_size[key] = compute(rows, cols)
    return by_size[key]


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Like `model.to(dtype)`, but the periods of rotations stay float32: rounded ones would be others."""
    periods = [module for module in model.modules() if isinstance(module, ViTRegRotaryEmbeddings)]
    kept = [module.periods for module in periods]
    model.to(dtype)
    for module, original in zip(periods, kept):
        module.periods = nn.Buffer(original)
