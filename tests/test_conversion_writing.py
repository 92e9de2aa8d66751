# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest

from conversion.family import ConversionError
from conversion.writing import check_output_dir


def test_folders_that_must_not_be_written(tmp_path, monkeypatch):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    file.write_text("")
    (full / "weights").write_text("")
    with pytest.raises(ConversionError, match="is a file"):
        check_output_dir(file, overwrite=True, inputs=[])
    with pytest.raises(ConversionError, match=r"is not empty.*--overwrite"):
        check_output_dir(full, overwrite=False, inputs=[])
    with pytest.raises(ConversionError, match=r"holds .*weights, which replacing it would delete"):
        check_output_dir(full, overwrite=True, inputs=[full / "weights"])
    monkeypatch.chdir(full)
    with pytest.raises(ConversionError, match="which replacing it would delete"):
        check_output_dir(tmp_path, overwrite=True, inputs=[])


def test_folders_that_may_be_written(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "weights").write_text("")
    check_output_dir(tmp_path / "none", overwrite=False, inputs=[tmp_path / "full" / "weights"])
    check_output_dir(tmp_path / "empty", overwrite=False, inputs=[])
    check_output_dir(tmp_path / "full", overwrite=True, inputs=[tmp_path / "elsewhere"])
