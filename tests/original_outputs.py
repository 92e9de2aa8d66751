# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What the original repositories' code computes on tiny models, see fixtures/README.md."""

from pathlib import Path

import torch
from safetensors.torch import load_file


FIXTURES = Path(__file__).parent / "fixtures"
Tensors = dict[str, torch.Tensor]


def load(name: str) -> tuple[Tensors, Tensors, Tensors]:
    """The state dict under its original names, the inputs ("20x20", "text"), and the outputs ("tokens/20x20").

    Args:
        name: Of a file in fixtures/, e.g. "dino".
    """
    parts = {"state": {}, "input": {}, "output": {}}
    for full_name, tensor in load_file(FIXTURES / f"{name}.safetensors").items():
        part, own_name = full_name.split("/", 1)
        parts[part][own_name] = tensor
    return parts["state"], parts["input"], parts["output"]


def assert_close(ours: torch.Tensor, original: torch.Tensor):
    """Within 1e-5 of the largest value, as a conversion asks of every model."""
    assert ours.shape == original.shape
    assert (ours - original).abs().max() <= 1e-5 * original.abs().max()
