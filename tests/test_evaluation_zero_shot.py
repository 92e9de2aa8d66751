# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Zero-shot classification against OpenCLIP's own, on a small model that our converter converted."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip as original
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.zero_shot_classifier import build_zero_shot_classifier
from safetensors.torch import load_file, save_file
from sample_images import colour_image
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel
from typer.testing import CliRunner

from conversion.convert import app
from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.evaluation.zero_shot import (
    TEMPLATES,
    class_embeddings,
    image_embeddings,
    load_dual_encoder,
    load_templates,
    zero_shot_logits,
)


NAMES = ["cat", "golden retriever", "café in {curly} braces", "traffic light", "a", "crane (bird)", "word " * 100]
SENTENCES = ["a photo of a {}.", "{}", "the {}, seen at night"]
VISION = {"image_size": 28, "layers": 2, "width": 64, "patch_size": 14}
TEXT = {"width": 64, "heads": 1, "layers": 2}


@dataclass
class Pictures:
    """Seven images of several sizes."""

    display_name: str = "pictures"
    count: int = 7

    def __len__(self):
        return self.count

    def name(self, index):
        return f"picture {index}"

    def content(self, index):
        return self.image(index).tobytes()

    def image(self, index):
        return colour_image(index, index, height=31 + 5 * index, width=47)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_clip(tmp_path_factory.mktemp("zero_shot"))


def small_clip(folder):
    """A small CLIP with the real vocabulary, as OpenCLIP saves it and as we convert it."""
    torch.manual_seed(0)
    clip = original.model.CLIP(40, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True)
    torch.save(clip.state_dict(), folder / "clip.pth")
    for name, *options in (["model"], ["vision", "--vision-only"]):
        arguments = ["open_clip", str(folder / "clip.pth"), str(folder / name), "--quick-gelu", *options]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    clip = original.model.CLIP(40, vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True)
    clip.load_state_dict(torch.load(folder / "clip.pth"))
    return clip.eval()


@pytest.fixture(scope="module")
def dual(folder):
    return load_dual_encoder(folder / "model")


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder / "model", tmp_path / "copy"))


@pytest.mark.parametrize("sentences", [SENTENCES, SENTENCES[:1], load_templates()])
def test_class_embeddings_are_those_of_open_clip(theirs, dual, sentences):
    # where it puts names by str.format, braces of a name are kept as here
    tokenize = original.get_tokenizer("ViT-B-32")
    expected = build_zero_shot_classifier(theirs, tokenize, NAMES, sentences, num_classes_per_batch=3).T
    found = class_embeddings(dual.model, dual.tokenizer, NAMES, sentences, batch_size=5)
    assert found.shape == (7, 40) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert torch.pdist(expected).min() > 0.01  # or any order of the classes would pass


def test_logits_are_those_of_open_clip_for_the_same_pixels(theirs, dual):
    pixel_values = torch.randn(5, 3, 28, 28)
    tokenize = original.get_tokenizer("ViT-B-32")
    classifier = build_zero_shot_classifier(theirs, tokenize, NAMES, SENTENCES)
    with torch.no_grad():
        expected = theirs.logit_scale.exp() * theirs.encode_image(pixel_values, normalize=True) @ classifier
        image_embeds = dual.model.get_image_features(pixel_values).pooler_output
        scale = dual.model.logit_scale.exp()
    found = zero_shot_logits(image_embeds, class_embeddings(dual.model, dual.tokenizer, NAMES, SENTENCES), scale)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_images_go_the_way_they_go_in_open_clip(theirs, dual):
    transform = image_transform_v2(PreprocessCfg(size=28), is_train=False)
    with torch.no_grad():
        expected = theirs.encode_image(torch.stack([transform(Pictures().image(index)) for index in range(7)]))
    found = image_embeddings(dual.model, dual.image_processor, Pictures(), batch_size=3, progress=False)
    assert found.shape == (7, 40)
    similarities = nn.functional.normalize(found) @ nn.functional.normalize(expected).T
    # images are resized by another library, which rounds some pixels otherwise
    assert similarities.diagonal().min() > 0.999 and similarities.argmax(dim=1).tolist() == list(range(7))


def test_batches_change_nothing_and_progress_is_shown(dual, capsys):
    arguments = (dual.model, dual.image_processor, Pictures())
    one_by_one = image_embeddings(*arguments, batch_size=1)
    assert "Embedding pictures" in capsys.readouterr().err
    torch.testing.assert_close(image_embeddings(*arguments, batch_size=64, progress=False), one_by_one)
    assert capsys.readouterr().err == ""
    arguments = (dual.model, dual.tokenizer, NAMES, SENTENCES)
    torch.testing.assert_close(class_embeddings(*arguments, batch_size=1), class_embeddings(*arguments))


BOTH = """
import json
from dataclasses import dataclass

from accelerate import Accelerator
from sample_images import colour_image

from hf_vitreg.evaluation.zero_shot import image_embeddings, load_dual_encoder


{pictures}

dual, accelerator = load_dual_encoder({folder!r}), Accelerator(cpu=True)
found = [
    image_embeddings(dual.model, dual.image_processor, Pictures(count=count), 2, accelerator).tolist()
    for count in (7, 1)
]
print(json.dumps(found) + "\\n", end="", flush=True)
"""


@pytest.mark.slow  # test_evaluation_evaluate.py has two processes, too
def test_two_processes_count_every_image_once(folder, dual, tmp_path):
    """Seven images over two processes; of one image a process has none."""
    (tmp_path / "both.py").write_text(BOTH.format(pictures=inspect.getsource(Pictures), folder=str(folder / "model")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(tmp_path / "both.py")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert len(results) == 2 and results[0] == results[1]
    expected = image_embeddings(dual.model, dual.image_processor, Pictures(), progress=False)
    torch.testing.assert_close(torch.tensor(results[0][0]), expected)
    torch.testing.assert_close(torch.tensor(results[0][1]), expected[:1])
    assert done.stderr.count("Embedding pictures") <= 2  # a bar of each call, on the main process alone


def small_towers():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 49408, "max_position_embeddings": 19, "eos_token_id": 49407, "pad_token_id": 1}
    return {"text_config": text, "vision_config": {**sizes, "image_size": 28, "patch_size": 14}}


def save_beside_tokenizer(model, folder, destination):
    model.save_pretrained(destination)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(folder / "model" / name, destination)
    return load_dual_encoder(destination)


def test_clip_of_transformers(folder, tmp_path):
    dual = save_beside_tokenizer(CLIPModel(CLIPConfig(**small_towers(), projection_dim=24)), folder, tmp_path)
    classes = class_embeddings(dual.model, dual.tokenizer, NAMES, SENTENCES)
    with torch.no_grad():
        texts = dual.tokenizer(
            ["a photo of a cat.", "cat", "the cat, seen at night"], padding=True, return_tensors="pt"
        )
        expected = nn.functional.normalize(dual.model.get_text_features(**texts).pooler_output).mean(dim=0)
    torch.testing.assert_close(classes[0], expected / expected.norm())
    images = image_embeddings(dual.model, dual.image_processor, Pictures(), progress=False)
    assert zero_shot_logits(images, classes).shape == (7, 7)


def test_siglip_reads_texts_of_one_length_without_a_mask(folder, tmp_path):
    dual = save_beside_tokenizer(SiglipModel(SiglipConfig(**small_towers())), folder, tmp_path)
    classes = class_embeddings(dual.model, dual.tokenizer, ["cat"], ["a photo of a {}."])
    input_ids = dual.tokenizer("a photo of a cat.", padding="max_length", max_length=19, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = dual.model.get_text_features(input_ids=input_ids).pooler_output
    assert input_ids.shape == (1, 19)
    torch.testing.assert_close(classes, nn.functional.normalize(expected))
    assert image_embeddings(dual.model, dual.image_processor, Pictures(), progress=False).shape == (7, 32)


def test_half_precision_is_near(folder, dual):
    half = load_dual_encoder(folder / "model", dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    for ours, full in (
        [class_embeddings(each.model, each.tokenizer, NAMES, SENTENCES) for each in (half, dual)],
        [image_embeddings(each.model, each.image_processor, Pictures(), progress=False) for each in (half, dual)],
    ):
        assert ours.dtype == torch.float32 and nn.functional.cosine_similarity(ours, full).min() > 0.99


def test_templates_that_come_with_the_package():
    templates = load_templates()
    assert "a photo of a {}." in templates and len(set(templates)) == len(templates) > 1
    assert TEMPLATES.parent.name == "evaluation"


def test_templates_of_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("  ein Foto: {}\n\na {} über allem\n", encoding="utf-8")
    assert load_templates(tmp_path / "mine.txt") == ["ein Foto: {}", "a {} über allem"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a {}\n\na photo\n", r"mine\.txt, line 3: a prompt template has exactly one \{\}.*got 'a photo'"),
        (b"{} and {}", r"line 1: .*got '\{\} and \{\}'"),
        (b"a {c}", r"line 1: .*got 'a \{c\}'"),
        (b"a {} of {class}", "line 1"),
        (b"a {{}}", "line 1"),
        (b"\n \n", r"mine\.txt has no prompt template.*such as: a photo of a \{\}"),
        (b"\xff\xfe", r"mine\.txt cannot be read"),
        (None, r"mine\.txt cannot be read"),
    ],
)
def test_bad_templates_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_templates(tmp_path / "mine.txt")


def test_bad_classes(dual):
    def embed(names, templates):
        return class_embeddings(dual.model, dual.tokenizer, names, templates)

    with pytest.raises(ValueError, match="0 classes and 1 templates"):
        embed([], ["a {}"])
    with pytest.raises(ValueError, match="1 classes and 0 templates"):
        embed(["cat"], [])
    with pytest.raises(ValueError, match="Two classes are called 'cat'"):
        embed(["cat", "dog", "cat"], ["a {}"])
    with pytest.raises(ValueError, match=r"exactly one \{\}"):
        embed(["cat"], ["a photo"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json in it"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no vocabulary of a tokenizer beside it"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "no .*tokenizer beside it"),
        (lambda folder: add_token(folder), "49409 tokens and its"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "no image processor beside it"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (
            lambda folder: drop(folder, "text_projection.weight"),
            "1 of its weights are missing, text_projection.weight",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "header"),
    ],
)
def test_a_folder_that_is_not_whole(copy, change, message):
    change(copy)
    with pytest.raises(ValueError, match=f"Cannot load .*copy: .*{message}"):
        load_dual_encoder(copy)


def add_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["crane (bird)"])
    tokenizer.save_pretrained(folder)


def drop(folder, name):
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_models_without_a_text_tower_are_refused_with_those_that_are_meant(folder, tmp_path):
    meant = "which has no text tower. Zero-shot classification is for models of images and texts: OpenCLIP's .* CLIP"
    with pytest.raises(ValueError, match=f"Cannot load .*vision: it is a vitreg, {meant}"):
        load_dual_encoder(folder / "vision")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    with pytest.raises(ValueError, match=f"it is a dinov2, {meant}"):
        load_dual_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_clip_224"}))
    with pytest.raises(ValueError, match=r"its config.json is none of transformers'"):
        load_dual_encoder(tmp_path)
    ViTRegModel(ViTRegConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it is a vitreg, which has no text tower"):
        load_dual_encoder(tmp_path)
    with pytest.raises(ValueError, match="it is a file"):
        load_dual_encoder(tmp_path / "config.json")
    with pytest.raises(ValueError, match="there is no such folder"):
        load_dual_encoder(tmp_path / "nowhere")


class Unreadable(Pictures):
    def image(self, index):
        if index == 4:
            raise ValueError("picture 4 cannot be read as an image")
        return super().image(index)


def test_bad_images(dual):
    def embed(images, image_processor=dual.image_processor):
        return image_embeddings(dual.model, image_processor, images, progress=False)

    with pytest.raises(ValueError, match="picture 4 cannot be read"):
        embed(Unreadable())
    with pytest.raises(ValueError, match="pictures has no image to classify"):
        embed(Pictures(count=0))
    uncropped = type(dual.image_processor).from_dict(dual.image_processor.to_dict() | {"do_center_crop": False})
    with pytest.raises(ValueError, match=r"images of several sizes.*set do_center_crop"):
        embed(Pictures(), uncropped)


def test_embeddings_that_are_no_numbers_are_named(copy):
    dual = load_dual_encoder(copy)
    dual.model.visual_projection.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="embedding of 'picture 0' is not finite, nor are 6 others"):
        image_embeddings(dual.model, dual.image_processor, Pictures(), progress=False)
    dual.model.text_projection.weight.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"embedding of 'a cat' is not finite\. In float16"):
        class_embeddings(dual.model, dual.tokenizer, ["cat"], ["a {}"])


def test_logits_are_cosines():
    images, classes = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    expected = np.array([[0.6, 0.8, -0.6], [0.0, 1.0, 0.0]])
    np.testing.assert_allclose(zero_shot_logits(images, classes), expected, atol=1e-6)
    np.testing.assert_allclose(zero_shot_logits(images, classes, 10.0), expected * 10, atol=1e-5)
    with pytest.raises(ValueError, match=r"same projection_dim, got \(2, 2\) and \(2, 3\)"):
        zero_shot_logits(images, classes.T)
