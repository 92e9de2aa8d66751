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
