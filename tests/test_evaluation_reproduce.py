# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import io
import json
import shutil

import pytest
import torch
from evaluation_cases import SIDE, labelled, save_model, voc
from rich.console import Console
from sample_images import colour_image, write_folder
from typer.testing import CliRunner

from hf_vitreg import cli
from hf_vitreg.evaluation import table_jobs
from hf_vitreg.evaluation.evaluate import evaluate_model
from hf_vitreg.evaluation.options import EvaluationOptions
from hf_vitreg.evaluation.published import TABLES
from hf_vitreg.evaluation.reproduce import reproduce
from hf_vitreg.evaluation.reproduced import CellResult, Reproduced
from hf_vitreg.evaluation.table_jobs import ReproduceOptions
from hf_vitreg.features import load_vit


SMALL = ReproduceOptions(size=(SIDE, SIDE))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    return voc(tmp_path_factory.mktemp("voc") / "VOC2007", count=9)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def measured(model, boxes, tmp_path_factory):
    """A run of one cell of table 3, and of one that failed."""
    output = tmp_path_factory.mktemp("output")
    return output, reproduce(
        "table3", {"dinov2": model}, {"voc07": boxes, "voc12": "nowhere"}, output, SMALL, device="cpu"
    )


def of(reproduced: Reproduced, row: str, column: str) -> CellResult:
    (found,) = (each for each in reproduced.results if (each.cell.row, each.cell.column) == (row, column))
    return found


@pytest.mark.parametrize("table", TABLES)
def test_with_nothing_given_all_is_published_and_nothing_is_ours(table):
    reproduced = reproduce(table)
    assert reproduced.count("not run") == len(reproduced.results) == len(TABLES[table].cells)
    for result in reproduced.results:
        assert (result.ours, result.difference, result.evaluation) == (None, None, None)
        if result.cell.measurement is None:
            assert result.reason == result.cell.unmeasured
        else:
            measured = result.cell.measurement
            assert result.reason.startswith(f"needs --model {measured.model}=…, --data {measured.data}=…")
    lines = [line for line in reproduced.as_markdown().splitlines() if line.startswith("| ")]
    assert len(lines) == len(reproduced.results) + 2
    assert all("| not run: " in line for line in lines[2:])
    notes = "\n".join(reproduced.footnotes)
    assert TABLES[table].source in notes and all(f"--model {name}=DIR_OR_ID" in notes for name in TABLES[table].models)
    assert all(f"{name}=PATH" in notes for name in TABLES[table].data)


def test_a_cell_is_what_the_evaluation_measures(measured, model, boxes, tmp_path):
    output, reproduced = measured
    result = of(reproduced, "dinov2", "VOC 2007")
    options = EvaluationOptions(size=(SIDE, SIDE), facet="key", tune=True)
    alone = evaluate_model(model, "object_discovery", boxes, tmp_path / "alone", options, device="cpu")
    assert result.status == "run" and result.ours == 100 * alone.metrics["corloc"]
    assert result.difference == result.ours - 35.3
    assert result.here == f"run: {model} on 9 images of VOC2007 trainval, 28x28 pixels"
    files = output / result.evaluation
    assert json.loads((files / "results.json").read_text())["metrics"] == alone.metrics
    assert (files / "boxes.json").is_file()


def test_what_failed_says_why_and_what_was_not_run_says_what_is_missing(measured):
    _, reproduced = measured
    failed, missing = of(reproduced, "dinov2", "VOC 2012"), of(reproduced, "dinov2", "COCO 20k")
    assert failed.status == "failed" and "nowhere has no JPEGImages" in failed.here and failed.ours is None
    assert missing.here == "not run: needs --data coco20k=…"
    assert of(reproduced, "deit3", "VOC 2007").here == "not run: needs --model deit3=…"
    assert [reproduced.count(status) for status in ("run", "failed", "not run")] == [1, 1, 16]


def test_files_say_what_was_returned(measured):
    output, reproduced = measured
    results = json.loads((output / "results.json").read_text())
    assert results == json.loads(json.dumps(reproduced.as_json())) and results["table"] == "table3"
    by_status = {cell["status"]: cell for cell in results["cells"]}
    assert by_status["run"]["published"] == 35.3 and by_status["run"]["changed"] == ["28x28 pixels"]
    assert all(cell["ours"] is None for cell in results["cells"] if cell["status"] != "run")
    assert (output / "table.md").read_text() == reproduced.as_markdown()
    assert "- 18 numbers: 1 run, 1 failed, 16 not run.\n" in reproduced.as_markdown()
    assert sorted(path.name for path in output.iterdir()) == ["evaluations", "results.json", "table.md"]


def test_a_terminal_gets_a_table_and_a_file_markdown(measured):
    _, reproduced = measured
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    reproduced.show(terminal)
    assert "┃" in terminal.file.getvalue() and "voc12=PATH" in terminal.file.getvalue()
    file = Console(file=io.StringIO(), force_terminal=False)
    reproduced.show(file)
    assert file.file.getvalue() == reproduced.as_markdown()


# Resuming


def resumed(output, model, boxes, tmp_path, monkeypatch, options=SMALL, row="dinov2"):
    """A second run in a copy of the output, and what it evaluated anew."""
    copy, anew = tmp_path / "copy", []
    shutil.copytree(output, copy)

    def evaluate(*args, **kwargs):
        anew.append(args[1])
        raise ValueError("not now")

    monkeypatch.setattr(table_jobs, "evaluate_model", evaluate)
    done = reproduce("table3", {row: model}, {"voc07": boxes}, copy, options, device="cpu", resume=True)
    return done, anew


def test_an_earlier_run_is_taken_where_it_is_the_same(measured, model, boxes, tmp_path, monkeypatch):
    output, before = measured
    done, anew = resumed(
        output, model, boxes, tmp_path, monkeypatch, ReproduceOptions(size=(SIDE, SIDE), batch_size=3)
    )
    result = of(done, "dinov2", "VOC 2007")
    assert (anew, result.status) == ([], "resumed")
    assert result.ours == of(before, "dinov2", "VOC 2007").ours
    assert result.here.startswith("from an earlier run: ")


def test_numbers_of_other_weights_are_not_shown(measured, model, boxes, tmp_path, monkeypatch):
    output, _ = measured
    other = load_vit(model).model
    with torch.no_grad():
        other.layernorm.bias[3] += 0.01
    shutil.copytree(model, tmp_path / "kept")
    try:
        # at the same place
        other.save_pretrained(model)
        done, anew = resumed(output, model, boxes, tmp_path, monkeypatch)
    finally:
        shutil.copytree(tmp_path / "kept", model, dirs_exist_ok=True)
    result = of(done, "dinov2", "VOC 2007")
    assert (anew, result.status, result.ours) == (["object_discovery"], "failed", None)


def test_numbers_of_other_options_data_or_rows_are_not_shown(measured, model, boxes, tmp_path, monkeypatch):
    output, _ = measured
    elsewhere = shutil.copytree(boxes, tmp_path / "VOC2007")
    other_size = ReproduceOptions(size=(35, 28))
    for number, (data, options, row) in enumerate(
        [(boxes, other_size, "dinov2"), (elsewhere, SMALL, "dinov2"), (boxes, SMALL, "dinov2+reg")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        done, anew = resumed(output, model, data, folder, monkeypatch, options, row)
        assert anew == ["object_discovery"] and of(done, row, "VOC 2007").ours is None


def test_a_model_that_is_not_given_again_has_no_number(measured, boxes, tmp_path, monkeypatch):
    output, _ = measured
    copy = shutil.copytree(output, tmp_path / "copy")
    done = reproduce("table3", {}, {"voc07": boxes}, copy, resume=True)
    assert of(done, "dinov2", "VOC 2007").here == "not run: needs --model dinov2=…"


def test_results_are_not_replaced_unasked(measured, model, boxes, tmp_path):
    output, _ = measured
    given = {"dinov2": model}, {"voc07": boxes}
    with pytest.raises(ValueError, match=r"already[.] Give a new folder, --resume or --overwrite"):
        reproduce("table3", *given, output)
    with pytest.raises(ValueError, match=r"holds table3[.] Give a new folder for figure8"):
        reproduce("figure8", {}, {}, output, resume=True)
    (tmp_path / "letter.txt").touch()
    with pytest.raises(ValueError, match="holds other things than a table"):
        reproduce("table3", *given, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        reproduce("table3", *given, tmp_path / "letter.txt")
    with pytest.raises(ValueError, match="Give --output"):
        reproduce("table3", *given)


def test_an_error_of_ours_stops_one_cell(model, boxes, tmp_path, monkeypatch, caplog):
    evaluated = []

    def evaluate(*args, **kwargs):
        evaluated.append(args)
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(table_jobs, "evaluate_model", evaluate)
    done = reproduce("table3", {"dinov2": model}, {"voc07": boxes, "voc12": boxes}, tmp_path / "out")
    assert of(done, "dinov2", "VOC 2012").here == "failed: RuntimeError: out of memory" and len(evaluated) == 2
    assert "object_discovery_voc07_dinov2 failed" in caplog.text


def test_what_was_done_is_kept_when_a_run_is_stopped(model, boxes, tmp_path, monkeypatch):
    own = table_jobs.evaluate_model

    def evaluate(name, task, data, folder, *args, **kwargs):
        if "voc12" in str(folder):
            raise KeyboardInterrupt
        return own(name, task, data, folder, *args, **kwargs)

    monkeypatch.setattr(table_jobs, "evaluate_model", evaluate)
    given = {"dinov2": model}, {"voc07": boxes, "voc12": boxes}, tmp_path / "out", SMALL
    with pytest.raises(KeyboardInterrupt):
        reproduce("table3", *given, device="cpu")
    statuses = [cell["status"] for cell in json.loads((tmp_path / "out/results.json").read_text())["cells"]]
    assert statuses.count("run") == 1 and statuses.count("not run") == 17
    assert "| not run: the run has not come to it |" in (tmp_path / "out/table.md").read_text()
    monkeypatch.setattr(table_jobs, "evaluate_model", own)
    done = reproduce("table3", *given, device="cpu", resume=True)
    assert (done.count("resumed"), done.count("run")) == (1, 1)


def test_of_several_processes_the_first_writes(model, boxes, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(table_jobs, "evaluate_model", lambda *args, **kwargs: None)
    assert reproduce("table3", {"dinov2": model}, {"voc07": boxes}, tmp_path / "out") is None
    assert not (tmp_path / "out").exists()


# What is given


@pytest.mark.parametrize(
    ("table", "models", "data", "options", "error"),
    [
        ("table3", {"dinov3": "x"}, {}, {}, "table3 has no model 'dinov3'. Its names for --model: deit3, deit3.reg"),
        ("table3", {}, {"in1k": "x"}, {}, "table3 has no data 'in1k'. Its names for --data: voc07, voc12, coco20k"),
        ("table3", {}, {}, {"max_images": 3}, "No task of table3 reads --max-images: object_discovery"),
        ("table2", {}, {}, {"threshold": 3.0}, "No task of table2 reads --threshold"),
        ("table2", {"dinov2": "x"}, {"in1k": "x"}, {"max_images": 0}, "--max-images must be above 0, got 0"),
        ("table1", {"dinov2-g": "x"}, {"cub": "x"}, {"max_images": 0}, "--max-images must be above 0, got 0"),
    ],
)
def test_what_a_table_does_not_know_is_refused(table, models, data, options, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        reproduce(table, models, data, tmp_path / "out", ReproduceOptions(**options))
    assert not (tmp_path / "out").exists()


def test_options_reach_the_tasks_that_read_them(model, images, tmp_path, monkeypatch):
    calls = {}

    def evaluate(place, task, data, folder, options, **kwargs):
        calls[folder.name] = (data, {**options.changed()}, kwargs)
        raise ValueError("enough")

    monkeypatch.setattr(table_jobs, "evaluate_model", evaluate)
    options = ReproduceOptions(max_images=7, class_names="names.txt", cache_dir="cache", seed=3)
    reproduce("table2", {"openclip": model}, {"in1k": images, "nyu": "n"}, tmp_path / "2", options, device="cpu")
    common, how = {"max_images": 7, "seed": 3}, {"device": "cpu", "overwrite": False, "progress": False}
    assert calls == {
        "linear_in1k_openclip": (str(images), {"size": (224, 224), "cache_dir": "cache", **common}, how),
        "zero_shot_in1k_openclip": (str(images), {"class_names": "names.txt", **common}, how),
        "depth_nyu_openclip": ("n", {"eigen_crop": True, "cache_dir": "cache", "seed": 3}, how),
    }
    calls.clear()
    reproduce("table3", {"openclip": model}, {"coco20k": "coco"}, tmp_path / "3")
    (data, settings, _), *_ = calls.values()
    assert data == "coco/train2014" and settings == {
        "facet": "value",
        "tune": True,
        "annotations": "coco/annotations/instances_train2014.json",
        "image_list": "coco/coco_20k_filenames.txt",
    }


def test_zero_shot_refuses_numbers_of_wordnet(model, tmp_path):
    for split in ("train", "validation"):
        write_folder(tmp_path / "data" / split, {"n01440764": 1, "n01443537": 2})
    done = reproduce("table2", {"openclip": model}, {"in1k": tmp_path / "data"}, tmp_path / "out", SMALL, device="cpu")
    assert "are called n01440764 and the like: give --class-names" in of(done, "openclip", "ImageNet zero-shot").here


# Tokens


def test_tokens_of_one_evaluation_fill_several_rows(model, images, tmp_path):
    given = {"dinov2-g": model}, {"cub": images}
    encoder = load_vit(model)
    pixels = encoder.preprocess([colour_image(label, 0) for label in range(3)])
    norms = encoder.split(encoder.layers(pixels, [-1])[-1]).patches.norm(dim=-1)
    tokens = ReproduceOptions(size=(SIDE, SIDE), threshold=round(norms.median().item(), 3))
    done = reproduce("table1", *given, tmp_path / "out", tokens, device="cpu")
    cls, normal, outlier = (of(done, row, "CUB") for row in ("CLS", "normal patch", "outlier patch"))
    options = EvaluationOptions(size=(SIDE, SIDE))
    logistic = evaluate_model(model, "logistic", images, tmp_path / "alone", options, device="cpu")
    assert cls.ours == pytest.approx(100 * logistic.metrics["accuracy"]) and cls.ours_std is None
    assert normal.ours is not None and normal.ours_std is not None and normal.evaluation == outlier.evaluation
    assert cls.changed == ("28x28 pixels", f"threshold {tokens.threshold:g}")
    results = json.loads((tmp_path / "out" / cls.evaluation / "results.json").read_text())
    assert results["task"] == "single_tokens" and results["options"]["threshold"] == tokens.threshold
    assert results["model"]["sha256"] == logistic.results["model"]["sha256"]
    again = reproduce("table1", *given, tmp_path / "out", tokens, device="cpu", resume=True)
    assert again.count("resumed") == 3 and of(again, "CLS", "CUB").ours == cls.ours


def test_a_kind_of_tokens_that_there_is_not_fails_alone(model, images, tmp_path):
    options = ReproduceOptions(size=(SIDE, SIDE), threshold=1e9)
    done = reproduce("table4", {"reg0": model}, {"aircraft": images}, tmp_path / "out", options, device="cpu")
    missing = of(done, "outlier patch or register", "Aircraft, 0 registers")
    assert missing.here == "failed: None of the 18 training images has such a token." and missing.ours is None
    assert of(done, "CLS", "Aircraft, 0 registers").status == "run"
    assert of(done, "CLS", "Aircraft, 1 register").status == "not run"


def test_position_and_pixels_of_patches(model, images, tmp_path):
    options = ReproduceOptions(size=(SIDE, SIDE), threshold=1e9, batch_size=5)
    done = reproduce("table5", {"reg4": model}, {"in1k": images}, tmp_path / "out", options, device="cpu")
    position, pixels = (result for result in done.results if result.status == "run")
    assert 0 <= position.ours <= 100 and pixels.ours > 0 and position.changed == ("28x28 pixels", "threshold 1e+09")
    details = json.loads((tmp_path / "out" / pixels.evaluation / "results.json").read_text())["details"]
    assert details["normal"]["num_train_images"] == 18 and "outlier_position_top1" in details["not_measured"]


def test_tokens_are_measured_by_one_process(model, images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = reproduce("table1", {"dinov2-g": model}, {"cub": images}, tmp_path / "out", SMALL)
    assert "measured by one process" in of(done, "CLS", "CUB").here


# The command


def run(*arguments):
    return CliRunner().invoke(cli.app, ["reproduce", *map(str, arguments)])


def test_the_command_prints_the_table(model, boxes, tmp_path):
    bare = run("table3")
    assert (bare.exit_code, bare.stdout) == (0, reproduce("table3").as_markdown())
    given = ("--model", f"dinov2={model}", "--data", f"voc07={boxes}", "--size", SIDE, "--device", "cpu")
    done = run("table3", *given, "--output", tmp_path / "out")
    assert done.exit_code == 0 and "| run: " in done.stdout
    assert (tmp_path / "out/table.md").read_text() == done.stdout
    failed = run("table3", "--model", "dinov2=nowhere", "--data", f"voc07={boxes}", "--output", tmp_path / "failed")
    assert failed.exit_code == 1 and "| failed: Cannot load nowhere" in failed.stdout
    wrong = run("table7")
    assert wrong.exit_code == 1 and "Error: There is no table 'table7'" in wrong.stderr
