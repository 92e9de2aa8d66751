# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json
import os
import subprocess
import sys

import pytest
import torch
from evaluation_cases import dense, labelled, save_model, voc
from transformers.utils import logging as transformers_logging

from hf_vitreg.evaluation.evaluate import RESULTS, TASKS, check_output, evaluate_model
from hf_vitreg.evaluation.options import EvaluationOptions
from hf_vitreg.features import load_vit, model_hash


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return labelled(tmp_path_factory.mktemp("data") / "birds")


def evaluate(model, data, output, task="knn", overwrite=False, **options):
    return evaluate_model(model, task, data, output, EvaluationOptions(**options), device="cpu", overwrite=overwrite)


def test_results_say_what_was_measured_on_what_and_how(model, data, tmp_path):
    done = evaluate(model, data, tmp_path / "out", layer=4, cache_dir=tmp_path / "cache", seed=5)
    results = json.loads((tmp_path / "out" / RESULTS).read_text())
    assert results == done.results and done.folder == tmp_path / "out" and done.metrics == results["metrics"]
    assert list(results) == [
        "results_version",
        "task",
        "metrics",
        "model",
        "data",
        "options",
        "details",
        "versions",
        "machine",
        "num_processes",
        "seconds",
    ]
    assert results["results_version"] == 1 and results["task"] == "knn" and results["num_processes"] == 1
    assert list(results["model"]) == [
        "name",
        "source",
        "num_layers",
        "hidden_size",
        "patch_size",
        "num_registers",
        "sha256",
    ]
    assert results["model"]["sha256"] == model_hash(load_vit(model).model)
    assert list(results["data"]) == [
        "name",
        "split",
        "num_images",
        "sha256",
        "num_train_images",
        "train_sha256",
        "path",
    ]
    assert results["options"] == {"layer": 4, "seed": 5} and results["data"]["path"] == str(data)
    assert results["versions"]["torch"] in torch.__version__ and results["machine"].endswith(torch.__version__)


def test_nothing_but_the_results_is_left(model, data, tmp_path):
    verbosity = transformers_logging.get_verbosity()
    evaluate(model, data, tmp_path / "out" / "knn")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["knn"]
    assert [path.name for path in (tmp_path / "out" / "knn").iterdir()] == [RESULTS]
    assert transformers_logging.get_verbosity() == verbosity and transformers_logging.is_progress_bar_enabled()


def test_a_failure_leaves_what_was_there(model, data, tmp_path, monkeypatch):
    evaluate(model, data, tmp_path / "out")
    before = (tmp_path / "out" / RESULTS).read_bytes()

    def fails_late(session):
        (session.folder / "half.png").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setitem(TASKS, "knn", fails_late)
    for folder, overwrite in (("out", True), ("new", False)):
        with pytest.raises(OSError, match="No space left"):
            evaluate(model, data, tmp_path / folder, overwrite=overwrite)
    assert (tmp_path / "out" / RESULTS).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"} and len(list((tmp_path / "out").iterdir())) == 1


def test_results_are_replaced_where_that_is_asked_for(model, data, tmp_path):
    evaluate(model, data, tmp_path / "out", task="linear", num_epochs=1, min_steps=0)
    assert (tmp_path / "out" / "classifier").is_dir()
    with pytest.raises(ValueError, match=r"There are results in .*out already\. Give a new folder, or --overwrite"):
        evaluate(model, data, tmp_path / "out")
    evaluate(model, data, tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [RESULTS]


def test_other_folders_are_never_replaced(tmp_path):
    check_output(tmp_path / "new")
    check_output(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things than results"):
        check_output(tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"notes\.txt is a file"):
        check_output(tmp_path / "notes.txt", overwrite=True)
    with pytest.raises(ValueError, match=r"The cache .*out/features is in the folder of the results"):
        check_output(tmp_path / "out", cache_dir=tmp_path / "out" / "features")


def test_what_is_wrong_is_said_before_the_model_is_loaded(data, tmp_path):
    for options, message in (
        ({"task": "knnn"}, "no task 'knnn'"),
        ({"num_steps": 5}, "does not read --num-steps"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path / "no model", data, tmp_path / "out", **options)
    with pytest.raises(ValueError, match="There is no device 'gpu' here"):
        evaluate_model(tmp_path / "no model", "knn", data, tmp_path / "out", device="gpu")
    with pytest.raises(ValueError, match="no model"):
        evaluate(tmp_path / "no model", data, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_features_are_extracted_once_and_never_served_for_anything_else(model, data, tmp_path, monkeypatch):
    cache = {"cache_dir": tmp_path / "cache"}
    first = evaluate(model, data, tmp_path / "1", **cache).results
    assert len(list((tmp_path / "cache").iterdir())) == 2, "one a split"
    with monkeypatch.context() as patched:
        patched.setattr("hf_vitreg.evaluation.extraction.batch_features", None)
        again = evaluate(model, data, tmp_path / "2", **cache).results
        evaluate(model, data, tmp_path / "3", task="logistic", **cache)
        evaluate(model, data, tmp_path / "layer", layer=2, **cache)
        evaluate(model, data, tmp_path / "linear", task="linear", num_epochs=1, min_steps=0, **cache)
    assert again["metrics"] == first["metrics"]
    other = save_model(tmp_path / "tiny", layer_norm_eps=1e-2)
    for options in ({"preprocessing": "stretch"}, {"size": (28, 42)}):
        evaluate(model, data, tmp_path / str(options), **cache, **options)
    assert evaluate(other, data, tmp_path / "4", **cache).results["metrics"]
    assert len(list((tmp_path / "cache").iterdir())) == 2 * 4


# Several processes


BOTH = """
import runpy, sys
import torch

torch.set_num_threads(1)
for arguments in {runs!r}:
    sys.argv = ["hf-vitreg", *arguments]
    try:
        runpy.run_module("hf_vitreg", run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise
"""


def test_two_processes_measure_what_one_does(model, data, tmp_path):
    # more images than a shard of features or a unit of boxes holds, and for the processes not the same number
    places = {
        "knn": "digits",
        "linear": data,
        "segmentation": dense(tmp_path / "rooms"),
        "object_discovery": voc(tmp_path / "VOC2007", count=11),
    }
    options = {
        "knn": {"max_images": 1100},
        "linear": {"num_epochs": 2, "min_steps": 0},
        "segmentation": {"num_steps": 7},
        "object_discovery": {"batch_size": 1},
    }
    runs = []
    for task, place in places.items():
        flags = [part for name, value in options.get(task, {}).items() for part in (f"--{name}", str(value))]
        output = ["--output", str(tmp_path / "two" / task), "--device", "cpu"]
        runs.append(["evaluate", str(model), "--task", task, "--data", str(place), *output, *flags])
    (tmp_path / "both.py").write_text(BOTH.format(runs=runs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(tmp_path / "both.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for task, place in places.items():
        one = evaluate(model, place, tmp_path / "one" / task, task, **options.get(task, {})).results
        two = json.loads((tmp_path / "two" / task / RESULTS).read_text())
        assert (one["num_processes"], two["num_processes"]) == (1, 2)
        for key in ("metrics", "model", "data", "details", "options"):
            assert one[key] == two[key], (task, key)
        files = [sorted(path.name for path in (tmp_path / run / task).iterdir()) for run in ("one", "two")]
        assert files[0] == files[1]
    assert done.stdout.count("corloc: ") == 1, "the main process alone says what was measured"
    assert done.stderr.count("Discovering objects") <= 1, "and how far it is"
