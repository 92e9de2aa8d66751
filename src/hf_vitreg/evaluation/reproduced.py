# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A table of the paper with what was measured here beside it, as JSON, as Markdown, and on a terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .published import DATA, LABELLED_DATA, MODELS, Cell, PublishedTable


Status = Literal["run", "resumed", "not run", "failed"]
HEADINGS = ("model or token", "measure", "published", "ours", "difference", "here")
NUMBERS = (2, 3, 4)  # columns of numbers, which end together
STYLES = {"run": "green", "resumed": "green", "failed": "red", "not run": "dim"}
NOTHING = "-"


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """A published number, and ours where it was measured.

    Attributes:
        cell: The published number.
        status: `"run"` in this run; `"resumed"`, which is measured by an earlier run on the same model, data and
            options; `"not run"`; `"failed"`.
        reason: What is missing to run it, or what went wrong.
        metrics: Of the evaluation, in its own units; empty unless it was run.
        measured_on: The model and the images that were given for those of the table, in words.
        changed: Settings that are not the table's, in words.
        evaluation: Folder with the evaluation, below that of the table.
    """

    cell: Cell
    status: Status = "not run"
    reason: str | None = None
    metrics: Mapping[str, float] | None = None
    measured_on: str | None = None
    changed: Sequence[str] = ()
    evaluation: str | None = None

    @property
    def ours(self) -> float | None:
        """In the unit of the column; `None` where it was not measured."""
        return self._metric("")

    @property
    def ours_std(self) -> float | None:
        """The same of its standard deviation."""
        return self._metric("_std")

    @property
    def difference(self) -> float | None:
        """Ours minus the published number, where there are both."""
        if self.ours is None or self.cell.published is None:
            return None
        return self.ours - self.cell.published.value

    @property
    def here(self) -> str:
        """What was done here, in words."""
        if self.status in ("not run", "failed"):
            return f"{self.status}: {self.reason}"
        words = "run" if self.status == "run" else "from an earlier run"
        return ", ".join([f"{words}: {self.measured_on}", *self.changed])

    def _metric(self, suffix: str) -> float | None:
        name = self.cell.measurement.metric + suffix if self.cell.measurement else None
        value = (self.metrics or {}).get(name)
        return None if value is None else value * self.cell.unit.scale

    def texts(self) -> tuple[str, ...]:
        """What stands below `HEADINGS`."""
        cell, unit = self.cell, self.cell.unit
        published = NOTHING if cell.published is None else unit.text(*cell.published)
        ours = NOTHING if self.ours is None else unit.text(self.ours, self.ours_std)
        difference = NOTHING if self.difference is None else unit.text(self.difference, sign="+")
        return cell.row, cell.heading, published, ours, difference, self.here

    def as_json(self) -> dict[str, object]:
        """For `results.json`."""
        cell, unit, published = self.cell, self.cell.unit, self.cell.published
        return {
            "row": cell.row,
            "column": cell.column,
            "unit": unit.name,
            "higher_is_better": unit.higher_is_better,
            "published": published and published.value,
            "published_std": published and published.std,
            "ours": self.ours,
            "ours_std": self.ours_std,
            "difference": self.difference,
            "status": self.status,
            "reason": self.reason,
            "measured_on": self.measured_on,
            "changed": list(self.changed),
            "evaluation": self.evaluation,
        }


@dataclass(frozen=True)
class Reproduced:
    """A table with results of all its cells, in their order."""

    table: PublishedTable
    results: Sequence[CellResult]

    def count(self, status: Status) -> int:
        """Cells with this status."""
        return sum(result.status == status for result in self.results)

    @property
    def footnotes(self) -> list[str]:
        """Where the numbers are from, what differs, and what can be given to run the rest."""
        numbers = {status: self.count(status) for status in ("run", "resumed", "failed", "not run")}
        counted = ", ".join(f"{number} {status}" for status, number in numbers.items() if number)
        notes = [f"{len(self.results)} numbers: {counted}.", self.table.source, *self.table.notes]
        if numbers["not run"]:
            notes += [f"--model {name}=DIR_OR_ID: {MODELS[name]}." for name in self.table.models]
            notes += [f"--data {name}=PATH: {DATA[name]}." for name in self.table.data if name in DATA]
            others = ", ".join(f"{name}=PATH" for name in self.table.data if name not in DATA)
            notes += [f"--data {others}: {LABELLED_DATA}."] if others else []
        return notes

    def as_json(self) -> dict[str, object]:
        """For `results.json`."""
        table = self.table
        about = {"table": table.name, "title": table.title, "source": table.source, "notes": list(table.notes)}
        return {**about, "cells": [result.as_json() for result in self.results]}

    def as_markdown(self) -> str:
        """The table, aligned so that it can be read as it is, and its footnotes."""
        rows = [HEADINGS, *([text.replace("|", "\\|") for text in result.texts()] for result in self.results)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
        # what was done here is long and last
        widths[-1] = len(HEADINGS[-1])
        lines = [f"| {' | '.join(map(_aligned, range(len(widths)), row, widths))} |" for row in rows]
        rule = [f"{'-' * (width - 1)}{':' if column in NUMBERS else '-'}" for column, width in enumerate(widths)]
        lines.insert(1, f"| {' | '.join(rule)} |")
        notes = [f"- {note}" for note in self.footnotes]
        return "\n".join([f"# {self.table.title}", "", *lines, "", *notes]) + "\n"

    def show(self, console: Console | None = None) -> None:
        """Prints it: on a terminal in colours, else as Markdown."""
        console = console or Console()
        if not console.is_terminal:
            console.file.write(self.as_markdown())
            return
        table = Table(title=self.table.title, title_justify="left")
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if number in NUMBERS else "left", overflow="fold")
        previous = None
        for result in self.results:
            row, *texts = result.texts()
            if previous not in (None, row):
                table.add_section()
            name = row if row != previous else ""
            table.add_row(Text(name), *map(Text, texts[:-1]), Text(texts[-1], style=STYLES[result.status]))
            previous = row
        console.print(table)
        for note in self.footnotes:
            console.print(Text(f"- {note}"))


def _aligned(column: int, text: str, width: int) -> str:
    return text.rjust(width) if column in NUMBERS else text.ljust(width)
