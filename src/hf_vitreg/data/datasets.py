# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Labelled images from a folder, parquet files, the Hub or scikit-learn, as one pair of datasets with class names."""

import dataclasses
import glob
import io
import logging
from collections.abc import Callable
from pathlib import Path

import datasets
import PIL.Image
import PIL.ImageOps
import torch

from ..distributed import derived_seed, forked_rng
from ..recipe import DataOptions


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(PIL.Image.registered_extensions())
IGNORED_LABEL = -100  # the default ignore_index of torch's cross entropy


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Training and validation images with the columns `image` (undecoded) and `label` (index into `class_names`)."""

    train: datasets.Dataset
    validation: datasets.Dataset
    class_names: list[str]
    display_name: str
    builder: str
    hub_id: str | None = None


def load_labelled_images(options: DataOptions, seed: int) -> LabelledImages:
    """The images that a recipe names.

    Raises:
        ValueError: for a missing or empty folder, a class without an image, labels that differ between training and
            validation, a column or split that does not exist, a dataset that is neither built in nor on the Hub.
    """
    if options.train_dir:
        train, validation = _folder(options.train_dir), _folder(options.validation_dir)
        names = {"display_name": data_name(options), "builder": "imagefolder"}
    elif options.train_file:
        train, validation = _parquet(options.train_file, options), _parquet(options.validation_file, options)
        names = {"display_name": data_name(options), "builder": "parquet"}
    elif options.dataset_name == "digits":
        train, validation = digits(), None
        names = {"display_name": "scikit-learn digits", "builder": "digits"}
    else:
        train, validation = _hub(options)
        names = {"display_name": options.dataset_name, "builder": options.dataset_name, "hub_id": options.dataset_name}
    if validation is None:
        train, validation = _held_out(train, options.validation_fraction, seed)
    validation = _same_labels(train, validation)
    return LabelledImages(
        train=_limited(train, options.max_train_samples, seed),
        validation=_limited(validation, options.max_eval_samples, seed),
        class_names=train.features["label"].names,
        **names,
    )


def data_name(options: DataOptions) -> str:
    """A short name for the data: of its folder (the one above `train`), or of the dataset."""
    if options.train_dir or options.train_file:
        path = Path(options.train_dir or options.train_file).resolve()
        return path.parent.name if options.train_file or path.name in ("train", "training") else path.name
    return options.dataset_name.split("/")[-1]


def digits() -> datasets.Dataset:
    """The 1,797 handwritten digits, 8x8 pixels and 10 classes, that scikit-learn ships (Alpaydin and Kaynak, 1998)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = [_png(pixels * 255 / 16) for pixels in bunch.images]
    return _labelled(images, bunch.target.tolist(), [str(name) for name in bunch.target_names])


def _png(pixels) -> dict:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels.round().astype("uint8")).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _labelled(images: list, labels: list[int], class_names: list[str]) -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=class_names)}
    )
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def _folder(folder: str | None) -> datasets.Dataset | None:
    """Images of `folder/class_name/**`; the classes in alphabetical order."""
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {folder}. Expected one with a folder of images for every class.")
    class_folders = sorted(path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith("."))
    if not class_folders:
        raise ValueError(f"The folder {folder} has no class folders. Expected {folder}/CLASS_NAME/IMAGE.jpg.")
    images, labels = [], []
    for label, class_folder in enumerate(class_folders):
        found = sorted(path for path in class_folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise ValueError(f"The class folder {class_folder} has no image. Add images or remove the folder.")
        images += [{"bytes": None, "path": str(path)} for path in found]
        labels += [label] * len(found)
    return _labelled(images, labels, [class_folder.name for class_folder in class_folders])


def _parquet(files: str | None, options: DataOptions) -> datasets.Dataset | None:
    if files is None:
        return None
    matches = sorted(glob.glob(files, recursive=True))
    if not matches:
        raise ValueError(f"No parquet file matches {files}.")
    loaded = datasets.load_dataset("parquet", data_files=matches, split="train")
    return _standard_columns(loaded, options, source=files)


def _hub(options: DataOptions) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    try:
        splits = datasets.load_dataset(options.dataset_name, options.dataset_config_name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The dataset {options.dataset_name!r} could not be loaded: {error}. Give the id of a dataset on the Hub, "
            "`digits` for the built-in one, or --train_dir or --train_file for your own images."
        ) from error
    if options.train_split not in splits:
        raise ValueError(f"{options.dataset_name} has no split {options.train_split!r}, only {', '.join(splits)}.")
    train = _standard_columns(splits[options.train_split], options, source=options.dataset_name)
    if options.validation_split not in splits:
        logger.warning(
            "%s has no split %r: a part of %r is held out.",
            options.dataset_name,
            options.validation_split,
            options.train_split,
        )
        return train, None
    return train, _standard_columns(splits[options.validation_split], options, source=options.dataset_name)


def _standard_columns(dataset: datasets.Dataset, options: DataOptions, source: str) -> datasets.Dataset:
    """The columns `image`, undecoded, and `label`, a ClassLabel, whatever they are called and hold."""
    for flag, column in (("image_column", options.image_column), ("label_column", options.label_column)):
        if column not in dataset.column_names:
            raise ValueError(f"{source} has no column {column!r}: set --{flag} to one of {dataset.column_names}.")
    dataset = dataset.select_columns([options.image_column, options.label_column])
    dataset = dataset.rename_columns({options.image_column: "image", options.label_column: "label"})
    if not isinstance(dataset.features["label"], datasets.ClassLabel):
        dataset = dataset.class_encode_column("label")
    return dataset.cast_column("image", datasets.Image(decode=False))


def _held_out(dataset: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    if not 0 < fraction < 1:
        raise ValueError(f"There is no validation data, and --validation_fraction {fraction} is not between 0 and 1.")
    try:
        splits = dataset.train_test_split(test_size=fraction, seed=seed, stratify_by_column="label")
    except ValueError as error:
        raise ValueError(
            f"No validation images could be held out of {len(dataset)}: {error}. Give validation images, another "
            "--validation_fraction, or at least two images a class."
        ) from error
    return splits["train"], splits["test"]


def _same_labels(train: datasets.Dataset, validation: datasets.Dataset) -> datasets.Dataset:
    """The validation images with the label indices of training."""
    train_names, validation_names = train.features["label"].names, validation.features["label"].names
    if set(train_names) != set(validation_names):
        raise ValueError(
            "The classes of training and validation differ. Only in training: "
            f"{sorted(set(train_names) - set(validation_names))}; only in validation: "
            f"{sorted(set(validation_names) - set(train_names))}. Rename the folders or labels so that they agree."
        )
    # cast_column would keep the numbers and change what they mean
    labels = [train_names.index(validation_names[label]) for label in validation["label"]]
    return validation.remove_columns("label").add_column("label", labels, feature=train.features["label"])


def _limited(dataset: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(limit))


class PreparedImages(torch.utils.data.Dataset):
    """Decoded and transformed images, the same for a seed whatever the number of workers or restarts.

    Args:
        images: Columns `image` (undecoded) and `label`.
        transform: From an RGB `PIL.Image` to `pixel_values` of shape `(num_channels, height, width)`.
        seed: Seed of the transform's randomness, together with the epoch and the index of the image.
        on_bad_image: `raise`, or `skip`.
        replace_bad: What `skip` gives instead: the next image that can be read (training), or an empty image with
            `IGNORED_LABEL` (validation, where no image may count twice).
    """

    def __init__(
        self,
        images: datasets.Dataset,
        transform: Callable[[PIL.Image.Image], torch.Tensor],
        seed: int = 0,
        on_bad_image: str = "raise",
        replace_bad: bool = True,
    ):
        self.images = images
        self.transform = transform
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.replace_bad = replace_bad
        self.epoch = 0
        self.bad_images: set[str] = set()

    def set_epoch(self, epoch: int) -> None:
        """Draws other augmentations; called by Accelerate's data loader too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        image, label = self._readable(index)
        with forked_rng(derived_seed(self.seed, self.epoch, index)):
            return {"pixel_values": self.transform(image), "labels": label}

    def _readable(self, index: int) -> tuple[PIL.Image.Image, int]:
        for candidate in range(index, index + len(self)):
            row = self.images[candidate % len(self)]
            try:
                return read_image(row["image"]), row["label"]
            except (OSError, ValueError, SyntaxError) as error:
                self._note_bad(row["image"]["path"] or f"image {candidate % len(self)}", error)
            if not self.replace_bad:
                return PIL.Image.new("RGB", (64, 64)), IGNORED_LABEL
        raise ValueError("None of the images can be read.")

    def _note_bad(self, name: str, error: Exception) -> None:
        if self.on_bad_image == "raise":
            raise ValueError(
                f"{name} cannot be read as an image: {error}. Repair or remove it, or set --on_bad_image skip."
            ) from error
        if name not in self.bad_images:
            logger.warning("Skipped %s, which cannot be read as an image: %s", name, error)
            self.bad_images.add(name)


def read_image(encoded: dict) -> PIL.Image.Image:
    """Decodes `{"bytes": .., "path": ..}` to RGB, upright as its EXIF says, as transformers' pipelines do."""
    with PIL.Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] else encoded["path"]) as image:
        return PIL.ImageOps.exif_transpose(image).convert("RGB")
