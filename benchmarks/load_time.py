# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""`from_pretrained` against transformers: `python benchmarks/load_time.py`."""

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from peers import build
from timing import alternate, save, show, summary


def main(
    size: Annotated[str, typer.Option(help="small, base or large.")] = "base",
    rounds: int = 10,
):
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cpu")
    models = build(size, image_size=224, attention="sdpa", dtype=torch.float32, device=device)
    del models["timm"]
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            model.save_pretrained(Path(folder) / name)
        loaders = {name: partial(type(model).from_pretrained, Path(folder) / name) for name, model in models.items()}
        seconds = alternate(loaders, rounds, device)
    rows = summary(seconds)
    show(f"from_pretrained: ViT-{size}/14, 4 registers, float32, safetensors in the page cache", rows)
    save(f"load_time_{size}", device, setting=f"ViT-{size}/14, 4 registers", rounds=rounds, from_pretrained=rows)


if __name__ == "__main__":
    typer.run(main)
