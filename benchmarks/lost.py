# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""LOST on feature maps against the published code: `python benchmarks/lost.py FOLDER`.

FOLDER is a clone of https://github.com/valeoai/LOST. Its function `lost` runs as it is published, one map at a time.
Before anything is timed, boxes and seeds of all maps are compared, with the published `argsort` made stable: as it is,
it takes any of several patches of equal degree.
"""

import itertools
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from timing import save, show

from hf_vitreg.deployment.timing import alternate, summary
from hf_vitreg.evaluation.lost import lost_boxes


PATCH_SIZE = 16


def main(
    repository: Annotated[Path, typer.Argument(help="A clone of valeoai/LOST.")],
    num_maps: int = 1000,
    rows: int = 28,
    cols: int = 28,
    hidden_size: int = 384,
    threads: Annotated[int, typer.Option(help="Of both, on the CPU.")] = 1,
    maps_a_round: Annotated[int, typer.Option(help="Both take the same hundred, in turn.")] = 100,
    rounds: int = 20,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
):
    device = torch.device(device)
    torch.set_num_threads(threads)
    published = load_published(repository)
    padded = (rows * PATCH_SIZE, cols * PATCH_SIZE)
    image_size = (padded[0] - 5, padded[1] - 3)
    measured = {}
    for kind, make in {"objects": objects, "noise": noise}.items():
        features = make(num_maps, rows, cols, hidden_size).to(device)
        ours = partial(lost_boxes, rows=rows, cols=cols, patch_size=PATCH_SIZE, image_sizes=image_size)
        theirs = partial(run_published, published, rows=rows, cols=cols, image_size=image_size)
        ties = check_equal(ours, theirs, features)
        candidates = {"hf_vitreg": in_turn(ours, features, maps_a_round)}
        candidates["published"] = in_turn(theirs, features, maps_a_round)
        candidates["its matrix products alone"] = in_turn(gram_matrices, features, maps_a_round)
        seconds = summary(alternate(candidates, rounds, device))
        measured[kind] = {**seconds, "maps_where_equal_degrees_matter": ties}
        title = f"LOST on maps of {kind}, {rows}x{cols}x{hidden_size}, {maps_a_round} a round, {device.type}"
        show(title, seconds)
    save(
        f"lost_{device.type}_{threads}_threads",
        device,
        setting=f"{num_maps} maps of {rows}x{cols}x{hidden_size}, {maps_a_round} a round, float32, {threads} threads",
        rounds=rounds,
        published=f"https://github.com/valeoai/LOST {commit(repository)}",
        boxes_equal=True,
        maps=measured,
    )


def objects(num_maps: int, rows: int, cols: int, hidden_size: int) -> torch.Tensor:
    """Maps with one rectangle, whose patches point away from the others, under noise: `(num_maps, patches, D)`."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, num_maps, 1, hidden_size, generator=generator)
    background, foreground = directions[0], directions[1] - 0.5 * directions[0]
    masks = torch.zeros(num_maps, rows, cols, dtype=torch.bool)
    for mask, (height, width, top, left) in zip(masks, torch.rand(num_maps, 4, generator=generator).tolist()):
        height, width = 3 + int(height * (rows // 2)), 3 + int(width * (cols // 2))
        top, left = int(top * (rows - height)), int(left * (cols - width))
        mask[top : top + height, left : left + width] = True
    clean = torch.where(masks.flatten(1)[:, :, None], foreground, background)
    return clean + 2 * torch.randn(clean.shape, generator=generator)


def noise(num_maps: int, rows: int, cols: int, hidden_size: int) -> torch.Tensor:
    """Maps without structure, whose degrees are all about the same: `(num_maps, patches, D)`."""
    return torch.randn(num_maps, rows * cols, hidden_size, generator=torch.Generator().manual_seed(1))


def load_published(repository: Path) -> types.ModuleType:
    """Its `object_discovery`, without the packages that its `datasets` needs."""
    if not (repository / "object_discovery.py").is_file():
        raise ValueError(f"{repository} has no object_discovery.py. Clone https://github.com/valeoai/LOST.")
    with (
        mock.patch.dict(sys.modules, {"datasets": types.SimpleNamespace(bbox_iou=None)}),
        mock.patch.object(sys, "path", [str(repository), *sys.path]),
    ):
        import object_discovery
    return object_discovery


def commit(repository: Path) -> str:
    """The commit of a clone; `unknown` for a folder that is none."""
    done = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def run_published(
    published: types.ModuleType, features: torch.Tensor, *, rows: int, cols: int, image_size: tuple[int, int]
) -> list[tuple[list[float], int, torch.Tensor]]:
    """Box, seed and scores of each map."""
    results = []
    for index in range(len(features)):
        scales = [PATCH_SIZE, PATCH_SIZE]
        box, _, scores, seed = published.lost(features[index : index + 1], [rows, cols], scales, (3, *image_size))
        results.append((box.tolist(), int(seed), scores))
    return results


def gram_matrices(features: torch.Tensor) -> None:
    """What no exact LOST does without more than half of: the gram matrix is symmetric."""
    for patches in features:
        patches @ patches.mT


def in_turn(run: Callable, features: torch.Tensor, maps_a_round: int) -> Callable[[], object]:
    """Each call takes the next maps, so that a round is short and the load of the machine is that of both."""
    parts = itertools.cycle(features.split(maps_a_round))
    return lambda: run(features=next(parts))


def check_equal(ours: Callable, theirs: Callable, features: torch.Tensor) -> int:
    """On how many maps patches of equal degree compete. Raises `ValueError` where a box or seed differs."""
    with mock.patch.object(torch, "argsort", partial(torch.argsort, stable=True)):
        expected = theirs(features=features)
    found = ours(features=features)
    for index, (box, seed, _) in enumerate(expected):
        own = (found.boxes[index].tolist(), int(found.seeds[index]))
        if own != (box, seed):
            raise ValueError(f"Map {index}: {own} here, {(box, seed)} published. Their times cannot be compared.")
    ordered = [scores.sort(descending=True).values for _, _, scores in expected]
    return sum(bool(scores[0] == scores[1] or scores[99] == scores[100]) for scores in ordered)


if __name__ == "__main__":
    typer.run(main)
