# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import timm
import torch
import torch.nn.functional as F
from reference import images, randomize, tiny_config
from transformers import BitImageProcessor, ResNetConfig, ResNetForImageClassification

from hf_vitreg import ViTRegForImageClassification
from hf_vitreg.teachers import load_classifier


NAMES = ["ant", "bee", "cat", "dog", "eel"]
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
OWN_MEAN, OWN_STD = [0.5, 0.4, 0.3], [0.25, 0.5, 0.125]


def labels(names=NAMES) -> dict:
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def save(model, folder, height=21, width=49, **settings) -> str:
    model.save_pretrained(folder)
    size = {"height": height, "width": width}
    values = {"image_mean": OWN_MEAN, "image_std": OWN_STD, **settings}
    BitImageProcessor(size=size, crop_size=size, do_resize=True, **values).save_pretrained(folder)
    return str(folder)


def classifier(**changes) -> ViTRegForImageClassification:
    return randomize(ViTRegForImageClassification(tiny_config(classifier_layout="cls", **labels(**changes))))


def renormalized(pixel_values: torch.Tensor, mean, std) -> torch.Tensor:
    """From pixels that the student gets back to colours, and to what the teacher wants."""
    old_mean, old_std, mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD, mean, std))
    return (pixel_values * old_std + old_mean - mean) / std


def test_a_teacher_sees_what_it_was_trained_on(tmp_path):
    model = classifier()
    teacher = load_classifier(save(model, tmp_path), NAMES, MEAN, STD)
    pixel_values = images()
    with torch.no_grad():
        expected = model(renormalized(pixel_values, OWN_MEAN, OWN_STD)).logits
    torch.testing.assert_close(teacher(pixel_values), expected, atol=1e-4, rtol=1e-4)


def test_a_teacher_gets_its_own_size(tmp_path):
    model = classifier()
    teacher = load_classifier(save(model, tmp_path), NAMES, MEAN, STD)
    large = images(height=35, width=63)
    resized = F.interpolate(renormalized(large, OWN_MEAN, OWN_STD), (21, 49), mode="bicubic", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(teacher(large), model(resized).logits, atol=1e-4, rtol=1e-4)


def test_a_teacher_without_normalization_gets_colours(tmp_path):
    model = classifier()
    teacher = load_classifier(save(model, tmp_path, do_normalize=False), NAMES, MEAN, STD)
    pixel_values = images()
    with torch.no_grad():
        expected = model(renormalized(pixel_values, [0.0] * 3, [1.0] * 3)).logits
    torch.testing.assert_close(teacher(pixel_values), expected, atol=1e-4, rtol=1e-4)


def test_a_teacher_of_timm(tmp_path):
    model = timm.create_model("test_efficientnet.r160_in1k", num_classes=5).eval()
    timm.models.save_for_hf(model, tmp_path)
    teacher = load_classifier(f"timm:local-dir:{tmp_path}", NAMES, MEAN, STD)
    settings = timm.data.resolve_model_data_config(model)
    pixel_values = images(height=160, width=160)
    with torch.no_grad():
        expected = model(renormalized(pixel_values, settings["mean"], settings["std"]))
    assert settings["input_size"] == (3, 160, 160)
    torch.testing.assert_close(teacher(pixel_values), expected, atol=1e-4, rtol=1e-4)


def test_a_teacher_stays_as_it_is(tmp_path):
    """Batch norm counts nothing, nothing is learned, nothing of its own is in a state dict."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", **labels())
    teacher = load_classifier(save(ResNetForImageClassification(config), tmp_path), NAMES, MEAN, STD).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    assert not teacher(images()).requires_grad and not any(each.requires_grad for each in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_classes_must_be_those_of_the_data(tmp_path):
    folder = save(classifier(), tmp_path)
    with pytest.raises(ValueError, match="knows 5 classes, and the data has 4"):
        load_classifier(folder, NAMES[:4], MEAN, STD)
    with pytest.raises(ValueError, match="its class 1 is 'bee', and that of the data 'cat'"):
        load_classifier(folder, ["ant", "cat", "bee", "dog", "eel"], MEAN, STD)
    # other words for the same classes: nobody but the user can know
    load_classifier(folder, ["n01", "n02", "n03", "n04", "n05"], MEAN, STD)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/none", "Cannot load --distillation_teacher"),
        ("{folder}", "none of transformers'. For a model of timm write timm:"),
        ("timm:no_such_model", "Unknown model"),
    ],
)
def test_what_is_no_classifier_is_an_error(name, message, tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    with pytest.raises(ValueError, match=message):
        load_classifier(name.format(folder=tmp_path), NAMES, MEAN, STD)


def test_a_backbone_is_no_classifier(tmp_path):
    save(classifier().vitreg, tmp_path)
    with pytest.raises(ValueError, match=r"2 of its weights are missing, classifier\.bias among them"):
        load_classifier(str(tmp_path), NAMES, MEAN, STD)
