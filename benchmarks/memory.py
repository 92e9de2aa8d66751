# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Peak memory of inference and of a training step in transformers, timm and hf_vitreg: `python benchmarks/memory.py`.

Each is measured in a process of its own, several times, with the same weights and images: what the process holds at
most from the first call on, more than before it. Nothing is recomputed by blocks in any of them (gradient
checkpointing). Gradients are compared before anything is reported.
"""

import ctypes
import gc
import multiprocessing
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from peer_gradients import check_same_gradients, gradients_of
from peers import LIBRARIES, build, describe, tokens
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file
from step_turns import peak_bytes
from timing import save

from hf_vitreg.deployment.timing import ratio
from hf_vitreg.machine import usable_device
from hf_vitreg.objectives.packing import prepare_for_images


INFERENCE, GRADIENTS, ADAMW = "inference", "forward and backward", "two steps of AdamW"
STEPS = {INFERENCE: 0, GRADIENTS: 1, ADAMW: 2}  # the second one has the optimizer's moments beside it
# with layers that keep less for the backward pass, as `finetune.py` has them
KEEPS_LESS = "hf_vitreg, keeps less"
TASKS = {INFERENCE: LIBRARIES, GRADIENTS: (*LIBRARIES, KEEPS_LESS), ADAMW: (*LIBRARIES, KEEPS_LESS)}
BASELINE = "transformers"


@dataclass(frozen=True)
class Setting:
    """What is measured, picklable."""

    size: str
    image_size: int
    batch_size: int
    dtype: torch.dtype
    attention: str
    device: str


def main(
    size: Annotated[str, typer.Option(help="small, base or large.")] = "small",
    image_size: int = 224,
    batch_size: int = 8,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    attention: Annotated[str, typer.Option(help="sdpa or eager.")] = "sdpa",
    repeats: int = 5,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:1; by default a GPU where there is one.")] = None,
):
    device, torch_dtype = usable_device(device), getattr(torch, dtype)
    setting = Setting(size, image_size, batch_size, torch_dtype, attention, str(device))
    peaks = {task: {name: [] for name in names} for task, names in TASKS.items()}
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.safetensors" for name in TASKS[GRADIENTS]}
        for _ in track(range(repeats), "measuring", transient=True, console=Console(stderr=True)):
            for task, names in TASKS.items():
                for name in names:
                    peak, loss = in_a_process(measure, task, name, setting, files.get(name))
                    peaks[task][name].append(peak)
                    if task == GRADIENTS:
                        losses[name] = loss
        gradients = {name: load_file(path) for name, path in files.items()}
    models = build(size, image_size, attention, torch_dtype, torch.device("cpu"))
    libraries = {name: library_of(name) for name in files}
    differences = check_same_gradients(losses, gradients, libraries, models, torch_dtype)
    rows = {
        task: {name: summary(found, parts[BASELINE]) for name, found in parts.items()} for task, parts in peaks.items()
    }
    described = f"{describe(size, image_size, batch_size, attention)}, {dtype}"
    show(f"Peak memory: {described}", rows)
    save(
        f"memory_{device.type}_{size}_{dtype}",
        device,
        setting=described,
        repeats=repeats,
        baseline=BASELINE,
        gradient_differences=differences,
        peak=rows,
    )


def library_of(name: str) -> str:
    return name.split(",")[0]


def in_a_process(function: Callable, *arguments) -> tuple[int, float]:
    """What a function returns in a new process, which inherits no memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(task: str, name: str, setting: Setting, gradients: Path) -> tuple[int, float]:
    """Bytes at the peak beyond those before, and the loss of a training step, whose gradients are written."""
    device, library = torch.device(setting.device), library_of(name)
    model = build(setting.size, setting.image_size, setting.attention, setting.dtype, device, [library])[library]
    if name == KEEPS_LESS:
        prepare_for_images(model)
    model.train(task != INFERENCE)
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch_size, 3, setting.image_size, setting.image_size)
    pixel_values = torch.randn(shape, generator=generator).to(device)
    target = torch.randn(setting.batch_size, 1, 1, generator=generator).to(device)
    optimizer = torch.optim.AdamW(model.parameters()) if task == ADAMW else None
    before, loss = reset_peak(device), torch.tensor(torch.nan)
    if task == INFERENCE:
        with torch.no_grad():
            tokens(model, pixel_values)
    for _ in range(STEPS[task]):
        loss = ((tokens(model, pixel_values).float() - target) ** 2).mean()
        loss.backward()
        if optimizer:
            optimizer.step()
            optimizer.zero_grad()
    peak = peak_bytes(device) - before
    if task == GRADIENTS:
        save_file({key: each.cpu().contiguous() for key, each in gradients_of(model).items()}, gradients)
    return peak, loss.item()


def reset_peak(device: torch.device) -> int:
    """Starts the high-water mark anew, and returns the bytes that are held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is given back, or the peak would hide in it
    Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def summary(peaks: Sequence[float], of_baseline: Sequence[float]) -> dict[str, float | list[float]]:
    """Median megabytes, and the median of the ratios to the baseline with its quartiles."""
    middle, quartiles = ratio(peaks, of_baseline)
    return {"median_mb": statistics.median(peaks) / 1e6, "of_baseline": middle, "of_baseline_quartiles": quartiles}


def show(title: str, rows: dict[str, dict[str, dict]]) -> None:
    table = Table("", "", "median MB", f"of {BASELINE}'s", "quartiles", title=title)
    for task, parts in rows.items():
        for name, row in parts.items():
            low, high = row["of_baseline_quartiles"]
            cells = (f"{row['median_mb']:.1f}", f"{row['of_baseline']:.3f}", f"{low:.3f} to {high:.3f}")
            table.add_row(task, name, *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
