# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What runs of the CIFAR-10 recipes learned: `python benchmarks/pretraining_cifar10.py --data CIFAR10 RUN [RUN ...]`.

`CIFAR10` holds parquet files named after their split, a `RUN` is what `pretrain.py` left. Nearest neighbours of every
validation image among all training images are found by CLS of each model, by CLS of the same network before it learned
anything, and by the pixels themselves; accuracies on labels and by text are those that the run measured last.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from timing import RESULTS, save
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import AutoImageProcessor

from hf_vitreg import ViTRegModel
from hf_vitreg.data.labelled_images import MappedImages, load_image_data
from hf_vitreg.data.transforms import EvalTransform
from hf_vitreg.evaluation.knn import knn_classify
from hf_vitreg.evaluation.monitoring import NUM_NEIGHBOURS, Measuring, measure_features
from hf_vitreg.evaluation.zero_shot import load_dual_encoder
from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.pretraining.models import build_backbone
from hf_vitreg.training.metrics import MetricsLog, points


ACCURACIES = ("knn_accuracy", "validation_accuracy", "zero_shot_accuracy")


def main(
    runs: Annotated[list[Path], typer.Argument(help="Folders that pretrain.py left.")],
    data: Annotated[Path, typer.Option(help="Folder of parquet files named after their split.")],
    name: Annotated[str, typer.Option(help="Of the result.")] = "pretraining_cifar10",
    threads: int = 2,
):
    torch.set_num_threads(threads)
    train, validation = (load_image_data(data, split) for split in ("train", "validation"))
    rows = {run.name: measured(run, train, validation) for run in runs}
    pixels = pixel_accuracy(train, validation)
    show(rows, pixels)
    save(
        name,
        torch.device("cpu"),
        setting=f"{len(train):,} training and {len(validation):,} validation images, {NUM_NEIGHBOURS} neighbours",
        knn_accuracy_of_pixels=pixels,
        runs=rows,
    )
    plot({run.name: MetricsLog(run / "metrics.jsonl").read() for run in runs}, rows, pixels, RESULTS / f"{name}.png")


def measured(run: Path, train: MappedImages, validation: MappedImages) -> dict:
    """What a run learned, from what, and how long it took."""
    recipe = PretrainRecipe(**yaml.safe_load((run / "recipe.yaml").read_text()))
    records = MetricsLog(run / "metrics.jsonl").read()
    state = json.loads(sorted((run / "checkpoints").glob("step-*/run_state.json"))[-1].read_text())
    if recipe.objective == "clip":
        backbone = load_dual_encoder(run).model.vision_model
    else:
        backbone = ViTRegModel.from_pretrained(run)
    set_seed(recipe.seed)
    how = Measuring(
        transform=EvalTransform(AutoImageProcessor.from_pretrained(run)),
        accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
        batch_size=250,
    )
    learned, untrained = (
        measure_features(model, validation, train, how) for model in (backbone, build_backbone(recipe).eval())
    )
    return {
        "objective": recipe.objective,
        "num_register_tokens": backbone.config.num_register_tokens,
        "parameters": backbone.num_parameters(),
        "steps": state["step"],
        "images_seen": state["step"] * recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps,
        "minutes": state["seconds"] / 60,
        "knn_accuracy_untrained": untrained["knn_accuracy"],
        **learned,
        **{metric: points(records, metric)[-1][1] for metric in ACCURACIES[1:] if points(records, metric)},
    }


def pixel_accuracy(train: MappedImages, validation: MappedImages) -> float:
    """Of nearest neighbours by the cosine of normalized pixels."""
    features, labels = zip(*((pixels_of(images), torch.tensor(images.labels)) for images in (train, validation)))
    mean, std = features[0].mean(dim=(0, 2, 3), keepdim=True), features[0].std(dim=(0, 2, 3), keepdim=True)
    neighbours, queries = (((images - mean) / std).flatten(1) for images in features)
    num_classes = len(train.class_names)
    predicted = knn_classify(neighbours, labels[0], queries, num_classes, ks=[NUM_NEIGHBOURS])[NUM_NEIGHBOURS][:, 0]
    return (predicted == labels[1]).double().mean().item()


def pixels_of(images: MappedImages) -> torch.Tensor:
    """`(num_images, 3, 32, 32)`."""
    return torch.stack([pil_to_tensor(images.image(index)) for index in range(len(images))]).float()


def show(rows: dict[str, dict], pixels: float) -> None:
    columns = ("registers", "minutes", "images seen", "kNN", "kNN untrained", "labels", "by text", "outliers")
    table = Table("run", *columns, title=f"kNN on pixels: {pixels:.4f}")
    for name, row in rows.items():
        accuracies = [row.get(metric) for metric in ("validation_accuracy", "zero_shot_accuracy")]
        table.add_row(
            name,
            str(row["num_register_tokens"]),
            f"{row['minutes']:.1f}",
            f"{row['images_seen']:,}",
            f"{row['knn_accuracy']:.4f}",
            f"{row['knn_accuracy_untrained']:.4f}",
            *("" if accuracy is None else f"{accuracy:.4f}" for accuracy in accuracies),
            f"{row['outlier_share']:.4f}",
        )
    Console().print(table)


def plot(logs: dict[str, list[dict]], rows: dict[str, dict], pixels: float, path: Path) -> None:
    """Accuracies over the images seen, as they were measured on the way, on fewer images than in the table."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, records in logs.items():
        images_a_step = rows[name]["images_seen"] / rows[name]["steps"]
        for metric in ACCURACIES:
            if curve := points(records, metric):
                steps, values = zip(*curve)
                label = f"{name}: {metric.replace('_', ' ')}"
                axes.plot([step * images_a_step for step in steps], values, marker="o", markersize=3, label=label)
    axes.axhline(pixels, color="grey", linestyle=":", label="kNN on pixels, all images")
    axes.set(xlabel="training images seen", ylabel="share of validation images", title="CIFAR-10, during training")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    typer.run(main)
