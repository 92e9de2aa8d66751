# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""`python conversion/convert.py FAMILY CHECKPOINT OUTPUT_DIR`: a published checkpoint as a ViTReg folder.

The whole procedure is `convert`: prepare, compare, write. One command a family; each hands over a `Prepared`.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


if __package__ in (None, ""):
    # Run as a script. Its own folder must not be searched: a family may have the name of a package, as timm has.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]

from conversion import dinov2 as dinov2_family
from conversion import parity, writing
from conversion.family import ConversionError, Prepared


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False)
console = Console()


def convert(prepare: Callable[[], Prepared], output_dir: Path, overwrite: bool, inputs: list[str]) -> dict:
    """Prepares, compares and, where the two implementations agree, writes. Returns the record of the conversion.

    Args:
        prepare: Reads the user's files, see the families.
        output_dir: The folder to write.
        overwrite: Whether it may replace one that is not empty.
        inputs: Files that it must not contain.

    Raises:
        ConversionError: with nothing written.
    """
    writing.check_output_dir(output_dir, overwrite, [Path(path) for path in inputs])
    prepared = prepare()
    ours, num_channels = parity.vitreg_outputs(prepared.model), prepared.model.config.num_channels
    rows = parity.compare(ours, prepared.reference, prepared.sizes, num_channels)
    console.print(parity.table(rows, prepared.reference_name))
    parity.check(rows, prepared.reference_name)
    record = writing.write(prepared, rows, output_dir)
    _say(f"Converted: {prepared.sources[0]['backbone']} of {prepared.sources[0]['file']}.")
    _say(f"Left aside: {', '.join(record['left_aside']) or 'nothing'}.")
    num_parameters = sum(parameter.numel() for parameter in prepared.model.parameters())
    _say(f"{output_dir}: {type(prepared.model).__name__}, {prepared.arch}, {num_parameters:,} parameters.")
    return record


@app.callback()
def _describe():
    """Converts published checkpoints to ViTReg. Every model is compared with another implementation first, and nothing
    is written where they differ.
    """


@app.command()
def dinov2(
    checkpoint: Annotated[
        str, typer.Argument(help="A .pth, .pt or .safetensors file, or a published name, e.g. dinov2_vits14_reg4.")
    ],
    output_dir: Annotated[Path, typer.Argument(help="The folder to write.")],
    arch: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(dinov2_family.ARCHITECTURES)} or custom. An error where the checkpoint's shapes are "
            "others; without it, the shapes decide."
        ),
    ] = None,
    linear_head: Annotated[
        str | None, typer.Option(help="A file, or 1 or 4: the published ImageNet head on that many layers.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="In pixels. States what the stored position embeddings are for (518 in published checkpoints), an "
            "error where they are for another size. They are kept as they are, never resampled; the model takes any "
            "size. Default: what they are for."
        ),
    ] = None,
    interpolate_antialias: Annotated[
        bool | None,
        typer.Option(help="For your own training runs. Default: as published, with registers yes, else no."),
    ] = None,
    interpolate_offset: Annotated[
        float | None,
        typer.Option(help="For your own training runs. Default: as published, with registers 0, else 0.1."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUTPUT_DIR where it is not empty, once all is written.")
    ] = False,
    base_url: Annotated[str, typer.Option(help="Where published files are.")] = dinov2_family.BASE_URL,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where downloads go. Default: the folder of torch.hub.", show_default=False)
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            help="Of the weights, for the model card. Default: apache-2.0 for published names, else unknown."
        ),
    ] = None,
):
    """DINOv2 S, B, L and g, with and without registers: backbones, training checkpoints, linear heads."""
    with _errors_in_one_line():
        convert(
            lambda: dinov2_family.prepare(
                checkpoint,
                arch=arch,
                linear_head=linear_head,
                image_size=image_size,
                interpolate_antialias=interpolate_antialias,
                interpolate_offset=interpolate_offset,
                base_url=base_url,
                cache_dir=cache_dir,
                license=license,
            ),
            output_dir,
            overwrite,
            inputs=[path for path in (checkpoint, linear_head) if path is not None],
        )


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """What the user can mend, and what the disk refuses, without a traceback. Everything else is our mistake."""
    try:
        yield
    except (ConversionError, OSError) as error:
        Console(stderr=True).print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _say(text: str):
    console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
