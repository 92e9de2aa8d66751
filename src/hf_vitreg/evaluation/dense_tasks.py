# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The tasks on every pixel and on objects, from a session to what was measured."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..data.boxes import load_boxes
from ..data.datasets import SPLIT_NAMES
from ..data.dense import DepthImages, SegmentationImages, load_dense
from ..metrics.depth import DepthErrors, valid_pixels
from .box_files import draw_boxes, write_coco
from .depth import build_depth_model, evaluate_depth, save_depth_head, train_depth_head
from .object_discovery import default_facet, discover_objects, tune_object_discovery
from .options import EvaluationOptions
from .patch_heads import PatchFeatures, dense_image_processor
from .progress import steps
from .segmentation import (
    build_segmentation_model,
    evaluate_segmentation,
    save_segmentation_head,
    train_segmentation_head,
)
from .session import Outcome, Session


# DINOv2 makes 40,000 steps of 16 images on ADE20K's 20,210, and 38,400 on NYU's 24,231
SEGMENTATION_PASSES, DEPTH_PASSES = 32, 25
BATCH_SIZE = 16
NUM_SHOWN = 6  # images in the picture of a dense task
LAYERS_TRIED = 4  # the last so many, by object discovery that is tuned


def segmentation(session: Session) -> Outcome:
    """A linear head on patches, and the model that it makes."""
    options = session.options
    classes = {"num_classes": options.num_classes, "ignore_index": options.ignore_index}
    train, validation = _dense_splits(session, "segmentation", **classes)
    # masks that cannot be used are found before anything takes its time
    num_pixels = train.check(session.shows_progress)
    validation.check(session.shows_progress)
    layers = session.last_layers(options.num_layers)
    kept = _Kept(validation)
    with ExitStack() as stack:
        train_features, features = (_patches(session, stack, data, layers) for data in (train, validation))
        head = train_segmentation_head(
            train_features,
            train.target,
            train.num_classes,
            ignore_index=train.ignore_index,
            **_training(session, stack, "Segmentation head", train_features, SEGMENTATION_PASSES),
        )
        scores = evaluate_segmentation(
            head,
            features,
            validation.target,
            train.num_classes,
            ignore_index=train.ignore_index,
            accelerator=session.accelerator,
            on_image=kept,
        )
        grid = features.grid
    if session.folder is not None:
        from .figures import segmentation_figure  # matplotlib takes a second to import

        segmentation_figure(session.folder / "segmentation.png", kept.shown, train.class_names, train.ignore_index)
        if session.encoder.source == "vitreg":
            model = build_segmentation_model(session.encoder, layers, head, train.class_names, train.ignore_index)
            _save_model(session, model, grid)
        else:
            save_segmentation_head(session.folder, session.encoder, layers, head, train.class_names)
    by_class = ("per_category_iou", "per_category_accuracy")
    details = {name: dict(zip(train.class_names, scores[name])) for name in by_class}
    details["layers"] = [layer + 1 for layer in layers]
    details["classes_without_training_pixels"] = [
        name for name, number in zip(train.class_names, num_pixels) if not number
    ]
    metrics = {name: value for name, value in scores.items() if name not in by_class}
    return Outcome(metrics, _about(session, train, validation), details)


def depth(session: Session) -> Outcome:
    """A linear head with bins on patches and CLS, and the model that it makes."""
    options = session.options
    train, validation = _dense_splits(session, "depth", depth_scale=options.depth_scale)
    train.check(session.shows_progress)
    _require_depths(validation, options)
    layers = session.last_layers(options.num_layers)
    extent = {"min_depth": options.min_depth, "max_depth": options.max_depth}
    kept = _Kept(validation)
    with ExitStack() as stack:
        train_features, features = (_patches(session, stack, data, layers, True) for data in (train, validation))
        head = train_depth_head(
            train_features,
            train.target,
            **extent,
            **_training(session, stack, "Depth head", train_features, DEPTH_PASSES),
        )
        scores = evaluate_depth(
            head,
            features,
            validation.target,
            **extent,
            eigen_crop=options.eigen_crop,
            accelerator=session.accelerator,
            on_image=kept,
        )
        grid = features.grid
    if session.folder is not None:
        from .figures import depth_figure

        depth_figure(session.folder / "depth.png", kept.shown)
        if session.encoder.source == "vitreg":
            _save_model(session, build_depth_model(session.encoder, layers, head), grid)
        else:
            save_depth_head(session.folder, session.encoder, layers, head)
    return Outcome(scores, _about(session, train, validation), {"layers": [layer + 1 for layer in layers]})


def object_discovery(session: Session) -> Outcome:
    """Boxes of LOST or of the attention baseline, as COCO's JSON and drawn."""
    options, encoder = session.options, session.encoder
    data = load_boxes(
        session.data,
        split=options.split,
        no_hard=options.no_hard,
        annotations=options.annotations,
        selection=options.image_list,
    )
    common = {"size": options.size, "batch_size": options.batch_size, "accelerator": session.accelerator}
    common["progress"] = session.progress
    facet = options.facet or default_facet(encoder)
    if options.tune:
        layers = (
            session.last_layers(min(LAYERS_TRIED, encoder.num_layers))
            if options.layer is None
            else (session.layer_index(),)
        )
        tuned = tune_object_discovery(
            encoder,
            data,
            layers=layers,
            facets=[facet],
            tuning_share=options.tuning_share,
            seed=options.seed,
            **common,
        )
        objects, corloc, summary = tuned.objects, tuned.corloc, tuned.summary(data)
    else:
        settings = {"facet": facet, "normalize": options.normalize, "bias": options.bias}
        objects = discover_objects(encoder, data, options.method, layer=session.layer_index(), **settings, **common)
        corloc, summary = objects.corloc, objects.summary()
    if session.folder is not None:
        write_coco(session.folder / "boxes.json", data, objects)
        draw_boxes(session.folder / "boxes.png", data, objects)
    about = {**session.about(data, len(data)), "split": options.split if options.annotations is None else None}
    return Outcome({"corloc": corloc}, about, summary)


# Dense data


def _dense_splits(session: Session, task: str, **settings) -> tuple:
    source = session.source()
    places = source if isinstance(source, Mapping) else {"train": source, "validation": source}
    # a folder that was given for one split may be this split alone
    is_split = isinstance(source, Mapping)
    return tuple(
        _dense(places[split], split, is_split, task=task, layout=session.options.layout, **settings)
        for split in ("train", "validation")
    )


def _dense(path: str | Path, split: str, may_be_whole: bool, **settings) -> SegmentationImages | DepthImages:
    images = Path(path) / "images"
    is_whole = images.is_dir() and not any(child.name.lower() in SPLIT_NAMES for child in images.iterdir())
    return load_dense(path, None if may_be_whole and is_whole else split, **settings)


def _require_depths(data: DepthImages, options: EvaluationOptions) -> None:
    """Raises `ValueError` for a depth map that cannot be used, or has no pixel that counts."""
    extent = (options.min_depth, options.max_depth, options.eigen_crop)
    DepthErrors(*extent)  # refuses what is no range
    for index, path in enumerate(data.target_paths):
        target = data.target(index)
        try:
            is_counted = valid_pixels(target, *extent)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not is_counted.any():
            raise ValueError(
                f"The depth map {path} has no depth between {options.min_depth:g} and {options.max_depth:g} m"
                f"{' within the crop' if options.eigen_crop else ''}. Leave it and its image out, or give other "
                "--min-depth and --max-depth; of a PNG that does not hold millimetres, give --depth-scale."
            )


def _patches(
    session: Session,
    stack: ExitStack,
    data: SegmentationImages | DepthImages,
    layers: tuple[int, ...],
    with_cls: bool = False,
) -> PatchFeatures:
    """Of whole images, as their targets are."""
    with_cls = with_cls and session.encoder.has_cls
    kinds = ["patches", "cls"] if with_cls else ["patches"]
    features = stack.enter_context(session.features(data, kinds, layers, "stretch"))
    return PatchFeatures(features["patches"], features.grid, features["cls"] if with_cls else None)


def _training(session: Session, stack: ExitStack, title: str, features: PatchFeatures, num_passes: int) -> dict:
    """How long, at which resolution, and what shows it."""
    options, (rows, cols) = session.options, features.grid
    num_steps = options.num_steps or max(1, round(num_passes * len(features) / BATCH_SIZE))
    report = stack.enter_context(steps(title, session.shows_progress))
    return {
        "num_steps": num_steps,
        "batch_size": BATCH_SIZE,
        "label_size": options.label_size or (4 * rows, 4 * cols),
        "seed": options.seed,
        "accelerator": session.accelerator,
        "on_step": lambda done, loss: report(done, num_steps),
    }


class _Kept:
    """What was predicted for a few images, with the image and its target.

    Args:
        data: Images with targets.
    """

    def __init__(self, data: SegmentationImages | DepthImages):
        self.data = data
        chosen = np.linspace(0, len(data) - 1, min(NUM_SHOWN, len(data))).round().astype(int)
        self._chosen = set(chosen.tolist())
        self._found: dict[int, tuple] = {}

    def __call__(self, index: int, prediction: torch.Tensor) -> None:
        if index in self._chosen:
            image = np.asarray(self.data.image(index))
            self._found[index] = (Path(self.data.name(index)).name, image, self.data.target(index), prediction.numpy())

    @property
    def shown(self) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
        """Name, image, target and prediction of each; of several processes, the share of this one."""
        return [self._found[index] for index in sorted(self._found)]


def _about(session: Session, train, validation) -> dict[str, object]:
    return {
        **session.about(validation, len(validation)),
        "split": "validation",
        "num_train_images": len(train),
        "train_sha256": session.about(train, len(train))["sha256"],
    }


def _save_model(session: Session, model: nn.Module, grid: tuple[int, int]) -> None:
    height, width = (side * session.encoder.patch_size for side in grid)
    model.save_pretrained(session.folder / "model")
    dense_image_processor(session.encoder, height, width).save_pretrained(session.folder / "model")
