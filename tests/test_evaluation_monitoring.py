# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Measurements in training, against the tools of the evaluation and artifacts that were planted."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from planted import MEAN, PATCH_SIZE, STD, planted_encoder
from planted import patchy_image as patchy
from reference import VARIANTS, randomize, tiny_config
from sample_images import colour_image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torchvision.transforms import v2
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from hf_vitreg import ViTRegForImageClassification, ViTRegModel
from hf_vitreg.data.labelled_images import MappedImages
from hf_vitreg.evaluation.knn import knn_accuracy
from hf_vitreg.evaluation.monitoring import (
    Measuring,
    classifier_accuracy,
    measure_features,
    patch_outliers,
    zero_shot_accuracy,
)


CLASSES = ["ant", "bee", "cat"]
SIZE = (3 * PATCH_SIZE, 5 * PATCH_SIZE)
TRANSFORM = v2.Compose(
    [v2.ToImage(), v2.Resize(SIZE), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()]
)


def mapped(images, labels=None) -> MappedImages:
    """A dataset as training loads it; `None` is a file that cannot be read."""
    encoded = []
    for image in images:
        buffer = io.BytesIO(b"no picture")
        if image is not None:
            image.save(buffer, format="PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    columns = {"image": encoded, "name": [f"image {index}" for index in range(len(images))]}
    features = {"image": datasets.Image(decode=False), "name": datasets.Value("string")}
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.ClassLabel(names=CLASSES)
    return MappedImages(datasets.Dataset.from_dict(columns, features=datasets.Features(features)), "pictures")


def coloured(labels, start=0) -> MappedImages:
    """Images whose class is their colour."""
    return mapped([colour_image(label, start + index) for index, label in enumerate(labels)], labels)


def pixels(images: MappedImages) -> torch.Tensor:
    return torch.stack([TRANSFORM(images.image(index)) for index in range(len(images))])


@pytest.fixture
def how() -> Measuring:
    return Measuring(transform=TRANSFORM, accelerator=Accelerator(cpu=True), batch_size=5)


TRAIN, VALIDATION = [0, 1, 2, 1, 2, 2, 0, 1, 0, 1, 2, 2, 1], [2, 0, 1, 1, 2, 0, 1]


def everything(accelerator) -> dict[str, float]:
    """All measurements of one model."""
    torch.manual_seed(5)
    how = Measuring(transform=TRANSFORM, accelerator=accelerator, batch_size=3)
    model = randomize(ViTRegForImageClassification(tiny_config(num_labels=3)))
    train, validation = coloured(TRAIN), coloured(VALIDATION, start=100)
    features = measure_features(model.vitreg, validation, train, how)
    return features | classifier_accuracy(model, validation, how)


@pytest.mark.parametrize(
    ("variant", "token"),
    [
        ({}, lambda outputs: outputs.last_hidden_state[:, 0]),
        (VARIANTS["mean"], lambda outputs: outputs.patch_tokens.mean(dim=1)),
    ],
    ids=["cls", "without_cls"],
)
def test_neighbours_are_those_of_the_evaluation(how, variant, token):
    backbone = randomize(ViTRegModel(tiny_config(**variant))).eval()
    train, validation = coloured(TRAIN), coloured(VALIDATION, start=100)
    with torch.no_grad():
        features = [token(backbone(pixels(images))) for images in (train, validation)]
    expected = knn_accuracy(features[0], TRAIN, features[1], VALIDATION, 3, ks=[len(TRAIN)])
    assert measure_features(backbone, validation, train, how)["knn_accuracy"] == expected[len(TRAIN)].top1


def test_a_class_without_neighbours_is_not_recognized(how):
    backbone = randomize(ViTRegModel(tiny_config()))
    all_bees = coloured([1] * 4, start=50)
    assert measure_features(backbone, coloured([1, 1, 0, 1]), all_bees, how)["knn_accuracy"] == 0.75


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_planted_artifacts_are_counted(how, batch_size):
    images, constant = zip(*(patchy(index, rows=4, cols=6) for index in range(11)))
    num_constant = sum(int(mask.sum()) for mask in constant)
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    measuring = Measuring(transform=to_tensor, accelerator=how.accelerator, batch_size=batch_size)
    born = measure_features(planted_encoder(1500.0).model, mapped(images), None, measuring)
    assert born["outlier_share"] == pytest.approx(num_constant / (11 * 24))
    before = measure_features(planted_encoder(1.0).model, mapped(images), None, measuring)
    assert before["outlier_share"] < 0.02 and born["max_norm_ratio"] > 3 * before["max_norm_ratio"]
    assert born.keys() == {"outlier_share", "max_norm_ratio", "median_norm", "feature_rank"}


def test_registers_are_no_patches(how):
    backbone = planted_encoder(1.0).model
    before = measure_features(backbone, coloured([0, 1]), None, how)
    with torch.no_grad():
        backbone.embeddings.register_tokens.mul_(1e4)
        backbone.embeddings.cls_token.mul_(1e4)
    after = measure_features(backbone, coloured([0, 1]), None, how)
    assert after["max_norm_ratio"] < 2 * before["max_norm_ratio"]


def test_outliers_by_hand():
    norms = torch.cat([torch.linspace(9, 11, 99), torch.tensor([60.0])]).reshape(4, 25)
    assert patch_outliers(norms, threshold=50.0) == pytest.approx(
        {"outlier_share": 0.01, "max_norm_ratio": 6.0, "median_norm": 10.0}, rel=0.01
    )
    with pytest.raises(ValueError, match="Norms of patch tokens"):
        patch_outliers(torch.tensor([1.0, torch.nan]))


def test_accuracy_and_loss_are_those_of_all_images_at_once(how):
    model = randomize(ViTRegForImageClassification(tiny_config(num_labels=3))).eval()
    validation = coloured(VALIDATION)
    with torch.no_grad():
        outputs = model(pixels(validation), labels=torch.tensor(VALIDATION))
    measured = classifier_accuracy(model, validation, how)
    correct = outputs.logits.argmax(dim=-1) == torch.tensor(VALIDATION)
    assert measured["validation_accuracy"] == correct.double().mean().item()
    assert measured["validation_loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)


def test_measuring_leaves_no_trace(how):
    model = randomize(ViTRegForImageClassification(tiny_config(num_labels=3, drop_path_rate=0.4))).train()
    model.vitreg.encoder.layer[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, random_state = {module: module.training for module in model.modules()}, torch.get_rng_state()
    first = measure_features(model.vitreg, coloured(VALIDATION), coloured(TRAIN), how)
    classifier_accuracy(model, coloured(VALIDATION), how)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {module: module.training for module in model.modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert measure_features(model.vitreg, coloured(VALIDATION), coloured(TRAIN), how) == first


def test_modes_come_back_after_an_error(how):
    backbone = randomize(ViTRegModel(tiny_config())).train()
    with pytest.raises(ValueError, match="None of the 2 images of pictures can be read"):
        measure_features(backbone, mapped([None, None]), None, how)
    assert all(module.training for module in backbone.modules())


def test_images_that_cannot_be_read_are_left_out_and_named_once(how, caplog):
    model = randomize(ViTRegForImageClassification(tiny_config(num_labels=3)))
    good = [colour_image(label, index) for index, label in enumerate(VALIDATION)]
    broken = mapped([*good[:4], None, *good[4:], None], [*VALIDATION[:4], 2, *VALIDATION[4:], 0])
    expected = classifier_accuracy(model, mapped(good, VALIDATION), how)
    for _ in range(2):
        assert classifier_accuracy(model, broken, how) == pytest.approx(expected, rel=1e-5)
    assert [f"image {index}" in record.message for index, record in zip((4, 8), caplog.records)] == [True, True]
    assert len(caplog.records) == 2


def small_clip():
    """A dual encoder that knows the three classes as words."""
    words = {word: index for index, word in enumerate(["[PAD]", "[EOS]", "a", "photo", "of", ".", *CLASSES])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=[("[EOS]", 1)])
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 11, "eos_token_id": 1}
    text |= {"bos_token_id": 0, "pad_token_id": 0}
    torch.manual_seed(11)
    config = CLIPConfig(
        text_config=text, vision_config={**sizes, "image_size": 28, "patch_size": 7}, projection_dim=19
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]")
    return CLIPModel(config), wrapped


def test_zero_shot_is_what_the_model_itself_says(how):
    model, tokenizer = small_clip()
    validation = coloured(VALIDATION)
    square = v2.Compose([v2.ToImage(), v2.Resize((28, 28)), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
    texts = tokenizer([f"a photo of a {name}." for name in CLASSES], return_tensors="pt")
    pixel_values = torch.stack([square(validation.image(index)) for index in range(len(validation))])
    with torch.no_grad():
        logits = model.eval()(pixel_values=pixel_values, **texts).logits_per_image
    correct = (logits.argmax(dim=-1) == torch.tensor(VALIDATION)).double().mean().item()
    measuring = Measuring(transform=square, accelerator=how.accelerator, batch_size=2)
    assert zero_shot_accuracy(model.train(), tokenizer, validation, measuring) == {"zero_shot_accuracy": correct}
    assert model.training
    turned = zero_shot_accuracy(model, tokenizer, validation, measuring, class_names=["cat", "ant", "bee"])
    predicted = (logits.argmax(dim=-1) + 1) % 3
    assert turned["zero_shot_accuracy"] == (predicted == torch.tensor(VALIDATION)).double().mean().item()


SCRIPT = """
import json, sys
import torch
from accelerate import Accelerator
from test_evaluation_monitoring import everything

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump(everything(accelerator), file)
accelerator.end_training()
"""


@pytest.mark.slow  # pretraining in two processes measures, too
def test_two_processes_measure_what_one_does(tmp_path):
    """Seven validation images: the last process has one less."""
    (tmp_path / "both.py").write_text(SCRIPT)
    tests = Path(__file__).parent
    environment = {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent / 'src'}", "ACCELERATE_USE_CPU": "true"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "both.py"), str(tmp_path)],
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == pytest.approx(everything(Accelerator(cpu=True)), rel=1e-5)
