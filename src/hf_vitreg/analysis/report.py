# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The report of an inspection: a page that can be read anywhere, its figures, and all numbers as JSON."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jinja2
import torch

from ..atomic import atomic_folder
from ..features import VisionEncoder, load_vit, quiet_loading
from ..machine import memory_errors, usable_device
from .image_files import find_images
from .inspection import Inspection, inspect
from .norms import Side
from .outliers import ThresholdMethod
from .sections import comparison, next_steps, sections, verdict_sentences
from .training_curve import checkpoint_folders, load_checkpoint, training_curve


PAGE, METRICS = "report.html", "metrics.json"
TEMPLATE = Path(__file__).with_name("report_template.html")


@dataclass(frozen=True)
class Report:
    """A written report.

    Attributes:
        folder: Where it is.
        verdicts: Of each model in sentences, the answer first.
        num_unreadable: Images left out.
    """

    folder: Path
    verdicts: tuple[tuple[str, ...], ...]
    num_unreadable: int

    @property
    def page(self) -> Path:
        return self.folder / PAGE


def inspect_model(
    model: str | Path,
    images: Sequence[str | Path],
    output: str | Path,
    *,
    compare: str | Path | None = None,
    checkpoints: str | Path | None = None,
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
    all_layers: bool = False,
) -> Report:
    """Loads a model and images, measures, and writes the report: what `hf-vitreg inspect` does.

    Args:
        model: As for `load_vit`; or a folder of checkpoints, of which the last is inspected.
        images: As for `find_images`.
        output: Folder for the report.
        compare: Another model, set beside the first on the same images.
        checkpoints: Folder of checkpoints of `model`, for the share of outliers over training.
        threshold, side, layer, size, batch_size, seed, progress, all_layers: As for `inspect`.
        max_images: As for `find_images`.
        device: Where to; by default a GPU where there is one.
        overwrite: Replace a report that is there.

    Raises:
        ValueError: for whatever cannot be used, before anything is measured where that can be known.
        OSError: where the report cannot be written; none is left then.
    """
    check_output(output, overwrite)
    device = usable_device(device)
    found = find_images(images, max_images, seed)
    model, checkpoints = last_checkpoint(model, checkpoints)
    with quiet_loading(), memory_errors():
        encoder = load_vit(model, device=device)
        other = load_vit(compare, device=device) if compare else None
        steps = _steps(checkpoints, encoder, device) if checkpoints else {}
        options = {"threshold": threshold, "side": side, "layer": layer, "size": size, "batch_size": batch_size}
        measure = partial(inspect, images=found, seed=seed, progress=progress, all_layers=all_layers, **options)
        inspections = [measure(each) for each in (encoder, other) if each is not None]
        curve = training_curve(steps, found, progress=progress, **options) if steps else None
    return write_report(output, *inspections, curve=curve, overwrite=overwrite)


def write_report(
    folder: str | Path,
    inspection: Inspection,
    compare: Inspection | None = None,
    curve: Sequence[Mapping] | None = None,
    overwrite: bool = False,
) -> Report:
    """Writes `report.html`, `metrics.json` and a PNG a figure: all of them, or nothing.

    Args:
        folder: It is made; it may exist where it is empty, or holds a report and `overwrite` is set.
        inspection: Of the model.
        compare: Of another on the same images; the files of its figures begin with `compare_`.
        curve: From `training_curve`.
        overwrite: Replace a report that is there, with everything in its folder.

    Raises:
        ValueError: where the folder holds anything else.
        OSError: where it cannot be written.
    """
    folder = Path(folder)
    check_output(folder, overwrite)
    inspections = [inspection] if compare is None else [inspection, compare]
    with atomic_folder(folder) as partial_folder:
        images = _write_figures(partial_folder, inspections, curve)
        metrics = inspection.metrics | {"training_curve": curve, "compare": compare and compare.metrics}
        (partial_folder / METRICS).write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (partial_folder / PAGE).write_text(_page(inspections, curve, images), encoding="utf-8")
    verdicts = tuple(tuple(verdict_sentences(each.metrics)) for each in inspections)
    return Report(folder, verdicts, inspection.metrics["images"]["num_unreadable"])


def check_output(folder: str | Path, overwrite: bool = False) -> None:
    """Raises `ValueError` where a report may not be written: nothing but a report is ever replaced."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Give a folder for the report.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not ((folder / PAGE).is_file() and (folder / METRICS).is_file()):
        raise ValueError(f"{folder} holds other things than a report. Give a new folder.")
    if not overwrite:
        raise ValueError(f"There is a report in {folder} already. Give a new folder, or --overwrite.")


def _write_figures(folder: Path, inspections: Sequence[Inspection], curve: Sequence[Mapping] | None) -> list[dict]:
    """PNGs, and the same as URIs for each model by name; the training curve is the first model's."""
    from . import figures  # matplotlib takes a second to import

    scales, images = figures.shared_scales(inspections), []
    for prefix, inspection in zip(("", "compare_"), inspections):
        drawn = figures.draw_figures(inspection, scales)
        if curve and not prefix:
            drawn["training_curve"] = figures.training_curve_figure(inspection.metrics["model"]["name"], curve)
        images.append({})
        for name, figure in drawn.items():
            path = folder / f"{prefix}{name}.png"
            figures.save_figure(figure, path)
            images[-1][name] = image_uri(path)
    return images


def _page(inspections: Sequence[Inspection], curve: Sequence[Mapping] | None, images: Sequence[dict]) -> str:
    metrics = [each.metrics for each in inspections]
    return render_page(
        sides=[
            {
                "name": each["model"]["name"],
                "has_artifacts": each["verdict"]["has_artifacts"],
                "images": pictures,
                "verdict": verdict_sentences(each),
                "next_steps": next_steps(each),
            }
            for each, pictures in zip(metrics, images)
        ],
        about_images=_about_images(metrics[0]),
        notes=[note for each in metrics for note in each["notes"]],
        comparison=comparison(metrics),
        curve_image=images[0].get("training_curve") if curve else None,
        sections=sections(metrics, list(dict.fromkeys(name for each in images for name in each))),
        unreadable=unreadable_images(metrics[0]),
        provenance=provenance(metrics),
    )


def render_page(*, sides: Sequence[Mapping], **parts: object) -> str:
    """The template, filled in. Whatever comes from a model, an image or its name is escaped.

    Args:
        sides: For each model `name`, `has_artifacts`, `images` (URIs by the name of the figure), `verdict` and
            `next_steps` (sentences).
        parts: `about_images`, `notes`, `comparison`, `curve_image`, `sections`, `unreadable`, `provenance`.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(names=[side["name"] for side in sides], sides=sides, **parts)


def image_uri(path: Path) -> str:
    """A PNG inside a page."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _about_images(metrics: Mapping) -> str:
    images, settings = metrics["images"], metrics["settings"]
    text = (
        f"{images['num_images']} images at {images['height']}x{images['width']} pixels, {images['rows']}x"
        f"{images['cols']} patches; norms are taken before the final norm; seed {settings['seed']}."
    )
    if images["num_unreadable"]:
        text += f" {images['num_unreadable']} images could not be used and are named below."
    if metrics["probes"]["image_class_left_out"]:
        text += f" The class probe is left out: {metrics['probes']['image_class_left_out']}."
    return text


def unreadable_images(metrics: Mapping) -> list[list[str]]:
    """Names and reasons, below a head; nothing where all could be read."""
    rows = [[each["name"], each["reason"]] for each in metrics["images"]["unreadable"]]
    return [["image", "why"], *rows] if rows else []


def provenance(metrics: Sequence[Mapping]) -> list[list[str]]:
    """What the results of one or more models were computed of and with."""
    first = metrics[0]
    rows = [["", "value"]]
    if first["images"]:
        rows.append(["images, SHA-256", first["images"]["sha256"]])
    for each in metrics:
        model = each["model"]
        words = f"{model['source']}, {model['num_parameters']:,} parameters, {model['dtype']}"
        rows += [[f"model {model['name']}", words], ["its weights, SHA-256", model["sha256"]]]
    rows.append(["versions", ", ".join(f"{name} {number}" for name, number in first["versions"].items())])
    if first["settings"]:
        rows.append(["settings", ", ".join(f"{name} {value}" for name, value in first["settings"].items())])
    return rows


# Loading


def last_checkpoint(model: str | Path, checkpoints: str | Path | None) -> tuple[str | Path, str | Path | None]:
    """A folder of checkpoints stands for its last one, and for all of them."""
    if not Path(model).is_dir() or (Path(model) / "config.json").is_file() or checkpoints is not None:
        return model, checkpoints
    folders = checkpoint_folders(model)
    if not folders:
        return model, None
    if not (folders[-1][1] / "config.json").is_file():
        raise ValueError(
            f"The checkpoints in {model} have weights and no config.json. Give the model of the run, and "
            f"--checkpoints {model}."
        )
    return folders[-1][1], model


def _steps(checkpoints: str | Path, encoder: VisionEncoder, device: torch.device) -> dict:
    folders = checkpoint_folders(checkpoints)
    if not folders:
        raise ValueError(
            f"There are no checkpoints in {checkpoints}. Expected folders with a step at the end of their names, as "
            "checkpoint-500, with config.json or model.safetensors in them."
        )
    return {step: partial(load_checkpoint, path, encoder, device) for step, path in folders}
