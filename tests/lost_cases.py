# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Feature and attention maps from seeds, and what the published code of LOST makes of them.

`python tests/lost_cases.py FOLDER` runs that code, a clone of https://github.com/valeoai/LOST, and writes
fixtures/lost_boxes.json. Its `argsort` is made stable: as published it takes any of several patches of equal degree.
"""

import json
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch


FIXTURE = Path(__file__).parent / "fixtures" / "lost_boxes.json"
# rows, cols, hidden size, patch size, k, height, width
GRIDS = [
    (17, 31, 24, 16, 100, 270, 491),
    (23, 13, 19, 14, 100, 322, 169),
    (7, 29, 11, 8, 100, 51, 232),
    (11, 5, 7, 16, 100, 161, 80),
    (37, 19, 48, 14, 20, 505, 266),
]


def cases() -> list[dict]:
    """Everything that makes a map; `what` is it of."""
    names = ("rows", "cols", "hidden_size", "patch_size", "k_patches", "height", "width")
    grids = [dict(zip(names, grid)) for grid in GRIDS]
    features = [
        {"what": what, "seed": seed, **grid} for what in ("objects", "noise") for grid in grids for seed in range(4)
    ]
    attention = [{"what": "attention", "seed": seed, **grid} for grid in grids for seed in range(6)]
    return features + attention


def feature_map(case: dict) -> torch.Tensor:
    """`(rows * cols, hidden_size)`. RandomState gives the same numbers forever."""
    random = np.random.RandomState(case["seed"])
    rows, cols = case["rows"], case["cols"]
    patches = 2 * random.standard_normal((rows, cols, case["hidden_size"]))
    if case["what"] == "objects":
        background, foreground = random.standard_normal((2, case["hidden_size"]))
        height, width = random.randint(2, rows // 2 + 1), random.randint(2, cols // 2 + 1)
        top, left = random.randint(0, rows - height), random.randint(0, cols - width)
        patches += background
        patches[top : top + height, left : left + width] += foreground - 2 * background
    return torch.from_numpy(patches.reshape(rows * cols, -1).astype("float32"))


def attention_map(case: dict) -> torch.Tensor:
    """`(rows * cols,)` with up to five bright spots; that of seed 0 is one spot, which the published code inverts."""
    random = np.random.RandomState(case["seed"])
    row, col = np.mgrid[: case["rows"], : case["cols"]]
    attention = 1e-3 + 1e-4 * random.rand(case["rows"], case["cols"])
    for _ in range(case["seed"]):
        centre = random.randint(case["rows"]), random.randint(case["cols"])
        distance = np.hypot(row - centre[0], col - centre[1])
        attention += random.rand() * np.exp(-((distance / (1 + 2 * random.rand())) ** 2))
    if case["seed"] == 0:
        attention[1:4, 2:4] += 1
    return torch.from_numpy((attention / attention.sum()).ravel().astype("float32"))


def run_published(published: types.ModuleType, case: dict) -> dict:
    """Box, and for LOST the seed and whether the unstable sort gives the same."""
    grid, patch_size = [case["rows"], case["cols"]], case["patch_size"]
    if case["what"] == "attention":
        # (batch, heads, queries, keys) with CLS first
        attention = torch.nn.functional.pad(attention_map(case), (1, 0))[None, None, None]
        return {"box": [int(side) for side in published.dino_seg(attention, grid, patch_size, head=0)]}
    features, size = feature_map(case)[None], (3, case["height"], case["width"])
    run = partial(published.lost, features, grid, [patch_size] * 2, size, k_patches=case["k_patches"])
    with mock.patch.object(torch, "argsort", partial(torch.argsort, stable=True)):
        box, _, _, seed = run()
    return {"box": box.tolist(), "seed_patch": int(seed), "as_published": run()[0].tolist() == box.tolist()}


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    with mock.patch.dict(sys.modules, {"datasets": types.SimpleNamespace(bbox_iou=None)}):
        import object_discovery
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "repository": "https://github.com/valeoai/LOST",
        "commit": commit,
        "license": "Apache-2.0",
        "functions": "object_discovery.lost (argsort made stable), object_discovery.dino_seg",
        "command": "python tests/lost_cases.py LOST",
        "torch": torch.__version__,
        "boxes": "left, top, right, bottom in pixels",
    }
    lines = [json.dumps({**case, **run_published(object_discovery, case)}) for case in cases()]
    head = json.dumps(record, indent=1)[:-2]
    FIXTURE.write_text(f'{head},\n "cases": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
