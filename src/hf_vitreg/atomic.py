# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Files and folders that are there whole, or not at all."""

import contextlib
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_folder(output_dir: Path) -> Iterator[Path]:
    """A folder to write in that takes the place of `output_dir` when the block ends, and vanishes when it fails.

    An older `output_dir` stays until then, whole. Interrupts (SIGINT, SIGTERM) are failures too.
    """
    target = output_dir.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    # beside the target: a rename is atomic on one file system only
    tag = uuid.uuid4().hex
    partial, old = target.with_name(f".{target.name}.{tag}.partial"), target.with_name(f".{target.name}.{tag}.old")
    with _sigterm_as_exit():
        try:
            partial.mkdir()
            yield partial
            if target.exists():
                target.rename(old)
            partial.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(output: Path) -> Iterator[Path]:
    """A file to write that takes the place of `output` when the block ends, and vanishes when it fails.

    It gets the permissions of every new file. Interrupts (SIGINT, SIGTERM) are failures too.
    """
    target = output.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    with _sigterm_as_exit():
        try:
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            partial.chmod(mode)
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Lets a terminated process clean up. Only the main thread receives signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
