# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json

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

from conversion import deit
from conversion.convert import app
from conversion.family import ConversionError
from conversion.parity import compare, vitreg_outputs
from conversion.published import known_checkpoints
from hf_vitreg import ViTRegForImageClassification, ViTRegModel


STATE, IMAGES, OUTPUTS = load("deit_distilled")


def without(*names, state=STATE):
    return {name: tensor for name, tensor in state.items() if not name.startswith(names)}


# the same without its distillation token, whose position is the second
PLAIN = without("dist_token", "head_dist") | {"pos_embed": STATE["pos_embed"][:, [0, *range(2, 27)]]}


def save(tmp_path, content):
    # a new name every time: the file of a model that is still there must not change
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
    torch.save(content, path)
    return path


def prepare(tmp_path, content, **options):
    return deit.prepare(str(save(tmp_path, content)), **options)


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(app, ["deit", *map(str, arguments)])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


@torch.inference_mode()
def test_tokens_and_logits_are_those_of_the_original(tmp_path):
    candidate = prepare(tmp_path, {"model": STATE})
    outputs = vitreg_outputs(candidate.model)(IMAGES["20x20"])
    reference = candidate.reference(IMAGES["20x20"])
    for name in ("tokens", "logits"):
        assert_close(outputs[name], OUTPUTS[f"{name}/20x20"])
        assert_close(reference[name], OUTPUTS[f"{name}/20x20"])


@torch.inference_mode()
def test_logits_are_the_mean_of_two_classifiers_on_two_tokens(tmp_path):
    model = prepare(tmp_path, {"model": STATE}).model
    tokens = OUTPUTS["tokens/20x20"]
    of_cls = nn.functional.linear(tokens[:, 0], STATE["head.weight"], STATE["head.bias"])
    of_distillation = nn.functional.linear(tokens[:, 1], STATE["head_dist.weight"], STATE["head_dist.bias"])
    assert_close(model.classifier(tokens[:, 0]), of_cls)
    assert_close(model.distillation_classifier(tokens[:, 1]), of_distillation)
    assert_close(model(IMAGES["20x20"]).logits, (of_cls + of_distillation) / 2)


def resized(positions, num_prefix_positions, rows, cols):
    """Position embeddings as main.py gives them to a model of another size before it fine-tunes."""
    prefix, patches = positions[:, :num_prefix_positions], positions[:, num_prefix_positions:]
    image = patches.reshape(1, 5, 5, 128).permute(0, 3, 1, 2)
    image = nn.functional.interpolate(image, size=(rows, cols), mode="bicubic", align_corners=False)
    return torch.cat([prefix, image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


@pytest.mark.parametrize("state, num_prefix_positions", [(STATE, 2), (PLAIN, 1)])
@torch.inference_mode()
def test_another_size_is_what_fine_tuning_at_it_starts_from(tmp_path, state, num_prefix_positions):
    here = prepare(tmp_path, {"model": state})
    there = prepare(
        tmp_path, {"model": state | {"pos_embed": resized(state["pos_embed"], num_prefix_positions, 8, 8)}}
    )
    assert there.model.config.image_size == 32
    pixel_values = torch.randn(2, 3, 32, 32)
    assert_close(here.model(pixel_values).logits, there.model(pixel_values).logits)


@pytest.mark.parametrize("state", [STATE, PLAIN])
def test_the_reference_is_compared_with_at_sizes_that_are_not_square(tmp_path, state):
    candidate = prepare(tmp_path, {"model": state})
    assert any(height != width for height, width in candidate.sizes)
    rows = compare(vitreg_outputs(candidate.model), candidate.reference, [(20, 20), (12, 36), (28, 8)])
    assert [row.output for row in rows] == ["tokens", "logits"] * 3
    assert all(row.passed for row in rows)


def test_the_config_is_what_the_shapes_and_the_family_say(tmp_path):
    distilled, plain = prepare(tmp_path, {"model": STATE}).model, prepare(tmp_path, {"model": PLAIN}).model
    for model, layout, positions in [
        (distilled, "cls_distillation", "prefix_patches"),
        (plain, "cls", "cls_patches"),
    ]:
        config = model.config
        assert type(model) is ViTRegForImageClassification
        assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 2, 2)
        assert (config.intermediate_size, config.num_register_tokens, config.layerscale_value) == (80, 0, None)
        assert (config.image_size, config.patch_size, config.num_labels) == (20, 4, 11)
        assert (config.interpolate_antialias, config.interpolate_offset) == (False, 0.0)
        assert (config.classifier_layout, config.position_embedding_type) == (layout, positions)
        assert config.use_distillation_token is (model is distilled)


def plain_checkpoint(hidden_size, num_layers, intermediate_size, image_size, num_labels=1000):
    tensors = original_checkpoint(hidden_size, num_layers, intermediate_size, side=image_size // 16, patch_size=16)
    tensors = {name: tensor for name, tensor in tensors.items() if ".ls" not in name and name != "mask_token"}
    head = {f"head.{name}": tensor for name, tensor in linear_head(num_labels, hidden_size).items()}
    return {"model": tensors | head}


@pytest.mark.parametrize("image_size, resize", [(224, 256), (384, 438)])
def test_a_thousand_classes_have_names_and_images_are_prepared_as_for_the_evaluation(tmp_path, image_size, resize):
    candidate = prepare(tmp_path, plain_checkpoint(64, 1, 24, image_size))
    labels = candidate.model.config.id2label
    assert (len(labels), labels[1]) == (1000, "goldfish, Carassius auratus")
    processor = candidate.image_processor
    assert processor.size["shortest_edge"] == resize
    assert processor.crop_size["height"] == processor.crop_size["width"] == image_size
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)


def test_without_a_head_it_is_a_backbone(tmp_path):
    candidate = prepare(tmp_path, {"model": without("head")})
    assert type(candidate.model) is ViTRegModel
    assert candidate.model.config.use_distillation_token
    assert_close(candidate.model(IMAGES["20x20"]).last_hidden_state.detach(), OUTPUTS["tokens/20x20"])
    assert candidate.reference(IMAGES["20x20"]).keys() == {"tokens"}


def test_a_backbone_that_could_be_one_of_dino_is_remarked_on(tmp_path):
    result = run(save(tmp_path, load("dino")[0]), tmp_path / "model")
    assert "nothing tells DeiT from DINO" in result.stdout
    assert [bool(prepare(tmp_path, {"model": state}).remarks) for state in (STATE, PLAIN, without("head"))] == [
        False
    ] * 3


def test_a_training_checkpoint_gives_the_model_that_is_evaluated(tmp_path):
    run(save(tmp_path, deit_training_checkpoint(STATE, "deit_tiny_distilled_patch16_224")), tmp_path / "model")
    assert_is_the_evaluated_deit(tmp_path / "model", IMAGES["20x20"], OUTPUTS)


@pytest.mark.parametrize(
    "tensors, expected",
    [
        (load("dinov2")[0], "the model does not have: .*blocks.0.ls1.gamma"),
        (load("dinov3")[0], "is no DeiT checkpoint, or only a part of one: it has no pos_embed"),
        (load("deit3")[0], r"is no DeiT checkpoint: .*one for CLS and those of a square grid \(there are 25\)"),
        (load("open_clip")[0], "is no DeiT checkpoint.*It has "),
        (
            {"backbone": load("dino")[0], "head.mlp.0.weight": torch.ones(3, 7)},
            "is no DeiT checkpoint: it has projection heads .*dino_head.mlp.0.weight",
        ),
        ({"student": PLAIN, "teacher": PLAIN}, "holds several backbones, under 'student.', 'teacher.'"),
        (without("dist_token"), r"one for CLS and those of a square grid \(there are 27\)"),
        (without("head_dist"), "tensors that are missing: head_dist.weight, head_dist.bias"),
        (without("head."), "tensors that the model does not have: head_dist"),
        (without("head.bias"), "1 tensors that are missing: head.bias"),
        (PLAIN | {"head_dist.bias": torch.ones(11)}, "the model does not have: head_dist.bias"),
        (STATE | {"head.weight": torch.ones(7, 64)}, r"head.weight gives \(7, 64\) to classifier.weight"),
        (STATE | {"head.weight": torch.ones(128)}, r"head.weight has shape \(128,\)"),
        (STATE | {"dist_token": torch.ones(1, 2, 128)}, r"dist_token gives \(1, 2, 128\)"),
        (without("norm."), "it has no norm.weight"),
        (without("blocks.0.mlp.fc2"), "not whole: blocks.0.mlp.fc2.weight is missing"),
        # the parallel blocks of models_v2.py
        (PLAIN | {"blocks.0.norm11.weight": torch.ones(128)}, "the model does not have: blocks.0.norm11.weight"),
    ],
)
def test_other_families_and_parts_of_checkpoints(tmp_path, tensors, expected):
    with pytest.raises(ConversionError, match=expected):
        prepare(tmp_path, tensors)


def test_arch_and_image_size_must_fit_the_shapes(tmp_path):
    with pytest.raises(ConversionError, match="is not tiny_patch16_224: hidden_size is 128, not 192"):
        prepare(tmp_path, STATE, arch="tiny_patch16_224")
    with pytest.raises(
        ConversionError, match=r"--arch deit_tiny_patch16 is not known. Did you mean tiny_patch16_224\?"
    ):
        prepare(tmp_path, STATE, arch="deit_tiny_patch16")
    with pytest.raises(ConversionError, match="--image-size 224 does not fit"):
        prepare(tmp_path, STATE, image_size=224)
    assert prepare(tmp_path, STATE, arch="custom", image_size=20).arch == "custom"


def test_the_distillation_token_and_the_size_tell_architectures_apart(tmp_path, monkeypatch):
    distilled = deit.Architecture(128, 2, 80, patch_size=4, image_size=20, use_distillation_token=True)
    for name, arch in [
        ("plain", deit.Architecture(128, 2, 80, patch_size=4, image_size=20)),
        ("large", deit.Architecture(128, 2, 80, patch_size=4, image_size=32, use_distillation_token=True)),
        ("distilled", distilled),
    ]:
        monkeypatch.setitem(deit.ARCHITECTURES, name, arch)
    assert (prepare(tmp_path, STATE).arch, prepare(tmp_path, PLAIN).arch) == ("distilled", "plain")
    with pytest.raises(ConversionError, match="is not plain: use_distillation_token is True, not False"):
        prepare(tmp_path, STATE, arch="plain")
    with pytest.raises(ConversionError, match="is not large: image_size is 20, not 32"):
        prepare(tmp_path, STATE, arch="large")


@pytest.mark.parametrize("name", deit.FAMILY.published)
def test_published_models_are_those_of_timm(name):
    known = {one.name: one for one in known_checkpoints(deit.FAMILY)}[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    config = deit.FAMILY.config(deit.ARCHITECTURES[known.arch])
    assert known.source == timm.get_pretrained_cfg(name).url
    assert known.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.num_attention_heads == model.blocks[0].attn.num_heads
    assert config.grid_size == model.patch_embed.grid_size
    assert (config.layer_norm_eps, config.hidden_act) == (model.norm.eps, "gelu")
    assert deit.FAMILY.published[name].base_model == f"facebook/{name.replace('_', '-')}"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("deit_tiny_patch16_384", r"neither a file nor a published name. Did you mean deit_tiny_patch16_224\?"),
        ("deit-base-distilled-patch16-384", r"Did you mean deit_base_distilled_patch16_384\?"),
        ("resnet50", r"There are deit_tiny_patch16_224, .*deit_base_distilled_patch16_384\."),
    ],
)
def test_near_misses_of_published_names(name, expected):
    with pytest.raises(ConversionError, match=expected):
        deit.prepare(name)


def test_published_names_come_from_a_mirror(tmp_path, monkeypatch):
    """The whole way, with a small model in the place of a published one."""
    small = deit.Architecture(128, 2, 80, patch_size=4, image_size=20, use_distillation_token=True)
    monkeypatch.setitem(deit.ARCHITECTURES, "base_distilled_patch16_384", small)
    (tmp_path / "mirror").mkdir()
    heads = {
        f"{name}.{param}": tensor for name in ("head", "head_dist") for param, tensor in linear_head(1000, 128).items()
    }
    torch.save({"model": STATE | heads}, tmp_path / "mirror" / "deit_base_distilled_patch16_384-d0272ac0.pth")
    addresses = ["--base-url", (tmp_path / "mirror").as_uri(), "--cache-dir", tmp_path / "cache"]
    run("deit_base_distilled_patch16_384", tmp_path / "model", *addresses)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label[1] == "goldfish, Carassius auratus"
    assert json.loads((tmp_path / "model" / "conversion.json").read_text())["arch"] == "base_distilled_patch16_384"
    card = ModelCard.load(tmp_path / "model" / "README.md").data
    assert (card.license, card.base_model) == ("apache-2.0", "facebook/deit-base-distilled-patch16-384")
    assert AutoImageProcessor.from_pretrained(tmp_path / "model").size["shortest_edge"] == int(20 / 0.875)


def test_a_published_file_of_another_size_is_refused(tmp_path):
    (tmp_path / "mirror").mkdir()
    torch.save({"model": STATE}, tmp_path / "mirror" / "deit_tiny_distilled_patch16_224-b40b3cf7.pth")
    with pytest.raises(ConversionError, match="is not tiny_distilled_patch16_224: hidden_size is 128, not 192"):
        deit.prepare(
            "deit_tiny_distilled_patch16_224", base_url=(tmp_path / "mirror").as_uri(), cache_dir=tmp_path / "cache"
        )


def test_bad_input_is_one_clear_message_and_nothing_is_written(tmp_path):
    assert_bad_files_are_refused(tmp_path, run, STATE, spoiled="head_dist.bias")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_small_patch16_224", "deit_small_distilled_patch16_224"])
def test_published_sizes_agree_and_stay_within_their_memory(tmp_path, name):
    checkpoint = plain_checkpoint(384, 12, 1536, 224)
    if "distilled" in name:
        positions = checkpoint["model"]["pos_embed"]
        checkpoint["model"]["pos_embed"] = torch.cat([positions[:, :1], torch.randn(1, 1, 384), positions[:, 1:]], 1)
        checkpoint["model"]["dist_token"] = torch.randn(1, 1, 384)
        head = linear_head(1000, 384)
        checkpoint["model"] |= {"head_dist.weight": -head["weight"], "head_dist.bias": head["bias"]}
    torch.save(checkpoint, tmp_path / "a.pth")
    arguments = ["deit", tmp_path / "a.pth", tmp_path / "model", "--arch", name]
    done = run_script("-c", MEASURED, SCRIPT, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size, peak = (tmp_path / "a.pth").stat().st_size, int(done.stdout.rsplit("peak: ")[1])
    assert peak < 1.3 * size + 1e9, f"{peak / 1e9:.2f} GB for a checkpoint of {size / 1e9:.2f} GB"
