# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What every family of the timm-like layout must do with the same files, for the tests of each."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from original_outputs import assert_close
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification


def assert_bad_files_are_refused(folder: Path, run: Callable, state: dict[str, torch.Tensor], spoiled: str):
    """One clear message each, and nothing is written.

    Args:
        folder: Empty.
        run: Calls the family's command and checks its exit code.
        state: A whole checkpoint.
        spoiled: The tensor that is made NaN.
    """
    torch.save(state | {spoiled: torch.full_like(state[spoiled], torch.nan)}, folder / "nan.pth")
    torch.save({"model": nn.Linear(3, 5)}, folder / "code.pth")
    torch.save({name: tensor for name, tensor in state.items() if name != "norm.bias"}, folder / "part.pth")
    (folder / "cut.pth").write_bytes((folder / "nan.pth").read_bytes()[:-100])
    messages = {
        "nan.pth": "the weights are not finite",
        "code.pth": "Nothing was run",
        "part.pth": "1 tensors that are missing: norm.bias",
        "cut.pth": "is cut short or damaged",
        "none.pth": "none.pth does not exist",
    }
    for file, message in messages.items():
        result = run(folder / file, folder / "model", exit_code=1)
        assert result.stderr.startswith("Error: ") and message in result.stderr, (file, result.stderr)
        assert not list(folder.glob("*model*")), file


def deit_training_checkpoint(state: dict[str, torch.Tensor], name: str) -> dict:
    """As DeiT's main.py saves it, with a moving average that is another model."""
    return {
        "model": state,
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "lr_scheduler": {"base_values": [0.1]},
        "epoch": 7,
        "model_ema": {name: tensor + 1 for name, tensor in state.items()},
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model=name),
    }


def assert_is_the_evaluated_deit(folder: Path, pixel_values: torch.Tensor, outputs: dict[str, torch.Tensor]):
    """The model in a folder is that of `deit_training_checkpoint`, and everything else was left aside by name."""
    record = json.loads((folder / "conversion.json").read_text())
    assert record["sources"][0]["backbone"] == "model.*"
    aside = {part.partition(" ")[0] for part in record["left_aside"]}
    assert aside == {"optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"}
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert_close(model(pixel_values).logits.detach(), outputs["logits/20x20"])
    backbone = AutoModel.from_pretrained(folder)
    assert_close(backbone(pixel_values).last_hidden_state.detach(), outputs["tokens/20x20"])
