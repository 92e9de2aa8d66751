# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A model as it is, optimized and quantized, beside each other and the machine's limit: `hf-vitreg benchmark`."""

import copy
import dataclasses
import datetime
import functools
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from ..analysis.cost import forward_flops
from ..atomic import atomic_file
from ..machine import describe_machine, memory_errors
from .agreement import Agreement, agreement, outputs_of, tolerance
from .optimize import optimize
from .quantize import quantize
from .speed import COLUMNS, Candidate, Limit, Speed, dtype_name, measure_speed


PLAIN = "plain"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkOptions:
    """What a model is timed on.

    Attributes:
        size: Height and width of the images in pixels, multiples of the patch size.
        batch_size: Images at once.
        dtype: What is set beside the plain model: `"float32"` and `"bfloat16"`, by `optimize`, and `"int8"`, by
            `quantize`.
        rounds: In which all take turns, 2 or more.
    """

    size: tuple[int, int] = (224, 224)
    batch_size: int = 8
    dtype: tuple[str, ...] = tuple(DTYPES)
    rounds: int = 10

    def __post_init__(self):
        if wrong := [name for name in self.dtype if name not in DTYPES]:
            raise ValueError(f"dtype must be among {', '.join(DTYPES)}, got {', '.join(map(repr, wrong))}.")
        for name, least in (("batch_size", 1), ("rounds", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run the model: how well it agrees with the model in float32, and its speed, or why it has none."""

    dtype: torch.dtype
    agreement: Agreement | None = None
    speed: Speed | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What was measured.

    Attributes:
        machine: In words.
        setting: Of model and images, in words.
        rounds: In which all took turns.
        gflops_per_image: 1e9 operations of a forward pass, in matrix products and convolutions.
        limits: What the machine reached in between, by the name of the dtype.
        rows: The ways to run the model, by name.
    """

    machine: str
    setting: str
    rounds: int
    gflops_per_image: float
    limits: dict[str, Limit]
    rows: dict[str, Row]

    @property
    def has_errors(self) -> bool:
        """Whether some way to run the model has no time."""
        return any(row.error for row in self.rows.values())

    def show(self) -> None:
        """Prints the machine, its limits, a table, and why something is not in it."""
        console = Console()
        console.print(self.machine, highlight=False)
        for name, limit in self.limits.items():
            console.print(f"matmul limit, {name}: {limit}", highlight=False)
        table = Table("", title=self.setting)
        for column in (*COLUMNS, "agreement"):
            table.add_column(column, justify="right")
        for name, row in self.rows.items():
            if row.speed:
                table.add_row(name, *row.speed.cells(), row.agreement.describe(row.dtype))
        console.print(table)
        for name, row in self.rows.items():
            if row.error:
                console.print(Text(f"{name} has no time: {row.error}", style="red"))

    def write(self, path: str | Path) -> None:
        """Writes all of it to a JSON file, which is there whole or not at all."""
        record = {
            "machine": self.machine,
            "date": datetime.date.today().isoformat(),
            "setting": self.setting,
            "rounds": self.rounds,
            "gflops_per_image": self.gflops_per_image,
            "limits": {name: limit._asdict() for name, limit in self.limits.items()},
            "rows": {name: _record(row) for name, row in self.rows.items()},
        }
        with atomic_file(Path(path)) as partial:
            partial.write_text(json.dumps(record, indent=2) + "\n")


def _record(row: Row) -> dict:
    agreed = dataclasses.asdict(row.agreement) if row.agreement else {}
    speed = row.speed._asdict() if row.speed else {}
    return {"dtype": dtype_name(row.dtype), **agreed, **speed, "error": row.error}


def check_json(path: str | Path, overwrite: bool = False) -> None:
    """Raises `ValueError`, before anything is timed, where no JSON file can be written to `path`."""
    path = Path(path)
    if path.is_dir() or (path.exists() and not overwrite):
        raise ValueError(f"There is {path} already. Choose another name, or replace a file with --overwrite.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} to write {path.name} to. Make it first.")


def benchmark_model(
    model: PreTrainedModel, options: BenchmarkOptions | None = None, progress: bool = False
) -> Benchmark:
    """Times a model as it is against `optimize` and `quantize`, all in one process and in turns.

    Each is compared with the model in float32 before, on random images. What is not within its tolerance, or cannot
    be done here, has an error and no time.

    Args:
        model: A ViTReg of any head, where it is to run. It is left as it is.
        options: On which images, and against what.
        progress: Show on stderr how far it is.

    Raises:
        ValueError: where images of the size have no whole patches, or the device has too little memory.
    """
    options = options or BenchmarkOptions()
    _require_whole_patches(options.size, model.config.patch_size)
    shape = (options.batch_size, model.config.num_channels, *options.size)
    pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    with memory_errors():
        expected = outputs_of(copy.deepcopy(model).float(), pixel_values)
        models = {PLAIN: model}
        rows = {PLAIN: Row(dtype=model.dtype, agreement=agreement(outputs_of(model, pixel_values), expected))}
        console = Console(stderr=True, quiet=not progress)
        for name in options.dtype:
            title = f"{'quantize' if name == 'int8' else 'optimize'}, {name}"
            with console.status(f"{title}: compiling"):
                models[title], rows[title] = _prepare(model, DTYPES[name], pixel_values, expected)
        candidates = {
            title: Candidate(functools.partial(_forward, models[title], pixel_values), row.dtype)
            for title, row in rows.items()
            if row.error is None
        }
        flops = forward_flops(model, options.size)
        speeds, limits = measure_speed(
            candidates, PLAIN, flops * options.batch_size, options.batch_size, options.rounds, model.device, progress
        )
    threads = f", {torch.get_num_threads()} threads" if model.device.type == "cpu" else ""
    return Benchmark(
        machine=describe_machine(model.device) + threads,
        setting=f"{type(model).__name__} of {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{'x'.join(map(str, options.size))} pixels, batch {options.batch_size}",
        rounds=options.rounds,
        gflops_per_image=flops / 1e9,
        limits=limits,
        rows={title: dataclasses.replace(row, speed=speeds.get(title)) for title, row in rows.items()},
    )


def _require_whole_patches(size: tuple[int, int], patch_size: int) -> None:
    if any(side < patch_size or side % patch_size for side in size):
        possible = [max(1, round(side / patch_size)) * patch_size for side in size]
        raise ValueError(
            f"Height and width must be multiples of the patch size of {patch_size}, got {size[0]}x{size[1]}. The "
            f"nearest is {possible[0]}x{possible[1]}."
        )


@torch.no_grad()
def _forward(model: PreTrainedModel, pixel_values: torch.Tensor) -> None:
    model(pixel_values)


def _prepare(
    model: PreTrainedModel, dtype: torch.dtype, pixel_values: torch.Tensor, expected: dict[str, torch.Tensor]
) -> tuple[PreTrainedModel | None, Row]:
    """The model in this dtype, and how well it agrees; or why there is none."""
    try:
        if dtype == torch.int8:
            faster = quantize(model, example=pixel_values)
        else:
            faster = optimize(model, dtype, example=pixel_values)
    except ValueError as error:
        return None, Row(dtype=dtype, error=str(error))
    found = agreement(outputs_of(faster, pixel_values), expected)
    if found.suffices(dtype):
        return faster, Row(dtype=dtype, agreement=found)
    return None, Row(
        dtype=dtype, agreement=found, error=f"{found.describe(dtype)}, where {tolerance(dtype)} is needed"
    )
