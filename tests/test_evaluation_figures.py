# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import numpy as np
import PIL.Image
import pytest

from hf_vitreg.evaluation.figures import _class_colours, depth_figure, segmentation_figure, sweep_figure
from hf_vitreg.evaluation.linear import HeadScore, HeadSettings


def picture(path):
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def colours(pixels):
    return {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()}


def shown(target, prediction, name="photo.jpg"):
    image = np.full((*target.shape, 3), 128, dtype=np.uint8)
    return [(name, image, target, prediction)]


@pytest.mark.parametrize("num_classes", [3, 20, 150])
def test_classes_have_colours_of_their_own(num_classes):
    found = _class_colours(num_classes)
    assert found.shape == (num_classes, 3) and len(np.unique(found, axis=0)) == num_classes


def test_a_class_has_one_colour_and_what_does_not_count_is_black(tmp_path):
    target = np.zeros((20, 31), dtype=np.int64)
    target[:7], target[7:12] = 2, 255
    prediction = np.where(target == 2, 0, 2)
    names = ["$ground", "_wall", "a_{sky}"]
    segmentation_figure(tmp_path / "s.png", shown(target, prediction, "$a_{b.jpg"), names, 255)
    found = colours(picture(tmp_path / "s.png"))
    first, wall, sky = (tuple(np.round(colour * 255).astype(int).tolist()) for colour in _class_colours(3))
    assert {first, sky, (0, 0, 0)} <= found and wall not in found


def test_depths_share_one_scale_and_unknown_ones_are_black(tmp_path):
    target = np.full((20, 31), 4.0, dtype=np.float32)
    target[:5] = 0
    depth_figure(tmp_path / "d.png", shown(target, np.where(target > 0, 2.0, 8.0), "a" * 60))
    assert (0, 0, 0) in colours(picture(tmp_path / "d.png"))


def test_nothing_to_show_is_a_picture_too(tmp_path):
    segmentation_figure(tmp_path / "s.png", [], ["ground"], 255)
    depth_figure(tmp_path / "d.png", [])
    assert picture(tmp_path / "s.png").size and picture(tmp_path / "d.png").size


def test_heads_that_read_the_same_are_one_line(tmp_path):
    scores = [
        HeadScore(HeadSettings(layers, mean, rate), 0.5 + rate, 0.5)
        for layers in (1, 4)
        for mean in (False, True)
        for rate in (1e-1, 1e-3, 1e-2)
    ]
    sweep_figure(tmp_path / "l.png", scores, "org/model_$x on birds_{of}")
    assert picture(tmp_path / "l.png").shape[1] == 1050
