# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The tasks on labelled images, from a session to what was measured."""

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import BitImageProcessor

from ..data.datasets import IMAGE_SUFFIXES
from ..data.image_data import FileImages, ImageData
from ..data.labelled_images import is_one_split, load_image_data
from ..features import VisionEncoder
from .feature_cache import Features
from .knn import KS, knn_accuracy
from .labelled import ImageFeatures
from .linear import LinearSweep, classifier_from_head, linear_sweep
from .logistic import logistic_sweep
from .out_of_distribution import CLS, CLS_AND_REGISTERS, out_of_distribution
from .progress import steps
from .session import Outcome, Session
from .zero_shot import (
    TEMPLATES,
    class_embeddings,
    image_embeddings,
    load_templates,
    zero_shot_logits,
)


BATCH_SIZE = 128  # of the linear sweep, DINOv2's of one GPU
NUM_LAYERS = 4  # the last so many, by the larger of its heads


def knn(session: Session) -> Outcome:
    """Nearest neighbours on one token an image."""
    kind, layer = image_token(session.encoder), session.layer_index()
    with ExitStack() as stack:
        train, validation, about = _splits(session, stack, _layers_with(session, layer))
        ks = session.options.ks or tuple(k for k in KS if k <= len(train)) or (1,)
        scores = knn_accuracy(
            of_layer(train, kind, layer),
            train.labels,
            of_layer(validation, kind, layer),
            validation.labels,
            len(train.class_names),
            ks,
            session.options.temperature,
            device=session.device,
            accelerator=session.accelerator,
        )
        best = max(scores, key=lambda k: scores[k].top1)
        metrics = {"accuracy": scores[best].top1} | {f"top1_k{k}": each.top1 for k, each in scores.items()}
        metrics |= {f"top5_k{k}": each.top5 for k, each in scores.items()}
        details = {"best_k": best, "token": kind, "layer": layer + 1, **_left_out(train, validation)}
        return Outcome(metrics, about, details)


def linear(session: Session) -> Outcome:
    """DINOv2's sweep of linear heads, and the best as a model."""
    encoder = session.encoder
    kind = image_token(encoder)
    numbers = (1, NUM_LAYERS) if encoder.num_layers >= NUM_LAYERS else (1,)
    patch_mean = (False, True) if kind == "cls" else (False,)
    with ExitStack() as stack:
        train, validation, about = _splits(session, stack, _last_layers(session))
        steps_of_epochs = math.ceil(session.options.num_epochs * len(train) / BATCH_SIZE)
        on_step = stack.enter_context(steps("Linear heads", session.shows_progress))
        sweep = linear_sweep(
            _inputs(session, train),
            _inputs(session, validation),
            len(train.class_names),
            layers=numbers,
            patch_mean=patch_mean,
            num_iterations=max(steps_of_epochs, session.options.min_steps),
            batch_size=BATCH_SIZE,
            selection=session.options.selection,
            seed=session.options.seed,
            device=session.device,
            accelerator=session.accelerator,
            on_step=on_step,
        )
        if session.folder is not None:
            from .figures import sweep_figure  # matplotlib takes a second to import

            sweep_figure(session.folder / "linear.png", sweep.scores, f"{encoder.name} on {about['name']}")
        scores = [{"head": each.settings.name, **_head_numbers(each)} for each in sweep.scores]
        details = {"best_head": sweep.best.settings.name, "token": kind, "heads": scores}
        if session.folder is not None:
            details["saved"] = _save_classifier(session, sweep, train.class_names)
        details |= {"selection": session.options.selection, **_left_out(train, validation)}
        metrics = {
            "accuracy": sweep.best_score.accuracy,
            "worst_accuracy": min(each.accuracy for each in sweep.scores),
        }
        return Outcome(metrics, about, details)


def logistic(session: Session) -> Outcome:
    """Logistic regression on one token an image, its penalty chosen on held-out training images."""
    kind, layer = image_token(session.encoder), session.layer_index()
    with ExitStack() as stack:
        train, validation, about = _splits(session, stack, _layers_with(session, layer))
        on_fit = stack.enter_context(steps("Logistic regressions", session.shows_progress))
        sweep = logistic_sweep(
            of_layer(train, kind, layer),
            train.labels,
            of_layer(validation, kind, layer),
            validation.labels,
            len(train.class_names),
            seed=session.options.seed,
            device=session.device,
            on_fit=on_fit,
        )
        details = {"C": sweep.best.C, "token": kind, "layer": layer + 1, **_left_out(train, validation)}
        details["held_out_accuracies"] = {f"{C:g}": accuracy for C, accuracy in sweep.held_out_accuracies.items()}
        metrics = {"accuracy": sweep.top1, "top5_accuracy": sweep.top5}
        return Outcome(metrics, about, details)


def zero_shot(session: Session) -> Outcome:
    """Classes by their names alone."""
    options = session.options
    dual = session.dual_encoder
    data = load_image_data(session.data, "validation", max_images=options.max_images, seed=options.seed)
    names = data.class_names if options.class_names is None else _class_names(options.class_names, data.class_names)
    templates = load_templates(options.templates or TEMPLATES)
    classes = class_embeddings(dual.model, dual.tokenizer, [name.replace("_", " ") for name in names], templates)
    images = image_embeddings(
        dual.model, dual.image_processor, data, options.batch_size, session.accelerator, session.progress
    )
    ranked = zero_shot_logits(images, classes).topk(min(5, len(names)), dim=1).indices
    is_true = ranked == torch.tensor(data.labels)[:, None]
    metrics = {
        "accuracy": is_true[:, 0].double().mean().item(),
        "top5_accuracy": is_true.any(dim=1).double().mean().item(),
    }
    details = {"templates": templates, "class_names": list(names)}
    return Outcome(metrics, session.about(data, len(data)), details)


def out_of_distribution_probe(session: Session) -> Outcome:
    """A probe on CLS against one on CLS and the mean of the registers."""
    options, encoder = session.options, session.encoder
    if not (encoder.num_registers and encoder.has_cls):
        raise ValueError(
            f"{encoder.name} has no {'registers' if encoder.has_cls else 'CLS'}, and this task compares a probe on "
            "CLS with one on CLS and registers. Give a model with both."
        )
    with ExitStack() as stack:
        train, validation, about = _splits(session, stack, _last_layers(session))
        others = {
            group: {
                name: stack.enter_context(_further(session, source, train.class_names, group == "shifted"))
                for name, source in getattr(options, group).items()
            }
            for group in ("shifted", "outliers")
        }
        results = out_of_distribution(
            _inputs(session, train),
            _inputs(session, validation),
            len(train.class_names),
            shifted={name: _inputs(session, each) for name, each in others["shifted"].items()},
            outliers={name: _inputs(session, each) for name, each in others["outliers"].items()},
            seed=options.seed,
            device=session.device,
            accelerator=session.accelerator,
        )
        metrics = {}
        for probe, prefix in ((CLS_AND_REGISTERS, ""), (CLS, "cls_")):
            result = results[probe]
            metrics[f"{prefix}accuracy"] = result.accuracy
            metrics |= {f"{prefix}accuracy_{name}": value for name, value in result.shifted_accuracies.items()}
            for name, score in result.anomalies.items():
                metrics |= {f"{prefix}fpr95_{name}": score.fpr95, f"{prefix}auroc_{name}": score.auroc}
        further = [features for sets in others.values() for features in sets.values()]
        details = {
            "chosen": {probe: result.chosen for probe, result in results.items()},
            "num_images": {group: {name: len(each) for name, each in sets.items()} for group, sets in others.items()},
            **_left_out(train, validation, *further),
        }
        return Outcome(metrics, about, details)


def image_token(encoder: VisionEncoder) -> str:
    """What stands for an image: CLS, or the mean of the patches where there is none."""
    return "cls" if encoder.has_cls else "patch_mean"


# Data


def of_layer(features: Features, kind: str, layer: int) -> torch.Tensor:
    """Of one layer, counted from 0, in memory: `(images, hidden_size)`."""
    column = features.layers.index(layer)
    return torch.cat([batch[:, column] for batch in features[kind].batches(1024)])


def _probe_features(session: Session, data: ImageData, layers: Sequence[int]) -> Features:
    """All that any of these tasks reads, so that the next one finds it in the cache."""
    encoder = session.encoder
    kinds = ["cls"] * encoder.has_cls + ["patch_mean"] + ["register_mean"] * bool(encoder.num_registers)
    return session.features(data, kinds, layers, session.options.preprocessing)


def _last_layers(session: Session) -> tuple[int, ...]:
    """Those that linear heads read."""
    return session.last_layers(min(NUM_LAYERS, session.encoder.num_layers))


def _layers_with(session: Session, layer: int) -> tuple[int, ...]:
    """The same where this layer is among them, else it alone."""
    last = _last_layers(session)
    return last if layer in last else (layer,)


def _splits(session: Session, stack: ExitStack, layers: Sequence[int]) -> tuple[Features, Features, dict[str, object]]:
    """Features of training and validation images, and what results say of these."""
    # both are found before the first takes its time
    train_data = _labelled(session, session.source(), "train")
    data = _labelled(session, session.source(), "validation", train_data.class_names)
    train, validation = (stack.enter_context(_probe_features(session, each, layers)) for each in (train_data, data))
    of_train = session.about(train_data, len(train))
    about = {"num_train_images": of_train["num_images"]}
    about |= {f"train_{key}": of_train[key] for key in ("sha256", "stream") if key in of_train}
    return train, validation, session.about(data, len(validation)) | about


def _labelled(
    session: Session,
    source: str | Path | Mapping,
    split: str | None,
    class_names: Sequence[str] | None = None,
) -> ImageData:
    options = session.options
    return load_image_data(
        source,
        split,
        class_names=class_names,
        max_images=options.max_images,
        seed=options.seed,
        streaming=options.streaming,
    )


def _further(session: Session, source: str, class_names: Sequence[str], has_these_classes: bool) -> Features:
    if not has_these_classes and (paths := _images_in(source)):
        number = min(len(paths), session.options.max_images or len(paths))
        chosen = random.Random(session.options.seed).sample(paths, number)
        data = FileImages(sorted(chosen), Path(source).resolve().name)
    else:
        split = None if is_one_split(source) else "validation"
        data = _labelled(session, source, split, class_names if has_these_classes else None)
    return _probe_features(session, data, _last_layers(session))


def _images_in(folder: str) -> list[Path]:
    """Image files in a folder itself, where they need no class."""
    files = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _inputs(session: Session, features: Features) -> ImageFeatures:
    """All layers of the token that stands for an image, and of means the last, which is all that is read of them."""
    kind, last = image_token(session.encoder), features.layers[-1]
    means = {
        name: of_layer(features, name, last) if name in features.tensors and name != kind else None
        for name in ("patch_mean", "register_mean")
    }
    return ImageFeatures(features[kind].tensor(), features.labels, **means)


def _left_out(*features: Features) -> dict[str, list[str]]:
    """What could not be read, in words."""
    reasons = [reason for each in features for reason in each.left_out.values()]
    return {"left_out": reasons} if reasons else {}


def _class_names(path: str | Path, known: Sequence[str]) -> list[str]:
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The class names {path} cannot be read: {error}.") from error
    if len(names) != len(known):
        raise ValueError(
            f"{path} has {len(names)} class names, and the images have {len(known)} classes: write one a line in the "
            f"order of {', '.join(list(known)[:3])}, …"
        )
    return names


# Models


def _head_numbers(score) -> dict[str, object]:
    numbers = {"accuracy": score.accuracy, "selection_accuracy": score.selection_accuracy}
    return {**score.settings._asdict(), **numbers}


def _save_classifier(session: Session, sweep: LinearSweep, class_names: Sequence[str]) -> str:
    """A ViTReg with the best head is a classifier; of other models the head alone is saved. Says what was."""
    encoder, head = session.encoder, sweep.best
    if encoder.source != "vitreg" or not encoder.has_cls:
        save_file({"weight": head.weight, "bias": head.bias}, session.folder / "linear_head.safetensors")
        return "linear_head.safetensors"
    classifier_from_head(encoder.model, head, class_names).save_pretrained(session.folder / "classifier")
    processor = _image_processor(session)
    if processor is None:
        return "classifier, without an image processor: none of transformers crops to another shape than a square"
    processor.save_pretrained(session.folder / "classifier")
    return "classifier"


def _image_processor(session: Session) -> BitImageProcessor | None:
    """What prepares images as they were for the features; `None` where no processor of transformers does."""
    encoder, preprocessing = session.encoder, session.options.preprocessing
    height, width = session.options.size or encoder.image_size
    settings = {
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
        "do_convert_rgb": True,
        "resample": 3,
    }
    if preprocessing == "stretch":
        return BitImageProcessor(size={"height": height, "width": width}, do_center_crop=False, **settings)
    if height != width:  # an image may be too wide for one and too high for another
        return None
    shortest = round(height * 256 / 224) if preprocessing == "crop" else height
    return BitImageProcessor(
        size={"shortest_edge": shortest}, crop_size={"height": height, "width": width}, **settings
    )
