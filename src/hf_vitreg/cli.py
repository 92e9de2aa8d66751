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


# names of options can be written as the scripts have them, too: --update_card
UNDERSCORES = {"token_normalize_func": lambda name: name.replace("_", "-")}
# what is read by some tasks alone, by headings of the help
KNN, LINEAR, ZERO_SHOT, OOD = "knn", "linear", "zero_shot", "out_of_distribution"
DENSE, OBJECTS = "segmentation and depth", "object_discovery"
# what is no option of a task
NO_OPTIONS = {"model", "task", "data", "output", "update_card", "device", "overwrite"}
# what is read by some ways to registers alone, and what is no setting of them
TEST_TIME, TRAINED = "test-time", "warm-start and distill"
NO_SETTINGS = {"model", "output", "method", "images", "arguments", "device", "overwrite"}


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


@app.command(context_settings=UNDERSCORES)
def inspect(
    model: Annotated[
        str, typer.Argument(help="Any ViT: a folder, a Hub repository, timm:NAME; or a folder of checkpoints.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="REPORT_DIR",
            help="Where the report goes; with --weights-only none is needed.",
            show_default="required",
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder, file or pattern in quotes. Can be given several times. With --weights-only optional."
        ),
    ] = None,
    weights_only: Annotated[
        bool,
        typer.Option(
            "--weights-only",
            help="Where the weights alone say that artifacts point (SINDER); with images, how well they say it.",
        ),
    ] = False,
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
    options = {
        "threshold": threshold,
        "side": side,
        "layer": layer,
        "size": size,
        "max_images": max_images,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
        "overwrite": overwrite,
        "progress": True,
    }
    if weights_only:
        if compare or checkpoints or all_layers:
            raise typer.BadParameter("--weights-only goes without --compare, --checkpoints and --all-layers.")
        return _inspect_weights(model, output, images, options)
    if not images:
        raise typer.BadParameter("give some, or --weights-only.", param_hint="'--images'")
    if output is None:
        raise typer.BadParameter("give a folder for the report.", param_hint="'--output'")
    from .analysis.report import inspect_model

    with user_errors():
        report = inspect_model(
            model, images, output, compare=compare, checkpoints=checkpoints, all_layers=all_layers, **options
        )
    for name, verdict in zip((model, compare), report.verdicts):
        typer.echo(f"{name}: {' '.join(verdict)}")
    if report.num_unreadable:
        typer.echo(f"{report.num_unreadable} images could not be used; the report names them.", err=True)
    typer.echo(report.page)


def _inspect_weights(model: str, output: Path | None, images: list[str] | None, options: dict) -> None:
    from .analysis.defect_report import inspect_weights

    with user_errors():
        report = inspect_weights(model, output, images, **options)
    report.show()
    typer.echo(f"{model}: {' '.join(report.verdict)}")
    if report.page:
        typer.echo(report.page)


@app.command(context_settings=UNDERSCORES)
def registers(
    model: Annotated[str, typer.Argument(help="A ViTReg of any head, without registers: a folder, a Hub repository.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="Where the model with registers goes.")],
    method: Annotated[
        str,
        typer.Option(
            metavar="test-time|distill|warm-start",
            help="test-time: by register neurons, nothing is trained; distill: by a short training on images; "
            "warm-start: new ones, to train on from.",
        ),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-- FLAGS]", help="distill: flags of pretrain.py.")
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(help="Folder, file or pattern in quotes, some hundred images. Can be given several times."),
    ] = None,
    num_registers: Annotated[
        int | None,
        typer.Option(help="How many.", show_default="test-time: 1, warm-start: 4, distill: the recipe's"),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            parser=_threshold,
            metavar="NUMBER|mean+3std|mad|otsu",
            help="Norm of an outlier, in search and comparison.",
            show_default="the preset's; else mean+3std and mad",
        ),
    ] = None,
    detect_layer: Annotated[
        int | None,
        typer.Option(
            help="After which layer outliers are looked for, from 0, or from the end with -1 the last.",
            show_default="the preset's; else -1",
        ),
    ] = None,
    side: Annotated[
        str, typer.Option(metavar="high|low", help="Of the threshold that outliers are on; test-time: high.")
    ] = "high",
    size: Annotated[
        str | None,
        typer.Option(parser=_size, metavar="PIXELS|HEIGHTxWIDTH", help="Of the images; by default as trained."),
    ] = None,
    max_images: Annotated[int, typer.Option(help="Take a random sample of so many to look at.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Images at once; results are the same.")] = 16,
    seed: Annotated[int, typer.Option(help="Of samples and of new registers.")] = 0,
    cls_tolerance: Annotated[
        float, typer.Option(help="No success where 1 less the mean cosine of CLS before and after is more.")
    ] = 0.1,
    min_fall: Annotated[float, typer.Option(help="No success where a smaller share of the outliers is gone.")] = 0.5,
    license: Annotated[
        str | None, typer.Option(help="Of the weights, for the card.", show_default="the old card's, or apache-2.0")
    ] = None,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:1; by default a GPU where there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
    preset: Annotated[
        str,
        typer.Option(
            metavar="auto|dinov2-large|openclip-base",
            help="Published settings, with -code at the end those of the released code; or auto, which finds some.",
            rich_help_panel=TEST_TIME,
        ),
    ] = "auto",
    highest_layer: Annotated[
        int | None,
        typer.Option(
            help="Take neurons of this layer, from 0, and those before it.",
            show_default="the preset's, or where outliers come up",
            rich_help_panel=TEST_TIME,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            help="How many neurons.", show_default="the preset's, or as many as it takes", rich_help_panel=TEST_TIME
        ),
    ] = None,
    target_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the patches that may stay outliers, where the number of neurons is looked for.",
            show_default="a twentieth of what there is",
            rich_help_panel=TEST_TIME,
        ),
    ] = None,
    reduce: Annotated[
        str,
        typer.Option(
            metavar="neuron|layer",
            help="What a register receives: of each neuron its largest activation, or one number for all of a layer.",
            rich_help_panel=TEST_TIME,
        ),
    ] = "neuron",
    only_sparse: Annotated[
        bool,
        typer.Option(
            "--only-sparse",
            help="Count a neuron only in images where it is below 0.5 in half of the tokens.",
            rich_help_panel=TEST_TIME,
        ),
    ] = False,
    register_init_std: Annotated[
        float | None,
        typer.Option(
            help="Standard deviation of new registers.",
            show_default="warm-start: the config's, distill: the recipe's",
            rich_help_panel=TRAINED,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="distill: of pretrain.py.",
            show_default="recipes/pretrain/post_hoc_registers.yaml",
            rich_help_panel=TRAINED,
        ),
    ] = None,
) -> None:
    """Give registers to a ViT that was trained without, and tell whether its artifacts went and CLS stayed."""
    given = {name: value for name, value in locals().items() if name not in NO_SETTINGS}
    from .registers.give import give_registers
    from .registers.options import RegisterOptions

    with user_errors():
        options = RegisterOptions(**{**given, "arguments": tuple(arguments or ())})
        done = give_registers(
            model, output, method, images, options, device=device, overwrite=overwrite, progress=True
        )
    for sentence in done.sentences():
        typer.echo(sentence)
    if done.effect is not None:
        typer.echo(done.comparison)
    typer.echo(done.folder)


def _named(texts: list[str] | None) -> dict[str, str]:
    """ "sketches=DIR" as name and place."""
    pairs = [text.partition("=") for text in texts or ()]
    for name, equals, place in pairs:
        if not (name and equals and place):
            raise typer.BadParameter(f"{name}{equals}{place!r} is not NAME=PATH, as sketches=data/sketches.")
    named = {name: place for name, _, place in pairs}
    if len(named) < len(pairs):
        raise typer.BadParameter(f"Two of {', '.join(texts)} have one name.")
    return named


def _numbers(text: str) -> tuple[int, ...]:
    """ "10,20,100"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers: give them as 10,20,100.") from None


def _words(text: str) -> tuple[str, ...]:
    """ "cls,registers"."""
    return tuple(text.split(","))


@app.command(context_settings=UNDERSCORES)
def evaluate(
    model: Annotated[str, typer.Argument(help="Any ViT: a folder, a Hub repository, timm:NAME.")],
    task: Annotated[
        str,
        typer.Option(
            metavar="TASK",
            help="knn, linear, logistic, zero_shot, segmentation, depth, object_discovery or out_of_distribution.",
        ),
    ],
    data: Annotated[str, typer.Option(help="Images: a folder, parquet files, or a dataset on the Hub.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where results.json, pictures and heads go.")],
    validation_data: Annotated[str | None, typer.Option(help="Where validation images are, if elsewhere.")] = None,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Put the numbers into the model-index of the model's README.md.")
    ] = False,
    size: Annotated[
        str | None, typer.Option(parser=_size, metavar="PIXELS|HEIGHTxWIDTH", help="That the model sees.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Whose tokens, from 1; by default the last.")] = None,
    num_layers: Annotated[
        int, typer.Option(help="Of how many last layers patches are read.", rich_help_panel=DENSE)
    ] = 1,
    preprocessing: Annotated[
        str, typer.Option(metavar="crop|fit|stretch", help="crop: 256/224 of the size, then its centre, as DINOv2.")
    ] = "crop",
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 32,
    num_workers: Annotated[int | None, typer.Option(help="Threads that decode images.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep features here, for other tasks too.")] = None,
    max_images: Annotated[
        int | None, typer.Option(help="Take a random sample of so many of each split; of a stream the first.")
    ] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read the data as it comes.")] = False,
    skip_bad_images: Annotated[bool, typer.Option("--skip-bad-images", help="Leave out what cannot be read.")] = False,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    ks: Annotated[
        str | None, typer.Option(parser=_numbers, metavar="K,K,...", help="Neighbours.", rich_help_panel=KNN)
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the votes.", rich_help_panel=KNN)] = 0.07,
    num_epochs: Annotated[float, typer.Option(help="Passes over the training images.", rich_help_panel=LINEAR)] = 10,
    min_steps: Annotated[
        int, typer.Option(help="Steps at least, on however few images.", rich_help_panel=LINEAR)
    ] = 4000,
    selection: Annotated[
        str,
        typer.Option(
            metavar="validation|held_out", help="Images that the best head is chosen on.", rich_help_panel=LINEAR
        ),
    ] = "validation",
    templates: Annotated[
        Path | None, typer.Option(help="Prompt templates, one a line with {}.", rich_help_panel=ZERO_SHOT)
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="Class names, one a line.", rich_help_panel=ZERO_SHOT)
    ] = None,
    shifted: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Other images of the classes.", rich_help_panel=OOD)
    ] = None,
    outliers: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="Images of no class.", rich_help_panel=OOD)
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="folder, voc, ade20k or nyu; by default recognised.", rich_help_panel=DENSE)
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="segmentation: where no classes.txt names them.", rich_help_panel=DENSE)
    ] = None,
    ignore_index: Annotated[
        int, typer.Option(help="segmentation: value of pixels that do not count.", rich_help_panel=DENSE)
    ] = 255,
    depth_scale: Annotated[
        float, typer.Option(help="depth: what a PNG has for one metre.", rich_help_panel=DENSE)
    ] = 1000.0,
    num_steps: Annotated[int | None, typer.Option(help="Training steps.", rich_help_panel=DENSE)] = None,
    label_size: Annotated[
        str | None,
        typer.Option(parser=_size, metavar="PIXELS|HEIGHTxWIDTH", help="Of the loss.", rich_help_panel=DENSE),
    ] = None,
    min_depth: Annotated[
        float, typer.Option(help="depth: the nearest that counts, in metres.", rich_help_panel=DENSE)
    ] = 1e-3,
    max_depth: Annotated[
        float, typer.Option(help="depth: the farthest that counts, in metres.", rich_help_panel=DENSE)
    ] = 10.0,
    eigen_crop: Annotated[
        bool, typer.Option("--eigen-crop", help="depth: only the middle of NYU's images.", rich_help_panel=DENSE)
    ] = False,
    method: Annotated[
        str, typer.Option(metavar="lost|attention", help="How boxes are found.", rich_help_panel=OBJECTS)
    ] = "lost",
    facet: Annotated[
        str | None,
        typer.Option(metavar="query|key|value|output", help="By default by family.", rich_help_panel=OBJECTS),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Compare directions only.", rich_help_panel=OBJECTS)
    ] = False,
    bias: Annotated[float, typer.Option(help="Added to every similarity.", rich_help_panel=OBJECTS)] = 0.0,
    tune: Annotated[
        bool, typer.Option("--tune", help="Choose layer and bias on a share of the images.", rich_help_panel=OBJECTS)
    ] = False,
    tuning_share: Annotated[float, typer.Option(help="Which share.", rich_help_panel=OBJECTS)] = 0.2,
    split: Annotated[str, typer.Option(help="Of a VOC folder.", rich_help_panel=OBJECTS)] = "trainval",
    no_hard: Annotated[
        bool, typer.Option("--no-hard", help="Without difficult objects.", rich_help_panel=OBJECTS)
    ] = False,
    annotations: Annotated[Path | None, typer.Option(help="COCO's JSON.", rich_help_panel=OBJECTS)] = None,
    image_list: Annotated[Path | None, typer.Option(help="Which of COCO's images.", rich_help_panel=OBJECTS)] = None,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:1; by default a GPU where there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")] = False,
) -> None:
    """Evaluate a ViT as the papers do: results as JSON, pictures, and the trained heads."""
    given = {name: value for name, value in locals().items() if name not in NO_OPTIONS}
    from .evaluation.evaluate import evaluate_model
    from .evaluation.options import EvaluationOptions
    from .hub.card_results import add_results, require_card

    with user_errors():
        options = EvaluationOptions(**given | {"shifted": _named(shifted), "outliers": _named(outliers)})
        if update_card:
            require_card(model)
        done = evaluate_model(model, task, data, output, options, device=device, overwrite=overwrite, progress=True)
        if done is not None and update_card:
            add_results(model, done.results)
    if done is not None:
        for name, value in done.metrics.items():
            typer.echo(f"{name}: {value:.4f}")
        typer.echo(done.folder)


@app.command(context_settings=UNDERSCORES)
def features(
    model: Annotated[str, typer.Argument(help="Any ViT: a folder, a Hub repository, timm:NAME.")],
    images: Annotated[
        list[str],
        typer.Option(
            help="Folder, file or pattern in quotes, of images, parquet files or tars; or a dataset on the Hub. Can "
            "be given several times."
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Ends in .parquet, an image a row, or in .safetensors, stacked.")
    ],
    tokens: Annotated[
        str, typer.Option(parser=_words, metavar="KIND,KIND,...", help="Of cls, registers, patches and patch_mean.")
    ] = "cls",
    layer: Annotated[int | None, typer.Option(help="Whose tokens, from 1; by default the last.")] = None,
    dtype: Annotated[str, typer.Option(metavar="float32|float16", help="Of the file.")] = "float32",
    size: Annotated[
        str | None,
        typer.Option(parser=_size, metavar="PIXELS|HEIGHTxWIDTH", help="That the model sees; by default as trained."),
    ] = None,
    keep_size: Annotated[
        bool, typer.Option("--keep-size", help="Every image at its own size, to the nearest whole patches.")
    ] = False,
    max_side: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="With --keep-size: scale larger images down.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 32,
    num_workers: Annotated[int | None, typer.Option(help="Threads that decode images.")] = None,
    optimize: Annotated[
        str | None,
        typer.Option(
            metavar="float32|bfloat16|int8",
            help="Compile a ViTReg, in half a minute, and compute in this; by default it computes as it is.",
        ),
    ] = None,
    skip_bad_images: Annotated[bool, typer.Option("--skip-bad-images", help="Leave out what cannot be read.")] = False,
    split: Annotated[str, typer.Option(help="Of a dataset on the Hub.")] = "train",
    config_name: Annotated[str | None, typer.Option(help="Of a dataset on the Hub.")] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Of a table; by default the only one with images.", show_default=False)
    ] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read tables as they come.")] = False,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:1; by default a GPU where there is one.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there, and what was begun with other options.")
    ] = False,
) -> None:
    """Write the features of many images to a file; started again, it goes on where it was stopped."""
    given = {name: value for name, value in locals().items() if name not in NO_OPTIONS | {"images"}}
    from .deployment.extract import FeatureOptions, extract_features

    with user_errors():
        options = FeatureOptions(**given)
        done = extract_features(model, images, output, options, device=device, overwrite=overwrite, progress=True)
    for reason in done.left_out.values():
        typer.echo(f"Left out: {reason}", err=True)
    if done.left_out:
        typer.echo(f"Left out: {len(done.left_out)} in all.", err=True)
    typer.echo(done.sentence())
    typer.echo(done.path)


@app.command(context_settings=UNDERSCORES)
def reproduce(
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="table1 to table5, figure8 or local_probes, of the registers paper.")
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=DIR_OR_ID", help="A model by the table's name for it. Can be given several times."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="A data set by the table's name for it. Can be given several times."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results.json, table.md and evaluations go.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(parser=_size, metavar="PIXELS|HEIGHTxWIDTH", help="In place of the table's.")
    ] = None,
    max_images: Annotated[int | None, typer.Option(help="Labelled images: a random sample of each split.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Tables of tokens: norm of an outlier.")] = None,
    class_names: Annotated[Path | None, typer.Option(help="Zero-shot: class names, one a line.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 32,
    num_workers: Annotated[int | None, typer.Option(help="Threads that decode images.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Keep features here, for other tables too.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:1; by default a GPU where there is one.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Take what was measured here on the same models, data and options.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")] = False,
) -> None:
    """Run a table of "Vision Transformers Need Registers", and print ours beside the published numbers.

    Without models and data it prints the published table, and what is needed to run it.
    """
    from .evaluation.reproduce import reproduce as run
    from .evaluation.table_jobs import ReproduceOptions

    with user_errors():
        options = ReproduceOptions(
            size=size,
            max_images=max_images,
            threshold=threshold,
            class_names=class_names,
            batch_size=batch_size,
            num_workers=num_workers,
            cache_dir=cache_dir,
            seed=seed,
        )
        reproduced = run(
            table,
            _named(model),
            _named(data),
            output,
            options,
            device=device,
            resume=resume,
            overwrite=overwrite,
            progress=True,
        )
        if reproduced is not None:
            reproduced.show()
    if reproduced is not None and reproduced.count("failed"):
        raise typer.Exit(1)


@app.command(context_settings=UNDERSCORES)
def export(
    model: Annotated[str, typer.Argument(help="A ViTReg of any head, or a dual encoder: a folder, a Hub repository.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT.onnx|OUT.pt2", help="ONNX, or a program of torch.export; the name chooses.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write a ViTReg to a file that needs none of its code, for every batch and image size, and compare it with torch.

    Registers and patches are outputs of their own.
    """
    from .deployment.export import check_output, export_model
    from .registers.source import load_source

    with user_errors():
        check_output(output, overwrite)
        source = load_source(model)
        done = export_model(source.model, output, source.image_processor, overwrite)
    shapes = " and ".join("x".join(map(str, shape)) for shape in done.shapes)
    typer.echo(f"Outputs: {', '.join(done.outputs)}. On images of {shapes} within {done.difference:.0e} of torch.")
    typer.echo(done.path)


@app.command(context_settings=UNDERSCORES)
def benchmark(
    model: Annotated[str, typer.Argument(help="A ViTReg of any head, or a dual encoder: a folder, a Hub repository.")],
    size: Annotated[str, typer.Option(parser=_size, metavar="PIXELS|HEIGHTxWIDTH", help="Of the images.")] = "224",
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 8,
    dtype: Annotated[
        str, typer.Option(parser=_words, metavar="DTYPE,DTYPE,...", help="Of float32, bfloat16 and int8.")
    ] = "float32,bfloat16,int8",
    rounds: Annotated[int, typer.Option(help="In which all take turns.")] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers, too.")] = None,
    device: Annotated[str | None, typer.Option(help="As cpu or cuda:1; by default a GPU where there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Time a ViTReg as transformers loads it, optimized and in int8, beside what this machine reaches at best.

    The limit is what matrix products reach. Outputs are compared first: what is beyond its tolerance has no time.
    """
    from .deployment.benchmark import BenchmarkOptions, benchmark_model, check_json
    from .machine import usable_device
    from .registers.source import load_source

    with user_errors():
        options = BenchmarkOptions(size=size, batch_size=batch_size, dtype=dtype, rounds=rounds)
        if json_file:
            check_json(json_file, overwrite)
        source = load_source(model, usable_device(device))
        done = benchmark_model(source.vision, options, progress=True)
        if json_file:
            done.write(json_file)
    done.show()
    if done.has_errors:
        raise typer.Exit(1)


@app.command(context_settings=UNDERSCORES)
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
