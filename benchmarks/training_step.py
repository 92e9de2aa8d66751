# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Forward and backward against transformers and timm: `python benchmarks/training_step.py`."""

from functools import partial
from typing import Annotated

import torch
import typer
from peers import build, check_equal, tokens
from timing import alternate, save, show, summary


TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}


def main(
    size: Annotated[str, typer.Option(help="small, base or large.")] = "small",
    image_size: int = 224,
    batch_size: int = 8,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    attention: Annotated[str, typer.Option(help="sdpa or eager.")] = "sdpa",
    rounds: int = 12,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
):
    device = torch.device(device)
    models = build(size, image_size, attention, getattr(torch, dtype), device)
    for model in models.values():
        model.train()
    pixel_values = torch.randn(batch_size, 3, image_size, image_size, device=device, dtype=getattr(torch, dtype))
    target = torch.randn(batch_size, 1, 1, device=device)
    differences = check_equal(models, pixel_values, TOLERANCE[dtype])

    def step(model):
        model.zero_grad(set_to_none=True)
        ((tokens(model, pixel_values).float() - target) ** 2).mean().backward()

    seconds = alternate({name: partial(step, model) for name, model in models.items()}, rounds, device)
    rows = summary(seconds)
    setting = f"ViT-{size}/14, 4 registers, {image_size} px, batch {batch_size}, {dtype}, {attention}"
    show(f"Forward and backward: {setting}", rows)
    save(
        f"training_step_{device.type}_{size}_{dtype}_{attention}",
        device,
        setting=setting,
        rounds=rounds,
        relative_differences=differences,
        forward_and_backward=rows,
    )


if __name__ == "__main__":
    typer.run(main)
