# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from sample_images import colour_image

from hf_vitreg.data.boxes import load_boxes, load_coco_boxes, load_voc_boxes
from hf_vitreg.data.image_data import ImageData


HEIGHT, WIDTH = 23, 37  # of colour_image


def voc_object(box: tuple, truncated: int = 0, difficult: int = 0) -> str:
    sides = "".join(f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    marks = f"<truncated>{truncated}</truncated><difficult>{difficult}</difficult>"
    return f"<object><name>thing</name>{marks}<bndbox>{sides}</bndbox></object>"


def write_voc(folder: Path, objects: dict[str, list[str]]) -> Path:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for index, (name, found) in enumerate(objects.items()):
        colour_image(index, index).save(folder / "JPEGImages" / f"{name}.jpg")
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(found)}</annotation>")
    (folder / "ImageSets/Main/trainval.txt").write_text("".join(f"{name}\n" for name in objects))
    return folder


@pytest.fixture
def voc(tmp_path):
    return write_voc(
        tmp_path / "VOC2007",
        {
            "000012": [voc_object((1, 1, 37, 23)), voc_object((5, 7, 20, 11), truncated=1)],
            "000005": [voc_object((2, 3, 30, 17), difficult=1)],
            "000009": [],
            "000007": [voc_object((4.5, 3, 30, 17))],
        },
    )


def test_voc_counts_from_one_and_includes_the_last_pixel(voc):
    data = load_voc_boxes(voc)
    assert isinstance(data, ImageData) and data.display_name == "VOC2007 trainval"
    assert [Path(data.name(index)).stem for index in range(len(data))] == ["000012", "000005", "000007"]
    assert data.boxes(0).tolist() == [[0, 0, 37, 23], [4, 6, 20, 11]]
    assert data.boxes(2).tolist() == [[3.5, 2, 30, 17]] and data.boxes(2).dtype == np.float64
    assert data.image(1).size == (WIDTH, HEIGHT) and data.content(1)[:2] == b"\xff\xd8"


def test_voc_without_hard_objects(voc):
    data = load_boxes(voc, no_hard=True)
    assert [data.boxes(index).tolist() for index in range(len(data))] == [[[0, 0, 37, 23]], [[3.5, 2, 30, 17]]]


def test_lists_of_classes_have_a_second_column(voc):
    (voc / "ImageSets/Main/cat_val.txt").write_text("000007  1\n000012 -1\n\n")
    assert len(load_voc_boxes(voc, split="cat_val")) == 2


def replace_object(name: str, content: str):
    return lambda voc: (voc / f"Annotations/{name}.xml").write_text(f"<annotation>{content}</annotation>")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda voc: shutil.rmtree(voc / "Annotations"), "has no Annotations"),
        (lambda voc: (voc / "Annotations/000005.xml").unlink(), r"000005.jpg has no boxes.*000005.xml"),
        (lambda voc: (voc / "Annotations/000005.xml").write_text("<annotation><object>"), "000005.xml is no XML"),
        (lambda voc: (voc / "JPEGImages/000007.jpg").unlink(), "no image 000007, which trainval.txt lists"),
        (lambda voc: (voc / "JPEGImages/000007.jpg").write_bytes(b"no"), "000007.jpg cannot be read as an image"),
        (lambda voc: (voc / "ImageSets/Main/trainval.txt").unlink(), "splits that .* has: none"),
        (lambda voc: (voc / "ImageSets/Main/trainval.txt").write_text("000009\n"), "none of 1 images has an object"),
        (lambda voc: (voc / "ImageSets/Main/trainval.txt").write_text("000007\n" * 2), "000007 more than once"),
        (replace_object("000012", voc_object((3, 2, 39, 9))), r"000012.xml .*39.0.*000012.jpg of 23x37 pixels"),
        (replace_object("000012", voc_object((3, -1, 9, 9))), "000012.xml .*outside"),
        (replace_object("000012", voc_object((9, 4, 8, 7))), "000012.xml .*which is empty"),
        (replace_object("000012", voc_object((9, 4, "x", 7))), "000012.xml has an object without a bndbox"),
        (replace_object("000012", "<object/>"), "000012.xml has an object without a bndbox"),
    ],
)
def test_a_spoiled_voc_names_the_file(voc, spoil, named):
    spoil(voc)
    with pytest.raises(ValueError, match=named):
        load_voc_boxes(voc)


def test_a_box_may_reach_one_pixel_over_the_edge(voc):
    replace_object("000012", voc_object((0, 0, 38, 24)))(voc)
    assert load_voc_boxes(voc).boxes(0).tolist() == [[-1, -1, 38, 24]]


def test_boxes_are_in_the_image_as_it_is_looked_at(voc):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    colour_image(1, 1).save(voc / "JPEGImages/000005.jpg", exif=exif)
    replace_object("000005", voc_object((2, 30, 23, 37)))(voc)
    data = load_voc_boxes(voc)
    assert data.image(1).size == (HEIGHT, WIDTH) and data.boxes(1).tolist() == [[1, 29, 23, 37]]


@pytest.fixture
def coco(tmp_path):
    (tmp_path / "train2014").mkdir()
    names = {image_id: f"COCO_train2014_{image_id:012d}.jpg" for image_id in (42, 7, 391895)}
    for image_id, name in names.items():
        colour_image(image_id, 0).save(tmp_path / "train2014" / name)
    annotations = [
        {"id": 1, "image_id": 7, "category_id": 3, "bbox": [2.5, 3.5, 10.2, 8.6], "iscrowd": 0},
        {"id": 2, "image_id": 42, "category_id": 9, "bbox": [1, 2, 30, 20], "iscrowd": 1},
        {"id": 3, "image_id": 42, "category_id": 1, "bbox": [0, 0, 37, 23], "iscrowd": 0},
        {"id": 4, "image_id": 7, "category_id": 1, "bbox": [20, 10, 5, 7]},
        {"id": 5, "image_id": 391895, "category_id": 1, "bbox": [4, 5, 6, 7]},
    ]
    write_coco_file(tmp_path, names, annotations)
    return tmp_path


def write_coco_file(folder: Path, names: dict[int, str], annotations: list[dict]) -> None:
    images = [{"id": image_id, "file_name": name} for image_id, name in names.items()]
    content = {"images": images, "annotations": annotations, "categories": []}
    (folder / "instances.json").write_text(json.dumps(content))


def test_coco_rounds_corners_and_leaves_crowds_out(coco):
    data = load_boxes(coco / "train2014", annotations=coco / "instances.json")
    assert list(data.image_ids) == [42, 7, 391895] and data.display_name == "instances"
    assert data.boxes(0).tolist() == [[0, 0, 37, 23]]
    assert data.boxes(1).tolist() == [[2, 4, 13, 12], [20, 10, 25, 17]]


@pytest.mark.parametrize("written", ["train2014/COCO_train2014_{:012d}.jpg", "COCO_train2014_{:012d}.jpg", "{}"])
def test_coco20k_is_a_list_of_names_or_numbers(coco, written):
    (coco / "selected.txt").write_text("".join(written.format(image_id) + "\n" for image_id in (391895, 42)))
    data = load_coco_boxes(coco / "train2014", coco / "instances.json", coco / "selected.txt")
    assert list(data.image_ids) == [391895, 42] and data.display_name == "instances, 2 selected"
    assert data.boxes(0).tolist() == [[4, 5, 10, 12]]


def test_coco_selection_may_be_numbers_in_memory(coco):
    assert list(load_coco_boxes(coco / "train2014", coco / "instances.json", [7]).image_ids) == [7]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "instances.json is no JSON"),
        ("[]", "instances.json is not in COCO's format"),
        ('{"images": [], "annotations": [{"image_id": 3}]}', "not in COCO's format.*bbox"),
        ('{"images": [], "annotations": [{"image_id": 3, "bbox": [0, 0, 1, 1]}]}', "image 3, which is not among"),
        ('{"images": [{"id": 3, "file_name": "gone.jpg"}], "annotations": []}', "no image .*gone.jpg"),
    ],
)
def test_a_spoiled_coco_names_the_file(coco, content, named):
    (coco / "instances.json").write_text(content)
    with pytest.raises(ValueError, match=named):
        load_coco_boxes(coco / "train2014", coco / "instances.json")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("nowhere", "instances.json"), "no folder .*nowhere"),
        (("train2014", "nothing.json"), "nothing.json cannot be read"),
        (("train2014", "instances.json", [8]), "has 8, which is not among the images of .*instances.json"),
        (("train2014", "instances.json", [7, "COCO_train2014_000000000007.jpg"]), "more than once"),
    ],
)
def test_what_is_not_there_is_named(coco, monkeypatch, arguments, named):
    monkeypatch.chdir(coco)
    with pytest.raises(ValueError, match=named):
        load_coco_boxes(*arguments)
