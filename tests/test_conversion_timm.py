# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, run_client
from reference import randomize
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_data_config
from transformers import AutoModel, AutoModelForImageClassification
from typer.testing import CliRunner

from conversion import parity, timm_layout, timm_models, timm_reference
from conversion.convert import app
from conversion.family import ConversionError
from hf_vitreg import ViTRegForImageClassification, ViTRegModel


ROOT = Path(__file__).resolve().parents[1]
# distinct, so that no axis can stand for another: 48 wide, 5x5 patches of 4 pixels, 3 heads, 2 layers
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 20, "patch_size": 4, "num_classes": 11}
NO_HEAD = {"num_classes": 0}
# One of everything that timm builds of plain blocks: its name, and what is changed beside the size.
KINDS = {
    "vit": ("vit_small_patch16_224", {}),
    "vit_without_head": ("vit_small_patch16_224", NO_HEAD),
    "vit_not_square": ("vit_small_patch16_224", {"img_size": (12, 28)}),
    "vit_one_channel": ("vit_small_patch16_224", {"in_chans": 1}),
    "qk_norm": ("vit_small_patch16_224", {"qk_norm": True}),
    "no_biases": ("vit_small_patch16_224", {"proj_bias": False, "qkv_bias": False}),
    "cls_normed_after_pooling": ("vit_small_patch16_224", {"fc_norm": True}),
    "mean_of_normed_patches": ("vit_small_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "map_normed_after_pooling": ("vit_small_patch16_224", {"global_pool": "map", "fc_norm": True}),
    "not_pooled": ("vit_small_patch16_224", {"global_pool": "", **NO_HEAD}),
    "registers_and_cls_with_positions": ("vit_small_patch16_224", {"reg_tokens": 3}),
    "miil": ("vit_base_patch16_224_miil", {}),
    "gap_with_cls": ("vit_base_patch16_224", {"global_pool": "avg"}),
    "gap": ("vit_medium_patch16_gap_240", {}),
    "sbb": ("vit_base_patch16_reg4_gap_256", {"reg_tokens": 3}),
    "sbb_layer_scale": ("vit_little_patch16_reg4_gap_256", {}),
    "registers_with_positions": ("vit_so150m_patch16_reg4_gap_256", {"reg_tokens": 3}),
    "so150m2": ("vit_so150m2_patch16_reg1_gap_256", {}),
    "map_with_registers": ("vit_so150m_patch16_reg4_map_256", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "siglip_without_head": ("vit_base_patch16_siglip_224", NO_HEAD),
    "siglip_gap": ("vit_base_patch16_siglip_gap_224", NO_HEAD),
    "siglip_gelu_tanh": ("vit_giantopt_patch16_siglip_256", {**NO_HEAD, "mlp_ratio": 2.5}),
    "dinov2": ("vit_small_patch14_dinov2", NO_HEAD),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {**NO_HEAD, "reg_tokens": 3}),
    "dinov2_giant": ("vit_giant_patch14_reg4_dinov2", NO_HEAD),
    "tipsv2": ("vit_base_patch14_reg1_tipsv2", NO_HEAD),
    "tipsv2_giant": ("vit_giant_patch14_reg1_tipsv2", NO_HEAD),
    "clip": ("vit_base_patch32_clip_224", {}),
    "clip_quickgelu": ("vit_base_patch32_clip_quickgelu_224", {}),
    "radio": ("vit_base_patch16_radio_v3", {**NO_HEAD, "reg_tokens": 3}),
    "intern": ("vit_intern300m_patch14_448", NO_HEAD),
    "deit": ("deit_tiny_patch16_224", {}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit_distilled_without_head": ("deit_tiny_distilled_patch16_224", NO_HEAD),
    "deit3": ("deit3_small_patch16_224", {}),
    "eva_large": ("eva_large_patch14_196", {}),
    "flexivit": ("flexivit_small", {}),
}


def tiny_model(kind="vit", **changes):
    architecture, own = KINDS[kind]
    return randomize(timm.create_model(architecture, **{**TINY, **own, **changes}))


def write_folder(folder, kind="vit", tensors=None, pretrained_cfg=None, content=None, **changes):
    """A folder in the layout of timm's repositories."""
    architecture, own = KINDS[kind]
    model_args = {**TINY, **own, **changes}
    model = tiny_model(kind, **changes)
    height, width = model.patch_embed.img_size
    cfg = {name: model.pretrained_cfg[name] for name in ("mean", "std", "interpolation", "crop_pct", "license")}
    cfg |= {"input_size": [model.in_chans, height, width], "fixed_input_size": True, "classifier": "head"}
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "model_args": model_args,
        "pretrained_cfg": cfg | {"num_classes": model.num_classes} | (pretrained_cfg or {}),
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | (content or {})))
    save_file(tensors or model.state_dict(), folder / "model.safetensors")
    return model


def compared(prepared):
    config = prepared.model.config
    return parity.compare(prepared.implementation, prepared.reference, prepared.sizes, config.num_channels)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_agrees_with_timm(tmp_path, kind):
    original = write_folder(tmp_path / "a", kind)
    prepared = timm_models.prepare(str(tmp_path / "a"))
    assert max(row.relative for row in compared(prepared)) <= parity.TOLERANCE
    # and with the model that was never on the meta device, at its own size
    height, width = original.patch_embed.img_size
    pixel_values = torch.randn(2, original.in_chans, height, width)
    with torch.no_grad():
        outputs = prepared.implementation(pixel_values)
        tokens = original.forward_features(pixel_values)
        torch.testing.assert_close(outputs.pop("tokens"), tokens, rtol=1e-5, atol=1e-5)
        for name, output in outputs.items():
            assert name == ("logits" if original.num_classes else "pooled")
            torch.testing.assert_close(output, original.forward_head(tokens), rtol=1e-5, atol=1e-5)
    assert outputs or kind in ("not_pooled", "deit_distilled_without_head")
    assert any(height != width for height, width in prepared.sizes)


def config_of(kind, **changes):
    architecture, own = KINDS[kind]
    return timm_layout.config_of(timm_layout.create(architecture, **{**TINY, **own, **changes}), architecture)


def test_configs_are_what_timms_models_are():
    registers = config_of("sbb")
    assert not registers.use_cls_token and registers.num_register_tokens == 3
    assert (registers.pooler_type, registers.final_norm, registers.position_embedding_type) == (
        "mean",
        "pooled",
        "patches",
    )
    assert registers.layerscale_value is None and registers.classifier_layout == "pooled"
    so150m = config_of("registers_with_positions")
    assert so150m.position_embedding_type == "prefix_patches" and so150m.num_prefix_positions == 3
    assert so150m.intermediate_size == int(48 * 2.572)
    assert not config_of("so150m2").qkv_bias
    giant = config_of("dinov2_giant")
    assert giant.use_swiglu_ffn and giant.intermediate_size == 48 * 8 // 3 and giant.num_register_tokens == 4
    clip = config_of("clip_quickgelu")
    assert clip.use_pre_layernorm and not clip.patch_bias and clip.layer_norm_eps == 1e-5
    assert clip.hidden_act == "quick_gelu"
    distilled = config_of("deit_distilled")
    assert distilled.use_distillation_token and distilled.classifier_layout == "cls_distillation"
    assert (distilled.position_embedding_type, distilled.num_prefix_positions) == ("prefix_patches", 2)
    assert config_of("radio").final_norm == "none"
    assert config_of("deit3").position_embedding_type == "patches"
    assert config_of("vit_not_square").image_size == (12, 28)
    # DINOv2 as timm has it, which is not how Meta interpolates
    dinov2 = config_of("dinov2")
    assert dinov2.interpolate_antialias and dinov2.interpolate_offset == 0


def test_pixels_that_fill_no_patch_are_no_part_of_the_image_size():
    assert config_of("siglip", img_size=22).image_size == 20


REFUSED = {
    "vit_dlittle_patch16_reg1_gap_256": r"differential attention \(blocks.0.attn\)",
    "vit_dwee_patch16_reg1_gap_256": "differential attention",
    "vit_pwee_patch16_reg1_gap_256": "attention and MLP read the same norm",
    "vit_dpwee_patch16_reg1_gap_256": "differential attention and parallel blocks",
    "vit_small_patch16_18x2_224": "several attentions side by side",
    "vit_base_patch16_rpn_224": "norms after the residual branches",
    "vit_base_patch16_xp_224": "RMS norms",
    "aimv2_large_patch14_224": "RMS norms",
    "beit3_base_patch16_224": "LayerNorm as blocks.0.attn.norm, not Identity",
    "test_vit3": "attention pooling of CLS and registers too",
    "vit_relpos_small_patch16_224": "relative position biases",
    "vit_srelpos_small_patch16_224": "relative position biases",
    "vit_small_r26_s32_224": "a convolutional network before the patches",
    "vit_small_patch16_rope_224": "rotary position embeddings",
    "vit_small_patch16_dinov3": "rotary .*leaves out the periods.*the command dinov3,.* the command transformers",
    "vit_base_patch16_sapiens2": "rotary",
    "samvit_base_patch16": "windowed attention",
    "resnet18": "what timm's resnet builds",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_vit_is_refused_before_anything_is_downloaded(name, monkeypatch):
    monkeypatch.setattr(timm_models, "_download", None)
    with pytest.raises(ConversionError, match=f"{name} is no plain ViT.*{REFUSED[name]}"):
        timm_models.prepare(name)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"scale_attn_norm": True}, "LayerNorm as blocks.0.attn.norm, not Identity"),
        ({"scale_mlp_norm": True}, "LayerNorm as blocks.0.mlp.norm, not Identity"),
        ({"embed_norm_layer": "layernorm"}, "LayerNorm as patch_embed.norm, not Identity"),
        ({"norm_layer": "layernormfp32"}, "LayerNormFp32 as blocks.0.norm1, not LayerNorm"),
        ({"norm_layer": "rmsnorm"}, "RMS norms"),
        ({"act_layer": "relu"}, "ReLU as its activation"),
        ({"pos_embed": "none"}, "no position embeddings"),
        ({"patch_size": (4, 2)}, "patches that are not square"),
        ({"global_pool": "max"}, 'global_pool="max"'),
        ({"global_pool": "prr"}, "pooling with a residual of its own"),
        ({"global_pool": ""}, "a head on every token"),
        ({"global_pool": "", "num_classes": 0, "fc_norm": True}, "a head on every token"),
        ({"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix=True, not False"),
    ],
)
def test_arguments_that_make_no_plain_vit_are_refused(tmp_path, changes, expected):
    with pytest.raises(ConversionError, match=f"no plain ViT, and ViTReg cannot hold it: it has .*{expected}"):
        config_of("vit", **changes)


def test_a_setting_that_nobody_knows_is_refused():
    """timm may learn to compute something else: what is not as in the plain model is no plain model."""
    model = timm_layout.create("vit_tiny_patch16_224", **TINY)
    model.blocks[1].attn.temperature = 0.5
    with pytest.raises(ConversionError, match="blocks that differ: the first and number 1"):
        timm_layout.config_of(model, "own")
    model = timm_layout.create("vit_tiny_patch16_224", **TINY)
    model.norm.eps = 1e-3
    with pytest.raises(ConversionError, match=r"eps=0.001, not 1e-06 \(norm\)"):
        timm_layout.config_of(model, "own")
    model = timm_layout.create("vit_tiny_patch16_224", **TINY)
    model.blocks[0].gate = torch.nn.Linear(3, 5)
    with pytest.raises(ConversionError, match=r"Linear as blocks\.0\.gate, not nothing"):
        timm_layout.config_of(model, "own")


def test_settings_of_training_change_nothing():
    changes = {"drop_path_rate": 0.1, "proj_drop_rate": 0.1, "patch_drop_rate": 0.2, "dynamic_img_size": True}
    assert config_of("vit", **changes).to_dict() == config_of("vit").to_dict()


def test_the_model_shares_the_memory_of_the_checkpoint(tmp_path):
    write_folder(tmp_path / "a", "clip")
    prepared = timm_models.prepare(str(tmp_path / "a"))
    state, theirs = prepared.model.state_dict(), prepared.reference.model.state_dict()
    fused = theirs["blocks.1.attn.qkv.weight"]
    key = next(tensor for name, tensor in state.items() if name.endswith("layer.1.attention.k_proj.weight"))
    assert key.data_ptr() == fused[48:].data_ptr()
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)


def test_the_head_of_a_clip_tower_is_its_projection(tmp_path):
    """timm holds it as a classifier with a bias of zeros. A bias that was trained is a classifier's."""
    tensors = tiny_model("clip").state_dict() | {"head.bias": torch.zeros(11)}
    write_folder(tmp_path / "tower", "clip", tensors)
    tower = timm_models.prepare(str(tmp_path / "tower"))
    assert type(tower.model) is ViTRegModel and tower.model.config.projection_dim == 11
    assert torch.equal(tower.model.projection.weight, tensors["head.weight"])
    assert tower.left_aside == ["head.bias (zeros: the head is a projection)"]
    rows = compared(tower)
    assert {row.output for row in rows} == {"tokens", "image_embeds"} and all(row.passed for row in rows)
    write_folder(tmp_path / "classifier", "clip")
    assert type(timm_models.prepare(str(tmp_path / "classifier")).model) is ViTRegForImageClassification


def test_a_pool_that_timm_leaves_out_is_left_aside(tmp_path):
    """timm's SigLIP models without attention pooling were cut from those with it."""
    tensors = tiny_model("siglip", **NO_HEAD).state_dict()
    write_folder(tmp_path / "a", "siglip_gap", tensors)
    prepared = timm_models.prepare(str(tmp_path / "a"))
    num_of_pool = sum(name.startswith("attn_pool.") for name in tensors)
    assert prepared.left_aside == [f"attn_pool ({num_of_pool} entries)"]
    assert prepared.model.pooler is None and all(row.passed for row in compared(prepared))
    write_folder(tmp_path / "b", "gap", tensors)
    with pytest.raises(ConversionError, match=r"15 tensors that .*attn_pool\.kv"):
        timm_models.prepare(str(tmp_path / "b"))


# As timm.data.create_transform preprocesses for evaluation: the size that is resized to, and the crop.
PREPROCESSING = {
    "vit_small_patch16_224": ({"shortest_edge": 248}, (224, 224)),
    "vit_base_patch16_384.augreg_in1k": ({"shortest_edge": 384}, (384, 384)),
    "vit_so150m2_patch16_reg1_gap_448.sbb_e200_in12k_ft_in1k": ({"height": 448, "width": 448}, (448, 448)),
    "vit_base_patch14_reg1_tipsv2": ({"shortest_edge": 448}, (448, 448)),
    "vit_base_patch16_224.augreg_in21k": ({"shortest_edge": 248}, (224, 224)),
}


@pytest.mark.parametrize("name", PREPROCESSING)
def test_the_image_processor_does_what_timms_evaluation_does(name):
    cfg = timm.models.get_pretrained_cfg(name).to_dict()
    model = timm_layout.create(name)
    processor, remarks = timm_models._image_processor(cfg, timm_layout.config_of(model, name), shapes_decide=False)
    resize, crop, _, normalize = create_transform(**resolve_data_config({}, pretrained_cfg=cfg)).transforms
    size, crop_size = PREPROCESSING[name]
    resized = resize.size if isinstance(resize.size, int) else {"height": resize.size[0], "width": resize.size[1]}
    assert resized == (size if "height" in size else size["shortest_edge"]) and tuple(crop.size) == crop_size
    assert {key: value for key, value in dict(processor.size).items() if value} == size
    assert (processor.crop_size["height"], processor.crop_size["width"]) == crop_size
    assert resize.interpolation.value == "bicubic" and processor.resample.name == "BICUBIC"
    assert torch.allclose(normalize.mean, torch.tensor(processor.image_mean))
    assert torch.allclose(normalize.std, torch.tensor(processor.image_std))
    assert remarks == []


def test_what_the_image_processor_does_in_another_way_is_said(tmp_path):
    write_folder(tmp_path / "border", pretrained_cfg={"crop_mode": "border"})
    assert 'crop_mode="border"' in timm_models.prepare(str(tmp_path / "border")).remarks[0]
    write_folder(tmp_path / "parts", img_size=22)
    prepared = timm_models.prepare(str(tmp_path / "parts"))
    assert "cropped to 20x20 pixels, whole patches; timm crops to 22x22" in prepared.remarks[0]
    assert prepared.image_processor.size["shortest_edge"] == 24
    assert prepared.image_processor.crop_size["height"] == 20


def test_labels_are_those_of_the_config_or_of_imagenet(tmp_path):
    content = {"label_names": [f"n{index}" for index in range(11)], "label_descriptions": {"n3": "tench", "n4": "eel"}}
    write_folder(tmp_path / "told", content=content)
    config = timm_models.prepare(str(tmp_path / "told")).model.config
    assert [config.id2label[index] for index in (2, 3, 4)] == ["n2", "tench", "eel"]
    write_folder(tmp_path / "imagenet", num_classes=1000)
    config = timm_models.prepare(str(tmp_path / "imagenet")).model.config
    assert config.id2label[1] == "goldfish, Carassius auratus"


def test_licences_are_those_that_timm_knows(tmp_path):
    write_folder(tmp_path / "a", "deit", pretrained_cfg={"license": "cc-by-nc-4.0"})
    assert str(timm_models.prepare(str(tmp_path / "a")).license) == "cc-by-nc-4.0"
    assert str(timm_models.prepare(str(tmp_path / "a"), license="mit").license) == "mit"
    # without a repository nobody knows what is meant
    write_folder(tmp_path / "b", "deit", pretrained_cfg={"license": "my-license"})
    assert str(timm_models.prepare(str(tmp_path / "b")).license) == "unknown"
    source = timm_models._Source("a", "a", "a", tmp_path, "a", "nvidia-open-model-license", "timm/radio")
    license = timm_models._license(source)
    assert (license.id, license.name) == ("other", "nvidia-open-model-license")
    assert license.link == "https://huggingface.co/timm/radio"


def weight_file(tmp_path, content, name="a.pth"):
    torch.save(content, tmp_path / name)
    return str(tmp_path / name)


@pytest.fixture
def tiny_name(monkeypatch):
    """A name in timm of a model that is small: the way to a weight file that is quick to make."""
    from timm.models import _registry
    from timm.models.vision_transformer import VisionTransformer, build_model_with_cfg

    def vit_nano_patch4_20(pretrained=False, **kwargs):
        model_args = {**TINY, "num_classes": 1000, **kwargs}
        return build_model_with_cfg(VisionTransformer, "vit_nano_patch4_20", pretrained, **model_args)

    vit_nano_patch4_20.__module__ = "timm.models.vision_transformer"
    monkeypatch.setitem(_registry._model_entrypoints, "vit_nano_patch4_20", vit_nano_patch4_20)
    return "vit_nano_patch4_20"


def test_weight_files_of_every_training_are_read(tmp_path, tiny_name):
    tensors, other = tiny_model().state_dict(), tiny_model(num_classes=11).state_dict()
    other = {name: tensor + 1 for name, tensor in other.items()}
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    layouts = {
        "flat": (tensors, []),
        "wrapped": (wrapped, []),
        "nested": ({"state_dict": tensors, "epoch": 3}, ["epoch"]),
        "averaged": (
            {"state_dict": other, "state_dict_ema": wrapped, "optimizer": {"lr": 0.1, "eps": 1.0}},
            [f"state_dict ({len(other)} entries)", "optimizer (2 entries)"],
        ),
    }
    for layout, (content, left_aside) in layouts.items():
        prepared = timm_models.prepare(weight_file(tmp_path, content, f"{layout}.pth"), arch=tiny_name)
        assert prepared.arch == tiny_name and prepared.left_aside == left_aside, layout
        assert torch.equal(prepared.model.classifier.weight, tensors["head.weight"]), layout
        assert str(prepared.license) == "unknown" and prepared.base_model is None
    assert all(row.passed for row in compared(prepared))


def test_classes_and_image_size_of_a_weight_file_are_those_of_its_tensors(tmp_path, tiny_name):
    tensors = tiny_model(num_classes=0, img_size=28).state_dict()
    prepared = timm_models.prepare(weight_file(tmp_path, tensors), arch=tiny_name)
    assert type(prepared.model) is ViTRegModel and prepared.model.config.image_size == 28
    assert prepared.image_processor.crop_size["height"] == 28
    tensors["pos_embed"] = torch.ones(1, 31, 48)
    with pytest.raises(ConversionError, match="its 31 position embeddings are for no square grid and 1 tokens"):
        timm_models.prepare(weight_file(tmp_path, tensors, "b.pth"), arch=tiny_name)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(names)}


def test_files_of_other_layouts_and_parts_are_refused(tmp_path, tiny_name):
    tensors = tiny_model().state_dict()
    cases = {
        "in that of DINOv2: `convert.py dinov2` reads it": tensors | {"mask_token": torch.ones(1, 48)},
        "converted by `convert.py dinov3`": tensors | {"storage_tokens": torch.ones(1, 4, 48)},
        "converted by `convert.py deit3`": tensors | {"blocks.0.gamma_1": torch.ones(48)},
        "converted by `convert.py open_clip`": {"visual.class_embedding": torch.ones(48)},
        "converted by `convert.py transformers`": {"embeddings.cls_token": torch.ones(1, 1, 48)},
        "12 tensors that are missing: blocks.1.norm1.weight": without(tensors, "blocks.1."),
        r"is no vit_nano_patch4_20 as timm builds it.*missing: norm\.bias": without(tensors, "norm.bias"),
        r"1 tensors that the model does not have: fc_norm\.weight": tensors | {"fc_norm.weight": torch.ones(48)},
        r"blocks.0.mlp.fc1.weight gives \(7, 48\)": tensors | {"blocks.0.mlp.fc1.weight": torch.ones(7, 48)},
        "is torch.int64, no weight": tensors | {"norm.bias": torch.ones(48, dtype=torch.int64)},
    }
    for index, (expected, content) in enumerate(cases.items()):
        with pytest.raises(ConversionError, match=f"(?s){expected}"):
            timm_models.prepare(weight_file(tmp_path, content, f"{index}.pth"), arch=tiny_name)


def test_a_pickle_with_code_is_not_run(tmp_path, tiny_name):
    with pytest.raises(ConversionError, match="Nothing was run"):
        timm_models.prepare(weight_file(tmp_path, {"weight": torch.nn.Linear(3, 5)}), arch=tiny_name)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vit_bas_patch16_224", r"timm has no model vit_bas_patch16_224. Did you mean vit_base_patch16_224\?"),
        (
            "vit_base_patch16_224.augreg_in1",
            r"no weights vit_base_patch16_224.augreg_in1. Did you mean .*augreg_in1k\?",
        ),
        (
            "vit_huge_patch14_gap_224.in1k_ijepa",
            "no weights on the Hub in timm's layout, but in another layout at http",
        ),
        ("vit_giant_patch14_224", "vit_giant_patch14_224 has no weights on the Hub in timm's layout"),
        ("timm/vit_bas_patch16_224", r"Did you mean vit_base_patch16_224\?"),
        ("folder/that/is/not/there", "folder/that/is/not/there does not exist"),
        ("vit_base_patch16_224", "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k cannot be had from the Hub"),
        ("hf-hub:org/model", "org/model cannot be had from the Hub"),
        ("vit_base_patch16_224_dino", "timm/vit_base_patch16_224.dino cannot be had from the Hub"),
        # the weights of both are the same, and only the name knows of the activation
        ("vit_base_patch32_clip_quickgelu_224.openai", "timm/vit_base_patch32_clip_224.openai cannot be had"),
    ],
)
def test_names_that_lead_nowhere(name, expected, tmp_path):
    with pytest.raises(ConversionError, match=expected):
        timm_models.prepare(name, cache_dir=tmp_path)


def test_weights_that_timm_has_under_two_names_are_named():
    [remark] = timm_models._same_weights("vit_base_patch32_clip_224.openai", "timm/vit_base_patch32_clip_224.openai")
    assert "under the name vit_base_patch32_clip_quickgelu_224.openai: choose the one whose activation" in remark
    assert timm_models._same_weights("test_vit.r160_in1k", "timm/test_vit.r160_in1k") == []


def test_arch_is_for_weight_files(tmp_path):
    write_folder(tmp_path / "a")
    with pytest.raises(ConversionError, match=r"a is a folder, whose config\.json says what it is\. Leave it out"):
        timm_models.prepare(str(tmp_path / "a"), arch="vit_small_patch16_224")
    with pytest.raises(ConversionError, match="vit_base_patch16_224 names no file"):
        timm_models.prepare("vit_base_patch16_224", arch="vit_base_patch16_224")
    file = str(tmp_path / "a" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"which does not say what it is\. Give timm's name of its architecture"):
        timm_models.prepare(file)
    with pytest.raises(ConversionError, match=r"Did you mean vit_small_patch16_224\?"):
        timm_models.prepare(file, arch="vit_smal_patch16_224")
    with pytest.raises(ConversionError, match=r"is no vit_small_patch16_224 as timm builds it"):
        timm_models.prepare(file, arch="vit_small_patch16_224")
    with pytest.raises(ConversionError, match="vit_small_patch16_rope_224 is no plain ViT"):
        timm_models.prepare(file, arch="vit_small_patch16_rope_224")


def test_folders_that_are_none_of_timm(tmp_path):
    write_folder(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "empty").mkdir()
    cases = {
        "names no architecture of timm, but 'vit_none'": {**config, "architecture": "vit_none"},
        "but None. It is one of transformers, dinov2: use the command": {"model_type": "dinov2"},
        "timm .* cannot build local-dir:.*unexpected keyword": {**config, "model_args": {"depht": 2}},
        "holds a list, not the config": [1],
    }
    for expected, content in cases.items():
        (tmp_path / "a" / "config.json").write_text(json.dumps(content))
        with pytest.raises(ConversionError, match=expected):
            timm_models.prepare(str(tmp_path / "a"))
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="is no valid JSON"):
        timm_models.prepare(str(tmp_path / "a"))
    with pytest.raises(ConversionError, match=r"has no config\.json"):
        timm_models.prepare(str(tmp_path / "empty"))
    shutil.copy(tmp_path / "a" / "config.json", tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"has no model\.safetensors.*with --arch"):
        timm_models.prepare(str(tmp_path / "empty"))


def test_a_folder_whose_weights_are_cut_short(tmp_path):
    write_folder(tmp_path / "a")
    content = (tmp_path / "a" / "model.safetensors").read_bytes()
    (tmp_path / "a" / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ConversionError, match="is cut short or damaged"):
        timm_models.prepare(str(tmp_path / "a"))


def test_without_timm_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_reference, "timm", None)
    with pytest.raises(ConversionError, match=r"pip install hf-vitreg\[conversion\]"):
        timm_models.prepare(str(tmp_path))
    monkeypatch.setattr(timm_models, "get_pretrained_cfg", None)
    assert timm_models.known_checkpoints() == []


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


def test_the_command_writes_what_loads(tmp_path):
    original = write_folder(tmp_path / "a", "sbb_layer_scale", pretrained_cfg={"license": "mit"})
    result = run("timm", tmp_path / "a", tmp_path / "model")
    assert "Against timm" in result.output and "vit_little_patch16_reg4_gap_256" in result.output
    record = json.loads((tmp_path / "model" / "conversion.json").read_text())
    assert [row["output"] for row in record["comparisons"]] == ["tokens", "logits"] * 5
    assert record["arch"] == "vit_little_patch16_reg4_gap_256" and record["sources"][0]["file"] == "model.safetensors"
    card = ModelCard.load(tmp_path / "model" / "README.md").data
    assert card.license == "mit" and card.base_model is None
    model, loading = AutoModelForImageClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values())
    pixel_values = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(model(pixel_values).logits, original(pixel_values), rtol=1e-4, atol=1e-4)
    backbone = AutoModel.from_pretrained(tmp_path / "model")
    pooled = original.forward_head(original.forward_features(pixel_values), pre_logits=True)
    torch.testing.assert_close(backbone(pixel_values).pooler_output, pooled, rtol=1e-4, atol=1e-4)


def test_a_model_that_differs_is_not_written(tmp_path):
    tensors = tiny_model().state_dict()
    write_folder(tmp_path / "a", tensors=tensors | {"norm.weight": torch.full([48], torch.nan)})
    result = run("timm", tmp_path / "a", tmp_path / "model", exit_code=1)
    assert "the weights are not finite" in result.stderr and not (tmp_path / "model").exists()


def test_half_precision_stays_as_it_is(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in tiny_model("siglip").state_dict().items()}
    write_folder(tmp_path / "a", "siglip", tensors)
    run("timm", tmp_path / "a", tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16 and torch.equal(model.pooler.latent, tensors["attn_pool.latent"])


# In a process of its own, because clients read the address of their Hub when they are imported.
ON_THE_HUB = """
from huggingface_hub import HfApi
from conversion.convert import app

api, repository = HfApi(), "timm/test_vit.r160_in1k"
api.create_repo(repository)
api.upload_folder(folder_path=UPLOADED, repo_id=repository)

def run(*arguments):
    try:
        app(arguments)
    except SystemExit as stopped:
        print("exit", stopped.code)

run("timm", "test_vit.r160_in2k", OUTPUT)
run("timm", "test_vit", OUTPUT)
api.create_repo("tester/vitreg")
api.upload_folder(folder_path=OUTPUT, repo_id="tester/vitreg")
run("to-timm", "tester/vitreg", BACK)
"""


def test_published_names_come_from_the_hub_and_so_do_models_on_the_way_back(tmp_path):
    """The whole way with timm's smallest published model, whose weights are random here."""
    model = randomize(timm.create_model("test_vit"))
    (tmp_path / "uploaded").mkdir()
    (tmp_path / "uploaded" / "config.json").write_text('{"architecture": "test_vit"}')
    save_file(model.state_dict(), tmp_path / "uploaded" / "model.safetensors")
    code = ON_THE_HUB.replace("UPLOADED", repr(str(tmp_path / "uploaded")))
    code = code.replace("OUTPUT", repr(str(tmp_path / "model"))).replace("BACK", repr(str(tmp_path / "back")))
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    with LoopbackHub() as hub:
        hub.users[hub.token] = ("tester", "timm")
        done = run_client(hub, code, tmp_path / "home", **environment)
    assert re.findall(r"exit (\d)", done.stdout) == ["1", "0", "0"], done.stdout + done.stderr
    assert "timm has no weights test_vit.r160_in2k. Did you mean test_vit.r160_in1k?" in done.stderr
    record = json.loads((tmp_path / "model" / "conversion.json").read_text())
    assert record["sources"][0]["file"] == "timm/test_vit.r160_in1k/model.safetensors"
    card = ModelCard.load(tmp_path / "model" / "README.md").data
    assert (card.license, card.base_model) == ("apache-2.0", "timm/test_vit.r160_in1k")
    state = AutoModelForImageClassification.from_pretrained(tmp_path / "model").state_dict()
    assert torch.equal(state["classifier.weight"], model.head.weight)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in model.state_dict().items())
    content = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (content["architecture"], content["pretrained_cfg"]["license"]) == ("test_vit", "apache-2.0")
    assert content["label_names"][1] == "goldfish, Carassius auratus"


def check_list(names):
    """That the list has what can be converted, and only that."""
    known = {one.name: one for one in timm_models.known_checkpoints()}
    refused = ("dlittle", "pwee", "rope", "dinov3", "relpos", "_rpn_", "_xp_", "r50", "18x2", "ijepa", "beit3")
    assert not [name for name in known if any(word in name for word in refused)]
    assert known.keys() >= set(names)
    for name in names:
        assert known[name].source == f"https://huggingface.co/timm/{name}"
        # tags of one architecture have heads and image sizes of their own
        model = timm_layout.create(name)
        assert known[name].num_parameters == sum(parameter.numel() for parameter in model.parameters())
    return known


LISTED = [
    "vit_base_patch16_384.augreg_in1k",
    "vit_base_patch16_224.augreg_in21k",
    "deit_tiny_distilled_patch16_224.fb_in1k",
    "vit_little_patch16_reg4_gap_256.sbb_in1k",
    "vit_base_patch16_radio_v3.c_radio",
]


def test_the_list_has_what_can_be_converted(monkeypatch):
    others = ["vit_dlittle_patch16_reg1_gap_256.sbb_nadamuon_in1k", "vit_huge_patch14_gap_224.in1k_ijepa"]
    others += ["vit_small_patch16_dinov3.lvd1689m", "resnet18.a1_in1k"]
    monkeypatch.setattr(timm_models, "list_pretrained", lambda: LISTED + others)
    known = check_list(LISTED)
    assert len(known) == len(LISTED)
    sbb, radio = known[LISTED[3]], known[LISTED[4]]
    assert (sbb.num_registers, sbb.patch_size, sbb.license) == (4, 16, "apache-2.0")
    assert (radio.num_registers, radio.license) == (7, "nvidia-open-model-license")


@pytest.mark.slow
def test_the_list_has_all_that_can_be_converted():
    assert len(check_list(LISTED)) > 280


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_little_patch16_reg4_gap_256"]
)
def test_published_sizes_agree(tmp_path, name):
    model = randomize(timm.create_model(name))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert load_file(tmp_path / "a.safetensors").keys() == model.state_dict().keys()
    run("timm", tmp_path / "a.safetensors", tmp_path / "model", "--arch", name)
    record = json.loads((tmp_path / "model" / "conversion.json").read_text())
    assert record["arch"] == name and all(row["relative"] <= parity.TOLERANCE for row in record["comparisons"])
