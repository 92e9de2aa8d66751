# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The command `hf-vitreg`. Every sub-command calls one function of the package, and imports it only then."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    name="hf-vitreg",
    help="Vision transformers with register tokens, from the command line.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def user_errors() -> Iterator[None]:
    """What a user can cause and mend is one red line, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.secho(f"Error: {' '.join(str(error).split())}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1) from None


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from . import __version__

        typer.echo(f"hf-vitreg {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _threshold(text: str) -> float | str:
    """A number, or the name of a method, which the inspection checks."""
    try:
        return float(text)
    except ValueError:
        return text


def _size(text: str) -> tuple[int, int]:
    """ "448" or "448x672", height first."""
    height, _, width = text.partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no size: give pixels, as 448, or height and width, as 448x672."
        ) from None


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="Any ViT: a folder, a Hub repository, timm:NAME; or a folder of checkpoints.")
    ],
    images: Annotated[list[str], typer.Option(help="Folder, file or pattern in quotes. Can be given several times.")],
    output: Annotated[Path, typer.Option(metavar="REPORT_DIR", help="Where the report goes.")],
    compare: Annotated[str | None, typer.Option(metavar="OTHER_MODEL", help="Set beside the first.")] = None,
    checkpoints: Annotated[
        str | None, typer.Option(metavar="DIR", help="Checkpoints of MODEL, to see when outliers came.")
    ] = None,
    threshold: Annotated[
        str, typer.Option(parser=_threshold, metavar="NUMBER|mean+3std|mad|otsu", help="Norm of an outlier.")
    ] = "mad",
    side: Annotated[str, typer.Option(metavar="high|low", help="Of the threshold that outliers are on.")] = "high",
    layer: Annotated[int | None, typer.Option(help="After which layer, from 1; by default the last.")] = None,
    size: Annotated[
        str | None,
        typer.Option(parser=_size, metavar="PIXELS|HEIGHTxWIDTH", help="Of the images; by default as trained."),
    ] = None,
    max_images: Annotated[int | None, typer.Option(help="Take a random sample of so many.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once; results are the same.")] = 16,
    seed: Annotated[int, typer.Option(help="Of samples and probes.")] = 0,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:1; by default a GPU where there is one.")] = None,
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Attention maps of every head at every layer, too.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a report that is there.")] = False,
) -> None:
    """Tell whether a ViT has artifacts, where, and what they carry: a page with figures, and all numbers as JSON."""
    from .analysis.report import inspect_model

    with user_errors():
        report = inspect_model(
            model,
            images,
            output,
            compare=compare,
            checkpoints=checkpoints,
            threshold=threshold,
            side=side,
            layer=layer,
            size=size,
            max_images=max_images,
            batch_size=batch_size,
            seed=seed,
            device=device,
            overwrite=overwrite,
            progress=True,
            all_layers=all_layers,
        )
    for name, verdict in zip((model, compare), report.verdicts):
        typer.echo(f"{name}: {' '.join(verdict)}")
    if report.num_unreadable:
        typer.echo(f"{report.num_unreadable} images could not be used; the report names them.", err=True)
    typer.echo(report.page)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model repository, like the output of finetune.py.")],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to, or only NAME for your own namespace.")],
    private: Annotated[
        bool | None, typer.Option("--private", help="Make the new repository private.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Upload to this branch in place of main.")] = None,
    message: Annotated[str, typer.Option(help="Title of the commit.")] = "Upload the model",
) -> None:
    """Publish a model on the Hugging Face Hub: weights, code, image processor, card and recipe, in one commit."""
    from .hub.export import publish, sort_files

    with user_errors():
        url = publish(folder, repo_id, private=private, revision=revision, commit_message=message)
        left_out = sort_files(folder)[1]
    if left_out:
        typer.echo(f"Not uploaded, because no part of a model repository: {', '.join(left_out)}", err=True)
    typer.echo(url)
