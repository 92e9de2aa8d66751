# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import datasets
import numpy as np
import pytest
from sample_images import colour_image, write_folder, write_parquet

from hf_vitreg.data import labelled_images
from hf_vitreg.data.image_data import ImageData
from hf_vitreg.data.labelled_images import is_one_split, load_image_data


COUNTS = {"ant": 3, "cat": 5}
CLASS_LABEL = datasets.ClassLabel(names=["zebra", "ant"])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "birds" / "train", COUNTS)
    write_folder(tmp_path / "birds" / "val", {"ant": 2, "cat": 1})
    return tmp_path / "birds"


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "fish"
    folder.mkdir()
    write_parquet(folder / "train-0.parquet", ["ant", "zebra", "ant"], CLASS_LABEL, "img")
    write_parquet(folder / "train-1.parquet", ["zebra", "zebra"], CLASS_LABEL, "img")
    write_parquet(folder / "validation.parquet", ["ant"], CLASS_LABEL, "img")
    write_parquet(folder / "valuable.parquet", ["ant"], CLASS_LABEL, "img")
    return folder


def test_a_folder_of_splits(folder):
    train, validation = load_image_data(folder, "train"), load_image_data(str(folder), "validation")
    assert isinstance(train, ImageData)
    assert (train.display_name, train.split, validation.split) == ("birds", "train", "val")
    assert train.class_names == validation.class_names == ["ant", "cat"]
    assert train.labels == [0] * 3 + [1] * 5 and validation.labels == [0, 0, 1]
    assert train.name(3) == str(folder / "train" / "cat" / "000.png")
    assert train.content(3) == (folder / "train" / "cat" / "000.png").read_bytes()
    assert np.array_equal(np.asarray(train.image(3)), np.asarray(colour_image(1, 0)))
    assert load_image_data(folder / "train", None).labels == train.labels
    assert load_image_data({"train": folder / "train"}, "train").display_name == "birds"


def test_where_there_is_no_validation_split_the_test_split_is_taken(tmp_path):
    write_folder(tmp_path / "Test", COUNTS)
    assert load_image_data(tmp_path).split == load_image_data(tmp_path, "test").split == "Test"


def test_a_folder_of_parquet_files(parquet):
    train, validation = load_image_data(parquet, "train"), load_image_data(parquet, "validation")
    assert (len(train), train.split, len(validation), validation.display_name) == (5, "train", 1, "fish")
    assert train.class_names == ["zebra", "ant"] and train.labels == [1, 0, 1, 0, 0]
    assert train.name(3) == f"{parquet / 'train-1.parquet'}, row 0"
    assert train.image(1).size == (37, 23)


@pytest.mark.parametrize("layout", ["data/train-0.parquet", "train/0.parquet"])
def test_parquet_files_as_the_hub_lays_them_out(parquet, tmp_path, layout):
    path = tmp_path / "hub" / layout
    path.parent.mkdir(parents=True)
    (parquet / "train-0.parquet").rename(path)
    assert load_image_data(tmp_path / "hub", "train").labels == [1, 0, 1]


def test_a_pattern_of_parquet_files(parquet):
    assert len(load_image_data(f"{parquet}/*.parquet", "train")) == 5
    assert len(load_image_data(f"{parquet}/train-0.parquet", "train")) == 3
    assert len(load_image_data(f"{parquet}/valuable.parquet", None)) == 1
    given = {"train": f"{parquet}/train-*.parquet", "validation": f"{parquet}/valuable.parquet"}
    assert (len(load_image_data(given, "train")), len(load_image_data(given, "validation"))) == (5, 1)


def test_what_is_divided_itself_is_known(folder, parquet, tmp_path):
    assert is_one_split(folder / "train") and not is_one_split(folder)
    assert is_one_split(f"{parquet}/valuable.parquet") and not is_one_split(parquet)
    assert not is_one_split("digits") and not is_one_split("org/photographs")
    write_folder(tmp_path / "stations", {"train": 2, "train_station": 3})
    assert is_one_split(tmp_path / "stations")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (parquet / "train-0.parquet").rename(tmp_path / "hub" / "data" / "train-0.parquet")
    assert not is_one_split(tmp_path / "hub")


def test_a_mapping_takes_the_split_of_what_is_divided(folder):
    given = {"train": folder / "train", "validation": folder}
    assert load_image_data(given, "validation").labels == load_image_data(folder, "validation").labels
    given = {"train": "digits", "validation": "digits"}
    assert [len(load_image_data(given, split)) for split in given] == [1437, 360]


def test_digits_are_built_in():
    train, validation = load_image_data("digits", "train"), load_image_data("digits", "validation")
    assert len(train) + len(validation) == 1797 and len(set(train.labels)) == 10
    assert validation.image(0).size == (8, 8)


def test_labels_are_those_of_training(parquet, folder):
    validation = load_image_data(parquet, "validation", class_names=["ant", "zebra"])
    assert validation.class_names == ["ant", "zebra"] and validation.labels == [0]
    streamed = load_image_data(parquet, "train", class_names=["ant", "zebra"], streaming=True)
    assert [image.label for image in streamed] == [0, 1, 0, 1, 1]
    with pytest.raises(ValueError, match=r"only in validation: \['cat'\]"):
        load_image_data(folder, class_names=["ant", "zebra"])


def test_some_at_random_and_the_same_again():
    some, again = load_image_data("digits", max_images=31), load_image_data("digits", max_images=31)
    assert len(some) == 31 and some.sha256() == again.sha256()
    assert load_image_data("digits", max_images=31, seed=5).sha256() != some.sha256()
    with pytest.raises(ValueError, match="1 or more, got 0"):
        load_image_data("digits", max_images=0)


def test_a_stream_is_what_is_mapped(parquet):
    mapped, streamed = load_image_data(parquet, "train"), load_image_data(parquet, "train", streaming=True)
    for _ in range(2):
        images = list(streamed)
        assert [image.label for image in images] == mapped.labels
        assert [image.name for image in images] == [mapped.name(index) for index in range(5)]
        assert [image.content for image in images] == [mapped.content(index) for index in range(5)]
    assert len(list(load_image_data(parquet, "train", streaming=True, max_images=2))) == 2


def test_the_identity_of_a_stream_is_that_of_its_files(parquet):
    def identity(**options):
        return load_image_data(parquet, "train", streaming=True, **options).identity

    before = identity()
    assert identity() == before != identity(max_images=2)
    write_parquet(parquet / "train-1.parquet", ["zebra", "ant"], CLASS_LABEL, "img")
    assert identity() != before


def test_bad_sources_are_named(tmp_path, folder, parquet):
    with pytest.raises(ValueError, match=r"There is no nowhere/at/all\. Expected a folder with train and validation"):
        load_image_data("nowhere/at/all")
    with pytest.raises(ValueError, match="There is no org/nowhere here, nor on the Hub"):
        load_image_data("org/nowhere")
    with pytest.raises(ValueError, match="birds has no test split: found train, val, expected test or testing"):
        load_image_data(folder, "test")
    with pytest.raises(ValueError, match="digits has no test split"):
        load_image_data("digits", "test")
    with pytest.raises(ValueError, match=r"fish/train-\* has no validation split: found train"):
        load_image_data(f"{parquet}/train-*")
    (tmp_path / "notes.txt").write_text("no parquet")
    with pytest.raises(ValueError, match=r"notes\.txt is no parquet file"):
        load_image_data(tmp_path / "notes.txt")
    (tmp_path / "train.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"train\.parquet could not be loaded: .*[Pp]arquet"):
        load_image_data(tmp_path / "train.parquet", "train")
    with pytest.raises(ValueError, match="birds cannot be streamed"):
        load_image_data(folder, streaming=True)


def test_an_empty_class_is_named(folder, parquet):
    (folder / "val" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"val/emu has no image"):
        load_image_data(folder)
    with pytest.raises(
        ValueError, match=r"fish/train-1\.parquet has no training image of 1 of its 2 classes, 'ant' first"
    ):
        load_image_data({"train": f"{parquet}/train-1.parquet"}, "train")


@pytest.mark.parametrize("streaming", [False, True])
def test_missing_labels_are_named(tmp_path, streaming):
    features = datasets.Features({"image": datasets.Image(), "label": CLASS_LABEL})
    images = [colour_image(0, index) for index in range(3)]
    unlabelled = datasets.Dataset.from_dict({"image": images, "label": [1, 0, -1]}, features=features)
    unlabelled.to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"test\.parquet.* outside 0 to 1, as unlabelled test splits do"):
        list(load_image_data(tmp_path, "test", streaming=streaming))
    datasets.Dataset.from_dict({"photo": images}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=r"no columns of labels, .* set label_column to one of photo"):
        load_image_data(tmp_path, "test", streaming=streaming)


def test_a_stream_cannot_be_searched_for_its_classes(tmp_path):
    write_parquet(tmp_path / "train.parquet", ["b", "a"], datasets.Value("string"))
    assert load_image_data(tmp_path, "train").labels == [1, 0]
    with pytest.raises(ValueError, match=r"names no classes for its labels .* load it without streaming"):
        load_image_data(tmp_path, "train", streaming=True)


class FakeHub:
    """What `load_image_data` asks of the Hub, of a repository with one split."""

    def __init__(self, parquet, monkeypatch):
        self.parquet, self.load, self.asked, self.commit = parquet, datasets.load_dataset, [], "c0ffee"
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "holdout"])
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)
        monkeypatch.setattr(labelled_images, "HfApi", lambda: self)

    def dataset_info(self, name):
        return type("Info", (), {"sha": self.commit})

    def load_dataset(self, path, **options):
        self.asked.append((path, options.get("split"), options.get("revision"), options.get("name")))
        streaming = options.get("streaming", False)
        return self.load("parquet", data_files=f"{self.parquet}/train-*", split="train", streaming=streaming)


def test_a_dataset_on_the_hub(parquet, monkeypatch):
    hub = FakeHub(parquet, monkeypatch)
    mapped = load_image_data("org/fish", "holdout", config_name="big")
    assert hub.asked[-1] == ("org/fish", "holdout", None, "big")
    assert (mapped.labels, mapped.name(2), mapped.split) == ([1, 0, 1, 0, 0], "org/fish holdout, row 2", "holdout")
    streamed = load_image_data("org/fish", "train", streaming=True)
    assert hub.asked[-1] == ("org/fish", "train", "c0ffee", None)
    assert [(image.name, image.label) for image in streamed][4] == ("org/fish train, row 4", 0)
    hub.commit = "facade"
    assert load_image_data("org/fish", "train", streaming=True).identity != streamed.identity
    with pytest.raises(ValueError, match="org/fish has no test split: found holdout, train"):
        load_image_data("org/fish", "test")
