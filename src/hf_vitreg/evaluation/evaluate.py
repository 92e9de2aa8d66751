# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""One task on one model, from its name to a folder of results: what `hf-vitreg evaluate` does."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from ..atomic import atomic_folder
from ..features import quiet_loading
from ..machine import describe_machine, memory_errors, package_versions, usable_device
from .classification_tasks import knn, linear, logistic, out_of_distribution_probe, zero_shot
from .dense_tasks import depth, object_discovery, segmentation
from .options import EvaluationOptions, require_options_of
from .session import Outcome, Session


RESULTS_VERSION = 1  # raised when a key of the results changes its name or its meaning
RESULTS = "results.json"
TASKS: dict[str, Callable[[Session], Outcome]] = {
    "knn": knn,
    "linear": linear,
    "logistic": logistic,
    "zero_shot": zero_shot,
    "segmentation": segmentation,
    "depth": depth,
    "object_discovery": object_discovery,
    "out_of_distribution": out_of_distribution_probe,
}


@dataclass(frozen=True)
class Evaluated:
    """Results of a task, which are in a folder.

    Attributes:
        folder: Where they are.
        results: What `results.json` says.
    """

    folder: Path
    results: Mapping[str, object]

    @property
    def metrics(self) -> Mapping[str, float]:
        """The numbers of the task, the most important first."""
        return self.results["metrics"]


def evaluate_model(
    model: str | Path,
    task: str,
    data: str | Path,
    output: str | Path,
    options: EvaluationOptions | None = None,
    *,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Evaluated | None:
    """Evaluates a model on a task.

    Started by `accelerate launch` or `torchrun` on several processes, they share the work, and one of them writes.

    Args:
        model: As for `load_vit`; for zero_shot a model of images and texts.
        task: One of `TASKS`.
        data: Images as the task reads them: with labels as for `load_image_data`, with masks or depth as for
            `load_dense`, with boxes as for `load_boxes`.
        output: Folder for `results.json`, pictures and the trained heads.
        options: Of the task.
        device: Where to compute; by default a GPU where there is one.
        overwrite: Replace results that are there, with everything in their folder.
        progress: Show bars on stderr.

    Returns:
        The results, on the process that wrote them; `None` on others.

    Raises:
        ValueError: for whatever cannot be used, which is named. Nothing is left in the output then.
        OSError: where results cannot be written.
    """
    options = options or EvaluationOptions()
    require_options_of(task, options)
    check_output(output, overwrite, options.cache_dir)
    accelerator, chosen = _processes(device)
    with _folder(Path(output), accelerator) as folder, quiet_loading(), memory_errors():
        session = Session(model, data, folder, options, accelerator, chosen, progress)
        started = time.perf_counter()
        outcome = TASKS[task](session)
        results = _results(task, session, outcome, time.perf_counter() - started)
        if folder is not None:
            text = json.dumps(results, indent=1, allow_nan=False)
            (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
    return None if folder is None else Evaluated(Path(output), results)


def check_output(folder: str | Path, overwrite: bool = False, cache_dir: str | Path | None = None) -> None:
    """Raises `ValueError` where results may not be written: no folder but one of results is ever replaced."""
    folder = Path(folder)
    if cache_dir is not None and Path(cache_dir).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"The cache {cache_dir} is in the folder of the results, {folder}, which replace it.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file. Give a folder for the results.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RESULTS).is_file():
        raise ValueError(f"{folder} holds other things than results. Give a new folder.")
    if not overwrite:
        raise ValueError(f"There are results in {folder} already. Give a new folder, or --overwrite.")


def _processes(device: str | None) -> tuple[Accelerator | None, torch.device]:
    """An accelerator where there are several processes, and where this one computes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        accelerator = Accelerator(cpu=device == "cpu")
        return accelerator, accelerator.device
    return None, usable_device(device)


@contextmanager
def _folder(output: Path, accelerator: Accelerator | None) -> Iterator[Path | None]:
    """Where the main process writes, `None` for the others."""
    if accelerator is not None and not accelerator.is_main_process:
        yield None
        return
    with atomic_folder(output) as folder:
        yield folder


def _results(task: str, session: Session, outcome: Outcome, seconds: float) -> dict:
    options = {name: value for name, value in session.options.changed().items() if name != "cache_dir"}
    return _plain(
        {
            "results_version": RESULTS_VERSION,
            "task": task,
            "metrics": dict(outcome.metrics),
            "model": session.about_model(),
            "data": {**outcome.data, "path": session.data},
            "options": {**options, "seed": session.options.seed},
            "details": outcome.details,
            "versions": package_versions(),
            "machine": describe_machine(session.device),
            "num_processes": session.accelerator.num_processes if session.accelerator else 1,
            "seconds": round(seconds, 1),
        }
    )


def _plain(value: object) -> object:
    """As JSON takes it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
