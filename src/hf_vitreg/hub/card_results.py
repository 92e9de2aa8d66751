# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Results of an evaluation in the model-index of a card, where the Hub reads them."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import metadata_load, metadata_save

from ..atomic import atomic_file
from .card import load_card


# as the Hub calls them, https://huggingface.co/tasks
TASK_TYPES = {
    "zero_shot": "zero-shot-image-classification",
    "segmentation": "image-segmentation",
    "depth": "depth-estimation",
    "object_discovery": "object-detection",
}


def require_card(model: str | Path) -> Path:
    """The card of a model in a folder.

    Raises:
        ValueError: where there is none, or its metadata cannot be read or published.
    """
    path = Path(model) / "README.md"
    if not path.is_file():
        raise ValueError(
            f"There is no card {path} to put results into. Give a model in a folder with its README.md, and push it "
            "when the results are in."
        )
    load_card(path)
    return path


def add_results(model: str | Path, results: Mapping) -> None:
    """Puts the numbers of an evaluation into the card, in place of those of the same task and data.

    Everything else in the card stays as it is written. An evaluation is an entry of its own: `EvalResult` would put
    all of one kind of task on the same data together, under the name and the source of the first.

    Args:
        model: Folder with a README.md.
        results: As `evaluate_model` gives them.

    Raises:
        ValueError: As `require_card`, and where the card could not be published then.
    """
    path = require_card(model)
    metadata = metadata_load(path)
    index = metadata.get("model-index") or [{"name": Path(model).resolve().name, "results": []}]
    new = _entry(results)
    others = [_without(entry, new) for entry in index[0]["results"]]
    index[0]["results"] = [*(entry for entry in others if entry["metrics"]), new]
    with atomic_file(path) as file:
        shutil.copyfile(path, file)
        metadata_save(file, {**metadata, "model-index": index})
        load_card(file)


def _entry(results: Mapping) -> dict:
    """As the Hub reads it, https://github.com/huggingface/hub-docs/blob/main/modelcard.md."""
    task, data = results["task"], results["data"]
    words = task.replace("_", " ")
    metrics = [
        {"type": name, "value": round(value, 6), "name": f"{words}: {name.replace('_', ' ')}"}
        for name, value in results["metrics"].items()
    ]
    return {
        "task": {"type": TASK_TYPES.get(task, "image-classification"), "name": words},
        "dataset": {"name": data["name"], "type": data["name"], **({"split": data["split"]} if data["split"] else {})},
        "metrics": metrics,
    }


def _without(entry: Mapping, new: Mapping) -> Mapping:
    """An entry without the metrics of the new one's task, where it is of the same data."""
    if any(entry["dataset"].get(key) != new["dataset"].get(key) for key in ("name", "split")):
        return entry
    prefix = f"{new['task']['name']}: "
    kept = [metric for metric in entry["metrics"] if not str(metric.get("name", "")).startswith(prefix)]
    return {**entry, "metrics": kept}
