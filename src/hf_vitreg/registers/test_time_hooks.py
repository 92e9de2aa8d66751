# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Test-time registers for models of transformers and timm, in place: for those who do not convert them.

The registers stand before the patches inside of every layer and nowhere else, so that whoever looks at a layer's input
or output, and the model's own code around the layers, finds the tokens that were there before.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from ..features import VisionEncoder
from ..modeling_vitreg import ViTRegNeuronShift


def attach_test_time_registers(
    model: nn.Module,
    neurons: Mapping[int, Sequence[int]],
    num_registers: int = 1,
    reduce: Literal["neuron", "layer"] = "neuron",
) -> "AttachedRegisters":
    """Gives test-time registers (Jiang et al., 2025) to a model of transformers or timm, until they are removed.

    ```python
    with attach_test_time_registers(model, neurons):
        outputs = model(pixel_values)
    ```

    Outputs keep their shapes; attention maps alone have a row and a column more for each register, before those of the
    patches. They are for inference: the model is set to eval mode. What has its layers run again in the backward pass,
    as timm's gradient checkpointing, is refused when it happens.

    Args:
        model: The ViT, or what has one inside: a classifier, a dual encoder.
        neurons: From a layer, counted from 0, to channels of its MLP, as `find_register_neurons(...).neurons`.
        num_registers: How many, 1 or more.
        reduce: What a register receives: of each neuron its own largest activation, or one number for all neurons of
            a layer (`"layer"`), as the released code does.

    Returns:
        A context manager. It works from now on, and until its context ends or `remove` is called.

    Raises:
        ValueError: where there is no ViT inside, it is a ViTReg (which `with_test_time_registers` is for) or has
            test-time registers attached, and for neurons, layers or numbers that there cannot be.
    """
    return AttachedRegisters(VisionEncoder.wrap(model), neurons, num_registers, reduce)


class AttachedRegisters:
    """Test-time registers of somebody else's model: see `attach_test_time_registers`."""

    def __init__(self, encoder: VisionEncoder, neurons: Mapping[int, Sequence[int]], num_registers: int, reduce: str):
        mlps = encoder.mlps()
        _check(encoder, neurons, num_registers, reduce, [down.in_features for _, down in mlps])
        self._hooks, self._forwards = [], []
        self._num_registers, self._passing = num_registers, _Passing(encoder, num_registers)
        for index, layer in enumerate(encoder.blocks):
            forward = _LayerForward(layer.forward, index, self._passing)
            self._forwards.append((layer, layer.__dict__.get("forward"), forward))
            layer.forward = forward
        # timm's rotary attention is told how many tokens are not rotated, others find out
        self._attentions = [each for each in encoder.attention_modules() if hasattr(each, "num_prefix_tokens")]
        for attention in self._attentions:
            attention.num_prefix_tokens += num_registers
        for index, chosen in neurons.items():
            if chosen:
                shift = ViTRegNeuronShift(chosen, encoder.num_prefix_tokens, num_registers, reduce)
                self._hooks.append(mlps[index][1].register_forward_pre_hook(partial(_shift_input, shift)))

    @property
    def register_tokens(self) -> torch.Tensor | None:
        """After the last layer of the last forward pass, `(batch_size, num_registers, hidden_size)`."""
        return self._passing.registers

    def remove(self) -> None:
        """The model is what it was. More than once does nothing."""
        for layer, _, forward in self._forwards:
            if layer.__dict__.get("forward") is not forward:
                raise RuntimeError(
                    f"Something else was put around the layers since: {layer.forward}. Remove it first."
                )
        for hook in self._hooks:
            hook.remove()
        for attention in self._attentions:
            attention.num_prefix_tokens -= self._num_registers
        for layer, before, _ in self._forwards:
            del layer.forward
            if before is not None:
                layer.forward = before
        self._hooks, self._attentions, self._forwards = [], [], []

    def __enter__(self) -> "AttachedRegisters":
        return self

    def __exit__(self, *exception) -> None:
        self.remove()


class _Passing:
    """What goes from a layer to the next beside the tokens that everybody sees."""

    def __init__(self, encoder: VisionEncoder, num_registers: int):
        self.encoder, self.num_registers = encoder, num_registers
        self.registers: torch.Tensor | None = None
        self.layer = -1

    def before(self, layer: int, tokens: torch.Tensor) -> torch.Tensor:
        """The registers that enter a layer."""
        if layer == 0:
            # zeros behind the positions and before the norm, as in the published code for CLIP
            self.registers = self.encoder.pre_norm(
                tokens.new_zeros(tokens.shape[0], self.num_registers, tokens.shape[2])
            )
        elif layer != self.layer + 1:
            raise RuntimeError(
                f"Layer {layer} was run after layer {self.layer}. Attached test-time registers need all layers one "
                "after another, without gradient checkpointing that runs them again."
            )
        self.layer = layer
        return self.registers


class _LayerForward:
    """The forward of a layer with registers before its patches, which nobody outside of it sees.

    No hook of the layer itself, since others on the same layer would see its input with the registers.
    """

    def __init__(self, forward, index: int, passing: _Passing):
        self.forward, self.index, self.passing = forward, index, passing
        self.begin = passing.encoder.num_prefix_tokens
        self.end = self.begin + passing.num_registers

    def __call__(self, tokens: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        registers = self.passing.before(self.index, tokens)
        tokens = torch.cat([tokens[:, : self.begin], registers, tokens[:, self.begin :]], dim=1)
        tokens = self.forward(tokens, *args, **kwargs)
        self.passing.registers = tokens[:, self.begin : self.end]
        return torch.cat([tokens[:, : self.begin], tokens[:, self.end :]], dim=1)


def _shift_input(shift: ViTRegNeuronShift, module: nn.Module, args: tuple) -> torch.Tensor:
    # the model may have been moved since
    return shift.to(args[0].device)(args[0])


def _check(
    encoder: VisionEncoder,
    neurons: Mapping[int, Sequence[int]],
    num_registers: int,
    reduce: str,
    num_neurons: Sequence[int],
) -> None:
    """Raises `ValueError`: see `attach_test_time_registers`."""
    if encoder.source == "vitreg":
        raise ValueError(
            f"{encoder.name} is a ViTReg, which has test-time registers of its own: with_test_time_registers."
        )
    if any(isinstance(layer.__dict__.get("forward"), _LayerForward) for layer in encoder.blocks):
        raise ValueError(f"{encoder.name} has test-time registers attached already. Remove them first.")
    if num_registers < 1:
        raise ValueError(f"There can be 1 or more test-time registers, got {num_registers}.")
    if reduce not in ("neuron", "layer"):
        raise ValueError(f'reduce must be "neuron" or "layer", got {reduce!r}.')
    if not any(neurons.values()):
        raise ValueError("There are no neurons to shift.")
    for layer, chosen in neurons.items():
        if not 0 <= layer < encoder.num_layers:
            raise ValueError(f"{encoder.name} has layers 0 to {encoder.num_layers - 1}, got neurons of layer {layer}.")
        wrong = [neuron for neuron in chosen if not 0 <= neuron < num_neurons[layer]]
        if wrong or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"Neurons of layer {layer} of {encoder.name} must be different ones of 0 to {num_neurons[layer] - 1}, "
                f"got {list(chosen)}."
            )
