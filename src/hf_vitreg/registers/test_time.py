# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Registers for a model that is not trained on: its register neurons write into new tokens and no more into patches.

"Vision Transformers Don't Need Trained Registers" (Jiang et al., 2025). `find_register_neurons` says which neurons;
`attach_test_time_registers` does the same to a model of transformers or timm, in place.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

from ..configuration_vitreg import ViTRegConfig
from ..modeling_vitreg import ViTRegEncoder, ViTRegPreTrainedModel, neuron_shift


Model = TypeVar("Model", bound=ViTRegPreTrainedModel)


def with_test_time_registers(
    model: Model,
    neurons: Mapping[int, Sequence[int]],
    num_registers: int = 1,
    reduce: Literal["neuron", "layer"] = "neuron",
    copy_weights: bool = True,
) -> Model:
    """A copy with test-time registers behind its own registers. They are in its config, and saved with it.

    No weight changes and none is added. The tokens before the patches are more, and their places in the outputs are
    those that the config says: `num_register_tokens` counts the new ones too.

    Args:
        model: Of any head. It is left as it is.
        neurons: From a layer, counted from 0, to channels of its MLP, as `find_register_neurons(...).neurons`.
        num_registers: How many, 1 or more. In the paper more than one changes little (table 7).
        reduce: What a register receives: of each neuron its own largest activation, as the paper has it, or one
            number for all neurons of a layer, as the released code does (`"layer"`).
        copy_weights: `False` shares the weights with the model, which takes no memory.

    Raises:
        ValueError: for a model of another package, one that has test-time registers, and neurons, layers or numbers
            that there cannot be.
    """
    if not isinstance(model, ViTRegPreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no ViTReg. Use attach_test_time_registers for models of transformers and "
            "timm, or convert it: python conversion/convert.py, see its --help."
        )
    if num_registers < 1:
        raise ValueError(f"There can be 1 or more test-time registers, got {num_registers}.")
    if reduce not in ("neuron", "layer"):
        raise ValueError(f'reduce must be "neuron" or "layer", got {reduce!r}.')
    present = model.config.num_test_time_registers
    if present:
        raise ValueError(f"The model has {present} test-time registers already. Start from the model without them.")
    shared = [] if copy_weights else [*model.parameters(), *model.buffers()]
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    for config in {id(module.config): module.config for module in model.modules() if _has_config(module)}.values():
        config.num_register_tokens += num_registers
        config.num_test_time_registers = num_registers
        config.register_neurons = {layer: list(each) for layer, each in sorted(neurons.items())}
        config.register_neuron_reduce = reduce
        config.validate_vitreg()
    for encoder in (module for module in model.modules() if isinstance(module, ViTRegEncoder)):
        for index, layer in enumerate(encoder.layer):
            shift = neuron_shift(model.config, index)
            layer.mlp.shift = None if shift is None else shift.to(layer.norm2.weight.device)
    return model


def _has_config(module: object) -> bool:
    return isinstance(getattr(module, "config", None), ViTRegConfig)
