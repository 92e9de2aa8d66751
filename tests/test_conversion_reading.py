# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conversion.family import ConversionError
from conversion.reading import describe_source, in_one_dtype, read_leaves


TENSORS = {"weight": torch.randn(3, 5), "bias": torch.randn(3)}


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("file_format", ["zip", "legacy", "safetensors"])
def test_every_file_format_is_read(tmp_path, file_format):
    path = tmp_path / "weights"  # the ending does not matter
    if file_format == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=file_format == "zip")
    leaves = read_leaves(path)
    assert leaves.keys() == TENSORS.keys()
    assert all(torch.equal(leaves[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("save", [torch.save, save_file])
def test_tensors_stay_in_the_file(tmp_path, save):
    path = tmp_path / "a.pth"
    save(TENSORS, path)
    leaves = read_leaves(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    assert torch.equal(leaves["weight"], TENSORS["weight"])


def test_nested_dictionaries_are_flattened_with_the_scalars_of_a_training_run(tmp_path):
    layer = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    # schedules are NumPy arrays
    optimizer.param_groups[0]["lr"] = np.linspace(0, 1, 7)[2]
    optimizer.param_groups[0]["weight_decay"] = np.float32(0.25)
    content = {"teacher": {"backbone.norm.bias": torch.ones(2)}, "optimizer": optimizer.state_dict(), "iteration": 7}
    torch.save(content, tmp_path / "a.pth")
    leaves = read_leaves(tmp_path / "a.pth")
    assert torch.equal(leaves["teacher.backbone.norm.bias"], torch.ones(2))
    assert leaves["iteration"] == 7
    assert leaves["optimizer.param_groups"][0]["lr"] == np.linspace(0, 1, 7)[2]
    assert leaves["optimizer.state.0.exp_avg"].shape == (3, 5)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_code_in_a_pickle_does_not_run(tmp_path, write):
    path, folder = tmp_path / "a.pth", tmp_path / "it ran"
    write({"weight": torch.ones(3), "payload": Payload(folder)} if write is torch.save else Payload(folder), path)
    with pytest.raises(ConversionError, match=r"asks for posix.mkdir.*Nothing was run.*state_dict\(\)"):
        read_leaves(path)
    assert not folder.exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(torch.nn.Linear(3, 5), tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=r"asks for torch.nn.modules.linear.Linear.*state_dict\(\)"):
        read_leaves(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content, expected",
    [
        ([torch.ones(3)], "holds a list, not a state dict"),
        (torch.ones(3), "holds a Tensor, not a state dict"),
        ({"epoch": 3, "name": "vit"}, "it holds 'epoch', 'name' and not one tensor"),
        ({}, "it holds nothing and not one tensor"),
    ],
)
def test_what_is_no_state_dict(tmp_path, content, expected):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=expected):
        read_leaves(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "is empty"),
        (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "is a web page"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "Git LFS pointer.*git lfs pull"),
        (b"just a few words", "neither a PyTorch nor a safetensors file.*just a"),
        (pickle.dumps([1, 2]), "is a pickle, but no PyTorch checkpoint"),
        (b"PK\x03\x04 and then nothing", "cut short or damaged: its end is missing"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, expected):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=expected):
        read_leaves(path)


def test_a_zip_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("letter.txt", "hello")
    with pytest.raises(ConversionError, match="cut short or damaged"):
        read_leaves(tmp_path / "a.pth")


@pytest.mark.parametrize("file_format", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_files(tmp_path, file_format, share):
    path = tmp_path / "a.pth"
    if file_format == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=file_format == "zip")
    cut(path, max(int(share * path.stat().st_size), 9))
    with pytest.raises(ConversionError, match="cut short or damaged"):
        read_leaves(path)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ConversionError, match=r"missing\.pth does not exist"):
        read_leaves(tmp_path / "missing.pth")
    with pytest.raises(ConversionError, match="is a folder"):
        read_leaves(tmp_path)


def test_one_dtype_holds_every_tensor_exactly():
    same = {"weight": torch.ones(3, dtype=torch.bfloat16)}
    [kept] = in_one_dtype(same)
    assert kept["weight"] is same["weight"]
    mixed, head = in_one_dtype(same, {"bias": torch.ones(2, dtype=torch.float16)})
    assert mixed["weight"].dtype == head["bias"].dtype == torch.float32
    with pytest.raises(ConversionError, match=r"scale is torch\.int8"):
        in_one_dtype({"scale": torch.ones(2, dtype=torch.int8)})


def test_the_source_is_described_by_its_content(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert describe_source(tmp_path / "a.pth") == {"file": "a.pth", "bytes": 3, "sha256": sha256}
