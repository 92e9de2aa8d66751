# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a converted model is written as, and where it may be."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save_file

import hf_vitreg
from conversion.family import ConversionError, Prepared
from conversion.parity import TOLERANCE, Row
from conversion.reading import progress_console, without_progress_bars
from hf_vitreg.atomic import atomic_folder
from hf_vitreg.hub.card import CardFacts
from hf_vitreg.hub.export import PRETRAINING_HEADS, write_model_repository


RECORD = "conversion.json"


def check_output_dir(output_dir: Path, overwrite: bool, inputs: list[Path]):
    """Raises `ConversionError` where the folder cannot be written, or where replacing it would take more with it."""
    if output_dir.exists() and not output_dir.is_dir():
        raise ConversionError(f"{output_dir} is a file. Give a folder that does not exist yet.")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise ConversionError(f"{output_dir} is not empty. Give another folder, or replace it with --overwrite.")
    target = output_dir.resolve()
    for path in (Path.cwd(), *inputs):
        if path.resolve().is_relative_to(target):
            raise ConversionError(
                f"{output_dir} holds {path}, which replacing it would delete. Give a folder of its own."
            )


def check_output_file(output: Path, overwrite: bool, inputs: list[Path]):
    """Raises `ConversionError` where the file cannot be written, or where it is one of an input's own."""
    if output.is_dir():
        raise ConversionError(f"{output} is a folder. Give the name of a file.")
    if output.exists() and any(output.resolve().is_relative_to(path.resolve()) for path in inputs):
        raise ConversionError(f"{output} is a part of what is converted. Give another name.")
    if output.exists() and not overwrite:
        raise ConversionError(f"{output} exists. Give another name, or replace it with --overwrite.")


def write(prepared: Prepared, rows: list[Row], comparison_seconds: float, output_dir: Path) -> dict:
    """A model repository with the record of the conversion, which is returned."""
    record = conversion_record(prepared, rows) | {"comparison_seconds": round(comparison_seconds, 3)}
    card = card_facts(prepared, rows, name=output_dir.resolve().name)
    with atomic_folder(output_dir) as folder, _one_status(f"Writing {output_dir}"):
        files = {RECORD: json.dumps(record, indent=2) + "\n"}
        write_model_repository(
            folder, prepared.model, prepared.image_processor, card, files, tokenizer=prepared.tokenizer
        )
        if prepared.heads:
            save_file(dict(prepared.heads), folder / PRETRAINING_HEADS)
    return record


def card_facts(prepared: Prepared, rows: list[Row], name: str) -> CardFacts:
    """Where the weights come from, and how well they agree with the reference."""
    sources = ", ".join(f"`{source['file']}` (sha256 `{source['sha256']}`)" for source in prepared.sources)
    worst = max(rows, key=lambda row: row.relative)
    heads = f" [{PRETRAINING_HEADS}]({PRETRAINING_HEADS}) has the projection heads that it was trained with."
    return CardFacts(
        name=name,
        license=prepared.license.id,
        license_name=prepared.license.name,
        license_link=prepared.license.link,
        base_model=prepared.base_model,
        notes=f"Converted from {sources}, architecture {prepared.arch}. On images of {len(prepared.sizes)} sizes the "
        f"outputs differ from those of {prepared.reference_name} by at most {worst.relative:.1e} of the largest value "
        f"(at {worst.height}x{worst.width} pixels, float32). [{RECORD}]({RECORD}) has every comparison."
        + heads * bool(prepared.heads)
        + "".join(f"\n\n{remark}" for remark in prepared.remarks),
    )


def conversion_record(prepared: Prepared, rows: list[Row]) -> dict:
    """What was converted, with what, and how well it agrees with the reference."""
    packages = ("torch", "transformers", "safetensors")
    return {
        "sources": prepared.sources,
        "arch": prepared.arch,
        "left_aside": prepared.left_aside,
        "remarks": prepared.remarks,
        "heads": sorted(prepared.heads),
        "license": str(prepared.license),
        "reference": prepared.reference_name,
        "tolerance": TOLERANCE,
        "comparisons": [asdict(row) for row in rows],
        "versions": {"hf_vitreg": hf_vitreg.__version__, **{name: version(name) for name in packages}},
    }


@contextlib.contextmanager
def _one_status(text: str) -> Iterator[None]:
    """In place of transformers' own progress bar."""
    with without_progress_bars(), progress_console.status(text):
        yield
