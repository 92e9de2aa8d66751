# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Images of parquet files, WebDataset tars and the Hub, mapped or streamed, with the columns that are wanted."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import datasets

from ..pretrain_recipe import PretrainDataOptions
from .columns import choose_column, could_be
from .datasets import renamed_columns, with_class_label


Wants = Literal["images", "labels", "captions"]
Table = datasets.Dataset | datasets.IterableDataset
# how WebDataset calls the place of an example
KEY, URL = "__key__", "__url__"
USUAL_NAMES = {
    "image": ["image"],
    "label": ["label", "cls", "json.label"],
    "caption": ["caption", "text", "txt", "json.caption", "json.text"],
}
KINDS = {"image": datasets.Image, "label": datasets.ClassLabel, "caption": "string"}


def open_table(path: str, source: str, streaming: bool, **arguments) -> Table:
    """What `datasets.load_dataset` makes of them.

    Args:
        path: `parquet`, `webdataset` or the id of a dataset on the Hub.
        source: What to call it.
        streaming: Without a copy.
        arguments: For `load_dataset`.

    Raises:
        ValueError: where it cannot be loaded, or a stream does not say what its columns hold.
    """
    try:
        table = datasets.load_dataset(path, **arguments, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"{source} could not be loaded: {cause}. Give --train_dir, --train_file with parquet files, "
            "--train_shards with WebDataset tar files, or as --dataset_name a dataset on the Hub or `digits`."
        ) from error
    if table.features is None:
        raise ValueError(f"{source} does not say what its columns hold: leave --streaming out.")
    return table


def has_labels(table: Table, options: PretrainDataOptions) -> bool:
    """Whether a column was named for them, or one could be it."""
    return options.label_column is not None or could_be(_columns(table), USUAL_NAMES["label"], KINDS["label"])


def wanted_columns(
    table: Table, options: PretrainDataOptions, wants: Wants, source: str, class_names: list[str] | None = None
) -> Table:
    """The table with `image`, undecoded, `name`, and `label` or `caption`, whatever they are called there.

    Args:
        table: From `open_table`.
        options: What columns are called, and a template for captions of class names.
        wants: What there is beside the image.
        source: What to call the table.
        class_names: What the integers of a stream stand for where it does not say so itself.

    Raises:
        ValueError: for a column that is not there, and rows without a value. Of a stream the latter come when it is
            read, and images that are missing are left to whoever decodes them.
    """
    columns = _choose_columns(table, options, wants, source)
    template = options.caption_template if wants == "captions" and "label" in columns else None
    if isinstance(table, datasets.Dataset):
        return _mapped(table, columns, template, source)
    return _streamed(table, columns, template, source, class_names)


def _columns(table: Table) -> dict[str, Any]:
    """What each holds; members of a JSON are columns of their own."""
    return {name: feature for name, feature in table.features.flatten().items() if name not in (KEY, URL)}


def _choose_columns(table: Table, options: PretrainDataOptions, wants: Wants, source: str) -> dict[str, str]:
    features = _columns(table)
    beside = {"images": [], "labels": ["label"], "captions": ["caption"]}[wants]
    if wants == "captions" and options.caption_template and not _has_captions(features, options):
        beside = ["label"]
    return {
        what: choose_column(
            features,
            what,
            getattr(options, f"{what}_column"),
            USUAL_NAMES[what],
            KINDS[what],
            f"--{what}_column",
            source,
        )
        for what in ["image", *beside]
    }


def _has_captions(features: Mapping[str, Any], options: PretrainDataOptions) -> bool:
    # texts of another name may be the labels that the template is for
    return options.caption_column is not None or any(name in features for name in USUAL_NAMES["caption"])


def _mapped(
    table: datasets.Dataset, columns: Mapping[str, str], template: str | None, source: str
) -> datasets.Dataset:
    if KEY in table.column_names:
        names = [f"{url}, {key}" for url, key in zip(table[URL], table[KEY])]
    else:
        names = [f"{source}, row {row}" for row in range(len(table))]
    dataset = renamed_columns(table.flatten(), columns, source)
    if "label" in columns:
        dataset = with_class_label(dataset, source)
    if "caption" in columns:
        require_captions(dataset["caption"], names)
    dataset = dataset.add_column("name", names)
    return dataset if template is None else captions_of_classes(dataset, template)


def require_captions(captions: list[str], names: list) -> None:
    """Raises `ValueError`, which names the first, where any of them is empty."""
    empty = [name for caption, name in zip(captions, names) if not caption.strip()]
    if empty:
        raise ValueError(f"{len(empty)} of {len(captions)} captions are empty, that of {empty[0]} first. Remove them.")


def captions_of_classes(dataset: datasets.Dataset, template: str) -> datasets.Dataset:
    """With `caption` in place of `label`. Raises `ValueError` for a template without a place for the class."""
    captions = _captions(template, dataset.features["label"].names)
    values = [captions[label] for label in dataset["label"]]
    return dataset.remove_columns("label").add_column("caption", values)


def _captions(template: str, class_names: list[str]) -> list[str]:
    if "{}" not in template:
        raise ValueError(f"--caption_template must have a {{}} where the class goes, got {template!r}.")
    return [template.replace("{}", name) for name in class_names]


# Streams


def _streamed(
    table: datasets.IterableDataset,
    columns: Mapping[str, str],
    template: str | None,
    source: str,
    class_names: list[str] | None,
) -> datasets.IterableDataset:
    features = {"image": datasets.Image(decode=False), "name": datasets.Value("string")}
    num_classes = captions = None
    if "label" in columns:
        label = _class_label(_columns(table)[columns["label"]], columns["label"], class_names, source)
        num_classes, captions = label.num_classes, template and _captions(template, label.names)
    if "caption" in columns or template:
        features["caption"] = datasets.Value("string")
    elif "label" in columns:
        features["label"] = label
    row = _WantedColumns(columns, source, num_classes, captions)
    table = table.cast_column(columns["image"], datasets.Image(decode=False))
    return table.map(row, remove_columns=table.column_names, features=datasets.Features(features))


def _class_label(feature: Any, column: str, class_names: list[str] | None, source: str) -> datasets.ClassLabel:
    if isinstance(feature, datasets.ClassLabel):
        return feature
    if class_names is None or not could_be({column: feature}, [], "int"):
        raise ValueError(
            f"{source} names no classes for its labels ({column}: {feature}), and a stream cannot be searched for "
            "them: leave --streaming out, or if they are numbers from 0 give the classes by --validation_dir or "
            "--validation_file."
        )
    numbers = [name for name in class_names if name.isdecimal()]
    if numbers and numbers != [str(number) for number in range(len(class_names))]:
        raise ValueError(
            f"{source} numbers its classes ({column}: {feature}), and those of the validation images are not numbered "
            f"from 0: {', '.join(class_names[:5])} … Give validation images of all classes."
        )
    return datasets.ClassLabel(names=class_names)


@dataclasses.dataclass(frozen=True)
class _WantedColumns:
    """From a row of a stream to what is wanted of it."""

    columns: Mapping[str, str]
    source: str
    num_classes: int | None
    captions: list[str] | None

    def __call__(self, row: Mapping) -> dict:
        values = {what: _at(row, column) for what, column in self.columns.items()}
        name = self._name(row, values["image"])
        if "label" in values:
            label = values["label"]
            if label is None or not 0 <= label < self.num_classes:
                raise ValueError(
                    f"{name} has the label {label}, outside 0 to {self.num_classes - 1}, as unlabelled splits do. "
                    "Choose one with labels."
                )
            if self.captions is not None:
                values["caption"] = self.captions[values.pop("label")]
        if "caption" in values and not (values["caption"] or "").strip():
            raise ValueError(f"{name} has no caption. Remove it.")
        return values | {"name": name}

    def _name(self, row: Mapping, image: Mapping | None) -> str:
        if KEY in row:
            return f"{row[URL]}, {row[KEY]}"
        if image is None:
            return f"{self.source}, a row without an image"
        # a stream whose shards are shuffled has no numbers that would find it again
        return f"{self.source}, {image['path'] or 'SHA-256 ' + hashlib.sha256(image['bytes']).hexdigest()}"


def _at(row: Mapping, column: str) -> Any:
    """A column, or `json.caption` of a JSON."""
    if column in row:
        return row[column]
    first, _, inner = column.partition(".")
    return None if row[first] is None else _at(row[first], inner)
