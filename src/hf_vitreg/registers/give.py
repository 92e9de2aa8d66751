# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Registers for a model without, from its name to a model repository that says whether it worked."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from ..analysis.image_files import ImageFiles, find_images
from ..analysis.report import PAGE, write_report
from ..analysis.run import Run
from ..atomic import atomic_folder
from ..distributed import forked_rng
from ..features import quiet_loading
from ..hub.card import CardFacts
from ..hub.export import CONFIG, write_model_repository
from ..machine import describe_machine, memory_errors, usable_device
from ..modeling_vitreg import ViTRegPreTrainedModel
from .distill import distilled, train, training_command
from .effect import Effect, measure_effect
from .neuron_record import neurons_json, neurons_picture
from .options import RegisterOptions, require_options_of
from .register_neurons import RegisterNeurons, find_register_neurons
from .source import Source, load_source
from .test_time import with_test_time_registers
from .warm_start import add_registers


COMPARISON = "inspection"  # names photographs of the user, so that no card links to it and nothing publishes it
NEURONS, PICTURE, CURVES, RECIPE = "register_neurons.json", "register_neurons.png", "curves.png", "recipe.yaml"
NUM_REGISTERS = {"test-time": 1, "warm-start": 4}


@dataclass(frozen=True, eq=False)
class Given:
    """A model that got registers.

    Attributes:
        folder: Where it is.
        about: What was done, in sentences.
        effect: What it changed; `None` where there were no images.
        next_steps: In sentences.
    """

    folder: Path
    about: str
    effect: Effect | None
    next_steps: tuple[str, ...]

    @property
    def comparison(self) -> Path:
        """The page of the comparison, where there is one."""
        return self.folder / COMPARISON / PAGE

    def sentences(self) -> list[str]:
        """What was done, whether it worked, what comes next."""
        verdict = ["Not compared with the model before: no images were given."]
        return [self.about, *(self.effect.sentences() if self.effect else verdict), *self.next_steps]


@dataclass(frozen=True, eq=False)
class _Made:
    """What a method makes of a source, and says of it; `remarks` is Markdown, for the card alone."""

    vision: ViTRegPreTrainedModel
    about: str
    remarks: str = ""
    next_steps: tuple[str, ...] = ()
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)


def give_registers(
    model: str | Path,
    output: str | Path,
    method: str,
    images: Sequence[str | Path] | None = None,
    options: RegisterOptions | None = None,
    *,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Given:
    """Gives registers to a ViTReg and compares it with what it was: what `hf-vitreg registers` does.

    It writes a model repository, with the numbers of the comparison in its card, and the comparison itself, as
    `hf-vitreg inspect --compare` writes it, in `inspection` there. Of `test-time` and `warm-start` it is all or
    nothing; to distill, pretrain.py trains in `output`, which keeps its checkpoints.

    Args:
        model: As for `load_source`; whatever heads it has, it keeps.
        output: Folder of the new model.
        method: `"test-time"` (`registers.test_time`), `"distill"` (`objectives.post_hoc`) or `"warm-start"`
            (`registers.warm_start`), after which the model is to be trained on.
        images: As for `find_images`; for a warm start there may be none.
        options: Of the method and the comparison.
        device: Where to compute; by default a GPU where there is one.
        overwrite: Replace a model that is there, with everything in its folder.
        progress: Show progress bars on stderr.

    Raises:
        ValueError: for whatever cannot be used, before anything is computed where that can be known.
        OSError: where the model cannot be written.
    """
    output, options, images = Path(output), options or RegisterOptions(), list(images or ())
    require_options_of(method, options, bool(images))
    check_output(output, method, overwrite, [model, *images, *([options.recipe] if options.recipe else [])])
    if options.license is not None:
        CardFacts(name=output.name, license=options.license)
    chosen = usable_device(device)
    found = find_images(images, options.max_images, options.seed) if images else None
    with quiet_loading(), memory_errors():
        source = load_source(model, chosen)
        if found is not None:
            _require_comparable(source, found, options)
        if method == "distill":
            train(training_command(source, output, images, options, chosen, overwrite))
            made = _distilled(source, output)
        elif method == "test-time":
            made = _at_test_time(source, found, options, progress)
        else:
            made = _for_warm_start(source, output, options)
        effect = _measured(source, made, output, found, options, progress) if found is not None else None
        command = f"hf-vitreg registers {shlex.join([str(model), str(output), '--method', method])}"
        command += "".join(f" --images {shlex.quote(str(each))}" for each in images)
        flags = options.flags()
        facts = _card_facts(source, output, made, effect, options, f"{command} {flags}".strip(), chosen)
        if method == "distill":
            _write(output, source, made, facts, effect)
        else:
            with atomic_folder(output) as folder:
                _write(folder, source, made, facts, effect)
    return Given(output, made.about, effect, made.next_steps)


def check_output(output: Path, method: str, overwrite: bool, inputs: Sequence[str | Path] = ()) -> None:
    """Raises `ValueError` where a model may not be written: nothing but a model is ever replaced, and no input."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file. Give a folder for the model.")
    for path in (Path.cwd(), *map(Path, inputs)):
        if path.resolve().is_relative_to(output.resolve()):
            raise ValueError(f"{output} holds {path}, which would be replaced. Give a folder of its own.")
    # of a training that is to go on, pretrain.py says whether it may
    if method == "distill" or not output.is_dir() or not any(output.iterdir()):
        return
    if not (output / CONFIG).is_file():
        raise ValueError(f"{output} holds other things than a model. Give a new folder.")
    if not overwrite:
        raise ValueError(f"There is a model in {output} already. Give a new folder, or --overwrite.")


def _comparison(options: RegisterOptions, source: Source) -> dict:
    """Which patches are outliers, as arguments of `measure_effect`."""
    published = options.published()
    threshold = published.get("threshold", "mad") if options.threshold is None else options.threshold
    return {
        "threshold": threshold,
        "side": options.side,
        "layer": source.encoder().layer_index(_detect_layer(options)) + 1,
        "size": options.size,
        "batch_size": options.batch_size,
        "seed": options.seed,
    }


def _detect_layer(options: RegisterOptions) -> int:
    return options.published().get("detect_layer", -1) if options.detect_layer is None else options.detect_layer


def _require_comparable(source: Source, images: ImageFiles, options: RegisterOptions) -> None:
    """Raises `ValueError` now for what the comparison would refuse after a training."""
    Run(source.encoder(), images, **_comparison(options, source), progress=False)


def _measured(
    source: Source, made: _Made, output: Path, images: ImageFiles, options: RegisterOptions, progress: bool
) -> Effect:
    return measure_effect(
        source.encoder(),
        source.encoder(made.vision, str(output)),
        images,
        cls_tolerance=options.cls_tolerance,
        min_fall=options.min_fall,
        progress=progress,
        **_comparison(options, source),
    )


# Methods


def _at_test_time(source: Source, images: ImageFiles, options: RegisterOptions, progress: bool) -> _Made:
    given = {
        "threshold": options.threshold,
        "detect_layer": options.detect_layer,
        "highest_layer": options.highest_layer,
        "num_neurons": options.count,
        "target_share": options.target_share,
    }
    number = options.num_registers or NUM_REGISTERS["test-time"]
    found = find_register_neurons(
        source.encoder(),
        images,
        **{**options.published(), **{name: value for name, value in given.items() if value is not None}},
        num_registers=number,
        reduce=options.reduce,
        only_sparse=options.only_sparse,
        size=options.size,
        batch_size=options.batch_size,
        progress=progress,
    )
    vision = with_test_time_registers(source.vision, found.neurons, number, options.reduce, copy_weights=False)
    return _Made(
        vision.eval(),
        about=_about_neurons(found, number),
        remarks='After "Vision Transformers Don\'t Need Trained Registers" (Jiang et al., 2025). '
        f"[{NEURONS}]({NEURONS}) has the neurons and their scores.\n\n![Scores of neurons by layer]({PICTURE})",
        files={NEURONS: neurons_json(found), PICTURE: neurons_picture(found)},
    )


def _about_neurons(found: RegisterNeurons, num_registers: int) -> str:
    layers = sorted(layer for layer, neurons in found.neurons.items() if neurons)
    where = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
    neurons, writes = _counted(len(found.ranking), "register neuron"), "writes" if len(found.ranking) == 1 else "write"
    about = (
        f"{_counted(num_registers, 'test-time register')}, which {neurons} of {where}, counted from 0, {writes} into "
        f"and no more into patches; found on {found.num_images} images. No weight was changed."
    )
    if found.reaches_target is False:
        about += (
            f" In the search {100 * found.shifted_share:.3g} % of the patches were left beyond the threshold, and no "
            f"number of neurons that was tried reached the {100 * found.target_share:.3g} % that it looked for."
        )
    return about


def _for_warm_start(source: Source, output: Path, options: RegisterOptions) -> _Made:
    number = options.num_registers or NUM_REGISTERS["warm-start"]
    std = source.vision.config.register_init_std if options.register_init_std is None else options.register_init_std
    with forked_rng(options.seed):
        vision = add_registers(source.vision, number, std)
    folder = shlex.quote(str(output))
    return _Made(
        vision.eval(),
        about=f"{_counted(number, 'new register')}, drawn with a standard deviation of {std:g} and not trained yet: "
        "outliers stay until training moves them.",
        next_steps=(
            f"Train it on: accelerate launch pretrain.py --config RECIPE --model_name_or_path {folder} --output_dir "
            "TRAINED, or finetune.py with the same flags; both log the share of outliers at every evaluation.",
            "Then see whether the registers have taken over: "
            f"hf-vitreg inspect {shlex.quote(source.name)} --compare TRAINED --images IMAGES --output REPORT_DIR",
        ),
    )


def _distilled(source: Source, output: Path) -> _Made:
    vision = distilled(source, output)
    number = vision.config.num_register_tokens
    recipe = (output / RECIPE).read_text(encoding="utf-8")
    return _Made(
        vision,
        about=f"{_counted(number, 'register')} distilled from the model's own features, averaged over shifted views.",
        remarks='After "Vision Transformers with Self-Distilled Registers" (Chen et al., 2025).',
        files={RECIPE: recipe},
        facts={"recipe": yaml.safe_load(recipe), "curves": CURVES},
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


# Writing


def _card_facts(
    source: Source,
    output: Path,
    made: _Made,
    effect: Effect | None,
    options: RegisterOptions,
    command: str,
    device: torch.device,
) -> CardFacts:
    origin = dict(source.origin)
    if not Path(source.name).exists():
        origin["base_model"] = source.name
    if options.license is not None:
        origin = {"license": options.license, **{name: origin[name] for name in ("base_model",) if name in origin}}
    measured = "It was not compared with the model before."
    if effect is not None:
        measured = f"{effect.markdown()} Computed on {describe_machine(device)}."
    notes = [f"{made.about} {made.remarks}".strip(), "### Before and after", measured]
    return CardFacts(name=output.resolve().name, command=command, notes="\n\n".join(notes), **{**origin, **made.facts})


def _write(folder: Path, source: Source, made: _Made, facts: CardFacts, effect: Effect | None) -> None:
    write_model_repository(
        folder,
        source.with_vision(made.vision),
        source.image_processor,
        facts,
        made.files,
        tokenizer=source.tokenizer,
    )
    if effect is not None:
        write_report(folder / COMPARISON, effect.before, compare=effect.after, overwrite=True)
