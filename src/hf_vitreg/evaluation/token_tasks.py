# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What single tokens tell, from a model and a data set to a folder of results."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..atomic import atomic_folder
from ..data.image_data import content_hash
from ..data.labelled_images import MappedImages, load_image_data
from ..features import VisionEncoder, quiet_loading
from ..machine import describe_machine, memory_errors, package_versions, usable_device
from .evaluate import RESULTS, RESULTS_VERSION, Evaluated, check_output
from .options import EvaluationOptions
from .progress import steps
from .published import LOCAL_TOKENS, SINGLE_TOKENS
from .session import Session
from .single_tokens import DrawnTokens, available_kinds, draw_tokens
from .token_probes import class_score, position_score, reconstruction_error


# of the probes of position and pixels, which need many tokens and not many images
LOCAL_DRAWS = 16
LOCAL_TRAIN_IMAGES, LOCAL_VALIDATION_IMAGES = 10_000, 2_000


@dataclass(frozen=True, kw_only=True)
class TokenOptions:
    """Settings of both tasks.

    Attributes:
        threshold: Norm before the final norm, above which a patch is an outlier.
        size: Height and width in pixels that the model sees; by default its own.
        max_images: Take a random sample of each split.
        batch_size: Images that go through the model together.
        num_workers: Threads that decode images.
        seed: Of everything that is drawn.
    """

    threshold: float
    size: tuple[int, int] | None = None
    max_images: int | None = None
    batch_size: int = 32
    num_workers: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "num_workers", "max_images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}.")


# metrics, and details with counts and what could not be measured
Measured = tuple[dict[str, float], dict[str, object]]


def evaluate_tokens(
    model: str | Path,
    task: str,
    data: str | Path,
    output: str | Path,
    options: TokenOptions,
    *,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Evaluated:
    """Evaluates single tokens of a model.

    A kind of tokens that no image has, or that is too rare to learn from, has no metric; `not_measured` among the
    details says why.

    Args:
        model: As for `load_vit`.
        task: `"single_tokens"` for the class of images, with the metrics `cls`, `normal`, `outlier` and `register`;
            `"local_tokens"` for `normal_position_top1`, `normal_position_distance` and `normal_reconstruction_l2`, and
            the same of outliers.
        data: Labelled images, as for `load_image_data`.
        output: Folder for `results.json`.
        options: Of the task.
        device: Where to compute; by default a GPU where there is one.
        overwrite: Replace results that are there.
        progress: Show bars on stderr.

    Raises:
        ValueError: for whatever cannot be used, and on several processes. Nothing is left in the output then.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("Single tokens are measured by one process. Start this table without accelerate launch.")
    check_output(output, overwrite)
    started, chosen = time.perf_counter(), usable_device(device)
    with atomic_folder(Path(output)) as folder, quiet_loading(), memory_errors():
        session = Session(model, data, folder, EvaluationOptions(), None, chosen, progress)
        train, validation = _splits(data, task, options)
        metrics, details = TOKEN_TASKS[task](session.encoder, train, validation, options, progress)
        if not metrics:
            raise ValueError(f"No token could be measured. {' '.join(details['not_measured'].values())}")
        results = {
            "results_version": RESULTS_VERSION,
            "task": task,
            "metrics": metrics,
            "model": session.about_model(),
            "data": {
                **session.about(validation, len(validation)),
                "num_train_images": len(train),
                "train_sha256": content_hash(train),
                "path": str(data),
            },
            "options": {name: value for name, value in asdict(options).items() if value is not None},
            "details": details,
            "versions": package_versions(),
            "machine": describe_machine(session.device),
            "num_processes": 1,
            "seconds": round(time.perf_counter() - started, 1),
        }
        text = json.dumps(results, indent=1, allow_nan=False)
        (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
    return Evaluated(Path(output), results)


def _splits(data: str | Path, task: str, options: TokenOptions) -> tuple[MappedImages, MappedImages]:
    largest = (LOCAL_TRAIN_IMAGES, LOCAL_VALIDATION_IMAGES) if task == LOCAL_TOKENS else (None, None)
    numbers = [min(filter(None, (options.max_images, number)), default=None) for number in largest]
    train = load_image_data(data, "train", max_images=numbers[0], seed=options.seed)
    names = train.class_names
    return train, load_image_data(data, "validation", class_names=names, max_images=numbers[1], seed=options.seed)


def _single_tokens(
    encoder: VisionEncoder, train: MappedImages, validation: MappedImages, options: TokenOptions, progress: bool
) -> Measured:
    kinds = available_kinds(encoder)
    drawn, others = (_draw(encoder, data, kinds, options, progress) for data in (train, validation))
    metrics, details = {}, {"not_measured": {}}
    for kind in kinds:
        with steps(f"Logistic regressions, {kind}", progress) as on_fit:
            try:
                score = class_score(
                    drawn[kind],
                    train.labels,
                    others[kind],
                    validation.labels,
                    len(train.class_names),
                    seed=options.seed,
                    device=encoder.device,
                    on_fit=on_fit,
                )
            except ValueError as error:
                details["not_measured"][kind] = str(error)
                continue
        metrics[kind] = score.accuracy
        if score.std is not None:
            metrics[f"{kind}_std"] = score.std
        details[kind] = {"C": score.C, "accuracies": score.accuracies, **_counts(drawn[kind], others[kind])}
    return metrics, details


def _local_tokens(
    encoder: VisionEncoder, train: MappedImages, validation: MappedImages, options: TokenOptions, progress: bool
) -> Measured:
    kinds, more = ("normal", "outlier"), {"num_draws": LOCAL_DRAWS, "with_pixels": True}
    drawn, others = (_draw(encoder, data, kinds, options, progress, **more) for data in (train, validation))
    metrics, details = {}, {"not_measured": {}}
    for kind in kinds:
        pair = drawn[kind], others[kind]
        details[kind] = _counts(*pair)
        try:
            score = position_score(*pair, seed=options.seed, device=encoder.device)
            metrics |= {f"{kind}_position_top1": score.top1, f"{kind}_position_distance": score.mean_distance}
            details[kind]["C"] = score.C
        except ValueError as error:
            names = (f"{kind}_position_top1", f"{kind}_position_distance")
            details["not_measured"] |= dict.fromkeys(names, str(error))
        name = f"{kind}_reconstruction_l2"
        try:
            metrics[name] = reconstruction_error(*pair, device=encoder.device)
        except ValueError as error:
            details["not_measured"][name] = str(error)
    return metrics, details


TOKEN_TASKS: dict[str, Callable[..., Measured]] = {SINGLE_TOKENS: _single_tokens, LOCAL_TOKENS: _local_tokens}


def _draw(
    encoder: VisionEncoder, data: MappedImages, kinds: Sequence[str], options: TokenOptions, progress: bool, **more
) -> dict[str, DrawnTokens]:
    return draw_tokens(
        encoder,
        data,
        options.threshold,
        kinds,
        size=options.size,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        seed=options.seed,
        progress=progress,
        **more,
    )


def _counts(train: DrawnTokens, validation: DrawnTokens) -> dict[str, int]:
    return {
        "num_train_images": len(train),
        "num_train_images_without": train.num_without,
        "num_validation_images": len(validation),
        "num_validation_images_without": validation.num_without,
    }
