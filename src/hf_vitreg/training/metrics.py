# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The record of a run: metrics as JSON lines, and their curves."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


class MetricsLog:
    """Metrics of a run, one JSON object a line, each with the step it was measured at.

    Args:
        path: The file, continued where it exists.
    """

    def __init__(self, path: Path):
        self.path = path

    def write(self, step: int, **metrics: float) -> None:
        """Appends one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def read(self) -> list[dict]:
        """All lines; a last one that was cut short by a kill is left out."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def rewind(self, step: int) -> None:
        """Forgets what came after a step, before a run goes on from there."""
        kept = [json.dumps(record) + "\n" for record in self.read() if record["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, self.path)


def plot_curves(records: list[dict], path: Path, title: str) -> None:
    """Loss (training and validation), validation accuracy and outliers among the norms over the steps, as PNG."""
    losses = {"train_loss": "training, augmented", "validation_loss": "validation"}
    with _figure(path, title, num_panels=3) as (loss_axes, accuracy_axes, norm_axes):
        _panel(loss_axes, "Cross-entropy", "nats", {label: points(records, name) for name, label in losses.items()})
        _accuracy_panel(accuracy_axes, {"Validation accuracy": points(records, "validation_accuracy")})
        _norm_panel(norm_axes, records)


def plot_pretraining_curves(records: list[dict], path: Path, title: str) -> None:
    """Losses by part, accuracy, outliers among the norms of patches, and speed over the steps, as PNG.

    What was not measured has no curve.
    """
    losses = sorted({name for record in records for name in record if name.endswith("loss")})
    accuracies = {
        "kNN accuracy": points(records, "knn_accuracy"),
        "Validation accuracy": points(records, "validation_accuracy"),
        "Zero-shot accuracy": points(records, "zero_shot_accuracy"),
    }
    rate = points(records, "images_per_second")
    with _figure(path, title, num_panels=4) as (loss_axes, accuracy_axes, norm_axes, speed_axes):
        _panel(loss_axes, "Losses", "loss", {name.replace("_", " "): points(records, name) for name in losses})
        _accuracy_panel(accuracy_axes, accuracies)
        _norm_panel(norm_axes, records)
        _panel(speed_axes, "Speed", "images a second", {"images a second": rate})
        _second_scale(speed_axes, "share of the device's operations", points(records, "mfu"))
        speed_axes.set_ylim(0, None)


Points = list[tuple[int, float]]


def points(records: list[dict], name: str) -> Points:
    """Step and value of a metric, where it was measured."""
    return [(record["step"], record[name]) for record in records if name in record]


@contextlib.contextmanager
def _figure(path: Path, title: str, num_panels: int) -> Iterator[Sequence]:
    """Panels, up to three in a row or two in several; written when the block ends."""
    from matplotlib.figure import Figure

    num_cols = num_panels if num_panels <= 3 else 2
    num_rows = math.ceil(num_panels / num_cols)
    figure = Figure(figsize=(4.5 * num_cols, 0.2 + 3.4 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_cols).flatten()
    yield panels
    for axes in panels:
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _panel(axes, title: str, unit: str, curves: Mapping[str, Points], **style) -> None:
    for label, curve in curves.items():
        if curve:
            axes.plot(*zip(*curve), label=label, markersize=3, **style)
    axes.set(title=title, ylabel=unit)
    if any(curves.values()):
        axes.legend(fontsize="small")


def _accuracy_panel(axes, curves: Mapping[str, Points]) -> None:
    """With the best of the first curve that there is."""
    curves = {label: curve for label, curve in curves.items() if curve}
    _panel(axes, "Accuracy", "share of images", curves, marker="o")
    axes.set_ylim(None, 1.0)
    for label, curve in list(curves.items())[:1]:
        best_step, best = max(curve, key=lambda point: point[1])
        axes.axhline(best, color="grey", linewidth=0.8, linestyle=":")
        axes.set_title(f"{label}, best {best:.4f} at step {best_step}")


def _norm_panel(axes, records: list[dict]) -> None:
    """Outliers among the norms of patches."""
    outliers = points(records, "outlier_share")
    _panel(axes, "Norms of patches", "share that are outliers", {"outliers": outliers}, marker="o")
    _second_scale(axes, "largest over median", points(records, "max_norm_ratio"))
    axes.set_ylim(0, None)


def _second_scale(axes, label: str, curve: Points) -> None:
    """A curve with a scale of its own on the right."""
    if not curve:
        return
    right = axes.twinx()
    right.plot(*zip(*curve), color="tab:red", linestyle="--", label=label)
    right.set_ylabel(label, color="tab:red")
    right.set_ylim(0, None)
