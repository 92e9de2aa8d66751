# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from reference import COLS, NUM_REGISTERS, ROPE, ROWS, VARIANTS, WITHOUT_CLS, tiny_config

from hf_vitreg import ViTRegConfig, ViTRegModel


TEST_TIME = {"num_test_time_registers": 2, "register_neurons": {1: [3]}}


def test_defaults_are_vit_base_with_four_registers():
    config = ViTRegConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.patch_size, config.intermediate_size, config.num_register_tokens) == (14, 3072, 4)
    assert config.model_type == "vitreg"


@pytest.mark.parametrize("num_register_tokens", [0, 1, NUM_REGISTERS])
def test_prefix_is_cls_and_the_registers(num_register_tokens):
    assert tiny_config(num_register_tokens=num_register_tokens).num_prefix_tokens == 1 + num_register_tokens


@pytest.mark.parametrize(
    ("values", "num_prefix_tokens", "num_prefix_positions"),
    [
        ({}, 6, 1),
        ({"position_embedding_type": "patches"}, 6, 0),
        ({"position_embedding_type": "prefix_patches"}, 6, 6),
        (ROPE, 6, 0),
        ({"use_distillation_token": True}, 7, 1),
        ({"use_distillation_token": True, "position_embedding_type": "prefix_patches"}, 7, 7),
        (VARIANTS["attended"], 5, 0),
        (VARIANTS["mean"], 5, 5),
        ({**VARIANTS["mean"], "num_register_tokens": 0}, 0, 0),
        ({"position_embedding_type": "prefix_patches", **TEST_TIME}, 6, 4),
    ],
)
def test_prefix_is_cls_distillation_and_registers_as_the_last(values, num_prefix_tokens, num_prefix_positions):
    config = tiny_config(**values)
    assert (config.num_prefix_tokens, config.num_prefix_positions) == (num_prefix_tokens, num_prefix_positions)
    assert config.register_slice == slice(num_prefix_tokens - config.num_register_tokens, num_prefix_tokens)


def test_grid_has_rows_before_columns():
    assert tiny_config().grid_size == (ROWS, COLS)
    assert tiny_config(image_size=35).grid_size == (5, 5)
    # pixels that fill no patch carry no position embedding
    assert tiny_config(image_size=(27, 50)).grid_size == (ROWS, COLS)


@pytest.mark.parametrize(
    ("mlp", "intermediate_size"),
    [
        ({"mlp_ratio": 4}, 192),
        ({"mlp_ratio": 2.572}, 123),
        ({"intermediate_size": 131}, 131),
        ({"intermediate_size": 131, "use_swiglu_ffn": True}, 131),
        # two thirds of 192 are a multiple of 8, two thirds of 123 (82) are not
        ({"mlp_ratio": 4, "use_swiglu_ffn": True}, 128),
        ({"mlp_ratio": 2.572, "use_swiglu_ffn": True}, 88),
        # the published sizes of DINOv2: g/14, and L in its training recipe
        ({"hidden_size": 1536, "use_swiglu_ffn": True}, 4096),
        ({"hidden_size": 1024, "use_swiglu_ffn": True}, 2736),
    ],
)
def test_mlp_width_is_given_or_a_ratio(mlp, intermediate_size):
    assert tiny_config(**mlp).intermediate_size == intermediate_size


@pytest.mark.parametrize("image_size", [28, (21, 49), [21, 49]])
@pytest.mark.parametrize("layerscale_value", [1e-5, None])
def test_saved_and_loaded_config_is_equal(tmp_path, image_size, layerscale_value):
    config = tiny_config(
        image_size=image_size,
        layerscale_value=layerscale_value,
        mlp_ratio=2.572,
        drop_path_schedule="linear",
        interpolate_offset=0.1,
        interpolate_antialias=False,
        classifier_layout="last4_cls_mean",
        out_indices=[1, 3],
        id2label={index: f"class {index}" for index in range(11)},
    )
    config.save_pretrained(tmp_path)
    loaded = ViTRegConfig.from_pretrained(tmp_path)
    assert loaded.to_json_string() == config.to_json_string()
    assert loaded.grid_size == config.grid_size
    assert (loaded.out_features, loaded.out_indices) == (["stage1", "stage3"], [1, 3])


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_variant_is_equal(tmp_path, variant):
    config = tiny_config(**VARIANTS[variant])
    config.save_pretrained(tmp_path)
    loaded = ViTRegConfig.from_pretrained(tmp_path)
    assert loaded.to_json_string() == config.to_json_string()
    assert {name: getattr(loaded, name) for name in VARIANTS[variant]} == VARIANTS[variant]


def test_loaded_config_can_be_changed(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    changed = ViTRegConfig.from_pretrained(tmp_path, num_register_tokens=2, drop_path_rate=0.3)
    assert (changed.num_register_tokens, changed.drop_path_rate) == (2, 0.3)


@pytest.mark.parametrize("output_attentions", [True, False])
def test_output_attentions_is_saved_whatever_the_attention(tmp_path, output_attentions):
    config = tiny_config(attn_implementation="sdpa", output_attentions=output_attentions)
    config.save_pretrained(tmp_path)
    assert ViTRegConfig.from_pretrained(tmp_path).output_attentions is output_attentions


def test_every_auto_class_is_in_the_auto_map():
    auto_map = json.loads(tiny_config(auto_map={"AutoModel": "stale.Model"}).to_json_string())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_vitreg.ViTRegConfig",
        "AutoModel": "modeling_vitreg.ViTRegModel",
        "AutoModelForImageClassification": "modeling_vitreg.ViTRegForImageClassification",
        "AutoModelForSemanticSegmentation": "modeling_vitreg.ViTRegForSemanticSegmentation",
        "AutoModelForDepthEstimation": "modeling_vitreg.ViTRegForDepthEstimation",
        "AutoBackbone": "modeling_vitreg.ViTRegBackbone",
    }


def test_configs_share_no_auto_map():
    changed = tiny_config()
    changed.auto_map["AutoModel"] = "elsewhere.Model"
    assert tiny_config().auto_map["AutoModel"] == "modeling_vitreg.ViTRegModel"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_register_tokens": -1}, "num_register_tokens must be 0 or more, got -1"),
        ({"register_init_std": 0.0}, "register_init_std must be positive, got 0.0.*stay equal"),
        ({"patch_size": 0}, "patch_size must be 1 or more, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be 1 or more, got 0"),
        ({"hidden_act": "gulu"}, "hidden_act 'gulu' is not known. There are .*gelu"),
        ({"drop_path_rate": -0.1}, "drop_path_rate must be at least 0 and less than 1, got -0.1"),
        ({"interpolate_offset": 1.0}, "interpolate_offset must be 0 or more and below 1, got 1.0"),
        ({"interpolate_offset": -0.1}, "interpolate_offset must be 0 or more and below 1, got -0.1"),
        ({"num_depth_bins": 1}, "num_depth_bins must be 2 or more, got 1"),
        ({"min_depth": -1.0}, "min_depth must be 0 or more and less than max_depth, got -1.0 and 10.0"),
        ({"max_depth": 0.001}, "min_depth must be 0 or more and less than max_depth, got 0.001 and 0.001"),
        ({"rope_theta": 0}, "rope_theta must be positive, got 0.*DINOv3 uses 100"),
        ({"pos_embed_shift": -1}, "pos_embed_shift must be 0 or more, or None, got -1"),
        ({"pos_embed_jitter": 0.5}, "pos_embed_jitter must be 1 or more, or None, got 0.5"),
        ({"pos_embed_rescale": 0}, "pos_embed_rescale must be 1 or more, or None, got 0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be at least 0 and less than 1, got 1.0"),
        ({"image_size": (21, 6)}, r"image_size \(21, 6\) must be at least one patch of 7 pixels"),
        ({"classifier_layout": "last4_cls_mean", "num_hidden_layers": 3}, "reads four layers.*num_hidden_layers=3"),
        ({"classifier_layout": "last4_cls", "num_hidden_layers": 3}, 'reads four layers.*Choose "cls" or "cls_mean"'),
        ({"classifier_layout": "last4_cls", "final_norm": "none"}, 'reads normalized tokens.*final_norm="none"'),
        ({"use_cls_token": False}, 'position_embedding_type="cls_patches" needs a CLS token.*use_cls_token=False'),
        ({**WITHOUT_CLS, "pooler_type": "cls"}, 'pooler_type="cls" needs a CLS token.*pooler_type="mean" or "map"'),
        (
            {**WITHOUT_CLS, "pooler_type": "mean", "classifier_layout": "cls_mean"},
            'classifier_layout="cls_mean" needs a CLS token.*classifier_layout="pooled"',
        ),
        ({"classifier_layout": "cls_distillation"}, "needs use_distillation_token=True"),
        (
            {"final_norm": "pooled"},
            'final_norm="pooled" has weights that only classifier_layout="pooled" reads.*cls_mean',
        ),
        ({"pooler_type": "map", "classifier_layout": "cls"}, 'pooler_type="map" has weights.*classifier_layout="cls"'),
        ({"num_test_time_registers": -1}, "num_test_time_registers must be 0 to num_register_tokens=5.*got -1"),
        ({**TEST_TIME, "num_test_time_registers": 6}, "must be 0 to num_register_tokens=5.*got 6"),
        ({"num_test_time_registers": 2}, "num_test_time_registers=2 and register_neurons=None do not go together"),
        ({**TEST_TIME, "register_neurons": {1: []}}, "there must be both or neither"),
        ({"register_neurons": {1: [3]}}, "num_test_time_registers=0 and .* do not go together"),
        ({**TEST_TIME, "register_neurons": {5: [3]}}, "register_neurons are of layers 0 to 4.*got 5"),
        ({**TEST_TIME, "register_neurons": {-1: [3]}}, "register_neurons are of layers 0 to 4.*got -1"),
        ({**TEST_TIME, "register_neurons": {1: [3, -2, 192]}}, "of layer 1 are 0 to 191.*got -2, 192"),
        ({**TEST_TIME, "register_neurons": {1: [3, 7, 3]}}, r"of layer 1 must be different ones, got \[3, 7, 3\]"),
        ({**TEST_TIME, "register_neurons": {"first": [3]}}, r"go from layers, as numbers.*got \['first'\]"),
        ({**TEST_TIME, "register_neurons": {"1": [3], "01": [4]}}, "have a layer twice"),
    ],
)
def test_impossible_values_are_refused_with_the_remedy(values, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**values)


def test_layers_of_register_neurons_are_numbers_after_json_too(tmp_path):
    config = tiny_config(num_test_time_registers=1, register_neurons={"3": [5, 2], "1": []})
    assert config.register_neurons == {3: [5, 2], 1: []}
    config.save_pretrained(tmp_path)
    assert ViTRegConfig.from_pretrained(tmp_path).register_neurons == {3: [5, 2], 1: []}
    assert json.loads(config.to_json_string())["register_neurons"] == {"3": [5, 2], "1": []}


@pytest.mark.parametrize(
    "values",
    [
        {"mlp_ratio": "4"},
        {"num_register_tokens": 1.5},
        {"drop_path_schedule": "cosine"},
        {"classifier_layout": "registers"},
        {"position_embedding_type": "sinusoidal"},
        {"rope_normalize_coords": "mean"},
        {"final_norm": "batch"},
        {"pooler_type": "max"},
        {"projection_dim": 1.5},
        {"image_size": "224"},
        {"use_mask_token": "yes"},
        {"num_test_time_registers": "1"},
        {"register_neurons": [[1, 3]]},
        {"register_neuron_reduce": "image"},
    ],
)
def test_wrong_types_and_unknown_modes_are_refused(values):
    (name,) = values
    with pytest.raises(StrictDataclassFieldValidationError, match=name):
        tiny_config(**values)


def test_a_change_is_checked_before_it_is_saved(tmp_path):
    config = tiny_config()
    config.num_register_tokens = -1
    with pytest.raises(StrictDataclassClassValidationError, match="num_register_tokens must be 0 or more"):
        config.save_pretrained(tmp_path)


def test_width_must_be_shared_by_the_heads():
    with pytest.raises(ValueError, match="hidden_size 48 must be a multiple of num_attention_heads 5"):
        ViTRegModel(tiny_config(num_attention_heads=5))
