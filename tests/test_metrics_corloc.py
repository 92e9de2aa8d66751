# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import inspect

import evaluate
import numpy as np
import pytest

from hf_vitreg.metrics import corloc
from hf_vitreg.metrics.corloc import CorLoc, box_iou, is_found


def test_iou_by_hand():
    others = np.array([[0, 0, 10, 6], [5, 3, 15, 9], [10, 6, 12, 8], [2, 1, 5, 4]])
    # intersections 60, 15, 0, 9; unions 60, 105, 64, 60
    assert box_iou([0, 0, 10, 6], others) == pytest.approx([1, 1 / 7, 0, 9 / 60])


def test_an_overlap_of_exactly_one_half_is_found():
    assert is_found([0, 0, 10, 7], [[0, 0, 5, 7]])
    assert is_found([0, 0, 1331, 997], [[0, 0, 2662, 997]])
    assert not is_found([0, 0, 1331, 997], [[0, 0, 2663, 997]])


def test_counts_over_batches_and_leaves_images_without_boxes_out():
    metric = CorLoc(keep_in_memory=True)
    metric.add_batch(
        predictions=[[0, 0, 10, 7], [0, 0, 4, 4], [1, 1, 2, 3]],
        references=[[[90, 90, 95, 95], [1, 0, 10, 7]], [[2, 2, 9, 9]], []],
    )
    metric.add_batch(predictions=[[3, 1, 8, 9]], references=[[[3, 1, 8, 9]]])
    assert metric.compute() == {"corloc": pytest.approx(2 / 3)}


def test_loads_from_its_file_without_a_network(tmp_path):
    metric = evaluate.load(inspect.getfile(corloc), cache_dir=str(tmp_path))
    assert metric.compute(predictions=[[0, 0, 2, 2]], references=[[[0, 0, 2, 3]]]) == {"corloc": 1.0}


def test_nothing_to_count_is_an_error():
    with pytest.raises(ValueError, match="no image with a true box"):
        CorLoc(keep_in_memory=True).compute(predictions=[[0, 0, 1, 1]], references=[[]])
