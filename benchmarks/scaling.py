# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A pretraining recipe on many GPUs, on paper: `python benchmarks/scaling.py --config RECIPE --gpus 8 64 --gpu H100`.

FLOPs and parameters are counted on a model without weights, memory and communication follow from its sizes, and time
from a share of the GPU's peak that is assumed, not measured. `--check` puts the same formulas beside what small models
take on this machine: the flop counter's operations, and the peak of the tensors of a step.

The global batch is that of the recipe on the fewest GPUs given: on more of them fewer batches are accumulated. Flags
of `pretrain.py` override the recipe.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from scaling_check import check
from timing import RESULTS, save
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from hf_vitreg.objectives.base import Objective
from hf_vitreg.objectives.clip import CLIPObjective
from hf_vitreg.objectives.dino import DINOObjective
from hf_vitreg.objectives.post_hoc import PostHocObjective
from hf_vitreg.objectives.supervised import SupervisedObjective
from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.pretraining.models import build_backbone, build_classifier
from hf_vitreg.recipe import parse_recipe
from hf_vitreg.registers.warm_start import add_registers
from hf_vitreg.training.cost import ObjectiveSizes, TrainingCost, cost_of_sizes
from hf_vitreg.training.footprint import device_memory, step_communication
from hf_vitreg.training.throughput import PEAK_TFLOPS


GIB = 2**30
IMAGENET_IMAGES = 1_281_167
# GPUs of a machine, whose links are faster than the network
NODE_SIZE = 8


def main() -> None:
    options, flags = parse_options()
    if options.check:
        return check()
    # sizes do not depend on where images come from, which recipes of streams leave to the command
    recipe = parse_recipe(PretrainRecipe, ["--config", str(options.config), "--streaming", "false", *flags])
    with torch.device("meta"):
        sizes = ObjectiveSizes.of(build_objective(recipe, options.num_classes))
    cost = cost_of_sizes(recipe, sizes, max(options.gpus))
    global_batch = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps * min(options.gpus)
    rows = [
        scaled(recipe, sizes, strategy, num_gpus, global_batch, options)
        for strategy in options.strategy
        for num_gpus in options.gpus
    ]
    show(options, cost, rows, global_batch)
    name = f"scaling_{options.config.stem}"
    save(
        name,
        torch.device("cpu"),
        setting=f"on paper: {options.gpu} at {options.mfu:.0%} of its peak, {options.node_bandwidth:g} GB/s a GPU in "
        f"a machine and {options.network_bandwidth:g} between machines, global batch {global_batch}",
        gflops_of_an_image={part: flops / 1e9 for part, flops in cost.flops.items()},
        gflops_recomputed=cost.recomputed_flops / 1e9,
        parameters=cost.parameters,
        teacher_parameters=cost.teacher_parameters,
        scaled=rows,
    )
    plot(rows, options, RESULTS / f"{name}.png")
    return None


def parse_options() -> tuple[argparse.Namespace, list[str]]:
    """Options of this command, and what is left for the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="Recipe, such as recipes/pretrain/dinov2_vitl14_reg4.yaml.")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64], help="Numbers of GPUs.")
    parser.add_argument("--gpu", default="H100", choices=sorted(PEAK_TFLOPS), type=known_gpu, help="Their kind.")
    parser.add_argument("--strategy", nargs="+", default=["ddp", "fsdp2"], choices=["ddp", "fsdp2"])
    parser.add_argument("--mfu", type=float, default=0.4, help="Share of the peak, for time.")
    parser.add_argument("--node_bandwidth", type=float, default=450, help="GB/s that a GPU sends in its machine.")
    parser.add_argument("--network_bandwidth", type=float, default=50, help="GB/s that it sends to other machines.")
    parser.add_argument("--num_images", type=int, default=IMAGENET_IMAGES, help="Of an epoch.")
    parser.add_argument("--num_classes", type=int, default=1000, help="Of a classifier.")
    parser.add_argument("--check", action="store_true", help="Measure small models here, beside the formulas.")
    options, flags = parser.parse_known_args()
    if options.config is None and not options.check:
        parser.error("--config names the recipe; --check needs none.")
    return options, flags


def known_gpu(name: str) -> str:
    """The name as it is spelled in the table of peaks."""
    return {known.lower(): known for known in PEAK_TFLOPS}.get(name.lower(), name)


def build_objective(recipe: PretrainRecipe, num_classes: int) -> Objective:
    """What the recipe trains."""
    if recipe.objective == "dino":
        masks = recipe.masks_patches
        return DINOObjective(build_backbone(recipe, use_mask_token=masks), recipe, total_steps=1)
    if recipe.objective == "supervised":
        settings = {"classifier_layout": recipe.classifier_layout}
        if recipe.distillation_teacher:
            settings = {"classifier_layout": "cls_distillation", "use_distillation_token": True}
        model = build_classifier(recipe, [str(label) for label in range(num_classes)], **settings)
        return SupervisedObjective(model, recipe, recipe.ema_decay)
    if recipe.objective == "post_hoc":
        teacher = build_backbone(dataclasses.replace(recipe, num_register_tokens=0))
        student = add_registers(teacher, recipe.num_register_tokens)
        return PostHocObjective(teacher, student, recipe, torch.zeros(teacher.config.num_channels))
    text = CLIPTextConfig(
        vocab_size=recipe.text_vocab_size,
        hidden_size=recipe.text_hidden_size,
        intermediate_size=4 * recipe.text_hidden_size,
        projection_dim=recipe.projection_dim,
        num_hidden_layers=recipe.text_num_hidden_layers,
        num_attention_heads=recipe.text_num_attention_heads,
        max_position_embeddings=recipe.text_max_length,
    )
    return CLIPObjective(build_backbone(recipe), CLIPTextModelWithProjection(text), recipe, recipe.ema_decay)


def scaled(
    recipe: PretrainRecipe,
    sizes: ObjectiveSizes,
    strategy: str,
    num_gpus: int,
    global_batch: int,
    options: argparse.Namespace,
) -> dict:
    """Memory, communication and time on so many GPUs."""
    batch_size = min(recipe.per_device_train_batch_size, max(1, global_batch // num_gpus))
    num_batches = max(1, global_batch // (batch_size * num_gpus))
    recipe = dataclasses.replace(recipe, per_device_train_batch_size=batch_size)
    memory = device_memory(recipe, sizes, num_gpus, strategy)
    sent = step_communication(recipe, sizes, num_gpus, strategy)
    # DDP sends gradients with the last batch of a step; all else is sent with each
    sent = {
        part: number * (1 if (strategy, part) == ("ddp", "gradients") else num_batches)
        for part, number in sent.items()
    }
    cost = cost_of_sizes(recipe, sizes, num_gpus)
    flops = (cost.flops_per_image + cost.recomputed_flops) * batch_size * num_batches
    compute = flops / (options.mfu * PEAK_TFLOPS[options.gpu] * 1e12)
    bandwidth = (options.node_bandwidth if num_gpus <= NODE_SIZE else options.network_bandwidth) * 1e9
    communication = sum(sent.values()) / bandwidth
    # communication runs beside the computation, and the longer one counts
    seconds = max(compute, communication)
    step_size = batch_size * num_batches * num_gpus
    steps = recipe.max_steps or recipe.num_train_epochs * (options.num_images // step_size)
    return {
        "strategy": strategy,
        "gpus": num_gpus,
        "batch_size_of_a_gpu": batch_size,
        "accumulated": num_batches,
        "memory_gib": {part: number / GIB for part, number in memory.items()},
        "memory_total_gib": sum(memory.values()) / GIB,
        "sent_gb": {part: number / 1e9 for part, number in sent.items()},
        "petaflops_of_a_step": flops * num_gpus / 1e15,
        "compute_seconds": compute,
        "communication_seconds": communication,
        "images_per_second": step_size / seconds,
        "steps": steps,
        "gpu_hours": steps * seconds * num_gpus / 3600,
    }


def show(options: argparse.Namespace, cost: TrainingCost, rows: list[dict], global_batch: int) -> None:
    console = Console()
    total = cost.flops_per_image
    parts = Table("part", "GFLOP an image", "share", title=f"{options.config.stem}: {total / 1e9:.0f} GFLOP an image")
    for part, flops in sorted(cost.flops.items(), key=lambda item: -item[1]):
        parts.add_row(part, f"{flops / 1e9:.1f}", f"{flops / total:.1%}")
    if cost.recomputed_flops:
        parts.add_row("recomputed", f"{cost.recomputed_flops / 1e9:.1f}", f"{cost.recomputed_flops / total:+.1%}")
    console.print(parts)
    title = f"Global batch {global_batch}, {options.gpu} at {options.mfu:.0%} of its peak, on paper"
    table = Table("strategy", "GPUs", "batch", "GiB a GPU", "most of it", "GB sent", "compute s", title=title)
    for column in ("communication s", "images/s", "GPU hours"):
        table.add_column(column)
    for row in rows:
        most = max(row["memory_gib"], key=row["memory_gib"].get)
        table.add_row(
            row["strategy"],
            str(row["gpus"]),
            f"{row['batch_size_of_a_gpu']} x {row['accumulated']}",
            f"{row['memory_total_gib']:.1f}",
            f"{most} {row['memory_gib'][most]:.1f}",
            f"{sum(row['sent_gb'].values()):.1f}",
            f"{row['compute_seconds']:.2f}",
            f"{row['communication_seconds']:.2f}",
            f"{row['images_per_second']:.0f}",
            f"{row['gpu_hours']:.0f}",
        )
    console.print(table)


def plot(rows: list[dict], options: argparse.Namespace, path: Path) -> None:
    """Memory of a GPU by part, and time of computation and communication, over the number of GPUs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    memory_axes, time_axes = figure.subplots(1, 2)
    labels = [f"{row['strategy']}\n{row['gpus']}" for row in rows]
    parts = list(dict.fromkeys(part for row in rows for part in row["memory_gib"]))
    floor = [0.0] * len(rows)
    for part in parts:
        heights = [row["memory_gib"].get(part, 0.0) for row in rows]
        memory_axes.bar(labels, heights, bottom=floor, label=part)
        floor = [low + height for low, height in zip(floor, heights)]
    memory_axes.set(title="Memory of a GPU", ylabel="GiB")
    memory_axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    positions = range(len(rows))
    for shift, (part, label) in enumerate((("compute_seconds", "computation"), ("communication_seconds", "sending"))):
        time_axes.bar([p + 0.4 * shift - 0.2 for p in positions], [row[part] for row in rows], width=0.4, label=label)
    time_axes.set_xticks(positions, labels)
    time_axes.set(title=f"Time of a step, {options.gpu} at {options.mfu:.0%} of its peak", ylabel="seconds")
    time_axes.legend(fontsize="small")
    figure.suptitle(f"{options.config.stem}, on paper")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
