# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Features of a folder of JPEGs: `hf-vitreg features` beside the loops that users of transformers write.

    python benchmarks/feature_extraction.py

A ViT-S/14 with four registers and random weights at 224 pixels, of transformers, is the same model for all, and so is
the machine's choice of a library for its matrices; what differs is how images come to it, and where features go. Ours
writes its file, too. Nobody reads ahead in the loops: image by image is what a pipeline does by itself.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from timing import RESULTS, save, show
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessor,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from hf_vitreg.deployment.extract import Extracted, FeatureOptions, extract_features
from hf_vitreg.deployment.timing import alternate, summary
from hf_vitreg.features import load_vit
from hf_vitreg.machine import usable_device
from hf_vitreg.matmul import use_fast_float32_matmul


MIN_COSINE = 0.98  # the processor rounds the size that it resizes to, where ours cuts first
HEIGHT, WIDTH = 375, 500  # as most of ImageNet


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEGs with coarse shapes and noise, which take as many bytes as photographs."""
    folder.mkdir()
    generator, paths = np.random.default_rng(0), []
    for index in range(count):
        coarse = PIL.Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((WIDTH, HEIGHT), PIL.Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (pixels + generator.integers(-20, 20, pixels.shape)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{index:06d}.jpg")
        PIL.Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def write_model(folder: Path) -> Path:
    """The model and its processor, which gives it what it sees in an evaluation without the margin."""
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14
    )
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    processor = BitImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def plain_loop(model, processor, paths: list[Path], batch_size: int) -> torch.Tensor:
    """CLS of all images, one batch after the other."""
    found = []
    for start in range(0, len(paths), batch_size):
        images = [PIL.Image.open(path).convert("RGB") for path in paths[start : start + batch_size]]
        inputs = processor(images=images, return_tensors="pt").to(model.device)
        found.append(model(**inputs).last_hidden_state[:, 0].cpu())
    return torch.cat(found)


def main(
    num_images: int = 256,
    batch_size: int = 32,
    rounds: int = 5,
    device: Annotated[str, typer.Option(help="As cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="0 leaves torch's own choice.")] = 0,
) -> None:
    """Times the three, and tells how busy the model was."""
    if threads:
        torch.set_num_threads(threads)
    chosen = usable_device(device)
    if chosen.type == "cpu":
        use_fast_float32_matmul()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths, name = write_images(folder / "images", num_images), write_model(folder / "model")
        encoder, output, runs = load_vit(name, device=chosen), folder / "features.parquet", []
        model, processor = AutoModel.from_pretrained(name).eval().to(chosen), AutoImageProcessor.from_pretrained(name)

        def ours() -> Extracted:
            options = FeatureOptions(batch_size=batch_size)
            runs.append(extract_features(encoder, [folder / "images"], output, options, overwrite=True))
            return runs[-1]

        candidates = {
            "hf_vitreg": ours,
            "transformers, image by image": partial(plain_loop, model, processor, paths, 1),
            "transformers, in batches": partial(plain_loop, model, processor, paths, batch_size),
        }
        expected = candidates["transformers, in batches"]()
        ours()
        actual = torch.tensor(pq.read_table(output)["cls"].to_pylist())
        cosine = torch.cosine_similarity(actual, expected, dim=1).min().item()
        assert cosine > MIN_COSINE, f"the features differ: a cosine of {cosine:.4f}"
        seconds = alternate(candidates, rounds, chosen)
    runs = runs[-rounds:]
    rows = summary(seconds)
    for candidate, values in seconds.items():
        rows[candidate]["images_per_second"] = num_images / sorted(values)[len(values) // 2]
    busy = sorted(run.model_busy for run in runs)
    show("Features of a folder", rows)
    for candidate, row in rows.items():
        Console().print(f"{candidate}: {row['images_per_second']:.1f} images/s")
    Console().print(f"model busy {busy[0]:.1%} to {busy[-1]:.1%}")
    save(
        f"feature_extraction_{chosen.type}",
        chosen,
        setting=f"ViT-S/14 with 4 registers, 224 px, float32, {num_images} JPEGs of {HEIGHT}x{WIDTH} pixels, batch "
        f"{batch_size}, {torch.get_num_threads()} threads",
        rounds=rounds,
        least_cosine_to_transformers=round(cosine, 5),
        model_busy={"median": busy[len(busy) // 2], "range": [busy[0], busy[-1]]},
        candidates=rows,
    )
    Console().print(RESULTS / f"feature_extraction_{chosen.type}.json")


if __name__ == "__main__":
    typer.run(main)
