# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The evaluations that fill a table of the paper: each fills a cell, or those of all kinds of tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.labelled_images import load_image_data
from .evaluate import RESULTS_VERSION, Evaluated, evaluate_model
from .options import EVERY_TASK, READ_BY, EvaluationOptions, require_options_of
from .published import Cell, Measurement, PublishedTable
from .reproduced import CellResult
from .token_tasks import TOKEN_TASKS, TokenOptions, evaluate_tokens


TOKEN_OPTIONS = {"threshold", "size", "max_images", "num_workers"}
HOW = ("cache_dir", "num_workers", "batch_size")  # options that change no number but by rounding
COCO_ANNOTATIONS, COCO_IMAGES = "annotations/instances_train2014.json", "train2014"
COCO_LIST = "coco_20k_filenames.txt"


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """What can be set of a table. Each evaluation gets what its task reads of it, and results say what is changed.

    Attributes:
        size: Height and width in pixels that models see, in place of the table's.
        max_images: Of labelled images, take a random sample of each split.
        threshold: Norm of an outlier, in place of the table's or where it has none.
        class_names: File of class names for zero_shot, one a line in the order of the labels.
        batch_size: Images that go through a model together.
        num_workers: Threads that decode images.
        cache_dir: Where features are kept.
        seed: Of everything that is drawn.
    """

    size: tuple[int, int] | None = None
    max_images: int | None = None
    threshold: float | None = None
    class_names: str | Path | None = None
    batch_size: int = 32
    num_workers: int | None = None
    cache_dir: str | Path | None = None
    seed: int = 0


def table_jobs(
    table: PublishedTable, models: Mapping[str, str], data: Mapping[str, str], options: ReproduceOptions
) -> list["TableJob"]:
    """All evaluations of a table, in its order.

    Args:
        table: The table.
        models, data: Places by the names of the table.
        options: Of the table.

    Raises:
        ValueError: for an option that no task of the table would read, or a value that its task does not take.
    """
    _require_read(table, options)
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in table.cells:
        if (measured := cell.measurement) is not None:
            groups.setdefault((measured.model, measured.data, measured.task), []).append(cell)
    jobs = [TableJob.of(*group, models, data, options) for group in groups.items()]
    for job in jobs:
        if not job.missing:
            job.require_options()
    return jobs


def _require_read(table: PublishedTable, options: ReproduceOptions) -> None:
    """Raises `ValueError` for an option that no task of the table would read."""
    tasks = {cell.measurement.task for cell in table.cells if cell.measurement is not None}
    read = EVERY_TASK.union(*map(_options_of, tasks))
    for name, value in vars(options).items():
        if value is not None and name not in read:
            raise ValueError(f"No task of {table.name} reads --{name.replace('_', '-')}: {', '.join(sorted(tasks))}.")


def _options_of(task: str) -> set[str]:
    return TOKEN_OPTIONS if task in TOKEN_TASKS else READ_BY[task]


@dataclass(frozen=True, kw_only=True)
class TableJob:
    """An evaluation, and the cells that it fills.

    Attributes:
        name: Of its folder.
        model, data: Where they are; of a name that nobody gave, empty.
        task: Its task.
        settings: The options of the task that are set.
        changed: Those that are not the table's, in words.
        missing: What must be given to run it.
        cells: To fill.
    """

    name: str
    model: str
    data: str
    task: str
    settings: Mapping[str, object]
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    cells: tuple[Cell, ...]

    @classmethod
    def of(
        cls,
        key: tuple[str, str, str],
        cells: Sequence[Cell],
        models: Mapping[str, str],
        data: Mapping[str, str],
        options: ReproduceOptions,
    ) -> "TableJob":
        model, data_name, task = key
        settings, changed = _settings(cells[0].measurement, options)
        missing = [f"--model {model}=…"] if model not in models else []
        missing += [f"--data {data_name}=…"] if data_name not in data else []
        missing += ["--threshold"] if task in TOKEN_TASKS and "threshold" not in settings else []
        place = data.get(data_name, "")
        if data_name == "coco20k" and place:
            settings |= {"annotations": f"{place}/{COCO_ANNOTATIONS}", "image_list": f"{place}/{COCO_LIST}"}
            place = f"{place}/{COCO_IMAGES}"
        return cls(
            name=f"{task}_{data_name}_{model}",
            model=models.get(model, ""),
            data=place,
            task=task,
            settings=settings,
            changed=changed,
            missing=tuple(missing),
            cells=tuple(cells),
        )

    @property
    def options(self) -> EvaluationOptions | TokenOptions:
        """Of its task."""
        return (TokenOptions if self.task in TOKEN_TASKS else EvaluationOptions)(**self.settings)

    def require_options(self) -> None:
        """Raises `ValueError` for a value that its task does not take."""
        options = self.options
        if isinstance(options, EvaluationOptions):
            require_options_of(self.task, options)

    @property
    def key(self) -> dict[str, object]:
        """What its number depends on beside the model, as `results.json` of its evaluation has it."""
        settings = {name: value for name, value in self.settings.items() if name not in HOW and value is not None}
        return {
            "results_version": RESULTS_VERSION,
            "task": self.task,
            "path": self.data,
            "options": json.loads(json.dumps(settings, default=str)),
        }

    def results(self, **result) -> dict[Cell, CellResult]:
        """The same for all its cells."""
        return {cell: CellResult(cell=cell, **result) for cell in self.cells}

    def run(self, folder: Path, device: str | None, overwrite: bool, progress: bool) -> Evaluated | None:
        """Evaluates; `None` where another process has the results."""
        if self.task == "zero_shot" and "class_names" not in self.settings:
            _require_words(self.data)
        evaluate = evaluate_tokens if self.task in TOKEN_TASKS else evaluate_model
        more = {"device": device, "overwrite": overwrite, "progress": progress}
        return evaluate(self.model, self.task, self.data, folder, self.options, **more)


def _settings(measurement: Measurement, options: ReproduceOptions) -> tuple[dict[str, object], tuple[str, ...]]:
    """The options of a task, and in words what is changed of them."""
    read = _options_of(measurement.task) | EVERY_TASK
    given = {name: value for name, value in vars(options).items() if name in read and value is not None}
    settings = {**measurement.options, **given}
    words = {
        "size": lambda size: f"{size[0]}x{size[1]} pixels",
        "max_images": lambda number: f"at most {number} images of each split",
        "threshold": lambda threshold: f"threshold {threshold:g}",
    }
    changed = [
        write(given[name])
        for name, write in words.items()
        if name in given and given[name] != measurement.options.get(name)
    ]
    return settings, tuple(changed)


def _require_words(data: str) -> None:
    """Raises `ValueError` for classes that are called by numbers of WordNet, which no text tower knows."""
    names = load_image_data(data, "validation").class_names
    if all(re.fullmatch(r"n\d{8}", name) for name in names):
        raise ValueError(f"The classes of {data} are called {names[0]} and the like: give --class-names, a file.")


def results_key(results: Mapping) -> dict[str, object]:
    """`TableJob.key` of the job that made these results."""
    options = {name: value for name, value in results.get("options", {}).items() if name not in HOW}
    return {
        "results_version": results.get("results_version"),
        "task": results.get("task"),
        "path": results.get("data", {}).get("path"),
        "options": options,
    }
