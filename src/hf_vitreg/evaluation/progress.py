# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""How far long work is, and how fast it goes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Throughput(ProgressColumn):
    """As `41.3 images/s`.

    Args:
        unit: What is counted.
    """

    def __init__(self, unit: str):
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Nothing until it is known."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self.unit}/s")


def progress_bar(is_shown: bool, unit: str = "images") -> Progress:
    """A bar on stderr with throughput."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Throughput(unit))
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not is_shown
    )


@contextmanager
def steps(title: str, is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """In this context a bar shows what it is told: the steps done, and the number of steps."""
    with progress_bar(is_shown, unit="steps") as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
