# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json
import os
import subprocess
import sys

import pytest
import torch

from hf_vitreg.evaluation.knn import knn_classify
from hf_vitreg.evaluation.labelled import (
    ImageFeatures,
    held_out_split,
    require_every_class,
    require_features,
    require_labels,
    require_width,
    rows_in_chunks,
)
from hf_vitreg.evaluation.linear import linear_sweep


def test_chunks_cover_every_row_once():
    assert rows_in_chunks(11, 4) == [slice(0, 4), slice(4, 8), slice(8, 11)]
    assert rows_in_chunks(3, 4) == [slice(0, 3)]


@pytest.mark.parametrize(
    ("features", "named"),
    [
        (torch.zeros(7), r"shape \(7,\)"),
        (torch.zeros(0, 5), r"at least one image, got torch.float32 of shape \(0, 5\)"),
        (torch.zeros(7, 5, dtype=torch.int64), "floating point numbers .* got torch.int64"),
        (torch.zeros(9001, 5).index_fill(0, torch.tensor(8999), float("nan")), "training features of image 8999"),
        (torch.zeros(7, 5).index_fill(1, torch.tensor(3), float("inf")), "image 0 are NaN or infinite"),
    ],
)
def test_features_that_are_none_are_refused(features, named):
    with pytest.raises(ValueError, match=named):
        require_features(features, "training")


def test_features_of_another_model_are_refused():
    with pytest.raises(ValueError, match="test features have 5 channels and those of the training set 7"):
        require_width(torch.zeros(3, 5), 7, "test")


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (None, "test images have no labels"),
        ([0, 1], r"must be 3 integers.* shape \(2,\)"),
        ([0.0, 1.0, 2.0], "integers.* got torch.float32"),
        ([0, 5, 7], r"0 ... 4, but image 1 has 5, and 2 labels in all"),
        ([0, 1, -100], "image 2 has -100.* Unreadable"),
    ],
)
def test_labels_that_are_none_are_refused(labels, named):
    with pytest.raises(ValueError, match=named):
        require_labels(labels, 3, 5, "test")


def test_a_class_without_images_is_named():
    labels = require_labels([0, 2, 2, 4], 4, 5, "training")
    with pytest.raises(ValueError, match="2 of 5 classes have no image among the training images: 1, 3"):
        require_every_class(labels, 5, "training")
    with pytest.raises(ValueError, match=r": 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, \.\.\."):
        require_every_class(torch.zeros(3, dtype=torch.int64), 17, "training")


def test_every_class_is_held_out_in_its_share_and_keeps_an_image():
    labels = torch.cat([torch.zeros(50), torch.ones(30), torch.full((1,), 2)]).long()[torch.randperm(81)]
    kept, held_out = held_out_split(labels, 0.1, seed=3)
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(81))
    assert torch.bincount(labels[held_out], minlength=3).tolist() == [5, 3, 0]
    assert torch.equal(held_out, held_out_split(labels, 0.1, seed=3)[1])
    assert not torch.equal(held_out, held_out_split(labels, 0.1, seed=4)[1])


@pytest.mark.parametrize(("share", "named"), [(0.0, "between 0 and 1"), (1.0, "got 1.0"), (0.1, "leaves none held")])
def test_a_share_that_holds_nothing_out_is_refused(share, named):
    with pytest.raises(ValueError, match=named):
        held_out_split(torch.tensor([0, 0, 1, 1]), share, seed=0)


BOTH = """
import json, sys
from accelerate import Accelerator
sys.path.insert(0, {tests!r})
from test_evaluation_labelled import evaluations

print(json.dumps(evaluations(Accelerator(cpu=True))) + "\\n", end="", flush=True)
"""


def evaluations(accelerator=None) -> list:
    """Nearest neighbours and heads of one problem, as JSON holds them. Two processes have 2 of 3 chunks, and 1."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(113, 4, 13, generator=generator)
    labels = torch.arange(113) % 7
    features[:, -1] += torch.randn(7, 13, generator=generator)[labels]
    train = ImageFeatures(features[:80], labels[:80], features[:80, 0])
    test = ImageFeatures(features[80:], labels[80:], features[80:, 0])
    options = {"accelerator": accelerator, "test_chunk_size": 13}
    ranked = knn_classify(train.cls[:, -1], train.labels, test.cls[:, -1], 7, (3, 11), **options)
    rates = (1e-2, 1e-1, 1.0, 10.0)
    sweep = linear_sweep(
        train, test, 7, learning_rates=rates, selection="held_out", batch_size=17, accelerator=accelerator
    )
    return json.loads(json.dumps([[k.tolist() for k in ranked.values()], sweep.scores, sweep.best.weight.tolist()]))


@pytest.mark.slow  # test_evaluation_evaluate.py has two processes, too
def test_two_processes_compute_what_one_does(tmp_path):
    (tmp_path / "both.py").write_text(BOTH.format(tests=os.path.dirname(__file__)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(tmp_path / "both.py")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert results == [evaluations()] * 2
