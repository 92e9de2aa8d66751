# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A ViT with artifacts that are known: one neuron of one MLP turns patches of a constant colour into outliers."""

import numpy as np
import PIL.Image
import torch
from reference import tiny_config

from hf_vitreg import ViTRegModel
from hf_vitreg.features import VisionEncoder


PATCH_SIZE, ROWS, COLS, NUM_LAYERS, NUM_REGISTERS = 7, 4, 6, 5, 3
PLANTED_LAYER = 3  # counted from 1
NEURON = 11
MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)


@torch.no_grad()
def planted_encoder(scale: float, num_registers: int = NUM_REGISTERS, seed: int = 3, **overrides) -> VisionEncoder:
    """A random model; `scale` multiplies what the neuron writes, and 1 leaves it as any other.

    Patches of a constant colour are embedded as the bias alone, since kernels sum to 0, and the neuron fires for
    tokens that point where the bias points.
    """
    torch.manual_seed(seed)
    sizes = {
        "patch_size": PATCH_SIZE,
        "image_size": (ROWS * PATCH_SIZE, COLS * PATCH_SIZE),
        "num_hidden_layers": NUM_LAYERS,
        "num_register_tokens": num_registers,
    }
    model = ViTRegModel(tiny_config(**{**sizes, **overrides})).eval()
    size = model.config.hidden_size
    direction = torch.nn.functional.normalize(torch.randn(size) - torch.randn(size).mean(), dim=0)
    projection = model.embeddings.patch_embeddings.projection
    weight = 0.3 * torch.randn_like(projection.weight) / projection.weight[0].numel() ** 0.5
    projection.weight.copy_(weight - weight.mean(dim=(-1, -2), keepdim=True))
    projection.bias.copy_(direction)
    for name, parameter in model.named_parameters():
        if name.endswith(("cls_token", "register_tokens")):
            parameter.copy_(0.3 * torch.randn_like(parameter))
        elif name.endswith("position_embeddings"):
            parameter.copy_(0.003 * torch.randn_like(parameter))
    up, down = neuron(model)
    centred = direction - direction.mean()
    up.weight[NEURON] = 4 * centred / centred.norm()
    up.bias[NEURON] = -4 * 0.8 * size**0.5
    down.weight[:, NEURON] = scale * torch.nn.functional.normalize(torch.randn(size), dim=0) / 50
    return VisionEncoder.wrap(model, "planted" if scale > 1 else "untouched", MEAN, STD)


def neuron(model: ViTRegModel) -> tuple[torch.nn.Linear, torch.nn.Linear]:
    """The linear maps before and after the neuron."""
    mlp = model.encoder.layer[PLANTED_LAYER - 1].mlp
    return mlp.fc1, mlp.fc2


def patchy_image(index: int, rows: int = ROWS, cols: int = COLS) -> tuple[PIL.Image.Image, np.ndarray]:
    """Noise with one or two patches of a constant colour, and which these are, `(rows, cols)`."""
    generator = np.random.default_rng(index)
    pixels = generator.integers(0, 256, size=(rows * PATCH_SIZE, cols * PATCH_SIZE, 3), dtype="uint8")
    is_constant = np.zeros((rows, cols), dtype=bool)
    for cell in generator.choice(rows * cols, size=1 + index % 2, replace=False):
        row, col = divmod(int(cell), cols)
        is_constant[row, col] = True
        patch = (slice(row * PATCH_SIZE, (row + 1) * PATCH_SIZE), slice(col * PATCH_SIZE, (col + 1) * PATCH_SIZE))
        pixels[patch] = generator.integers(0, 256, size=3)
    return PIL.Image.fromarray(pixels), is_constant
