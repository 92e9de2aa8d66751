# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import timm
import torch
from original_outputs import load
from reference import tiny_config
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from typer.testing import CliRunner

from conversion.convert import app
from conversion.recognize import hint, recognize
from hf_vitreg import ViTRegModel


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("dino", "dino"),
        ("dinov2", "dinov2"),
        ("dinov2_reg4", "dinov2"),
        ("dinov3", "dinov3"),
        ("dinov3_swiglu", "dinov3"),
        ("deit_distilled", "deit"),
        ("deit3", "deit3"),
        ("open_clip", "open_clip"),
    ],
)
def test_original_checkpoints_are_known_by_their_names(name, family):
    state, _, _ = load(name)
    assert recognize(state) == family
    assert recognize([f"teacher.backbone.{key}" for key in state]) == family or family == "open_clip"


def test_what_other_libraries_wrote_is_known_by_its_names():
    with torch.device("meta"):
        of_timm = timm.create_model("vit_base_patch16_reg4_gap_256")
        of_transformers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_hidden_layers=1))
        ours = ViTRegModel(tiny_config())
    assert recognize(of_timm.state_dict()) == "timm"
    assert recognize(of_transformers.state_dict()) == "transformers"
    assert recognize(ours.state_dict()) == "vitreg"
    assert recognize(["layer1.0.conv1.weight", "fc.bias"]) is None


def test_the_hint_names_the_command_unless_it_was_asked_for():
    names = ["visual.conv1.weight"]
    assert "`convert.py open_clip`" in hint(names, asked="dinov2")
    assert hint(names, asked="open_clip") == hint(["fc.bias"], asked="dino") == ""
    assert "already" in hint(["encoder.layer.0.residual1.lambda1"], asked="dinov2")


@pytest.mark.parametrize(
    ("asked", "given", "command"),
    [("dinov2", "dino", "dino"), ("dino", "dinov2", "dinov2"), ("deit3", "open_clip", "open_clip")],
)
def test_a_command_points_to_the_one_that_converts_the_file(tmp_path, asked, given, command):
    torch.save(load(given)[0], tmp_path / "a.pth")
    result = CliRunner().invoke(app, [asked, str(tmp_path / "a.pth"), str(tmp_path / "model")])
    assert result.exit_code == 1
    assert result.stderr.rstrip().endswith(f"By its names it could be converted by `convert.py {command}`.")
    assert not (tmp_path / "model").exists()


def test_a_part_of_the_right_family_is_pointed_nowhere(tmp_path):
    state = load("dinov2")[0]
    torch.save({name: tensor for name, tensor in state.items() if name != "norm.bias"}, tmp_path / "a.pth")
    result = CliRunner().invoke(app, ["dinov2", str(tmp_path / "a.pth"), str(tmp_path / "model")])
    assert result.exit_code == 1 and "convert.py" not in result.stderr
