# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Artifacts that are known, and how far post-hoc registers rid a model of them:

    python benchmarks/post_hoc_cifar10.py --data CIFAR10 --model RUN --output_dir runs/post_hoc_cifar10

`CIFAR10` holds parquet files named after their split, `RUN` is what `pretrain.py` left of cifar10_supervised.yaml with
`--num_register_tokens 0`. One neuron of that model is replaced by one that fires for patches that show little, where
they are in some places of the grid, and then adds much along one direction: a high norm at a patch of low information
that does not follow the image when it moves, as with real artifacts. Without what the neuron adds features are clean.
Then `pretrain.py` distils registers from the model with the neuron (recipes/pretrain/cifar10_post_hoc.yaml), and each
checkpoint is measured on validation images: the share of outliers among the norms of patches, and how far patches are
from the clean ones. Flags that are not known here are those of `pretrain.py`.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from timing import RESULTS, save
from transformers import AutoImageProcessor

from hf_vitreg import ViTRegModel
from hf_vitreg.analysis.norms import NormStatistics
from hf_vitreg.analysis.outliers import outlier_threshold
from hf_vitreg.data.labelled_images import load_image_data
from hf_vitreg.data.transforms import EvalTransform
from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.registers.post_hoc import denoised_features, draw_views, make_view, map_back
from hf_vitreg.registers.warm_start import add_registers
from hf_vitreg.training.metrics import MetricsLog, points


ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "pretrain" / "cifar10_post_hoc.yaml"
# of the layers, counted from 0: the further from the first, the less of its place is left in a token of this model
PLANTED_LAYER = 0
# patches that show least, places of the grid where the neuron is to fire, and patches for which it does
LOW_INFORMATION, PLACES, FIRING = 0.4, 0.25, 0.08
# norm that the neuron adds, in median norms of patches behind the last layer
ADDED_NORM = 6.0
# how quickly the neuron rises beyond its threshold, in standard deviations of its input
SHARPNESS = 6.0


def main(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help="Folder of parquet files named after their split.")],
    model: Annotated[Path, typer.Option(help="A ViTReg without registers.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="For the model with the neuron, and for the run.")],
    num_images: Annotated[int, typer.Option("--num_images", help="To plant with, and as many to measure on.")] = 1000,
    threads: int = 1,
):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    processor = AutoImageProcessor.from_pretrained(model)
    planting, held_out = (pixels(data, split, processor, num_images) for split in ("train", "validation"))
    teacher = ViTRegModel.from_pretrained(model).eval()
    clean = plant(teacher, planting)
    planted_dir, run = output_dir / "planted", output_dir / "run"
    teacher.save_pretrained(planted_dir)
    processor.save_pretrained(planted_dir)
    distil(planted_dir, run, data, context.args)

    recipe = PretrainRecipe(**yaml.safe_load((run / "recipe.yaml").read_text()))
    wanted = patches_and_norms(clean, held_out)[0]
    rows = {
        "teacher": measured(teacher, wanted, held_out) | {"follow_the_image": share_that_follows(teacher, held_out)},
        "clean": measured(clean, wanted, held_out),
        "mean of the teacher's views": distances(target(teacher, held_out, recipe, processor), wanted),
    }
    student = add_registers(teacher, recipe.num_register_tokens, recipe.register_init_std)
    curve = {0: measured(student, wanted, held_out)}
    for checkpoint in sorted((run / "checkpoints").glob("step-*")):
        student.load_state_dict(student_weights(checkpoint))
        curve[int(checkpoint.name.removeprefix("step-"))] = measured(student, wanted, held_out)
    last = max(curve)
    rows["student"] = curve[last]
    show(rows)
    state = json.loads((run / "checkpoints" / f"step-{last:08d}" / "run_state.json").read_text())
    save(
        "post_hoc_cifar10",
        torch.device("cpu"),
        setting=f"{num_images:,} validation images; {last} steps of {recipe.per_device_train_batch_size} images, "
        f"{recipe.num_views} views each, {recipe.num_register_tokens} registers, bfloat16",
        minutes=state["seconds"] / 60,
        validation_accuracy_of_the_model=points(MetricsLog(model / "metrics.jsonl").read(), "validation_accuracy")[-1][
            1
        ],
        models=rows,
        student_by_step=curve,
    )
    plot(curve, rows, RESULTS / "post_hoc_cifar10.png")


def pixels(data: Path, split: str, processor, num_images: int) -> torch.Tensor:
    """`(num_images, 3, 32, 32)`, as the model sees them."""
    images, transform = load_image_data(data, split, max_images=num_images), EvalTransform(processor)
    return torch.stack([transform(images.image(index)) for index in range(len(images))])


@torch.no_grad()
def plant(model: ViTRegModel, pixel_values: torch.Tensor) -> ViTRegModel:
    """Replaces the neuron that matters least; returns the model without what the new one adds.

    One linear map of what enters the MLP tells the places from others, a second one patches that show little, each as
    far as one can. The neuron fires beyond a high quantile of their sum.
    """
    entering, median_norm = mlp_input(model, pixel_values)
    patch_size = model.config.patch_size
    patches = pixel_values.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    contrast = patches.flatten(4).std(dim=-1).mean(dim=1).flatten(1)
    is_place = torch.rand(contrast.shape[1]) < PLACES
    tokens = entering[:, model.config.num_prefix_tokens :].flatten(0, 1)
    shows_little = contrast < contrast.quantile(LOW_INFORMATION)
    direction = discriminant(tokens, is_place.expand_as(contrast)) + discriminant(tokens, shows_little)
    direction = direction * SHARPNESS / (tokens @ direction).std()
    threshold = (tokens @ direction).quantile(1 - FIRING)
    mlp = model.encoder.layer[PLANTED_LAYER].mlp
    neuron = importance(mlp, entering).argmin()
    mlp.fc1.weight[neuron], mlp.fc1.bias[neuron] = direction, -threshold
    fired = F.gelu(tokens @ direction - threshold)
    added = F.normalize(torch.randn(model.config.hidden_size), dim=0)
    clean = copy.deepcopy(model)
    mlp.fc2.weight[:, neuron] = ADDED_NORM * median_norm / fired[fired > 0.5].mean() * added
    clean.encoder.layer[PLANTED_LAYER].mlp.fc2.weight[:, neuron] = 0
    return clean


def discriminant(tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Weights that tell the tokens that are wanted from others, of values with a standard deviation of 1."""
    centred = (tokens - tokens.mean(dim=0)).double()
    gram = centred.T @ centred
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    wanted = wanted.flatten().double()
    weights = torch.linalg.solve(gram, centred.T @ (wanted - wanted.mean()))
    return (weights / (centred @ weights).std()).to(tokens.dtype)


def mlp_input(model: ViTRegModel, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the MLP of the planted layer reads, and the median norm of the patches behind the last layer."""
    seen = []
    mlp = model.encoder.layer[PLANTED_LAYER].mlp
    hook = mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    norms = patches_and_norms(model, pixel_values)[1]
    hook.remove()
    return torch.cat(seen), norms.median()


def importance(mlp: torch.nn.Module, entering: torch.Tensor) -> torch.Tensor:
    """Of each neuron, how much it adds on average."""
    return F.gelu(mlp.fc1(entering)).abs().mean(dim=(0, 1)) * mlp.fc2.weight.norm(dim=0)


def distil(planted: Path, run: Path, data: Path, flags: list[str]) -> None:
    """`pretrain.py`, as anybody would run it."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--mixed_precision", "bf16"]
    command += ["--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no", str(ROOT / "pretrain.py")]
    command += ["--config", str(RECIPE), "--model_name_or_path", str(planted), "--output_dir", str(run)]
    command += [f"--{name}_file={data / name}-*.parquet" for name in ("train", "validation")]
    subprocess.run([*command, "--overwrite_output_dir", *flags], check=True)


def student_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint / "model.safetensors")
    return {name.removeprefix("student."): value for name, value in tensors.items() if name.startswith("student.")}


@torch.no_grad()
def patches_and_norms(model: ViTRegModel, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches after the final norm, and their norms before it, where artifacts show."""
    patches, norms = [], []
    for part in pixel_values.split(250):
        outputs = model.eval()(part, output_hidden_states=[-1])
        patches.append(outputs.patch_tokens)
        norms.append(outputs.hidden_states[-1][:, model.config.num_prefix_tokens :].norm(dim=-1))
    return torch.cat(patches), torch.cat(norms)


def outliers(norms: torch.Tensor) -> torch.Tensor:
    """Which patches are beyond five standard deviations, as `hf-vitreg inspect` counts them."""
    statistics = NormStatistics()
    statistics.update({"patch": norms.flatten()[None]})
    [distribution] = statistics.distributions()
    return norms > outlier_threshold(distribution)


def measured(model: ViTRegModel, wanted: torch.Tensor, pixel_values: torch.Tensor) -> dict[str, float]:
    patches, norms = patches_and_norms(model, pixel_values)
    found = {
        "outlier_share": outliers(norms).float().mean().item(),
        "max_norm_ratio": (norms.max() / norms.median()).item(),
    }
    return found | distances(patches, wanted)


def distances(patches: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Mean distances to the clean features, by direction and squared."""
    cosine = 1 - F.cosine_similarity(patches, wanted, dim=-1)
    return {"cosine_distance": cosine.mean().item(), "squared_distance": F.mse_loss(patches, wanted).item()}


def share_that_follows(model: ViTRegModel, pixel_values: torch.Tensor) -> float:
    """Of the outliers of an image those that are outliers too when it has moved by a patch to the right."""
    size, rows = model.config.patch_size, pixel_values.shape[-2] // model.config.patch_size
    shifts = torch.tensor([[0, 1]]).expand(len(pixel_values), -1)
    flips = torch.zeros(len(pixel_values), dtype=torch.bool)
    moved = make_view(pixel_values, shifts, flips, size, torch.zeros(pixel_values.shape[1]))
    here, there = (outliers(patches_and_norms(model, each)[1]) for each in (pixel_values, moved))
    there, is_shown = map_back(there.float().unflatten(1, (rows, -1))[..., None], shifts, flips)
    kept = here & is_shown.flatten(1)
    return there.flatten(1)[kept].mean().item()


@torch.no_grad()
def target(model: ViTRegModel, pixel_values: torch.Tensor, recipe: PretrainRecipe, processor) -> torch.Tensor:
    """What the student is compared with."""
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    size = model.config.patch_size
    grid_size = tuple(side // size for side in pixel_values.shape[-2:])
    options = recipe.num_views, grid_size, recipe.max_view_shift, recipe.view_flip
    views = draw_views(len(pixel_values), *options, torch.Generator().manual_seed(0))
    fill = (recipe.view_fill - mean) / std
    return denoised_features(lambda view: patches_and_norms(model, view)[0], pixel_values, views, size, fill)


def show(rows: dict[str, dict[str, float]]) -> None:
    columns = ("outlier_share", "max_norm_ratio", "cosine_distance", "squared_distance")
    table = Table("", *(column.replace("_", " ") for column in columns), title="Patches of validation images")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.4f}" if column in row else "" for column in columns))
    Console().print(table)


def plot(curve: dict[int, dict[str, float]], rows: dict[str, dict[str, float]], path: Path) -> None:
    """Outliers and distance to the clean features over the steps, beside those of teacher and target."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    labels = {
        "outlier_share": "share of patches that are outliers",
        "cosine_distance": "cosine distance to clean patches",
        "squared_distance": "squared distance to clean patches",
    }
    for axes, (name, label) in zip(figure.subplots(1, 3), labels.items()):
        axes.plot(list(curve), [row[name] for row in curve.values()], marker="o", markersize=3, label="student")
        axes.axhline(rows["teacher"][name], color="tab:red", linestyle="--", label="teacher")
        if name in rows["mean of the teacher's views"]:
            axes.axhline(rows["mean of the teacher's views"][name], color="grey", linestyle=":", label="mean of views")
        axes.set(xlabel="optimizer step", title=label)
        axes.set_ylim(0, None)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.suptitle("CIFAR-10: registers distilled from a model with planted artifacts")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(main)
    app()
