# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A folder appears whole or not at all, whatever happens meanwhile."""

import os
import signal
import threading

import pytest

from hf_vitreg.atomic import atomic_folder


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_whole_folder_appears_at_once(tmp_path):
    target = tmp_path / "parents" / "model"
    with atomic_folder(target) as folder:
        (folder / "weights").write_text("new")
        assert not target.exists()
        assert folder.parent == target.parent
    assert everything_in(tmp_path) == ["parents", "parents/model", "parents/model/weights"]


def test_the_folder_has_the_mode_of_any_other(tmp_path):
    (tmp_path / "other").mkdir()
    with atomic_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit, OSError("No space left on device"), ValueError])
@pytest.mark.parametrize("had_old", [False, True])
def test_an_interrupt_leaves_nothing_new_and_the_old_folder_whole(tmp_path, failure, had_old):
    target = tmp_path / "model"
    if had_old:
        target.mkdir()
        (target / "weights").write_text("old")
    before = everything_in(tmp_path)
    with pytest.raises(failure if isinstance(failure, type) else type(failure)), atomic_folder(target) as folder:
        (folder / "weights").write_text("half")
        raise failure
    assert everything_in(tmp_path) == before
    assert not had_old or (target / "weights").read_text() == "old"


def test_the_old_folder_is_there_until_the_new_one_is_whole_and_then_gone(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with atomic_folder(target) as folder:
        (folder / "new").write_text("new")
        assert (target / "old").read_text() == "old"
    assert everything_in(tmp_path) == ["model", "model/new"]


def test_the_old_folder_comes_back_when_the_last_rename_fails(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_folder(target) as folder:
        folder.rmdir()
    assert everything_in(tmp_path) == ["model", "model/old"]


def test_sigterm_cleans_up_and_the_handler_is_put_back(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, atomic_folder(tmp_path / "model"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 128 + signal.SIGTERM
    assert everything_in(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_thread_may_write_too(tmp_path):
    def write():
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "weights").write_text("new")

    thread = threading.Thread(target=write)
    thread.start()
    thread.join()
    assert everything_in(tmp_path) == ["model", "model/weights"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert (tmp_path / "model").is_symlink() and (tmp_path / "disk" / "weights").exists()
