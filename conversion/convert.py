# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""`python conversion/convert.py FAMILY CHECKPOINT OUTPUT_DIR`: a published checkpoint as a ViTReg folder.

The whole procedure is `convert`: prepare, compare, write. One command a family; each hands over a `Prepared`.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


if __package__ in (None, ""):
    # Run as a script. Its own folder must not be searched: a family may have the name of a package, as timm has.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]

from conversion import dino as dino_family
from conversion import dinov2 as dinov2_family
from conversion import parity, writing
from conversion.family import ConversionError, Family, KnownCheckpoint, Prepared
from conversion.published import known_checkpoints
from hf_vitreg.hub.export import PRETRAINING_HEADS


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False)
console = Console()

# What `--list` prints: all that a family knows by name.
LISTS: list[Callable[[], list[KnownCheckpoint]]] = [
    partial(known_checkpoints, dino_family.FAMILY),
    partial(known_checkpoints, dinov2_family.FAMILY),
]

OutputDir = Annotated[Path, typer.Argument(help="The folder to write.")]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="In pixels. States what the stored position embeddings are for, an error where they are for another "
        "size. They are kept as they are, never resampled; the model takes any size. Default: what they are for."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUTPUT_DIR where it is not empty, once all is written.")
]
BaseUrl = Annotated[str | None, typer.Option(help="Where published files are. Default: where they were published.")]
CacheDir = Annotated[
    Path | None, typer.Option(help="Where downloads go. Default: the folder of torch.hub.", show_default=False)
]
WeightsLicense = Annotated[
    str | None,
    typer.Option(
        "--license", help="Of the weights, for the model card. Default: that of published names, else unknown."
    ),
]


def _checkpoint(example: str) -> type[str]:
    """The argument that says what to convert."""
    text = f"A .pth, .pt or .safetensors file, or a published name, e.g. {example}."
    return Annotated[str, typer.Argument(help=text)]


def _arch(family: Family) -> type[str | None]:
    """The option that says what the checkpoint must be."""
    text = (
        f"{', '.join(family.architectures)} or custom. An error where the checkpoint's shapes are others; without it, "
        "the shapes decide."
    )
    return Annotated[str | None, typer.Option(help=text)]


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
    ours = prepared.implementation or parity.vitreg_outputs(prepared.model)
    vision_config = getattr(prepared.model.config, "vision_config", prepared.model.config)
    rows = parity.compare(ours, prepared.reference, prepared.sizes, vision_config.num_channels)
    console.print(parity.table(rows, prepared.reference_name))
    parity.check(rows, prepared.reference_name)
    record = writing.write(prepared, rows, output_dir)
    _say(f"Converted: {prepared.sources[0]['backbone']} of {prepared.sources[0]['file']}.")
    _say(f"Left aside: {', '.join(record['left_aside']) or 'nothing'}.")
    if prepared.heads:
        _say(f"Kept beside the model: {len(prepared.heads)} tensors of projection heads, in {PRETRAINING_HEADS}.")
    num_parameters = sum(parameter.numel() for parameter in prepared.model.parameters())
    _say(f"{output_dir}: {type(prepared.model).__name__}, {prepared.arch}, {num_parameters:,} parameters.")
    return record


def _print_list(asked: bool):
    """Every checkpoint that can be asked for by name, a line each."""
    if not asked:
        return
    columns = ("family", "name", "arch", "source", "registers", "patch", "parameters", "licence")
    table = Table(*columns, box=None, pad_edge=False)
    for known in (known for known_of_family in LISTS for known in known_of_family()):
        figures = (str(known.num_registers), str(known.patch_size), f"{known.num_parameters:,}")
        table.add_row(known.family, known.name, known.arch, known.source, *figures, known.license)
    # lines are never folded: they are searched and cut by other tools
    Console(width=max(console.width, Console(width=1000).measure(table).maximum)).print(table, markup=False)
    raise typer.Exit


@app.callback()
def _describe(
    list_all: Annotated[
        bool, typer.Option("--list", callback=_print_list, is_eager=True, help="Every checkpoint known by name.")
    ] = False,
):
    """Converts published checkpoints to ViTReg. Every model is compared with another implementation first, and nothing
    is written where they differ.
    """


@app.command()
def dino(
    checkpoint: _checkpoint("dino_vits16 or dino_vits16_full"),
    output_dir: OutputDir,
    arch: _arch(dino_family.FAMILY) = None,
    linear_head: Annotated[str | None, typer.Option(help="A file, or imagenet: the published ImageNet head.")] = None,
    image_size: ImageSize = None,
    overwrite: Overwrite = False,
    base_url: BaseUrl = None,
    cache_dir: CacheDir = None,
    license: WeightsLicense = None,
):
    """DINO ViT-S and ViT-B, patches of 16 and 8: backbones, training checkpoints, linear heads."""
    options = _options(locals(), "output_dir", "overwrite")
    _run(dino_family.prepare, options, output_dir, overwrite, inputs=[checkpoint, linear_head])


@app.command()
def dinov2(
    checkpoint: _checkpoint("dinov2_vits14_reg4"),
    output_dir: OutputDir,
    arch: _arch(dinov2_family.FAMILY) = None,
    linear_head: Annotated[
        str | None, typer.Option(help="A file, or 1 or 4: the published ImageNet head on that many layers.")
    ] = None,
    image_size: ImageSize = None,
    interpolate_antialias: Annotated[
        bool | None,
        typer.Option(help="For your own training runs. Default: as published, with registers yes, else no."),
    ] = None,
    interpolate_offset: Annotated[
        float | None,
        typer.Option(help="For your own training runs. Default: as published, with registers 0, else 0.1."),
    ] = None,
    overwrite: Overwrite = False,
    base_url: BaseUrl = None,
    cache_dir: CacheDir = None,
    license: WeightsLicense = None,
):
    """DINOv2 S, B, L and g, with and without registers: backbones, training checkpoints, linear heads."""
    options = _options(locals(), "output_dir", "overwrite")
    _run(dinov2_family.prepare, options, output_dir, overwrite, inputs=[checkpoint, linear_head])


def _options(given: dict, *not_of_the_family: str) -> dict:
    """The arguments of a command that its family wants."""
    return {name: value for name, value in given.items() if name not in not_of_the_family}


def _run(prepare: Callable[..., Prepared], options: dict, output_dir: Path, overwrite: bool, inputs: list[str | None]):
    with _errors_in_one_line():
        convert(partial(prepare, **options), output_dir, overwrite, [path for path in inputs if path is not None])


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
