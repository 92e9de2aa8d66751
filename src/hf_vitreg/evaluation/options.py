# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What can be set of an evaluation, and which task reads it."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .extraction import PREPROCESSING
from .knn import TEMPERATURE


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Settings of all tasks. What a task does not read must be left as it is; `None` is the task's own choice.

    Attributes:
        validation_data: Where validation images are, if they are not below the data.
        size: Height and width in pixels that the model sees; by default its own, for object discovery each image's.
        layer: Which layer's tokens, 1 to the number of layers; by default the last.
        num_layers: Of how many last layers patches are read.
        preprocessing: `"crop"`, `"fit"` or `"stretch"`, see `FeatureSpec`.
        batch_size: Images that go through the model together.
        num_workers: Threads that decode images.
        cache_dir: Where features are kept for the next task. `None`: they are not.
        max_images: Take a random sample of each split.
        streaming: Read parquet files or a dataset on the Hub as they come.
        skip_bad_images: Leave out what cannot be read, named in the results, rather than stop.
        seed: Of everything that is drawn.
        ks, temperature: Of nearest neighbours.
        num_epochs, min_steps: Of the linear sweep. DINOv2's ten passes over ImageNet are 12,500 steps, which its
            learning rates are meant for, so that on few images more passes are made.
        selection: Of the linear sweep, see `linear_sweep`.
        templates: File of prompt templates, one a line.
        class_names: File of class names, one a line in the order of the labels.
        shifted, outliers: Further sets of images by name, see `out_of_distribution`. Of a folder with splits, the
            validation images.
        layout, num_classes, ignore_index, depth_scale: Of masks and depth maps, see `load_dense`.
        num_steps: Of a dense head; by default as many passes over the images as DINOv2 makes.
        label_size: Height and width that masks and depths are brought to for the loss; by default four times the grid.
        min_depth, max_depth, eigen_crop: Of depths that count, see `evaluate_depth`.
        method, facet, normalize, bias: Of object discovery, see `discover_objects`.
        tune, tuning_share: Whether LOST's layer and bias are chosen on a share of the images, and on which.
        split, no_hard: Of a VOC folder.
        annotations, image_list: Of a COCO folder: its JSON, and a list of the images to take.
    """

    validation_data: str | None = None
    size: tuple[int, int] | None = None
    layer: int | None = None
    num_layers: int = 1
    preprocessing: str = "crop"
    batch_size: int = 32
    num_workers: int | None = None
    cache_dir: str | Path | None = None
    max_images: int | None = None
    streaming: bool = False
    skip_bad_images: bool = False
    seed: int = 0
    ks: tuple[int, ...] | None = None
    temperature: float = TEMPERATURE
    num_epochs: float = 10
    min_steps: int = 4000
    selection: str = "validation"
    templates: str | Path | None = None
    class_names: str | Path | None = None
    shifted: Mapping[str, str] = field(default_factory=dict)
    outliers: Mapping[str, str] = field(default_factory=dict)
    layout: str | None = None
    num_classes: int | None = None
    ignore_index: int = 255
    depth_scale: float = 1000.0
    num_steps: int | None = None
    label_size: tuple[int, int] | None = None
    min_depth: float = 1e-3
    max_depth: float = 10.0
    eigen_crop: bool = False
    method: str = "lost"
    facet: str | None = None
    normalize: bool = False
    bias: float = 0.0
    tune: bool = False
    tuning_share: float = 0.2
    split: str = "trainval"
    no_hard: bool = False
    annotations: str | Path | None = None
    image_list: str | Path | None = None

    def changed(self) -> dict[str, object]:
        """What is not as it is by default."""
        defaults = EvaluationOptions()
        names = [option.name for option in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(defaults, name)}


EVERY_TASK = {"batch_size", "seed"}
FEATURES = {"size", "num_workers", "cache_dir"}
LABELLED = {"validation_data", "max_images", "streaming", "skip_bad_images"}
PROBE = FEATURES | LABELLED | {"preprocessing"}
DENSE = FEATURES | {"validation_data", "num_layers", "layout", "num_steps", "label_size"}
READ_BY = {
    "knn": PROBE | {"layer", "ks", "temperature"},
    "linear": PROBE | {"num_epochs", "min_steps", "selection"},
    "logistic": PROBE | {"layer"},
    "zero_shot": {"max_images", "templates", "class_names"},
    "out_of_distribution": PROBE | {"shifted", "outliers"},
    "segmentation": DENSE | {"num_classes", "ignore_index"},
    "depth": DENSE | {"depth_scale", "min_depth", "max_depth", "eigen_crop"},
    "object_discovery": {"size", "layer", "method", "facet", "normalize", "bias", "tune", "tuning_share"}
    | {"split", "no_hard", "annotations", "image_list"},
}


CHOICES = {
    "preprocessing": PREPROCESSING,
    "selection": ("validation", "held_out"),
    "method": ("lost", "attention"),
}
COUNTS = ("batch_size", "num_workers", "max_images", "num_layers", "num_steps", "num_epochs")


def require_options_of(task: str, options: EvaluationOptions) -> None:
    """Before anything is computed.

    Raises:
        ValueError: for a task that there is not, a value that no task takes, and an option that would not be read.
    """
    if task not in READ_BY:
        raise ValueError(f"There is no task {task!r}, only {', '.join(READ_BY)}.")
    changed = options.changed()
    for name in changed:
        if name not in READ_BY[task] | EVERY_TASK:
            readers = ", ".join(other for other, names in READ_BY.items() if name in names)
            raise ValueError(f"The task {task} does not read {_flag(name)}; it belongs to {readers}.")
    for name, why in _idle(options):
        if name in changed:
            raise ValueError(f"{_flag(name)} is not read {why}. Leave one of them out.")
    for name, allowed in CHOICES.items():
        if getattr(options, name) not in allowed:
            raise ValueError(f"{_flag(name)} must be {' or '.join(allowed)}, got {getattr(options, name)!r}.")
    for name in COUNTS:
        if changed.get(name) is not None and not changed[name] > 0:
            raise ValueError(f"{_flag(name)} must be above 0, got {changed[name]}.")


def _idle(options: EvaluationOptions) -> Iterator[tuple[str, str]]:
    """Options of object discovery that others put out of work."""
    if options.method == "attention":
        yield from ((name, "with --method attention") for name in ("facet", "normalize", "bias", "tune"))
    if options.tune:
        yield from ((name, "with --tune, which chooses it") for name in ("normalize", "bias"))
    else:
        yield "tuning_share", "without --tune"
    if options.annotations is None:
        yield "image_list", "without --annotations"
    else:
        yield from ((name, "with --annotations") for name in ("split", "no_hard"))


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
