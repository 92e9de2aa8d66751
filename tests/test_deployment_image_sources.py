# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Images come in an order that does not change, from wherever they are, and are called as people find them again."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from sample_images import colour_image, write_folder, write_parquet, write_shards
from test_data_labelled_images import FakeHub

from hf_vitreg.deployment.image_sources import open_images


LABEL = datasets.Value("string")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "birds", {"ant": 2, "cat": 1})


@pytest.fixture
def parquet(tmp_path):
    (tmp_path / "fish" / "data").mkdir(parents=True)
    write_parquet(tmp_path / "fish" / "train-0.parquet", ["a", "b", "a"], LABEL, "img")
    write_parquet(tmp_path / "fish" / "data" / "train-1.parquet", ["b", "b"], LABEL, "img")
    return tmp_path / "fish"


def names(source, start=0):
    return [image.name for image in source.since(start)]


def test_images_of_a_folder(folder):
    source = open_images([folder])
    assert (source.count, source.display_name) == (3, str(folder))
    assert names(source) == ["ant/000.png", "ant/001.png", "cat/000.png"]
    assert [(image.index, image.name) for image in source.since(2)] == [(2, "cat/000.png")]
    (last,) = source.since(2)
    assert np.array_equal(np.asarray(last.read()), np.asarray(colour_image(1, 0)))


def test_names_are_relative_to_what_all_files_are_in(folder, monkeypatch):
    assert names(open_images([f"{folder}/ant/*.png"])) == ["000.png", "001.png"]
    assert names(open_images([folder / "cat", folder / "ant" / "001.png"])) == ["ant/001.png", "cat/000.png"]
    monkeypatch.chdir(folder.parent)
    assert names(open_images(["birds"])) == names(open_images([folder]))


def test_the_identity_is_that_of_the_files(folder):
    before = open_images([folder]).identity
    assert open_images([str(folder)]).identity == before
    assert open_images([folder / "ant"]).identity != before
    os.utime(folder / "cat" / "000.png", (1, 1))
    assert open_images([folder]).identity != before


def test_a_file_that_is_no_image_says_so_when_it_is_read(folder):
    (folder / "ant" / "001.png").write_text("no image")
    second = next(open_images([folder]).since(1))
    with pytest.raises(ValueError, match=r"ant/001\.png is no image that Pillow knows"):
        second.read()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("pattern", ["", "**/*.parquet"])
def test_parquet_files_need_no_labels(parquet, streaming, pattern):
    source = open_images([parquet / pattern], streaming=streaming)
    expected = [f"data/train-1.parquet, row {row}" for row in range(2)]
    expected += [f"train-0.parquet, row {row}" for row in range(3)]
    assert names(source) == expected and names(source, 3) == expected[3:]
    assert source.count == (None if streaming else 5)
    first = next(source.since(2))
    assert first.index == 2 and np.array_equal(np.asarray(first.read()), np.asarray(colour_image(0, 0)))


def test_mapped_and_streamed_files_are_the_same_images(parquet):
    assert open_images([parquet]).identity == open_images([parquet], streaming=True).identity
    (parquet / "data" / "train-1.parquet").unlink()
    assert open_images([parquet]).count == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_tars(tmp_path, streaming):
    pattern = write_shards(tmp_path / "tars", (2, 1))
    source = open_images([pattern], streaming=streaming)
    assert names(source) == ["0.tar, 00", "0.tar, 01", "1.tar, 10"]
    last = next(source.since(2))
    assert last.index == 2 and np.array_equal(np.asarray(last.read()), np.asarray(colour_image(1, 0)))


def test_a_dataset_on_the_hub(parquet, monkeypatch):
    hub = FakeHub(parquet, monkeypatch)
    mapped = open_images(["org/fish"], split="holdout", config_name="big")
    assert hub.asked[-1] == ("org/fish", "holdout", None, "big")
    assert names(mapped) == [f"org/fish holdout, row {row}" for row in range(3)]
    assert open_images(["org/fish"], split="holdout", config_name="big").identity == mapped.identity
    streamed = open_images(["org/fish"], streaming=True)
    assert hub.asked[-1] == ("org/fish", "train", "c0ffee", None) and streamed.count is None
    assert names(streamed, 1) == ["org/fish train, row 1", "org/fish train, row 2"]
    hub.commit = "facade"
    assert open_images(["org/fish"], streaming=True).identity != streamed.identity


def test_a_row_without_an_image_is_named(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [colour_image(0, 0), None]}, features=features)
    rows.to_parquet(tmp_path / "some.parquet")
    first, second = open_images([tmp_path / "some.parquet"]).since(0)
    assert first.read().size == (37, 23)
    with pytest.raises(ValueError, match=r"some\.parquet, row 1 has no image"):
        second.read()


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        (["birds", "fish"], {}, "birds, .*fish are sources of several kinds"),
        (["birds"], {"streaming": True}, "leave --streaming out"),
        (["gone"], {}, "There is no image in .*gone"),
        ([], {}, "There is no image in nothing"),
        (["fish"], {"image_column": "photo"}, "no column 'photo', .* set --image-column to one of img, label"),
        (["broken.parquet"], {"streaming": True}, r"broken\.parquet could not be loaded: .* Give folders"),
    ],
)
def test_what_cannot_be_had_is_refused(folder, parquet, tmp_path, sources, options, message):
    (tmp_path / "broken.parquet").write_text("no table")
    with pytest.raises(ValueError, match=message):
        open_images([Path(tmp_path) / source for source in sources], **options)


def test_two_datasets_are_refused():
    with pytest.raises(ValueError, match=r"org/fish, org/birds are .* one dataset on the Hub"):
        open_images(["org/fish", "org/birds"])
