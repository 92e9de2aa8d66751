# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Results as pictures, drawn without a display and without pyplot's state."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from .linear import HeadScore


DPI = 150
WIDTH = 7.0  # inches
BLACK = (0.0, 0.0, 0.0)
# name, image, target and prediction
Shown = Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]]


def segmentation_figure(path: Path, shown: Shown, class_names: Sequence[str], ignore_index: int) -> None:
    """Images, true and predicted classes in the same colours; pixels that do not count are black.

    Args:
        path: A PNG.
        shown: Targets and predictions `(height, width)` of classes.
        class_names: By class.
        ignore_index: Of pixels that do not count.
    """
    colours = _class_colours(len(class_names))
    figure, grid = _grid("Segmentation by a linear head", shown)
    for row, (_, image, target, prediction) in zip(grid, shown):
        is_counted = target != ignore_index
        row[0].imshow(image)
        for axes, values in ((row[1], target), (row[2], prediction)):
            axes.imshow(np.where(is_counted[..., None], colours[np.where(is_counted, values, 0)], BLACK))
    present = sorted({value for _, _, target, _ in shown for value in np.unique(target) if value != ignore_index})
    handles = [Patch(color=colours[value], label=class_names[value]) for value in present[:20]]
    legend = figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # names are no formulas
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def depth_figure(path: Path, shown: Shown) -> None:
    """Images, true and predicted depths in the same colours; pixels without a depth are black.

    Args:
        path: A PNG.
        shown: Targets and predictions `(height, width)` in metres.
    """
    figure, grid = _grid("Depth by a linear head", shown)
    known = np.concatenate([target[target > 0] for _, _, target, _ in shown]) if shown else np.ones(1)
    norm = LogNorm(float(known.min()), max(float(known.max()), 1.01 * float(known.min())))
    colours = colormaps["cividis"].with_extremes(bad="black")
    for row, (_, image, target, prediction) in zip(grid, shown):
        row[0].imshow(image)
        row[1].imshow(np.ma.masked_less_equal(target, 0), cmap=colours, norm=norm)
        last = row[2].imshow(prediction, cmap=colours, norm=norm)
    if shown:
        bar = figure.colorbar(last, ax=grid, label="depth in metres (logarithmic)", fraction=0.03, pad=0.01)
        bar.outline.set_visible(False)
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        bar.ax.yaxis.set_major_formatter(plain)
        bar.ax.yaxis.set_minor_formatter(plain)
        bar.ax.tick_params(which="both", labelsize=7)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def sweep_figure(path: Path, scores: Sequence[HeadScore], title: str) -> None:
    """Accuracy of every head over its learning rate, a line for what it reads.

    Args:
        path: A PNG.
        scores: Of a linear sweep.
        title: What it was measured on.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[float, float]]] = {}
    for score in scores:
        reads = score.settings.name.rpartition(", lr")[0]
        lines.setdefault(reads, []).append((score.settings.learning_rate, score.accuracy))
    for (reads, points), marker in zip(lines.items(), "osd^v<>" * len(lines)):
        axes.plot(*zip(*sorted(points)), marker=marker, ms=4, label=reads)
    axes.set(xscale="log", xlabel="learning rate, for 256 images a step", ylabel="accuracy on validation images")
    axes.set_title(f"Linear heads\n{title}", fontsize=10, loc="left", parse_math=False)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _class_colours(number: int) -> np.ndarray:
    """`(number, 3)`, as different as so many can be."""
    if number <= 20:
        return np.array(colormaps["tab20"].colors)[:number]
    return ListedColormap(colormaps["gist_ncar"](np.linspace(0.02, 0.98, number))).colors[:, :3]


def _grid(title: str, shown: Shown) -> tuple[Figure, np.ndarray]:
    """A row an image: the image, its target, its prediction."""
    num_rows = max(len(shown), 1)
    side = WIDTH / 3.3
    heights = [side * image.shape[0] / image.shape[1] for _, image, _, _ in shown] or [side]
    figure = Figure(figsize=(WIDTH, sum(heights) + 1.2), layout="constrained")
    grid = figure.subplots(num_rows, 3, squeeze=False, height_ratios=heights)
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, words in zip(grid[0], ("image", "true", "predicted")):
        axes.set_title(words, fontsize=9)
    for row, (name, *_) in zip(grid, shown):
        row[0].set_ylabel(name if len(name) <= 24 else f"…{name[-23:]}", fontsize=7, parse_math=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure, grid
