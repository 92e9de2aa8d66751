# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What bfloat16 and int8 cost in accuracy: `python benchmarks/quantization_cifar10.py --data CIFAR10 MODEL`.

`CIFAR10` holds parquet files named after their split, `MODEL` is a trained ViTReg. Nearest neighbours of every
validation image among all training images are found by CLS, of the model in float32, of `optimize` in bfloat16, and of
`quantize`; CLS and patches of the validation images are compared with those in float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from timing import save
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor

from hf_vitreg import ViTRegModel
from hf_vitreg.data.labelled_images import load_image_data
from hf_vitreg.data.transforms import EvalTransform
from hf_vitreg.deployment import optimize, quantize
from hf_vitreg.evaluation.monitoring import NUM_NEIGHBOURS, Measuring, measure_features


BATCH_SIZE = 250


def main(
    model: Annotated[Path, typer.Argument(help="A ViTReg without a head.")],
    data: Annotated[Path, typer.Option(help="Folder of parquet files named after their split.")],
    threads: int = 2,
):
    torch.set_num_threads(threads)
    train, validation = (load_image_data(data, split) for split in ("train", "validation"))
    plain = ViTRegModel.from_pretrained(model, dtype=torch.float32).eval()
    transform = EvalTransform(AutoImageProcessor.from_pretrained(model))
    how = Measuring(transform=transform, accelerator=Accelerator(cpu=True), batch_size=BATCH_SIZE)
    pixel_values = torch.stack([transform(validation.image(index)) for index in range(len(validation))])
    expected = tokens(plain, pixel_values)
    candidates = {
        "float32": plain,
        "optimize, bfloat16": optimize(plain, torch.bfloat16),
        "quantize, int8": quantize(plain),
    }
    rows = {}
    for name, candidate in candidates.items():
        accuracy = measure_features(candidate, validation, train, how)["knn_accuracy"]
        rows[name] = {"knn_accuracy": accuracy, **cosines(tokens(candidate, pixel_values), expected)}
    for row in rows.values():
        row["knn_accuracy_change"] = row["knn_accuracy"] - rows["float32"]["knn_accuracy"]
    show(rows)
    config = plain.config
    save(
        "quantization_cifar10",
        torch.device("cpu"),
        setting=f"{len(train):,} training and {len(validation):,} validation images, {NUM_NEIGHBOURS} neighbours; "
        f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.num_register_tokens} registers",
        models=rows,
    )


@torch.no_grad()
def tokens(model: Callable, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """CLS `(num_images, hidden_size)` and patches `(num_images, num_patches, hidden_size)` after the final norm."""
    outputs = [model(batch) for batch in pixel_values.split(BATCH_SIZE)]
    return {
        "cls": torch.cat([output.last_hidden_state[:, 0] for output in outputs]).float(),
        "patches": torch.cat([output.patch_tokens for output in outputs]).float(),
    }


def cosines(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of all tokens, their mean and the least."""
    found = {}
    for name, tensor in actual.items():
        each = cosine_similarity(tensor, expected[name], dim=-1)
        found |= {f"{name}_cosine": each.mean().item(), f"{name}_cosine_least": each.min().item()}
    return found


def show(rows: dict[str, dict[str, float]]) -> None:
    columns = ("knn_accuracy", "cls_cosine", "patches_cosine", "patches_cosine_least")
    table = Table("", *(column.replace("_", " ") for column in columns), title="CIFAR-10")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.5f}" for column in columns))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
