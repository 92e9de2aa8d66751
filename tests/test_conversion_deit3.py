# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json
import re

import pytest
import timm
import torch
from conversion_cases import assert_bad_files_are_refused, assert_is_the_evaluated_deit, deit_training_checkpoint
from huggingface_hub import ModelCard
from original_outputs import assert_close, load
from test_conversion_checkpoints import linear_head, original_checkpoint
from test_convert import MEASURED, SCRIPT, run_script
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification
from typer.testing import CliRunner

from conversion import deit3
from conversion.convert import app
from conversion.family import ConversionError
from conversion.parity import compare, vitreg_outputs
from conversion.published import known_checkpoints
from hf_vitreg import ViTRegForImageClassification, ViTRegModel


STATE, IMAGES, OUTPUTS = load("deit3")


def save(tmp_path, content):
    # a new name every time: the file of a model that is still there must not change
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
    torch.save(content, path)
    return path


def prepare(tmp_path, content, **options):
    return deit3.prepare(str(save(tmp_path, content)), **options)


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(app, ["deit3", *map(str, arguments)])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


def without(*names):
    return {name: tensor for name, tensor in STATE.items() if not name.startswith(names)}


@torch.inference_mode()
def test_tokens_and_logits_are_those_of_the_original(tmp_path):
    candidate = prepare(tmp_path, {"model": STATE})
    outputs = vitreg_outputs(candidate.model)(IMAGES["20x20"])
    reference = candidate.reference(IMAGES["20x20"])
    for name in ("tokens", "logits"):
        assert_close(outputs[name], OUTPUTS[f"{name}/20x20"])
        assert_close(reference[name], OUTPUTS[f"{name}/20x20"])


@torch.inference_mode()
def test_another_size_is_what_fine_tuning_at_it_starts_from(tmp_path):
    """main.py gives interpolated position embeddings to a model of another size before it fine-tunes."""
    image = STATE["pos_embed"].reshape(1, 5, 5, 128).permute(0, 3, 1, 2)
    image = nn.functional.interpolate(image, size=(8, 8), mode="bicubic", align_corners=False)
    positions = image.permute(0, 2, 3, 1).flatten(1, 2)
    here, there = prepare(tmp_path, {"model": STATE}), prepare(tmp_path, {"model": STATE | {"pos_embed": positions}})
    assert there.model.config.image_size == 32
    pixel_values = torch.randn(2, 3, 32, 32)
    assert_close(here.model(pixel_values).logits, there.model(pixel_values).logits)


def test_the_reference_is_compared_with_at_sizes_that_are_not_square(tmp_path):
    candidate = prepare(tmp_path, {"model": STATE})
    assert any(height != width for height, width in candidate.sizes)
    rows = compare(vitreg_outputs(candidate.model), candidate.reference, [(20, 20), (12, 36), (28, 8)])
    assert [row.output for row in rows] == ["tokens", "logits"] * 3
    assert all(row.passed for row in rows)


def test_the_config_is_what_the_shapes_and_the_family_say(tmp_path):
    model = prepare(tmp_path, {"model": STATE}).model
    config = model.config
    assert type(model) is ViTRegForImageClassification
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 2, 2)
    assert (config.intermediate_size, config.num_register_tokens) == (80, 0)
    assert (config.image_size, config.patch_size, config.num_labels) == (20, 4, 13)
    assert (config.interpolate_antialias, config.interpolate_offset) == (False, 0.0)
    assert (config.classifier_layout, config.position_embedding_type) == ("cls", "patches")
    assert torch.equal(model.vitreg.encoder.layer[1].residual2.lambda1, STATE["blocks.1.gamma_2"])


def checkpoint(hidden_size, num_layers, intermediate_size, image_size, patch_size=16, num_labels=1000):
    tensors = original_checkpoint(
        hidden_size, num_layers, intermediate_size, side=image_size // patch_size, patch_size=patch_size
    )
    del tensors["mask_token"]
    tensors = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): tensor for name, tensor in tensors.items()}
    head = {f"head.{name}": tensor for name, tensor in linear_head(num_labels, hidden_size).items()}
    return {"model": tensors | {"pos_embed": tensors["pos_embed"][:, 1:].clone()} | head}


@pytest.mark.parametrize("image_size", [224, 384])
def test_a_thousand_classes_have_names_and_images_are_prepared_as_for_the_evaluation(tmp_path, image_size):
    candidate = prepare(tmp_path, checkpoint(64, 1, 24, image_size))
    labels = candidate.model.config.id2label
    assert (len(labels), labels[1]) == (1000, "goldfish, Carassius auratus")
    processor = candidate.image_processor
    assert processor.size["shortest_edge"] == image_size
    assert processor.crop_size["height"] == processor.crop_size["width"] == image_size
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)


def test_heads_are_wider_in_the_huge_model(tmp_path):
    candidate = prepare(tmp_path, checkpoint(1280, 1, 8, 28, patch_size=14, num_labels=5), arch="custom")
    assert candidate.model.config.num_attention_heads == 16
    [row, *_] = compare(vitreg_outputs(candidate.model), candidate.reference, [(28, 42)])
    assert row.passed


def test_classes_that_are_not_those_of_imagenet_have_no_names(tmp_path):
    labels = prepare(tmp_path, checkpoint(64, 1, 24, 32, num_labels=21841)).model.config.id2label
    assert (len(labels), labels[1]) == (21841, "LABEL_1")


def test_without_a_head_it_is_a_backbone(tmp_path):
    candidate = prepare(tmp_path, {"model": without("head")})
    assert type(candidate.model) is ViTRegModel
    assert_close(candidate.model(IMAGES["20x20"]).last_hidden_state.detach(), OUTPUTS["tokens/20x20"])
    assert candidate.reference(IMAGES["20x20"]).keys() == {"tokens"}


def test_a_training_checkpoint_gives_the_model_that_is_evaluated(tmp_path):
    run(save(tmp_path, deit_training_checkpoint(STATE, "deit_small_patch16_LS")), tmp_path / "model")
    assert_is_the_evaluated_deit(tmp_path / "model", IMAGES["20x20"], OUTPUTS)


@pytest.mark.parametrize(
    "tensors, expected",
    [
        (load("dino")[0], "is no DeiT-III checkpoint, or only a part of one: it has no blocks.0.gamma_1"),
        (load("dinov2")[0], "it has no blocks.0.gamma_1"),
        (load("dinov3")[0], "it has no blocks.0.gamma_1, pos_embed"),
        (load("deit_distilled")[0], "it has no blocks.0.gamma_1"),
        (load("open_clip")[0], "is no DeiT-III checkpoint.*It has "),
        (STATE | {"pos_embed": torch.ones(1, 26, 128)}, r"those of a square grid \(there are 26\)"),
        (STATE | {"dist_token": torch.ones(1, 1, 128)}, "the model does not have: dist_token"),
        (without("head.bias"), "1 tensors that are missing: head.bias"),
        (STATE | {"head.weight": torch.ones(7, 64)}, r"head.weight gives \(7, 64\) to classifier.weight"),
        (without("blocks.1.gamma_2"), "1 tensors that are missing: blocks.1.gamma_2"),
        (without("norm."), "it has no norm.weight"),
        # the parallel blocks of models_v2.py
        (STATE | {"blocks.0.gamma_1_1": torch.ones(128)}, "the model does not have: blocks.0.gamma_1_1"),
    ],
)
def test_other_families_and_parts_of_checkpoints(tmp_path, tensors, expected):
    with pytest.raises(ConversionError, match=expected):
        prepare(tmp_path, tensors)


def test_arch_and_image_size_must_fit_the_shapes(tmp_path):
    with pytest.raises(ConversionError, match="is not huge_patch14_224: hidden_size is 128, not 1280"):
        prepare(tmp_path, STATE, arch="huge_patch14_224")
    with pytest.raises(
        ConversionError, match=r"--arch huge_patch16_224 is not known. Did you mean huge_patch14_224\?"
    ):
        prepare(tmp_path, STATE, arch="huge_patch16_224")
    with pytest.raises(ConversionError, match="--image-size 224 does not fit"):
        prepare(tmp_path, STATE, image_size=224)
    assert prepare(tmp_path, STATE, arch="custom", image_size=20).arch == "custom"


@pytest.mark.parametrize("name", deit3.FAMILY.published)
def test_published_models_are_those_of_timm(name):
    known = {one.name: one for one in known_checkpoints(deit3.FAMILY)}[name]
    organization, _, timm_name = deit3.FAMILY.published[name].base_model.partition("/")
    with torch.device("meta"):
        model = timm.create_model(timm_name)
    config = deit3.FAMILY.config(deit3.ARCHITECTURES[known.arch])
    assert organization == "timm" and known.source == timm.get_pretrained_cfg(timm_name).url
    assert known.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.num_attention_heads == model.blocks[0].attn.num_heads
    assert config.grid_size == model.patch_embed.grid_size
    assert (config.layer_norm_eps, config.hidden_act) == (model.norm.eps, "gelu")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("deit_3_tiny_224_1k", r"neither a file nor a published name. Did you mean deit_3_\w+_224_1k\?"),
        ("deit3_small_448_21k", r"Did you mean deit_3_small_\w+_21k\?"),
        ("resnet50", r"There are deit_3_small_224_1k, .*deit_3_huge_224_21k\."),
    ],
)
def test_near_misses_of_published_names(name, expected):
    with pytest.raises(ConversionError, match=expected):
        deit3.prepare(name)


@pytest.mark.parametrize("name", ["deit_3_huge_224_21k", "deit3_huge_224_21k"])
def test_published_names_come_from_a_mirror(tmp_path, monkeypatch, name):
    """The whole way, with a small model in the place of a published one."""
    small = deit3.Architecture(128, 2, 80, patch_size=4, image_size=20)
    monkeypatch.setitem(deit3.ARCHITECTURES, "huge_patch14_224", small)
    (tmp_path / "mirror").mkdir()
    head = {f"head.{param}": tensor for param, tensor in linear_head(1000, 128).items()}
    torch.save({"model": STATE | head}, tmp_path / "mirror" / "deit_3_huge_224_21k_v1.pth")
    addresses = ["--base-url", (tmp_path / "mirror").as_uri(), "--cache-dir", tmp_path / "cache"]
    run(name, tmp_path / "model", *addresses)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label[1] == "goldfish, Carassius auratus"
    assert json.loads((tmp_path / "model" / "conversion.json").read_text())["arch"] == "huge_patch14_224"
    card = ModelCard.load(tmp_path / "model" / "README.md").data
    assert (card.license, card.base_model) == ("apache-2.0", "timm/deit3_huge_patch14_224.fb_in22k_ft_in1k")
    assert AutoImageProcessor.from_pretrained(tmp_path / "model").size["shortest_edge"] == 20


def test_a_published_file_of_another_size_is_refused(tmp_path):
    (tmp_path / "mirror").mkdir()
    torch.save({"model": STATE}, tmp_path / "mirror" / "deit_3_small_384_1k.pth")
    with pytest.raises(ConversionError, match="is not small_patch16_384: hidden_size is 128, not 384"):
        deit3.prepare("deit_3_small_384_1k", base_url=(tmp_path / "mirror").as_uri(), cache_dir=tmp_path / "cache")


def test_bad_input_is_one_clear_message_and_nothing_is_written(tmp_path):
    assert_bad_files_are_refused(tmp_path, run, STATE, spoiled="blocks.0.gamma_1")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["small_patch16_224", "small_patch16_384"])
def test_published_sizes_agree_and_stay_within_their_memory(tmp_path, arch):
    torch.save(checkpoint(384, 12, 1536, int(arch[-3:])), tmp_path / "a.pth")
    arguments = ["deit3", tmp_path / "a.pth", tmp_path / "model", "--arch", arch]
    done = run_script("-c", MEASURED, SCRIPT, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size, peak = (tmp_path / "a.pth").stat().st_size, int(done.stdout.rsplit("peak: ")[1])
    assert peak < 1.3 * size + 1e9, f"{peak / 1e9:.2f} GB for a checkpoint of {size / 1e9:.2f} GB"
