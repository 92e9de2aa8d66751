# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The README does what it says: its Python runs as written, its commands and links exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_image
from typer.main import get_command
from typer.testing import CliRunner

from conversion.convert import LISTS
from conversion.convert import app as convert_app
from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.cli import app
from hf_vitreg.data.transforms import new_image_processor
from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.recipe import FinetuneRecipe, parse_recipe


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_its_python_runs_as_written(tmp_path, monkeypatch):
    """With a small model in the place of the large one of the same name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # half a minute
    config = ViTRegConfig(hidden_size=12, num_hidden_layers=4, num_attention_heads=2, image_size=28)
    ViTRegModel(config).save_pretrained("org/vitreg-large")
    new_image_processor(42).save_pretrained("org/vitreg-large")
    from PIL import Image

    Image.fromarray(load_sample_image("china.jpg")).save("photo.jpg")
    namespace = {}
    for block in blocks("python"):
        exec(block, namespace)
    assert namespace["maps"].shape == (1, 2, 4, 3, 3)
    assert [tuple(features.shape) for features in namespace["features"].feature_maps] == [(1, 12, 3, 3)] * 2


@pytest.mark.parametrize("command", commands(), ids=shlex.join)
def test_its_commands_are_ones_that_there_are(command):
    match command:
        case ["make", target]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()
        case ["accelerate", "launch", "finetune.py", *flags]:
            parse_recipe(FinetuneRecipe, flags)
        case ["accelerate", "launch", "pretrain.py", *flags]:
            parse_recipe(PretrainRecipe, flags)
        case ["accelerate", "launch", "--config_file", config, "pretrain.py", *flags]:
            assert (ROOT / config).exists()
            parse_recipe(PretrainRecipe, flags)
        case ["hf-vitreg", name, *arguments] | ["accelerate", "launch", "-m", "hf_vitreg", name, *arguments]:
            # raises where an option is unknown or its value none
            assert get_command(app).commands[name].make_context(name, arguments)
        case ["python", "conversion/convert.py", "--list"]:
            assert LISTS
        case ["python", "conversion/convert.py", name, *_]:
            assert CliRunner().invoke(convert_app, [name, "--help"]).exit_code == 0
        case ["python", script, *_]:
            assert (ROOT / script).exists()
        case _:
            assert command == ["pip", "install", "-e", ".[conversion]"]


def test_its_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links)
