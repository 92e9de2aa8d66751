# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Registers by distillation: pretrain.py as a process of its own, and what it trained put where the source has it.

"Vision Transformers with Self-Distilled Registers" (Chen et al., 2025, PH-Reg); `objectives.post_hoc` is the method.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..modeling_vitreg import ViTRegModel, ViTRegPreTrainedModel
from .options import RegisterOptions
from .source import Source
from .warm_start import add_registers


CHECKOUT = Path(__file__).parents[3]
SCRIPT, RECIPE = "pretrain.py", "recipes/pretrain/post_hoc_registers.yaml"
DATA_FLAGS = ("--train_dir", "--train_file", "--train_shards", "--dataset_name")


def training_command(
    source: Source,
    output: Path,
    images: Sequence[str | Path],
    options: RegisterOptions,
    device: torch.device,
    overwrite: bool,
) -> list[str]:
    """What trains the registers and leaves the model in `output`. Flags of `options.arguments` override the others.

    Raises:
        ValueError: where pretrain.py is not there, or it is not known what to train on.
    """
    recipe = options.recipe or CHECKOUT / RECIPE
    flags = ["--config", recipe, "--objective", "post_hoc", "--model_name_or_path", source.name]
    flags += ["--output_dir", output]
    if options.recipe is None:
        # the recipe's own is that of DINOv2
        height, width = options.size or source.encoder().image_size
        flags += ["--image_size", height] if height == width else []
    if not any(argument.partition("=")[0] in DATA_FLAGS for argument in options.arguments):
        flags += ["--train_dir", _folder(images)]
    if options.num_registers is not None:
        flags += ["--num_register_tokens", options.num_registers]
    if options.register_init_std is not None:
        flags += ["--register_init_std", options.register_init_std]
    flags += ["--overwrite_output_dir"] if overwrite else []
    flags = [*map(str, flags), *options.arguments]
    if not (CHECKOUT / SCRIPT).is_file():
        raise ValueError(
            "The method distill trains with pretrain.py, which is no part of the installed package. Clone the "
            f"repository and run there: accelerate launch pretrain.py {' '.join(flags).replace(str(CHECKOUT), '.')}"
        )
    launch = [sys.executable, "-m", "accelerate.commands.launch", *(["--cpu"] if device.type == "cpu" else [])]
    return [*launch, str(CHECKOUT / SCRIPT), *flags]


def train(command: Sequence[str]) -> None:
    """Runs it; what it prints goes where this process prints. Raises `ValueError` where it fails."""
    # the package that runs here, wherever it was imported from
    path = os.pathsep.join([str(CHECKOUT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise ValueError(
            f"pretrain.py stopped with status {done.returncode}; above it says why. What it trained until then is "
            "kept: go on by the same command with `-- --resume_from_checkpoint latest` at its end."
        )


def distilled(source: Source, folder: Path) -> ViTRegPreTrainedModel:
    """The vision model of the source with what was trained in a folder, its heads and its config besides.

    No loss saw CLS, but what it passes was trained: how far it moved, and with it what heads read, is measured after.

    Raises:
        ValueError: where what was trained is another model.
    """
    student = ViTRegModel.from_pretrained(folder, dtype="auto").to(source.encoder().device)
    model = add_registers(source.vision, student.config.num_register_tokens, student.config.register_init_std)
    model = model.to(student.dtype)
    trained, backbone = student.state_dict(), model.base_model
    missing = backbone.state_dict().keys() - trained.keys()
    if missing:
        raise ValueError(f"What was trained in {folder} lacks {min(missing)} of {source.name}.")
    backbone.load_state_dict({name: trained[name] for name in backbone.state_dict()})
    return model.eval()


def _folder(images: Sequence[str | Path]) -> Path:
    if len(images) != 1 or not Path(images[0]).is_dir():
        raise ValueError(
            "The method distill trains on the images of one folder: give it as --images, or say what to train on by "
            "flags of pretrain.py at the end, as `-- --train_file 'images/*.parquet'`."
        )
    return Path(images[0])
