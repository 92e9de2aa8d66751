# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The tables of "Vision Transformers Need Registers" (Darcet et al., ICLR 2024), and how each number is measured here.

A number without a measurement says why there is none. Where a number was not read in the paper itself, the source of
its table says so.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Unit(NamedTuple):
    """How numbers of a kind are written.

    Attributes:
        name: Behind the name of their column.
        scale: What a metric is multiplied by; shares become percentages.
        digits: After the point.
        higher_is_better: Which way is up.
    """

    name: str
    scale: float
    digits: int
    higher_is_better: bool

    def text(self, value: float, std: float | None = None, sign: str = "") -> str:
        """A number as the table has it, `79.1±0.5`; with the sign `"+"` a difference."""
        spread = "" if std is None else f"±{std:.{self.digits}f}"
        return f"{value:{sign}.{self.digits}f}{spread}"


PERCENT = Unit("%", 100, 1, True)
FINE_PERCENT = Unit("%", 100, 2, True)
METRES = Unit("m", 1, 3, False)
ERROR = Unit("", 1, 3, False)
PATCHES = Unit("patches", 1, 2, False)
LENGTH = Unit("", 1, 1, False)
FINE_LENGTH = Unit("", 1, 2, False)

# what nothing but this package's reproduction of tables measures, beside the tasks of `evaluate_model`
SINGLE_TOKENS, LOCAL_TOKENS = "single_tokens", "local_tokens"


class Published(NamedTuple):
    """A number of the paper in the unit of its column, and its standard deviation where it has one."""

    value: float
    std: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a number is measured with.

    Attributes:
        model: The name that a model is given under.
        data: The same of a data set.
        task: Of `evaluate_model`, or `SINGLE_TOKENS` or `LOCAL_TOKENS`.
        metric: The name of the number among the metrics of the task.
        options: Of the task, as the paper has them as far as that is known.
    """

    model: str
    data: str
    task: str
    metric: str
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Cell:
    """A number of a table, itself and no other of the same value.

    Attributes:
        row, column: Where it stands.
        unit: Of the number.
        published: `None` where the paper has none.
        measurement: `None` where nothing here measures it.
        unmeasured: Why, then.
    """

    row: str
    column: str
    unit: Unit
    published: Published | None
    measurement: Measurement | None = None
    unmeasured: str | None = None

    @property
    def heading(self) -> str:
        """The column with its unit, and an arrow that points to where it is better."""
        unit = f" ({self.unit.name})" if self.unit.name else ""
        return f"{self.column}{unit} {'↑' if self.unit.higher_is_better else '↓'}"


@dataclass(frozen=True, kw_only=True)
class PublishedTable:
    """A table of the paper.

    Attributes:
        name: To ask for it by.
        title: What it shows.
        cells: Row by row.
        source: Where the numbers were read.
        notes: What differs here, and what the paper does not tell.
    """

    name: str
    title: str
    cells: Sequence[Cell]
    source: str
    notes: Sequence[str]

    @property
    def models(self) -> list[str]:
        """Names of models, in the order that the table has them."""
        return list(dict.fromkeys(each.model for each in self._measurements()))

    @property
    def data(self) -> list[str]:
        """Names of data sets."""
        return list(dict.fromkeys(each.data for each in self._measurements()))

    def _measurements(self) -> Iterator[Measurement]:
        return (cell.measurement for cell in self.cells if cell.measurement is not None)


def find_table(name: str) -> PublishedTable:
    """A table by its name. Raises `ValueError` where there is none of this name."""
    if name not in TABLES:
        raise ValueError(f"There is no table {name!r} to reproduce, only {', '.join(TABLES)}.")
    return TABLES[name]


MODELS = {
    "deit3": "DeiT-III ViT-B",
    "deit3+reg": "DeiT-III ViT-B, trained with registers",
    "openclip": "OpenCLIP ViT-B/16; with its text tower, for zero_shot",
    "openclip+reg": "OpenCLIP ViT-B/16, trained with registers",
    "dinov2": "DINOv2 ViT-L/14",
    "dinov2+reg": "DINOv2 ViT-L/14, trained with 4 registers",
    "dinov2-g": "DINOv2 ViT-g/14 without registers",
}
MODELS |= {f"reg{number}": f"DINOv2, trained with {number or 'no'} registers" for number in (0, 2, 4, 8, 16)}
MODELS["reg1"] = "DINOv2, trained with 1 register"
DATA = {
    "in1k": "ImageNet-1k: folders train and val of class folders, or the id of a dataset on the Hub",
    "ade20k": "ADE20k: folders images and annotations with training and validation",
    "nyu": "NYU depth v2",
    "voc07": "the folder VOC2007",
    "voc12": "the folder VOC2012",
    "coco20k": "COCO: folders train2014 and annotations, and LOST's list coco_20k_filenames.txt",
}
LABELLED_DATA = "class folders, parquet files or the id of a dataset on the Hub, in a training and a validation split"

_NOTES = "Published numbers as third-party notes have them, which cite the pages of the paper."
_IN_TEXT = "Published numbers as the text of the paper has them."
_PUBLIC = (
    "The public DINOv2 S, B and L with registers are distilled from ViT-g: they are not the models of the paper, "
    "which were trained on ImageNet-22k."
)
_AT_224 = {"size": (224, 224)}
_LINEAR = {"data": "in1k", "task": "linear", "metric": "accuracy", "options": _AT_224}
_SEGMENTATION = {"data": "ade20k", "task": "segmentation", "metric": "mean_iou"}
_DEPTH = {"data": "nyu", "task": "depth", "metric": "rmse", "options": {"eigen_crop": True}}
_LINEAR_NOTE = (
    "Linear heads are DINOv2's sweep at 224 pixels, on features of the images without augmentation; the best head is "
    "chosen on validation images, as DINOv2 does."
)
_DENSE_NOTE = (
    "Dense heads read the last layer of whole images at the model's own size, or --size; the settings of the paper "
    "are not known."
)


# Tables 2 and 3, figure 8: a model a row


def _table2() -> PublishedTable:
    rows = {
        "deit3": (84.7, 38.9, 0.511),
        "deit3+reg": (84.7, 39.1, 0.512),
        "openclip": (78.2, 26.6, 0.702),
        "openclip+reg": (78.1, 26.7, 0.661),
        "dinov2": (84.3, 46.6, 0.378),
        "dinov2+reg": (84.8, 47.9, 0.366),
    }
    zero_shot = {"openclip": 59.9, "openclip+reg": 60.1}
    columns = (
        ("ImageNet linear", PERCENT, _LINEAR),
        ("ADE20k mIoU", PERCENT, _SEGMENTATION),
        ("NYUd RMSE", METRES, _DEPTH),
    )
    cells = []
    for row, values in rows.items():
        cells += [_of_model(row, *column, value) for column, value in zip(columns, values)]
        if row in zero_shot:
            measured = {"data": "in1k", "task": "zero_shot", "metric": "accuracy"}
            cells.append(_of_model(row, "ImageNet zero-shot", PERCENT, measured, zero_shot[row]))
    return PublishedTable(
        name="table2",
        title="Table 2: linear heads on frozen features, and zero-shot classification",
        cells=cells,
        source=_NOTES,
        notes=(_LINEAR_NOTE, _DENSE_NOTE, "Zero-shot: 2b of the paper, of OpenCLIP alone.", _PUBLIC),
    )


def _table3() -> PublishedTable:
    rows = {
        "deit3": (11.7, 13.1, 10.7),
        "deit3+reg": (27.1, 32.7, 25.1),
        "openclip": (38.8, 44.3, 31.0),
        "openclip+reg": (37.1, 42.0, 27.9),
        "dinov2": (35.3, 40.2, 26.9),
        "dinov2+reg": (55.4, 60.0, 42.0),
    }
    columns = {"VOC 2007": "voc07", "VOC 2012": "voc12", "COCO 20k": "coco20k"}
    cells = []
    for row, values in rows.items():
        options = {"facet": "key" if row.startswith("dinov2") else "value", "tune": True}
        for (column, data), value in zip(columns.items(), values):
            measured = {"data": data, "task": "object_discovery", "metric": "corloc", "options": options}
            cells.append(_of_model(row, column, PERCENT, measured, value))
    return PublishedTable(
        name="table3",
        title="Table 3: unsupervised object discovery by LOST, CorLoc",
        cells=cells,
        source=f"{_NOTES} Those of DINOv2 agree with another paper that quotes them.",
        notes=(
            "LOST reads keys of DINOv2, values of DeiT-III and OpenCLIP, as in the paper.",
            "The bias that the paper adds to the gram matrix is not published. Here features are L2-normalized, bias "
            "and layer (of the last four) are chosen on a fifth of the images, and CorLoc is that of the others.",
            _PUBLIC,
        ),
    )


def _figure8() -> PublishedTable:
    rows = {
        "reg0": (84.34, 66.02, 2.846),
        "reg1": (84.43, 66.66, 2.748),
        "reg2": (84.61, 66.68, 2.774),
        "reg4": (84.60, 66.91, 2.754),
        "reg8": (84.64, 66.76, 2.729),
        "reg16": (84.80, 66.76, 2.761),
    }
    averaged = "which data sets it averages is not known"
    cells = []
    for row, (accuracy, segmentation, depth) in rows.items():
        cells += [
            _of_model(row, "ImageNet linear", FINE_PERCENT, _LINEAR, accuracy),
            _unmeasured(row, "mean of segmentation tasks, mIoU", FINE_PERCENT, segmentation, averaged),
            _of_model(row, "ADE20k mIoU", FINE_PERCENT, _SEGMENTATION, None),
            _unmeasured(row, "mean of depth tasks, RMSE", ERROR, depth, averaged),
            _of_model(row, "NYUd RMSE", METRES, _DEPTH, None),
        ]
    return PublishedTable(
        name="figure8",
        title="Figure 8: DINOv2 ViT-L/14 by its number of registers",
        cells=cells,
        source=(
            "The paper has no table of figure 8: published numbers were digitised from its plot by a third party, "
            "to about 0.02."
        ),
        notes=(
            "Axes of the figure are averages of tasks and its caption says ADE20k and NYUd, whose numbers are of "
            "another size: ours are beside them, to be compared with each other only.",
            _LINEAR_NOTE,
            _DENSE_NOTE,
        ),
    )


# Tables 1, 4 and 5: a kind of tokens a row


_TABLE1_DATA = {
    "Aircraft": "aircraft",
    "CIFAR-10": "cifar10",
    "CIFAR-100": "cifar100",
    "CUB": "cub",
    "Caltech-101": "caltech101",
    "Cars": "cars",
    "DTD": "dtd",
    "Flowers": "flowers",
    "Food": "food",
    "ImageNet": "in1k",
    "Places205": "places205",
    "Pets": "pets",
    "SUN397": "sun397",
    "VOC 2007": "voc07",
}
_TABLE1_VALUES = {
    "cls": (87.3, 99.4, 94.5, 91.3, 96.9, 91.5, 85.2, 99.7, 94.7, 86.0, 66.4, 96.9, 78.6, 89.1),
    "normal": (17.1, 97.1, 81.3, 18.6, 73.2, 10.8, 63.1, 59.5, 74.2, 65.8, 53.1, 47.8, 37.7, 70.8),
    "outlier": (79.1, 99.3, 93.7, 84.9, 97.6, 85.2, 84.9, 99.6, 93.5, 69.0, 55.1, 94.1, 78.5, 89.7),
}
_TABLE1_STDS = {
    "normal": (0.5, 0.1, 0.3, 0.6, 1.3, 0.3, 0.8, 1.2, 0.3, 0.1, 0.3, 0.5, 0.3, 0.5),
    "outlier": (0.5, 0.0, 0.3, 2.1, 0.7, 0.9, 0.9, 0.0, 0.2, 0.7, 1.0, 0.2, 0.2, 0.1),
}
_ROW_OF_KIND = {"cls": "CLS", "normal": "normal patch", "outlier": "outlier patch"}
_OUTLIER_NOTE = "Outliers are patches whose norm before the final norm is above {}; probes read them after it."
_DRAWS_NOTE = (
    "Logistic regression on one token an image, drawn at random; ± is the standard deviation over five draws. Images "
    "without such a token are left out, and counted in the results."
)
_SIZE_NOTE = "Images are seen at 224 pixels, or --size; the paper's size is not known."
_ACCURACY_NOTE = "Accuracy is over images; where the paper's is the mean over classes is not known."


def _table1() -> PublishedTable:
    several = "its images have several classes each, which no probe here reads"
    cells = []
    for kind, values in _TABLE1_VALUES.items():
        stds = _TABLE1_STDS.get(kind, (None,) * len(values))
        for (column, data), value, std in zip(_TABLE1_DATA.items(), values, stds):
            row, published = _ROW_OF_KIND[kind], Published(value, std)
            if data == "voc07":
                cells.append(_unmeasured(row, column, PERCENT, published, several))
            else:
                options = {**_AT_224, "threshold": 150.0}
                measured = _tokens(model="dinov2-g", data=data, metric=kind, options=options)
                cells.append(Cell(row=row, column=column, unit=PERCENT, published=published, measurement=measured))
    return PublishedTable(
        name="table1",
        title="Table 1: what single tokens of DINOv2 ViT-g/14 tell of the class of their image",
        cells=cells,
        source=_IN_TEXT,
        notes=(_OUTLIER_NOTE.format("150, or --threshold"), _DRAWS_NOTE, _ACCURACY_NOTE, _SIZE_NOTE),
    )


def _table4() -> PublishedTable:
    rows = {"CLS": (84.6, 85.2), "normal patch": (15.5, 14.5), "outlier patch or register": (73.3, 71.1)}
    kinds = {"CLS": ("cls", "cls"), "normal patch": ("normal", "normal")}
    cells = []
    for row, values in rows.items():
        for number, value, kind in zip((0, 1), values, kinds.get(row, ("outlier", "register"))):
            measured = _tokens(model=f"reg{number}", data="aircraft", metric=kind, options=_AT_224)
            column = f"Aircraft, {number} register{'' if number == 1 else 's'}"
            cell = Cell(row=row, column=column, unit=PERCENT, published=Published(value), measurement=measured)
            cells.append(cell)
    return PublishedTable(
        name="table4",
        title="Table 4: what single tokens tell of the class of their image, without and with a register",
        cells=cells,
        source=_NOTES,
        notes=(
            f"{_OUTLIER_NOTE.format('--threshold')} 150 is that of ViT-g; see hf-vitreg inspect for that of another "
            "model.",
            _DRAWS_NOTE,
            _ACCURACY_NOTE,
            _SIZE_NOTE,
            "The first column has an outlier in the last row, the second a register.",
        ),
    )


def _table5() -> PublishedTable:
    columns = {
        "position, top-1": (PERCENT, "position_top1", (66.3, 65.8)),
        "reconstruction, L2 error": (LENGTH, "reconstruction_l2", (15.9, 16.0)),
    }
    cells = []
    for index, number in enumerate((0, 4)):
        for column, (unit, metric, values) in columns.items():
            measured = _local(f"reg{number}", f"normal_{metric}", _AT_224)
            published = Published(values[index])
            row = f"normal patch, {number} registers"
            cells.append(Cell(row=row, column=column, unit=unit, published=published, measurement=measured))
    return PublishedTable(
        name="table5",
        title="Table 5: what normal patches tell of their position and pixels, without and with registers",
        cells=cells,
        source=_NOTES,
        notes=(f"{_OUTLIER_NOTE.format('--threshold')} 150 is that of ViT-g.", _LOCAL_NOTE, _SIZE_NOTE),
    )


_LOCAL_NOTE = (
    "Position: softmax regression to the cell of the grid. Pixels: least squares, and the mean length of the error "
    "over all normalized pixels of a patch. Both on 16 patches of each of at most 10,000 training images, measured on "
    "validation images; the paper's images and training are not known."
)


def _probes() -> PublishedTable:
    values = {"normal": (41.7, 0.79, 18.38), "outlier": (22.8, 5.09, 25.23)}
    columns = (
        ("position, top-1", PERCENT, "position_top1"),
        ("position, mean distance", PATCHES, "position_distance"),
        ("reconstruction, L2 error", FINE_LENGTH, "reconstruction_l2"),
    )
    cells = []
    for kind, published in values.items():
        for (column, unit, metric), value in zip(columns, published):
            measured = _local("dinov2-g", f"{kind}_{metric}", {**_AT_224, "threshold": 150.0})
            where = {"row": _ROW_OF_KIND[kind], "column": column, "unit": unit}
            cells.append(Cell(**where, published=Published(value), measurement=measured))
    return PublishedTable(
        name="local_probes",
        title="Section 2: what single tokens of DINOv2 ViT-g/14 tell of their position and pixels",
        cells=cells,
        source=_NOTES,
        notes=(_OUTLIER_NOTE.format("150, or --threshold"), _LOCAL_NOTE, _SIZE_NOTE),
    )


# Parts


def _of_model(model: str, column: str, unit: Unit, measured: Mapping, value: float | None) -> Cell:
    published = None if value is None else Published(value)
    measurement = Measurement(model=model, **measured)
    return Cell(row=model, column=column, unit=unit, published=published, measurement=measurement)


def _unmeasured(row: str, column: str, unit: Unit, published: Published | float, why: str) -> Cell:
    published = published if isinstance(published, Published) else Published(published)
    return Cell(row=row, column=column, unit=unit, published=published, unmeasured=why)


def _tokens(**measured) -> Measurement:
    return Measurement(task=SINGLE_TOKENS, **measured)


def _local(model: str, metric: str, options: Mapping[str, object]) -> Measurement:
    return Measurement(model=model, data="in1k", task=LOCAL_TOKENS, metric=metric, options=options)


TABLES = {
    table.name: table for table in (_table1(), _table2(), _table3(), _table4(), _table5(), _figure8(), _probes())
}
