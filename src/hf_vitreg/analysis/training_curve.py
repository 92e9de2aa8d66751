# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The share of outliers over training, checkpoint by checkpoint."""

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from ..features import VisionEncoder, load_vit
from .image_files import ImageFiles
from .measurements import group_separations, plain, verdict_numbers
from .norms import NormStatistics, Side
from .outliers import ThresholdMethod, artifact_verdict, outlier_mask, outlier_threshold
from .passes import NormCollector
from .run import Run


WEIGHTS_FILE = "model.safetensors"


def checkpoint_folders(folder: str | Path) -> list[tuple[int, Path]]:
    """Sub-folders with weights and a number at the end of their names, as `step-00000500` or `checkpoint-500`.

    Returns:
        Step and folder, in the order of the steps.
    """
    found = []
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        number = re.search(r"(\d+)$", path.name)
        if (
            number
            and not path.name.startswith(".")
            and any((path / f).is_file() for f in ("config.json", WEIGHTS_FILE))
        ):
            found.append((int(number[1]), path))
    return sorted(found)


def training_curve(
    encoders: Mapping[int, Callable[[], VisionEncoder]],
    images: ImageFiles,
    *,
    threshold: float | ThresholdMethod = "mad",
    side: Side = "high",
    layer: int | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> list[dict]:
    """Share of the outliers over training: by step, for one checkpoint after the other.

    Args:
        encoders: For every step what loads its model, so that there is one at a time.
        images: And all else as for `inspect`.

    Returns:
        For every step the numbers of a verdict, as under `"thresholds"`, with `step` and `split_off_layer`.
    """
    curve = []
    for step, load in sorted(encoders.items()):
        run = Run(load(), images, threshold, side, layer, size, batch_size, 0, progress)
        curve.append({"step": step, **_norms_only(run, f"Step {step}")})
    return plain(curve)


def _norms_only(run: Run, title: str) -> dict:
    """The verdict alone, in two passes that take nothing but norms."""
    encoder, patches, groups = run.encoder, NormStatistics(), NormStatistics()
    threshold = None
    for round_ in (1, 2):
        for _, pixel_values in run.stream.batches(f"{title}, {round_} of 2"):
            collector = NormCollector(encoder)
            encoder.observe(pixel_values, on_patches=collector.on_patches, on_layer=collector.on_layer)
            norms = collector.norms["patch"]
            if round_ == 1:
                patches.update({"patch": norms})
            else:
                mask = outlier_mask(norms[run.layer], threshold, run.side)
                groups.update({"outlier": norms[:, mask], "rest": norms[:, ~mask]})
        threshold = outlier_threshold(patches.distributions()[run.layer], run.threshold, run.side)
    separations = group_separations(groups, run.layer, run.side)
    verdict = artifact_verdict(patches.distributions()[run.layer], threshold, run.side, separations)
    return verdict_numbers(verdict) | {"split_off_layer": verdict.split_off_layer}


def load_checkpoint(path: Path, base: VisionEncoder | None, device: str | torch.device = "cpu") -> VisionEncoder:
    """A checkpoint with a config, or only the weights of one, for the model of its run.

    Args:
        path: Folder with `config.json` or only `model.safetensors`.
        base: The model of the run. Weights alone are put into it; images are normalized as for it.
        device: Where to.

    Raises:
        ValueError: where it cannot be loaded.
    """
    if (path / "config.json").is_file():
        encoder = load_vit(path, device=device)
        if encoder.mean is None and base is not None:
            encoder = VisionEncoder.wrap(encoder.model, encoder.name, base.mean, base.std)
        return encoder
    if base is None:
        raise ValueError(
            f"{path} has weights and no config.json. Give the model of the run, and these by --checkpoints."
        )
    with safe_open(path / WEIGHTS_FILE, framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    wanted = base.model.state_dict()
    found = {name: _ending(tensors, name) for name in wanted}
    missing = [name for name, tensor in found.items() if tensor is None or tensor.shape != wanted[name].shape]
    if missing:
        raise ValueError(
            f"The weights of {path} are not those of {base.name}: {missing[0]} is missing or of another shape."
        )
    encoder = dataclasses.replace(base, model=copy.deepcopy(base.model), name=str(path))
    encoder.model.load_state_dict(found)
    return encoder


def _ending(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """The tensor of this name, alone or inside a classifier."""
    inside = [each for each in tensors if each == name or each.endswith(f".{name}")]
    return tensors[min(inside, key=len)] if inside else None
