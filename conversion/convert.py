# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""`python conversion/convert.py FAMILY CHECKPOINT OUTPUT_DIR`: a published checkpoint as a ViTReg folder.

The whole procedure is `convert`: prepare, compare, write. One command a family; each hands over a `Prepared`.
"""

import contextlib
import sys
import time
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

from conversion import deit as deit_family
from conversion import deit3 as deit3_family
from conversion import dino as dino_family
from conversion import dinov2 as dinov2_family
from conversion import dinov3 as dinov3_family
from conversion import open_clip as open_clip_family
from conversion import parity, timm_models, transformers_hub, transformers_models, writing
from conversion import to_dinov2 as dinov2_export
from conversion import to_timm as timm_export
from conversion import to_transformers as transformers_export
from conversion.exporting import Written
from conversion.family import ConversionError, Family, KnownCheckpoint, Prepared
from conversion.published import known_checkpoints
from conversion.reading import progress_console, read_leaves
from conversion.recognize import hint
from hf_vitreg.atomic import atomic_file, atomic_folder
from hf_vitreg.hub.export import PRETRAINING_HEADS


app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, add_completion=False)
console = Console()

# What `--list` prints: all that a family knows by name.
LISTS: list[Callable[[], list[KnownCheckpoint]]] = [
    partial(known_checkpoints, dino_family.FAMILY),
    partial(known_checkpoints, dinov2_family.FAMILY),
    partial(known_checkpoints, dinov3_family.FAMILY),
    partial(known_checkpoints, deit_family.FAMILY),
    partial(known_checkpoints, deit3_family.FAMILY),
    open_clip_family.known,
    timm_models.known_checkpoints,
    transformers_hub.known_checkpoints,
]

Model = Annotated[str, typer.Argument(help="The folder of a ViTReg model, or its name on the Hub.")]
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


def convert(
    family: str, prepare: Callable[[], Prepared], output_dir: Path, overwrite: bool, inputs: list[str]
) -> dict:
    """Prepares, compares and, where the two implementations agree, writes. Returns the record of the conversion.

    Args:
        family: The name of its command.
        prepare: Reads the user's files, see the families.
        output_dir: The folder to write.
        overwrite: Whether it may replace one that is not empty.
        inputs: Files that it must not contain, the checkpoint first.

    Raises:
        ConversionError: with nothing written.
    """
    writing.check_output_dir(output_dir, overwrite, [Path(path) for path in inputs])
    with _pointing_to_the_right_family(family, inputs):
        prepared = prepare()
    ours = prepared.implementation or parity.vitreg_outputs(prepared.model)
    vision_config = getattr(prepared.model.config, "vision_config", prepared.model.config)
    started = time.perf_counter()
    rows = parity.compare(ours, prepared.reference, prepared.sizes, vision_config.num_channels)
    seconds = time.perf_counter() - started
    console.print(parity.table(rows, prepared.reference_name))
    parity.check(rows, prepared.reference_name)
    record = writing.write(prepared, rows, seconds, output_dir)
    _say(f"Converted: {prepared.sources[0]['backbone']} of {prepared.sources[0]['file']}.")
    _say(f"Left aside: {', '.join(record['left_aside']) or 'nothing'}.")
    for remark in prepared.remarks:
        _say(remark)
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
    with progress_console.status("Counting parameters"):
        checkpoints = [known for known_of_family in LISTS for known in known_of_family()]
    for known in checkpoints:
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
    _run("dino", dino_family.prepare, options, output_dir, overwrite, inputs=[checkpoint, linear_head])


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
    _run("dinov2", dinov2_family.prepare, options, output_dir, overwrite, inputs=[checkpoint, linear_head])


@app.command()
def dinov3(
    checkpoint: _checkpoint("dinov3_vits16 or dinov3_vitl16_sat493m"),
    output_dir: OutputDir,
    arch: _arch(dinov3_family.FAMILY) = None,
    linear_head: Annotated[
        str | None, typer.Option(help="A file: a linear head on CLS and the mean of the patches.")
    ] = None,
    pretrained_on: Annotated[
        str | None,
        typer.Option(
            help="lvd1689m (web images) or sat493m (satellite images): the statistics that images are normalized "
            "with. Default: those of the published file, else lvd1689m."
        ),
    ] = None,
    layer_norm_eps: Annotated[
        float | None, typer.Option(help="For your own training runs. Default: as published, 1e-5.")
    ] = None,
    overwrite: Overwrite = False,
    base_url: BaseUrl = None,
    cache_dir: CacheDir = None,
    license: WeightsLicense = None,
):
    """DINOv3 S to 7B, of web and of satellite images: backbones, training checkpoints, linear heads."""
    options = _options(locals(), "output_dir", "overwrite")
    _run("dinov3", dinov3_family.prepare, options, output_dir, overwrite, inputs=[checkpoint, linear_head])


@app.command()
def deit(
    checkpoint: _checkpoint("deit_small_distilled_patch16_224"),
    output_dir: OutputDir,
    arch: _arch(deit_family.FAMILY) = None,
    image_size: ImageSize = None,
    overwrite: Overwrite = False,
    base_url: BaseUrl = None,
    cache_dir: CacheDir = None,
    license: WeightsLicense = None,
):
    """DeiT tiny, small and base, plain and distilled: classifiers of ImageNet-1k, training checkpoints."""
    options = _options(locals(), "output_dir", "overwrite")
    _run("deit", deit_family.prepare, options, output_dir, overwrite, inputs=[checkpoint])


@app.command()
def deit3(
    checkpoint: _checkpoint("deit_3_base_224_21k"),
    output_dir: OutputDir,
    arch: _arch(deit3_family.FAMILY) = None,
    image_size: ImageSize = None,
    overwrite: Overwrite = False,
    base_url: BaseUrl = None,
    cache_dir: CacheDir = None,
    license: WeightsLicense = None,
):
    """DeiT-III S, M, B, L and H: classifiers of ImageNet-1k, training checkpoints."""
    options = _options(locals(), "output_dir", "overwrite")
    _run("deit3", deit3_family.prepare, options, output_dir, overwrite, inputs=[checkpoint])


@app.command("open_clip")
def open_clip(
    checkpoint: _checkpoint("ViT-B-32/openai"),
    output_dir: OutputDir,
    arch: _arch(open_clip_family.FAMILY) = None,
    quick_gelu: Annotated[
        bool | None,
        typer.Option(
            help="The activation, which the weights do not show: QuickGELU (as OpenAI's models have it) or GELU. "
            "Default: that of the published name, of --arch or of OpenAI's own state dicts, else GELU."
        ),
    ] = None,
    vision_only: Annotated[
        bool, typer.Option("--vision-only", help="Leave the text tower aside: a ViTReg with its projection.")
    ] = False,
    image_size: ImageSize = None,
    overwrite: Overwrite = False,
    base_url: Annotated[
        str | None, typer.Option(help="Of the Hub that published names are downloaded from. Default: HF_ENDPOINT.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where downloads go. Default: the Hub's cache.", show_default=False)
    ] = None,
    license: WeightsLicense = None,
):
    """OpenCLIP and OpenAI's CLIP, ViT-B to bigG: both towers as a dual encoder, training checkpoints."""
    options = _options(locals(), "output_dir", "overwrite")
    _run("open_clip", open_clip_family.prepare, options, output_dir, overwrite, inputs=[checkpoint])


@app.command()
def timm(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A published name, with or without its tag, e.g. vit_betwixt_patch16_reg4_gap_256; a repository of "
            "the Hub or a folder in timm's layout; or a weight file, together with --arch."
        ),
    ],
    output_dir: OutputDir,
    arch: Annotated[
        str | None, typer.Option(help="Of a weight file: timm's name of its architecture, e.g. vit_base_patch16_224.")
    ] = None,
    overwrite: Overwrite = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Where downloads go. Default: the Hub's cache.")] = None,
    license: WeightsLicense = None,
):
    """Vision transformers of timm, with and without registers: DINOv2, DeiT, CLIP, SigLIP, sbb and many more."""
    options = _options(locals(), "output_dir", "overwrite")
    _run("timm", timm_models.prepare, options, output_dir, overwrite, inputs=[checkpoint])


@app.command("to-timm")
def to_timm(
    model: Model,
    output: Annotated[
        Path,
        typer.Argument(help="A folder to write, or one weight file: .safetensors, .pth, .pt or .bin."),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT where it exists.")] = False,
):
    """A ViTReg model in the layout of timm, compared with timm's model before it is written."""
    with _errors_in_one_line():
        timm_export.check_output(model, output, overwrite)
        export = timm_export.prepare(model, output)
        rows = parity.compare(export.implementation, export.reference, export.sizes, export.num_channels)
        console.print(parity.table(rows, export.reference_name))
        parity.check(rows, export.reference_name)
        timm_export.write(export, rows, output)
        for remark in export.remarks:
            _say(remark)
        _say(f"{output}: {export.architecture}. Load it in Python:")
        _say(export.how_to_load(output))


@app.command()
def transformers(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A folder that a model of transformers was saved to, or a repository of the Hub, e.g. "
            "facebook/dinov2-with-registers-small."
        ),
    ],
    output_dir: OutputDir,
    interpolate_antialias: Annotated[
        bool | None,
        typer.Option(help="How position embeddings are interpolated. Default: as transformers does it for the model."),
    ] = None,
    interpolate_offset: Annotated[
        float | None,
        typer.Option(
            help="Likewise. 0.1 is that of the original DINOv2 without registers. Default: 0, transformers'."
        ),
    ] = None,
    overwrite: Overwrite = False,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where downloads go. Default: the Hub's cache.", show_default=False)
    ] = None,
    license: WeightsLicense = None,
):
    """Models that transformers saved: ViT, DeiT, DINOv2, DINOv3 and CLIP's vision tower, and their classifiers."""
    options = _options(locals(), "output_dir", "overwrite")
    folder = checkpoint if Path(checkpoint).exists() else None
    _run("transformers", transformers_models.prepare, options, output_dir, overwrite, inputs=[folder])


@app.command("to-transformers")
def to_transformers(model: Model, output_dir: OutputDir, overwrite: Overwrite = False):
    """A ViTReg model as transformers' own DINOv2, with or without registers: loads without trust_remote_code."""
    with _errors_in_one_line():
        writing.check_output_dir(output_dir, overwrite, _local(model))
        with atomic_folder(output_dir) as folder:
            written = transformers_export.write(model, folder)
            _compare(written)
        _say_what_was_written(written, output_dir)


@app.command("to-dinov2")
def to_dinov2(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The .pth file to write.")],
    with_heads: Annotated[
        bool,
        typer.Option(
            "--with-heads",
            help="Write a teacher checkpoint, with the projection heads that the original training left beside MODEL.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT where it exists.")] = False,
):
    """A ViTReg model as a state dict of the original DINOv2, compared with timm's model before it is in its place."""
    with _errors_in_one_line():
        writing.check_output_file(output, overwrite, _local(model))
        with atomic_file(output) as file:
            written = dinov2_export.write(model, file, with_heads)
            _compare(written)
        _say_what_was_written(written, output)


def _local(model: str) -> list[Path]:
    """The folder of the model, where it is no repository of the Hub."""
    return [Path(model)] if Path(model).exists() else []


def _compare(written: Written):
    """Raises `ConversionError` where what was written is not the same model."""
    rows = parity.compare(written.implementation, written.reference, written.sizes, written.num_channels)
    console.print(parity.table(rows, written.reference_name))
    parity.check(rows, written.reference_name)


def _say_what_was_written(written: Written, output: Path):
    _say(f"Left aside: {', '.join(written.left_aside) or 'nothing'}.")
    for remark in written.remarks:
        _say(remark)
    _say(f"{output}: {written.what}, {written.num_tensors} tensors.")


def _options(given: dict, *not_of_the_family: str) -> dict:
    """The arguments of a command that its family wants."""
    return {name: value for name, value in given.items() if name not in not_of_the_family}


def _run(
    family: str,
    prepare: Callable[..., Prepared],
    options: dict,
    output_dir: Path,
    overwrite: bool,
    inputs: list[str | None],
):
    given = [path for path in inputs if path is not None]
    with _errors_in_one_line():
        convert(family, partial(prepare, **options), output_dir, overwrite, given)


@contextlib.contextmanager
def _pointing_to_the_right_family(family: str, inputs: list[str]) -> Iterator[None]:
    """Adds to an error what the checkpoint could be converted by, where its names say so."""
    try:
        yield
    except ConversionError as error:
        if "convert.py" in str(error) or not inputs or not Path(inputs[0]).is_file():
            raise
        try:
            better = hint(read_leaves(Path(inputs[0])), family)
        except ConversionError:  # it is what the first error says
            raise error from None
        separator = "\n" if "\n" in str(error) else " "
        raise ConversionError(f"{error}{separator if better else ''}{better}") from error


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
