# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Checkpoints of a run: written aside and renamed, so that each one that exists is whole."""

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import safetensors.torch
import torch
import yaml
from accelerate import Accelerator

from ..machine import package_versions
from ..recipe import save_recipe


logger = logging.getLogger(__name__)

STATE_FILE = "run_state.json"
RECIPE_FILE = "recipe.yaml"
EMA_FILE = "ema.safetensors"
VERSIONS_FILE = "versions.json"
# a run may go on under another name, reporting or saving differently, and stay the same run
FREE_TO_CHANGE = {
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "report_to",
    "on_collapse",
    "min_feature_rank",
    "min_target_entropy",
    "max_teacher_entropy",
    "max_train_minutes",
    "peak_tflops",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
    "license",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
}


@dataclasses.dataclass
class RunState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        best_metric: Best value so far of what chooses a checkpoint, the higher the better; -1 before the first one.
        best_step: Its step.
        seconds: Time spent in earlier processes of this run.
        steps_per_epoch: Follows from the data and the number of processes, which a resumed run must share; 0 of a
            stream, which has no end.
    """

    step: int = 0
    best_metric: float = -1.0
    best_step: int = 0
    seconds: float = 0.0
    steps_per_epoch: int = 0


class Checkpoints:
    """The checkpoints of one run, `folder/step-00000123`: the last few and the one with the best metric.

    Each holds what `Accelerator.save_state` writes, the moving average, where each process stands in the data, the
    run's state, the recipe and the versions of packages.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, limit: int):
        self.folder = folder
        self.accelerator = accelerator
        self.limit = limit

    def save(
        self, state: RunState, recipe, ema: torch.nn.Module | None = None, data_state: dict | None = None
    ) -> None:
        """Collective. A process killed at any moment leaves the checkpoints that were there, and no half one.

        Args:
            state: Where the run stands.
            recipe: Of the run, a dataclass.
            ema: A moving average that is no part of what Accelerate prepared.
            data_state: Where this process stands in the data, which need not be where the others do; JSON.
        """
        final = self.folder / f"step-{state.step:08d}"
        partial = self.folder / f".{final.name}.partial"
        if self.accelerator.is_main_process:
            for leftover in self.folder.glob(".step-*.partial"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(partial)
        if data_state is not None:
            self._data_file(partial).write_text(json.dumps(data_state))
        if self.accelerator.is_main_process:
            if ema is not None:
                safetensors.torch.save_file(ema.state_dict(), partial / EMA_FILE)
            save_recipe(recipe, partial / RECIPE_FILE)
            (partial / VERSIONS_FILE).write_text(json.dumps(package_versions()))
            described = {**dataclasses.asdict(state), "num_processes": self.accelerator.num_processes}
            (partial / STATE_FILE).write_text(json.dumps(described))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            _remove(final)
            os.replace(partial, final)
            self._prune(state)
        self.accelerator.wait_for_everyone()

    def _data_file(self, folder: Path) -> Path:
        """Of this process."""
        return folder / f"data_state_{self.accelerator.process_index}.json"

    def _prune(self, state: RunState) -> None:
        """Removes all but the last `limit` and the best."""
        for path in self.all()[: -self.limit]:
            if path != self.best(state):
                _remove(path)

    def best(self, state: RunState) -> Path:
        """The checkpoint with the best metric."""
        return self.folder / f"step-{state.best_step:08d}"

    def all(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if (path / STATE_FILE).is_file())

    def rewind(self, step: int) -> None:
        """Removes those after a step, which a run that goes on from there makes again; all of them for step 0."""
        for path in self.all():
            if int(path.name.removeprefix("step-")) > step:
                _remove(path)

    def find(self, name: str) -> Path:
        """The checkpoint that `--resume_from_checkpoint` names: `latest`, or a folder of this run.

        Raises:
            ValueError: where there is none.
        """
        if name == "latest":
            if not self.all():
                raise ValueError(f"There is no checkpoint in {self.folder} to resume from.")
            return self.all()[-1]
        found = [path for path in self.all() if path.resolve() == Path(name).resolve()]
        if not found:
            known = ", ".join(str(path) for path in self.all()) or "none"
            raise ValueError(f"{name} is no checkpoint of the run in {self.folder.parent}, which has: {known}.")
        return found[0]

    def load(self, path: Path, recipe, ema: torch.nn.Module | None = None) -> tuple[RunState, dict | None]:
        """Collective. Restores model, optimizer, random states and moving average.

        Returns:
            Where the run stood, and where this process stood in the data, as both were saved.

        Raises:
            ValueError: where the checkpoint belongs to another recipe or number of processes, or is damaged.
        """
        try:
            saved_recipe = yaml.safe_load((path / RECIPE_FILE).read_text())
            described = json.loads((path / STATE_FILE).read_text())
            num_processes = described.pop("num_processes")
            state = RunState(**described)
        except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(_damaged(path, error)) from error
        _require_same_recipe(saved_recipe, dataclasses.asdict(recipe), path)
        if num_processes != self.accelerator.num_processes:
            raise ValueError(
                f"{path} was saved by {num_processes} processes, each with its part of the data, and there are "
                f"{self.accelerator.num_processes} now. Resume with --num_processes {num_processes}."
            )
        try:
            self.accelerator.load_state(path)
            if ema is not None:
                ema.load_state_dict(safetensors.torch.load_file(path / EMA_FILE))
            data_file = self._data_file(path)
            data_state = json.loads(data_file.read_text()) if data_file.exists() else None
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(_damaged(path, error)) from error
        return state, data_state


def _damaged(path: Path, error: Exception) -> str:
    return f"The checkpoint {path} cannot be loaded: {error}. Resume from another one."


def _remove(path: Path) -> None:
    """Takes a checkpoint out of sight first, since a folder is not deleted in one moment."""
    if path.exists():
        leftover = path.with_name(f".{path.name}.removed.partial")
        shutil.rmtree(leftover, ignore_errors=True)
        os.replace(path, leftover)
        shutil.rmtree(leftover)


def _require_same_recipe(saved: dict, given: dict, path: Path) -> None:
    saved = saved if isinstance(saved, dict) else {}
    changed = {name for name in given if name not in FREE_TO_CHANGE and saved.get(name) != given[name]}
    if changed:
        differences = "; ".join(f"{name} was {saved.get(name)!r}, is {given[name]!r}" for name in sorted(changed))
        raise ValueError(
            f"{path} belongs to a run with another recipe: {differences}. Give the same flags (--config "
            f"{path / RECIPE_FILE}), or start a new run."
        )
