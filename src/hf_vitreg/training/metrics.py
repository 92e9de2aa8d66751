# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The record of a run: metrics as JSON lines, and their curves."""

import json
import os
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
    """Loss (training and validation) and validation accuracy over the steps, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for name, label in (("train_loss", "training, augmented"), ("validation_loss", "validation")):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            loss_axes.plot(*zip(*points), label=label)
    accuracies = [
        (record["step"], record["validation_accuracy"]) for record in records if "validation_accuracy" in record
    ]
    if accuracies:
        accuracy_axes.plot(*zip(*accuracies), color="tab:green", marker="o", markersize=3)
        best_step, best = max(accuracies, key=lambda point: point[1])
        accuracy_axes.axhline(best, color="grey", linewidth=0.8, linestyle=":")
        accuracy_axes.set_title(f"Validation accuracy, best {best:.4f} at step {best_step}")
    loss_axes.set(title="Cross-entropy", xlabel="optimizer step", ylabel="nats")
    accuracy_axes.set(xlabel="optimizer step", ylabel="share of images", ylim=(None, 1.0))
    loss_axes.legend()
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
