# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from sample_images import colour_image, write_folder, write_parquet

from hf_vitreg.data.datasets import IGNORED_LABEL, PreparedImages, data_name, digits, load_labelled_images, read_image
from hf_vitreg.recipe import DataOptions


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(seed=0, **options):
    return load_labelled_images(DataOptions(**options), seed)


def pixels(encoded):
    return np.asarray(read_image(encoded))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "digits"),
        ({"dataset_name": "org/birds"}, "birds"),
        ({"train_dir": "data/flowers/train"}, "flowers"),
        ({"train_dir": "data/flowers/"}, "flowers"),
        ({"train_file": "data/birds/train-*.parquet"}, "birds"),
    ],
)
def test_data_has_a_short_name(options, name):
    assert data_name(DataOptions(**options)) == name


def test_digits_are_all_there_and_unchanged():
    from sklearn.datasets import load_digits

    bunch, images = load_digits(), digits()
    assert len(images) == 1797 and images.features["label"].names == [str(digit) for digit in range(10)]
    assert images["label"] == bunch.target.tolist()
    expected = (bunch.images[41] * 255 / 16).round()
    assert np.array_equal(pixels(images[41]["image"])[..., 0], expected)


def test_held_out_images_are_a_partition_by_class_and_the_same_for_a_seed():
    first, again, other = load(seed=3), load(seed=3), load(seed=4)
    assert len(first.train) + len(first.validation) == 1797
    assert first.validation["image"] == again.validation["image"] != other.validation["image"]
    shares = np.bincount(first.validation["label"]) / np.bincount(digits()["label"])
    assert np.allclose(shares, 0.2, atol=0.01)


def test_folder(tmp_path):
    train = write_folder(tmp_path / "train", {"cat": 5, "ant": 3})
    validation = write_folder(tmp_path / "validation", {"cat": 1, "ant": 2}, suffix=".JPEG")
    (train / ".cache").mkdir()
    (train / "cat" / "notes.txt").write_text("no image")
    images = load(train_dir=str(train), validation_dir=str(validation))
    assert images.class_names == ["ant", "cat"]
    assert images.train["label"] == [0] * 3 + [1] * 5 and images.validation["label"] == [0, 0, 1]
    assert np.array_equal(pixels(images.train[3]["image"]), np.asarray(colour_image(1, 0)))
    assert (images.display_name, images.builder, images.hub_id) == (tmp_path.name, "imagefolder", None)


def test_folder_without_validation_holds_out_a_part(tmp_path):
    images = load(train_dir=str(write_folder(tmp_path / "flowers", {"a": 10, "b": 5})), validation_fraction=0.4)
    assert sorted(images.validation["label"]) == [0] * 4 + [1] * 2


@pytest.mark.parametrize(
    ("feature", "labels", "names"),
    [
        (datasets.ClassLabel(names=["zebra", "ant"]), ["zebra", "ant", "zebra"], ["zebra", "ant"]),
        (datasets.Value("string"), ["b", "a", "b"], ["a", "b"]),
        (datasets.Value("int64"), [10, 2, 10], ["2", "10"]),
    ],
)
def test_parquet_with_every_kind_of_label(tmp_path, feature, labels, names):
    path = write_parquet(tmp_path / "some.parquet", labels, feature, image_column="img", label_column="fine_label")
    images = load(
        train_file=str(tmp_path / "*.parquet"),
        validation_file=str(path),
        image_column="img",
        label_column="fine_label",
    )
    assert images.class_names == names
    assert [images.class_names[label] for label in images.train["label"]] == [str(label) for label in labels]
    assert np.array_equal(pixels(images.train[1]["image"]), np.asarray(colour_image(0, 1)))


def test_labels_of_validation_follow_those_of_training(tmp_path):
    train = write_parquet(tmp_path / "train.parquet", ["a", "b"], datasets.ClassLabel(names=["b", "a"]))
    validation = write_parquet(tmp_path / "validation.parquet", ["a", "b"], datasets.ClassLabel(names=["a", "b"]))
    images = load(train_file=str(train), validation_file=str(validation))
    assert images.class_names == ["b", "a"]
    assert list(images.validation["label"]) == list(images.train["label"]) == [1, 0]
    assert np.array_equal(pixels(images.validation[0]["image"]), pixels(images.train[0]["image"]))


def test_limits_draw_at_random_and_the_same_again():
    first, again = load(max_train_samples=50, max_eval_samples=20), load(max_train_samples=50, max_eval_samples=20)
    assert (len(first.train), len(first.validation)) == (50, 20)
    assert first.train["image"] == again.train["image"]
    assert len(set(first.train["label"])) > 5


def bad_folder(tmp_path, counts, **validation):
    folder = write_folder(tmp_path / "train", counts)
    if validation:
        write_folder(tmp_path / "validation", validation)
        return {"train_dir": str(folder), "validation_dir": str(tmp_path / "validation")}
    return {"train_dir": str(folder)}


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: {"train_dir": str(path / "nowhere")}, ["nowhere", "no folder"]),
        (lambda path: {"train_dir": str(path)}, ["no class folders", "CLASS_NAME"]),
        (lambda path: bad_folder(path, {"cat": 2, "empty": 0}), ["empty", "no image"]),
        (lambda path: bad_folder(path, {"train": 2, "val": 2}), ["splits", "--validation_dir"]),
        (lambda path: bad_folder(path, {"cat": 1, "dog": 1}, cat=1, cow=1), ["dog", "cow", "differ"]),
        (lambda path: bad_folder(path, {"cat": 1, "dog": 1}), ["held out", "two images a class"]),
        (lambda path: {"train_file": str(path / "*.parquet")}, ["No parquet file", "*.parquet"]),
        (lambda path: {"dataset_name": "digist"}, ["digist", "digits"]),
        (lambda path: {"validation_fraction": 0.0}, ["validation_fraction"]),
    ],
)
def test_bad_data_is_named(tmp_path, make, named):
    with pytest.raises(ValueError) as error:
        load(**make(tmp_path))
    assert all(word in str(error.value) for word in named), error.value


def test_a_missing_column_names_those_there_are(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["x", "y"], datasets.Value("string"), label_column="species")
    with pytest.raises(ValueError, match=r"--label_column to one of \['image', 'species'\]"):
        load(train_file=str(path))


def test_rows_without_a_label_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = {"image": [colour_image(0, 0)] * 2, "label": [0, -1]}
    datasets.Dataset.from_dict(images, features=features).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match=r"a\.parquet has 1 labels outside 0 to 1"):
        load(train_file=str(tmp_path / "a.parquet"))
    images = {"image": [colour_image(0, 0)] * 2, "label": ["x", None]}
    datasets.Dataset.from_dict(images).cast_column("image", datasets.Image()).to_parquet(str(tmp_path / "b.parquet"))
    with pytest.raises(ValueError, match="1 rows without label"):
        load(train_file=str(tmp_path / "b.parquet"))


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_more_than_8_bits_a_channel_are_refused_by_name(tmp_path, mode):
    PIL.Image.new(mode, (5, 7)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match="more than 8 bits"):
        read_image({"bytes": None, "path": str(tmp_path / "deep.tif")})


def to_tensor(image):
    return torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1) + torch.rand(1)


@pytest.fixture
def folder_with_a_bad_image(tmp_path):
    folder = write_folder(tmp_path / "train", {"a": 3, "b": 3})
    (folder / "a" / "001.png").write_bytes(b"this is no picture")
    return load(train_dir=str(folder), validation_dir=str(folder)).train


def test_prepared_images_depend_on_seed_epoch_and_index_alone(tmp_path):
    images = load(train_dir=str(write_folder(tmp_path / "train", {"a": 3, "b": 4})), validation_fraction=0.3).train
    prepared = PreparedImages(images, to_tensor, seed=1)
    first = prepared[2]["pixel_values"]
    torch.rand(5)
    assert torch.equal(first, prepared[2]["pixel_values"])
    prepared.set_epoch(1)
    assert not torch.equal(first, prepared[2]["pixel_values"])
    assert not torch.equal(first, PreparedImages(images, to_tensor, seed=2)[2]["pixel_values"])


def test_a_bad_image_stops_and_is_named(folder_with_a_bad_image):
    with pytest.raises(ValueError, match=r"001\.png cannot be read.*--on_bad_image skip"):
        PreparedImages(folder_with_a_bad_image, to_tensor)[1]


def test_training_skips_a_bad_image_for_the_next(folder_with_a_bad_image, caplog):
    prepared = PreparedImages(folder_with_a_bad_image, to_tensor, on_bad_image="skip")
    assert [prepared[index]["labels"] for index in range(6)] == [0, 0, 0, 1, 1, 1]
    assert torch.allclose(prepared[1]["pixel_values"], prepared[2]["pixel_values"], atol=1)
    assert len(prepared.bad_images) == 1 and len(caplog.records) == 1


def test_validation_marks_a_bad_image(folder_with_a_bad_image):
    prepared = PreparedImages(folder_with_a_bad_image, to_tensor, on_bad_image="skip", replace_bad=False)
    assert [prepared[index]["labels"] for index in range(6)] == [0, IGNORED_LABEL, 0, 1, 1, 1]


def test_images_are_read_upright_and_in_colour(tmp_path):
    image = PIL.Image.fromarray(np.arange(35, dtype="uint8").reshape(5, 7))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    image.save(tmp_path / "a.png", exif=exif)
    upright = read_image({"bytes": None, "path": str(tmp_path / "a.png")})
    assert upright.mode == "RGB" and upright.size == (5, 7)
    assert np.array_equal(np.asarray(upright)[..., 0], np.rot90(np.asarray(image), k=-1))
