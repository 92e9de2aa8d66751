# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Whether a forward pass costs what the arithmetic says: `python benchmarks/inference_sizes.py`.

Over batch sizes and image sizes, time per floating point operation should stay what it is, or fall. No step from one
size to the next is to be worse than 1.3 times it. The model and the optimized one take turns at all sizes in one run,
outputs are compared first, and steps are medians of the ratios within rounds.
"""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
import typer
from peers import NUM_REGISTER_TOKENS, PATCH_SIZE, build, check_equal, tokens
from rich.console import Console
from rich.table import Table
from timing import RESULTS, save
from torch import nn

from hf_vitreg.analysis.cost import forward_flops
from hf_vitreg.deployment.optimize import optimize
from hf_vitreg.deployment.timing import alternate, ratio
from hf_vitreg.machine import usable_device


BOUND = 1.3
IMAGE_SIZE = 224  # at which batches grow
DTYPES = {"plain, float32": torch.float32, "optimize, float32": torch.float32, "optimize, bfloat16": torch.bfloat16}


def main(
    size: Annotated[str, typer.Option(help="small, base or large.")] = "small",
    batch_sizes: Annotated[str, typer.Option(help=f"At {IMAGE_SIZE} px.")] = "1,2,4,8,16,32,64",
    image_sizes: Annotated[str, typer.Option(help="With a batch of 1.")] = "224,448,672,896",
    rounds: int = 6,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:1; by default a GPU where there is one.")] = None,
):
    device = usable_device(device)
    exact = build(size, IMAGE_SIZE, "sdpa", torch.float32, device, ["hf_vitreg"])["hf_vitreg"].eval()
    models = {name: optimize(exact, dtype) if "optimize" in name else exact for name, dtype in DTYPES.items()}
    # of (batch size, image size)
    series = {
        "batch": [(int(text), IMAGE_SIZE) for text in batch_sizes.split(",")],
        "pixels": [(1, int(text)) for text in image_sizes.split(",")],
    }
    settings = dict.fromkeys(setting for settings in series.values() for setting in settings)
    images = {setting: torch.randn(setting[0], 3, setting[1], setting[1], device=device) for setting in settings}
    for pixel_values in images.values():
        check_equal(models, pixel_values, DTYPES, exact)

    @torch.no_grad()
    def forward(model: nn.Module, pixel_values: torch.Tensor) -> None:
        tokens(model, pixel_values)

    runs = {(name, setting): partial(forward, models[name], images[setting]) for name in models for setting in images}
    seconds = alternate(runs, rounds, device)
    flops = {setting: setting[0] * forward_flops(exact, (setting[1], setting[1])) for setting in settings}
    rows = {
        name: {
            grown: steps([flops[setting] for setting in settings], [seconds[name, setting] for setting in settings])
            for grown, settings in series.items()
        }
        for name in models
    }
    labels = {"batch": [batch for batch, _ in series["batch"]], "pixels": [side for _, side in series["pixels"]]}
    model = f"ViT-{size}/{PATCH_SIZE}, {NUM_REGISTER_TOKENS} registers"
    show(model, rows, labels)
    name = f"inference_sizes_{device.type}_{size}"
    save(
        name,
        device,
        setting=f"{model}, batches at {IMAGE_SIZE} px, other sizes with a batch of 1",
        threads=torch.get_num_threads(),
        rounds=rounds,
        sizes=labels,
        bound=BOUND,
        worst_step=worst_step(rows),
        cost=rows,
    )
    plot(f"{model}: {device.type}", rows, labels, name)


def steps(flops: Sequence[float], seconds: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    """Time of every size, and its cost beside the size before, which FLOPs alone would leave at 1.

    Args:
        flops: Of every size.
        seconds: Of every size, by round.
    """
    rows = [
        {
            "gflop": operations / 1e9,
            "median_ms": statistics.median(times) * 1e3,
            "gflops": operations / statistics.median(times) / 1e9,
        }
        for operations, times in zip(flops, seconds)
    ]
    costs = [[each / operations for each in times] for operations, times in zip(flops, seconds)]
    for row, cost, cost_before in zip(rows[1:], costs[1:], costs):
        row["step"], row["step_quartiles"] = ratio(cost, cost_before)
    return rows


def worst_step(rows: dict[str, dict[str, list[dict]]]) -> float:
    """The most that a size costs beside the one before it, by FLOPs."""
    return max(row["step"] for parts in rows.values() for part in parts.values() for row in part[1:])


def show(model: str, rows: dict[str, dict[str, list[dict]]], labels: dict[str, list[int]]) -> None:
    table = Table("", "", "GFLOP", "median ms", "GFLOP/s", "time per FLOP to the size before", title=model)
    for name, parts in rows.items():
        for grown, part in parts.items():
            for label, row in zip(labels[grown], part):
                step = f"{row['step']:.2f}" if "step" in row else ""
                cells = (f"{row['gflop']:.0f}", f"{row['median_ms']:.1f}", f"{row['gflops']:.0f}", step)
                table.add_row(name, f"{grown} {label}", *cells)
    Console().print(table)
    Console().print(f"The worst step costs {worst_step(rows):.2f} times its FLOPs (bound {BOUND}).", highlight=False)


def plot(title: str, rows: dict[str, dict[str, list[dict]]], labels: dict[str, list[int]], name: str) -> None:
    """Milliseconds per 1e9 operations over the sizes: flat where cost grows as the arithmetic says."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (grown, sizes) in zip(figure.subplots(1, 2, sharey=True), labels.items()):
        for model, parts in rows.items():
            axes.plot(sizes, [row["median_ms"] / row["gflop"] for row in parts[grown]], marker="o", label=model)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(each) for each in sizes])
        axes.set(xlabel={"batch": f"images of {IMAGE_SIZE} px", "pixels": "height and width of an image"}[grown])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ms per GFLOP")
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(RESULTS / f"{name}.png", dpi=110)


if __name__ == "__main__":
    typer.run(main)
