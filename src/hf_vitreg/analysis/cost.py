# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What registers cost: parameters and FLOPs, counted on a model without weights."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..configuration_vitreg import ViTRegConfig
from ..features import VisionEncoder
from ..modeling_vitreg import ViTRegModel, ViTRegPreTrainedModel


NUM_REGISTERS = (0, 1, 2, 4, 8, 16)
# Percent that registers add at most, by "Vision Transformers Need Registers"
PAPER_ADDED_FLOPS = {4: 2.0, 16: 6.0}


@dataclass(frozen=True)
class RegisterCost:
    """What a model with some number of registers costs, for one image.

    Attributes:
        parameters: All of the model without its classifier.
        gflops: Of a forward pass, 1e9 floating point operations; a multiplication and its addition are two. Only
            matrix products and convolutions are counted.
        added_parameters_percent, added_gflops_percent: More than without registers.
        paper_added_flops_percent: What the paper says that they add at most, or `None` where it does not.
    """

    parameters: int
    gflops: float
    added_parameters_percent: float
    added_gflops_percent: float
    paper_added_flops_percent: float | None


def register_cost(
    config: ViTRegConfig, numbers: Sequence[int] = NUM_REGISTERS, image_size: tuple[int, int] | None = None
) -> dict[int, RegisterCost]:
    """Parameters and counted FLOPs with other numbers of registers, beside the paper's figures.

    Args:
        config: Of any model; its own number of registers does not matter.
        numbers: Of registers.
        image_size: Height and width in pixels, `config.image_size` where not given. More patches make registers
            cheaper.

    Returns:
        The cost for every number, in their order.

    Raises:
        ValueError: If a number is negative.
    """
    if min(numbers) < 0:
        raise ValueError(f"Numbers of registers must be 0 or more, got {', '.join(map(str, numbers))}.")
    sizes = {number: _size(config, number, image_size) for number in dict.fromkeys((0, *numbers))}
    none = sizes[0]
    return {
        number: RegisterCost(
            parameters=sizes[number][0],
            gflops=sizes[number][1] / 1e9,
            added_parameters_percent=100 * (sizes[number][0] / none[0] - 1),
            added_gflops_percent=100 * (sizes[number][1] / none[1] - 1),
            paper_added_flops_percent=PAPER_ADDED_FLOPS.get(number),
        )
        for number in numbers
    }


def _size(config: ViTRegConfig, num_register_tokens: int, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """Parameters, and FLOPs of one image."""
    config = copy.deepcopy(config)
    config.num_register_tokens = num_register_tokens
    config.num_test_time_registers, config.register_neurons = 0, None  # whose shift costs no FLOPs
    if image_size is None:
        image_size = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    return _counted(ViTRegModel, config, image_size)


def forward_flops(model: ViTRegPreTrainedModel, image_size: tuple[int, int]) -> int:
    """FLOPs of a model of any head for one image of this height and width, counted as those of `RegisterCost`."""
    return _counted(type(model), model.config, image_size)[1]


def _counted(
    model_class: type[ViTRegPreTrainedModel], config: ViTRegConfig, image_size: tuple[int, int]
) -> tuple[int, int]:
    """Parameters, and FLOPs of one image, of a model without weights."""
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # its products are counted on every device
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        # frozen, and not under no_grad: the counter asks tensors that require a gradient for the function of theirs
        model = model_class(config).eval().requires_grad_(False)
        model(torch.empty(1, config.num_channels, *image_size))
    return model.num_parameters(), counter.get_total_flops()


def config_of_same_size(encoder: VisionEncoder) -> ViTRegConfig | None:
    """The model's own, or that of a ViTReg with its sizes; `None` where the form of its layers is not known."""
    config = getattr(encoder.model, "config", None)
    # of the Hub's copy of the class too
    if type(config).__name__ == "ViTRegConfig":
        return config
    mlp = encoder.mlp_size()
    if mlp is None:
        return None
    width, is_gated = mlp
    return ViTRegConfig(
        hidden_size=encoder.hidden_size,
        num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_heads,
        intermediate_size=width,
        use_swiglu_ffn=is_gated,
        patch_size=encoder.patch_size,
        image_size=encoder.image_size,
    )
