# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Runs a table of "Vision Transformers Need Registers" with what is at hand: what `hf-vitreg reproduce` does.

A number is ours only where its evaluation ran to the end in this run; or, where that is asked for, in an earlier one
on the same model (its weights are hashed anew), the same path to data and the same options.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from ..atomic import atomic_file
from .evaluate import RESULTS, Evaluated
from .options import EvaluationOptions
from .published import Cell, PublishedTable, find_table
from .reproduced import CellResult, Reproduced
from .session import Session
from .table_jobs import ReproduceOptions, TableJob, results_key, table_jobs


logger = logging.getLogger(__name__)

TABLE = "table.md"
EVALUATIONS = "evaluations"  # folders of evaluations are below it


def reproduce(
    table: str,
    models: Mapping[str, str | Path] | None = None,
    data: Mapping[str, str | Path] | None = None,
    output: str | Path | None = None,
    options: ReproduceOptions | None = None,
    *,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Reproduced | None:
    """Runs every cell of a table whose model and data are given. One that fails does not stop the others.

    Results are written after every evaluation. Under `accelerate launch` the processes share each evaluation, and the
    first of them writes; single tokens are measured by one process.

    Args:
        table: One of `TABLES`.
        models: Where models are, by the names of the table; as for `load_vit`.
        data: Where data sets are, by the names of the table.
        output: Folder for `results.json`, `table.md` and the evaluations; may be left out where nothing can be run.
        options: Of the table.
        device: Where to compute; by default a GPU where there is one.
        resume: Take evaluations that are in the output already, where they are of the same model by its path and the
            hash of its weights, path of the data, and options. Data that changed at the same path are not noticed.
        overwrite: Replace what is in the output.
        progress: Show bars on stderr.

    Returns:
        All cells, on the process that wrote them; `None` on others.

    Raises:
        ValueError: for a table, model or data that there is not, or an output that may not be written to.
    """
    published, options = find_table(table), options or ReproduceOptions()
    models = {name: str(place) for name, place in (models or {}).items()}
    data = {name: str(place) for name, place in (data or {}).items()}
    _require_known("model", models, published.models, table)
    _require_known("data", data, published.data, table)
    jobs = table_jobs(published, models, data, options)
    runnable = [job for job in jobs if not job.missing]
    if output is None and runnable:
        raise ValueError("Give --output, a folder for the results of what is run.")
    results = {cell: CellResult(cell=cell, reason=cell.unmeasured) for cell in published.cells}
    for job in jobs:
        reason = f"needs {', '.join(job.missing)}" if job.missing else "the run has not come to it"
        results |= job.results(status="not run", reason=reason)
    run = _Run(published, None if output is None else Path(output), results)
    run.start(resume, overwrite)
    now = _Models()
    earlier = [run.earlier(job, now) if resume else None for job in runnable]
    for number, (job, found) in enumerate(zip(runnable, earlier), start=1):
        if progress and _is_first_process():
            Console(stderr=True).print(f"Evaluation {number} of {len(runnable)}: {job.name}", highlight=False)
        run.add(job, found, device, resume or overwrite, progress)
    return run.reproduced if _is_first_process() else None


def _require_known(kind: str, given: Mapping[str, str], known: list[str], table: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{table} has no {kind} {name!r}. Its names for --{kind}: {', '.join(known)}.")


class _Models(dict):
    """What results say of models, the hash of their weights among it, by place and whether texts belong to them."""

    def __missing__(self, key: tuple[str, bool]) -> dict[str, object]:
        place, is_dual = key
        session = Session(place, "", None, EvaluationOptions(), None, torch.device("cpu"), False)
        # it tells of the one that was asked for
        _ = session.dual_encoder if is_dual else session.encoder
        self[key] = session.about_model()
        return self[key]


@dataclass(eq=False)
class _Run:
    """Results as they come. One process writes them."""

    table: PublishedTable
    output: Path | None
    results: dict[Cell, CellResult]

    @property
    def reproduced(self) -> Reproduced:
        return Reproduced(self.table, [self.results[cell] for cell in self.table.cells])

    def start(self, resume: bool, overwrite: bool) -> None:
        """Raises `ValueError` where results may not be written."""
        if self.output is not None and _is_first_process():
            _check_output(self.output, self.table.name, resume, overwrite)
            self.write()

    def earlier(self, job: TableJob, models: Mapping[tuple[str, bool], dict]) -> Evaluated | None:
        """What an earlier run measured, where the job would measure the same."""
        folder = self._folder(job)
        results = _read(folder / RESULTS)
        if results is None or results_key(results) != job.key:
            return None
        try:
            is_same = results.get("model") == models[job.model, job.task == "zero_shot"]
        except ValueError:
            return None  # the evaluation will say what is wrong with the model
        return Evaluated(folder, results) if is_same else None

    def add(self, job: TableJob, found: Evaluated | None, device: str | None, overwrite: bool, progress: bool) -> None:
        """Fills the cells of a job, and writes."""
        status, evaluated, reason = ("run", None, None) if found is None else ("resumed", found, None)
        try:
            evaluated = evaluated or job.run(self._folder(job), device, overwrite, progress)
        except Exception as error:  # whatever it is, the other evaluations may take hours and are not to be lost
            status, reason = "failed", " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, (ValueError, OSError)):
                reason = f"{type(error).__name__}: {reason}"
                logger.exception("%s failed", job.name)
        if status == "failed":
            self.results |= job.results(status=status, reason=reason)
        elif evaluated is not None:
            self.results |= _measured(job, evaluated, status)
        if self.output is not None and _is_first_process():
            self.write()

    def write(self) -> None:
        """Both files, each whole."""
        text = json.dumps(self.reproduced.as_json(), indent=1, ensure_ascii=False, allow_nan=False)
        for name, content in ((RESULTS, text + "\n"), (TABLE, self.reproduced.as_markdown())):
            with atomic_file(self.output / name) as file:
                file.write_text(content, encoding="utf-8")

    def _folder(self, job: TableJob) -> Path:
        return self.output / EVALUATIONS / job.name


def _measured(job: TableJob, evaluated: Evaluated, status: str) -> dict[Cell, CellResult]:
    """Results of its cells; a kind of tokens that could not be measured failed alone."""
    model, data = evaluated.results["model"], evaluated.results["data"]
    results = job.results(
        status=status,
        metrics=evaluated.metrics,
        measured_on=f"{model['name']} on {data['num_images']} images of {data['name']}",
        changed=job.changed,
        evaluation=f"{EVALUATIONS}/{job.name}",
    )
    reasons = evaluated.results["details"].get("not_measured", {})
    for cell, result in results.items():
        if result.ours is None:
            reason = reasons.get(cell.measurement.metric, "the model has no such token")
            results[cell] = replace(result, status="failed", reason=reason)
    return results


def _is_first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _check_output(output: Path, table: str, resume: bool, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file. Give a folder for the results.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    there = (_read(output / RESULTS) or {}).get("table")
    if there is None:
        raise ValueError(f"{output} holds other things than a table. Give a new folder.")
    if there != table:
        raise ValueError(f"{output} holds {there}. Give a new folder for {table}.")
    if not (resume or overwrite):
        raise ValueError(f"There are results in {output} already. Give a new folder, --resume or --overwrite.")


def _read(file: Path) -> dict | None:
    """A JSON object; `None` where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
