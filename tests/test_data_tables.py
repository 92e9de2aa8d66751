# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.

import datasets
import pytest
from sample_images import colour_image, write_folder, write_parquet, write_rows, write_shards

from hf_vitreg.data.datasets import read_image
from hf_vitreg.data.pretraining_data import load_pretraining_data
from hf_vitreg.pretrain_recipe import PretrainDataOptions


COUNTS = {"ant": 3, "cat": 5}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(wants, seed=0, **options):
    return load_pretraining_data(PretrainDataOptions(**options), wants, seed)


def rows(data):
    return list(data.dataset)


def is_image(row, label, index):
    return read_image(row["image"]).tobytes() == colour_image(label, index).tobytes()


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_give_what_is_wanted(tmp_path, streaming):
    classes = datasets.ClassLabel(names=["zebra", "ant"])
    write_parquet(tmp_path / "0.parquet", ["zebra", "ant"], classes, "img", "species")
    write_parquet(tmp_path / "1.parquet", ["zebra"], classes, "img", "species")
    options = {"train_file": str(tmp_path / "*.parquet"), "streaming": streaming}
    data = load("labels", **options)
    assert data.class_names == ["zebra", "ant"] and [row["label"] for row in rows(data)] == [0, 1, 0]
    assert is_image(rows(data)[1], 0, 1) and data.builder == "parquet"
    assert data.num_images == (None if streaming else 3)
    names = {row["name"] for row in rows(data)}
    assert len(names) == 3 and all(name.startswith(f"{options['train_file']}, ") for name in names)
    assert rows(load("images", **options))[0].keys() == {"image", "name"}
    captions = rows(load("captions", **options, caption_template="one {}"))
    assert [row["caption"] for row in captions] == ["one zebra", "one ant", "one zebra"]
    assert captions[0].keys() == {"image", "name", "caption"}


@pytest.mark.parametrize("streaming", [False, True])
def test_tars_give_what_is_wanted(tmp_path, streaming):
    options = {"train_shards": write_shards(tmp_path / "birds"), "streaming": streaming}
    data = load("captions", **options)
    texts = [f"{shard} {index}" for shard in range(2) for index in range((4, 3)[shard])]
    assert [row["caption"] for row in rows(data)] == [f"text {text}" for text in texts]
    assert [row["name"] for row in rows(data)][5].endswith("birds/1.tar, 11") and is_image(rows(data)[5], 1, 1)
    assert (data.display_name, data.builder) == ("birds", "webdataset")
    from_json = rows(load("captions", **options, caption_column="json.caption"))
    assert [row["caption"] for row in from_json] == [f"caption {text}" for text in texts]
    assert rows(load("images", **options))[0].keys() == {"image", "name"}


def test_classes_of_tars_are_learned_or_told(tmp_path):
    shards = write_shards(tmp_path / "birds")
    mapped = load("labels", train_shards=shards)
    assert mapped.class_names == ["0", "1"] and [row["label"] for row in rows(mapped)] == [0] * 4 + [1] * 3
    with pytest.raises(ValueError, match=r"names no classes.*leave --streaming out.*--validation_dir"):
        load("labels", train_shards=shards, streaming=True)
    validation = str(write_folder(tmp_path / "validation", COUNTS))
    streamed = load("labels", train_shards=shards, streaming=True, validation_dir=validation)
    assert streamed.class_names == ["ant", "cat"] and [row["label"] for row in rows(streamed)] == [0] * 4 + [1] * 3
    odd = str(write_folder(tmp_path / "odd", {"0": 2, "2": 2}))
    with pytest.raises(ValueError, match="not numbered from 0: 0, 2"):
        load("labels", train_shards=shards, streaming=True, validation_dir=odd)


def test_texts_that_name_classes_are_labels_of_mapped_files_only(tmp_path):
    path = str(write_parquet(tmp_path / "a.parquet", ["b", "a"], datasets.Value("string")))
    assert load("labels", train_file=path).class_names == ["a", "b"]
    with pytest.raises(ValueError, match=r"names no classes for its labels .label: Value"):
        load("labels", train_file=path, streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("texts", "named"), [(["a", None], "without? caption|no caption"), (["a", " "], "caption")])
def test_rows_without_a_caption_are_named(tmp_path, streaming, texts, named):
    path = write_rows(tmp_path / "a.parquet", text=texts)
    with pytest.raises(ValueError, match=f"a.parquet.*{named}|{named}.*a.parquet"):
        rows(load("captions", train_file=path, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_that_is_not_clear_names_those_there_are(tmp_path, streaming):
    path = write_rows(tmp_path / "a.parquet", english=["a", "b"], german=["c", "d"])
    options = {"train_file": path, "streaming": streaming}
    with pytest.raises(ValueError, match=r"2 columns of captions.*--caption_column.*image, english, german"):
        load("captions", **options)
    assert [row["caption"] for row in rows(load("captions", **options, caption_column="german"))] == ["c", "d"]
    with pytest.raises(ValueError, match=r"no column 'picture'.*--image_column"):
        load("images", **options, image_column="picture")
    with pytest.raises(ValueError, match=r"no columns of labels.*--label_column"):
        load("labels", **options)


def test_a_stream_passes_on_rows_without_an_image_and_names_them(tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    images = {"image": [None, colour_image(0, 0)]}
    datasets.Dataset.from_dict(images, features=features).to_parquet(str(tmp_path / "a.parquet"))
    first, second = rows(load("images", train_file=str(tmp_path / "a.parquet"), streaming=True))
    assert first["image"] is None and "a.parquet, a row without an image" in first["name"]
    assert "a.parquet, SHA-256" in second["name"]


def test_labels_of_a_stream_outside_the_classes_are_named(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = {"image": [colour_image(0, 0)] * 2, "label": [0, -1]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"a\.parquet, .* has the label -1, outside 0 to 1"):
        rows(load("labels", train_file=str(tmp_path / "a.parquet"), streaming=True))
