# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest

from hf_vitreg.evaluation.evaluate import TASKS
from hf_vitreg.evaluation.options import EvaluationOptions, require_options_of
from hf_vitreg.evaluation.published import (
    DATA,
    FINE_PERCENT,
    METRES,
    MODELS,
    PERCENT,
    TABLES,
    Published,
    find_table,
)
from hf_vitreg.evaluation.token_tasks import TOKEN_TASKS, TokenOptions


CELLS = [pytest.param(cell, id=f"{name}-{cell.row}-{cell.column}") for name in TABLES for cell in TABLES[name].cells]


def published(table: str, row: str, column: str) -> Published | None:
    (cell,) = (cell for cell in find_table(table).cells if (cell.row, cell.column) == (row, column))
    return cell.published


@pytest.mark.parametrize(
    ("table", "row", "column", "expected"),
    [
        ("table1", "CLS", "CUB", (91.3, None)),
        ("table1", "outlier patch", "CUB", (84.9, 2.1)),
        ("table1", "normal patch", "Cars", (10.8, 0.3)),
        ("table1", "outlier patch", "Flowers", (99.6, 0.0)),
        ("table2", "openclip+reg", "NYUd RMSE", (0.661, None)),
        ("table2", "openclip", "ImageNet zero-shot", (59.9, None)),
        ("table3", "dinov2+reg", "VOC 2012", (60.0, None)),
        ("table3", "openclip", "COCO 20k", (31.0, None)),
        ("table4", "outlier patch or register", "Aircraft, 1 register", (71.1, None)),
        ("table5", "normal patch, 4 registers", "position, top-1", (65.8, None)),
        ("figure8", "reg16", "ImageNet linear", (84.80, None)),
        ("figure8", "reg8", "mean of depth tasks, RMSE", (2.729, None)),
        ("local_probes", "outlier patch", "position, mean distance", (5.09, None)),
    ],
)
def test_numbers_are_where_the_paper_has_them(table, row, column, expected):
    assert published(table, row, column) == expected


def test_tables_are_whole():
    sizes = {name: len(table.cells) for name, table in TABLES.items()}
    assert sizes == {
        "table1": 42, "table2": 20, "table3": 18, "table4": 6, "table5": 4, "figure8": 30, "local_probes": 6,
    }  # fmt: skip
    for table in TABLES.values():
        places = [(cell.row, cell.column) for cell in table.cells]
        assert len(set(places)) == len(places) and table.source and table.notes
    assert published("figure8", "reg0", "ADE20k mIoU") is None


@pytest.mark.parametrize("cell", CELLS)
def test_what_measures_a_number_exists_or_it_says_why_not(cell):
    assert (cell.measurement is None) == (cell.unmeasured is not None)
    if cell.measurement is None:
        return
    measured = cell.measurement
    assert measured.model in MODELS
    if measured.task in TOKEN_TASKS:
        TokenOptions(**{"threshold": 1.0, **measured.options})
    else:
        assert measured.task in TASKS and measured.data in DATA
        require_options_of(measured.task, EvaluationOptions(**measured.options))


def test_numbers_of_one_evaluation_share_its_options():
    for table in TABLES.values():
        options = {}
        for cell in table.cells:
            if measured := cell.measurement:
                key = (measured.model, measured.data, measured.task)
                assert options.setdefault(key, measured.options) == measured.options


def test_lost_reads_keys_of_dinov2_and_values_of_the_others():
    for cell in find_table("table3").cells:
        facet = "key" if cell.row in ("dinov2", "dinov2+reg") else "value"
        assert cell.measurement.options == {"facet": facet, "tune": True}


def test_sources_say_how_reliable_they_are():
    assert "digitised" in find_table("figure8").source
    assert "third-party notes" in find_table("table2").source
    assert "text of the paper" in find_table("table1").source


def test_numbers_are_written_with_the_digits_of_their_column():
    assert PERCENT.text(84.94, 2.06) == "84.9±2.1"
    assert (FINE_PERCENT.text(84.6), METRES.text(0.37)) == ("84.60", "0.370")
    assert (PERCENT.text(0.26, sign="+"), PERCENT.text(-3, sign="+")) == ("+0.3", "-3.0")
    depth, position = find_table("table2").cells[2], find_table("table5").cells[0]
    assert (depth.heading, position.heading) == ("NYUd RMSE (m) ↓", "position, top-1 (%) ↑")


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="no table 'table9' to reproduce, only table1, table2"):
        find_table("table9")
