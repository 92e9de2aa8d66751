# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Labelled images from a folder, parquet files, the Hub or scikit-learn, as one pair of datasets with class names."""

import dataclasses
import glob
import io
import logging
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import datasets
import PIL.Image
import PIL.ImageOps
import torch

from ..distributed import derived_seed, forked_rng
from ..pretrain_recipe import PretrainDataOptions
from ..recipe import DataOptions


logger = logging.getLogger(__name__)

# what people keep photographs in; Pillow's own list has PDF, HDF5 and films too
IMAGE_SUFFIXES = frozenset(
    [".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"]
)
SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing"))
# more than 8 bits a channel: without a range that is agreed on they turn white or black
DEEP_MODES = frozenset(("I", "F", "I;16", "I;16B", "I;16L", "I;16N"))
IGNORED_LABEL = -100  # the default ignore_index of torch's cross entropy


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Training and validation images: columns `image` (undecoded), `label` (index into `class_names`) and `name`."""

    train: datasets.Dataset
    validation: datasets.Dataset
    class_names: list[str]
    display_name: str
    builder: str
    validation_split: str
    hub_id: str | None = None


def load_labelled_images(options: DataOptions, seed: int) -> LabelledImages:
    """The images that a recipe names.

    Raises:
        ValueError: for a missing or empty folder, a class without an image, labels that differ between training and
            validation, a column or split that does not exist, a dataset that is neither built in nor on the Hub.
    """
    if options.train_dir:
        train, validation = class_folders(options.train_dir), class_folders(options.validation_dir)
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
    validation_split = options.validation_split if names.get("hub_id") else "validation"
    if validation is None:
        train, validation = held_out(train, options.validation_fraction, seed)
        validation_split = f"{options.validation_fraction:.0%} of {options.train_split}, held out"
    validation = _same_labels(train, validation)
    return LabelledImages(
        train=limited(train, options.max_train_samples, seed),
        validation=limited(validation, options.max_eval_samples, seed),
        class_names=train.features["label"].names,
        validation_split=validation_split,
        **names,
    )


def data_name(options: DataOptions | PretrainDataOptions) -> str:
    """A short name for the data: of its folder (the one above `train`), or of the dataset."""
    files = options.train_file or getattr(options, "train_shards", None)
    if options.train_dir or files:
        return place_name(options.train_dir, files)
    return options.dataset_name.split("/")[-1]


def place_name(folder: str | None, files: str | None) -> str:
    """A short name for what is in a folder, or in files: the name of the folder, or of the one above `train`."""
    path = Path(folder or files).resolve()
    return path.parent.name if files or path.name in ("train", "training") else path.name


def digits() -> datasets.Dataset:
    """The 1,797 handwritten digits, 8x8 pixels and 10 classes, that scikit-learn ships (Alpaydin and Kaynak, 1998)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = [_png(pixels * 255 / 16) for pixels in bunch.images]
    names = [f"digit {index}" for index in range(len(images))]
    return _labelled(images, bunch.target.tolist(), names, [str(name) for name in bunch.target_names])


def _png(pixels) -> dict:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels.round().astype("uint8")).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _labelled(images: list, labels: list[int], names: list[str], class_names: list[str]) -> datasets.Dataset:
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "label": datasets.ClassLabel(names=class_names),
            "name": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_dict({"image": images, "label": labels, "name": names}, features=features)


def class_folders(folder: str | None) -> datasets.Dataset | None:
    """Images of `folder/class_name/**`; the classes in alphabetical order. `None` for no folder.

    Raises:
        ValueError: where there is no such folder, it has no class folders, or one of them no image.
    """
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise ValueError(f"There is no folder {folder}. Expected one with a folder of images for every class.")
    class_folders = sorted(path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith("."))
    if not class_folders:
        raise ValueError(f"The folder {folder} has no class folders. Expected {folder}/CLASS_NAME/IMAGE.jpg.")
    class_names = [class_folder.name for class_folder in class_folders]
    if SPLIT_NAMES.issuperset(name.lower() for name in class_names):
        raise ValueError(
            f"{folder} holds splits and not classes: {', '.join(class_names)}. Give them apart: --train_dir "
            f"{folder}/{class_names[0]} --validation_dir {folder}/{class_names[-1]}."
        )
    images, labels = [], []
    for label, class_folder in enumerate(class_folders):
        found = image_files(class_folder)
        if not found:
            raise ValueError(f"The class folder {class_folder} has no image. Add images or remove the folder.")
        images += [{"bytes": None, "path": str(path)} for path in found]
        labels += [label] * len(found)
    return _labelled(images, labels, [image["path"] for image in images], class_names)


def image_files(folder: Path, beside: Container[str] = ()) -> list[Path]:
    """Images at any depth of a folder, by their names, in alphabetical order; it warns of other files.

    Args:
        folder: Where they are. Hidden files are left out.
        beside: Suffixes of the files that belong there too.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    found = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    others = sum(path.suffix.lower() not in IMAGE_SUFFIXES and path.suffix not in beside for path in files)
    if others:
        logger.warning("%s: %d files are no images by their names.", folder, others)
    return found


def _parquet(files: str | None, options: DataOptions) -> datasets.Dataset | None:
    if files is None:
        return None
    loaded = datasets.load_dataset("parquet", data_files=matching_files(files, "parquet"), split="train")
    return standard_columns(loaded, options, source=files)


def matching_files(pattern: str, kind: str) -> list[str]:
    """Files of a pattern, in alphabetical order. Raises `ValueError` where there are none."""
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise ValueError(f"No {kind} file matches {pattern}.")
    return matches


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
    train = standard_columns(splits[options.train_split], options, source=options.dataset_name)
    if options.validation_split not in splits:
        logger.warning(
            "%s has no split %r: a part of %r is held out.",
            options.dataset_name,
            options.validation_split,
            options.train_split,
        )
        return train, None
    return train, standard_columns(splits[options.validation_split], options, source=options.dataset_name)


def standard_columns(dataset: datasets.Dataset, options: DataOptions, source: str) -> datasets.Dataset:
    """The columns `image`, undecoded, `label`, a ClassLabel, and `name`, whatever they are called and hold.

    Raises:
        ValueError: where there is no such column, or rows without image, label, or with one outside the classes.
    """
    for flag, column in (("image_column", options.image_column), ("label_column", options.label_column)):
        if column not in dataset.column_names:
            raise ValueError(f"{source} has no column {column!r}: set --{flag} to one of {dataset.column_names}.")
    dataset = renamed_columns(dataset, {"image": options.image_column, "label": options.label_column}, source)
    dataset = with_class_label(dataset, source)
    return dataset.add_column("name", [f"{source}, row {row}" for row in range(len(dataset))])


def renamed_columns(dataset: datasets.Dataset, columns: Mapping[str, str], source: str) -> datasets.Dataset:
    """Some columns under other names, the images undecoded.

    Args:
        dataset: With these columns.
        columns: From the names that they get, of which one is `image`, to those that they have.
        source: What to call the dataset.

    Raises:
        ValueError: where rows are without a value.
    """
    dataset = dataset.select_columns(list(columns.values()))
    dataset = dataset.rename_columns({old: new for new, old in columns.items() if new != old})
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    for column in columns:
        if missing := dataset.data.column(column).null_count:
            raise ValueError(f"{source} has {missing} rows without {column}. Remove them.")
    return dataset


def with_class_label(dataset: datasets.Dataset, source: str) -> datasets.Dataset:
    """The dataset with `label` as a ClassLabel; of numbers and texts its classes are those that occur, sorted.

    Raises:
        ValueError: for labels outside the classes.
    """
    labels = dataset.data.column("label").to_pylist()
    if isinstance(feature := dataset.features["label"], datasets.ClassLabel):
        outside = sum(not 0 <= label < feature.num_classes for label in labels)
        if outside:
            raise ValueError(
                f"{source} has {outside} labels outside 0 to {feature.num_classes - 1}, as unlabelled test splits do. "
                "Choose a split with labels."
            )
        return dataset
    values = sorted(set(labels))  # numbers as numbers: 2 before 10
    feature = datasets.ClassLabel(names=[str(value) for value in values])
    indices = {value: index for index, value in enumerate(values)}
    encoded = [indices[label] for label in labels]
    return dataset.remove_columns("label").add_column("label", encoded, feature=feature)


def held_out(dataset: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Two parts of labelled images, the second with this fraction of each class, drawn at random.

    Raises:
        ValueError: for a fraction that is none, or too few images of a class.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"There is no validation data, and --validation_fraction {fraction} is not between 0 and 1.")
    try:
        splits = dataset.train_test_split(test_size=fraction, seed=seed, stratify_by_column="label")
    except ValueError as error:
        raise ValueError(
            f"No validation images could be held out of {len(dataset)}: {error}. Give validation images of their own, "
            "or at least two images a class."
        ) from error
    return splits["train"], splits["test"]


def _same_labels(train: datasets.Dataset, validation: datasets.Dataset) -> datasets.Dataset:
    """The validation images with the label indices of training."""
    return with_class_names(validation, train.features["label"].names)


def with_class_names(validation: datasets.Dataset, train_names: list[str]) -> datasets.Dataset:
    """The images with the label indices of training.

    Raises:
        ValueError: where the classes are not the same.
    """
    validation_names = validation.features["label"].names
    require_same_classes(train_names, validation_names)
    # cast_column would keep the numbers and change what they mean
    labels = [train_names.index(validation_names[label]) for label in validation["label"]]
    feature = datasets.ClassLabel(names=train_names)
    return validation.remove_columns("label").add_column("label", labels, feature=feature)


def require_same_classes(train_names: list[str], validation_names: list[str]) -> None:
    """Raises `ValueError` where they are not the same, in any order."""
    if set(train_names) != set(validation_names):
        raise ValueError(
            "The classes of training and validation differ. Only in training: "
            f"{sorted(set(train_names) - set(validation_names))}; only in validation: "
            f"{sorted(set(validation_names) - set(train_names))}. Rename the folders or labels so that they agree."
        )


def limited(dataset: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    """No more than `limit` of its rows, drawn at random."""
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(limit))


class PreparedImages(torch.utils.data.Dataset):
    """Decoded and transformed images, the same for a seed whatever the number of workers or restarts.

    Args:
        images: Columns `image` (undecoded), `label` and `name`.
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
            except Exception as error:  # decoders fail on damaged files in many ways
                self._note_bad(row["name"], error)
            if not self.replace_bad:
                return PIL.Image.new("RGB", (64, 64)), IGNORED_LABEL
        raise ValueError("None of the images can be read.")

    def _note_bad(self, name: str, error: Exception) -> None:
        reason = f"{name} cannot be read as an image: {error}"
        if self.on_bad_image == "raise":
            raise ValueError(f"{reason}. Repair or remove it, or set --on_bad_image skip.") from error
        if name not in self.bad_images:
            logger.warning("Skipped: %s", reason)
            self.bad_images.add(name)


def read_image(encoded: dict | None) -> PIL.Image.Image:
    """Decodes `{"bytes": .., "path": ..}` to RGB, upright as its EXIF says, as transformers' pipelines do.

    Raises:
        Exception: whatever Pillow raises for a damaged file, and `ValueError` for none and for more than 8 bits a
            channel.
    """
    if encoded is None:
        raise ValueError("there is none")
    with PIL.Image.open(io.BytesIO(encoded["bytes"]) if encoded["bytes"] else encoded["path"]) as image:
        if image.mode in DEEP_MODES:
            raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}); scale it to 8 first")
        return PIL.ImageOps.exif_transpose(image).convert("RGB")
