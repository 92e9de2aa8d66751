# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import PIL.Image
import pytest

from hf_vitreg.training.metrics import MetricsLog, plot_curves, plot_pretraining_curves, points


def test_log_is_read_back_and_rewound(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (2, 4, 6):
        log.write(step, train_loss=1 / step)
    log.rewind(4)
    assert log.read() == [{"step": 2, "train_loss": 0.5}, {"step": 4, "train_loss": 0.25}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(3, train_loss=1.0)
    with log.path.open("a") as file:
        file.write('{"step": 5, "train_lo')
    log.rewind(7)
    assert log.read() == [{"step": 3, "train_loss": 1.0}]


def test_rewinding_no_log_leaves_an_empty_one(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.rewind(0)
    assert log.read() == []


def test_curves_are_a_picture(tmp_path):
    records = [{"step": 1, "train_loss": 2.0}, {"step": 2, "validation_loss": 1.0, "validation_accuracy": 0.5}]
    plot_curves(records, tmp_path / "curves.png", title="digits")
    with PIL.Image.open(tmp_path / "curves.png") as image:
        assert image.width > image.height > 300


def test_points_are_where_a_metric_was_measured():
    records = [{"step": 2, "loss": 3.0}, {"step": 3, "knn_accuracy": 0.5}, {"step": 5, "loss": 2.0}]
    assert points(records, "loss") == [(2, 3.0), (5, 2.0)]


PRETRAINING = [
    {"step": 0, "knn_accuracy": 0.2, "outlier_share": 0.0, "max_norm_ratio": 1.1},
    {"step": 10, "train_loss": 9.0, "dino_loss": 6.0, "ibot_loss": 3.0, "images_per_second": 70.0, "mfu": 0.3},
    {"step": 20, "train_loss": 8.0, "dino_loss": 5.5, "ibot_loss": 2.5, "images_per_second": 71.0, "mfu": 0.3},
    {"step": 20, "knn_accuracy": 0.6, "outlier_share": 0.01, "max_norm_ratio": 4.1},
]


@pytest.mark.parametrize("num_records", [0, 1, 2, 4])
def test_pretraining_curves_are_drawn_of_whatever_was_measured(tmp_path, num_records):
    plot_pretraining_curves(PRETRAINING[:num_records], tmp_path / "curves.png", title="digits: dino")
    with PIL.Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1000 and image.height > 900
