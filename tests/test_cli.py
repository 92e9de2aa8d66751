# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import ast
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import hf_vitreg
from hf_vitreg import cli
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
