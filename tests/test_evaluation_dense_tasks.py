# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The tasks on pixels and on objects end to end, against numbers computed from what was saved."""

import json
import shutil
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import pytest
import torch
from evaluation_cases import CLASSES, SIDE, dense, save_model, voc
from reference import VARIANTS, randomize
from transformers import (
    AutoImageProcessor,
    AutoModelForDepthEstimation,
    AutoModelForSemanticSegmentation,
    Dinov2Config,
    Dinov2Model,
)

from hf_vitreg.evaluation.evaluate import evaluate_model
from hf_vitreg.evaluation.options import EvaluationOptions
from hf_vitreg.evaluation.patch_heads import load_head


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return dense(tmp_path_factory.mktemp("data") / "rooms")


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    return voc(tmp_path_factory.mktemp("data") / "VOC2007")


def evaluate(model, task, data, output, **options):
    return evaluate_model(model, task, data, output, EvaluationOptions(**options), device="cpu").results


def validation(data, kind):
    """Images and targets, as anybody reads them."""
    for path in sorted((data / "validation" / "images").iterdir()):
        with PIL.Image.open(path) as image, PIL.Image.open(data / "validation" / kind / path.name) as target:
            yield image.convert("RGB"), np.asarray(target)


def miou(pairs):
    """Of predictions and targets, class by class over the pixels of all images."""
    predicted, true = (np.concatenate([each[place].ravel() for each in pairs]) for place in (0, 1))
    counted = true != 255
    ious = []
    for value in range(len(CLASSES)):
        both = ((predicted == value) & (true == value) & counted).sum()
        either = (((predicted == value) | (true == value)) & counted).sum()
        ious.append(both / either)
    return np.mean(ious), (predicted == true)[counted].mean()


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_the_saved_model_segments_as_was_measured(model, data, tmp_path, num_layers):
    with torch.enable_grad():
        results = evaluate(model, "segmentation", data, tmp_path / "out", num_steps=40, num_layers=num_layers)
    saved = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out" / "model").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out" / "model")
    pairs = []
    for image, target in validation(data, "labels"):
        outputs = saved(**processor(image, return_tensors="pt"))
        found = processor.post_process_semantic_segmentation(outputs, target_sizes=[target.shape])[0]
        pairs.append((found.numpy(), target))
    mean_iou, accuracy = miou(pairs)
    assert results["metrics"]["mean_iou"] == pytest.approx(mean_iou, abs=0.005)
    assert results["metrics"]["overall_accuracy"] == pytest.approx(accuracy, abs=0.005)
    assert tuple(saved.config.id2label.values()) == CLASSES == tuple(results["details"]["per_category_iou"])
    assert results["details"]["layers"] == [4, 5][-num_layers:] and next(iter(results["metrics"])) == "mean_iou"
    assert results["details"]["classes_without_training_pixels"] == []
    assert (tmp_path / "out" / "segmentation.png").stat().st_size


@torch.no_grad()
def test_the_saved_model_knows_depths_as_was_measured(model, data, tmp_path):
    with torch.enable_grad():
        results = evaluate(model, "depth", data, tmp_path / "out", num_steps=20, max_depth=5.0)
    saved = AutoModelForDepthEstimation.from_pretrained(tmp_path / "out" / "model").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out" / "model")
    errors, deltas = [], []
    for image, millimetres in validation(data, "depth"):
        outputs = saved(**processor(image, return_tensors="pt"))
        depth = outputs.predicted_depth[:, None]
        found = torch.nn.functional.interpolate(depth, millimetres.shape, mode="bilinear")[0, 0].numpy()
        true, known = millimetres / 1000, millimetres > 0
        errors.append(np.sqrt(np.mean((found - true)[known] ** 2)))
        deltas.append(np.mean(np.maximum(found / true.clip(1e-3), true / found)[known] < 1.25))
    assert results["metrics"]["rmse"] == pytest.approx(np.mean(errors), rel=1e-3)
    assert results["metrics"]["delta1"] == pytest.approx(np.mean(deltas), abs=0.005)
    assert next(iter(results["metrics"])) == "rmse" and saved.config.max_depth == 5
    assert (tmp_path / "out" / "depth.png").stat().st_size


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_of_other_models_the_head_alone_is_saved(model, data, tmp_path, task):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "image_size": SIDE}
    randomize(Dinov2Model(Dinov2Config(**sizes))).save_pretrained(tmp_path / "dinov2")
    shutil.copy(model / "preprocessor_config.json", tmp_path / "dinov2")
    evaluate(tmp_path / "dinov2", task, data, tmp_path / "out", num_steps=2, size=(28, 42))
    weights, facts = load_head(tmp_path / "out", f"{task}_head")
    channels = 24 * (1 + (task == "depth"))
    assert weights["classifier.weight"].shape[1] == channels and facts["layers"] == [1]
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("task", ["segmentation", "depth", "object_discovery"])
def test_a_model_without_cls(data, boxes, tmp_path, task):
    model = save_model(tmp_path / "mean", **VARIANTS["mean"])
    options = {} if task == "object_discovery" else {"num_steps": 2}
    results = evaluate(model, task, boxes if task == "object_discovery" else data, tmp_path / "out", **options)
    assert results["metrics"]
    if task != "object_discovery":
        assert (tmp_path / "out" / "model" / "config.json").exists()


def test_a_split_can_be_elsewhere_and_be_all_there_is(model, data, tmp_path):
    apart = {"validation_data": str(data / "validation"), "num_steps": 2}
    alone = shutil.copytree(data / "train", tmp_path / "train")
    shutil.copy(data / "classes.txt", alone.parent)
    shutil.copytree(data / "validation", tmp_path / "validation")
    expected = evaluate(model, "segmentation", data, tmp_path / "together", num_steps=2)["metrics"]
    assert evaluate(model, "segmentation", data, tmp_path / "a", **apart)["metrics"] == expected
    assert evaluate(model, "segmentation", alone, tmp_path / "b", **apart)["metrics"] == expected
    # an error of such a split is told as it is
    next((tmp_path / "validation" / "labels").iterdir()).unlink()
    with pytest.raises(ValueError, match=r"validation/images/\d\d\.png has no file of its name in .*/labels"):
        evaluate(model, "segmentation", data, tmp_path / "c", validation_data=str(tmp_path / "validation"))


def test_a_class_that_cannot_be_learned_is_told(model, data, tmp_path):
    (shutil.copytree(data, tmp_path / "rooms") / "classes.txt").write_text("\n".join([*CLASSES, "ceiling"]))
    results = evaluate(model, "segmentation", tmp_path / "rooms", tmp_path / "out", num_steps=2)
    assert results["details"]["classes_without_training_pixels"] == ["ceiling"]
    assert results["details"]["per_category_iou"]["ceiling"] in (None, 0)


# Objects


def corloc(folder, boxes_file):
    """Share of the images whose box overlaps a true one by half, from the files alone."""
    content, found = json.loads(boxes_file.read_text()), []
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for box in content["annotations"]:
        left, top, width, height = box["bbox"]
        root = ElementTree.parse((folder / "Annotations" / names[box["image_id"]]).with_suffix(".xml")).getroot()
        overlaps = []
        for each in root.iter("bndbox"):
            l2, t2, r2, b2 = (float(each.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax"))
            l2, t2 = l2 - 1, t2 - 1
            both = max(0, min(left + width, r2) - max(left, l2)) * max(0, min(top + height, b2) - max(top, t2))
            overlaps.append(both / (width * height + (r2 - l2) * (b2 - t2) - both))
        found.append(max(overlaps) >= 0.5)
    return np.mean(found)


@pytest.mark.parametrize(
    "options", [{}, {"facet": "output", "normalize": True, "bias": -0.3}, {"method": "attention"}]
)
def test_corloc_is_that_of_the_written_boxes(boxes, tmp_path, options):
    model = save_model(tmp_path / "tiny", num_attention_heads=6)
    results = evaluate(model, "object_discovery", boxes, tmp_path / "out", **options)
    assert results["metrics"] == {"corloc": pytest.approx(corloc(boxes, tmp_path / "out" / "boxes.json"))}
    assert 0 < results["metrics"]["corloc"] < 1
    assert results["data"]["split"] == "trainval" and results["details"]["num_images"] == 5
    assert (tmp_path / "out" / "boxes.png").stat().st_size


def test_tuning_names_its_images_and_reports_the_others(model, boxes, tmp_path):
    results = evaluate(model, "object_discovery", boxes, tmp_path / "out", tune=True, tuning_share=0.4)
    details = results["details"]
    assert len(details["tuning_images"]) == 2 and details["num_images_measured"] == 3
    assert {trial["layer"] for trial in details["trials"]} == {1, 2, 3, 4} and len(details["trials"]) == 4 * 21
    assert results["metrics"]["corloc"] == details["corloc"]
    with pytest.raises(ValueError, match="has layers 1 to 5, got 0"):
        evaluate(model, "object_discovery", boxes, tmp_path / "other", tune=True, layer=0)


def test_coco_has_no_split(model, boxes, tmp_path):
    coco = {
        "images": [{"id": 7, "file_name": "00.jpg"}, {"id": 9, "file_name": "01.jpg"}],
        "annotations": [{"image_id": image, "bbox": [3, 2, 12, 13], "iscrowd": 0} for image in (7, 9)],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    results = evaluate(
        model, "object_discovery", boxes / "JPEGImages", tmp_path / "out", annotations=tmp_path / "coco.json"
    )
    assert results["data"]["split"] is None and results["data"]["num_images"] == 2
    written = json.loads((tmp_path / "out" / "boxes.json").read_text())
    assert [image["id"] for image in written["images"]] == [7, 9]
