# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import ast
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hf_vitreg
from hf_vitreg import cli
from hf_vitreg.analysis import report
from hf_vitreg.hub import export


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
