# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Forward and backward of one model in transformers, timm and hf_vitreg: `python benchmarks/training_step.py`.

Losses and all gradients are compared before anything is timed, and all take turns in one run. hf_vitreg is timed as it
is; with layers that keep less for the backward pass, as `finetune.py` trains them; compiled; and with oneDNN, where it
is the faster one on this CPU.
"""

import copy
from functools import partial
from typing import Annotated, NamedTuple

import torch
import typer
from peer_gradients import check_same_gradients, gradients_of
from peers import build, compiled, describe, tokens
from timing import save, show_speeds
from torch import nn

from hf_vitreg.analysis.cost import forward_flops
from hf_vitreg.deployment.speed import Candidate, measure_speed
from hf_vitreg.machine import usable_device
from hf_vitreg.matmul import fast_float32_matmul
from hf_vitreg.objectives.packing import prepare_for_images


BASELINE = "transformers"
BAR = 1.6  # on two cores of a CPU, for the default options, of the fastest of ours
# a product costs twice as much backward as forward: the gradients of both factors
FORWARD_PASSES = 3


class Trained(NamedTuple):
    """A model of a library, and the precision of float32 products that it is trained with."""

    library: str
    model: nn.Module
    precision: str = "highest"


def main(
    size: Annotated[str, typer.Option(help="small, base or large.")] = "small",
    image_size: int = 224,
    batch_size: int = 8,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    attention: Annotated[str, typer.Option(help="sdpa or eager.")] = "sdpa",
    compile_peers: Annotated[bool, typer.Option("--compile-peers", help="transformers and timm, too.")] = False,
    rounds: int = 12,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:1; by default a GPU where there is one.")] = None,
):
    device, torch_dtype = usable_device(device), getattr(torch, dtype)
    pixel_values = torch.randn(batch_size, 3, image_size, image_size, device=device)
    target = torch.randn(batch_size, 1, 1, device=device)
    models = build(size, image_size, attention, torch_dtype, device)
    trained = ways_to_train(models, compile_peers)

    def step(each: Trained) -> float:
        torch.set_float32_matmul_precision(each.precision)
        each.model.zero_grad(set_to_none=True)
        loss = ((tokens(each.model, pixel_values).float() - target) ** 2).mean()
        loss.backward()
        torch.set_float32_matmul_precision("highest")
        return loss.item()

    losses, gradients = {}, {}
    for name, each in trained.items():
        losses[name], gradients[name] = step(each), gradients_of(each.model)
    libraries = {name: each.library for name, each in trained.items()}
    differences = check_same_gradients(losses, gradients, libraries, models, torch_dtype)
    del gradients

    candidates = {name: Candidate(partial(step, each), torch_dtype) for name, each in trained.items()}
    flops = FORWARD_PASSES * forward_flops(models["hf_vitreg"], (image_size, image_size))
    speeds, limits = measure_speed(candidates, BASELINE, batch_size * flops, batch_size, rounds, device)
    setting = f"{describe(size, image_size, batch_size, attention)}, {dtype}"
    fastest = max(
        (name for name in speeds if libraries[name] == "hf_vitreg"), key=lambda name: speeds[name].times_faster
    )
    bars = {fastest: {"times_faster": BAR}} if device.type == "cpu" else {}
    show_speeds(f"Forward and backward: {setting}", speeds, limits, bars)
    save(
        f"training_step_{device.type}_{size}_{dtype}",
        device,
        setting=setting,
        threads=torch.get_num_threads(),
        rounds=rounds,
        gflops_per_image=flops / 1e9,
        baseline=BASELINE,
        limits={name: limit._asdict() for name, limit in limits.items()},
        losses=losses,
        gradient_differences=differences,
        bar=BAR,
        forward_and_backward={name: speed._asdict() for name, speed in speeds.items()},
    )


def ways_to_train(models: dict[str, nn.Module], compile_peers: bool) -> dict[str, Trained]:
    """All that are compared, by name; weights are the same, and gradients in models of their own."""
    for model in models.values():
        model.train()
    trained = {library: Trained(library, model) for library, model in models.items()}
    ours = models["hf_vitreg"]
    frugal = copy.deepcopy(ours)
    prepare_for_images(frugal)
    trained["hf_vitreg, keeps less"] = Trained("hf_vitreg", frugal)
    trained["hf_vitreg, compiled"] = Trained("hf_vitreg", compiled(copy.deepcopy(ours)))
    if ours.device.type == "cpu":
        with fast_float32_matmul():
            precision = torch.get_float32_matmul_precision()
        if precision != "highest":
            trained |= {
                f"{name}, oneDNN": each._replace(precision=precision)
                for name, each in trained.items()
                if each.library == "hf_vitreg"
            }
    if compile_peers:
        for library in ("transformers", "timm"):
            trained[f"{library}, compiled"] = Trained(library, compiled(copy.deepcopy(models[library])))
    return trained


if __name__ == "__main__":
    typer.run(main)
