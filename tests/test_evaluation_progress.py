# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import time

from rich.progress import Task

from hf_vitreg.evaluation.progress import Throughput, progress_bar, steps


def test_throughput_is_shown_once_it_is_known():
    class Known(Task):
        speed = 41.26

    def task(kind):
        return kind(0, "work", 7, 3, _get_time=time.monotonic)

    assert Throughput("images").render(task(Task)).plain == ""
    assert Throughput("images").render(task(Known)).plain == "41.3 images/s"


def test_bars_go_to_stderr_and_only_where_they_are_asked_for(capsys):
    for is_shown in (True, False):
        with progress_bar(is_shown) as bar:
            task = bar.add_task("Extracting", total=3)
            bar.advance(task, 3)
        shown = capsys.readouterr()
        assert shown.out == "" and ("Extracting" in shown.err and "3/3" in shown.err) == is_shown


def test_steps_are_those_that_are_reported(capsys):
    with steps("Heads", is_shown=True) as report:
        report(2, 7)
        report(7, 7)
    assert "Heads" in (shown := capsys.readouterr().err) and "7/7" in shown
