# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The figures of an inspection, drawn without a display and without pyplot's state.

Colours are those of Okabe and Ito and the map cividis, which people who see few colours can tell apart, and lines
differ in more than their colour, so that figures can be printed in grey.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from .inspection import Inspection
from .norms import NormDistribution
from .passes import Picture
from .sections import number, percent


# few inches and many dots, so that words can be read on a phone
DPI = 230
WIDTH = 4.6  # inches
COLOUR_MAP = "cividis"
BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#000000",
)
REGISTER_STYLES = list(zip((PURPLE, ORANGE, SKY, BLACK) * 3, ("--", ":", "-.") * 4))  # twelve pairs
MAX_LAYER_MAPS = 6
MAPS_A_ROW = 7  # the photograph and six heads


@dataclass(frozen=True)
class Scales:
    """Ranges that all figures share, of one model or of two.

    Attributes:
        norms: Smallest and largest norm after any layer, and the same for patches in the pictures.
        maps: Norms in the pictures.
        share: Largest share on an axis of shares.
        frequency: Largest share of images in a cell of the grid.
        density: Largest density of neighbour similarity.
        attention: Where the colours of attention maps end, in units of uniform attention.
    """

    norms: tuple[float, float]
    maps: tuple[float, float]
    share: float
    frequency: float
    density: float
    attention: float


def shared_scales(inspections: Sequence[Inspection]) -> Scales:
    """That fit all of them."""
    every = [row for each in inspections for rows in each.distributions.values() for row in rows if row.count]
    maps = np.concatenate([picture.norms.ravel() for each in inspections for picture in each.pictures])
    shares = [row["outlier_share"] for each in inspections for row in each.metrics["layers"]]
    shares += [row["share_beyond_final_threshold"] for each in inspections for row in each.metrics["layers"]]
    attention = [_all_attention(picture) for each in inspections for picture in each.pictures]
    attention = np.concatenate(attention) if attention else np.empty(0)
    densities = [
        each.arrays[name].max() for each in inspections for name in ("similarity_rest", "similarity_outliers")
    ]
    return Scales(
        norms=_positive_range([row.minimum for row in every], [row.maximum for row in every]),
        maps=_positive_range(maps, maps),
        share=min(1.0, 1.1 * max(max(shares), 0.01)),
        frequency=max(max(each.arrays["outlier_frequency"].max() for each in inspections), 0.01),
        density=1.05 * max(densities),
        attention=max(float(np.quantile(attention, 0.995)), 1.5) if len(attention) else 1.5,
    )


def _positive_range(lowest: Sequence[float], highest: Sequence[float]) -> tuple[float, float]:
    """Never empty, so that it has a logarithm, and at least a factor of 1.5 wide."""
    high = max(float(np.max(highest)), 1e-6)
    low = max(float(np.min(lowest)), 1e-4 * high)
    return min(low, high / 1.5), high


def _all_attention(picture: Picture) -> np.ndarray:
    maps = [each.ravel() * each[0].size for each in picture.attention.values()]
    if picture.attention_by_layer is not None:
        maps.append(picture.attention_by_layer.ravel() * picture.outliers.size)
    return np.concatenate(maps) if maps else np.empty(0)


def draw_figures(inspection: Inspection, scales: Scales) -> dict[str, Figure]:
    """All figures that there is something to show in, by the name of their file without suffix."""
    figures = {
        "norm_histogram": norm_histogram(inspection, scales),
        "norms_by_layer": norms_by_layer(inspection, scales),
        "outlier_share_by_layer": outlier_share_by_layer(inspection, scales),
        "outlier_frequency": outlier_frequency(inspection, scales),
        "neighbour_similarity": neighbour_similarity(inspection, scales),
        "pictures": pictures(inspection, scales),
        "norm_maps": norm_maps(inspection, scales),
    }
    if inspection.pictures[0].attention:
        figures["attention_by_token"] = attention_by_token(inspection, scales)
        layer = inspection.metrics["verdict"]["layer"]
        for token in inspection.pictures[0].attention:
            figures[f"attention_heads_{token}"] = attention_heads(inspection, scales, token, layer)
        figures["attention_by_layer"] = attention_by_layer(inspection, scales)
    for layer, tokens in enumerate(inspection.pictures[0].attention_of_all_layers, start=1):
        for token in tokens:
            figures[f"attention_layer_{layer:02d}_{token}"] = attention_heads(inspection, scales, token, layer)
    return figures


def save_figure(figure: Figure, path: Path) -> None:
    """As PNG. The same figure gives the same bytes."""
    with warnings.catch_warnings():
        # names of files in scripts that the font has not: boxes will do
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


# Curves


def norm_histogram(inspection: Inspection, scales: Scales) -> Figure:
    """Norms of all kinds of tokens at the layer looked at, shares on a logarithmic axis, and the threshold."""
    verdict = inspection.metrics["verdict"]
    figure, axes = _axes(f"Token norms after layer {verdict['layer']}", _name(inspection))
    edges = np.geomspace(scales.norms[0] / 1.1, 1.1 * scales.norms[1], 81)
    for kind, (colour, line) in _styles(inspection).items():
        distribution = _after(inspection, kind, verdict["layer"])
        shares = distribution.histogram(edges) / distribution.count
        fill = {"fill": True, "alpha": 0.35, "linewidth": 0} if kind == "patch" else {"linestyle": line}
        axes.stairs(np.maximum(shares, 1e-7), edges, color=colour, label=_words(kind), baseline=1e-7, **fill)
    axes.axvline(
        verdict["threshold"], color=VERMILION, linewidth=1.2, label=f"threshold {number(verdict['threshold'], 4)}"
    )
    _logarithmic_norms(axes.xaxis, scales)
    axes.set(xscale="log", yscale="log", xlim=(edges[0], edges[-1]), ylim=(2e-5, 1.5))
    _logarithmic_norms(axes.xaxis, scales)
    axes.set(xlabel="norm before the final norm (logarithmic)", ylabel="share of its kind, a bin")
    _legend(axes)
    return figure


def norms_by_layer(inspection: Inspection, scales: Scales) -> Figure:
    """Median norms of normal patches, outliers, CLS and registers; of patches also from minimum to maximum."""
    figure, axes = _axes("Token norms over the layers", _name(inspection))
    norms = inspection.metrics["norms"]
    groups = {"rest": ("normal patches", BLUE, "-", "o"), "outlier": ("outlier patches", VERMILION, "-", "s")}
    for kind, (label, colour, line, marker) in groups.items():
        rows = [row for row in norms[kind] if row["count"]]
        if rows:
            layers = [row["layer"] for row in rows]
            axes.fill_between(
                layers, *([row[key] for row in rows] for key in ("min", "max")), color=colour, alpha=0.15
            )
            axes.plot(layers, [row["median"] for row in rows], line, marker=marker, ms=3, color=colour, label=label)
    for kind, (colour, line) in _styles(inspection).items():
        if kind != "patch":
            rows = norms[kind]
            axes.plot(
                [row["layer"] for row in rows], [row["median"] for row in rows], line, c=colour, label=_words(kind)
            )
    axes.set(yscale="log", ylim=(0.9 * scales.norms[0], 1.1 * scales.norms[1]))
    _logarithmic_norms(axes.yaxis, scales)
    axes.set(xlabel="layer (0 is the patch embedding)", ylabel="norm (band: all patches)")
    _whole_numbers(axes)
    _legend(axes)
    return figure


def outlier_share_by_layer(inspection: Inspection, scales: Scales) -> Figure:
    """Share of the patches beyond the threshold of the layer looked at, and beyond that of each layer."""
    figure, axes = _axes("Outliers over the layers", _name(inspection))
    rows, settings = inspection.metrics["layers"], inspection.metrics["settings"]
    layers = [row["layer"] for row in rows]
    fixed = f"beyond the threshold of layer {settings['layer']}"
    axes.plot(layers, [row["share_beyond_final_threshold"] for row in rows], "s-", ms=4, color=VERMILION, label=fixed)
    if isinstance(settings["threshold"], str):
        own = f"beyond {settings['threshold']} of each layer"
        axes.plot(layers, [row["outlier_share"] for row in rows], "o--", ms=3, color=BLUE, label=own)
    split_off = inspection.metrics["verdict"]["split_off_layer"]
    if split_off is not None:
        axes.axvline(split_off, color=BLACK, linestyle=":", label=f"outliers apart from layer {split_off} on")
    axes.set(xlabel="layer (0 is the patch embedding)", ylabel="share of the patches", ylim=(0, scales.share))
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    _whole_numbers(axes)
    _legend(axes)
    return figure


def neighbour_similarity(inspection: Inspection, scales: Scales) -> Figure:
    """Densities of the mean cosine similarity to the four neighbours."""
    figure, axes = _axes("Similarity of patches to their neighbours", _name(inspection))
    edges = inspection.arrays["similarity_edges"]
    for name, colour, style in (
        ("rest", BLUE, {"fill": True, "alpha": 0.35, "linewidth": 0}),
        ("outliers", VERMILION, {"linewidth": 1.5}),
    ):
        label = "normal patches" if name == "rest" else "outlier patches"
        density = inspection.arrays[f"similarity_{name}"]
        axes.stairs(density, edges, color=colour, label=label if density.any() else f"{label} (none)", **style)
    axes.set(xlim=(-1, 1), ylim=(0, scales.density))
    axes.set(xlabel="cosine to the four neighbours after patch embedding, mean", ylabel="density")
    _legend(axes)
    return figure


def training_curve_figure(name: str, curve: Sequence[Mapping]) -> Figure:
    """Share of the outliers over the steps of training."""
    figure, axes = _axes("Outliers over training", name)
    for label, rows, style in (
        ("beyond the threshold", curve, {"marker": "s", "ms": 4, "color": VERMILION}),
        ("artifacts", [row for row in curve if row["has_artifacts"]], {"marker": "o", "ms": 11, "linestyle": ""}),
    ):
        steps, shares = [row["step"] for row in rows], [row["share"] for row in rows]
        axes.plot(steps, shares, label=label, mfc="none" if label == "artifacts" else None, mec=BLACK, **style)
    axes.set(
        xlabel="step", ylabel="share of the patches", ylim=(0, 1.15 * max(0.01, *(row["share"] for row in curve)))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(_percent))
    _whole_numbers(axes)
    _legend(axes)
    return figure


def singular_defects_figure(metrics: Mapping) -> Figure:
    """How dominant the direction of each layer is, where it comes to rest, and with images what it predicts."""
    rows, has_images = metrics["layers"], metrics["images"] is not None
    layers = [row["layer"] for row in rows]
    figure = Figure(figsize=(WIDTH, 5.9 if has_images else 4.3), layout="constrained")
    panels = figure.subplots(2 + has_images, 1, sharex=True)
    for axes in panels:
        _plain_axes(axes)
        _whole_numbers(axes)
    title = "Singular defects, by the weights alone"
    figure.suptitle(f"{title}\n{_short(metrics['model']['name'])}", fontsize=9, x=0.01, ha="left")
    panels[0].plot(
        layers, _numbers(rows, "dominance"), "o-", ms=3, color=BLUE, label="largest singular value / second"
    )
    # from 1, which is none, to 2 at least, so that the axis has numbers
    panels[0].set(yscale="log", ylabel="dominance")
    panels[0].set_ylim(0.9, max(2.2, panels[0].get_ylim()[1]))
    _logarithmic_numbers(panels[0].yaxis, *panels[0].get_ylim())
    panels[1].plot(
        layers, _numbers(rows, "cos_last"), "s-", ms=3, color=GREEN, label="direction, with that of the last layer"
    )
    panels[1].plot(
        layers, _numbers(rows, "cos_previous"), "^:", ms=3, color=PURPLE, label="with that of the layer before"
    )
    panels[1].set(ylabel="|cos|", ylim=(-0.03, 1.05))
    if has_images:
        _draw_predictions(panels[2], layers, [row["prediction"] for row in rows])
    panels[-1].set(xlabel="layer")
    for axes in panels:
        # above the lines, which can be anywhere
        axes.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1)
    return figure


def _draw_predictions(axes: Axes, layers: Sequence[int], predictions: Sequence[Mapping]) -> None:
    """|cos| of patches with their layer's direction: medians, and bands from 5 % to 95 % of them."""
    for group, label, colour, marker in (
        ("outliers", "outlier patches", VERMILION, "s"),
        ("rest", "other patches", BLUE, "o"),
    ):
        values = [each[group] for each in predictions]
        if values[0]["count"]:
            bands = (_numbers(values, f"quantile_{share}") for share in ("05", "95"))
            axes.fill_between(layers, *bands, color=colour, alpha=0.15, linewidth=0)
            axes.plot(layers, _numbers(values, "median"), "-", marker=marker, ms=3, color=colour, label=label)
    if predictions[0]["auroc"] is not None:
        means = _numbers(predictions, "cos_outlier_direction")
        axes.plot(layers, means, "--", color=ORANGE, label="mean direction of the outliers")
        axes.plot(layers, _numbers(predictions, "auroc"), ":", color=BLACK, label="AUROC of |cos|")
    axes.set(ylabel="|cos| with the direction", ylim=(-0.03, 1.05))


def _numbers(rows: Sequence[Mapping], key: str) -> list[float]:
    """With NaN, which leaves a gap, for what there is none of."""
    return [float("nan") if row[key] is None else row[key] for row in rows]


# Maps


def outlier_frequency(inspection: Inspection, scales: Scales) -> Figure:
    """In how many of the images each cell of the patch grid is an outlier."""
    frequency = inspection.arrays["outlier_frequency"]
    figure, axes = _axes("Where outliers are", _name(inspection), height=3.3)
    image = axes.imshow(frequency, cmap=COLOUR_MAP, vmin=0, vmax=scales.frequency)
    axes.set(xlabel="column of the patch grid", ylabel="row of the patch grid")
    axes.grid(False)
    _whole_numbers(axes)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=axes, label="share of the images", format=FuncFormatter(_percent))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
    bar.ax.yaxis.label.set_size(8)
    return figure


def pictures(inspection: Inspection, scales: Scales) -> Figure:
    """Photograph, outliers marked on it, norms, and the first three principal components as red, green and blue."""
    layer = inspection.metrics["verdict"]["layer"]
    titles = ["photograph", "outliers", f"norms, layer {layer}", "components as RGB"]
    figure, grid = _image_grid("Patches", inspection, titles, len(inspection.pictures))
    norm = LogNorm(*scales.maps)
    for row, picture in zip(grid, inspection.pictures):
        for axes in row[:2]:
            axes.imshow(picture.photograph)
        _mark(row[1], picture)
        row[2].imshow(picture.norms[layer - 1], cmap=COLOUR_MAP, norm=norm)
        row[3].imshow(picture.components)
        row[0].set_ylabel(_short(Path(picture.name).name, 16), fontsize=6)
    _colour_bar(figure, grid, norm, "norm before the final norm")
    return figure


def norm_maps(inspection: Inspection, scales: Scales) -> Figure:
    """Norms of the patches at several layers, the last among them, in the same colours."""
    num_layers = len(inspection.pictures[0].norms)
    layers = np.unique(np.linspace(0, num_layers - 1, min(MAX_LAYER_MAPS, num_layers)).round().astype(int))
    titles = ["photograph", *(f"layer {layer + 1}" for layer in layers)]
    figure, grid = _image_grid("Patch norms over the layers", inspection, titles, len(inspection.pictures))
    norm = LogNorm(*scales.maps)
    for row, picture in zip(grid, inspection.pictures):
        row[0].imshow(picture.photograph)
        for axes, layer in zip(row[1:], layers):
            axes.imshow(picture.norms[layer], cmap=COLOUR_MAP, norm=norm)
    _colour_bar(figure, grid, norm, "norm before the final norm")
    return figure


def attention_by_token(inspection: Inspection, scales: Scales) -> Figure:
    """What CLS and every register attend to in all pictures, mean over the heads."""
    tokens = list(inspection.pictures[0].attention)
    layer = inspection.metrics["verdict"]["layer"]
    titles = ["photograph", *(_words(token) for token in tokens)]
    title = f"Attention in layer {layer}, mean over the heads"
    figure, grid = _image_grid(title, inspection, titles, len(inspection.pictures))
    for row, picture in zip(grid, inspection.pictures):
        row[0].imshow(picture.photograph)
        for axes, token in zip(row[1:], tokens):
            _show_attention(axes, picture.attention[token].mean(0), scales)
    _attention_bar(figure, grid, scales)
    return figure


def attention_heads(inspection: Inspection, scales: Scales, token: str, layer: int) -> Figure:
    """What one token attends to in the first picture in one layer, head by head."""
    picture = inspection.pictures[0]
    layers = picture.attention_of_all_layers
    maps = (layers[layer - 1] if layers else picture.attention)[token]
    title = f"Attention of {_words(token)} in layer {layer}, head by head"
    return _first_picture(title, inspection, scales, maps, [f"head {head + 1}" for head in range(len(maps))])


def attention_by_layer(inspection: Inspection, scales: Scales) -> Figure:
    """What the first of the tokens, CLS, attends to in the first picture at every layer, mean over the heads."""
    picture = inspection.pictures[0]
    maps, token = picture.attention_by_layer, _words(next(iter(picture.attention)))
    titles = [f"layer {layer + 1}" for layer in range(len(maps))]
    title = f"Attention of {token} over the layers, mean over the heads"
    return _first_picture(title, inspection, scales, maps, titles)


def _first_picture(
    title: str, inspection: Inspection, scales: Scales, maps: np.ndarray, map_titles: list[str]
) -> Figure:
    """The photograph, then maps, in as many rows as they need."""
    titles = ["photograph", *map_titles]
    num_cols = min(MAPS_A_ROW, len(titles))
    figure, grid = _image_grid(title, inspection, [None] * num_cols, -(-len(titles) // num_cols))
    cells = grid.ravel()
    cells[0].imshow(inspection.pictures[0].photograph)
    for axes, values in zip(cells[1:], maps):
        _show_attention(axes, values, scales)
    for axes, text in zip(cells, titles):
        axes.set_title(text, fontsize=7)
    for axes in cells[len(titles) :]:
        axes.set_axis_off()
    _attention_bar(figure, grid, scales)
    return figure


def _show_attention(axes: Axes, values: np.ndarray, scales: Scales) -> None:
    """In units of uniform attention, which are the same at every resolution."""
    axes.imshow(values * values.size, cmap=COLOUR_MAP, vmin=0, vmax=scales.attention)


def _attention_bar(figure: Figure, grid: np.ndarray, scales: Scales) -> None:
    _colour_bar(figure, grid, Normalize(0, scales.attention), "attention / uniform", extend="max")


def _mark(axes: Axes, picture: Picture) -> None:
    """A frame around every outlier."""
    rows, cols = picture.outliers.shape
    height, width = picture.photograph.shape[0] / rows, picture.photograph.shape[1] / cols
    for row, col in np.argwhere(picture.outliers):
        corner = (col * width - 0.5, row * height - 0.5)
        axes.add_patch(Rectangle(corner, width, height, fill=True, fc=(1, 1, 1, 0.35), ec=VERMILION, lw=1.2))


# What all figures have in common


def _axes(title: str, name: str, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(f"{title}\n{_short(name)}", fontsize=9, loc="left")
    _plain_axes(axes)
    return figure, axes


def _plain_axes(axes: Axes) -> None:
    axes.tick_params(which="both", labelsize=8)
    axes.xaxis.label.set_size(8)
    axes.yaxis.label.set_size(8)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _image_grid(
    title: str, inspection: Inspection, titles: Sequence[str | None], num_rows: int
) -> tuple[Figure, np.ndarray]:
    """Axes without ticks, `(num_rows, len(titles))`."""
    height, width = inspection.pictures[0].photograph.shape[:2]
    side = (WIDTH - 0.8) / len(titles)
    figure = Figure(figsize=(WIDTH, 0.65 + num_rows * (0.97 * side * height / width + 0.02)), layout="constrained")
    grid = figure.subplots(num_rows, len(titles), squeeze=False)
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, text in zip(grid[0], titles):
        axes.set_title(text, fontsize=7)
    figure.suptitle(f"{title}\n{_short(_name(inspection))}", fontsize=9, x=0.01, ha="left")
    return figure, grid


def _colour_bar(figure: Figure, grid: np.ndarray, norm: Normalize, label: str, extend: str = "neither") -> None:
    bar = figure.colorbar(
        ScalarMappable(norm, COLOUR_MAP), ax=grid, label=label, extend=extend, fraction=0.03, aspect=30, pad=0.01
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7)
    bar.ax.yaxis.label.set_size(7)
    if isinstance(norm, LogNorm):
        _logarithmic_numbers(bar.ax.yaxis, norm.vmin, norm.vmax)


def _logarithmic_norms(axis, scales: Scales) -> None:
    _logarithmic_numbers(axis, *scales.norms)


def _logarithmic_numbers(axis, low: float, high: float) -> None:
    """Plain numbers, also between powers of ten where there are few of these."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(_first_digit(low, high)))


def _first_digit(low: float, high: float):
    wanted = {2, 5} if high / low < 100 else set()

    def label(value: float, _) -> str:
        digit = round(value / 10.0 ** np.floor(np.log10(value) + 1e-9))
        return f"{value:g}" if digit in wanted else ""

    return label if wanted else NullFormatter()


def _whole_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axes: Axes) -> None:
    """Below the axes, which keep their width on a phone."""
    axes.figure.legend(fontsize=8, frameon=False, loc="outside lower left", ncols=2)


def _percent(value: float, _) -> str:
    return percent(value)


def _styles(inspection: Inspection) -> dict[str, tuple[str, str]]:
    """Colour and line of patches, CLS and every register."""
    styles = {"patch": (BLUE, "-"), "cls": (GREEN, "-")}
    registers = [kind for kind in inspection.distributions if kind.startswith("register")]
    styles |= {kind: REGISTER_STYLES[index % len(REGISTER_STYLES)] for index, kind in enumerate(registers)}
    return {kind: style for kind, style in styles.items() if kind in inspection.distributions}


def _after(inspection: Inspection, kind: str, layer: int) -> NormDistribution:
    rows = inspection.distributions[kind]
    return rows[layer if kind == "patch" else layer - 1]


def _words(kind: str) -> str:
    return {"patch": "patches", "cls": "CLS", "patch_mean": "all patches"}.get(kind, kind.replace("_", " "))


def _name(inspection: Inspection) -> str:
    return inspection.metrics["model"]["name"]


def _short(name: str, length: int = 50) -> str:
    """The end of a long name, as the folder is less than the file. A dollar would start a formula."""
    name = name if len(name) <= length else f"…{name[1 - length :]}"
    return name.replace("$", r"\$")
