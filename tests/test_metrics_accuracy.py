# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import inspect

import evaluate
import pytest

from hf_vitreg.metrics import accuracy
from hf_vitreg.metrics.accuracy import Accuracy


def test_counts_over_batches_and_leaves_unreadable_images_out():
    metric = Accuracy(keep_in_memory=True)
    metric.add_batch(predictions=[3, 1, 2], references=[3, 2, 2])
    metric.add_batch(predictions=[5, 0], references=[-100, 0])
    assert metric.compute() == {"accuracy": 0.75}


def test_loads_from_its_file_without_a_network(tmp_path):
    metric = evaluate.load(inspect.getfile(accuracy), cache_dir=str(tmp_path))
    assert metric.compute(predictions=[1, 0], references=[1, 1]) == {"accuracy": 0.5}


def test_nothing_to_count_is_an_error():
    with pytest.raises(ValueError, match="no image"):
        Accuracy(keep_in_memory=True).compute(predictions=[1], references=[-100])
