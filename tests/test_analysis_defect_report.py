# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The report of singular defects, with images and without."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_cases import save_model
from planted import MEAN, NUM_LAYERS, STD, patchy_image, planted_encoder
from safetensors.torch import load_file
from sample_images import write_folder
from test_analysis_report import Page
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from hf_vitreg.analysis import defect_report, figures
from hf_vitreg.analysis.defect_report import defect_sentences, inspect_weights
from hf_vitreg.analysis.report import inspect_model
from hf_vitreg.analysis.singular_defects import singular_defects
from hf_vitreg.features import load_vit


FILES = ["directions.safetensors", "metrics.json", "report.html", "singular_defects.png"]


@pytest.fixture(scope="module", autouse=True)
def small_figures():
    """Quickly drawn."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(figures, "DPI", 40)
        yield


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "planted"
    planted_encoder(500.0).model.save_pretrained(folder)
    processor = BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 42}, image_mean=MEAN, image_std=STD
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(6):
        patchy_image(index)[0].save(folder / f"{index}.png")
    return folder


def read(report):
    return json.loads((report.folder / "metrics.json").read_text())


def test_weights_alone_make_a_report(repository, tmp_path, capsys):
    done = inspect_weights(repository, tmp_path / "deep" / "report")
    assert sorted(path.name for path in done.folder.iterdir()) == FILES
    metrics = read(done)
    assert metrics == done.metrics
    assert metrics["images"] is metrics["outliers"] is metrics["settings"] is None
    expected = singular_defects(load_vit(repository))
    directions = load_file(done.folder / "directions.safetensors")["directions"]
    assert directions.shape == (NUM_LAYERS, 48) and directions.dtype == torch.float32
    np.testing.assert_allclose(directions, expected.directions, atol=1e-6)
    for layer, row in enumerate(metrics["layers"], start=1):
        assert row["layer"] == layer and row["prediction"] is None
        assert row["dominance"] == pytest.approx(expected.dominance[layer - 1].item())
        assert row["cos_last"] == pytest.approx(expected.cosines(-1)[layer - 1].item())
        previous = None if layer == 1 else pytest.approx(expected.cosines(layer - 1)[layer - 2].item())
        assert row["cos_previous"] == previous
    page = Page(done.page)
    assert page.open == [] and page.fetched == [] and len(page.images) == 1
    assert "no image was looked at" in page.text and "give --images too" in page.text
    assert metrics["model"]["sha256"] in page.text and "settings" not in page.text
    done.show()
    table = capsys.readouterr().out
    assert "dominance" in table and "AUROC" not in table
    firsts = [line.split()[0] for line in table.splitlines() if line.strip()]
    assert firsts[-NUM_LAYERS:] == [str(layer) for layer in range(1, NUM_LAYERS + 1)]


def test_images_show_how_well_directions_predict(repository, photographs, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    done = inspect_weights(repository, tmp_path / "report", [photographs, broken], threshold=10.0, batch_size=4)
    metrics = read(done)
    assert metrics["outliers"] == {
        "layer": NUM_LAYERS,
        "side": "high",
        "threshold": 10.0,
        "num_outliers": 9,
        "share": 9 / (6 * 24),
    }
    assert metrics["settings"]["threshold"] == 10.0 and metrics["images"]["num_images"] == 6
    for row in metrics["layers"]:
        assert 0 <= row["prediction"]["auroc"] <= 1 and row["prediction"]["outliers"]["count"] == 9
    assert "6.25 % of the patches (9) have a norm above 10 after layer 5." in done.verdict[2]
    page = Page(done.page)
    assert page.open == [] and "AUROC" in page.text and "broken.png no image that Pillow knows" in page.text
    assert page.text.count("norm above 10 after layer 5") == 1
    done.show()
    table = capsys.readouterr().out
    assert all(word in table for word in ("outliers", "AUROC", "precision")), "not cut off"


def test_without_outliers_the_report_says_so(repository, photographs, tmp_path):
    done = inspect_weights(repository, tmp_path / "report", [photographs], threshold=1e9)
    assert done.verdict[-1].startswith("No patch has a norm above 1,000,000,000 after layer 5")
    prediction = read(done)["layers"][0]["prediction"]
    assert prediction["auroc"] is prediction["recall"] is prediction["precision"] is None
    assert prediction["rest"]["count"] == 6 * 24


def test_sentences_say_from_which_layer_on_the_direction_is_the_last_one():
    layers = [{"dominance": 3.0, "cos_last": cosine} for cosine in (0.95, 0.2, 0.91, 0.97, 1.0)]
    first, second = defect_sentences({"layers": layers, "outliers": None})
    assert first == "After layer 5 the weights stretch one direction 3 times as much as any other."
    assert second.endswith("from layer 3 on.")
    assert defect_sentences({"layers": layers[-1:], "outliers": None})[1].endswith("from layer 1 on.")


def test_reports_of_both_kinds_replace_each_other_when_asked(repository, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw_figures", lambda inspection, scales: {})
    folder = tmp_path / "report"
    inspect_model(repository, [photographs], folder)
    with pytest.raises(ValueError, match=r"There is a report in .* already"):
        inspect_weights(repository, folder)
    inspect_weights(repository, folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    inspect_model(repository, [photographs], folder, overwrite=True)
    assert not (folder / "directions.safetensors").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds other things than a report"):
        inspect_weights(repository, tmp_path / "precious", overwrite=True)


@pytest.mark.parametrize(("owner", "name"), [(figures, "save_figure"), (defect_report, "save"), (Path, "rename")])
def test_full_disk_leaves_nothing(repository, tmp_path, monkeypatch, owner, name):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="No space left"):
        inspect_weights(repository, tmp_path / "report")
    assert list(tmp_path.iterdir()) == []


def test_folder_of_checkpoints_stands_for_the_last(tmp_path):
    for step in (3, 20):
        save_model(tmp_path / "run" / f"checkpoint-{step}", num_hidden_layers=2)
    done = inspect_weights(tmp_path / "run", tmp_path / "report")
    assert read(done)["model"]["name"].endswith("checkpoint-20")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "gone"}, "Cannot load gone"),
        ({"images": ["gone"]}, "There is no image in gone"),
        ({"device": "cuda:99"}, "There is no device 'cuda:99' here"),
        ({"layer": 6}, "has layers 1 to 5, got 6"),
        ({"size": (20, 35)}, "A height of 20 pixels is no multiple of the patch size 7"),
        ({"threshold": "mean"}, "must be a number or one of"),
    ],
)
def test_what_cannot_be_used_is_named_and_leaves_no_report(repository, tmp_path, change, message):
    write_folder(tmp_path / "images", {"blue": 2})
    options = {"model": repository, "images": [tmp_path / "images"], "output": tmp_path / "report", **change}
    with pytest.raises(ValueError, match=message):
        inspect_weights(**options)
    assert not (tmp_path / "report").exists()


def test_models_of_others_are_to_be_converted_first(tmp_path):
    config = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, patch_size=7, image_size=35)
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    with pytest.raises(ValueError, match="Convert it first"):
        inspect_weights(tmp_path / "dinov2", tmp_path / "report")
