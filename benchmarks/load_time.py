# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""From a safetensors file to a model, in transformers, timm and hf_vitreg: `python benchmarks/load_time.py`.

By `from_pretrained`, of timm by `create_model` with a file; files are in the page cache. What was loaded is compared
before it is timed.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import timm
import torch
import transformers
import typer
from peers import PATCH_SIZE, TIMM_NAME, build, check_equal
from safetensors.torch import save_file
from timing import save, show

from hf_vitreg.deployment.timing import alternate, summary


IMAGE_SIZE = 224


def main(
    size: Annotated[str, typer.Option(help="small, base or large.")] = "base",
    rounds: int = 10,
):
    transformers.utils.logging.disable_progress_bar()
    device = torch.device("cpu")
    models = build(size, IMAGE_SIZE, attention="sdpa", dtype=torch.float32, device=device)
    with tempfile.TemporaryDirectory() as folder:
        loaders = {}
        for name in ("hf_vitreg", "transformers"):
            models[name].save_pretrained(Path(folder) / name)
            loaders[name] = partial(type(models[name]).from_pretrained, Path(folder) / name)
        weights = Path(folder) / "timm.safetensors"
        save_file(models["timm"].state_dict(), weights)
        settings = {"img_size": IMAGE_SIZE, "num_classes": 0, "checkpoint_path": weights}
        loaders["timm"] = partial(timm.create_model, TIMM_NAME.format(size), **settings)
        loaded = {name: load().eval() for name, load in loaders.items()}
        pixel_values = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
        agreements = check_equal(
            loaded, pixel_values, dict.fromkeys(loaded, torch.float32), models["hf_vitreg"].eval()
        )
        del loaded, models
        seconds = alternate(loaders, rounds, device)
    rows = summary(seconds)
    setting = f"ViT-{size}/{PATCH_SIZE}, 4 registers, float32, safetensors in the page cache"
    show(f"Loading: {setting}", rows)
    save(
        f"load_time_{size}",
        device,
        setting=setting,
        rounds=rounds,
        relative_differences={name: agreed.relative_error for name, agreed in agreements.items()},
        from_pretrained=rows,
    )


if __name__ == "__main__":
    typer.run(main)
