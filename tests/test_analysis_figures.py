# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Figures say what they show, in the same colours everywhere."""

import dataclasses

import numpy as np
import PIL.Image
import pytest
from matplotlib.figure import Figure
from planted import COLS, NUM_LAYERS, NUM_REGISTERS, ROWS, patchy_image, planted_encoder

from hf_vitreg.analysis import figures
from hf_vitreg.analysis.inspection import inspect


@pytest.fixture(scope="module")
def inspections():
    images = [patchy_image(index)[0] for index in range(12)]
    return inspect(planted_encoder(500.0), images), inspect(planted_encoder(1.0, num_registers=0), images)


@pytest.fixture(scope="module")
def scales(inspections):
    return figures.shared_scales(inspections)


@pytest.fixture(scope="module")
def drawn(inspections, scales):
    return [figures.draw_figures(each, scales) for each in inspections]


def words(figure: Figure) -> str:
    """Everything that is written in a figure, but for the numbers of axes."""
    texts = [figure.get_suptitle()]
    for axes in figure.axes:
        texts += [axes.get_title(), axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel()]
    texts += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return "\n".join(texts)


def colour_ranges(figure: Figure) -> set[tuple[float, float]]:
    maps = [image for axes in figure.axes for image in axes.images if image.get_array().ndim == 2]
    return {image.get_clim() for image in maps}


def test_every_measurement_has_its_figure(drawn):
    common = {
        "norm_histogram",
        "norms_by_layer",
        "outlier_share_by_layer",
        "outlier_frequency",
        "neighbour_similarity",
        "pictures",
        "norm_maps",
        "attention_by_token",
        "attention_heads_cls",
        "attention_by_layer",
    }
    registers = {f"attention_heads_register_{index + 1}" for index in range(NUM_REGISTERS)}
    assert set(drawn[0]) == common | registers and set(drawn[1]) == common


def test_figures_name_the_model_and_label_their_axes(drawn):
    for name, figure in drawn[0].items():
        text = words(figure)
        assert "planted" in text, name
        assert "norm" in text or "share" in text or "density" in text or "attention" in text, name
    curves = [each for each in drawn[0].values() if len(each.axes) == 1]
    assert len(curves) == 4 and all(figure.axes[0].get_xlabel() and figure.axes[0].get_ylabel() for figure in curves)


def test_colours_mean_the_same_in_all_layers_and_both_models(drawn, scales):
    for name in ("norm_maps", "outlier_frequency", "attention_by_token", "attention_by_layer"):
        ranges = colour_ranges(drawn[0][name]) | colour_ranges(drawn[1][name])
        assert len(ranges) == 1, name
    assert colour_ranges(drawn[0]["norm_maps"]) == {scales.maps}
    assert drawn[0]["norm_histogram"].axes[0].get_xlim() == drawn[1]["norm_histogram"].axes[0].get_xlim()
    for name in ("norms_by_layer", "outlier_share_by_layer", "neighbour_similarity"):
        assert drawn[0][name].axes[0].get_ylim() == drawn[1][name].axes[0].get_ylim(), name


def test_maps_are_those_of_the_inspection(inspections, drawn, scales):
    picture = inspections[0].pictures[0]
    cells = drawn[0]["attention_heads_register_2"].axes
    for axes, values in zip(cells[1:], picture.attention["register_2"]):
        np.testing.assert_allclose(axes.images[0].get_array(), values * ROWS * COLS)
    layers = drawn[0]["norm_maps"].axes[1 : 1 + NUM_LAYERS]
    for axes, values in zip(layers, picture.norms):
        np.testing.assert_array_equal(axes.images[0].get_array(), values)
    frames = drawn[0]["pictures"].axes[1].patches
    assert len(frames) == picture.outliers.sum()


def test_every_layer_has_a_figure_where_that_is_asked_for(scales):
    encoder = planted_encoder(500.0)
    result = inspect(encoder, [patchy_image(index)[0] for index in range(5)], all_layers=True)
    drawn = figures.draw_figures(result, scales)
    by_layer = [name for name in drawn if name.startswith("attention_layer_")]
    assert len(by_layer) == NUM_LAYERS * (1 + NUM_REGISTERS)
    pixel_values = encoder.preprocess([PIL.Image.fromarray(result.pictures[0].photograph)])
    for layer in range(NUM_LAYERS):
        maps = encoder.attention(pixel_values, layer, "registers")[0, :, 1, encoder.patch_slice]
        cells = drawn[f"attention_layer_{layer + 1:02d}_register_2"].axes[1:]
        assert f"Attention of register 2 in layer {layer + 1}, head by head" in words(cells[0].figure)
        for axes, values in zip(cells, maps / maps.sum(-1, keepdim=True)):
            np.testing.assert_allclose(axes.images[0].get_array().ravel(), values * ROWS * COLS, rtol=1e-4)


def test_histogram_counts_every_token_of_the_layer(inspections, drawn):
    patches = drawn[0]["norm_histogram"].axes[0].patches[0]
    assert patches.get_data().values.sum() == pytest.approx(1, abs=1e-4)
    assert "threshold" in words(drawn[0]["norm_histogram"]) and "register 3" in words(drawn[0]["norm_histogram"])


def test_training_curve_marks_artifacts():
    curve = [{"step": step, "share": share, "has_artifacts": share > 0} for step, share in ((10, 0.0), (70, 0.05))]
    axes = figures.training_curve_figure("a run", curve).axes[0]
    line, marks = axes.lines
    assert line.get_xydata().tolist() == [[10, 0], [70, 0.05]] and marks.get_xydata().tolist() == [[70, 0.05]]
    assert figures.training_curve_figure("a run", curve[:1]).axes


def test_files_are_pictures_and_always_the_same(inspections, scales, tmp_path):
    for copy in ("first", "second"):
        figures.save_figure(figures.norms_by_layer(inspections[0], scales), tmp_path / f"{copy}.png")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    with PIL.Image.open(tmp_path / "first.png") as image:
        assert image.width == figures.WIDTH * figures.DPI and image.height > 400


def test_names_are_written_as_they_are_and_in_any_script(inspections, scales, tmp_path):
    picture = dataclasses.replace(inspections[0].pictures[0], name="photos/$x_1$ 熊.png")
    model = inspections[0].metrics["model"] | {"name": "long/" * 40 + "name$"}
    metrics = inspections[0].metrics | {"model": model}
    result = dataclasses.replace(inspections[0], pictures=[picture], metrics=metrics)
    figures.save_figure(figures.pictures(result, scales), tmp_path / "names.png")
    assert "…" in words(figures.norm_maps(result, scales))
