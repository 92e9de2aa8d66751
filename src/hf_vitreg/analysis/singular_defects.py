# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Where artifacts point, by the weights alone: singular defects ("SINDER", Wang et al., ECCV 2024, arXiv:2407.16826).

Every layer is replaced by a linear map. The product of these maps up to a layer stretches nearly every token in one
direction, the leading left singular vector, and that is where the artifacts of that layer point.
"""

from collections.abc import Callable
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import nn

from ..features import VisionEncoder
from .accumulate import in_float64, require_finite


# A normal variable on a grid: beyond 8 there is a share of 1e-15. Of functions as smooth as GELU of a pre-activation
# with a standard deviation of 10 or less the error is that of rounding; of ReLU, which has a kink, it is 1e-5.
GRID_END, GRID_SIZE = 8.0, 1001
UNITS_AT_ONCE = 1024  # of the MLP: 8 MB of activations on the grid


@dataclass(frozen=True, eq=False)
class SingularDefects:
    """The singular defects of a model, one a layer.

    Attributes:
        directions: Unit vectors after each layer, `(num_layers, hidden_size)`, float64. They are lines: the sign is
            such that the largest entry is positive.
        log10_singular_values: Of the product of the maps, base-10 logarithms of the largest and the second singular
            value, `(num_layers, 2)`, float64. (After many layers the values themselves can be beyond any float.)
    """

    directions: torch.Tensor
    log10_singular_values: torch.Tensor

    @property
    def dominance(self) -> torch.Tensor:
        """The largest singular value over the second, `(num_layers,)`: at 1 the direction is chance."""
        return 10 ** (self.log10_singular_values[:, 0] - self.log10_singular_values[:, 1])

    def cosines(self, layer: int) -> torch.Tensor:
        """|cos| of the directions of all layers with that of one, counted from 0 or from the end, `(num_layers,)`."""
        return (self.directions @ self.directions[layer]).abs().clamp(max=1)


@torch.no_grad()
def singular_defects(encoder: VisionEncoder) -> SingularDefects:
    """The direction that the artifacts of each layer should have, from the weights alone.

    With the maps of `attention_map` and `mlp_map`

    ```
    product_0 = I
    product_l = mlp_map_l @ attention_map_l @ product_(l - 1)
    direction_l = leading left singular vector of product_l
    ```

    Everything is in float64 on the CPU. It takes 0.5 s of one core for ViT-S, 2.6 s for ViT-B and 11 s for ViT-L, and
    memory for a few float64 matrices of the size of an MLP.

    Args:
        encoder: Of a ViTReg.

    Raises:
        ValueError: where the model is none, or a weight is not finite.

    Source: arXiv:2407.16826, section 3.
    """
    layers = vitreg_layers(encoder)
    product = torch.eye(encoder.hidden_size, dtype=torch.float64)
    log10_scale, directions, values = 0.0, [], []
    for index, layer in enumerate(layers):
        product = mlp_map(layer) @ (attention_map(layer) @ product)
        require_finite(product, f"The weights of layer {index + 1}, multiplied,")
        # the length is kept apart, which grows from layer to layer
        scale = torch.linalg.matrix_norm(product)
        product, log10_scale = product / scale, log10_scale + scale.log10()
        direction, two_values = _leading(product)
        directions.append(direction)
        values.append(two_values.log10() + log10_scale)
    return SingularDefects(torch.stack(directions), torch.stack(values))


def vitreg_layers(encoder: VisionEncoder) -> nn.ModuleList:
    """The layers of a ViTReg. Raises `ValueError` for any other model, with how to make it one."""
    if encoder.source != "vitreg":
        raise ValueError(
            f"The weights of {encoder.name} are those of {encoder.source}; singular defects are computed of ViTReg "
            "alone. Convert it first, which changes no number: python conversion/convert.py, see its --help."
        )
    return encoder.model.encoder.layer


def attention_map(layer: nn.Module) -> torch.Tensor:
    """A layer's attention as a linear map where every token attends to itself, `(hidden_size, hidden_size)`, float64.

    ```
    I + diag(layer scale) @ W_output @ W_value @ diag(norm weight) @ (I - 1/d)
    ```

    Biases are left out, and so is the norm's division by the standard deviation of the token. Where all tokens are
    alike, it does not matter which of them one attends to.
    """
    attention = layer.attention
    mixed = in_float64(attention.o_proj.weight).cpu() @ in_float64(attention.v_proj.weight).cpu()
    return _with_residual(mixed, layer.norm1, layer.residual1)


def mlp_map(layer: nn.Module) -> torch.Tensor:
    """A layer's MLP as the linear map that is nearest to it, `(hidden_size, hidden_size)`, float64.

    ```
    I + diag(layer scale) @ W_down @ gaussian_fit @ diag(norm weight) @ (I - 1/d)
    ```

    where `gaussian_fit` maps what is normed to the hidden units, whose biases are the only ones that count.
    """
    mlp = layer.mlp
    if hasattr(mlp, "gate_proj"):
        fitted, down = gated_gaussian_fit(nn.functional.silu, mlp.gate_proj, mlp.up_proj), mlp.down_proj
    else:
        fitted, down = gaussian_fit(mlp.activation_fn, mlp.fc1), mlp.fc2
    shift = getattr(mlp, "shift", None)
    if shift is not None:
        # register neurons of a model with test-time registers: patches get 0 of them
        fitted[shift.neurons.cpu()] = 0
    return _with_residual(in_float64(down.weight).cpu() @ fitted, layer.norm2, layer.residual2)


def gaussian_fit(activation: Callable[[torch.Tensor], torch.Tensor], up: nn.Linear) -> torch.Tensor:
    """The linear map that is nearest to `activation(up(x))` by least squares, where x is standard normal.

    The published code draws 100,000 x and solves for the map. Here is what that converges to with their number: the
    map is `E[activation(up(x)) x^T]`, every pre-activation is normal too, and one integral a unit is left,

    ```
    row_j = w_j E[activation(b_j + s_j z) z] / s_j        z ~ N(0, 1), s_j = |w_j|
    ```

    Args:
        activation: Of single numbers.
        up: `(hidden_size) -> (intermediate_size)`

    Returns:
        `(intermediate_size, hidden_size)`, float64.
    """
    weight, bias, std = _pre_activation(up)
    first = _moments(activation, bias, std)[:, 1]
    return weight * (first / std)[:, None]


def gated_gaussian_fit(
    activation: Callable[[torch.Tensor], torch.Tensor], gate: nn.Linear, up: nn.Linear
) -> torch.Tensor:
    """As `gaussian_fit` of `activation(gate(x)) * up(x)`, as SwiGLU has it.

    With weights g and u, biases a and b of a unit, `s = |g|` and Stein's lemma

    ```
    row = g E[activation(a + s z) (b z + g.u / s (z^2 - 1))] / s + u E[activation(a + s z)]
    ```
    """
    gate_weight, gate_bias, std = _pre_activation(gate)
    up_weight, up_bias, _ = _pre_activation(up)
    mean, first, second = _moments(activation, gate_bias, std).unbind(1)
    shared = (gate_weight * up_weight).sum(1) / std
    return gate_weight * ((up_bias * first + shared * (second - mean)) / std)[:, None] + up_weight * mean[:, None]


def _pre_activation(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, bias and the standard deviation of every unit for standard normal inputs, in float64 on the CPU."""
    weight = in_float64(linear.weight).cpu()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else in_float64(linear.bias).cpu()
    # a unit without weights has no direction: any other than 0 serves to divide by
    std = weight.norm(dim=1)
    return weight, bias, torch.where(std > 0, std, 1)


def _moments(
    activation: Callable[[torch.Tensor], torch.Tensor], bias: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """Means of `activation(bias + std z)` times 1, z and z^2 for standard normal z, `(units, 3)`."""
    grid = torch.linspace(-GRID_END, GRID_END, GRID_SIZE, dtype=torch.float64)
    weights = torch.exp(-grid.square() / 2)
    weights = torch.stack([weights, weights * grid, weights * grid.square()], dim=1) / weights.sum()
    parts = zip(bias.split(UNITS_AT_ONCE), std.split(UNITS_AT_ONCE))
    return torch.cat([activation(torch.addcmul(b[:, None], s[:, None], grid)) @ weights for b, s in parts])


def _with_residual(branch: torch.Tensor, norm: nn.LayerNorm, residual: nn.Module) -> torch.Tensor:
    """`I + diag(layer scale) @ branch @ diag(norm weight) @ (I - 1/d)`; overwrites nothing of the model."""
    branch = branch * in_float64(norm.weight).cpu()
    branch -= branch.mean(dim=1, keepdim=True)
    if residual.lambda1 is not None:
        branch *= in_float64(residual.lambda1).cpu()[:, None]
    branch.diagonal().add_(1)
    return branch


def _leading(product: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Leading left singular vector, and the two largest singular values.

    By the two last eigenvectors of the matrix times its transpose, in an eighth of the time of a decomposition. What
    squaring costs in precision falls on small singular values: the second is exact to 1e-4 where the first is a
    million times as large.
    """
    size = len(product)
    squares, vectors = scipy.linalg.eigh((product @ product.T).numpy(), subset_by_index=[size - 2, size - 1])
    direction = torch.from_numpy(vectors[:, 1].copy())
    direction = direction * direction[direction.abs().argmax()].sign()
    return direction, torch.tensor([squares[1], squares[0]]).clamp(min=0).sqrt()
