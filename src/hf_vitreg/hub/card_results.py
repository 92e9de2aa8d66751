# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Results of an evaluation in the model-index of a card, where the Hub reads them."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from ..atomic import atomic_file
from .card import check_card, load_card


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
        ValueError: where there is none, or its metadata cannot be read.
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
    """Puts the numbers of an evaluation into the card, in place of those of the same task, data and metric.

    Args:
        model: Folder with a README.md.
        results: As `evaluate_model` gives them.

    Raises:
        ValueError: As `require_card`, and where the card could not be published then.
    """
    path = require_card(model)
    card = ModelCard.load(path)
    new = [_result(results, name, value) for name, value in results["metrics"].items()]
    replaced = {_place(each) for each in new}
    kept = [each for each in card.data.eval_results or [] if _place(each) not in replaced]
    card.data.eval_results = kept + new
    card.data.model_name = card.data.model_name or Path(model).resolve().name
    check_card(card)
    with atomic_file(path) as file:
        card.save(file)


def _result(results: Mapping, metric: str, value: float) -> EvalResult:
    task, data = results["task"], results["data"]
    return EvalResult(
        task_type=TASK_TYPES.get(task, "image-classification"),
        task_name=task.replace("_", " "),
        dataset_type=data["name"],
        dataset_name=data["name"],
        dataset_split=data.get("split"),
        metric_type=metric,
        metric_name=f"{task} {metric}".replace("_", " "),
        metric_value=round(value, 6),
    )


def _place(result: EvalResult) -> tuple:
    return result.task_name, result.dataset_name, result.dataset_split, result.metric_type
