# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""ViTs with known artifacts: neurons of MLPs turn patches of a constant colour, or two places, into outliers."""

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
# of `planted_neurons`, layers from 0: the first two fire for patches of a constant colour, the last one at two places
REGISTER_NEURONS = {1: [11, 40], 3: [7]}
MANY_ROWS, MANY_COLS, PLACES = 12, 11, [17, 90]


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
    direction = _embed_constants(model)
    up, down = neuron(model)
    _read(up, NEURON, direction)
    down.weight[:, NEURON] = scale * _unit(model) / 50
    return VisionEncoder.wrap(model, "planted" if scale > 1 else "untouched", MEAN, STD)


@torch.no_grad()
def planted_neurons(scale: float = 500.0, num_registers: int = 0, seed: int = 3, **overrides) -> VisionEncoder:
    """A random model with `REGISTER_NEURONS`, each of which alone makes outliers.

    Those of one layer write at right angles, so that none makes up for another. Attention adds little, so that a token
    more changes little by itself.
    """
    torch.manual_seed(seed)
    sizes = {
        "patch_size": PATCH_SIZE,
        "image_size": (MANY_ROWS * PATCH_SIZE, MANY_COLS * PATCH_SIZE),
        "num_hidden_layers": NUM_LAYERS,
        "num_register_tokens": num_registers,
    }
    model = ViTRegModel(tiny_config(**{**sizes, **overrides})).eval()
    constant, place = _embed_constants(model), _unit(model)
    # rotary models have no positions to mark places with: there the last neuron is never active
    if model.embeddings.position_embeddings is not None:
        model.embeddings.position_embeddings[:, model.config.num_prefix_positions :][:, PLACES] = 12 * place
    writes = torch.linalg.qr(torch.randn(model.config.hidden_size, 3)).Q.T
    writes[2] *= 2**0.5
    for layer in model.encoder.layer:
        layer.attention.o_proj.weight.mul_(0.2)
    planted = [(1, 11, constant), (1, 40, constant), (3, 7, place)]
    for (layer, channel, direction), write in zip(planted, writes):
        mlp = model.encoder.layer[layer].mlp
        if model.config.use_swiglu_ffn:
            mlp.up_proj.weight[channel], mlp.up_proj.bias[channel] = 0, 1
        up, down = (mlp.gate_proj, mlp.down_proj) if model.config.use_swiglu_ffn else (mlp.fc1, mlp.fc2)
        _read(up, channel, direction)
        down.weight[:, channel] = scale * write / 50
    return VisionEncoder.wrap(model, "planted", MEAN, STD)


def _embed_constants(model: ViTRegModel) -> torch.Tensor:
    """Patches of a constant colour, and no others, are embedded in the direction that is returned."""
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
    return direction


def _read(up: torch.nn.Linear, channel: int, direction: torch.Tensor) -> None:
    """The channel is active for tokens that point in the direction, and for no others."""
    centred = direction - direction.mean()
    up.weight[channel] = 4 * centred / centred.norm()
    up.bias[channel] = -4 * 0.8 * len(direction) ** 0.5


def _unit(model: ViTRegModel) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(model.config.hidden_size), dim=0)


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
