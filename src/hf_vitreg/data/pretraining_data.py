# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The images that a pretraining run learns from, and those that its features are measured on."""

import dataclasses
import logging
from itertools import islice, takewhile
from pathlib import Path

import datasets

from ..pretrain_recipe import PretrainDataOptions
from .datasets import (
    class_folders,
    digits,
    held_out,
    image_files,
    limited,
    matching_files,
    place_name,
    require_same_classes,
    with_class_names,
)
from .labelled_images import MappedImages, hub_splits
from .orders import StreamOrder
from .tables import Table, Wants, captions_of_classes, has_labels, open_table, require_captions, wanted_columns


logger = logging.getLogger(__name__)

DIGITS_HELD_OUT = 0.2


@dataclasses.dataclass(frozen=True)
class PretrainingData:
    """Training images, of which each row has `image` (undecoded), `name` and what else is wanted.

    Attributes:
        dataset: Beside these columns `label`, an index into `class_names`, or `caption`.
        class_names: Of the labels; `None` where none are wanted.
        display_name: What people call the data.
        builder: What reads it: `imagefolder`, `parquet`, `webdataset`, `digits`, or the id on the Hub.
        hub_id: The id on the Hub, of what is from there.
    """

    dataset: Table
    class_names: list[str] | None
    display_name: str
    builder: str
    hub_id: str | None = None

    @property
    def num_images(self) -> int | None:
        """`None` of a stream."""
        return len(self.dataset) if isinstance(self.dataset, datasets.Dataset) else None


@dataclasses.dataclass(frozen=True)
class KNNData:
    """What features are measured on.

    Attributes:
        train: Labelled images, the neighbours of others; `None` where no labelled image was held out.
        validation: Images that nobody trained on, with labels where `train` is there. Without any a part of the
            training images, which say nothing of accuracy.
    """

    train: MappedImages | None
    validation: MappedImages


def load_pretraining_data(options: PretrainDataOptions, wants: Wants, seed: int) -> PretrainingData:
    """The training images that a recipe names, with labels or captions where the objective wants them.

    Args:
        options: Of the recipe.
        wants: What is learned from: `images` alone, with `labels`, or with `captions`.
        seed: Of the choice of `--max_train_samples`, and of the fifth of `digits` that is not trained on. Of a stream
            each process takes the first of its shards, in total as many.

    Raises:
        ValueError: for a source, a split or a column that is not there, a row without image, label or caption, labels
            of a stream that are not known to be classes.
    """
    dataset, *names = _training_images(options, wants, seed)
    class_names = dataset.features["label"].names if "label" in dataset.features else None
    if isinstance(dataset, datasets.Dataset):
        dataset = limited(dataset, options.max_train_samples, seed)
    elif options.max_train_samples is not None:
        dataset = dataset.take(options.max_train_samples)
    return PretrainingData(dataset, class_names, *names)


def _training_images(options: PretrainDataOptions, wants: Wants, seed: int) -> tuple[Table, str, str, str | None]:
    """They, what they are called, what reads them, and their id on the Hub."""
    if options.train_dir:
        return _folder(options, wants), place_name(options.train_dir, None), "imagefolder", None
    files = options.train_file or options.train_shards
    if files:
        builder = "parquet" if options.train_file else "webdataset"
        arguments = {"data_files": matching_files(files, builder), "split": "train"}
        return _table(builder, files, options, wants, seed, arguments), place_name(None, files), builder, None
    if options.dataset_name == "digits":
        return _digits(options, wants, seed), "scikit-learn digits", "digits", None
    name = options.dataset_name
    arguments = {"name": options.dataset_config_name, "split": options.train_split}
    return _table(name, name, options, wants, seed, arguments), name, name, name


def _table(
    path: str, source: str, options: PretrainDataOptions, wants: Wants, seed: int, arguments: dict[str, object]
) -> Table:
    table = open_table(path, source, options.streaming, **arguments)
    class_names = None
    if options.streaming and wants != "images" and (options.validation_dir or options.validation_file):
        validation = _validation_images(options, seed)
        class_names = validation.features["label"].names
    return wanted_columns(table, options, wants, source, class_names)


def _folder(options: PretrainDataOptions, wants: Wants) -> datasets.Dataset:
    if wants == "labels":
        return class_folders(options.train_dir)
    if wants == "captions" and options.caption_template:
        return captions_of_classes(class_folders(options.train_dir), options.caption_template)
    folder = Path(options.train_dir)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}: --train_dir must be one with images.")
    files = image_files(folder, beside=[".txt"] if wants == "captions" else [])
    if not files:
        raise ValueError(f"The folder {folder} has no image: --train_dir must be one with images.")
    columns = {"image": [{"bytes": None, "path": str(path)} for path in files], "name": [str(path) for path in files]}
    features = datasets.Features({"image": datasets.Image(decode=False), "name": datasets.Value("string")})
    if wants == "captions":
        columns["caption"] = _texts_beside(files)
        features["caption"] = datasets.Value("string")
    return datasets.Dataset.from_dict(columns, features=features)


def _texts_beside(files: list[Path]) -> list[str]:
    texts = [path.with_suffix(".txt") for path in files]
    missing = [text for text in texts if not text.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(files)} images have no text beside them, {missing[0]} is the first that is "
            "missing. Add the files, or set --caption_template to make captions of class names."
        )
    captions = [text.read_text(encoding="utf-8").strip() for text in texts]
    require_captions(captions, texts)
    return captions


def _digits(options: PretrainDataOptions, wants: Wants, seed: int) -> datasets.Dataset:
    train, _ = held_out(digits(), DIGITS_HELD_OUT, seed)
    if wants == "labels":
        return train
    if wants == "images":
        return train.remove_columns("label")
    if options.caption_template is None:
        raise ValueError("digits has no captions: set --caption_template, such as `a photo of a {}.`")
    return captions_of_classes(train, options.caption_template)


# Measuring


def load_knn_data(options: PretrainDataOptions, data: PretrainingData, seed: int) -> KNNData:
    """Images to measure features on.

    The neighbours are training images where these are mapped and their labels are those of the validation images. Of
    a stream, or of training images without labels, half of the validation images of each class are the neighbours of
    the other half. A validation split that is streamed gives what comes first of its shuffled shards.

    Args:
        options: Of the recipe.
        data: From `load_pretraining_data`.
        seed: Of the choice of images; for `digits` that of `data`.

    Raises:
        ValueError: for a source or a split that was named and is not there, or labels that are not those which are
            trained on.
    """
    validation = _validation_images(options, seed)
    if validation is None:
        images = data.dataset.select_columns(["image", "name"])
        images = _some_images(images, options.knn_eval_samples, options, seed)
        return KNNData(None, MappedImages(images, data.display_name))
    if "label" not in validation.features:
        return KNNData(None, MappedImages(limited(validation, options.knn_eval_samples, seed), data.display_name))
    train = _labelled_training_images(options, data, validation, seed)
    class_names = data.class_names if train is None else train.features["label"].names
    if class_names is not None:
        validation = with_class_names(validation, class_names)
    if train is None:
        train, validation = held_out(validation, 0.5, seed)
    return KNNData(
        MappedImages(limited(train, options.knn_train_samples, seed), data.display_name),
        MappedImages(limited(validation, options.knn_eval_samples, seed), data.display_name),
    )


def _validation_images(options: PretrainDataOptions, seed: int) -> datasets.Dataset | None:
    if options.validation_dir:
        return class_folders(options.validation_dir)
    if files := options.validation_file:
        data_files = matching_files(files, "parquet")
        table = open_table("parquet", files, streaming=False, data_files=data_files, split="train")
        return wanted_columns(table, options, "labels", files)
    if options.train_dir or options.train_file or options.train_shards:
        return None
    if options.dataset_name == "digits":
        return held_out(digits(), DIGITS_HELD_OUT, seed)[1]
    return _hub_validation(options, seed)


def _hub_validation(options: PretrainDataOptions, seed: int) -> datasets.Dataset | None:
    name, split = options.dataset_name, options.validation_split
    splits = hub_splits(name, options.dataset_config_name)
    if split not in splits:
        message = f"{name} has no split {split!r}, only {', '.join(splits)}: name one as --validation_split."
        if split != PretrainDataOptions.validation_split:
            raise ValueError(message)
        logger.warning("Nothing is measured on held-out images. %s", message)
        return None
    table = open_table(name, name, options.streaming, name=options.dataset_config_name, split=split)
    images = _with_labels_if_they_are_classes(table, options, f"{name} {split}")
    return _some_images(images, options.knn_train_samples + options.knn_eval_samples, options, seed)


def _with_labels_if_they_are_classes(table: Table, options: PretrainDataOptions, source: str) -> Table:
    """Integers of a stream are classes only where it says so; without labels norms can be measured all the same."""
    if has_labels(table, options):
        try:
            return wanted_columns(table, options, "labels", source)
        except ValueError as error:
            logger.warning("No nearest neighbours are measured: %s", error)
    return wanted_columns(table, options, "images", source)


def _some_images(images: Table, limit: int, options: PretrainDataOptions, seed: int) -> datasets.Dataset:
    """So many at random; of a stream those that come first where it is shuffled, in memory."""
    if isinstance(images, datasets.Dataset):
        return limited(images, limit, seed)
    order = StreamOrder(images, seed, min(limit, options.shuffle_buffer_size))
    rows = [example.row for example in takewhile(lambda example: example.epoch == 0, islice(order, limit))]
    order.close()
    return datasets.Dataset.from_list(rows, features=images.features)


def _labelled_training_images(
    options: PretrainDataOptions, data: PretrainingData, validation: datasets.Dataset, seed: int
) -> datasets.Dataset | None:
    if options.streaming:
        return None
    if data.class_names is not None:
        return data.dataset
    try:
        labelled = load_pretraining_data(options, "labels", seed)
        require_same_classes(labelled.class_names, validation.features["label"].names)
    except ValueError as error:
        logger.warning("Half of the validation images are the neighbours of kNN, not training images: %s", error)
        return None
    return labelled.dataset
