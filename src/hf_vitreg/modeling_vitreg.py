# Copyright 2026 The ViTReg team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""ViTReg: the vision transformer with register tokens (Darcet et al., ICLR 2024).

One token order everywhere: `[CLS, REG_1 .. REG_N, patches]`; a distillation token (DeiT) stands between CLS and the
registers, and CLS may be absent. Registers are left out of every mean and every feature map.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN, GELUActivation
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutput,
    BaseModelOutputWithPooling,
    DepthEstimatorOutput,
    ImageClassifierOutput,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import (
    capture_outputs,
    maybe_install_capturing_hooks,
    resolve_hidden_states_indices,
    selected_hidden_states,
)

from .configuration_vitreg import ViTRegConfig


@auto_docstring(
    custom_intro="""
    Output of [`ViTRegModel`], every token under its own name.
    """
)
@dataclass
class ViTRegModelOutput(BaseModelOutputWithPooling):
    r"""
    last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
        All tokens after the final norm: CLS, `num_register_tokens` registers, patches.
    pooler_output (`torch.FloatTensor` of shape `(batch_size, hidden_size)`):
        CLS after the final norm, or the patches pooled as `config.pooler_type` says. `None` without a pooling layer.
    register_tokens (`torch.FloatTensor` of shape `(batch_size, num_register_tokens, hidden_size)`):
        The registers after the final norm.
    patch_tokens (`torch.FloatTensor` of shape `(batch_size, num_patches, hidden_size)`):
        The patches after the final norm, row by row.
    image_embeds (`torch.FloatTensor` of shape `(batch_size, projection_dim)`, *optional*):
        The projected `pooler_output`. Returned where the config has a `projection_dim`.
    """

    # after the inherited fields, so that output[0] and output[1] are what they are in every transformers model
    register_tokens: torch.FloatTensor | None = None
    patch_tokens: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None


@auto_docstring(
    custom_intro="""
    Output of [`ViTRegBackbone`].
    """
)
@dataclass
class ViTRegBackboneOutput(BackboneOutput):
    r"""
    cls_tokens (`tuple(torch.FloatTensor)`, *optional*):
        CLS of each selected stage, `(batch_size, hidden_size)`. Returned when `return_prefix_tokens=True`.
    register_tokens (`tuple(torch.FloatTensor)`, *optional*):
        Registers of each selected stage, `(batch_size, num_register_tokens, hidden_size)`. Returned likewise.
    """

    cls_tokens: tuple[torch.FloatTensor, ...] | None = None
    register_tokens: tuple[torch.FloatTensor, ...] | None = None


def _layer_norm(config: ViTRegConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class ViTRegPatchEmbeddings(nn.Module):
    """Linear map of every patch.

    `(batch_size, num_channels, height, width) -> (batch_size, rows * cols, hidden_size)`
    """

    def __init__(self, config: ViTRegConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.projection = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=config.patch_bias,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self._check(pixel_values)
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        return self.projection(pixel_values).flatten(2).transpose(1, 2)

    def _check(self, pixel_values: torch.Tensor):
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values must have shape (batch_size, {self.num_channels}, height, width), got "
                f"{tuple(pixel_values.shape)}. The number of channels is `num_channels` of the config."
            )
        # An exported program serves sizes that are not known here. Asking for multiples would refuse all dynamic
        # dimensions but those declared as such, so the program drops the pixels that fill no patch.
        if torch.compiler.is_exporting():
            return
        for side, pixels in zip(("height", "width"), pixel_values.shape[2:]):
            if pixels % self.patch_size or pixels == 0:
                below = pixels // self.patch_size * self.patch_size
                nearest = f"{below} or {below + self.patch_size}" if below else f"{self.patch_size}"
                raise ValueError(
                    f"pixel_values have a {side} of {pixels} pixels, which is no multiple of the patch size "
                    f"{self.patch_size}. The nearest that is: {nearest}. Resize or crop the images."
                )


class ViTRegEmbeddings(nn.Module):
    """Patches, CLS, distillation token, registers, mask token and the learned position embeddings."""

    def __init__(self, config: ViTRegConfig):
        super().__init__()
        rows, cols = config.grid_size
        self.config = config
        self.grid_size = config.grid_size
        self.patch_size = config.patch_size
        # CODEPATH: SigLIP and timm's `gap` models have no CLS token
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if config.use_cls_token else None
        self.distillation_token = None
        # CODEPATH: DeiT learns from a teacher through a token of its own
        if config.use_distillation_token:
            self.distillation_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.register_tokens = None
        num_trained_registers = config.num_register_tokens - config.num_test_time_registers
        # CODEPATH: DINOv2, DeiT-III and OpenCLIP were published without registers first
        if num_trained_registers > 0:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_trained_registers, config.hidden_size))
        # A parameter that no forward uses stops distributed training, hence the switch.
        # CODEPATH: self-supervised pretraining (DINOv2) masks patches, classifiers do not
        self.mask_token = nn.Parameter(torch.zeros(1, config.hidden_size)) if config.use_mask_token else None
        self.patch_embeddings = ViTRegPatchEmbeddings(config)
        self.position_embeddings = None
        # CODEPATH: DINOv3 rotates queries and keys in its attention
        if config.position_embedding_type != "rope":
            num_positions = config.num_prefix_positions + rows * cols
            self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))
        # CODEPATH: OpenCLIP normalizes what enters its first layer
        self.pre_layernorm = _layer_norm(config) if config.use_pre_layernorm else nn.Identity()
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        patches = self._mask(self.patch_embeddings(pixel_values), bool_masked_pos)
        prefix = [self.cls_token, self.distillation_token, self.register_tokens]
        prefix = [tokens for tokens in prefix if tokens is not None]
        weight = self.patch_embeddings.projection.weight
        # CODEPATH: test-time registers (Jiang et al., 2025) are zeros
        if self.config.num_test_time_registers > 0:
            prefix.append(weight.new_zeros(1, self.config.num_test_time_registers, patches.shape[-1]))
        prefix = torch.cat(prefix, dim=1) if prefix else weight.new_empty(1, 0, patches.shape[-1])
        tokens = [prefix, patches]
        if self.position_embeddings is not None:
            prefix_positions, patch_positions = self.interpolated_position_embeddings(
                *(pixels // self.patch_size for pixels in pixel_values.shape[2:])
            )
            with_position, without = prefix.tensor_split([prefix_positions.shape[1]], dim=1)
            tokens = [with_position + prefix_positions, without, patches + patch_positions]
        # of the dtype of the parameters: under autocast float32, and the residual stream with it
        tokens = torch.cat([each.expand(patches.shape[0], -1, -1) for each in tokens], dim=1)
        return self.dropout(self.pre_layernorm(tokens))

    def _mask(self, patches: torch.Tensor, bool_masked_pos: torch.Tensor | None) -> torch.Tensor:
        """Puts the mask token in the place of the patches where `bool_masked_pos` is true."""
        if bool_masked_pos is not None and self.mask_token is None:
            raise ValueError("bool_masked_pos needs a mask token: set use_mask_token=True in the config.")
        if bool_masked_pos is not None:
            if bool_masked_pos.shape != patches.shape[:2]:
                raise ValueError(
                    f"bool_masked_pos must have shape {tuple(patches.shape[:2])}, (batch_size, num_patches), got "
                    f"{tuple(bool_masked_pos.shape)}."
                )
            mask_token = self.mask_token.to(patches.dtype)
            return torch.where(bool_masked_pos.to(torch.bool).unsqueeze(-1), mask_token, patches)
        if self.mask_token is not None and self.training:
            # keeps the mask token in the graph of a step that masks nothing: distributed training needs its gradient
            return patches + 0 * self.mask_token.to(patches.dtype)
        return patches

    def interpolated_position_embeddings(self, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Position embeddings of the prefix, `(1, num_prefix_positions, hidden_size)`, and of a patch grid,
        `(1, rows * cols, hidden_size)`.

        Bicubic, in float32, with the two conventions of DINOv2: to a size (`interpolate_offset` 0, models with
        registers) or by scale factors with an offset (0.1, models without). The grid of the config is returned as it
        is.
        """
        num_prefix_positions = self.config.num_prefix_positions
        prefix_positions = self.position_embeddings[:, :num_prefix_positions]
        patch_positions = self.position_embeddings[:, num_prefix_positions:]
        if not torch.compiler.is_exporting() and (rows, cols) == self.grid_size:
            return prefix_positions, patch_positions
        # (1, base_rows * base_cols, hidden_size) -> (1, hidden_size, base_rows, base_cols)
        grid = patch_positions.float().unflatten(1, self.grid_size).permute(0, 3, 1, 2)
        offset, antialias = self.config.interpolate_offset, self.config.interpolate_antialias
        # An exported program has no sizes as Python numbers, and ONNX no antialiased bicubic that is torch's.
        # CODEPATH: DINOv2 with registers interpolates to a size, DINOv2 without by scale factors
        if offset == 0 and not torch.compiler.is_exporting():
            grid = nn.functional.interpolate(grid, size=(rows, cols), mode="bicubic", antialias=antialias)
        # antialiased scale factors have no symbolic form: their export keeps one size, and torch.export says so
        elif offset == 0 or (torch.compiler.is_compiling() and not antialias):
            grid = _interpolate_symbolic(grid, rows, cols, offset, antialias)
        else:
            scale = tuple((new + offset) / base for new, base in zip((rows, cols), self.grid_size))
            grid = nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
        return prefix_positions, grid.permute(0, 2, 3, 1).flatten(1, 2).to(patch_positions.dtype)


def _interpolate_symbolic(grid: torch.Tensor, rows: int, cols: int, offset: float, antialias: bool) -> torch.Tensor:
    """Bicubic `interpolate(grid, scale_factor=((rows + offset) / base_rows, ..))` for symbolic rows and cols.

    Two products with matrices, so that nothing but arithmetic is left in a traced program. `interpolate` takes its
    factors as Python numbers, which fixes the program to one size; here they are tensors. At the base grid the factor
    is 1, as in DINOv2.
    """
    base = torch.tensor(grid.shape[-2:], device=grid.device)
    indices = [torch.arange(size, device=grid.device) for size in (rows, cols)]
    sizes = torch.stack([index[-1] for index in indices]) + 1
    spacings = base / (sizes + offset * (sizes != base).any())
    row_weights, col_weights = (
        _cubic_weights(spacing * (index + 0.5), cells, spacing if antialias else None)
        for index, spacing, cells in zip(indices, spacings, grid.shape[-2:])
    )
    padded = grid[0] if antialias else nn.functional.pad(grid[0], (2, 2, 2, 2), mode="replicate")
    return (row_weights @ (padded @ col_weights.mT))[None]


def _cubic_weights(centres: torch.Tensor, num_cells: int, spacing: torch.Tensor | None) -> torch.Tensor:
    """Cubic convolution (Keys, 1981) as a matrix: of shape `(len(centres), num_cells)`, or `num_cells + 4`.

    Centres are in units of cells, the first of which begins at 0. Antialiased (a = -0.5), the kernel is as wide as
    their `spacing` where that is more than a cell, and cut off at the border. Without `spacing` (a = -0.75) two cells
    are added at both ends.
    """
    a, border = (-0.75, 2) if spacing is None else (-0.5, 0)
    cells = torch.arange(-border, num_cells + border, device=centres.device)
    # in the order in which torch rounds
    distance = (cells - centres[:, None] + 0.5).abs()
    if spacing is not None:
        distance = distance / spacing.clamp(min=1)
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * a
    weights = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0))
    return weights if spacing is None else weights / weights.sum(dim=1, keepdim=True)


class ViTRegRotaryEmbeddings(nn.Module):
    """Two-dimensional RoPE as in DINOv3: the angles of every patch, from its coordinates and the stored periods.

    Of the `head_dim` channels a quarter turns with the row and a quarter with the column, each in pairs that lie half
    a head apart. The tokens before the patches are not turned.
    """

    periods: torch.Tensor

    def __init__(self, config: ViTRegConfig):
        super().__init__()
        self.config = config
        head_dim = config.hidden_size // config.num_attention_heads
        if head_dim % 4:
            raise ValueError(
                f'position_embedding_type="rope" needs heads of a multiple of 4 channels, got {head_dim}.'
            )
        # stored with the weights: published ones are rounded to bfloat16, which no formula gives back
        self.periods = nn.Buffer(torch.empty(head_dim // 4, dtype=torch.float32))

    def initial_periods(self) -> torch.Tensor:
        """`rope_theta ** (2 i / (head_dim / 2))`, `(head_dim / 4,)`"""
        num_periods = self.periods.shape[0]
        exponents = 2 * torch.arange(num_periods, dtype=torch.float32, device=self.periods.device) / (2 * num_periods)
        return self.config.rope_theta**exponents

    def forward(self, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines in float32, `(num_prefix_tokens + rows * cols, head_dim)` each."""
        sides = {"separate": (rows, cols), "max": (max(rows, cols),) * 2, "min": (min(rows, cols),) * 2}
        periods = self.periods.float()
        # (rows * cols, 2), from -1 to 1
        axes = [
            2 * (torch.arange(size, dtype=torch.float32, device=periods.device) + 0.5) / side - 1
            for size, side in zip((rows, cols), sides[self.config.rope_normalize_coords])
        ]
        coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        if self.training:
            coordinates = self._augment(coordinates)
        angles = (2 * math.pi * coordinates[:, :, None] / periods).flatten(1).tile(2)
        # an angle of 0 leaves the prefix as it is
        angles = nn.functional.pad(angles, (0, 0, self.config.num_prefix_tokens, 0))
        return angles.cos(), angles.sin()

    def _augment(self, coordinates: torch.Tensor) -> torch.Tensor:
        """Other coordinates in every training step, so that a model learns to be used at other sizes."""
        config = self.config
        # CODEPATH: DINOv3 was trained with one of these, `pos_embed_rescale`
        if config.pos_embed_shift is not None:
            shift = coordinates.new_empty(2).uniform_(-config.pos_embed_shift, config.pos_embed_shift)
            coordinates = coordinates + shift
        for largest, number in ((config.pos_embed_jitter, 2), (config.pos_embed_rescale, 1)):
            if largest is not None:
                logarithm = math.log(largest)
                coordinates = coordinates * coordinates.new_empty(number).uniform_(-logarithm, logarithm).exp()
        return coordinates


def _normed_and_rotated(
    heads: torch.Tensor, norm: nn.LayerNorm | None, rotation: tuple[torch.Tensor, torch.Tensor] | None
) -> torch.Tensor:
    """Queries or keys, `(batch_size, num_heads, tokens, head_dim)`, as they meet, in the dtype of the values.

    The rotation turns pairs of channels by their tokens' angles, in float32.
    """
    dtype = heads.dtype
    if norm is not None:
        heads = norm(heads)
    if rotation is not None:
        cosines, sines = rotation
        first, second = heads.chunk(2, dim=-1)
        heads = heads * cosines + torch.cat([-second, first], dim=-1) * sines
    return heads.to(dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its formula, in the signature of transformers' attention interface."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ViTRegAttention(nn.Module):
    """Multi-head self-attention through transformers' attention interface."""

    def __init__(self, config: ViTRegConfig):
        super().__init__()
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"hidden_size {config.hidden_size} must be a multiple of num_attention_heads "
                f"{config.num_attention_heads}."
            )
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        key_bias = config.qkv_bias and config.key_bias
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=key_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.q_norm = self.k_norm = None
        # CODEPATH: some timm models normalize queries and keys
        if config.use_qk_norm:
            self.q_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
            self.k_norm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.proj_bias)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """`(batch_size, tokens, hidden_size) -> (batch_size, num_heads, tokens, head_dim)`"""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        projected = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        attention_output, weights = self.attend(*projected, position_embeddings, **kwargs)
        return self.o_proj(attention_output), weights

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is between the projections, each `(batch_size, tokens, hidden_size)` as the output is."""
        # kept from the attention functions: those that cannot return weights would warn and return none
        output_attentions = kwargs.pop("output_attentions", self.config.output_attentions)
        query = _normed_and_rotated(self._heads(query), self.q_norm, position_embeddings)
        key = _normed_and_rotated(self._heads(key), self.k_norm, position_embeddings)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attention_output, weights = attention_interface(
            self,
            query,
            key,
            self._heads(value),
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        if not output_attentions:
            weights = None
        elif weights is None or weights.ndim != 4:
            # sdpa and flash return none, flex attention on a GPU the (batch_size, num_heads, tokens) normalizers
            weights = self._weights(query, key)
        return attention_output.flatten(-2), weights

    def rows(
        self,
        hidden_states: torch.Tensor,
        query_tokens: slice,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of some tokens to all: `(batch_size, num_heads, num_queries, tokens)`, rows sum to 1."""
        rotation = position_embeddings and tuple(angles[query_tokens] for angles in position_embeddings)
        query = _normed_and_rotated(self._heads(self.q_proj(hidden_states[:, query_tokens])), self.q_norm, rotation)
        key = _normed_and_rotated(self._heads(self.k_proj(hidden_states)), self.k_norm, position_embeddings)
        return self._weights(query, key)

    def _weights(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.matmul(query, key.transpose(2, 3)).mul(self.scaling).softmax(dim=-1)


def _may_overwrite(producer: nn.Module) -> bool:
    """Whether the output of `producer` is nobody else's: no autograd and no forward hook will read it later.

    The widest tensors of the model are then allocated once instead of twice, 6 % of a forward on a CPU.
    """
    watched = producer._forward_hooks or torch.nn.modules.module._global_forward_hooks
    return type(producer) is nn.Linear and not torch.is_grad_enabled() and not watched


class ViTRegNeuronShift(nn.Module):
    """Shifts register neurons from the patches to the test-time registers (Jiang et al., 2025, algorithm 2).

    A test-time register receives of each neuron the activation of the largest magnitude, with its sign, over all
    tokens of its image; with `reduce="layer"` of all neurons the one that is largest among them. The patches get 0.
    What stands before the test-time registers keeps what it has: the published code leaves CLS alone, and a
    distillation token and trained registers, which its models have not, are like CLS no part of the image that an
    artifact could hide.

    `(batch_size, tokens, num_channels) -> (batch_size, tokens, num_channels)`

    Args:
        neurons (`Sequence[int]`):
            The channels.
        num_kept (`int`):
            Number of tokens before the test-time registers.
        num_registers (`int`):
            Number of test-time registers, after which the patches begin.
        reduce (`str`):
            `"neuron"` or `"layer"`.
    """

    neurons: torch.Tensor

    def __init__(self, neurons: Sequence[int], num_kept: int, num_registers: int, reduce: str):
        super().__init__()
        self.num_kept = num_kept
        self.num_registers = num_registers
        self.reduced_axes = (1,) if reduce == "neuron" else (1, 2)
        self.initial_neurons = tuple(neurons)
        # the config has them, so they are not stored with the weights
        self.neurons = nn.Buffer(torch.tensor(self.initial_neurons), persistent=False)

    def forward(self, activations: torch.Tensor, may_overwrite: bool = False) -> torch.Tensor:
        if activations.ndim != 3:
            raise ValueError(
                "Test-time registers need all tokens of an image together, (batch_size, tokens, channels), got "
                f"{tuple(activations.shape)}. Do not pack images or pick tokens in a layer with register neurons."
            )
        chosen = activations.index_select(-1, self.neurons)
        kept, _, patches = chosen.tensor_split([self.num_kept, self.num_kept + self.num_registers], dim=1)
        high, low = chosen.amax(self.reduced_axes, keepdim=True), chosen.amin(self.reduced_axes, keepdim=True)
        largest = torch.where(high > -low, high, low).expand(-1, self.num_registers, chosen.shape[-1])
        shifted = torch.cat([kept, largest, torch.zeros_like(patches)], dim=1)
        # not where autograd may have kept them, which some activations ask for
        if may_overwrite:
            return activations.index_copy_(-1, self.neurons, shifted)
        return activations.index_copy(-1, self.neurons, shifted)

    def extra_repr(self) -> str:
        return f"num_neurons={len(self.initial_neurons)}, num_registers={self.num_registers}"


def neuron_shift(config: ViTRegConfig, layer_idx: int | None) -> ViTRegNeuronShift | None:
    """Of a layer, counted from 0; `None` where none of its neurons is shifted."""
    neurons = (config.register_neurons or {}).get(layer_idx)
    if not neurons:
        return None
    number = config.num_test_time_registers
    return ViTRegNeuronShift(neurons, config.num_prefix_tokens - number, number, config.register_neuron_reduce)


class ViTRegMLP(nn.Module):
    def __init__(self, config: ViTRegConfig, layer_idx: int | None = None):
        super().__init__()
        self.shift = neuron_shift(config, layer_idx)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)
        activation_fn = self.activation_fn
        hooked = activation_fn._forward_hooks or activation_fn._forward_pre_hooks
        may_overwrite = not hooked and _may_overwrite(self.fc1)
        if type(activation_fn) is GELUActivation and may_overwrite:
            hidden_states = torch.ops.aten.gelu_(hidden_states)
        else:
            hidden_states = activation_fn(hidden_states)
        # CODEPATH: layers with register neurons of a model with test-time registers
        if self.shift is not None:
            hidden_states = self.shift(hidden_states, may_overwrite)
        return self.fc2(hidden_states)


class ViTRegSwiGLUFFN(nn.Module):
    def __init__(self, config: ViTRegConfig, layer_idx: int | None = None):
        super().__init__()
        self.shift = neuron_shift(config, layer_idx)
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        may_overwrite = _may_overwrite(self.gate_proj)
        if may_overwrite:
            hidden_states = nn.functional.silu(gate, inplace=True).mul_(up)
        else:
            hidden_states = nn.functional.silu(gate) * up
        # CODEPATH: layers with register neurons of a model with test-time registers
        if self.shift is not None:
            hidden_states = self.shift(hidden_states, may_overwrite)
        return self.down_proj(hidden_states)


class ViTRegResidual(nn.Module):
    """Adds a branch to its residual, through LayerScale and stochastic depth where the model has them.

    LayerScale (Touvron et al., 2021) scales every channel by a learned factor. Stochastic depth (Huang et al., 2016)
    drops the branch of whole samples in training and scales the others up.
    """

    def __init__(self, config: ViTRegConfig, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob
        # CODEPATH: DINOv2 and DeiT-III have LayerScale, the original ViT has none
        self.lambda1 = None if config.layerscale_value is None else nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, residual: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        if self.training and self.drop_prob > 0:
            keep_prob = 1 - self.drop_prob
            branch = branch * branch.new_empty(branch.shape[0], 1, 1).bernoulli_(keep_prob).div_(keep_prob)
        if self.lambda1 is None:
            return residual + branch
        # one pass over memory where a product and a sum would take two
        return torch.addcmul(residual, branch, self.lambda1)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}, layer_scale={self.lambda1 is not None}"


class ViTRegLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block: attention, then MLP, each added through LayerScale and stochastic depth."""

    def __init__(self, config: ViTRegConfig, layer_idx: int):
        super().__init__()
        drop_prob = config.drop_path_rate
        # CODEPATH: DINOv2 and DeiT-III are "uniform", most timm recipes "linear"
        if config.drop_path_schedule == "linear":
            drop_prob *= layer_idx / max(config.num_hidden_layers - 1, 1)
        self.norm1 = _layer_norm(config)
        self.attention = ViTRegAttention(config)
        self.residual1 = ViTRegResidual(config, drop_prob)
        self.norm2 = _layer_norm(config)
        # CODEPATH: DINOv2 g/14 is SwiGLU, S, B and L are GELU
        mlp_class = ViTRegSwiGLUFFN if config.use_swiglu_ffn else ViTRegMLP
        self.mlp = mlp_class(config, layer_idx)
        self.residual2 = ViTRegResidual(config, drop_prob)

    def forward(
        self, hidden_states: torch.Tensor, attention_rows: slice | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """`attention_rows` asks for what these tokens attend to in this layer, in place of the layer's output.

        It is asked for here, not of the attention module, because offloading and sharding bring a layer's weights in
        when its forward is called.
        """
        normed = self.norm1(hidden_states)
        if attention_rows is not None:
            return self.attention.rows(normed, attention_rows, **kwargs)
        attention_output, _ = self.attention(normed, **kwargs)
        hidden_states = self.residual1(hidden_states, attention_output)
        return self.residual2(hidden_states, self.mlp(self.norm2(hidden_states)))


@auto_docstring
class ViTRegPreTrainedModel(PreTrainedModel):
    config: ViTRegConfig
    base_model_prefix = "vitreg"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTRegEmbeddings", "ViTRegLayer", "ViTRegAttentionPooling"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ViTRegLayer, "attentions": ViTRegAttention}
    _input_embed_layer = "patch_embeddings"
    _keep_in_fp32_modules_strict = ["rotary_embeddings"]  # periods in half precision would be others

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """Weights and positions: truncated normal; CLS and registers: almost zero, but distinct; mask: zero."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ViTRegEmbeddings):
            if module.position_embeddings is not None:
                init.trunc_normal_(module.position_embeddings, std=std)
            for tokens in (module.cls_token, module.distillation_token, module.register_tokens):
                if tokens is not None:
                    init.normal_(tokens, std=self.config.register_init_std)
            if module.mask_token is not None:
                init.zeros_(module.mask_token)
        elif isinstance(module, ViTRegRotaryEmbeddings):
            init.copy_(module.periods, module.initial_periods())
        elif isinstance(module, ViTRegNeuronShift):
            init.copy_(module.neurons, torch.tensor(module.initial_neurons))
        elif isinstance(module, ViTRegAttentionPooling):
            init.trunc_normal_(module.latent, std=std)
        elif isinstance(module, ViTRegResidual) and module.lambda1 is not None:
            init.constant_(module.lambda1, self.config.layerscale_value)

    def _final_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of any layer, from CLS on, `(batch_size, tokens, hidden_size)`, as a head reads them."""
        # CODEPATH: DINOv3 allows a norm of their own for CLS and registers
        if self.config.final_norm == "untied":
            num_prefix_tokens = self.config.num_prefix_tokens
            prefix, patches = tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:]
            return torch.cat([self.prefix_layernorm(prefix), self.layernorm(patches)], dim=1)
        # CODEPATH: most families norm their tokens, timm's `fc_norm` what is pooled from them
        return self.layernorm(tokens) if self.config.final_norm == "tokens" else tokens

    def _hidden_states_to_keep(
        self, requested: bool | int | list[int] | None, read: list[int]
    ) -> bool | int | list[int] | None:
        """What the caller wants to see, and the hidden states that the head reads."""
        if not read or requested is True:
            return requested
        return [*(selected_hidden_states(requested) or []), *read]

    def _hidden_states_to_return(
        self, hidden_states: tuple[torch.Tensor | None, ...] | None, requested: bool | int | list[int] | None
    ) -> tuple[torch.Tensor | None, ...] | None:
        """What the caller wants to see, without the hidden states that only the head reads."""
        if not requested:
            return None
        if (selected := selected_hidden_states(requested)) is None:
            return hidden_states
        indices = resolve_hidden_states_indices(self, selected, num_hidden_states=len(hidden_states))
        return tuple(states if index in indices else None for index, states in enumerate(hidden_states))

    @torch.no_grad()
    def get_attention_maps(self, pixel_values: torch.Tensor, layer: int, queries: str = "cls") -> torch.Tensor:
        r"""Attention of chosen tokens in one layer. Runs the layers up to it and keeps no attention of the others.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
                Images, of any size that is a multiple of the patch size.
            layer (`int`):
                The layer, from 0, or from the end with -1 the last.
            queries (`str`, *optional*, defaults to `"cls"`):
                The tokens that attend: `"cls"`, `"registers"` or `"all"`.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_heads, num_queries, num_prefix_tokens + num_patches)`:
            probabilities, each row sums to 1. For the maps over the image, cut the prefix and unflatten:
            `maps[..., config.num_prefix_tokens:].unflatten(-1, (rows, cols))`.

        Raises:
            `ValueError`: where the layer does not exist, or `queries` is none of the three, or asks for CLS or
            registers of a model that has none.
        """
        num_layers = self.config.num_hidden_layers
        rows = {"cls": slice(0, 1), "registers": self.config.register_slice, "all": slice(None)}
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"layer {layer} does not exist: the model has {num_layers}, 0 to {num_layers - 1}.")
        if queries not in rows:
            raise ValueError(f"queries must be one of {', '.join(map(repr, rows))}, got {queries!r}.")
        if queries == "registers" and self.config.num_register_tokens == 0:
            raise ValueError('The model has no registers (num_register_tokens=0). Ask for queries="cls" or "all".')
        if queries == "cls" and not self.config.use_cls_token:
            raise ValueError('The model has no CLS token (use_cls_token=False). Ask for queries="registers" or "all".')
        base_model = self.base_model
        *layers_before, layer_module = base_model.encoder.layer[: layer % num_layers + 1]
        hidden_states = base_model.embeddings(pixel_values)
        rotation = base_model.encoder.rotation(pixel_values)
        for layer_before in layers_before:
            hidden_states = layer_before(hidden_states, position_embeddings=rotation)
        return layer_module(hidden_states, attention_rows=rows[queries], position_embeddings=rotation)


class ViTRegEncoder(ViTRegPreTrainedModel):
    def __init__(self, config: ViTRegConfig):
        super().__init__(config)
        self.rotary_embeddings = None
        # CODEPATH: DINOv3 rotates queries and keys, every other family adds positions to its tokens
        if config.position_embedding_type == "rope":
            self.rotary_embeddings = ViTRegRotaryEmbeddings(config)
        self.layer = nn.ModuleList([ViTRegLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.post_init()

    def rotation(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines for the tokens of these images; `None` where nothing is rotated."""
        if self.rotary_embeddings is None:
            return None
        return self.rotary_embeddings(*(pixels // self.config.patch_size for pixels in pixel_values.shape[-2:]))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutput:
        r"""
        position_embeddings (`tuple(torch.FloatTensor)`, *optional*):
            Cosines and sines of every token, from `rotation`, where the model rotates queries and keys.
        """
        for layer_module in self.layer:
            hidden_states = layer_module(hidden_states, position_embeddings=position_embeddings, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class ViTRegAttentionPooling(nn.Module):
    """A learned query that attends to the patches, and an MLP (SigLIP, Zhai et al., 2023).

    `(batch_size, num_patches, hidden_size) -> (batch_size, hidden_size)`
    """

    def __init__(self, config: ViTRegConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.latent = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = _layer_norm(config)
        self.mlp = ViTRegMLP(config)

    def forward(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        latent = self.latent.expand(patch_tokens.shape[0], -1, -1)
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(latent), self.k_proj(patch_tokens), self.v_proj(patch_tokens))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        pooled = self.o_proj(attended.transpose(1, 2).flatten(2))
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


@auto_docstring
class ViTRegModel(ViTRegPreTrainedModel):
    def __init__(self, config: ViTRegConfig, add_pooling_layer: bool = True):
        r"""
        add_pooling_layer (`bool`, *optional*, defaults to `True`):
            Whether there is a `pooler_output`, and what makes it. Segmentation and depth heads do without.
        """
        super().__init__(config)
        self.add_pooling_layer = add_pooling_layer
        self.embeddings = ViTRegEmbeddings(config)
        self.encoder = ViTRegEncoder(config)
        # CODEPATH: timm builds encoders without a final norm, and others that norm what they pool and nothing else
        has_norm = config.final_norm != "none" and (add_pooling_layer or config.final_norm != "pooled")
        self.layernorm = _layer_norm(config) if has_norm else None
        # CODEPATH: DINOv3 allows a norm of their own for CLS and registers
        self.prefix_layernorm = _layer_norm(config) if config.final_norm == "untied" else None
        self.pooler = None
        # CODEPATH: SigLIP has a head that attends, the others take CLS or a mean
        if config.pooler_type == "map" and add_pooling_layer:
            self.pooler = ViTRegAttentionPooling(config)
        self.projection = None
        # CODEPATH: CLIP projects images to where its texts are
        if config.projection_dim is not None and add_pooling_layer:
            self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        # now and not at the first use: torch.compile(fullgraph=True) cannot trace the installation
        maybe_install_capturing_hooks(self.encoder)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViTRegModelOutput:
        r"""
        bool_masked_pos (`torch.BoolTensor` of shape `(batch_size, num_patches)`, *optional*):
            Which patches are replaced by the mask token, before the position embedding. Needs `use_mask_token=True`.
        """
        embeddings = self.embeddings(pixel_values, bool_masked_pos)
        # an encoder that returned a tuple, as config.return_dict=False makes it, could not be read by name
        rotation = self.encoder.rotation(pixel_values)
        encoder_outputs = self.encoder(embeddings, position_embeddings=rotation, return_dict=True, **kwargs)
        tokens = self._final_norm(encoder_outputs.last_hidden_state)
        pooled = self._pool(tokens) if self.add_pooling_layer else None
        return ViTRegModelOutput(
            last_hidden_state=tokens,
            pooler_output=pooled,
            register_tokens=tokens[:, self.config.register_slice],
            patch_tokens=tokens[:, self.config.num_prefix_tokens :],
            image_embeds=None if self.projection is None else self.projection(pooled),
            hidden_states=encoder_outputs.hidden_states,
            attentions=encoder_outputs.attentions,
        )

    def _pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch_size, tokens, hidden_size) -> (batch_size, hidden_size)`. Registers are left out."""
        patches = tokens[:, self.config.num_prefix_tokens :]
        # CODEPATH: CLS in most families
        if self.config.pooler_type == "cls":
            pooled = tokens[:, 0]
        # CODEPATH: the mean in timm's `gap` models, attention in SigLIP
        elif self.config.pooler_type == "mean":
            pooled = patches.mean(dim=1)
        else:
            pooled = self.pooler(patches)
        # CODEPATH: timm's `fc_norm`, of models that are fine-tuned on the mean of the patches
        return self.layernorm(pooled) if self.config.final_norm == "pooled" else pooled


@auto_docstring(
    custom_intro="""
    ViTReg with a linear classifier on CLS, on CLS and the mean of the patches, on the last four layers' CLS, or on
    whatever else `config.classifier_layout` says. Registers are in no mean.
    """
)
class ViTRegForImageClassification(ViTRegPreTrainedModel):
    # a classifier on a CLIP model does not read its projection
    _keys_to_ignore_on_load_unexpected = [r"^(vitreg\.)?projection\.weight$"]

    def __init__(self, config: ViTRegConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vitreg = ViTRegModel(config)
        # a parameter that no forward uses stops distributed training
        self.vitreg.projection = None
        multiple = {"cls_mean": 2, "last4_cls": 4, "last4_cls_mean": 5}.get(config.classifier_layout, 1)
        num_features = multiple * config.hidden_size
        self.classifier = nn.Linear(num_features, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.distillation_classifier = None
        # CODEPATH: DeiT's second classifier, on its distillation token
        if config.classifier_layout == "cls_distillation" and config.num_labels > 0:
            self.distillation_classifier = nn.Linear(num_features, config.num_labels)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Class of each image, 0 to `num_labels - 1`. The loss is computed in float32 whatever the model's dtype.
        """
        requested = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        # CODEPATH: the 4-layer linear heads of DINO and DINOv2
        read = [-4, -3, -2, -1] if self.config.classifier_layout.startswith("last4") else []
        kept = self._hidden_states_to_keep(requested, read)
        outputs = self.vitreg(pixel_values, output_hidden_states=kept, return_dict=True, **kwargs)
        logits = self.classifier(self._features(outputs))
        if self.distillation_classifier is not None:
            logits = (logits + self.distillation_classifier(outputs.last_hidden_state[:, 1])) / 2
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits.float(), self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=self._hidden_states_to_return(outputs.hidden_states, requested),
            attentions=outputs.attentions,
        )

    def _features(self, outputs: ViTRegModelOutput) -> torch.Tensor:
        """`(batch_size, classifier.in_features)`, all after the final norm."""
        layout = self.config.classifier_layout
        # CODEPATH: models that pool their patches
        if layout == "pooled":
            return outputs.pooler_output
        cls_tokens = [outputs.last_hidden_state[:, 0]]
        # CODEPATH: the 4-layer linear heads of DINO and DINOv2
        if layout.startswith("last4"):
            cls_tokens = [self.vitreg._final_norm(states[:, :1])[:, 0] for states in outputs.hidden_states[-4:]]
        # CODEPATH: DINOv2's linear heads
        means = [outputs.patch_tokens.mean(dim=1)] if layout.endswith("cls_mean") else []
        features = [*cls_tokens, *means]
        return torch.cat(features, dim=-1) if len(features) > 1 else features[0]


def layers_to_map(
    patch_tokens: torch.Tensor, grid_size: tuple[int, int], cls_tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """Patches of several layers as one map, what segmentation and depth heads read.

    Args:
        patch_tokens: `(batch_size, layers, rows * cols, hidden_size)`, row by row.
        grid_size: Rows and columns.
        cls_tokens: `(batch_size, layers, hidden_size)`. Each layer's CLS is then put behind each of its patches.

    Returns:
        `(batch_size, layers * hidden_size, rows, cols)`, with CLS twice as many channels.
    """
    if cls_tokens is not None:
        patch_tokens = torch.cat([patch_tokens, cls_tokens.unsqueeze(2).expand_as(patch_tokens)], dim=-1)
    return patch_tokens.mT.flatten(1, 2).unflatten(-1, grid_size)


class ViTRegSegmentationHead(nn.Module):
    """DINOv2's linear head for segmentation: batch norm, then one linear map (Oquab et al., 2024, section 7.4).

    `(batch_size, num_features, rows, cols) -> (batch_size, num_labels, rows, cols)`
    """

    def __init__(self, num_features: int, num_labels: int):
        super().__init__()
        self.batch_norm = nn.BatchNorm2d(num_features)
        self.classifier = nn.Conv2d(num_features, num_labels, kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.batch_norm(features))


class ViTRegDepthHead(nn.Module):
    """DINOv2's linear head for depth: the mean of evenly spaced depths, weighted by their activations plus 0.1.

    The activations are of features at four times the resolution of the patches, after which everything is float32
    (Oquab et al., 2024, section 7.4; "linear" normalization of AdaBins, Bhat et al., 2021).

    `(batch_size, num_features, rows, cols) -> (batch_size, 4 * rows, 4 * cols)`
    """

    def __init__(self, num_features: int, num_bins: int, min_depth: float, max_depth: float):
        super().__init__()
        self.num_bins = num_bins
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.classifier = nn.Conv2d(num_features, num_bins, kernel_size=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        # interpolating what the linear map made of the features is the same, and there are fewer channels
        size = tuple(4 * cells for cells in features.shape[-2:])
        logits = nn.functional.interpolate(self.classifier(features).float(), size=size, mode="bilinear")
        weights = logits.relu() + 0.1
        depths = torch.linspace(self.min_depth, self.max_depth, self.num_bins, device=weights.device)
        return torch.einsum("bkhw,k->bhw", weights, depths) / weights.sum(dim=1)


def _log_differences(
    predicted_depth: torch.Tensor, labels: torch.Tensor, max_depth: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Difference of the logarithms, 0 at pixels without a valid depth, and which ones are valid."""
    valid = (labels > 0) & (labels <= max_depth)
    # the small number is DINOv2's, against steep gradients near zero
    logarithms = [depth.float().add(1e-3).log() for depth in (predicted_depth, torch.where(valid, labels, 1))]
    return torch.where(valid, logarithms[0] - logarithms[1], 0), valid


def scale_invariant_loss(
    predicted_depth: torch.Tensor, labels: torch.Tensor, max_depth: float, warming_up: bool = False
) -> torch.Tensor:
    """`sqrt(Var(g) + 0.15 Mean(g)^2)` over all valid pixels of a batch, `g = log(predicted) - log(label)`.

    The loss of AdaBins and DINOv2, after Eigen et al. (2014). While warming up, DINOv2's first 100 steps, it is the
    second term alone: the scale is learned before the shape.

    Args:
        predicted_depth: `(batch_size, height, width)`, or any other shape.
        labels: Of the same shape. Pixels of 0, of more than `max_depth`, or that are no number, are not counted.
        max_depth: In the unit of the labels.
        warming_up: Whether the variance is left out.

    Returns:
        A scalar, 0 where no pixel is valid.
    """
    differences, valid = _log_differences(predicted_depth, labels, max_depth)
    num_valid = valid.sum()
    mean = differences.sum() / num_valid.clamp(min=1)
    loss = 0.15 * mean.square()
    if not warming_up:
        deviations = torch.where(valid, differences - mean, 0)
        loss = loss + deviations.square().sum() / (num_valid - 1).clamp(min=1)
    # at 0 the root has no gradient
    return loss.clamp(min=1e-12).sqrt() * (num_valid > 0)


def log_gradient_loss(predicted_depth: torch.Tensor, labels: torch.Tensor, max_depth: float) -> torch.Tensor:
    """How much `g` of `scale_invariant_loss` changes from a pixel to the next but one, per valid pixel.

    Summed over rows and columns, and over strides of 1, 2, 4 and 6 pixels (MegaDepth, Li and Snavely, 2018, as in
    DINOv2). Over the last two axes, that is: DINOv2's code does it over the first two of `(batch_size, 1, height,
    width)`, where it is zero for one image or two.

    Args:
        predicted_depth: `(batch_size, height, width)`.
        labels: Of the same shape, valid as in `scale_invariant_loss`.
        max_depth: In the unit of the labels.

    Returns:
        A scalar, 0 where no pixel is valid.
    """
    all_differences, all_valid = _log_differences(predicted_depth, labels, max_depth)
    loss = 0
    for stride in (1, 2, 4, 6):
        differences, valid = (each[:, ::stride, ::stride] for each in (all_differences, all_valid))
        down = (differences[:, 2:] - differences[:, :-2]).abs() * (valid[:, 2:] & valid[:, :-2])
        across = (differences[:, :, 2:] - differences[:, :, :-2]).abs() * (valid[:, :, 2:] & valid[:, :, :-2])
        loss = loss + (down.sum() + across.sum()) / valid.sum().clamp(min=1)
    return loss


@auto_docstring(
    custom_intro="""
    What models with a head on maps of their patches have in common: they read the layers of `config.out_indices`.
    """
)
class ViTRegDensePreTrainedModel(ViTRegPreTrainedModel):
    # their losses are means already, whatever Trainer knows of the batch
    accepts_loss_kwargs = False
    # they read nothing that is pooled
    _keys_to_ignore_on_load_unexpected = [r"^(vitreg\.)?(projection|pooler)\."]

    def _read(
        self, pixel_values: torch.Tensor, with_cls: bool, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, ...] | None]]:
        """The map that the head reads, and what else was asked for. Registers are not in it."""
        requested = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        kept = self._hidden_states_to_keep(requested, self.config.out_indices)
        outputs = self.vitreg(pixel_values, output_hidden_states=kept, return_dict=True, **kwargs)
        layers = [outputs.hidden_states[index] for index in self.config.out_indices]
        # CODEPATH: DINOv2's segmentation heads read normed features, its depth heads do not
        if self.config.apply_layernorm:
            layers = [self.vitreg._final_norm(tokens) for tokens in layers]
        tokens = torch.stack(layers, dim=1)
        grid_size = tuple(pixels // self.config.patch_size for pixels in pixel_values.shape[-2:])
        features = layers_to_map(
            tokens[:, :, self.config.num_prefix_tokens :], grid_size, tokens[:, :, 0] if with_cls else None
        )
        hidden_states = self._hidden_states_to_return(outputs.hidden_states, requested)
        return features, {"hidden_states": hidden_states, "attentions": outputs.attentions}


@auto_docstring(
    custom_intro="""
    ViTReg with DINOv2's linear head for semantic segmentation: a class for every patch, from the layers that
    `config.out_indices` chooses.
    """
)
class ViTRegForSemanticSegmentation(ViTRegDensePreTrainedModel):
    def __init__(self, config: ViTRegConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vitreg = ViTRegModel(config, add_pooling_layer=False)
        self.segmentation_head = ViTRegSegmentationHead(
            len(config.out_indices) * config.hidden_size, config.num_labels
        )
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SemanticSegmenterOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, height, width)`, *optional*):
            Class of each pixel, 0 to `num_labels - 1`, or `config.semantic_loss_ignore_index`, at any resolution: the
            logits, which are one a patch, are interpolated to it. The loss is computed in float32.
        """
        features, asked_for = self._read(pixel_values, with_cls=False, **kwargs)
        logits = self.segmentation_head(features)
        loss = None
        if labels is not None:
            ignore_index = self.config.semantic_loss_ignore_index
            # given to the loss, so that a batch without any counts nothing: its own mean would be no number
            num_counted = (labels != ignore_index).sum().clamp(min=1)
            loss = self.loss_function(
                logits.float(), labels, ignore_index=ignore_index, num_items_in_batch=num_counted
            )
        return SemanticSegmenterOutput(loss=loss, logits=logits, **asked_for)


@auto_docstring(
    custom_intro="""
    ViTReg with DINOv2's linear head for depth, which reads the patches, and CLS beside each, of the layers that
    `config.out_indices` chooses.
    """
)
class ViTRegForDepthEstimation(ViTRegDensePreTrainedModel):
    def __init__(self, config: ViTRegConfig):
        super().__init__(config)
        self.vitreg = ViTRegModel(config, add_pooling_layer=False)
        # CODEPATH: SigLIP and timm's `gap` models have no CLS token
        num_features = len(config.out_indices) * config.hidden_size * (2 if config.use_cls_token else 1)
        self.depth_head = ViTRegDepthHead(num_features, config.num_depth_bins, config.min_depth, config.max_depth)
        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DepthEstimatorOutput:
        r"""
        labels (`torch.FloatTensor` of shape `(batch_size, height, width)`, *optional*):
            Depth of each pixel, at any resolution. Those of 0, or of more than `config.max_depth`, are not counted.
            The loss is DINOv2's, `scale_invariant_loss` and half of `log_gradient_loss`, in float32.
        """
        features, asked_for = self._read(pixel_values, with_cls=self.config.use_cls_token, **kwargs)
        depth = self.depth_head(features).unsqueeze(1)
        predicted_depth = nn.functional.interpolate(depth, size=pixel_values.shape[-2:], mode="bilinear")
        loss = None
        if labels is not None:
            fitted = nn.functional.interpolate(depth, size=labels.shape[-2:], mode="bilinear").squeeze(1)
            loss = scale_invariant_loss(fitted, labels, self.config.max_depth)
            loss = loss + 0.5 * log_gradient_loss(fitted, labels, self.config.max_depth)
        return DepthEstimatorOutput(loss=loss, predicted_depth=predicted_depth.squeeze(1), **asked_for)


@auto_docstring(
    custom_intro="""
    ViTReg backbone: patch feature maps of any layers, for frameworks like DETR, Mask R-CNN and UperNet.
    """
)
class ViTRegBackbone(BackboneMixin, ViTRegPreTrainedModel):
    def __init__(self, config: ViTRegConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = ViTRegEmbeddings(config)
        self.encoder = ViTRegEncoder(config)
        # CODEPATH: timm's `fc_norm` is of the pooled vector, which no backbone has
        self.layernorm = _layer_norm(config) if config.final_norm in ("tokens", "untied") else None
        # CODEPATH: DINOv3 allows a norm of their own for CLS and registers
        self.prefix_layernorm = _layer_norm(config) if config.final_norm == "untied" else None
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    @auto_docstring
    def forward(
        self,
        pixel_values: torch.Tensor,
        return_prefix_tokens: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViTRegBackboneOutput:
        r"""
        return_prefix_tokens (`bool`, *optional*, defaults to `config.return_prefix_tokens`):
            Whether to return CLS and registers of each selected stage as `cls_tokens` and `register_tokens`.
        """
        if return_prefix_tokens is None:
            return_prefix_tokens = self.config.return_prefix_tokens
        grid_size = tuple(pixels // self.config.patch_size for pixels in pixel_values.shape[-2:])
        rotation = self.encoder.rotation(pixel_values)
        outputs = self.encoder(self.embeddings(pixel_values), position_embeddings=rotation, return_dict=True, **kwargs)
        stages = [
            hidden_state
            for stage_name, hidden_state in zip(self.stage_names, outputs.hidden_states)
            if stage_name in self.out_features
        ]
        # CODEPATH: DINOv2's segmentation heads read normed features, its depth heads do not
        if self.config.apply_layernorm:
            stages = [self._final_norm(hidden_state) for hidden_state in stages]
        cls_tokens = register_tokens = None
        if return_prefix_tokens:
            register_tokens = tuple(tokens[:, self.config.register_slice] for tokens in stages)
            # CODEPATH: SigLIP and timm's `gap` models have no CLS token
            if self.config.use_cls_token:
                cls_tokens = tuple(tokens[:, 0] for tokens in stages)
        # CODEPATH: detectors read maps, others may ask for plain token sequences
        if self.config.reshape_hidden_states:
            stages = [self._map(tokens, grid_size) for tokens in stages]
        return ViTRegBackboneOutput(
            feature_maps=tuple(stages),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cls_tokens=cls_tokens,
            register_tokens=register_tokens,
        )

    def _map(self, tokens: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """`(batch_size, prefix + rows * cols, hidden_size) -> (batch_size, hidden_size, rows, cols)`"""
        patches = tokens[:, self.config.num_prefix_tokens :]
        return patches.unflatten(1, grid_size).permute(0, 3, 1, 2).contiguous()


__all__ = [
    "ViTRegBackbone",
    "ViTRegForDepthEstimation",
    "ViTRegForImageClassification",
    "ViTRegForSemanticSegmentation",
    "ViTRegModel",
    "ViTRegPreTrainedModel",
]
