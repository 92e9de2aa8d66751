# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Forward pass of one model in transformers, timm and hf_vitreg, in float32, bfloat16 and int8, in one run.

    python benchmarks/inference.py
    python benchmarks/inference.py --size large --batch-size 64 --compile-peers   # on a GPU

All are compared with hf_vitreg in float32 before they are timed, and take turns with matrix products, whose rate is
the limit. Times faster is: than transformers in float32, as it is by default. What registers cost is counted, too.
"""

import copy
from dataclasses import asdict
from functools import partial
from typing import Annotated

import torch
import typer
from peers import PATCH_SIZE, SIZES, build, check_equal, compiled, describe, tokens
from rich.console import Console
from rich.table import Table
from timing import save, show_speeds
from torch import nn

from hf_vitreg import ViTRegConfig
from hf_vitreg.analysis.cost import RegisterCost, forward_flops, register_cost
from hf_vitreg.deployment.optimize import optimize
from hf_vitreg.deployment.quantize import quantize
from hf_vitreg.deployment.speed import Candidate, measure_speed
from hf_vitreg.machine import usable_device
from hf_vitreg.training.throughput import published_peak_flops


BASELINE = "transformers, float32"
# on two cores of a CPU, for the default options
BARS = {
    "hf_vitreg, optimize, float32": {"times_faster": 2.1, "fraction_of_limit": 0.8},
    "hf_vitreg, optimize, bfloat16": {"times_faster": 3.7},
    "hf_vitreg, quantize, int8": {"times_faster": 4.5},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def main(
    size: Annotated[str, typer.Option(help="small, base or large.")] = "small",
    image_size: int = 224,
    batch_size: int = 8,
    dtypes: Annotated[str, typer.Option(help="Beside float32, as bfloat16,int8.")] = "bfloat16,int8",
    attention: Annotated[str, typer.Option(help="sdpa or eager, of what is not optimized.")] = "sdpa",
    compile_peers: Annotated[bool, typer.Option("--compile-peers", help="transformers and timm, too.")] = False,
    rounds: int = 20,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:1; by default a GPU where there is one.")] = None,
):
    device = usable_device(device)
    pixel_values = torch.randn(batch_size, 3, image_size, image_size, device=device)
    names = ["float32", *filter(None, dtypes.split(","))]
    models = {}
    for name in names:
        models |= models_of(name, size, attention, compile_peers, pixel_values)
    dtype_of = {title: DTYPES[title.split(", ")[-1]] for title in models}
    exact = models["hf_vitreg, float32"]
    agreements = check_equal(models, pixel_values, dtype_of, exact)

    @torch.no_grad()
    def forward(model: nn.Module) -> None:
        tokens(model, pixel_values)

    candidates = {title: Candidate(partial(forward, model), dtype_of[title]) for title, model in models.items()}
    flops = forward_flops(exact, (image_size, image_size))
    speeds, limits = measure_speed(candidates, BASELINE, batch_size * flops, batch_size, rounds, device)
    setting = describe(size, image_size, batch_size, attention)
    bars = BARS if device.type == "cpu" else {}
    show_speeds(f"Forward: {setting}", speeds, limits, bars)
    rows = {
        title: {**speed._asdict(), **asdict(agreements[title]), "bars": bars.get(title, {})}
        for title, speed in speeds.items()
    }
    if device.type == "cuda":
        peak = published_peak_flops(torch.cuda.get_device_name(device))
        for title, row in rows.items():
            if peak and dtype_of[title] == torch.bfloat16:
                row["mfu"] = 1e9 * row["gflops"] / peak
                Console().print(f"{title}: {row['mfu']:.1%} of the published peak")
    registers = register_cost(ViTRegConfig(image_size=224, patch_size=PATCH_SIZE, **SIZES[size]))
    show_register_cost(size, registers)
    save(
        f"inference_{device.type}_{size}",
        device,
        setting=setting,
        threads=torch.get_num_threads(),
        rounds=rounds,
        gflops_per_image=flops / 1e9,
        baseline=BASELINE,
        limits={name: limit._asdict() for name, limit in limits.items()},
        forward=rows,
        register_cost={number: asdict(row) for number, row in registers.items()},
    )


def models_of(
    dtype: str, size: str, attention: str, compile_peers: bool, pixel_values: torch.Tensor
) -> dict[str, nn.Module]:
    """All that compute in this dtype; it is the last word of their names."""
    device, image_size = pixel_values.device, pixel_values.shape[-1]
    libraries = build(size, image_size, attention, torch.float32, device)
    for model in libraries.values():
        model.eval()
    ours = libraries.pop("hf_vitreg")
    if dtype == "int8":
        return {"hf_vitreg, quantize, int8": quantize(ours, example=pixel_values)}
    models = {f"{library}, {dtype}": model.to(DTYPES[dtype]) for library, model in libraries.items()}
    if compile_peers:
        models |= {
            f"{library}, compiled, {dtype}": compiled(copy.deepcopy(model)) for library, model in libraries.items()
        }
    if dtype == "float32":
        models["hf_vitreg, float32"] = ours
    models[f"hf_vitreg, optimize, {dtype}"] = optimize(ours, DTYPES[dtype], example=pixel_values)
    return models


def show_register_cost(size: str, cost: dict[int, RegisterCost]) -> None:
    title = f"Registers in ViT-{size}/14 at 224 px (paper: under 2 % FLOPs with 4, up to 6 % with 16)"
    table = Table("registers", "parameters", "added", "GFLOPs an image", "added", title=title)
    for number, row in cost.items():
        added = (f"{row.added_parameters_percent:.3f} %", f"{row.added_gflops_percent:.2f} %")
        table.add_row(str(number), f"{row.parameters:,}", added[0], f"{row.gflops:.3f}", added[1])
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
