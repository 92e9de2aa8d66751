# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What an inspection costs: time of the norms beside the plain forward, and memory over the model.

    python benchmarks/inspection.py          # norms of all layers of a ViT-S/14, 224 px: the bound is 1.1
    python benchmarks/inspection.py memory   # a ViT-B's width, tokens and probes: the bound is 1 GB over the model

For the memory, the probes' held-out samples are filled, so that more images would change nothing, and one patch in
ten is an outlier, so that every probe has tokens. The MLPs are narrow and the layers few, which makes the
forward fast and takes nothing from what is measured but histograms and attention maps of the other layers: by count
2 MB each, a histogram of 164 KB for each of eight kinds of tokens and a batch's attention.
"""

import threading
import time
from typing import Annotated

import numpy as np
import PIL.Image
import psutil
import torch
import typer
from rich.console import Console
from timing import save, show

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.analysis import probes
from hf_vitreg.analysis.image_files import ImageFiles
from hf_vitreg.analysis.inspection import inspect
from hf_vitreg.analysis.passes import NormCollector
from hf_vitreg.analysis.run import Run
from hf_vitreg.deployment.timing import alternate, summary
from hf_vitreg.features import VisionEncoder


app = typer.Typer(add_completion=False, invoke_without_command=True)
HELD_OUT_SHARE = 0.9  # of the class probes, whose samples then fill with few images


def random_encoder(**sizes) -> VisionEncoder:
    torch.manual_seed(0)
    model = ViTRegModel(ViTRegConfig(num_register_tokens=4, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.03)
    return VisionEncoder.wrap(model, "random", (0.5,) * 3, (0.5,) * 3)


@app.callback()
def norms(
    context: typer.Context,
    batch_size: int = 8,
    rounds: int = 20,
    threads: Annotated[int, typer.Option(help="0 leaves torch's own choice.")] = 0,
) -> None:
    """Times the forward with and without norms of all tokens at every layer."""
    if context.invoked_subcommand:
        return
    if threads:
        torch.set_num_threads(threads)
    encoder = random_encoder(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=224
    )
    pixel_values = torch.randn(batch_size, 3, 224, 224)

    def with_norms() -> NormCollector:
        collector = NormCollector(encoder)
        encoder.observe(pixel_values, on_patches=collector.on_patches, on_layer=collector.on_layer)
        return collector

    hidden_states = encoder.layers(pixel_values, [-1])[-1]
    expected = hidden_states[:, encoder.patch_slice].norm(dim=-1)
    torch.testing.assert_close(with_norms().norms["patch"][-1], expected)
    device = torch.device("cpu")
    seconds = alternate({"with norms": with_norms, "plain": lambda: encoder.observe(pixel_values)}, rounds, device)
    rows = summary(seconds, ours="plain")
    show("Norms of all tokens at every layer", rows)
    setting = f"ViT-S/14 with 4 registers, 224 px, batch {batch_size}, float32, {torch.get_num_threads()} threads"
    save("inspection_norms_cpu", device, setting=setting, rounds=rounds, candidates=rows)


@app.command()
def memory(num_images: int = 1250, num_classes: int = 1000, num_layers: int = 2) -> None:
    """Peak resident memory of an inspection over that of the model."""
    encoder = random_encoder(
        hidden_size=768, num_hidden_layers=num_layers, num_attention_heads=12, intermediate_size=8, patch_size=16
    )
    generator = np.random.default_rng(0)
    small = [PIL.Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(200)]
    pictures = [image.resize(encoder.image_size, PIL.Image.Resampling.BILINEAR) for image in small]
    labels = [index % num_classes for index in range(num_images)]
    names = [str(number) for number in range(num_classes)]
    images = ImageFiles([pictures[index % 200] for index in range(num_images)], labels, names, None)
    encoder.observe(encoder.preprocess(pictures[:16]))  # what torch itself needs is not the inspection's
    process, peak, is_over = psutil.Process(), [0], threading.Event()
    model_bytes = process.memory_info().rss

    def watch() -> None:
        while not is_over.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss)

    threading.Thread(target=watch, daemon=True).start()
    threshold = Run(encoder, images, "mad", "high", None, None, 16, 0, True).survey().norms.distributions()[-1]
    probes.ImageClassProbe.__init__.__defaults__ = (5, 0, HELD_OUT_SHARE, 2048, None)
    started = time.perf_counter()
    found = inspect(encoder, images, threshold=threshold.quantile(0.9), progress=True).metrics["probes"]
    is_over.set()
    megabytes = (peak[0] - model_bytes) / 1e6
    Console().print(f"{megabytes:.0f} MB over the model, {time.perf_counter() - started:.0f} s")
    save(
        "inspection_memory_vitb16",
        torch.device("cpu"),
        setting=f"hidden size 768, 197 + 4 tokens, {num_layers} layers, {num_classes} classes, batch 16",
        num_images=num_images,
        held_out={kind: score["num_test_images"] for kind, score in found["image_class"].items()},
        megabytes_over_model=round(megabytes),
    )


if __name__ == "__main__":
    app()
