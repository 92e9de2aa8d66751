# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Parts of a layer that keep less for the backward pass: what is cheap to compute from what is kept is not kept.

Normed tokens, activations of the MLP and branches before LayerScale are half of what a layer keeps, and computing them
again takes no product of matrices. Results and gradients are those of the plain modules but for rounding.

What is kept are parameters themselves and never copies of them in another type or scaled: FSDP2 frees the storage of
whole parameters between the forward and the backward pass, and would not free that of copies.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks_of_all
from transformers.activations import GELUActivation

from ..modeling_vitreg import ViTRegMLP, ViTRegSwiGLUFFN


PLAIN = (nn.Linear, nn.LayerNorm, GELUActivation, ViTRegMLP, ViTRegSwiGLUFFN)


def are_plain(*modules: nn.Module) -> bool:
    """Whether calling these modules runs their own code alone, so that functions of their parameters can replace them.

    Adapters and sharding change a module's class; hooks may read or replace what goes in and out.
    """
    watched = hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks
    return not (watched or hooks_of_all._global_backward_hooks or hooks_of_all._global_backward_pre_hooks) and all(
        type(module) in PLAIN
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        for module in modules
    )


def can_recompute(norm: nn.LayerNorm, tokens: torch.Tensor) -> bool:
    """Whether `normed_linears` computes what the norm would, of tokens of this type."""
    return are_plain(norm) and norm.weight is not None and norm.weight.dtype == tokens.dtype


def can_scale(layer: nn.Linear, scale: torch.Tensor | None) -> bool:
    """Whether `activated_linear` computes what the layer would; a weight times 1e-5 is no float16."""
    return are_plain(layer) and (scale is None or product_dtype(layer.weight) != torch.float16)


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """What products with a weight are computed in."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def normed_linears(tokens: torch.Tensor, norm: nn.LayerNorm, *layers: nn.Linear) -> tuple[torch.Tensor, ...]:
    """`layer(norm(tokens))` of each layer, keeping the tokens and not their norm.

    Args:
        tokens: `(..., hidden_size)`, of the type of the norm's parameters.
        norm: Its parameters are in the gradient.
        layers: With or without bias.
    """
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    dtype = product_dtype(layers[0].weight)
    return _NormedLinears.apply(tokens, norm.weight, norm.bias, norm.eps, dtype, *parameters)


def activated_linear(
    activation: str, hidden: tuple[torch.Tensor, ...], layer: nn.Linear, scale: torch.Tensor | None
) -> torch.Tensor:
    """`scale * layer(activation(*hidden))`, keeping what goes in alone.

    Args:
        activation: Key of `ACTIVATIONS`.
        hidden: Its arguments, `(..., in_features)`.
        layer: With or without bias.
        scale: LayerScale, `(out_features,)`, or `None`. It is multiplied into the weight, and its gradient comes from
            that of the weight: neither needs what the layer returns.
    """
    return _ActivatedLinear.apply(activation, product_dtype(layer.weight), layer.weight, layer.bias, scale, *hidden)


def add_to_rows(tokens: torch.Tensor, rows: torch.Tensor, branch: torch.Tensor, alpha: float) -> torch.Tensor:
    """`tokens.index_add(0, rows, branch, alpha=alpha)`, which would keep the branch for nothing but its shape."""
    return _AddToRows.apply(tokens, rows, branch, alpha)


class Activation(NamedTuple):
    """A function of tensors, and what makes gradients of its arguments from that of its result and from them."""

    value: Callable[..., torch.Tensor]
    gradients: Callable[..., tuple[torch.Tensor, ...]]


def _swiglu_gradients(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


ACTIVATIONS = {
    "none": Activation(lambda hidden: hidden, lambda gradient, hidden: (gradient,)),
    "gelu": Activation(F.gelu, lambda gradient, hidden: (torch.ops.aten.gelu_backward(gradient, hidden),)),
    "swiglu": Activation(lambda gate, up: F.silu(gate).mul_(up), _swiglu_gradients),
}


class _NormedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens, scale, shift, eps, dtype, *parameters):
        ctx.save_for_backward(tokens, scale, shift, *parameters)
        ctx.eps, ctx.dtype = eps, dtype
        normed = torch.native_layer_norm(tokens, tokens.shape[-1:], scale, shift, eps)[0].to(dtype)
        return tuple(_linear(normed, *parameters[i : i + 2]) for i in range(0, len(parameters), 2))

    @staticmethod
    def backward(ctx: Any, *gradients):
        tokens, scale, shift, *parameters = ctx.saved_tensors
        normed, mean, inverse = torch.native_layer_norm(tokens, tokens.shape[-1:], scale, shift, ctx.eps)
        rows = normed.to(ctx.dtype).flatten(0, -2)
        of_rows, of_parameters = None, []
        for i, gradient in enumerate(gradients):
            gradient = gradient.flatten(0, -2)
            needed = ctx.needs_input_grad[5 + 2 * i : 7 + 2 * i]
            weight = parameters[2 * i].to(ctx.dtype)
            of_parameters += _parameter_gradients(gradient, rows, *needed)
            of_rows = gradient @ weight if of_rows is None else of_rows.addmm_(gradient, weight)
        of_normed = of_rows.view_as(tokens).to(tokens.dtype)
        sizes, needed = tokens.shape[-1:], list(ctx.needs_input_grad[:3])
        of_norm = torch.ops.aten.native_layer_norm_backward(
            of_normed, tokens, sizes, mean, inverse, scale, shift, needed
        )
        return *of_norm, None, None, *of_parameters


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation, dtype, weight, bias, scale, *hidden):
        ctx.save_for_backward(weight, bias, scale, *hidden)
        ctx.activation, ctx.dtype = activation, dtype
        activated = ACTIVATIONS[activation].value(*hidden).to(dtype)
        if scale is None:
            return _linear(activated, weight, bias)
        return _linear(activated, weight * scale[:, None], None if bias is None else bias * scale)

    @staticmethod
    def backward(ctx: Any, gradient):
        weight, bias, scale, *hidden = ctx.saved_tensors
        activation, needed = ACTIVATIONS[ctx.activation], ctx.needs_input_grad[2:5]
        rows = gradient.flatten(0, -2)
        activated = activation.value(*hidden).to(ctx.dtype).flatten(0, -2)
        of_weight, of_bias = _parameter_gradients(
            rows, activated, needed[0] or needed[2], bias is not None and (needed[1] or needed[2])
        )
        of_scale, scaled = None, weight
        if scale is not None:
            # result = (scale * weight) x: one gradient of the product serves both of its factors
            if needed[2]:
                of_scale = (of_weight * weight).sum(dim=1)
                of_scale = of_scale if bias is None else of_scale.addcmul_(of_bias, bias)
            of_weight = of_weight * scale[:, None] if needed[0] else None
            of_bias = of_bias * scale if needed[1] else None
            scaled = weight * scale[:, None]
        of_activated = (rows @ scaled.to(ctx.dtype)).view_as(hidden[0])
        return None, None, of_weight, of_bias, of_scale, *activation.gradients(of_activated, *hidden)


class _AddToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens, rows, branch, alpha):
        ctx.save_for_backward(rows)
        ctx.alpha, ctx.dtype = alpha, branch.dtype
        return tokens.index_add(0, rows, branch.to(tokens.dtype), alpha=alpha)

    @staticmethod
    def backward(ctx: Any, gradient):
        (rows,) = ctx.saved_tensors
        return gradient, None, gradient.index_select(0, rows).mul_(ctx.alpha).to(ctx.dtype), None


def _linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In the type of the rows. Autocast's own copies would be kept, and without a gradient to the weight."""
    return F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))


def _parameter_gradients(
    gradient: torch.Tensor, rows: torch.Tensor, of_weight: bool, of_bias: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of a linear layer's weight and bias, each where it is asked for."""
    return gradient.mT @ rows if of_weight else None, gradient.sum(dim=0) if of_bias else None
