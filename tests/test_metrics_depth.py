# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import inspect
from concurrent.futures import ThreadPoolExecutor

import evaluate
import numpy as np
import pytest
import sklearn.metrics

from hf_vitreg.metrics import depth
from hf_vitreg.metrics.depth import DepthErrors, depth_error_sums, valid_pixels


def depth_maps(count=5, height=13, width=17, seed=0):
    """Depths of 0 to 12 m, a fifth of them missing, of different sizes; predictions err by a fifth."""
    generator = np.random.default_rng(seed)
    targets = [generator.uniform(0, 12, (height + index, width)).astype("float32") for index in range(count)]
    predictions = [np.exp(np.log(each + 0.01) + generator.normal(0, 0.2, each.shape)) for each in targets]
    for target in targets:
        target[generator.random(target.shape) < 0.2] = 0
    return predictions, targets


def compute(predictions, targets, average="images", **kwargs):
    metric = DepthErrors(keep_in_memory=True, **kwargs)
    return metric.compute(predictions=predictions, references=targets, average=average)


def expected(predictions, targets, smallest=1e-3, largest=10.0):
    """Of one image or of several as one, pixel by pixel."""
    prediction, target = (np.concatenate([each.ravel() for each in maps]) for maps in (predictions, targets))
    pairs = [(p, t) for p, t in zip(prediction.tolist(), target.tolist()) if smallest <= t <= largest]
    prediction, target = map(np.array, zip(*pairs))
    return {
        "rmse": sklearn.metrics.root_mean_squared_error(target, prediction),
        "abs_rel": sklearn.metrics.mean_absolute_percentage_error(target, prediction),
        "log10": sklearn.metrics.mean_absolute_error(np.log10(target), np.log10(prediction)),
        "delta1": np.mean([max(p / t, t / p) < 1.25 for p, t in pairs]),
        "delta2": np.mean([max(p / t, t / p) < 1.5625 for p, t in pairs]),
        "delta3": np.mean([max(p / t, t / p) < 1.953125 for p, t in pairs]),
    }


def test_errors_over_images_are_the_mean_of_those_of_each():
    predictions, targets = depth_maps()
    of_each = [expected([prediction], [target]) for prediction, target in zip(predictions, targets)]
    means = {name: np.mean([errors[name] for errors in of_each]) for name in of_each[0]}
    assert compute(predictions, targets) == pytest.approx(means, rel=1e-9)


def test_errors_over_pixels_are_those_of_all_images_as_one():
    predictions, targets = depth_maps()
    over_pixels = compute(predictions, targets, average="pixels")
    assert over_pixels == pytest.approx(expected(predictions, targets), rel=1e-9)
    assert over_pixels["rmse"] != pytest.approx(compute(predictions, targets)["rmse"], rel=1e-6)


def test_by_hand():
    prediction, target = np.array([[1.0, 3.0, 9.0]]), np.array([[2.0, 3.0, 0.0]])
    assert compute([prediction], [target]) == {
        "rmse": pytest.approx(0.5**0.5),
        "abs_rel": 0.25,
        "log10": pytest.approx(np.log10(2) / 2),
        "delta1": 0.5,
        "delta2": 0.5,
        "delta3": 0.5,
    }


def test_only_depths_in_range_count_and_the_ends_do():
    target = np.array([[0.0, 1e-4, 1e-3, 5.0, 10.0, 10.5]])
    assert valid_pixels(target).tolist() == [[False, False, True, True, True, False]]
    assert valid_pixels(target, 1.0, 80.0).tolist() == [[False, False, False, True, True, True]]
    assert not valid_pixels(np.array([[np.nan]])).any()
    predictions, targets = depth_maps()
    assert compute(predictions, targets, max_depth=5.0) != compute(predictions, targets)


def test_the_crop_of_eigen_is_in_the_middle_of_nyus_frames():
    valid = valid_pixels(np.ones((480, 640)), eigen_crop=True)
    rows, cols = valid.any(axis=1).nonzero()[0], valid.any(axis=0).nonzero()[0]
    assert (rows[0], rows[-1], cols[0], cols[-1]) == (45, 470, 41, 600)
    assert valid.sum() == 426 * 560
    target = np.full((480, 640), 2.0)
    prediction = np.where(valid, 2.0, 7.0)
    assert compute([prediction], [target], eigen_crop=True)["rmse"] == 0 < compute([prediction], [target])["rmse"]
    with pytest.raises(ValueError, match="crop is one of 480x640 pixels, got depth of 640x480"):
        compute([prediction.T], [target.T], eigen_crop=True)


def test_the_same_however_images_are_added_and_over_processes(tmp_path):
    predictions, targets = depth_maps()
    one_by_one = DepthErrors(keep_in_memory=True)
    for prediction, target in zip(predictions, targets):
        one_by_one.add(prediction=prediction, reference=target)

    def process(rank):
        part = DepthErrors(cache_dir=str(tmp_path), num_process=2, process_id=rank)
        part.add_batch(predictions=predictions[rank::2], references=targets[rank::2])
        return part.compute()

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(process, range(2))
    together = compute(predictions, targets)
    assert one_by_one.compute() == together and second is None
    # the images of the other process come last, which changes the order of a sum
    assert first == pytest.approx(together, rel=1e-12)


def test_loads_from_its_file_without_a_network(tmp_path):
    loaded = evaluate.load(inspect.getfile(depth), cache_dir=str(tmp_path), max_depth=80.0)
    errors = loaded.compute(predictions=[np.full((2, 3), 25.0)], references=[np.full((2, 3), 20.0)])
    assert errors["rmse"] == 5.0 and errors["delta1"] == 0 and errors["delta2"] == 1


def test_an_image_without_depth_is_an_error_that_counts_it():
    metric = DepthErrors(keep_in_memory=True)
    good = np.ones((3, 5))
    metric.add_batch(predictions=[good, good], references=[good, good])
    with pytest.raises(ValueError, match=r"Image 3 of those added.*no depth between 0.001 and 10 m\. Leave it out"):
        metric.add_batch(predictions=[good, good], references=[good, np.zeros((3, 5))])
    with pytest.raises(ValueError, match=r"Image 2.*no depth"):
        metric.add(prediction=good, reference=good * 11)
    at_the_border = np.zeros((480, 640))
    at_the_border[0] = 1
    with pytest.raises(ValueError, match="within Eigen's crop"):
        compute([at_the_border + 1], [at_the_border], eigen_crop=True)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_predictions_that_are_no_depth_are_errors_where_they_count(value):
    prediction, target = np.array([[1.0, value]]), np.array([[1.0, 1.0]])
    with pytest.raises(ValueError, match=r"1 of 2 predicted depths are no positive numbers.*Clamp"):
        compute([prediction], [target])
    assert compute([prediction], [np.array([[1.0, 0.0]])])["rmse"] == 0


def test_other_bad_input():
    good = np.ones((3, 5))
    with pytest.raises(ValueError, match="A depth map of 3x5 pixels has a prediction of 5x3"):
        compute([good.T], [good])
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        compute([good], [good, good])
    with pytest.raises(ValueError, match="no image"):
        compute([], [])
    with pytest.raises(ValueError, match=r"average must be .images. or .pixels., got 'all'"):
        compute([good], [good], average="all")
    with pytest.raises(ValueError, match="0 < min_depth < max_depth, got 0 and 10"):
        DepthErrors(min_depth=0, max_depth=10)


def test_sums_of_half_precision_are_taken_in_double():
    prediction, target = np.full((100, 100), 3.0, dtype="float16"), np.full((100, 100), 1.0, dtype="float16")
    sums, count = depth_error_sums(prediction, target, target > 0)
    assert count == 10_000 and sums[:2].tolist() == [40_000, 20_000]
