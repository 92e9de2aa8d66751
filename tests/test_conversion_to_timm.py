# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from reference import randomize, tiny_config
from safetensors.torch import load_file
from test_conversion_timm import KINDS, run, tiny_model, write_folder
from timm.data import create_transform, resolve_data_config
from transformers import AutoModel, BitImageProcessor, ViTConfig

from conversion import parity, renaming, timm_layout, timm_models, to_timm, vitreg_folder
from conversion.family import ConversionError
from conversion.vit_layout import image_processor
from hf_vitreg import ViTRegBackbone, ViTRegForImageClassification, ViTRegModel
from hf_vitreg.hub.card import CardFacts
from hf_vitreg.hub.export import write_model_repository


ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted({architecture for architecture, _ in KINDS.values()})


@pytest.fixture(autouse=True)
def few_names(monkeypatch, request):
    """The nearest of all the names of timm is looked for in the slow test: building them takes seconds."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(to_timm, "architectures", lambda: NAMES)


def from_timm(folder, kind, **changes):
    """A ViTReg folder that was converted from timm, and the model that it was converted from."""
    original = write_folder(folder / "timm", kind, **changes)
    prepared = timm_models.prepare(str(folder / "timm"))
    write_model_repository(folder / "model", prepared.model, prepared.image_processor, CardFacts(name="a"))
    return original, folder / "model"


def vitreg(folder, model_class=ViTRegModel, processor=None, **overrides):
    """A random ViTReg folder."""
    model = randomize(model_class(tiny_config(**{"num_hidden_layers": 2, "num_register_tokens": 0, **overrides})))
    height, width = (side * model.config.patch_size for side in model.config.grid_size)
    own = BitImageProcessor(size={"height": height, "width": width}, crop_size={"height": height, "width": width})
    card = CardFacts(name="a", license="cc-by-4.0")
    write_model_repository(folder, model, processor or own, card)
    return model


def rows_of(export):
    return parity.compare(export.implementation, export.reference, export.sizes, export.num_channels)


def export(model, output):
    """Everything that the command does. Returns the tensors that were written, and the record."""
    prepared = to_timm.prepare(str(model), output)
    rows = rows_of(prepared)
    parity.check(rows, prepared.reference_name)
    record = to_timm.write(prepared, rows, output)
    if output.suffix == ".pth":
        return torch.load(output), record
    return load_file(output if output.suffix else output / "model.safetensors"), record


def same(tensors, others):
    return tensors.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]) for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_from_timm_and_back_is_the_same_to_the_last_bit(tmp_path, kind):
    original, model = from_timm(tmp_path, kind)
    tensors, record = export(model, tmp_path / "back")
    assert same(tensors, original.state_dict())
    # of images that are no squares timm resizes and crops in a way of its own
    assert len(record["remarks"]) == (kind == "vit_not_square")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    assert type(loaded) is type(original) and same(loaded.state_dict(), original.state_dict())
    pixel_values = torch.randn(2, original.in_chans, *original.patch_embed.img_size)
    with torch.no_grad():
        assert torch.equal(loaded.forward_features(pixel_values), original.forward_features(pixel_values))
        if kind != "not_pooled":
            assert torch.equal(loaded(pixel_values), original(pixel_values))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kind", ["sbb", "dinov2_giant", "clip_quickgelu", "deit_distilled", "vit_not_square"])
def test_the_line_that_is_printed_loads_a_weight_file(tmp_path, kind, suffix):
    original, model = from_timm(tmp_path, kind)
    output = tmp_path / f"weights{suffix}"
    tensors, record = export(model, output)
    assert same(tensors, original.state_dict())
    assert record["load"].startswith("timm.create_model(")
    loaded = eval(record["load"], {"timm": timm, "functools": functools}).eval()
    assert same(loaded.state_dict(), original.state_dict())
    pixel_values = torch.randn(2, 3, *original.patch_embed.img_size)
    assert torch.equal(loaded(pixel_values), original(pixel_values))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_a_published_size_is_called_by_its_name(name):
    config, num_classes, _ = timm_layout.plain_architecture(name)
    assert to_timm._nearest_architecture(config, num_classes) == (name, {}, {})


@pytest.mark.slow
def test_every_model_of_a_published_size_needs_no_arguments():
    """Several names may stand for one model."""
    plain = [timm_layout.plain_architecture(name) for name in timm_layout.architectures()]
    for config, num_classes, _ in filter(None, plain):
        assert to_timm._nearest_architecture(config, num_classes)[1:] == ({}, {})


def test_a_clip_tower_keeps_its_projection(tmp_path):
    tensors = tiny_model("clip").state_dict() | {"head.bias": torch.zeros(11)}
    write_folder(tmp_path / "timm", "clip", tensors)
    run("timm", tmp_path / "timm", tmp_path / "model")
    assert AutoModel.from_pretrained(tmp_path / "model").config.projection_dim == 11
    back, record = export(tmp_path / "model", tmp_path / "back")
    assert same(back, tensors)
    assert record["remarks"] == ["The projection is the head, with a bias of zeros."]
    assert {row["output"] for row in record["comparisons"]} == {"tokens", "image_embeds"}


# What ViTReg has and timm has too, beside what comes from timm.
OURS = {
    "dino": {"layerscale_value": None, "interpolate_antialias": False, "interpolate_offset": 0.1},
    "registers_with_positions": {"num_register_tokens": 3, "position_embedding_type": "prefix_patches"},
    "registers_without": {"num_register_tokens": 3, "position_embedding_type": "patches"},
    "mean": {"use_cls_token": False, "position_embedding_type": "patches", "pooler_type": "mean"}
    | {"classifier_layout": "pooled", "final_norm": "pooled", "num_register_tokens": 3},
    "map": {"pooler_type": "map", "classifier_layout": "pooled"},
    "projection": {"projection_dim": 13, "use_pre_layernorm": True, "patch_bias": False},
    "swiglu": {"use_swiglu_ffn": True, "qkv_bias": False},
    "distilled": {"use_distillation_token": True, "position_embedding_type": "prefix_patches"},
    "no_norm": {"final_norm": "none", "layerscale_value": 0.0},
    "open_clip": {"use_pre_layernorm": True, "patch_bias": False, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
}


@pytest.mark.parametrize("kind", OURS)
def test_to_timm_and_back_is_the_same_to_the_last_bit(tmp_path, kind):
    model = vitreg(tmp_path / "model", **OURS[kind])
    export(tmp_path / "model", tmp_path / "timm")
    back = timm_models.prepare(str(tmp_path / "timm"))
    assert same(back.model.state_dict(), model.state_dict())
    assert all(row.passed for row in parity.compare(back.implementation, back.reference, back.sizes))


def test_classifiers_come_back_too(tmp_path):
    for layout, final_norm in [("cls", "tokens"), ("pooled", "tokens"), ("pooled", "pooled"), ("cls", "none")]:
        folder = tmp_path / f"{layout}_{final_norm}"
        overrides = {"classifier_layout": layout, "final_norm": final_norm, "pooler_type": "cls"}
        model = vitreg(folder, ViTRegForImageClassification, **overrides)
        export(folder, folder / "timm")
        assert same(timm_models.prepare(str(folder / "timm")).model.state_dict(), model.state_dict())


def test_a_classifier_on_cls_beside_another_pooler_is_one_on_cls(tmp_path):
    vitreg(tmp_path / "model", ViTRegForImageClassification, classifier_layout="cls", pooler_type="mean")
    record = export(tmp_path / "model", tmp_path / "timm")[1]
    assert {row["output"] for row in record["comparisons"]} == {"tokens", "logits"}
    assert json.loads((tmp_path / "timm" / "config.json").read_text())["global_pool"] == "token"


def test_a_backbone_is_a_model(tmp_path):
    backbone = randomize(ViTRegBackbone(tiny_config(num_hidden_layers=2, num_register_tokens=0)))
    backbone.save_pretrained(tmp_path / "model")
    tensors, record = export(tmp_path / "model", tmp_path / "timm")
    assert torch.equal(tensors["norm.weight"], backbone.layernorm.weight)
    assert record["remarks"] == ["There is no preprocessor_config.json: timm's own statistics and crop are used."]


def test_the_mask_token_and_the_position_of_cls_are_lost_and_named(tmp_path):
    """DINOv2 with registers: timm has a position for every token before the patches, or for none."""
    model = vitreg(tmp_path / "model", num_register_tokens=3, use_mask_token=True)
    tensors, record = export(tmp_path / "model", tmp_path / "timm")
    assert [remark.split(" ")[:3] for remark in record["remarks"]] == [
        ["The", "mask", "token"],
        ["The", "position", "of"],
    ]
    positions = model.embeddings.position_embeddings
    assert torch.equal(tensors["cls_token"], model.embeddings.cls_token + positions[:, :1])
    assert torch.equal(tensors["pos_embed"], positions[:, 1:])
    assert "mask_token" not in tensors
    loaded = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    pixel_values = torch.randn(2, 3, 21, 49)
    expected = model(pixel_values).last_hidden_state
    torch.testing.assert_close(loaded.forward_features(pixel_values), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_where_a_sum_does_not_round(tmp_path, dtype):
    model = randomize(ViTRegModel(tiny_config(num_hidden_layers=2))).to(dtype)
    model.save_pretrained(tmp_path / "model")
    tensors = export(tmp_path / "model", tmp_path / "timm")[0]
    others = {name: tensor for name, tensor in tensors.items() if name != "cls_token"}
    assert {tensor.dtype for tensor in others.values()} == {dtype}
    positions = model.embeddings.position_embeddings[:, :1].float()
    assert tensors["cls_token"].dtype == torch.float32
    assert torch.equal(tensors["cls_token"], model.embeddings.cls_token.float() + positions)


def test_keys_without_a_bias_get_one_of_zeros(tmp_path):
    model = vitreg(tmp_path / "model", key_bias=False)
    tensors, record = export(tmp_path / "model", tmp_path / "timm")
    attention = model.encoder.layer[1].attention
    expected = torch.cat([attention.q_proj.bias, torch.zeros(48), attention.v_proj.bias])
    assert torch.equal(tensors["blocks.1.attn.qkv.bias"], expected)
    assert record["remarks"] == [
        "The keys have a bias of zeros: timm has queries, keys and values with a bias, or without."
    ]


def test_another_interpolation_is_named_and_compared_at_the_native_size(tmp_path):
    for overrides in ({"interpolate_antialias": False}, {"interpolate_offset": 0.1}):
        folder = tmp_path / next(iter(overrides))
        model = vitreg(folder, **overrides)
        record = export(folder, folder / "timm")[1]
        assert "at 21x49 pixels the outputs are the same, at other sizes they differ" in record["remarks"][0]
        assert {(row["height"], row["width"]) for row in record["comparisons"]} == {(21, 49)}
        loaded = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True, dynamic_img_size=True).eval()
        pixel_values = torch.randn(1, 3, 35, 35)
        assert not torch.allclose(loaded.forward_features(pixel_values), model(pixel_values)[0], atol=1e-3)


ROPE = {"position_embedding_type": "rope", "num_attention_heads": 3}
REFUSED = {
    "rotary position embeddings": (ViTRegModel, ROPE),
    "a norm of their own for CLS and registers": (ViTRegModel, {"final_norm": "untied"}),
    'a classifier with classifier_layout="cls_mean".*To write the backbone alone': (ViTRegForImageClassification, {}),
    'classifier_layout="last4_cls"': (
        ViTRegForImageClassification,
        {"classifier_layout": "last4_cls", "num_hidden_layers": 4},
    ),
    "registers together with a distillation token": (
        ViTRegModel,
        {"use_distillation_token": True, "num_register_tokens": 3, "position_embedding_type": "prefix_patches"},
    ),
    "test-time registers .num_test_time_registers=1": (
        ViTRegModel,
        {"num_register_tokens": 3, "num_test_time_registers": 1, "register_neurons": {1: [3]}},
    ),
    "a distillation token without a position": (
        ViTRegModel,
        {"use_distillation_token": True, "position_embedding_type": "patches"},
    ),
    'classifier_layout="cls" .there are cls_distillation': (
        ViTRegForImageClassification,
        {"use_distillation_token": True, "position_embedding_type": "prefix_patches", "classifier_layout": "cls"},
    ),
    "proj_bias=False with mlp_bias=True": (ViTRegModel, {"proj_bias": False}),
    "patch_bias=True with use_pre_layernorm=True": (ViTRegModel, {"use_pre_layernorm": True}),
    "patch_bias=False with use_pre_layernorm=False": (ViTRegModel, {"patch_bias": False}),
    'hidden_act="relu"': (ViTRegModel, {"hidden_act": "relu"}),
    'pooler_type="map" with a SwiGLU MLP': (
        ViTRegModel,
        {"pooler_type": "map", "classifier_layout": "pooled", "use_swiglu_ffn": True},
    ),
}


@pytest.mark.parametrize("expected", REFUSED)
def test_what_timm_would_compute_in_another_way_is_refused(tmp_path, expected):
    model_class, overrides = REFUSED[expected]
    vitreg(tmp_path / "model", model_class, **overrides)
    with pytest.raises(ConversionError, match=f"timm's VisionTransformer cannot compute .*{expected}"):
        to_timm.prepare(str(tmp_path / "model"), tmp_path / "timm")


def test_all_reasons_come_together(tmp_path):
    vitreg(tmp_path / "model", final_norm="untied", proj_bias=False, hidden_act="relu")
    with pytest.raises(ConversionError, match=r"untied.*; proj_bias=False.*; hidden_act"):
        to_timm.prepare(str(tmp_path / "model"), tmp_path / "timm")


def test_what_only_python_can_say_goes_into_the_line_and_into_no_folder(tmp_path):
    """The names of timm's models have an epsilon of 1e-5 or 1e-6, and JSON cannot say another."""
    model = vitreg(tmp_path / "model", layer_norm_eps=1e-3, use_swiglu_ffn=True)
    with pytest.raises(ConversionError, match=r"cannot hold norm_layer.*Write a weight file, e.g. .*timm.safetensors"):
        to_timm.prepare(str(tmp_path / "model"), tmp_path / "timm")
    record = export(tmp_path / "model", tmp_path / "a.pth")[1]
    assert "norm_layer=functools.partial(timm.layers.LayerNorm, eps=0.001)" in record["load"]
    loaded = eval(record["load"], {"timm": timm, "functools": functools}).eval()
    pixel_values = torch.randn(2, 3, 21, 49)
    expected = model(pixel_values).last_hidden_state
    torch.testing.assert_close(loaded.forward_features(pixel_values), expected, rtol=1e-4, atol=1e-4)


def test_preprocessing_is_that_of_the_image_processor(tmp_path):
    """An input size beside that of the position embeddings makes a model that takes any."""
    processor = image_processor(resize=256, crop=224, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    vitreg(tmp_path / "model", processor=processor)
    export(tmp_path / "model", tmp_path / "timm")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    resize, crop, _, normalize = create_transform(**resolve_data_config({}, model=loaded)).transforms
    assert (resize.size, tuple(crop.size), resize.interpolation.value) == (256, (224, 224), "bicubic")
    assert torch.allclose(normalize.mean, torch.tensor([0.1, 0.2, 0.3]))
    assert torch.allclose(normalize.std, torch.tensor([0.4, 0.5, 0.6]))
    assert loaded.patch_embed.grid_size == (3, 7) and loaded(torch.randn(1, 3, 224, 224)).shape == (1, 48)
    back = timm_models.prepare(str(tmp_path / "timm"))
    assert back.image_processor.size["shortest_edge"] == 256 and back.image_processor.crop_size["height"] == 224


def test_an_image_processor_that_timm_cannot_have_is_named(tmp_path):
    wide = BitImageProcessor(size={"height": 21, "width": 90}, crop_size={"height": 21, "width": 49})
    no_size = BitImageProcessor(size={"shortest_edge": 21}, resample=Image.Resampling.BOX, do_center_crop=False)
    for index, processor in enumerate([wide, no_size]):
        vitreg(tmp_path / f"{index}", processor=processor)
        remarks = export(tmp_path / f"{index}", tmp_path / f"timm{index}")[1]["remarks"]
        assert remarks == [
            "timm cannot resize images as the image processor does: look at timm.data.create_transform."
        ]


def test_labels_and_licence_go_along(tmp_path):
    labels = {index: f"class {index}" for index in range(11)}
    config = {"id2label": labels, "label2id": {label: index for index, label in labels.items()}}
    vitreg(tmp_path / "model", ViTRegForImageClassification, classifier_layout="cls", **config)
    export(tmp_path / "model", tmp_path / "timm")
    content = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert content["label_names"] == list(labels.values()) and content["pretrained_cfg"]["license"] == "cc-by-4.0"
    back = timm_models.prepare(str(tmp_path / "timm"))
    assert back.model.config.id2label == labels and str(back.license) == "cc-by-4.0"


def test_folders_that_are_no_vitreg_model(tmp_path):
    vitreg(tmp_path / "model")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    ViTConfig().save_pretrained(tmp_path / "vit")
    cases = {
        "file is a file. Give the folder": tmp_path / "file",
        r"has no config\.json, so it is no model": tmp_path / "empty",
        "a model of type 'vit', not 'vitreg'. Convert it to ViTReg first": tmp_path / "vit",
        "does not exist. Give the folder of a ViTReg model": tmp_path / "not" / "there",
        "org/model is no folder, and cannot be had from the Hub": "org/model",
    }
    for expected, folder in cases.items():
        with pytest.raises(ConversionError, match=expected):
            vitreg_folder.open_model(str(folder))


def test_folders_whose_weights_are_not_whole(tmp_path):
    model = vitreg(tmp_path / "model")
    weights, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"num_hidden_layers": 3}))
    with pytest.raises(ConversionError, match=r"18 tensors are missing: encoder\.layer\.2\.norm1\.weight"):
        vitreg_folder.open_model(str(tmp_path / "model"))
    config.write_text(json.dumps(content | {"image_size": 35, "final_norm": "none"}))
    with pytest.raises(ConversionError, match=r"(?s)2 tensors are unknown: layernorm.*1 tensors are of another shape"):
        vitreg_folder.open_model(str(tmp_path / "model"))
    config.write_text(json.dumps(content | {"patch_size": 0}))
    with pytest.raises(ConversionError, match=r"config\.json: .*patch_size must be 1 or more"):
        vitreg_folder.open_model(str(tmp_path / "model"))
    config.write_text(json.dumps(content | {"architectures": ["ViTRegForTexts"]}))
    with pytest.raises(ConversionError, match=r"is a ViTRegForTexts\. There are ViTRegModel"):
        vitreg_folder.open_model(str(tmp_path / "model"))
    config.write_text("[")
    with pytest.raises(ConversionError, match="is no valid JSON"):
        vitreg_folder.open_model(str(tmp_path / "model"))
    config.write_text(json.dumps(content))
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ConversionError, match="is cut short or damaged"):
        vitreg_folder.open_model(str(tmp_path / "model"))
    weights.unlink()
    with pytest.raises(ConversionError, match=r"has no weights: there is neither model\.safetensors nor"):
        vitreg_folder.open_model(str(tmp_path / "model"))
    model.save_pretrained(tmp_path / "model", max_shard_size="50KB")
    assert same(dict(vitreg_folder.open_model(str(tmp_path / "model")).tensors), model.state_dict())
    next((tmp_path / "model").glob("model-00002*")).unlink()
    with pytest.raises(ConversionError, match="lacks model-00002"):
        vitreg_folder.open_model(str(tmp_path / "model"))


def test_the_command_says_what_was_lost_and_how_to_load(tmp_path):
    vitreg(tmp_path / "model", num_register_tokens=3, use_mask_token=True)
    result = run("to-timm", tmp_path / "model", tmp_path / "out" / "timm")
    assert "Against timm" in result.output and "The mask token is left out" in result.output
    assert f'timm.create_model("local-dir:{tmp_path}/out/timm", pretrained=True)' in result.output
    assert sorted(path.name for path in (tmp_path / "out" / "timm").iterdir()) == [
        "config.json",
        "conversion.json",
        "model.safetensors",
    ]
    assert len({path.stat().st_mode for path in (tmp_path / "out" / "timm").iterdir()}) == 1
    record = json.loads((tmp_path / "out" / "timm" / "conversion.json").read_text())
    assert record["source"] == str(tmp_path / "model") and all(row["relative"] < 1e-5 for row in record["comparisons"])
    result = run("to-timm", tmp_path / "model", tmp_path / "a.safetensors")
    assert re.search(r"timm\.create_model\('\w+', checkpoint_path='.*a\.safetensors', ", result.output)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_nothing_is_replaced_unless_asked_and_no_model_replaces_itself(tmp_path):
    vitreg(tmp_path / "model")
    (tmp_path / "a.pth").write_text("old")
    cases = {
        "a.pth exists. Give another name, or replace it with --overwrite": [tmp_path / "a.pth"],
        "is a part of what is converted": [tmp_path / "model" / "model.safetensors", "--overwrite"],
        "which replacing it would delete": [tmp_path / "model", "--overwrite"],
        "model is not empty": [tmp_path / "model"],
    }
    for expected, arguments in cases.items():
        result = run("to-timm", tmp_path / "model", *arguments, exit_code=1)
        assert result.stderr.startswith("Error: ") and expected in result.stderr, result.stderr
    (tmp_path / "folder.pth").mkdir()
    assert "is a folder" in run("to-timm", tmp_path / "model", tmp_path / "folder.pth", exit_code=1).stderr
    run("to-timm", tmp_path / "model", tmp_path / "a.pth", "--overwrite")
    assert torch.load(tmp_path / "a.pth").keys() >= {"cls_token"}


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch):
    vitreg(tmp_path / "model")

    def full(tensors, file):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_timm.torch, "save", full)
    assert "No space left" in run("to-timm", tmp_path / "model", tmp_path / "a.pth", exit_code=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_written_is_compared_with_the_file_that_was_given(tmp_path, monkeypatch):
    """Gate and up that change places on the way would be the same model twice: ours and timm's of what is written."""
    vitreg(tmp_path / "model", use_swiglu_ffn=True)
    join = renaming._joined
    monkeypatch.setattr(renaming, "_joined", lambda tensors, parts: join(tensors, parts[::-1]))
    result = run("to-timm", tmp_path / "model", tmp_path / "timm", exit_code=1)
    assert "What was written is not what was given" in result.stderr and "gate_proj" in result.stderr
    assert not (tmp_path / "timm").exists()


def test_a_model_that_timm_computes_in_another_way_is_not_written(tmp_path, monkeypatch):
    vitreg(tmp_path / "model")
    monkeypatch.setattr(timm.layers.Attention, "forward", lambda self, x, **kwargs: x)
    result = run("to-timm", tmp_path / "model", tmp_path / "timm", exit_code=1)
    assert "The converted model is not the same as timm" in result.stderr
    assert not (tmp_path / "timm").exists()


# Prints the peak of its own memory, as in test_convert.py.
MEASURED = """
import atexit, re, runpy, sys
from pathlib import Path

def report():
    print("peak:", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))

atexit.register(report)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("output", ["timm", "timm.pth"])
@pytest.mark.parametrize("use_swiglu_ffn", [False, True])
def test_large_models_stay_within_their_memory(tmp_path, output, use_swiglu_ffn):
    config = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224}
    vitreg(tmp_path / "model", patch_size=16, use_swiglu_ffn=use_swiglu_ffn, **config)
    command = [sys.executable, "-c", MEASURED, str(ROOT / "conversion" / "convert.py"), "to-timm"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    arguments = [str(tmp_path / "model"), str(tmp_path / output)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    peak = int(done.stdout.rsplit("peak: ")[1])
    assert peak < 1.3 * size + 1e9, f"{peak / 1e9:.2f} GB for a checkpoint of {size / 1e9:.2f} GB"
