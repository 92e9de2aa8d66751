# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import ast
import inspect
import json
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import PIL.Image
import pytest
import yaml
from evaluation_cases import README, dense, labelled, save_model, voc
from sample_images import colour_image
from test_data_boxes import voc_object
from typer.testing import CliRunner

import hf_vitreg
from hf_vitreg import cli
from hf_vitreg.analysis import defect_report, report
from hf_vitreg.deployment import export as deployment
from hf_vitreg.deployment import extract
from hf_vitreg.deployment.extract import Extracted, FeatureOptions
from hf_vitreg.deployment.program import Exported
from hf_vitreg.evaluation import evaluate as evaluation
from hf_vitreg.evaluation.options import EvaluationOptions
from hf_vitreg.hub import export
from hf_vitreg.registers import give
from hf_vitreg.registers.options import RegisterOptions


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_entry_point_is_the_app():
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert pyproject["project"]["scripts"] == {"hf-vitreg": f"{cli.__name__}:app"}


def test_version_and_help():
    assert run("--version").stdout == f"hf-vitreg {hf_vitreg.__version__}\n"
    for arguments in ((), ("--help",)):
        assert "push" in run(*arguments).output
    text = run("push", "--help").output
    assert all(word in text for word in ("DIR", "ORG/NAME", "--private", "--revision", "--message"))


def test_module_itself_imports_nothing_heavy():
    tree = ast.parse(Path(cli.__file__).read_text())
    imported = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {"." * node.level + (node.module or "") for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert imported == {"collections.abc", "contextlib", "pathlib", "typing", "typer"}


def test_push_hands_on_what_was_given_and_prints_the_commit(tmp_path, monkeypatch):
    calls = []

    def publish(*args, **kwargs):
        calls.append((args, kwargs))
        return "https://hub/org/name/commit/1"

    monkeypatch.setattr(export, "publish", publish)
    monkeypatch.setattr(export, "sort_files", lambda folder: (["config.json"], ["checkpoints/", "metrics.jsonl"]))
    done = run("push", tmp_path, "org/name", "--private", "--revision", "v2", "--message", "Second")
    assert (done.exit_code, done.stdout) == (0, "https://hub/org/name/commit/1\n")
    assert done.stderr.endswith("no part of a model repository: checkpoints/, metrics.jsonl\n")
    assert run("push", tmp_path, "name").exit_code == 0
    assert calls == [
        ((tmp_path, "org/name"), {"private": True, "revision": "v2", "commit_message": "Second"}),
        ((tmp_path, "name"), {"private": None, "revision": None, "commit_message": "Upload the model"}),
    ]


@pytest.mark.parametrize("error", [ValueError("a\n  b"), FileNotFoundError("a b"), ConnectionError("a b")])
def test_what_the_user_can_mend_is_one_line(error, tmp_path, monkeypatch):
    def publish(*_, **__):
        raise error

    monkeypatch.setattr(export, "publish", publish)
    done = run("push", tmp_path, "org/name")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "Error: a b\n")


def test_bug_shows_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "publish", lambda *_, **__: {}["missing"])
    assert isinstance(run("push", tmp_path, "org/name").exception, KeyError)


def test_push_checks_the_folder_first(tmp_path):
    done = run("push", tmp_path / "gone", "org/name")
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: {tmp_path / 'gone'} does not exist.")
    assert run("push", tmp_path).exit_code == 2, "usage"


def test_inspect_hands_on_what_was_given_and_prints_the_verdict(tmp_path, monkeypatch):
    calls = []

    def inspect_model(*args, **kwargs):
        calls.append((args, kwargs))
        verdicts = (("Artifacts: yes.", "3 % of the patches."), ("Artifacts: no.",))[
            : 1 + (kwargs["compare"] is not None)
        ]
        return report.Report(tmp_path, verdicts, num_unreadable=2 if kwargs["compare"] else 0)

    monkeypatch.setattr(report, "inspect_model", inspect_model)
    done = run("inspect", "model", "--images", "photos", "--output", tmp_path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"model: Artifacts: yes. 3 % of the patches.\n{tmp_path / 'report.html'}\n"
    options = "--compare other --checkpoints runs --threshold 150 --side low --layer 7 --size 448x672 --max-images 9"
    options += " --batch-size 5 --seed 3 --device cpu --overwrite --all-layers --images more/*.png"
    done = run("inspect", "model", "--images", "photos", "--output", tmp_path, *options.split())
    assert "other: Artifacts: no.\n" in done.stdout and done.stderr.startswith("2 images could not be used")
    defaults = {
        "compare": None,
        "checkpoints": None,
        "threshold": "mad",
        "side": "high",
        "layer": None,
        "size": None,
        "max_images": None,
        "batch_size": 16,
        "seed": 0,
        "device": None,
        "overwrite": False,
        "progress": True,
        "all_layers": False,
    }
    given = {
        "compare": "other",
        "checkpoints": "runs",
        "threshold": 150.0,
        "side": "low",
        "layer": 7,
        "size": (448, 672),
        "max_images": 9,
        "batch_size": 5,
        "seed": 3,
        "device": "cpu",
        "overwrite": True,
        "progress": True,
        "all_layers": True,
    }
    assert calls == [
        (("model", ["photos"], tmp_path), defaults),
        (("model", ["photos", "more/*.png"], tmp_path), given),
    ]


def test_inspect_reads_sizes_and_thresholds_as_people_write_them(tmp_path, monkeypatch):
    assert (cli._size("448"), cli._size("28x42")) == ((448, 448), (28, 42))
    assert (cli._threshold("mean+3std"), cli._threshold("1.5e2")) == ("mean+3std", 150.0)
    done = run("inspect", "model", "--images", "photos", "--output", tmp_path, "--size", "big")
    assert done.exit_code == 2 and "448x672" in done.stderr


def test_inspect_says_in_one_line_what_is_wrong(tmp_path):
    done = run("inspect", tmp_path / "gone", "--images", tmp_path, "--output", tmp_path / "report")
    assert (done.exit_code, done.stdout) == (1, "") and done.stderr.startswith(
        f"Error: There is no image in {tmp_path}"
    )
    assert run("inspect", "model", "--images", tmp_path).exit_code == 2, "usage"
    done = run("inspect", "model", "--output", tmp_path / "report")
    assert done.exit_code == 2 and "--weights-only" in done.stderr


def test_inspect_of_weights_prints_the_table_and_makes_a_report(model, tmp_path):
    done = run("inspect", model, "--weights-only", "--output", tmp_path / "report")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "dominance" in done.stdout and "AUROC" not in done.stdout
    assert "After layer 5 the weights stretch one direction" in done.stdout
    assert done.stdout.endswith(f"{tmp_path / 'report' / 'report.html'}\n")
    again = run("inspect", model, "--weights-only", "--output", tmp_path / "report")
    assert again.exit_code == 1 and again.stderr.startswith("Error: There is a report in")


def test_inspect_of_weights_needs_no_folder(model):
    done = run("inspect", "--weights-only", model)
    assert done.exit_code == 0, done.output
    assert "After layer 5 the weights stretch one direction" in done.stdout and "report.html" not in done.stdout


def test_inspect_of_images_needs_a_folder(model):
    done = run("inspect", model, "--images", "photos")
    assert done.exit_code == 2 and "--output" in done.stderr


def test_inspect_of_weights_hands_on_what_was_given(tmp_path, monkeypatch):
    calls = []

    class Report:
        verdict, page = ("One.", "Two."), tmp_path / "report.html"

        def show(self):
            print("table")

    def inspect_weights(*args, **kwargs):
        calls.append((args, kwargs))
        return Report()

    monkeypatch.setattr(defect_report, "inspect_weights", inspect_weights)
    options = "--weights-only --images photos --threshold 150 --side low --layer 7 --size 448x672 --max-images 9"
    options += " --batch-size 5 --seed 3 --device cpu --overwrite"
    done = run("inspect", "model", "--output", tmp_path, *options.split())
    assert done.stdout == f"table\nmodel: One. Two.\n{tmp_path / 'report.html'}\n"
    given = {
        "threshold": 150.0,
        "side": "low",
        "layer": 7,
        "size": (448, 672),
        "max_images": 9,
        "batch_size": 5,
        "seed": 3,
        "device": "cpu",
        "overwrite": True,
        "progress": True,
    }
    assert calls == [(("model", tmp_path, ["photos"]), given)]
    for option in ("--compare=other", "--checkpoints=runs", "--all-layers"):
        done = run("inspect", "model", "--weights-only", "--output", tmp_path, option)
        assert done.exit_code == 2 and "goes without" in done.stderr


# registers


def test_registers_has_an_option_for_every_setting_with_its_default():
    parameters = inspect.signature(cli.registers).parameters
    defaults = {name: each.default for name, each in parameters.items() if name not in cli.NO_SETTINGS}
    assert {**defaults, "arguments": ()} == vars(RegisterOptions())


def test_registers_hands_on_what_was_given_and_prints_whether_it_worked(tmp_path, monkeypatch):
    calls, sentences = [], ["No success: outliers stayed.", "The norm went from 3 to 3."]

    def give_registers(*args, **kwargs):
        calls.append((args, kwargs))
        effect = SimpleNamespace(sentences=lambda: sentences) if args[3] else None
        return give.Given(tmp_path, "4 new registers.", effect, ("Train it on.",))

    monkeypatch.setattr(give, "give_registers", give_registers)
    done = run("registers", "model", tmp_path, "--method", "warm-start")
    expected = ["4 new registers.", "Not compared with the model before: no images were given.", "Train it on."]
    assert (done.exit_code, done.stdout.splitlines()) == (0, [*expected, str(tmp_path)]), done.stderr
    options = "--num_registers 2 --threshold 150 --size 28x42 --cls-tolerance 0.2 --recipe own.yaml --device cpu"
    options = [*options.split(), "--images", "photos", "--images", "more/*.png", "--overwrite"]
    flags = ["--max_steps", "7", "--objective=post_hoc"]
    done = run("registers", "model", tmp_path, "--method", "distill", *options, "--", *flags)
    page = tmp_path / "inspection" / "report.html"
    lines = ["4 new registers.", *sentences, "Train it on.", str(page), str(tmp_path)]
    assert (done.exit_code, done.stdout.splitlines()) == (0, lines), "what did not work is told, and is no error"
    given = RegisterOptions(
        num_registers=2,
        threshold=150.0,
        size=(28, 42),
        cls_tolerance=0.2,
        recipe=Path("own.yaml"),
        arguments=tuple(flags),
    )
    assert calls == [
        (
            ("model", tmp_path, "warm-start", None, RegisterOptions()),
            {"device": None, "overwrite": False, "progress": True},
        ),
        (
            ("model", tmp_path, "distill", ["photos", "more/*.png"], given),
            {"device": "cpu", "overwrite": True, "progress": True},
        ),
    ]


def test_registers_says_in_one_line_what_is_wrong(tmp_path):
    done = run("registers", tmp_path, tmp_path / "out", "--method", "test-time")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "Error: The method test-time needs images: give --images.\n"
    assert run("registers", tmp_path, tmp_path / "out").exit_code == 2, "usage"


# export


def test_export_hands_on_the_model_and_its_image_processor(model, tmp_path, monkeypatch):
    calls = []

    def export_model(*args):
        calls.append(args)
        return Exported(args[1], ("logits", "patch_tokens"), ((1, 3, 28, 28), (3, 3, 21, 35)), 3.4e-7)

    monkeypatch.setattr(deployment, "export_model", export_model)
    for name, options, overwrite in (("tiny.onnx", (), False), ("tiny.pt2", ("--overwrite",), True)):
        path = tmp_path / name
        done = run("export", model, path, *options)
        expected = "Outputs: logits, patch_tokens. On images of 1x3x28x28 and 3x3x21x35 within 3e-07 of torch."
        assert (done.exit_code, done.stdout) == (0, f"{expected}\n{path}\n"), done.stderr
        exported, *others = calls.pop()
        assert isinstance(exported, hf_vitreg.ViTRegModel)
        assert others[0] == path and others[1].image_mean and others[2] is overwrite


def test_export_says_what_is_wrong_before_it_loads_anything(tmp_path):
    done = run("export", "no/model", tmp_path / "model.bin")
    assert (done.exit_code, done.stdout) == (1, "") and done.stderr.startswith("Error: ")
    assert ".onnx" in done.stderr and ".pt2" in done.stderr
    assert run("export", tmp_path).exit_code == 2, "usage"


# evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Sound data of every kind, of which a test spoils a copy."""
    folder = tmp_path_factory.mktemp("data")
    labelled(folder / "birds")
    dense(folder / "rooms")
    voc(folder / "VOC2007")
    return folder


def evaluate(model, task, data, output, *arguments):
    arguments = ["--task", task, "--data", data, "--output", output, "--device", "cpu", *arguments]
    return run("evaluate", model, *arguments)


def test_evaluate_has_an_option_for_every_setting_with_its_default():
    parameters = inspect.signature(cli.evaluate).parameters
    defaults = {name: each.default for name, each in parameters.items() if name not in cli.NO_OPTIONS}
    expected = vars(EvaluationOptions()) | {"shifted": None, "outliers": None}
    assert defaults == expected


def test_evaluate_hands_on_what_was_given_and_prints_the_numbers(tmp_path, monkeypatch):
    calls = []

    def evaluate_model(*args, **kwargs):
        calls.append((args, kwargs))
        return evaluation.Evaluated(tmp_path, {"metrics": {"accuracy": 0.5, "top1_k10": 1 / 3}})

    monkeypatch.setattr(evaluation, "evaluate_model", evaluate_model)
    done = evaluate(
        "model", "knn", "birds", tmp_path, "--ks", "3,5", "--cache_dir", "c", "--size", "28x42", "--overwrite"
    )
    assert (done.exit_code, done.stdout) == (0, f"accuracy: 0.5000\ntop1_k10: 0.3333\n{tmp_path}\n")
    sets = ("--shifted", "sketches=a=b", "--shifted", "photos=c", "--outliers", "noise=d", "--seed", "7")
    evaluate("model", "out_of_distribution", "birds", tmp_path, *sets)
    options = [
        EvaluationOptions(ks=(3, 5), cache_dir=Path("c"), size=(28, 42)),
        EvaluationOptions(shifted={"sketches": "a=b", "photos": "c"}, outliers={"noise": "d"}, seed=7),
    ]
    assert calls == [
        (("model", task, "birds", tmp_path, each), {"device": "cpu", "overwrite": overwrite, "progress": True})
        for task, each, overwrite in zip(("knn", "out_of_distribution"), options, (True, False))
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ks", "3,five"), "10,20,100"),
        (("--shifted", "sketches"), "NAME=PATH"),
        (("--outliers", "=here"), "NAME=PATH"),
        (("--outliers", "a=here", "--outliers", "a=there"), "have one name"),
    ],
)
def test_evaluate_says_how_an_option_is_written(tmp_path, arguments, message):
    done = evaluate("model", "knn", "birds", tmp_path, *arguments)
    assert done.exit_code == 2 and message in done.stderr


def unlink(path):
    return lambda folder: (folder / path).unlink()


def empty(path):
    def spoil(folder):
        shutil.rmtree(folder / path)
        (folder / path).mkdir()

    return spoil


def cut_short(path):
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:60])


def pixels(path, *values):
    """An image of rows of these values, 16 bits where they need them."""
    kind = np.uint16 if "depth" in path else np.uint8
    rows = np.resize(np.array(values, dtype=kind), (35, 1)).repeat(49, axis=1)
    return lambda folder: PIL.Image.fromarray(rows).save(folder / path)


def outside(folder):
    (folder / "Annotations" / "03.xml").write_text(f"<annotation>{voc_object((1, 1, 60, 9))}</annotation>")


def unlabelled(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    names = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cod", "eel"])})
    for split, labels in (("train", [0, 1]), ("validation", [-1, -1])):
        images = [colour_image(0, index) for index in range(2)]
        datasets.Dataset.from_dict({"image": images, "label": labels}, names).to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize(
    ("task", "data", "spoil", "named"),
    [
        ("knn", "birds", empty("train/bee"), "birds/train/bee has no image"),
        ("linear", "birds", lambda folder: shutil.rmtree(folder / "validation"), "birds has no validation split"),
        ("logistic", "birds", cut_short("validation/cat/001.png"), "validation/cat/001.png cannot be read"),
        ("knn", "birds", unlabelled, "validation.parquet has 2 labels outside 0 to 1"),
        ("segmentation", "rooms", pixels("train/labels/02.png", 0, 7), "rooms/train/labels/02.png has 7 among its"),
        ("segmentation", "rooms", pixels("validation/labels/01.png", 9), "validation/labels/01.png has 9 among its"),
        ("segmentation", "rooms", unlink("validation/labels/01.png"), "rooms/validation/images/01.png has no file of"),
        ("segmentation", "rooms", unlink("classes.txt"), "rooms has is not known: it has no classes.txt"),
        ("depth", "rooms", pixels("train/depth/04.png", 0), "rooms/train/depth/04.png has no depth: every value is 0"),
        ("depth", "rooms", pixels("validation/depth/01.png", 0), "validation/depth/01.png has no depth: every"),
        ("depth", "rooms", pixels("validation/depth/02.png", 0, 30000), "02.png has no depth between 0.001 and 10 m"),
        ("depth", "rooms", unlink("train/images/03.png"), "rooms/train/depth/03.png has no file of its name in"),
        ("object_discovery", "VOC2007", outside, "Annotations/03.xml has the box [0.0, 0.0, 60.0, 9.0]"),
        ("object_discovery", "VOC2007", unlink("Annotations/02.xml"), "JPEGImages/02.jpg has no boxes: there is no"),
    ],
)
def test_evaluate_names_the_file_that_is_wrong_and_leaves_nothing(
    model, sources, tmp_path, monkeypatch, task, data, spoil, named
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    spoil(shutil.copytree(sources / data, tmp_path / data))
    done = evaluate(model, task, tmp_path / data, tmp_path / "out")
    assert (done.exit_code, done.stdout) == (1, ""), done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: ") and named in error and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("spoil", ["cut short", "of another model"])
def test_evaluate_names_a_cache_that_it_cannot_use(model, sources, tmp_path, spoil):
    cache, arguments = tmp_path / "cache", ("--cache-dir", tmp_path / "cache")
    assert evaluate(model, "knn", sources / "birds", tmp_path / "first", *arguments).exit_code == 0
    if spoil == "cut short":
        shard = next(cache.glob("*/*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-5])
    else:
        others = sorted(cache.glob("*/*.safetensors"))
        shard = others[0]
        shutil.copy(others[1], shard)
    done = evaluate(model, "knn", sources / "birds", tmp_path / "out", *arguments)
    assert done.exit_code == 1 and not (tmp_path / "out").exists()
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: ") and str(shard) in error and spoil.replace("model", "model, prep") in error


def test_evaluate_puts_results_into_the_card(model, sources, tmp_path):
    model = shutil.copytree(model, tmp_path / "tiny")
    for task in ("knn", "logistic", "knn"):
        done = evaluate(model, task, sources / "birds", tmp_path / task, "--update_card", "--overwrite")
        assert done.exit_code == 0, done.stderr
    card = (model / "README.md").read_text()
    entries = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]
    assert [(entry["task"]["name"], entry["dataset"]["split"]) for entry in entries] == [
        ("logistic", "validation"),
        ("knn", "validation"),
    ]
    results = json.loads((tmp_path / "knn" / "results.json").read_text())
    assert {metric["type"]: metric["value"] for metric in entries[1]["metrics"]} == pytest.approx(results["metrics"])
    assert card.endswith(README.split("---\n")[2])


def test_an_error_is_a_red_line(tmp_path):
    arguments = ["evaluate", str(tmp_path), "--task", "knn", "--data", "digits", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, arguments, color=True)
    assert done.exit_code == 1 and done.stderr.startswith("\x1b[31mError: ") and done.stderr.count("\n") == 1


def test_evaluate_needs_the_card_before_it_begins(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate_model", None)
    done = evaluate(tmp_path, "knn", sources / "birds", tmp_path / "out", "--update_card")
    assert done.exit_code == 1 and done.stderr.startswith(f"Error: There is no card {tmp_path / 'README.md'}")
    assert not (tmp_path / "out").exists()


def test_features_has_an_option_for_every_setting_with_its_default():
    parameters = inspect.signature(cli.features).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert cli._words(defaults.pop("tokens")) == FeatureOptions().tokens
    settings = {name: value for name, value in vars(FeatureOptions()).items() if name != "tokens"}
    no_settings = {"model", "images", "output", "device", "overwrite"}
    assert {name: value for name, value in defaults.items() if name not in no_settings} == settings


def test_features_hands_on_what_was_given_and_prints_how_fast_it_was(tmp_path, monkeypatch):
    calls = []

    def extract_features(*args, **kwargs):
        calls.append((args, kwargs))
        return Extracted(tmp_path / "f.parquet", 8, {"bad": "bad is no image."} if len(calls) > 1 else {}, 8, 2.0, 1.9)

    monkeypatch.setattr(extract, "extract_features", extract_features)
    done = run("features", "model", "--images", "photos", "--output", "f.parquet")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == f"8 images, 4.0 images/s, model busy 95 %\n{tmp_path / 'f.parquet'}\n"
    flags = "--tokens cls,patches --layer 7 --dtype float16 --keep-size --max-side 448 --batch-size 5 --num-workers 3"
    flags += (
        " --skip-bad-images --split test --config_name big --image-column img --streaming --device cpu --overwrite"
    )
    done = run(
        "features", "model", "--images", "photos", "--images", "more/*.png", "--output", "f.parquet", *flags.split()
    )
    assert done.stderr == "Left out: bad is no image.\nLeft out: 1 in all.\n", done.output
    given = FeatureOptions(
        tokens=("cls", "patches"),
        layer=7,
        dtype="float16",
        keep_size=True,
        max_side=448,
        batch_size=5,
        num_workers=3,
        skip_bad_images=True,
        split="test",
        config_name="big",
        image_column="img",
        streaming=True,
    )
    path = Path("f.parquet")
    assert calls == [
        (("model", ["photos"], path, FeatureOptions()), {"device": None, "overwrite": False, "progress": True}),
        (("model", ["photos", "more/*.png"], path, given), {"device": "cpu", "overwrite": True, "progress": True}),
    ]


def test_features_of_a_folder_and_what_is_wrong_in_one_line(model, sources, tmp_path):
    arguments = ("features", model, "--images", sources / "birds" / "train", "--output", tmp_path / "f.safetensors")
    done = run(*arguments, "--size", "28x14", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("18 images, ") and done.stdout.endswith(f"{tmp_path / 'f.safetensors'}\n")
    assert "18/18" in done.stderr and "images/s" in done.stderr
    done = run(*arguments)
    assert done.exit_code == 1 and done.stderr.startswith(f"Error: There is a file {tmp_path / 'f.safetensors'}")
    done = run(*arguments, "--overwrite", "--tokens", "cls,head")
    assert done.exit_code == 1 and done.stderr.startswith("Error: tokens must be among cls, registers")
