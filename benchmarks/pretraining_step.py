# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A pretraining step against lightly-train's: `python benchmarks/pretraining_step.py --python PEER/bin/python`.

Both train DINOv2, each in a process of its own, because peak memory is a process's: `vitreg_steps.py` here and
`lightly_train_steps.py` in an environment that has lightly-train. Steps alternate; while one trains the other waits.
Both see the same crops, already in memory, and have the same losses, sizes, stochastic depth and centering. It is
checked that parameters are as many, and losses of the first step finite and alike. A step is all from batch to batch:
masks, teacher, student, losses, backward, clipping, AdamW, schedules, the teacher's update.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from pretraining_sizes import SIZES
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import save

from hf_vitreg.deployment.matmul_limit import matmul_limit
from hf_vitreg.deployment.timing import summary


FOLDER = Path(__file__).parent
PEER = "lightly-train"
# losses of two random models differ; what is weighted or counted in another way differs more
LOSS_TOLERANCE = 0.15


class Trainer:
    """A process that trains one step when told to."""

    def __init__(self, python: str, script: str, setting: dict):
        command = [python, str(FOLDER / script), json.dumps(setting)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(setting["threads"]), "OMP_WAIT_POLICY": "PASSIVE"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.parameters = self._answer()

    def step(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[1]} ended; what it said is above.")
        return json.loads(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def main(
    python: Annotated[
        str, typer.Option(envvar="LIGHTLY_TRAIN_PYTHON", help="Python of an environment with lightly-train 0.18.")
    ] = "",
    against: Annotated[str, typer.Option(help="lightly-train, or nothing: hf_vitreg alone.")] = PEER,
    size: Annotated[str, typer.Option(help=f"Of the ViT, one of {', '.join(SIZES)}.")] = "small",
    batch_size: int = 8,
    global_size: int = 224,
    local_size: int = 98,
    num_local_crops: int = 8,
    num_prototypes: int = 65536,
    separate_ibot_head: bool = False,
    centering: Annotated[str, typer.Option(help="softmax or sinkhorn_knopp.")] = "softmax",
    drop_path_rate: Annotated[float, typer.Option(help="0.1 is lightly-train's for every size.")] = 0.1,
    pack_crops: Annotated[bool, typer.Option(help="Ours alone.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Ours alone.")] = False,
    loss_chunk_rows: Annotated[int, typer.Option(help="Ours alone.")] = 256,
    precision: Annotated[str, typer.Option(help="float32, or bfloat16 by autocast.")] = "float32",
    threads: Annotated[int, typer.Option(help="Of both, on a CPU.")] = 2,
    rounds: int = 10,
    mfu: Annotated[bool, typer.Option(help="State model FLOPs utilisation, of the device's peak.")] = False,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
):
    if against and not Path(python).is_file():
        raise typer.BadParameter(
            f"--python must be that of an environment with {PEER}, got {python!r}. Make one: python -m venv PEER && "
            f"PEER/bin/pip install {PEER}==0.18.*. Or set --against '' to measure ours alone."
        )
    setting = dict(
        **SIZES[size],
        device=device,
        threads=threads,
        batch_size=batch_size,
        global_size=global_size,
        local_size=local_size,
        num_local_crops=num_local_crops,
        num_prototypes=num_prototypes,
        head_mlp_size=2048,
        head_bottleneck_size=256,
        separate_ibot_head=separate_ibot_head,
        centering=centering,
        drop_path_rate=drop_path_rate,
        pack_crops=pack_crops,
        gradient_checkpointing=gradient_checkpointing,
        loss_chunk_rows=loss_chunk_rows,
        precision=precision,
    )
    trainers = {"hf_vitreg": Trainer(sys.executable, "vitreg_steps.py", setting)}
    if against:
        trainers[PEER] = Trainer(python, "lightly_train_steps.py", setting)
    parameters = {name: trainer.parameters for name, trainer in trainers.items()}
    check_same_parameters(parameters)
    steps = alternate_steps(trainers, rounds)
    first_losses = {name: compared(records[0]["losses"]) for name, records in steps.items()}
    check_same_losses(first_losses)
    rows = measured(steps, setting, mfu, parameters["hf_vitreg"]["flops_per_image"])
    described = describe(setting)
    show(f"Pretraining step: {described}", rows)
    save(
        f"pretraining_step_{device}_{size}_{precision}",
        torch.device(device),
        setting=described,
        rounds=rounds,
        parameters=parameters,
        first_losses=first_losses,
        steps=rows,
    )


def describe(setting: dict) -> str:
    heads = "separate heads" if setting["separate_ibot_head"] else "a shared head"
    return (
        f"ViT-{setting['name']}/{setting['patch_size']}, 4 registers, batch {setting['batch_size']}, 2 crops of "
        f"{setting['global_size']} and {setting['num_local_crops']} of {setting['local_size']}, DINO, iBOT and KoLeo, "
        f"{heads} of {setting['num_prototypes']:,} prototypes, {setting['centering']}, drop path "
        f"{setting['drop_path_rate']}, {setting['precision']}, {setting['threads']} threads, a chunk of "
        f"{setting['loss_chunk_rows']} rows, packed: {setting['pack_crops']}, checkpointing: "
        f"{setting['gradient_checkpointing']}"
    )


def check_same_parameters(parameters: dict[str, dict]) -> None:
    """Raises `ValueError` where backbones or heads are not of one size."""
    for part in ("backbone_parameters", "head_parameters"):
        numbers = {name: record[part] for name, record in parameters.items()}
        if len(set(numbers.values())) > 1:
            raise ValueError(f"{part} differ: {numbers}. Their times cannot be compared.")


def compared(losses: dict[str, float]) -> dict[str, float]:
    """The losses under common names."""
    parts = {"dino_loss": ("dino_loss", "dino_global_loss", "dino_local_loss")}
    return {
        name: sum(losses.get(part, 0.0) for part in parts.get(name, (name,)))
        for name in ("dino_loss", "ibot_loss", "koleo_loss", "train_loss")
    }


def check_same_losses(losses: dict[str, dict[str, float]]) -> None:
    """Raises `ValueError` where a loss of the first step is not finite, or not about what the other side has."""
    for name, values in losses.items():
        for part, value in values.items():
            own = losses["hf_vitreg"][part]
            if not abs(value - own) <= LOSS_TOLERANCE * abs(own):
                raise ValueError(f"{part} of {name} is {value}, of hf_vitreg {own}: they do not train the same.")


def alternate_steps(trainers: dict[str, Trainer], rounds: int) -> dict[str, list[dict]]:
    """What each says of every step, the first two among them, which do not count."""
    steps = {name: [] for name in trainers}
    for number in track(range(rounds + 2), description="training", transient=True):
        for name in list(trainers)[:: 1 if number % 2 else -1]:
            steps[name].append(trainers[name].step())
    for trainer in trainers.values():
        trainer.end()
    return steps


def measured(steps: dict[str, list[dict]], setting: dict, mfu: bool, flops_per_image: float) -> dict[str, dict]:
    """Time, images per second, share of the matmul limit and peak memory, and the ratios to ours within rounds."""
    rows = summary({name: [record["seconds"] for record in records[2:]] for name, records in steps.items()})
    own_peak = steps["hf_vitreg"][-1]["peak_bytes"]
    torch.set_num_threads(setting["threads"])
    limit = matmul_limit(torch.device(setting["device"]), getattr(torch, setting["precision"]))
    for name, records in steps.items():
        rows[name]["images_per_second"] = setting["batch_size"] / (rows[name]["median_ms"] / 1e3)
        rows[name]["cpu_seconds"] = sorted(record["cpu_seconds"] for record in records[2:])[len(records[2:]) // 2]
        rows[name]["peak_gb"] = records[-1]["peak_bytes"] / 1e9
        rows[name]["our_peak_is"] = own_peak / records[-1]["peak_bytes"]
        rows[name]["fraction_of_limit"] = rows[name]["images_per_second"] * flops_per_image / limit
        rows[name]["load_average"] = round(os.getloadavg()[0], 1)
    if mfu:
        rows["hf_vitreg"]["mfu"] = utilisation(rows["hf_vitreg"]["images_per_second"] * flops_per_image, setting)
    return rows


def utilisation(flops: float, setting: dict) -> float | None:
    """Share of the device's peak, where that is known."""
    from hf_vitreg.training.throughput import peak_flops

    peak = peak_flops(torch.device(setting["device"]), getattr(torch, setting["precision"]))
    return flops / peak if peak else None


def show(title: str, rows: dict[str, dict]) -> None:
    columns = (
        "seconds",
        "images/s",
        "ours is faster by",
        "quartiles",
        "of the matmul limit",
        "peak GB",
        "our peak is",
    )
    table = Table("", *columns, title=title)
    for name, row in rows.items():
        low, high = row["ratio_quartiles"]
        table.add_row(
            name,
            f"{row['median_ms'] / 1e3:.2f}",
            f"{row['images_per_second']:.2f}",
            f"{row['ratio_to_ours']:.2f}x",
            f"{low:.2f} to {high:.2f}",
            f"{row['fraction_of_limit']:.2f}",
            f"{row['peak_gb']:.2f}",
            f"{row['our_peak_is']:.2f} of it",
        )
    Console().print(table)
    if "mfu" in rows["hf_vitreg"]:
        Console().print(f"hf_vitreg uses {rows['hf_vitreg']['mfu']:.0%} of the device's peak.")


if __name__ == "__main__":
    typer.run(main)
