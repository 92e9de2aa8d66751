# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_vitreg.training.checkpoint import Checkpoints
from hf_vitreg.training.metrics import MetricsLog
from hf_vitreg.training.run import (
    TrainingDiverged,
    available_trackers,
    check_output_dir,
    default_output_dir,
    errors_for_people,
    mean_metrics,
    record,
    require_finite,
    tracked,
)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_the_default_folder_is_the_first_that_is_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = Path("runs/digits")
    assert default_output_dir(first, resumes=False) == default_output_dir(first, resumes=True) == first
    for name in ("digits", "digits-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert default_output_dir(first, resumes=False) == Path("runs/digits-3")
    assert default_output_dir(first, resumes=True) == Path("runs/digits-2")


def test_a_folder_is_checked_before_it_is_written_to(tmp_path, accelerator):
    anew = SimpleNamespace(resume_from_checkpoint=None, overwrite_output_dir=False)
    checkpoints = Checkpoints(tmp_path / "checkpoints", accelerator, limit=2)
    check_output_dir(tmp_path / "none", anew, checkpoints)
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    check_output_dir(tmp_path, anew, checkpoints)  # what a run leaves that failed before its first checkpoint
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"is not empty\. Start anew with --overwrite_output_dir"):
        check_output_dir(tmp_path, anew, checkpoints)
    check_output_dir(tmp_path, SimpleNamespace(resume_from_checkpoint=None, overwrite_output_dir=True), checkpoints)
    with pytest.raises(ValueError, match="no checkpoint"):
        check_output_dir(tmp_path, SimpleNamespace(resume_from_checkpoint="latest"), checkpoints)


def test_trackers_are_those_that_are_installed():
    assert available_trackers("none") == available_trackers("") == []
    with pytest.raises(ValueError, match="wandbb is not known or not installed"):
        available_trackers("none, wandbb")


def test_a_tracker_gets_no_type_that_it_does_not_know():
    @dataclasses.dataclass
    class Recipe:
        steps: int | None = None
        sizes: list[int] = dataclasses.field(default_factory=lambda: [32, 16])
        flip: bool = True

    assert tracked(Recipe()) == {"steps": "", "sizes": "[32, 16]", "flip": True}


def test_metrics_are_means_over_the_batches_that_have_them(accelerator):
    logged = [
        (4, {"loss": torch.tensor(2.0, requires_grad=True), "koleo_loss": torch.tensor(5.0, dtype=torch.bfloat16)}),
        (4, {"loss": torch.tensor(3.0)}),
        (5, {"loss": torch.tensor(7.0), "gram_loss": torch.tensor(11.0, dtype=torch.float64)}),
    ]
    assert mean_metrics(accelerator, logged) == {"loss": 4.0, "koleo_loss": 5.0, "gram_loss": 11.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_metric_that_is_no_number_is_named(accelerator, value):
    good, bad = torch.tensor(1.0), torch.tensor(value)
    logged = [(7, {"loss": good, "koleo_loss": good}), (8, {"loss": good, "koleo_loss": bad}), (9, {"loss": bad})]
    with pytest.raises(TrainingDiverged, match=rf"The koleo_loss of step 8 is {value}.*--learning_rate"):
        mean_metrics(accelerator, logged)


def test_weights_that_are_no_numbers_are_noticed():
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)).to(torch.bfloat16)
    model[0].requires_grad_(False)
    require_finite(model, 11)
    with torch.no_grad():
        model[1].bias[2] = torch.inf
    with pytest.raises(TrainingDiverged, match="weights after step 11 are not finite"):
        require_finite(model, 11)


def test_records_are_lines(tmp_path, accelerator):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    record(accelerator, log, 3, loss=0.5, outlier_share=0.0)
    assert log.read() == [{"step": 3, "loss": 0.5, "outlier_share": 0.0}]


def test_ctrl_c_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as exit_code, errors_for_people():
        raise KeyboardInterrupt
    assert exit_code.value.code == 130 and "--resume_from_checkpoint latest" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("--seed must be 0"),
        TrainingDiverged("--seed must be 0"),
        ValueError("Caught ValueError in DataLoader worker process 0.\nTraceback\n..\nValueError: --seed must be 0"),
    ],
)
def test_an_error_is_one_sentence(capsys, error):
    with pytest.raises(SystemExit) as exit_code, errors_for_people():
        raise error
    assert exit_code.value.code == 1
    assert re.fullmatch(r"Error: --seed must be 0\s*", capsys.readouterr().err)


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(KeyError), errors_for_people():
        raise KeyError("bug")
