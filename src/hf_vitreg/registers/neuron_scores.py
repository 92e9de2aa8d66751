# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""How active every neuron is where outliers are: one pass over images ("algorithm 1" of Jiang et al., 2025)."""

from contextlib import ExitStack

import torch
from torch import nn

from ..analysis.accumulate import in_float64
from ..analysis.norms import NormStatistics, token_norms
from ..analysis.outliers import outlier_mask, separation
from ..features import VisionEncoder


SPARSE_BELOW, SPARSE_SHARE = 0.5, 0.5  # of the released code


class NeuronScores:
    """The pass over the images that scores neurons: activations at outliers, summed, and no tokens kept.

    Where outliers are is known at the detection layer alone, after most activations have gone by. What is kept of a
    batch until then is the input of every MLP, a quarter of the activations; for the few outliers the MLPs are then
    run again.

    Args:
        encoder: The model.
        threshold, detect_layer, only_patches, only_sparse: See `find_register_neurons`; the layer counted from 0.

    Attributes:
        num_images, num_images_with_outliers: That were added.

    Raises:
        ValueError: where a layer is not one attention and one MLP.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        threshold: float,
        detect_layer: int,
        only_patches: bool = True,
        only_sparse: bool = False,
    ):
        self.encoder, self.threshold, self.detect_layer = encoder, threshold, detect_layer
        self.only_patches, self.only_sparse = only_patches, only_sparse
        self.num_images = self.num_images_with_outliers = 0
        self._mlps = encoder.mlps()
        self._sums: list[torch.Tensor | float] = [0.0] * len(self._mlps)
        self._beyond: torch.Tensor | float = 0.0  # outliers that are beyond the threshold after each layer already
        self._num_outliers = self._num_patches = 0
        self._norms = NormStatistics()

    @torch.no_grad()
    def update(self, pixel_values: torch.Tensor) -> None:
        """Adds a batch, `(batch_size, num_channels, height, width)`."""
        inputs, norms, is_sparse = [], [], []
        with ExitStack() as stack:
            for mlp, down in self._mlps:
                stack.enter_context(mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
                if self.only_sparse:
                    stack.enter_context(
                        down.register_forward_pre_hook(lambda _, args: is_sparse.append(_is_sparse(args[0])))
                    )
            self.encoder.observe(pixel_values, on_layer=lambda _, tokens: norms.append(token_norms(tokens)))
        norms = torch.stack(norms)
        is_outlier = outlier_mask(norms[self.detect_layer], self.threshold)
        self._count(norms, is_outlier)
        if self.only_patches:
            is_outlier[:, : self.encoder.num_prefix_tokens] = False
        images = is_outlier.nonzero()[:, 0]
        if not len(images):
            return
        num_of_image = is_outlier.sum(1)
        self.num_images_with_outliers += int((num_of_image > 0).sum())
        shares = in_float64(num_of_image[images]).reciprocal()[:, None]
        for layer, (mlp, down) in enumerate(self._mlps):
            activations = in_float64(_neurons(mlp, down, inputs[layer][is_outlier]).abs()) * shares
            means = activations.new_zeros(len(pixel_values), activations.shape[1])
            means.index_add_(0, images.to(means.device), activations)
            if self.only_sparse:
                means *= is_sparse[layer].to(means.device)
            self._sums[layer] = self._sums[layer] + means.sum(0)

    def _count(self, norms: torch.Tensor, is_outlier: torch.Tensor) -> None:
        """Adds norms after every layer, `(num_layers, batch_size, tokens)`, and which of the tokens are outliers."""
        norms, is_outlier = norms[..., self.encoder.patch_slice], is_outlier[:, self.encoder.patch_slice]
        self.num_images += len(is_outlier)
        self._num_patches += is_outlier.numel()
        self._num_outliers += int(is_outlier.sum())
        self._beyond = self._beyond + outlier_mask(norms[:, is_outlier], self.threshold).sum(1)
        here = norms[self.detect_layer]
        self._norms.update({"outlier": here[is_outlier][None], "rest": here[~is_outlier][None]})

    @property
    def mean(self) -> torch.Tensor:
        """Mean over the images with outliers of the mean magnitude at their outliers, `(num_layers, num_neurons)`."""
        return (torch.stack(self._sums) / self.num_images_with_outliers).cpu()

    @property
    def outlier_share(self) -> float:
        """Of all patches."""
        return self._num_outliers / self._num_patches

    def first_layer(self) -> int:
        """The first layer, from 0, after which half of the outliers are beyond the threshold already."""
        return int((2 * self._beyond >= self._num_outliers).nonzero()[0])

    def require_outliers(self, apart: bool) -> None:
        """Raises `ValueError` where there are none and, if asked, where they are no group of their own."""
        outliers, rest = (self._norms.distributions(kind)[0] for kind in ("outlier", "rest"))
        where = f"after layer {self.detect_layer} of {self.encoder.name}"
        if not self._num_outliers:
            raise ValueError(
                f"No patch of {self.num_images} images has a norm above {self.threshold:.4g} {where}; the largest is "
                f"{rest.maximum:.4g}. Without outliers there is nothing to shift; with a lower threshold there may be."
            )
        found = separation(outliers, rest)
        if apart and not found.is_clear:
            raise ValueError(
                f"The {outliers.count} patches with a norm above {self.threshold:.4g} {where} are the tail of the "
                f"others and no artifacts: their median is {found.ratio:.2f} times that of the rest, "
                f"{found.distance:.1f} of its standard deviations away. If they are what you look for, give the "
                "threshold as a number."
            )


def _neurons(mlp: nn.Module, down: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    """Activations for some tokens, `(number, hidden_size) -> (number, num_neurons)`."""
    found = []
    with down.register_forward_pre_hook(lambda _, args: found.append(args[0])):
        mlp(inputs)
    return found[0]


def _is_sparse(activations: torch.Tensor) -> torch.Tensor:
    """`(batch_size, tokens, num_neurons) -> (batch_size, num_neurons)`"""
    return (activations < SPARSE_BELOW).sum(1) >= SPARSE_SHARE * activations.shape[1]
