# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What every training script does around its loop: its folder, its trackers, its log lines, its way to fail."""

import contextlib
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.text import Text

from ..distributed import whole
from .checkpoint import Checkpoints
from .collapse import TrainingCollapsed
from .metrics import MetricsLog


console = Console(stderr=True, highlight=False)


class TrainingDiverged(RuntimeError):
    """A metric or a weight is no number any more."""


def default_output_dir(first_choice: Path, resumes: bool) -> Path:
    """The folder, or the first of `NAME-2` .. beside it that is free; when resuming, the last that is there.

    Collective: all processes get what one has chosen, before it makes the folder that the others would see.
    """
    state = PartialState()
    numbered = (first_choice.with_name(f"{first_choice.name}-{number}") for number in range(2, 1000))
    candidates = [first_choice, *numbered]
    free = next(index for index, path in enumerate(candidates) if not path.exists())
    chosen = [str(candidates[max(free - 1, 0) if resumes else free])]
    if state.num_processes > 1:
        broadcast_object_list(chosen)
    return Path(chosen[0])


def check_output_dir(output_dir: Path, recipe, checkpoints: Checkpoints) -> None:
    """Raises `ValueError` where a new run would mix with what is there. Collective.

    Args:
        output_dir: Of the run; it need not exist.
        recipe: With `resume_from_checkpoint` and `overwrite_output_dir`.
        checkpoints: Of the run.
    """
    if recipe.resume_from_checkpoint:
        checkpoints.find(recipe.resume_from_checkpoint)
    elif (checkpoints.all() or _holds_more_than_logs(output_dir)) and not recipe.overwrite_output_dir:
        way_on = "Go on with --resume_from_checkpoint latest, or start" if checkpoints.all() else "Start"
        raise ValueError(
            f"{output_dir} is not empty. {way_on} anew with --overwrite_output_dir, or choose another --output_dir."
        )
    checkpoints.accelerator.wait_for_everyone()  # nobody makes the folder while another one looks


def _holds_more_than_logs(output_dir: Path) -> bool:
    """Whether there is anything that a run that failed before its first checkpoint does not leave."""
    logs = {"metrics.jsonl", "logs", "checkpoints", "tokenizer"}
    return output_dir.is_dir() and any(path.name not in logs for path in output_dir.iterdir())


def available_trackers(report_to: str) -> list[str]:
    """The trackers of `--report_to`. Raises `ValueError` for one that is not installed or not known."""
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    available = [tracker.value for tracker in get_available_trackers()]
    missing = [name for name in names if name not in available]
    if missing:
        raise ValueError(
            f"--report_to {','.join(missing)} is not known or not installed. Installed trackers: "
            f"{', '.join(available) or 'none'}."
        )
    return names


def tracked(recipe) -> dict:
    """The recipe in the types that every tracker takes."""
    values = dataclasses.asdict(recipe)
    return {
        name: "" if value is None else str(value) if isinstance(value, list) else value
        for name, value in values.items()
    }


def record(accelerator: Accelerator, log: MetricsLog, step: int, **metrics: float) -> None:
    """To the JSON lines and to the trackers."""
    if accelerator.is_main_process:
        log.write(step, **metrics)
    accelerator.log(metrics, step=step)


def mean_metrics(
    accelerator: Accelerator, logged: Sequence[tuple[int, Mapping[str, torch.Tensor]]]
) -> dict[str, float]:
    """Mean over batches and over all processes. Collective, one message whatever the number of metrics.

    Args:
        accelerator: Of the processes.
        logged: For each batch its step, and its metrics, scalars. A metric may be missing in some batches, but every
            process has the same ones in the same order.

    Raises:
        TrainingDiverged: naming the metric and the step that were the first not to be finite. Called before every
            save, so that no checkpoint holds what came after it.
    """
    places = [(step, name) for step, metrics in logged for name in metrics]
    scalars = [scalar.detach().float() for _, metrics in logged for scalar in metrics.values()]
    means = accelerator.reduce(torch.stack(scalars), reduction="mean").cpu()
    bad = (~means.isfinite()).nonzero()
    if len(bad):
        step, name = places[bad[0]]
        raise TrainingDiverged(
            f"The {name} of step {step} is {means[bad[0]].item()}. Lower --learning_rate or raise --warmup_ratio, and "
            "resume from the last checkpoint, which is from before."
        )
    values = defaultdict(list)
    for (_, name), value in zip(places, means):
        values[name].append(value)
    return {name: torch.stack(found).mean().item() for name, found in values.items()}


def require_finite(model: torch.nn.Module, step: int) -> None:
    """Raises `TrainingDiverged` where a weight is not finite: the loss of a step tells only of the steps before it.

    Collective where the weights are sharded.
    """
    # one number for all weights: a question to each would wait for the device as often
    norm = torch.nn.utils.get_total_norm(model.parameters())
    if not whole(norm).isfinite():
        raise TrainingDiverged(
            f"The weights after step {step} are not finite. Lower --learning_rate or --max_grad_norm, and resume from "
            "the last checkpoint, which is from before."
        )


@contextlib.contextmanager
def errors_for_people() -> Iterator[None]:
    """What a user can mend, in a sentence and not a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, TrainingDiverged, TrainingCollapsed) as error:
        # what a worker of the data loader raises arrives with its traceback in front
        message = str(error).rpartition("\nValueError: ")[2] if "DataLoader worker" in str(error) else str(error)
        console.print(Text.assemble(("Error: ", "bold red"), message.strip()), soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        console.print(
            "Interrupted. Go on from the last checkpoint with --resume_from_checkpoint latest.", soft_wrap=True
        )
        sys.exit(130)
