# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import numpy as np
import PIL.Image
import pytest
from sample_images import colour_image

from hf_vitreg.data.dense import DepthImages, SegmentationImages, load_dense
from hf_vitreg.data.dense_layouts import VOC_CLASSES
from hf_vitreg.data.image_data import ImageData


HEIGHT, WIDTH = 23, 37


def classes(index, num_classes=5, height=HEIGHT, width=WIDTH):
    return np.random.default_rng(index).integers(0, num_classes, size=(height, width)).astype("uint8")


def depth(index):
    """In metres, whole millimetres, a tenth missing."""
    generator = np.random.default_rng(index)
    metres = generator.integers(1, 9999, size=(HEIGHT, WIDTH)) / 1000
    return np.where(generator.random(metres.shape) < 0.1, 0, metres).astype("float32")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    elif path.suffix == ".npy":
        np.save(path, content)
    else:
        (content if isinstance(content, PIL.Image.Image) else PIL.Image.fromarray(content)).save(path)
    return path


def in_palette(mask):
    image = PIL.Image.fromarray(mask, mode=None).convert("L")
    coloured = PIL.Image.new("P", image.size)
    coloured.putdata(mask.ravel().tolist())
    coloured.putpalette([value * 7 % 256 for value in range(768)])
    return coloured


def millimetres(index):
    return (depth(index) * 1000).round().astype("uint16")


def write_folder(folder, counts, targets="labels", suffix=".png", target=classes, order="{split}/{kind}"):
    """As many images of each split as `counts` says, the first numbered 0."""
    for split, count in counts.items():
        for index in range(count):
            name = f"street_{index}.v1"
            write(folder / order.format(split=split, kind="images") / f"{name}.png", colour_image(0, index))
            write(folder / order.format(split=split, kind=targets) / f"{name}{suffix}", target(index))
    return folder


def load(folder, split="train", **options):
    return load_dense(folder, split, **options)


@pytest.mark.parametrize("targets", ["labels", "masks", "annotations"])
@pytest.mark.parametrize("order", ["{split}/{kind}", "{kind}/{split}"])
def test_folders_of_masks(tmp_path, targets, order):
    write_folder(tmp_path / "streets", {"train": 3, "val": 2}, targets, order=order)
    data = load(tmp_path / "streets", num_classes=5)
    assert isinstance(data, SegmentationImages) and isinstance(data, ImageData)
    assert (len(data), data.display_name, data.num_classes) == (3, "streets", 5)
    assert list(data.class_names) == ["0", "1", "2", "3", "4"] and data.ignore_index == 255
    for index in range(3):
        assert np.array_equal(np.asarray(data.image(index)), np.asarray(colour_image(0, index)))
        target = data.target(index)
        assert target.dtype == np.int64 and np.array_equal(target, classes(index))
        assert data.name(index).endswith(f"street_{index}.v1.png")
    assert len(load(tmp_path / "streets", "validation", num_classes=5)) == 2


@pytest.mark.parametrize(
    ("folder", "split"),
    [("training", "train"), ("valid", "validation"), ("test", "validation"), ("test", "test"), ("fold_3", "fold_3")],
)
def test_splits_have_the_names_that_people_give_them(tmp_path, folder, split):
    # of a folder that is called fold_3 the layout must be named: it could be anything
    options = {"num_classes": 5, "layout": None if split != folder or split == "test" else "folder"}
    write_folder(tmp_path, {folder: 2, "dev" if folder == "fold_3" else folder: 2})
    assert len(load(tmp_path, split, **options)) == 2


def test_a_folder_that_is_one_split(tmp_path):
    write_folder(tmp_path / "streets", {"train": 3})
    write(tmp_path / "streets" / "classes.txt", "road\nsky\ncar\nsign\nvoid\n\n")
    data = load(tmp_path / "streets" / "train", None)
    assert (len(data), data.display_name, data.num_classes) == (3, "streets", 5)
    with pytest.raises(ValueError, match=r"no train split: expected train or training.*set split=None"):
        load(tmp_path / "streets" / "train", num_classes=5)


def test_classes_have_the_names_of_their_file(tmp_path):
    write_folder(tmp_path, {"train": 1})
    write(tmp_path / "classes.txt", "road\n traffic light\ncar\nsign\nsky\n")
    assert list(load(tmp_path).class_names) == ["road", "traffic light", "car", "sign", "sky"]
    with pytest.raises(ValueError, match=r"classes.txt names 5 classes, and num_classes is 4"):
        load(tmp_path, num_classes=4)
    write(tmp_path / "classes.txt", "road\ncar\nroad\n")
    with pytest.raises(ValueError, match=r"classes.txt names 'road' twice"):
        load(tmp_path)


def test_the_last_class_is_none_where_it_is_ignored(tmp_path):
    write_folder(tmp_path, {"train": 1})
    with_it, without = load(tmp_path, num_classes=5, ignore_index=4), load(tmp_path, num_classes=4, ignore_index=4)
    assert with_it.num_classes == without.num_classes == 4
    assert np.array_equal(with_it.target(0), classes(0)) and np.array_equal(without.target(0), classes(0))
    expected = np.bincount(classes(0).ravel())[:4]
    assert np.array_equal(with_it.check(), expected)


def test_masks_that_count_from_one(tmp_path):
    write_folder(tmp_path, {"train": 1})
    data = load(tmp_path, num_classes=4, reduce_labels=True, ignore_index=-100)
    assert np.array_equal(data.target(0), np.where(classes(0) == 0, -100, classes(0).astype(int) - 1))
    with pytest.raises(ValueError, match=r"among its values. Allowed are the classes 1 to 3 and 255 and 0 for what"):
        load(tmp_path, num_classes=3, reduce_labels=True).target(0)
    with pytest.raises(ValueError, match="ignore_index must be none of the classes 0 to 3, got 0"):
        load(tmp_path, num_classes=4, reduce_labels=True, ignore_index=0)


def test_masks_of_every_mode(tmp_path):
    masks = {
        "palette": in_palette(classes(0)),
        "16 bits": classes(0).astype("uint16") * 200,
        "32 bits": classes(0).astype("int32") * 200,
        "one bit": PIL.Image.fromarray(classes(0) > 2),
    }
    for name, mask in masks.items():
        write(tmp_path / "images" / f"{name}.png", colour_image(0, 0))
        write(tmp_path / "labels" / f"{name}.{'tif' if name == '32 bits' else 'png'}", mask)
    data = load(tmp_path, None, num_classes=801, ignore_index=1000)
    targets = {path.stem: data.target(index) for index, path in enumerate(data.paths)}
    assert np.array_equal(targets["palette"], classes(0))
    assert np.array_equal(targets["16 bits"], classes(0).astype(int) * 200)
    assert np.array_equal(targets["32 bits"], classes(0).astype(int) * 200)
    assert np.array_equal(targets["one bit"], classes(0) > 2)


def write_voc(folder, count=3):
    for index in range(count):
        mask = classes(index, 21)
        mask[0] = 255
        write(folder / "SegmentationClass" / f"2007_{index}.png", in_palette(mask))
        write(folder / "JPEGImages" / f"2007_{index}.jpg", colour_image(0, index))
    write(folder / "JPEGImages" / "2008_other_task.jpg", colour_image(0, 9))
    write(folder / "ImageSets" / "Segmentation" / "train.txt", "2007_2\n2007_0\n")
    write(folder / "ImageSets" / "Segmentation" / "val.txt", "2007_1\n")
    return folder


def test_voc(tmp_path):
    train = load(write_voc(tmp_path / "VOC2012"))
    validation = load(tmp_path / "VOC2012", "validation", ignore_index=-1)
    assert [path.name for path in train.paths] == ["2007_2.jpg", "2007_0.jpg"] and len(validation) == 1
    assert train.class_names == list(VOC_CLASSES) and train.class_names[15] == "person" and train.num_classes == 21
    expected = classes(2, 21)
    assert np.array_equal(train.target(0)[1:], expected[1:]) and (train.target(0)[0] == 255).all()
    assert (validation.target(0)[0] == -1).all()
    with pytest.raises(ValueError, match="benchmark with 21 classes, and num_classes is 20"):
        load(tmp_path / "VOC2012", num_classes=20)
    with pytest.raises(ValueError, match=r"no list of a fold split: expected fold\.txt\. Found: train\.txt, val\.txt"):
        load(tmp_path / "VOC2012", "fold")
    with pytest.raises(ValueError, match="lists of its splits: name one"):
        load(tmp_path / "VOC2012", None)
    write(tmp_path / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt", "2007_0\n2007_7\n")
    with pytest.raises(ValueError, match=r"2007_7\.jpg is in .*train\.txt and does not exist; 2 files"):
        load(tmp_path / "VOC2012")
    write(tmp_path / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt", "\n")
    with pytest.raises(ValueError, match=r"split train of .*VOC2012 is empty"):
        load(tmp_path / "VOC2012")


def test_ade20k(tmp_path):
    def mask(index):
        return classes(index, 151)

    write_folder(tmp_path, {"training": 2, "validation": 1}, "annotations", target=mask, order="{kind}/{split}")
    data = load(tmp_path)
    assert (len(data), data.num_classes, data.ignore_index) == (2, 150, 255)
    assert np.array_equal(data.target(1), np.where(mask(1) == 0, 255, mask(1).astype(int) - 1))
    assert len(load(tmp_path, "validation")) == 1
    with pytest.raises(ValueError, match="splits train and validation with masks, not test"):
        load(tmp_path, "test")
    with pytest.raises(ValueError, match=r"num_classes is 151\. Leave it out, or say layout='folder'"):
        load(tmp_path, num_classes=151)
    assert np.array_equal(load(tmp_path, num_classes=151, layout="folder").target(1), mask(1))


@pytest.mark.parametrize(
    ("suffix", "target", "options"),
    [
        (".png", millimetres, {}),
        (".png", lambda index: (depth(index) * 256).round().astype("uint16"), {"depth_scale": 256.0}),
        (".npy", depth, {}),
        (".npy", lambda index: depth(index).astype("float64"), {"depth_scale": 5.0}),
    ],
)
def test_folders_of_depth(tmp_path, suffix, target, options):
    write_folder(tmp_path / "rooms", {"train": 2}, "depth", suffix, target)
    data = load(tmp_path / "rooms", task="depth", **options)
    assert isinstance(data, DepthImages) and isinstance(data, ImageData) and len(data) == 2
    found = data.target(1)
    assert found.dtype == np.float32 and found.shape == (HEIGHT, WIDTH)
    np.testing.assert_allclose(found, depth(1), atol=0 if not options else 0.5 / 256)
    smallest, largest = data.check()
    assert 0 < smallest < 0.1 and 9.9 < largest < 10


def write_nyu(folder, rows="/kitchen/rgb_0.png /kitchen/sync_depth_0.png 518.8579\n"):
    for index in range(2):
        write(folder / "kitchen" / f"rgb_{index}.png", colour_image(0, index))
        write(folder / "kitchen" / f"sync_depth_{index}.png", millimetres(index))
    write(folder / "nyu_train.txt", rows)
    write(folder / "nyu_test.txt", "kitchen/rgb_1.png kitchen/sync_depth_1.png 518.8579\n")
    return folder


def test_nyu(tmp_path):
    train = load(write_nyu(tmp_path), task="depth")
    test = load(tmp_path, "validation", task="depth")
    assert [path.name for path in (*train.paths, *test.paths)] == ["rgb_0.png", "rgb_1.png"]
    np.testing.assert_array_equal(train.target(0), depth(0))
    np.testing.assert_array_equal(test.target(0), depth(1))
    with pytest.raises(ValueError, match=r"nyu_train\.txt, row 2, must be `rgb_path depth_path focal_length`, got x"):
        load(write_nyu(tmp_path, "kitchen/rgb_0.png kitchen/sync_depth_0.png\nx\n"), task="depth")
    with pytest.raises(ValueError, match=r"sync_depth_9\.png is in .*nyu_train\.txt and does not exist"):
        load(write_nyu(tmp_path, "kitchen/rgb_0.png kitchen/sync_depth_9.png 518.9\n"), task="depth")
    (tmp_path / "nyu_train_2.txt").touch()
    with pytest.raises(ValueError, match=r"several lists of its train split: nyu_train\.txt, nyu_train_2\.txt"):
        load(tmp_path, task="depth")


def test_images_are_chosen_in_order(tmp_path):
    data = load(write_folder(tmp_path, {"train": 4}), num_classes=5)
    chosen = data.select([3, 1])
    assert len(chosen) == 2 and chosen.num_classes == 5
    assert np.array_equal(chosen.target(0), data.target(3)) and chosen.name(1) == data.name(1)
    assert chosen.sha256() != data.sha256()


def test_an_image_that_was_turned_goes_with_its_mask(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    colour_image(0, 0, height=37, width=23).save(tmp_path / "images" / "a.jpg", exif=exif)
    write(tmp_path / "labels" / "a.png", classes(0))
    data = load(tmp_path, None, num_classes=5)
    assert data.image(0).size == (WIDTH, HEIGHT) and data.target(0).shape == (HEIGHT, WIDTH)


def test_check_counts_the_pixels_of_each_class(tmp_path):
    data = load(write_folder(tmp_path, {"train": 3}), num_classes=6)
    expected = sum(np.bincount(classes(index).ravel(), minlength=6) for index in range(3))
    assert np.array_equal(data.check(), expected) and data.check()[5] == 0


def test_check_names_the_first_bad_file_and_counts_the_others(tmp_path, capsys):
    write_folder(tmp_path, {"train": 5})
    for index in (1, 3, 4):
        write(tmp_path / "train" / "labels" / f"street_{index}.v1.png", classes(index) + 10)
    data = load(tmp_path, num_classes=5)
    message = r"street_1\.v1\.png has 10, 11, 12, 13, 14 among its values.*0 to 4 and 255.*There are 2 others like it"
    with pytest.raises(ValueError, match=message):
        data.check(progress=True)
    assert "Checking" in capsys.readouterr().err


IMAGE = "train/images/street_1.v1.png"


def rgb(index):
    return np.stack([classes(index)] * 3, axis=-1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "train/labels/street_1.v1.png",
            None,
            r"images/street_1\.v1\.png has no file of its name in .*labels\. Every",
        ),
        (IMAGE, None, r"labels/street_1\.v1\.png has no file of its name in .*images"),
        ("train/images/street_1.v1.jpg", colour_image(0, 1), r"street_1\.v1\.jpg and .*\.png are both called"),
        ("train/labels/street_1.v1.png", rgb(1), r"mask .*street_1\.v1\.png has mode RGB, and must have one channel"),
        (
            "train/labels/street_1.v1.png",
            classes(1).T.copy(),
            r"street_1\.v1\.png has 37x23 pixels.*images.*23x37\. B",
        ),
        ("train/labels/street_1.v1.png", classes(1) + 1, r"labels/street_1\.v1\.png has 5 among its values"),
        ("train/labels/street_1.v1.png", "text", r"labels/street_1\.v1\.png is no image that Pillow knows"),
        (IMAGE, "text", r"images/street_1\.v1\.png cannot be read as an image"),
    ],
)
def test_bad_masks_are_named(tmp_path, file, content, message):
    write_folder(tmp_path, {"train": 3})
    if content is None:
        (tmp_path / file).unlink()
    else:
        write(tmp_path / file, content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, num_classes=5).check()


def test_a_mask_that_was_cut_short_is_named(tmp_path):
    path = write_folder(tmp_path, {"train": 1}) / "train" / "labels" / "street_0.v1.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"street_0\.v1\.png cannot be read: "):
        load(tmp_path, num_classes=5).target(0)


class Unpickled:
    def __reduce__(self):
        return pytest.fail, ("code in the file was run",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", np.zeros((HEIGHT, WIDTH), dtype="uint16"), r"a\.png has no depth: every value is 0"),
        ("a.png", classes(0), r"a\.png has mode L, and must have one channel of 16 bits"),
        ("a.npy", depth(0) * np.nan, r"a\.npy has values that are not finite"),
        ("a.npy", depth(0) - 1, r"a\.npy has negative values"),
        ("a.npy", depth(0) * 0, r"a\.npy has no depth"),
        ("a.npy", depth(0)[None], r"a\.npy must hold metres, \(height, width\) of float32, got shape \(1, 23, 37\)"),
        ("a.npy", millimetres(0), r"a\.npy must hold metres.*of uint16"),
        ("a.npy", np.array([[Unpickled()]], dtype=object), r"a\.npy is no NPY file of numbers: Object arrays"),
        ("a.npy", depth(0).T, r"a\.npy has 37x23 pixels"),
        ("a.npy", "text", r"a\.npy is no NPY file"),
    ],
)
def test_bad_depth_is_named(tmp_path, name, content, message):
    write(tmp_path / "images" / "a.png", colour_image(0, 0))
    write(tmp_path / "depth" / name, content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, None, task="depth").check()


def test_depth_that_was_cut_short_or_is_an_archive_is_named(tmp_path):
    write(tmp_path / "images" / "a.png", colour_image(0, 0))
    path = write(tmp_path / "depth" / "a.npy", depth(0))
    data = load(tmp_path, None, task="depth")
    content = path.read_bytes()
    for length in (0, 20, 500):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"a\.npy is no NPY file"):
            data.target(0)
    with path.open("wb") as file:
        np.savez(file, depth(0), depth(1))
    with pytest.raises(ValueError, match=r"a\.npy must hold metres.*got several arrays"):
        data.target(0)


def test_empty_folders(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / "train" / kind).mkdir(parents=True)
        with pytest.raises(ValueError, match=r"no targets beside it|images has no file to use\. Expected \.avif, \.b"):
            load(tmp_path, num_classes=5)
    write(tmp_path / "train" / "images" / "a.png", colour_image(0, 0))
    with pytest.raises(ValueError, match=r"labels has no file to use\. Expected \.bmp"):
        load(tmp_path, num_classes=5)


def test_other_files_are_left_out_and_counted(tmp_path, caplog):
    write_folder(tmp_path, {"train": 2})
    write(tmp_path / "train" / "labels" / "notes.json", "{}")
    write(tmp_path / "train" / "labels" / ".DS_Store", "")
    assert len(load(tmp_path, num_classes=5)) == 2
    assert [record.getMessage().split(": ")[1][:7] for record in caplog.records] == ["1 files"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"How many classes .* has is not known.*The first 2 masks have the values 0, 1, 2, 3, 4\."),
        ({"num_classes": 0}, "num_classes must be 1 or more, got 0"),
        ({"task": "boxes"}, "task must be one of 'segmentation', 'depth', got 'boxes'"),
        ({"layout": "coco"}, "layout must be one of 'voc', 'ade20k', 'folder' for segmentation, got 'coco'"),
        (
            {"layout": "voc"},
            r"no layout of segmentation that is understood\. voc: JPEGImages.*Found: notes\.txt, train/",
        ),
        ({"split": "test"}, r"has no test split: expected test or testing\. Found: notes\.txt, train/\."),
        ({"split": None}, r"has no folder images\. Found: notes\.txt, train/\."),
        ({"task": "depth"}, "images has no targets beside it: there is no folder depth"),
        ({"task": "depth", "layout": "nyu"}, r"no layout of depth that is understood\. nyu: nyu_train\.txt"),
    ],
)
def test_what_is_asked_for_must_be_there(tmp_path, options, message):
    write_folder(tmp_path, {"train": 2})
    write(tmp_path / "notes.txt", "")
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **options)


def test_an_unknown_layout_says_what_is_understood_and_what_was_found(tmp_path):
    for index in range(11):
        write(tmp_path / f"{index:02d}.png", colour_image(0, 0))
    message = r"voc: JPEGImages.*; ade20k: images/training.*; folder: train/images.*Found: 00\.png, .* and 3 more\."
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"There is no folder .*nowhere"):
        load(tmp_path / "nowhere")
    write_folder(tmp_path / "rooms", {"train": 1}, "depth", target=millimetres)
    with pytest.raises(ValueError, match="depth_scale must be above 0"):
        load(tmp_path / "rooms", task="depth", depth_scale=0)
