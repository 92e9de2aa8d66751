# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Forward pass against transformers and timm, and what registers cost: `python benchmarks/inference.py`."""

from dataclasses import asdict
from functools import partial
from typing import Annotated

import torch
import typer
from peers import PATCH_SIZE, SIZES, build, check_equal, tokens
from rich.console import Console
from rich.table import Table
from timing import alternate, save, show, summary

from hf_vitreg import ViTRegConfig
from hf_vitreg.analysis.cost import RegisterCost, register_cost


TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}


def main(
    size: Annotated[str, typer.Option(help="small, base or large.")] = "small",
    image_size: int = 224,
    batch_size: int = 8,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    attention: Annotated[str, typer.Option(help="sdpa or eager.")] = "sdpa",
    rounds: int = 20,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
):
    device = torch.device(device)
    models = build(size, image_size, attention, getattr(torch, dtype), device)
    for model in models.values():
        model.eval()
    pixel_values = torch.randn(batch_size, 3, image_size, image_size, device=device, dtype=getattr(torch, dtype))
    differences = check_equal(models, pixel_values, TOLERANCE[dtype])

    def forward(model):
        with torch.no_grad():
            tokens(model, pixel_values)

    seconds = alternate({name: partial(forward, model) for name, model in models.items()}, rounds, device)
    rows = summary(seconds)
    setting = f"ViT-{size}/14, 4 registers, {image_size} px, batch {batch_size}, {dtype}, {attention}"
    show(f"Forward: {setting}", rows)
    registers = register_cost(ViTRegConfig(image_size=224, patch_size=PATCH_SIZE, **SIZES[size]))
    show_register_cost(size, registers)
    save(
        f"inference_{device.type}_{size}_{dtype}_{attention}",
        device,
        setting=setting,
        rounds=rounds,
        relative_differences=differences,
        forward=rows,
        register_cost={number: asdict(row) for number, row in registers.items()},
    )


def show_register_cost(size: str, cost: dict[int, RegisterCost]) -> None:
    title = f"Registers in ViT-{size}/14 at 224 px (paper: under 2 % FLOPs with 4, up to 6 % with 16)"
    table = Table("registers", "parameters", "added", "GFLOPs an image", "added", title=title)
    for number, row in cost.items():
        added = (f"{row.added_parameters_percent:.3f} %", f"{row.added_gflops_percent:.2f} %")
        table.add_row(str(number), f"{row.parameters:,}", added[0], f"{row.gflops:.3f}", added[1])
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
