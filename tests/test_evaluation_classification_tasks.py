# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The tasks on labelled images end to end, against scikit-learn and against models that are loaded as anybody does."""

import json
import shutil

import datasets
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from evaluation_cases import SIDE, TRAIN, VALIDATION, labelled, save_model
from reference import VARIANTS, randomize
from safetensors.torch import load_file
from sample_images import write_folder, write_parquet
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from test_evaluation_zero_shot import small_clip
from transformers import AutoImageProcessor, AutoModelForImageClassification, Dinov2Config, Dinov2Model

from hf_vitreg import ViTRegModel
from hf_vitreg.data.labelled_images import load_image_data
from hf_vitreg.evaluation.evaluate import evaluate_model
from hf_vitreg.evaluation.options import EvaluationOptions
from hf_vitreg.evaluation.zero_shot import class_embeddings, load_dual_encoder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return labelled(tmp_path_factory.mktemp("data") / "birds")


def evaluate(model, task, data, output, **options):
    return evaluate_model(model, task, data, output, EvaluationOptions(**options), device="cpu").results


def image_features(model, folder):
    """CLS of the last layer and labels, of stretched images one after another, by transformers alone."""
    encoder, processor = ViTRegModel.from_pretrained(model).eval(), AutoImageProcessor.from_pretrained(model)
    rows, labels = [], []
    for label, of_class in enumerate(sorted(folder.iterdir())):
        for path in sorted(of_class.iterdir()):
            with PIL.Image.open(path) as image, torch.no_grad():
                resized = image.convert("RGB").resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
                rows.append(encoder(**processor(resized, return_tensors="pt")).last_hidden_state[0, 0])
            labels.append(label)
    return torch.stack(rows).numpy(), np.array(labels)


def test_nearest_neighbours_are_those_of_scikit_learn(model, data, tmp_path):
    results = evaluate(model, "knn", data, tmp_path / "out", ks=(1, 3, 11), preprocessing="stretch")
    (train, train_labels), (test, labels) = (image_features(model, data / split) for split in ("train", "validation"))
    for k in (1, 3, 11):
        theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        expected = theirs.fit(train, train_labels).score(test, labels)
        assert results["metrics"][f"top1_k{k}"] == pytest.approx(expected)
    assert results["metrics"]["accuracy"] == max(results["metrics"][f"top1_k{k}"] for k in (1, 3, 11))
    assert next(iter(results["metrics"])) == "accuracy" and results["details"]["token"] == "cls"
    assert results["data"]["num_train_images"] == sum(TRAIN.values())
    assert results["data"]["num_images"] == sum(VALIDATION.values())


def test_logistic_regression_is_that_of_scikit_learn(model, data, tmp_path):
    results = evaluate(model, "logistic", data, tmp_path / "out", preprocessing="stretch")
    (train, train_labels), (test, labels) = (image_features(model, data / split) for split in ("train", "validation"))
    theirs = LogisticRegression(C=results["details"]["C"], max_iter=5000, tol=1e-8)
    assert results["metrics"]["accuracy"] == pytest.approx(theirs.fit(train, train_labels).score(test, labels))
    assert results["metrics"]["top5_accuracy"] == 1


def test_the_last_of_four_layers_is_the_default_and_another_can_be_asked_for(model, data, tmp_path):
    outcomes = [evaluate(model, "knn", data, tmp_path / str(layer), layer=layer) for layer in (None, 5, 1)]
    assert [outcome["details"]["layer"] for outcome in outcomes] == [5, 5, 1]
    assert outcomes[0]["metrics"] == outcomes[1]["metrics"]
    with pytest.raises(ValueError, match="has layers 1 to 5, got 6"):
        evaluate(model, "knn", data, tmp_path / "6", layer=6)


def predictions(folder, data):
    """Of the validation images, by what anybody loads."""
    model, processor = (
        AutoModelForImageClassification.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    found, expected = [], []
    for of_class in sorted((data / "validation").iterdir()):
        for path in sorted(of_class.iterdir()):
            with PIL.Image.open(path) as image, torch.no_grad():
                logits = model(**processor(image, return_tensors="pt")).logits
            found.append(model.config.id2label[logits.argmax().item()])
            expected.append(of_class.name)
    return np.array(found), np.array(expected)


@pytest.mark.parametrize("preprocessing", ["crop", "stretch"])
def test_the_best_linear_head_loads_as_a_classifier_of_the_same_accuracy(model, data, tmp_path, preprocessing):
    results = evaluate(model, "linear", data, tmp_path / "out", preprocessing=preprocessing, num_epochs=2, min_steps=0)
    found, expected = predictions(tmp_path / "out" / "classifier", data)
    assert (found == expected).mean() == pytest.approx(results["metrics"]["accuracy"])
    heads = results["details"]["heads"]
    assert len(heads) == 52 and max(head["accuracy"] for head in heads) == results["metrics"]["accuracy"]
    assert min(head["accuracy"] for head in heads) == results["metrics"]["worst_accuracy"]
    assert results["details"]["saved"] == "classifier" and (tmp_path / "out" / "linear.png").stat().st_size


def test_no_image_processor_is_saved_that_would_crop_otherwise(model, data, tmp_path):
    results = evaluate(model, "linear", data, tmp_path / "out", size=(28, 42))
    assert results["details"]["saved"].startswith("classifier, without an image processor")
    files = {path.name for path in (tmp_path / "out" / "classifier").iterdir()}
    assert "model.safetensors" in files and "preprocessor_config.json" not in files


def test_the_sweep_is_as_good_as_logistic_regression_on_digits(tmp_path):
    model = save_model(tmp_path / "tiny", num_hidden_layers=1)
    common = {"cache_dir": tmp_path / "cache", "max_images": 600}
    # fewer steps than by default, which regularizes about as much as scikit-learn's penalty
    swept = evaluate(model, "linear", "digits", tmp_path / "linear", num_epochs=600, min_steps=0, **common)["metrics"]
    (train, train_labels), (test, labels) = digits_features(tmp_path / "cache")
    theirs = LogisticRegression(max_iter=5000).fit(train, train_labels).score(test, labels)
    assert swept["accuracy"] > swept["worst_accuracy"] + 0.1
    assert swept["accuracy"] == pytest.approx(theirs, abs=0.01)


def digits_features(cache):
    """CLS and the mean of the patches of the last layer, as the cache holds them, and labels."""
    sets = {}
    for folder in cache.iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        tensors = load_file(folder / "shard-000000.safetensors")
        sets[manifest["num_images"]] = torch.cat([tensors["cls"][:, -1], tensors["patch_mean"][:, -1]], 1).numpy()
    splits = [load_image_data("digits", split, max_images=600) for split in ("train", "validation")]
    return [(sets[len(data)], np.array(data.labels)) for data in splits]


# Other models


@pytest.mark.parametrize("task", ["knn", "linear", "logistic"])
def test_a_model_without_cls_is_looked_at_by_its_patches(data, tmp_path, task):
    model = save_model(tmp_path / "mean", **VARIANTS["mean"])
    results = evaluate(model, task, data, tmp_path / "out")
    assert results["details"]["token"] == "patch_mean"
    if task == "linear":
        assert results["details"]["saved"] == "linear_head.safetensors"
        head = load_file(tmp_path / "out" / "linear_head.safetensors")
        assert head["weight"].shape[0] == len(head["bias"]) == 3 and not (tmp_path / "out" / "classifier").exists()


def test_a_model_of_timm(data, tmp_path, monkeypatch):
    create_model = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **values: create_model(name, **{**values, "pretrained": False})
    )
    results = evaluate("timm:test_vit", "linear", data, tmp_path / "out", num_epochs=1, min_steps=0)
    assert results["model"]["source"] == "timm test_vit" and results["details"]["saved"] == "linear_head.safetensors"


def test_a_model_of_transformers(model, data, tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "image_size": SIDE}
    randomize(Dinov2Model(Dinov2Config(**sizes))).save_pretrained(tmp_path / "dinov2")
    shutil.copy(model / "preprocessor_config.json", tmp_path / "dinov2")
    results = evaluate(tmp_path / "dinov2", "linear", data, tmp_path / "out", num_epochs=1, min_steps=0)
    assert results["model"]["source"] == "transformers dinov2" and results["model"]["num_registers"] == 0
    # two layers have no last four
    assert len(results["details"]["heads"]) == 26


# Registers away from home


def test_registers_are_compared_on_other_images(model, data, tmp_path):
    write_folder(tmp_path / "sketches" / "validation", VALIDATION)
    write_folder(tmp_path / "plain", VALIDATION)
    (tmp_path / "noise").mkdir()
    generator = np.random.default_rng(0)
    for index in range(7):
        pixels = generator.integers(0, 255, (31, 37, 3)).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "noise" / f"{index}.png")
    shifted = {"sketches": str(tmp_path / "sketches"), "plain": str(tmp_path / "plain")}
    outliers = {"noise": str(tmp_path / "noise"), "digits": "digits"}
    results = evaluate(
        model, "out_of_distribution", data, tmp_path / "out", shifted=shifted, outliers=outliers, max_images=30
    )
    metrics = results["metrics"]
    # the very images of validation
    for prefix in ("", "cls_"):
        assert (
            metrics[f"{prefix}accuracy_sketches"] == metrics[f"{prefix}accuracy_plain"] == metrics[f"{prefix}accuracy"]
        )
        assert 0 <= metrics[f"{prefix}fpr95_noise"] <= 1 and 0 <= metrics[f"{prefix}auroc_digits"] <= 1
    assert results["details"]["num_images"] == {
        "shifted": {"sketches": 8, "plain": 8},
        "outliers": {"noise": 7, "digits": 30},
    }
    assert next(iter(metrics)) == "accuracy"


def test_registers_are_needed_for_that(data, tmp_path):
    model = save_model(tmp_path / "bare", num_register_tokens=0)
    with pytest.raises(ValueError, match="has no registers, and this task compares a probe on CLS"):
        evaluate(model, "out_of_distribution", data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Texts


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("clip")) / "model"


def write_lines(path, *lines):
    path.write_text("\n".join(lines))
    return path


def test_classes_are_known_by_their_names(clip, data, tmp_path):
    names = write_lines(tmp_path / "names.txt", "small ant", "large_bee", "a cat")
    templates = write_lines(tmp_path / "templates.txt", "a photo of a {}.", "{}")
    results = evaluate(clip, "zero_shot", data, tmp_path / "out", class_names=names, templates=templates)
    assert results["details"] == {
        "templates": ["a photo of a {}.", "{}"],
        "class_names": ["small ant", "large_bee", "a cat"],
    }
    dual = load_dual_encoder(clip)
    classes = class_embeddings(
        dual.model, dual.tokenizer, ["small ant", "large bee", "a cat"], ["a photo of a {}.", "{}"]
    )
    found = []
    images = load_image_data(data, "validation")
    for index in range(len(images)):
        pixel_values = dual.image_processor(images.image(index), return_tensors="pt").pixel_values
        with torch.no_grad():
            found.append(
                (dual.model.get_image_features(pixel_values=pixel_values).pooler_output @ classes.T).argmax().item()
            )
    expected = (np.array(found) == np.array(images.labels)).mean()
    assert results["metrics"] == {"accuracy": pytest.approx(expected), "top5_accuracy": 1.0}
    assert len(results["model"]["sha256"]) == 64


def test_class_names_are_as_many_as_classes(clip, data, tmp_path):
    names = write_lines(tmp_path / "names.txt", "ant", "bee")
    with pytest.raises(
        ValueError, match=r"names\.txt has 2 class names, and the images have 3 classes: .* ant, bee, cat"
    ):
        evaluate(clip, "zero_shot", data, tmp_path / "out", class_names=names)
    with pytest.raises(ValueError, match=r"gone\.txt cannot be read"):
        evaluate(clip, "zero_shot", data, tmp_path / "out", class_names=tmp_path / "gone.txt")


def test_a_model_without_texts_knows_no_names(model, data, tmp_path):
    with pytest.raises(ValueError, match=r"Cannot load .*tiny: it is a vitreg, which has no text tower"):
        evaluate(model, "zero_shot", data, tmp_path / "out")


# Data


def test_streamed_parquet_gives_what_mapped_gives(model, tmp_path):
    folder = tmp_path / "fish"
    folder.mkdir()
    names = datasets.ClassLabel(names=["cod", "eel"])
    write_parquet(folder / "train-0.parquet", ["cod", "eel"] * 4, names)
    write_parquet(folder / "train-1.parquet", ["eel", "cod", "eel"], names)
    write_parquet(folder / "validation.parquet", ["cod", "eel", "eel"], names)
    mapped, streamed = (
        evaluate(model, "linear", folder, tmp_path / str(streaming), num_epochs=2, min_steps=0, streaming=streaming)
        for streaming in (False, True)
    )
    assert mapped["metrics"] == streamed["metrics"] and mapped["details"] == streamed["details"]
    assert (mapped["data"]["num_train_images"], streamed["data"]["num_train_images"]) == (11, 11)
    assert len(mapped["data"]["sha256"]) == len(mapped["data"]["train_sha256"]) == 64
    assert streamed["data"]["stream"] != streamed["data"]["train_stream"] and "sha256" not in streamed["data"]


def test_images_that_were_left_out_are_named(model, data, tmp_path):
    spoiled = shutil.copytree(data, tmp_path / "birds")
    for path in (spoiled / "train" / "bee" / "002.png", spoiled / "validation" / "cat" / "001.png"):
        path.write_bytes(path.read_bytes()[:60])
    for task in ("knn", "out_of_distribution"):
        results = evaluate(model, task, spoiled, tmp_path / task, skip_bad_images=True)
        left_out = results["details"]["left_out"]
        assert [name in left_out[place] for place, name in enumerate(("bee/002.png", "cat/001.png"))] == [True, True]
        assert (results["data"]["num_train_images"], results["data"]["num_images"]) == (17, 7)
    with pytest.raises(ValueError, match=r"bee/002\.png cannot be read as an image"):
        evaluate(model, "knn", spoiled, tmp_path / "out")


def test_validation_images_can_be_elsewhere(model, data, tmp_path):
    expected = evaluate(model, "knn", data, tmp_path / "together")["metrics"]
    apart = evaluate(model, "knn", data / "train", tmp_path / "apart", validation_data=str(data / "validation"))
    assert apart["metrics"] == expected
    # data that is no folder has splits of its own
    digits = evaluate(model, "knn", "digits", tmp_path / "one", max_images=150)
    again = evaluate(model, "knn", "digits", tmp_path / "two", max_images=150, validation_data="digits")
    assert digits["metrics"] == again["metrics"] and digits["data"]["sha256"] == again["data"]["sha256"]
