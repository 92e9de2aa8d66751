# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What is put together is the same wherever shards ended, and what is not whole or of something else is refused."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from hf_vitreg.deployment import feature_files
from hf_vitreg.deployment.feature_files import (
    PartialFeatures,
    Rows,
    Shard,
    concatenated,
    require_output,
    require_stackable,
    write_features,
)


NUM_IMAGES, WIDTH, NUM_REGISTERS = 11, 6, 3
ABOUT = {"model": "tiny", "layer": 5}
DESCRIPTION = {"model": {"weights": "0" * 64, "hidden_size": 6}, "tokens": ["cls"], "size": (14, 35)}


def make_rows(grids=((2, 3),) * NUM_IMAGES, dtype="float32"):
    generator, count = np.random.default_rng(0), len(grids)
    grids = np.array(grids, dtype=np.int32)
    shapes = {"cls": (count, WIDTH), "registers": (count, NUM_REGISTERS, WIDTH), "patch_mean": (count, WIDTH)}
    shapes["patches"] = (int(grids.prod(axis=1).sum()), WIDTH)
    tensors = {kind: generator.normal(size=shape).astype(dtype) for kind, shape in shapes.items()}
    return Rows([f"bird {index} ü.jpg" for index in range(count)], grids * 7 + 1, grids, tensors)


@pytest.fixture(scope="module")
def rows():
    return make_rows()


@pytest.fixture(scope="module")
def ragged():
    return make_rows([(1 + index % 3, 2 + index % 2) for index in range(NUM_IMAGES)])


def split(rows, *stops):
    return [rows[start:stop] for start, stop in zip([0, *stops], [*stops, len(rows)])]


def test_rows_in_pieces_are_the_rows(ragged):
    whole = concatenated(split(ragged, 2, 2, 7))
    assert list(whole.names) == ragged.names and np.array_equal(whole.sizes, ragged.sizes)
    assert all(np.array_equal(whole.tensors[kind], values) for kind, values in ragged.tensors.items())
    per_image = (2 + NUM_REGISTERS + ragged.grids.prod(axis=1)) * WIDTH * 4
    assert np.array_equal(ragged.bytes_each(), per_image)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet_has_an_image_a_row(ragged, tmp_path, dtype):
    rows = make_rows(ragged.grids, dtype)
    write_features(tmp_path / "some.parquet", lambda: [rows], ABOUT)
    table = pq.read_table(tmp_path / "some.parquet")
    assert table.column_names[:5] == ["name", "height", "width", "rows", "cols"]
    assert table["name"].to_pylist() == rows.names
    assert list(zip(table["height"].to_pylist(), table["width"].to_pylist())) == [tuple(size) for size in rows.sizes]
    for index in range(NUM_IMAGES):
        patches = rows.tensors["patches"][slice(*rows.patch_starts[[index, index + 1]])]
        expected = {kind: values[index] for kind, values in rows.tensors.items()} | {"patches": patches}
        for kind, values in expected.items():
            found = np.array(table[kind][index].as_py(), dtype=dtype)
            assert np.array_equal(found, values), kind
    assert json.loads(table.schema.metadata[b"hf_vitreg"]) == ABOUT
    assert "rows" not in pq.read_table(_without_patches(rows, tmp_path)).column_names


def _without_patches(rows, tmp_path):
    tensors = {kind: values for kind, values in rows.tensors.items() if kind != "patches"}
    path = tmp_path / "without.parquet"
    write_features(path, lambda: [Rows(rows.names, rows.sizes, rows.grids, tensors)], ABOUT)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_safetensors_has_a_tensor_a_kind(tmp_path, dtype):
    rows, path = make_rows(dtype=dtype), tmp_path / "some.safetensors"
    write_features(path, lambda: split(rows, 4, 5), ABOUT)
    tensors = load_file(path)
    for kind, values in rows.tensors.items():
        expected = values.reshape(NUM_IMAGES, 6, WIDTH) if kind == "patches" else values
        assert np.array_equal(tensors[kind].numpy(), expected), kind
    assert tensors["height"].tolist() == [15] * NUM_IMAGES and tensors["width"].tolist() == [22] * NUM_IMAGES
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["names"]) == rows.names
        assert json.loads(file.metadata()["hf_vitreg"]) == ABOUT


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_the_file_does_not_tell_where_parts_ended(rows, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(feature_files, "GROUP_IMAGES", 4)
    contents = set()
    for number, stops in enumerate([(), (1, 2, 3), (4, 8), (7, 10)]):
        path = tmp_path / f"{number}{suffix}"
        write_features(path, lambda stops=stops: split(rows, *stops), ABOUT)
        contents.add(path.read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("images", "size", "expected"), [(4, 2**20, [4, 4, 3]), (1000, 2 * 264, [2] * 5 + [1]), (1000, 1, [1] * 11)]
)
def test_row_groups_are_of_a_bounded_size(rows, tmp_path, monkeypatch, images, size, expected):
    monkeypatch.setattr(feature_files, "GROUP_IMAGES", images)
    monkeypatch.setattr(feature_files, "GROUP_BYTES", size)
    assert rows.bytes_each()[0] == 264
    write_features(tmp_path / "some.parquet", lambda: split(rows, 3), ABOUT)
    metadata = pq.read_metadata(tmp_path / "some.parquet")
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == expected


def test_more_names_than_a_header_holds(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "MAX_HEADER_BYTES", 300)
    with pytest.raises(ValueError, match=r"names of 11 images take \d+ bytes, .* Write a \.parquet file"):
        write_features(tmp_path / "some.safetensors", lambda: [rows], ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_where_features_can_go(tmp_path):
    require_output(tmp_path / "new.parquet", overwrite=False)
    with pytest.raises(ValueError, match=r"some\.npz .* \.parquet or \.safetensors"):
        require_output(tmp_path / "some.npz", overwrite=False)
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        require_output(tmp_path / "folder.parquet", overwrite=True)
    (tmp_path / "old.parquet").touch()
    with pytest.raises(ValueError, match=r"There is a file .*old\.parquet already\. .*--overwrite"):
        require_output(tmp_path / "old.parquet", overwrite=False)
    require_output(tmp_path / "old.parquet", overwrite=True)
    require_stackable(tmp_path / "some.parquet", (2, 3), (3, 2), "bird")
    with pytest.raises(ValueError, match=r"bird has 3x2 patches, those before have 2x3"):
        require_stackable(tmp_path / "some.safetensors", (2, 3), (3, 2), "bird")


# A run that is not finished


@pytest.fixture
def begun(rows, tmp_path):
    partial = PartialFeatures(tmp_path / "some.parquet", DESCRIPTION)
    partial.write(Shard(0, 5, {"bad": "no image"}, rows[:4]))
    partial.write(Shard(5, 6, {"worse": "no image"}, None))
    partial.write(Shard(6, 13, {}, rows[4:]))
    return partial


def test_it_goes_on_where_it_stopped(begun, rows, tmp_path):
    (begun.folder / ".shard-000003.safetensors.killed.partial").write_text("half")
    again = PartialFeatures(tmp_path / "some.parquet", DESCRIPTION)
    assert (again.stop, again.num_images, again.num_shards) == (13, NUM_IMAGES, 3)
    assert again.left_out == {"bad": "no image", "worse": "no image"}
    whole = concatenated(list(again.filled()))
    assert whole.names == rows.names and np.array_equal(whole.grids, rows.grids)
    assert all(np.array_equal(whole.tensors[kind], values) for kind, values in rows.tensors.items())
    assert sorted(path.name for path in begun.folder.iterdir()) == [
        "manifest.json",
        *(f"shard-00000{number}.safetensors" for number in range(3)),
    ]
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_shards_follow_each_other(begun):
    with pytest.raises(RuntimeError, match="image 12 was to follow one that stopped at 13"):
        begun.write(Shard(12, 14, {}, None))


def test_what_was_begun_with_something_else_is_refused(begun, tmp_path):
    other = {"model": {"weights": "1" * 64, "hidden_size": 7}, "tokens": ["cls", "registers"], "size": (14, 35)}
    expected = (
        r"some\.parquet\.partial was begun with something else: model hidden_size 6 then, 7 now; other model weights; "
        r"tokens cls then, cls,registers now\. .*--overwrite"
    )
    with pytest.raises(ValueError, match=expected):
        PartialFeatures(tmp_path / "some.parquet", other)
    assert PartialFeatures(tmp_path / "some.parquet", DESCRIPTION, overwrite=True).stop == 13, "the same goes on"
    assert PartialFeatures(tmp_path / "some.parquet", other, overwrite=True).stop == 0
    assert [path.name for path in begun.folder.iterdir()] == ["manifest.json"]


def cut_short(folder):
    path = folder / "shard-000002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


SPOILED = {
    "cut short": (cut_short, r"shard-000002\.safetensors are damaged: .* Delete .*some\.parquet\.partial"),
    "another's": (
        lambda folder: (folder / "shard-000002.safetensors").rename(folder / "shard-000001.safetensors"),
        "begins at image 6, and those before stop at 5",
    ),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json is damaged"),
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_what_is_damaged_is_named(begun, tmp_path, spoil):
    change, message = SPOILED[spoil]
    change(begun.folder)
    with pytest.raises(ValueError, match=message):
        PartialFeatures(tmp_path / "some.parquet", DESCRIPTION)
    assert PartialFeatures(tmp_path / "some.parquet", DESCRIPTION, overwrite=True).stop == 0


def test_what_is_no_run_is_never_emptied(begun, tmp_path):
    (begun.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"some\.parquet\.partial holds other things"):
        PartialFeatures(tmp_path / "some.parquet", DESCRIPTION, overwrite=True)
    assert len(list(begun.folder.iterdir())) == 3
    for path in begun.folder.iterdir():
        path.unlink()
    (begun.folder / ".manifest.json.killed.partial").touch()
    assert PartialFeatures(tmp_path / "some.parquet", DESCRIPTION).stop == 0
