# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A backbone's pass over crops of several sizes, as training wants it.

Dropped residual branches are not computed, and crops may share the matrix products of a layer. The weights, their
names and all else are the model's own.
"""

from collections.abc import Callable, Sequence

import torch

from ..modeling_vitreg import ViTRegLayer, ViTRegModel, ViTRegResidual


def prepare_for_crops(backbone: ViTRegModel, drop_path_subset: bool = True, pack_crops: bool = False) -> None:
    """Lets the layers take lists of crops, as `forward_crops` gives them.

    Args:
        backbone: Its layers change class, nothing else of them.
        drop_path_subset: Whether stochastic depth computes a branch for the images alone that keep it.
        pack_crops: Whether crops of all sizes share matrix products.
    """
    for layer in backbone.encoder.layer:
        # FSDP and torch's parametrizations change a module's class too: weights, hooks and names stay
        layer.__class__ = CropsLayer
        layer.drop_path_subset = drop_path_subset
        layer.pack_crops = pack_crops


def forward_crops(
    backbone: ViTRegModel, crops: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """The normed tokens of crops of several sizes.

    Args:
        backbone: Prepared by `prepare_for_crops`.
        crops: Pixel values, `(num_crops, num_channels, height, width)` of each size.
        masks: For each of them `(num_crops, num_patches)`, or `None`.

    Returns:
        `(num_crops, tokens, hidden_size)` for each of them.
    """
    hidden_states = [backbone.embeddings(pixels, mask) for pixels, mask in zip(crops, masks)]
    rotations = [backbone.encoder.rotation(pixels) for pixels in crops]
    for layer in backbone.encoder.layer:
        hidden_states = layer(hidden_states, position_embeddings=rotations)
    return [backbone._final_norm(tokens) for tokens in hidden_states]


class CropsLayer(ViTRegLayer):
    """A layer that takes the tokens of one batch, or a list of those of several sizes."""

    drop_path_subset: bool
    pack_crops: bool

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        """Of a tensor what `ViTRegLayer` does; of a list the list after the layer, with a rotation or none each."""
        if isinstance(hidden_states, torch.Tensor):
            return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)

        def attend(crops: list[torch.Tensor]) -> list[torch.Tensor]:
            return self._attention(crops, position_embeddings)

        hidden_states = self._add(hidden_states, attend, self.residual1)
        return self._add(hidden_states, self._mlp, self.residual2)

    def _add(
        self,
        crops: list[torch.Tensor],
        branch: Callable[[list[torch.Tensor]], list[torch.Tensor]],
        residual: ViTRegResidual,
    ) -> list[torch.Tensor]:
        """Adds a branch, of a share of the images where some are dropped (DINOv2, section 5)."""
        if not (self.training and residual.drop_prob and self.drop_path_subset):
            return [residual(tokens, added) for tokens, added in zip(crops, branch(crops))]
        kept = [_kept_rows(tokens, residual.drop_prob) for tokens in crops]
        added = branch([tokens[rows] for tokens, rows in zip(crops, kept)])
        return [_added_to_rows(*parts, residual) for parts in zip(crops, kept, added)]

    def _attention(self, crops: list[torch.Tensor], rotations: Sequence) -> list[torch.Tensor]:
        attention = self.attention
        if not self.pack_crops:
            return [attention(self.norm1(crop), rotation)[0] for crop, rotation in zip(crops, rotations)]
        normed = self.norm1(_packed(crops))
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        projected = zip(*(_unpacked(projection(normed), crops) for projection in projections))
        attended = [attention.attend(*qkv, rotation)[0] for qkv, rotation in zip(projected, rotations)]
        return _unpacked(attention.o_proj(_packed(attended)), crops)

    def _mlp(self, crops: list[torch.Tensor]) -> list[torch.Tensor]:
        if not self.pack_crops:
            return [self.mlp(self.norm2(crop)) for crop in crops]
        return _unpacked(self.mlp(self.norm2(_packed(crops))), crops)


def _kept_rows(tokens: torch.Tensor, drop_prob: float) -> torch.Tensor:
    """Which images keep their branch: always as many, and one at least."""
    num_kept = max(1, int(len(tokens) * (1 - drop_prob)))
    return torch.randperm(len(tokens), device=tokens.device)[:num_kept]


def _added_to_rows(
    tokens: torch.Tensor, rows: torch.Tensor, branch: torch.Tensor, residual: ViTRegResidual
) -> torch.Tensor:
    """The branch, scaled up by what was dropped, added to the images that it is of."""
    if residual.lambda1 is not None:
        branch = branch * residual.lambda1
    return tokens.index_add(0, rows, branch.to(tokens.dtype), alpha=len(tokens) / len(rows))


def _packed(crops: Sequence[torch.Tensor]) -> torch.Tensor:
    """All tokens of all crops, `(tokens, hidden_size)`."""
    return torch.cat([crop.flatten(0, 1) for crop in crops])


def _unpacked(tokens: torch.Tensor, crops: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tokens as the crops have them."""
    parts = tokens.split([crop.shape[0] * crop.shape[1] for crop in crops])
    return [part.unflatten(0, crop.shape[:2]) for part, crop in zip(parts, crops)]
