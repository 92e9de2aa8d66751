# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A backbone's pass over crops of several sizes, as training wants it.

Dropped residual branches are not computed, nor in the last layer what nobody reads; crops may share the matrix
products of a layer; and little is kept for the backward pass. The weights, their names and all else are the model's
own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..modeling_vitreg import ViTRegLayer, ViTRegModel, ViTRegResidual, ViTRegSwiGLUFFN
from .recomputed import activated_linear, add_to_rows, are_plain, can_recompute, can_scale, normed_linears


def prepare_for_crops(
    backbone: ViTRegModel, drop_path_subset: bool = True, pack_crops: bool = False, last_alone: bool = False
) -> None:
    """Lets the layers take lists of crops, as `forward_crops` gives them.

    Args:
        backbone: Its layers change class, nothing else of them.
        drop_path_subset: Whether stochastic depth computes a branch for the images alone that keep it.
        pack_crops: Whether crops of all sizes share matrix products.
        last_alone: Whether the last layer alone does, which is all that a teacher gains from. Accelerate finds by the
            name of the others' class where FSDP is to cut.

    Raises:
        ValueError: for packed crops of a model with test-time registers, whose layers need an image's tokens together.
    """
    if pack_crops and backbone.config.num_test_time_registers:
        raise ValueError(
            "The model has test-time registers, whose neurons need all tokens of an image together, and packed crops "
            "mix images: train without --pack_crops, or the model as it was before they were added."
        )
    for layer in backbone.encoder.layer[-1 if last_alone else 0 :]:
        # FSDP and torch's parametrizations change a module's class too: weights, hooks and names stay
        layer.__class__ = CropsLayer
        layer.drop_path_subset = drop_path_subset
        layer.pack_crops = pack_crops


def prepare_for_images(model: nn.Module) -> None:
    """Lets the layers of a model of any head keep less for the backward pass, as crops do, of a batch of one size.

    Results and gradients are the model's but for rounding. Hooks on attention and residuals as a whole are not called
    in training, unless attention is asked for.
    """
    for layer in model.modules():
        if type(layer) is ViTRegLayer:
            layer.__class__ = CropsLayer
            layer.drop_path_subset = layer.pack_crops = False
            layer.keep_less = True


def forward_crops(
    backbone: ViTRegModel,
    crops: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    read: Sequence[torch.Tensor | None] | None = None,
) -> list[torch.Tensor]:
    """The normed tokens of crops of several sizes.

    Args:
        backbone: Prepared by `prepare_for_crops`.
        crops: Pixel values, `(num_crops, num_channels, height, width)` of each size.
        masks: For each of them `(num_crops, num_patches)`, or `None`.
        read: For each of them which tokens are wanted, their positions among the tokens of all its crops,
            `(num_read,)`; `None` is all. Behind its attention the last layer computes no others.

    Returns:
        For each of them `(num_crops, tokens, hidden_size)`, or `(num_read, hidden_size)` of those that are read.
    """
    read = [None] * len(crops) if read is None else read
    hidden_states = [backbone.embeddings(pixels, mask) for pixels, mask in zip(crops, masks)]
    rotations = [backbone.encoder.rotation(pixels) for pixels in crops]
    *layers, last = backbone.encoder.layer
    for layer in layers:
        if isinstance(layer, CropsLayer):
            hidden_states = layer(hidden_states, position_embeddings=rotations)
        else:
            hidden_states = [
                layer(tokens, position_embeddings=rotation) for tokens, rotation in zip(hidden_states, rotations)
            ]
    if backbone.config.final_norm == "tokens":
        return [backbone.layernorm(tokens) for tokens in last(hidden_states, position_embeddings=rotations, read=read)]
    # the other norms tell CLS from patches, by where they are in their crop
    hidden_states = last(hidden_states, position_embeddings=rotations)
    return [_picked(backbone._final_norm(tokens), positions) for tokens, positions in zip(hidden_states, read)]


class Drop(NamedTuple):
    """Stochastic depth of a branch for the images of a batch (DINOv2, section 5).

    Attributes:
        rows: Images that the branch is computed for, `(num_kept,)`; `None` is all.
        factors: What the branch of each image counts, `(num_images,)`, 0 where it is dropped; `None` is 1 for all.
    """

    rows: torch.Tensor | None = None
    factors: torch.Tensor | None = None

    def chosen(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of the images that the branch is computed for."""
        return tokens if self.rows is None else tokens.index_select(0, self.rows)

    def add(self, tokens: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """The branch, scaled up by what was dropped, added to the images that it is of."""
        if self.rows is not None:
            return add_to_rows(tokens, self.rows, branch, len(tokens) / len(self.rows))
        if self.factors is not None:
            branch = branch * self.factors.view(-1, *[1] * (branch.ndim - 1))
        return tokens + branch

    def of_tokens(self, tokens: torch.Tensor, positions: torch.Tensor | None) -> "Drop":
        """For each of these tokens, as if it were an image of its own."""
        factors = self.factors
        if self.rows is not None and positions is not None:
            factors = tokens.new_zeros(len(tokens)).index_fill(0, self.rows, len(tokens) / len(self.rows))
        if factors is None or positions is None:
            return self
        return Drop(factors=factors[positions // tokens.shape[1]])

    def positions_of_chosen(self, tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor | None:
        """Where the tokens at these positions are among those of the chosen images; of other images anywhere."""
        if self.rows is None or positions is None:
            return positions
        order = self.rows.new_zeros(len(tokens)).index_copy(
            0, self.rows, torch.arange(len(self.rows), device=self.rows.device)
        )
        length = tokens.shape[1]
        return order[positions // length] * length + positions % length


class CropsLayer(ViTRegLayer):
    """A layer that takes the tokens of one batch, or a list of those of several sizes.

    Norms, linear layers and MLPs that somebody adapted, hooked or sharded are called as they are; hooks on attention
    and residuals as a whole are not called for lists.
    """

    drop_path_subset: bool
    pack_crops: bool
    keep_less: bool = False  # of a tensor too

    def forward(self, hidden_states, position_embeddings=None, read=None, **kwargs):
        """Of a tensor what `ViTRegLayer` does; of a list the list after the layer, with a rotation or none each.

        Where `read` has positions, `(num_read,)`, their tokens alone come back, `(num_read, hidden_size)`.
        """
        if isinstance(hidden_states, torch.Tensor):
            asks_for_attention = kwargs.get("output_attentions", self.attention.config.output_attentions)
            if (
                self.keep_less
                and torch.is_grad_enabled()
                and not asks_for_attention
                and "attention_rows" not in kwargs
            ):
                return self._of_crops([hidden_states], [position_embeddings])[0]
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)
        return self._of_crops(hidden_states, position_embeddings, read)

    def _of_crops(
        self, hidden_states: Sequence[torch.Tensor], position_embeddings: Sequence, read: Sequence | None = None
    ) -> list[torch.Tensor]:
        read = [None] * len(hidden_states) if read is None else read
        of_attention, of_mlp = (
            [self._drawn(tokens, residual) for tokens in hidden_states]
            for residual in (self.residual1, self.residual2)
        )
        branches = self._attended(_chosen(hidden_states, of_attention), position_embeddings)
        crops = list(zip(hidden_states, read))
        places = [drop.positions_of_chosen(*crop) for drop, crop in zip(of_attention, crops)]
        of_attention, of_mlp = (
            [drop.of_tokens(*crop) for drop, crop in zip(drops, crops)] for drops in (of_attention, of_mlp)
        )
        hidden_states = [_picked(*crop) for crop in crops]
        branches = self._shared([_picked(*each) for each in zip(branches, places)], self._projected)
        hidden_states = _added(hidden_states, of_attention, branches)
        return _added(hidden_states, of_mlp, self._shared(_chosen(hidden_states, of_mlp), self._perceived))

    def _drawn(self, tokens: torch.Tensor, residual: ViTRegResidual) -> Drop:
        """Which images drop a branch. Of a subset always as many keep it, and one at least."""
        if not (self.training and residual.drop_prob):
            return Drop()
        keep = 1 - residual.drop_prob
        if self.drop_path_subset:
            return Drop(torch.randperm(len(tokens), device=tokens.device)[: max(1, int(len(tokens) * keep))])
        return Drop(factors=tokens.new_empty(len(tokens)).bernoulli_(keep).div_(keep))

    def _shared(self, crops: list[torch.Tensor], part: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """A part that sees each token alone, of all crops at once or of those of one size at a time."""
        return _unpacked(part(_packed(crops)), crops) if self.pack_crops else [part(crop) for crop in crops]

    def _attended(self, crops: list[torch.Tensor], rotations: Sequence) -> list[torch.Tensor]:
        """What attention returns before its last projection."""
        if self.pack_crops:
            projected = zip(*(_unpacked(part, crops) for part in self._queries_keys_values(_packed(crops))))
        else:
            projected = map(self._queries_keys_values, crops)
        return [self.attention.attend(*qkv, rotation)[0] for qkv, rotation in zip(projected, rotations)]

    def _queries_keys_values(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layers = self.attention.q_proj, self.attention.k_proj, self.attention.v_proj
        if can_recompute(self.norm1, tokens) and are_plain(*layers):
            return normed_linears(tokens, self.norm1, *layers)
        normed = self.norm1(tokens)
        return tuple(layer(normed) for layer in layers)

    def _projected(self, attended: torch.Tensor) -> torch.Tensor:
        """The attention's branch, scaled."""
        layer, scale = self.attention.o_proj, self.residual1.lambda1
        if can_scale(layer, scale):
            return activated_linear("none", (attended,), layer, scale)
        return _scaled(layer(attended), scale)

    def _perceived(self, tokens: torch.Tensor) -> torch.Tensor:
        """The MLP's branch, scaled."""
        mlp, norm, scale = self.mlp, self.norm2, self.residual2.lambda1
        if not (can_recompute(norm, tokens) and are_plain(mlp, *mlp.children())):
            return _scaled(mlp(norm(tokens)), scale)
        if isinstance(mlp, ViTRegSwiGLUFFN):
            activation, last = "swiglu", mlp.down_proj
            hidden = normed_linears(tokens, norm, mlp.gate_proj, mlp.up_proj)
        else:
            activation, last = "gelu", mlp.fc2
            hidden = normed_linears(tokens, norm, mlp.fc1)
        if can_scale(last, scale):
            return activated_linear(activation, hidden, last, scale)
        return _scaled(activated_linear(activation, hidden, last, None), scale)


def _scaled(branch: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return branch if scale is None else branch * scale


def _chosen(crops: Sequence[torch.Tensor], drops: Sequence[Drop]) -> list[torch.Tensor]:
    return [drop.chosen(tokens) for tokens, drop in zip(crops, drops)]


def _added(
    crops: Sequence[torch.Tensor], drops: Sequence[Drop], branches: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    return [drop.add(tokens, branch) for tokens, drop, branch in zip(crops, drops, branches)]


def _picked(tokens: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Those at these positions among the tokens of all images, `(num_read, hidden_size)`; all as they are."""
    return tokens if positions is None else tokens.flatten(0, 1).index_select(0, positions)


def _packed(crops: Sequence[torch.Tensor]) -> torch.Tensor:
    """All tokens of all crops, `(tokens, hidden_size)`."""
    return torch.cat([crop.flatten(0, -2) for crop in crops])


def _unpacked(tokens: torch.Tensor, crops: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tokens as the crops have them."""
    parts = tokens.split([crop.shape[:-1].numel() for crop in crops])
    return [part.unflatten(0, crop.shape[:-1]) for part, crop in zip(parts, crops)]
