# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import logging

import datasets
import pytest
from loopback_hub import LoopbackHub, run_client
from sample_images import colour_image, write_folder, write_parquet, write_rows, write_shards

from hf_vitreg.data.datasets import data_name, digits, read_image
from hf_vitreg.data.pretraining_data import load_knn_data, load_pretraining_data
from hf_vitreg.pretrain_recipe import PretrainDataOptions


COUNTS = {"ant": 3, "cat": 5}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(wants, seed=0, **options):
    return load_pretraining_data(PretrainDataOptions(**options), wants, seed)


def knn(data, seed=0, **options):
    return load_knn_data(PretrainDataOptions(**options), data, seed)


def rows(data):
    return list(data.dataset)


def is_image(row, label, index):
    return read_image(row["image"]).tobytes() == colour_image(label, index).tobytes()


# Folders


def test_a_folder_without_labels_is_read_at_any_depth(tmp_path, caplog):
    folder = write_folder(tmp_path / "flowers" / "train", {"a": 2, "b/deep/er": 1})
    colour_image(2, 0).save(folder / "top.jpeg")
    (folder / "a" / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    data = load("images", train_dir=str(folder))
    assert (data.num_images, data.class_names, data.hub_id) == (4, None, None)
    assert (data.display_name, data.builder) == ("flowers", "imagefolder")
    assert [row.keys() for row in rows(data)] == [{"image", "name"}] * 4
    assert [row["name"].removeprefix(f"{folder}/") for row in rows(data)] == [
        "a/000.png",
        "a/001.png",
        "b/deep/er/000.png",
        "top.jpeg",
    ]
    assert is_image(rows(data)[1], 0, 1) and "1 files are no images" in caplog.text


def test_a_folder_with_labels_has_a_folder_a_class(tmp_path):
    data = load("labels", train_dir=str(write_folder(tmp_path / "train", COUNTS)))
    assert data.class_names == ["ant", "cat"] and [row["label"] for row in rows(data)] == [0] * 3 + [1] * 5


def test_a_folder_with_texts_has_one_beside_each_image(tmp_path, caplog):
    folder = write_folder(tmp_path / "train", {"a": 2, "b": 1})
    for image in folder.rglob("*.png"):
        image.with_suffix(".txt").write_text(f" Über {image.stem} in {image.parent.name}\n", encoding="utf-8")
    data = load("captions", train_dir=str(folder))
    assert [row["caption"] for row in rows(data)] == ["Über 000 in a", "Über 001 in a", "Über 000 in b"]
    assert not caplog.records
    (folder / "a" / "001.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images have no text.*001\.txt.*--caption_template"):
        load("captions", train_dir=str(folder))
    (folder / "a" / "001.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"1 of 3 captions are empty, that of .*001\.txt"):
        load("captions", train_dir=str(folder))


def test_a_template_makes_captions_of_classes(tmp_path):
    folder = write_folder(tmp_path / "train", COUNTS)
    data = load("captions", train_dir=str(folder), caption_template="a photo of a {}.")
    assert [row["caption"] for row in rows(data)] == ["a photo of a ant."] * 3 + ["a photo of a cat."] * 5
    assert data.class_names is None
    with pytest.raises(ValueError, match=r"must have a {}.*got 'a photo'"):
        load("captions", train_dir=str(folder), caption_template="a photo")


# Digits


def test_digits_are_those_that_are_not_held_out():
    wanted = {
        wants: load(wants, seed=3, caption_template="the digit {}") for wants in ("images", "labels", "captions")
    }
    images, labels, captions = (rows(data) for data in wanted.values())
    assert len(images) == len(labels) == len(captions) == 1437 and images[0].keys() == {"image", "name"}
    assert [f"the digit {row['label']}" for row in labels] == [row["caption"] for row in captions]
    held_out = knn(wanted["images"], seed=3).validation
    assert {row["name"] for row in images}.isdisjoint(held_out.dataset["name"])
    assert len(images) + len(held_out) == len(digits())
    with pytest.raises(ValueError, match="--caption_template"):
        load("captions")


# Sources


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train_dir": "nowhere"}, ["no folder nowhere", "--train_dir"]),
        ({"train_file": "nowhere/*.parquet"}, ["No parquet file", "nowhere"]),
        ({"train_shards": "nowhere/*.tar"}, ["No webdataset file", "nowhere"]),
        ({"dataset_name": "digist"}, ["digist could not be loaded", "`digits`"]),
    ],
)
def test_a_source_that_is_not_there_is_named(options, named):
    with pytest.raises(ValueError) as error:
        load("images", **options)
    assert all(word in str(error.value) for word in named), error.value


def test_limits_draw_at_random_and_take_the_first_of_a_stream(tmp_path):
    options = {"train_shards": write_shards(tmp_path / "birds", (20, 20)), "max_train_samples": 7}
    first, again, other = load("images", **options), load("images", **options), load("images", seed=1, **options)
    assert rows(first) == rows(again) != rows(other) and first.num_images == 7
    streamed = load("images", **options, streaming=True)
    assert [row["name"][-3:] for row in rows(streamed)] == [f" 0{index}" for index in range(7)]


@pytest.mark.parametrize(
    ("options", "name"),
    [({}, "digits"), ({"train_shards": "data/birds/*.tar"}, "birds"), ({"train_dir": "data/birds/train"}, "birds")],
)
def test_data_has_a_short_name(options, name):
    assert data_name(PretrainDataOptions(**options)) == name


# What features are measured on


def test_training_images_are_the_neighbours_where_they_have_the_labels(tmp_path):
    train = write_folder(tmp_path / "train", COUNTS)
    validation = write_folder(tmp_path / "validation", {"ant": 2, "cat": 1})
    options = {"train_dir": str(train), "validation_dir": str(validation)}
    for wants in ("images", "labels"):
        found = knn(load(wants, **options), **options)
        assert (found.train.labels, found.validation.labels) == ([0] * 3 + [1] * 5, [0, 0, 1])
        assert found.train.class_names == found.validation.class_names == ["ant", "cat"]
    limited = knn(load("images", **options), **options, knn_train_samples=6, knn_eval_samples=2)
    assert (len(limited.train), len(limited.validation)) == (6, 2)


def test_validation_follows_the_label_numbers_of_training(tmp_path):
    options = {
        "train_file": str(write_parquet(tmp_path / "t.parquet", ["a", "b"], datasets.ClassLabel(names=["b", "a"]))),
        "validation_file": str(
            write_parquet(tmp_path / "v.parquet", ["a", "b"], datasets.ClassLabel(names=["a", "b"]))
        ),
    }
    found = knn(load("images", **options), **options)
    assert found.validation.labels == found.train.labels == [1, 0]
    assert found.validation.class_names == ["b", "a"]


@pytest.mark.parametrize("streaming", [False, True])
def test_half_of_the_validation_images_are_the_neighbours_where_training_has_no_labels(tmp_path, caplog, streaming):
    validation = write_folder(tmp_path / "validation", {"ant": 6, "cat": 4})
    options = {
        "train_file": write_rows(tmp_path / "a.parquet"),
        "validation_dir": str(validation),
        "streaming": streaming,
    }
    with caplog.at_level(logging.WARNING):
        found = knn(load("images", **options), **options)
    assert sorted(found.train.labels) == sorted(found.validation.labels) == [0] * 3 + [1] * 2
    assert set(found.train.dataset["name"]).isdisjoint(found.validation.dataset["name"])
    assert streaming or "Half of the validation images" in caplog.text


def test_supervised_training_refuses_other_classes_in_validation(tmp_path):
    options = {
        "train_dir": str(write_folder(tmp_path / "train", COUNTS)),
        "validation_dir": str(write_folder(tmp_path / "validation", {"ant": 2, "cow": 2})),
    }
    with pytest.raises(ValueError, match="cow"):
        knn(load("labels", **options), **options)
    assert knn(load("images", **options), **options).train.class_names == ["ant", "cow"]


@pytest.mark.parametrize("streaming", [False, True])
def test_without_validation_images_training_images_show_outliers_alone(tmp_path, streaming):
    options = {"train_shards": write_shards(tmp_path / "birds"), "streaming": streaming}
    found = knn(load("captions", **options), **options, knn_eval_samples=3)
    assert found.train is None and len(found.validation) == 3
    assert found.validation.dataset.column_names == ["image", "name"]
    assert found.validation.image(0).size == (37, 23)


# The Hub


HUB_CODE = """
    import datasets
    from hf_vitreg.data.orders import StreamOrder
    from hf_vitreg.data.pretraining_data import load_knn_data, load_pretraining_data
    from hf_vitreg.pretrain_recipe import PretrainDataOptions

    def load(wants, **options):
        options = PretrainDataOptions(dataset_name="tester/birds", **options)
        data = load_pretraining_data(options, wants, 0)
        return data, load_knn_data(options, data, 0)

    mapped, knn = load("images", validation_split="test")
    assert (mapped.num_images, mapped.builder, mapped.hub_id) == (5, "tester/birds", "tester/birds")
    assert [row["name"] for row in mapped.dataset][4] == "tester/birds, row 4"
    assert knn.train.class_names == ["a", "b"] and sorted(knn.validation.labels) == [0, 0, 1, 1]

    streamed, knn = load(
        "labels", validation_split="test", streaming=True
    )
    assert streamed.num_images is None and streamed.class_names == ["a", "b"]
    assert sorted(knn.validation.labels) == sorted(knn.train.labels) == [0, 1]
    order = StreamOrder(streamed.dataset, 0, 3)
    assert sorted(next(order).row["label"] for _ in range(5)) == [0, 0, 0, 1, 1]
    order.close()

    _, knn = load("images")
    assert knn.train is None and len(knn.validation) == 5
    for options, named in (({"train_split": "trial"}, "trial"), ({"validation_split": "val"}, "no split 'val', only")):
        try:
            load("images", **options)
        except ValueError as error:
            assert named in str(error), error
        else:
            raise AssertionError(options)
"""


def test_a_dataset_of_the_hub_is_mapped_or_streamed(tmp_path):
    classes = datasets.ClassLabel(names=["a", "b"])
    files = {
        "data/train-0.parquet": write_parquet(tmp_path / "0.parquet", ["a", "b", "a"], classes).read_bytes(),
        "data/train-1.parquet": write_parquet(tmp_path / "1.parquet", ["b", "a"], classes).read_bytes(),
        "data/test-0.parquet": write_parquet(tmp_path / "2.parquet", ["b", "a", "a", "b"], classes).read_bytes(),
    }
    with LoopbackHub() as hub:
        hub.create("datasets/tester/birds", files=files)
        run_client(hub, HUB_CODE, home=tmp_path / "home")
