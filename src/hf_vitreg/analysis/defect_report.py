# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The report of what weights alone say of artifacts: a table, a figure, a page, all numbers, and the directions."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import rich.box
import torch
from rich.console import Console
from rich.table import Table as RichTable
from safetensors.torch import save

from ..atomic import atomic_folder
from ..features import load_vit, quiet_loading
from ..machine import memory_errors, package_versions, usable_device
from .defect_prediction import LayerPrediction, predict_outliers
from .image_files import find_images
from .measurements import METRICS_VERSION, image_numbers, model_numbers, plain, settings
from .norms import Side
from .outliers import ThresholdMethod, outlier_threshold
from .report import METRICS, PAGE, check_output, image_uri, last_checkpoint, provenance, render_page, unreadable_images
from .run import Run
from .sections import NOTHING, Section, Table, number, percent
from .singular_defects import SingularDefects, singular_defects, vitreg_layers


DIRECTIONS, FIGURE = "directions.safetensors", "singular_defects"
SETTLED = 0.9  # |cos| with the last layer's direction from which on it is the same in the report's words


@dataclass(frozen=True, eq=False)
class DefectReport:
    """What was found.

    Attributes:
        folder: Where the report is; `None` where none was asked for.
        metrics: What its `metrics.json` says.
    """

    folder: Path | None
    metrics: Mapping

    @property
    def page(self) -> Path | None:
        return self.folder and self.folder / PAGE

    @property
    def verdict(self) -> list[str]:
        """In sentences, the most important first."""
        return defect_sentences(self.metrics)

    def show(self) -> None:
        """Prints the table."""
        head, *rows = defect_table(self.metrics)
        # narrow enough for 80 columns, as rich cuts words off where they do not fit
        table = RichTable(box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
        for name in head:
            table.add_column(name.replace("cos to ", "cos to\n"), justify="right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def inspect_weights(
    model: str | Path,
    output: str | Path | None = None,
    images: Sequence[str | Path] | None = None,
    *,
    threshold: float | ThresholdMethod = "mad",
    side: Side = "high",
    layer: int | None = None,
    size: tuple[int, int] | None = None,
    max_images: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> DefectReport:
    """Singular defects of a model, and what images say of them: what `hf-vitreg inspect --weights-only` does.

    Into `output` it writes `report.html`, `metrics.json`, a PNG, and `directions.safetensors` with `directions`, unit
    vectors of shape `(num_layers, hidden_size)` in float32; or nothing.

    Args:
        model: As for `load_vit`, a ViTReg; or a folder of checkpoints, of which the last is inspected.
        output: Folder for the report; by default nothing is written.
        images: As for `find_images`; by default none is looked at, and the options up to `seed` have no meaning.
        threshold, side, layer, size, batch_size: Which patches of the images are outliers, as for `inspect`.
        max_images: As for `find_images`.
        seed: Of the sample of images.
        device: Where images go through the model; by default a GPU where there is one.
        overwrite: Replace a report that is there.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: for whatever cannot be used.
        OSError: where the report cannot be written; none is left then.
    """
    if output is not None:
        check_output(output, overwrite)
    device = usable_device(device)
    found = find_images(images, max_images, seed) if images else None
    with quiet_loading(), memory_errors():
        encoder = load_vit(last_checkpoint(model, None)[0], device=device)
        vitreg_layers(encoder)
        run = Run(encoder, found, threshold, side, layer, size, batch_size, seed, progress) if found else None
        defects = singular_defects(encoder)
        about_images = _with_images(run, defects) if run else {"images": None, "settings": None, "outliers": None}
    predictions = about_images.pop("predictions", None)
    metrics = {
        "metrics_version": METRICS_VERSION,
        "versions": package_versions(),
        "model": model_numbers(encoder),
        **about_images,
        "layers": _layers(defects, predictions),
    }
    metrics = plain(metrics)
    return DefectReport(None, metrics) if output is None else write_defect_report(output, metrics, defects, overwrite)


def _with_images(run: Run, defects: SingularDefects) -> dict:
    norms = run.survey().norms.distributions()[run.layer]
    threshold = outlier_threshold(norms, run.threshold, run.side)
    predictions = predict_outliers(run, defects, threshold)
    counts = predictions[0].outliers.count, predictions[0].rest.count
    return {
        "images": image_numbers(run),
        "settings": settings(run),
        "outliers": {
            "layer": run.layer,
            "side": run.side,
            "threshold": threshold,
            "num_outliers": counts[0],
            "share": counts[0] / sum(counts),
        },
        "predictions": predictions,
    }


def _layers(defects: SingularDefects, predictions: Sequence[LayerPrediction] | None) -> list[dict]:
    to_last = defects.cosines(-1).tolist()
    successive = (defects.directions[1:] * defects.directions[:-1]).sum(1).abs().clamp(max=1).tolist()
    columns = zip(defects.log10_singular_values.tolist(), defects.dominance.tolist(), [None, *successive], to_last)
    return [
        {
            "layer": layer,
            "log10_singular_values": values,
            "dominance": dominance,
            "cos_previous": previous,
            "cos_last": last,
            "prediction": predictions and dataclasses.asdict(predictions[layer - 1]),
        }
        for layer, (values, dominance, previous, last) in enumerate(columns, start=1)
    ]


def write_defect_report(
    folder: str | Path, metrics: Mapping, defects: SingularDefects, overwrite: bool = False
) -> DefectReport:
    """Writes all files of the report, or nothing.

    Args:
        folder: As for `write_report`, whose reports it replaces and is replaced by.
        metrics: As `inspect_weights` makes them.
        defects: Of the model.
        overwrite: Replace a report that is there, with everything in its folder.

    Raises:
        ValueError: where the folder holds anything else.
        OSError: where it cannot be written.
    """
    from . import figures  # matplotlib takes a second to import

    folder = Path(folder)
    check_output(folder, overwrite)
    with atomic_folder(folder) as partial_folder:
        picture = partial_folder / f"{FIGURE}.png"
        figures.save_figure(figures.singular_defects_figure(metrics), picture)
        (partial_folder / DIRECTIONS).write_bytes(save({"directions": defects.directions.to(torch.float32)}))
        (partial_folder / METRICS).write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (partial_folder / PAGE).write_text(_page(metrics, image_uri(picture)), encoding="utf-8")
    return DefectReport(folder, metrics)


# Words


def defect_sentences(metrics: Mapping) -> list[str]:
    """What the numbers of the last layer say, and with images those of the layer that outliers were looked for at."""
    layers = metrics["layers"]
    settled = len(layers)
    while settled > 1 and layers[settled - 2]["cos_last"] >= SETTLED:
        settled -= 1
    sentences = [
        f"After layer {len(layers)} the weights stretch one direction {number(layers[-1]['dominance'])} times as much "
        "as any other.",
        f"It is the same, within a |cos| of {SETTLED:g}, from layer {settled} on.",
    ]
    outliers = metrics["outliers"]
    if outliers is None:
        return sentences
    norm = f"a norm {'above' if outliers['side'] == 'high' else 'below'} {number(outliers['threshold'], 4)}"
    where = f"{norm} after layer {outliers['layer']}"
    if not outliers["num_outliers"]:
        return [*sentences, f"No patch has {where}: there is nothing that could point there."]
    prediction = layers[outliers["layer"] - 1]["prediction"]
    return [
        *sentences,
        f"{percent(outliers['share'])} of the patches ({outliers['num_outliers']:,}) have {where}. Their mean "
        f"direction has a |cos| of {number(prediction['cos_outlier_direction'])} with the predicted one, that of all "
        f"others {number(prediction['cos_rest_direction'])}.",
        f"By |cos| alone outliers are told from others with an AUROC of {number(prediction['auroc'])}.",
    ]


def defect_table(metrics: Mapping) -> list[list[str]]:
    """A row a layer, the first is the head."""
    head = ["layer", "dominance", "cos to previous", "cos to last"]
    if metrics["images"]:
        head += ["cos to outliers", "cos to others", "AUROC", "recall", "precision"]
    rows = [head]
    for layer in metrics["layers"]:
        cells = [number(layer[key]) for key in ("dominance", "cos_previous", "cos_last")]
        if prediction := layer["prediction"]:
            keys = ("cos_outlier_direction", "cos_rest_direction", "auroc", "recall", "precision")
            cells += [number(prediction[key]) for key in keys]
        rows.append([str(layer["layer"]), *cells])
    return rows


def _page(metrics: Mapping, picture: str) -> str:
    sentences = defect_sentences(metrics)
    side = {
        "name": metrics["model"]["name"],
        "has_artifacts": bool(metrics["outliers"] and metrics["outliers"]["num_outliers"]),
        "images": {FIGURE: picture},
        "verdict": sentences,
        "next_steps": _next_steps(metrics),
    }
    return render_page(
        sides=[side],
        about_images=_about_images(metrics),
        notes=[],
        comparison=[],
        curve_image=None,
        sections=[_section(metrics)],
        unreadable=unreadable_images(metrics) if metrics["images"] else [],
        provenance=provenance([metrics]),
    )


def _next_steps(metrics: Mapping) -> list[str]:
    steps = ["Whether there are artifacts, where, and what they carry: inspect the model without --weights-only."]
    if not metrics["images"]:
        steps.append("Whether patches point where the weights say: give --images too.")
    return steps


def _about_images(metrics: Mapping) -> str:
    images = metrics["images"]
    if images is None:
        return "Computed from the weights alone; no image was looked at."
    return (
        f"Directions are computed from the weights alone. {images['num_images']} images at {images['height']}x"
        f"{images['width']} pixels, {images['rows']}x{images['cols']} patches, show how well they predict outliers."
    )


def _section(metrics: Mapping) -> Section:
    caption = "How much one direction is stretched beyond the second; |cos| of the directions with each other"
    if metrics["images"]:
        caption += "; |cos| of single patches with their layer's direction, medians and 5 % to 95 % of them"
    after = (
        "The layers up to each one, replaced by linear maps, are multiplied: dominance is the largest singular value "
        "of the product over the second, the direction the left singular vector of the largest. “SINDER: Repairing "
        f"the Singular Defects of DINOv2” (Wang et al., 2024, arXiv:2407.16826). {DIRECTIONS} has the directions."
    )
    if metrics["images"]:
        after += (
            " Outliers are those of the layer looked at, at every layer; cos to outliers and to others is that of the "
            "direction with the mean of their unit vectors. Recall and precision are those of the published rule, "
            "|cos| more than 4 standard deviations above the mean over an image. "
            f"{NOTHING} stands where there is no outlier, or none is found."
        )
    return Section(
        "Singular defects",
        "In the paper outliers point where the product of all layers, taken as linear maps, stretches tokens most.",
        [(FIGURE, f"{caption}.")],
        [Table("Layers", defect_table(metrics))],
        after,
    )
