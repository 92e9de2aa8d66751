# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import dataclasses

import pytest

from hf_vitreg.evaluation.evaluate import TASKS
from hf_vitreg.evaluation.options import EVERY_TASK, READ_BY, EvaluationOptions, require_options_of


NAMES = {option.name for option in dataclasses.fields(EvaluationOptions)}


def test_every_option_is_read_by_a_task_and_every_task_reads_some():
    assert READ_BY.keys() == TASKS.keys()
    assert set().union(EVERY_TASK, *READ_BY.values()) == NAMES


def test_every_option_is_described():
    described = EvaluationOptions.__doc__.partition("Attributes:")[2]
    words = {word.strip(",: ") for line in described.splitlines() for word in line.partition(":")[0].split()}
    assert words >= NAMES


def test_what_was_not_set_has_not_changed():
    assert EvaluationOptions().changed() == {}
    options = EvaluationOptions(size=(28, 42), outliers={"noise": "noise"}, batch_size=32)
    assert options.changed() == {"size": (28, 42), "outliers": {"noise": "noise"}}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_takes_its_own_options_and_no_other(task):
    require_options_of(task, EvaluationOptions())
    require_options_of(task, EvaluationOptions(seed=5, batch_size=7))
    other = {"segmentation": "eigen_crop", "depth": "num_classes"}.get(task, "num_steps")
    value = {"eigen_crop": True, "num_classes": 5, "num_steps": 5}[other]
    with pytest.raises(ValueError, match=f"The task {task} does not read --{other.replace('_', '-')}; it belongs to"):
        require_options_of(task, EvaluationOptions(**{other: value}))


def test_a_task_that_there_is_not():
    with pytest.raises(ValueError, match="no task 'knnn', only knn, linear, logistic"):
        require_options_of("knnn", EvaluationOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "attention", "bias": -0.5}, "--bias is not read with --method attention"),
        ({"method": "attention", "tune": True}, "--tune is not read with --method attention"),
        ({"tune": True, "normalize": True}, "--normalize is not read with --tune, which chooses it"),
        ({"tuning_share": 0.5}, "--tuning-share is not read without --tune"),
        ({"image_list": "list.txt"}, "--image-list is not read without --annotations"),
        ({"annotations": "coco.json", "split": "test"}, "--split is not read with --annotations"),
        ({"method": "los"}, "--method must be lost or attention, got 'los'"),
        ({"batch_size": 0}, "--batch-size must be above 0, got 0"),
    ],
)
def test_an_option_that_others_put_out_of_work_is_not_ignored(options, message):
    with pytest.raises(ValueError, match=message):
        require_options_of("object_discovery", EvaluationOptions(**options))


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("linear", {"selection": "test"}, "--selection must be validation or held_out, got 'test'"),
        ("linear", {"num_epochs": 0}, "--num-epochs must be above 0, got 0"),
        ("knn", {"preprocessing": "pad"}, "--preprocessing must be crop or fit or stretch, got 'pad'"),
        ("knn", {"num_workers": -1}, "--num-workers must be above 0, got -1"),
        ("depth", {"num_steps": 0}, "--num-steps must be above 0, got 0"),
    ],
)
def test_a_value_that_no_task_takes(task, options, message):
    with pytest.raises(ValueError, match=message):
        require_options_of(task, EvaluationOptions(**options))


def test_options_that_belong_together_are_taken():
    require_options_of("object_discovery", EvaluationOptions(tune=True, tuning_share=0.5, facet="key", layer=3))
    require_options_of("object_discovery", EvaluationOptions(annotations="coco.json", image_list="list.txt"))
    require_options_of("object_discovery", EvaluationOptions(normalize=True, bias=-0.5, split="test", no_hard=True))
