# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Folders with a ViTReg config and weights under the names that they were published with."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from original_outputs import load
from reference import VARIANTS, randomize, relative_error, tiny_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    VisionTextDualEncoderModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from hf_vitreg import ViTRegBackbone, ViTRegConfig, ViTRegForImageClassification, ViTRegModel
from hf_vitreg.hub.card import CardFacts
from hf_vitreg.hub.export import check_model_repository, write_model_repository


TOLERANCE = 1e-5
COMMON = {"image_size": 20, "patch_size": 4, "num_register_tokens": 0}
NO_REGISTERS = {**COMMON, "interpolate_antialias": False, "interpolate_offset": 0.1}
SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 1, "mlp_ratio": 2.5, "use_mask_token": True}
DEIT = {**COMMON, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 80}
ROPE = {
    **COMMON,
    "num_hidden_layers": 2,
    "num_register_tokens": 3,
    "use_mask_token": True,
    "position_embedding_type": "rope",
    "layer_norm_eps": 1e-5,
}
# what a user writes into config.json
CONFIGS = {
    "dino": {
        **NO_REGISTERS,
        **{"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 0.46875},
        "layerscale_value": None,
    },
    "dinov2": {**NO_REGISTERS, **SMALL},
    "dinov2_reg4": {**COMMON, **SMALL, "num_register_tokens": 3, "use_swiglu_ffn": True},
    "dinov3": {**ROPE, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 80, "key_bias": False},
    "dinov3_swiglu": {
        **ROPE,
        **{"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128, "use_swiglu_ffn": True},
        **{"qkv_bias": False, "final_norm": "untied"},
    },
    "deit3": {
        **DEIT,
        **{"position_embedding_type": "patches", "classifier_layout": "cls", "interpolate_antialias": False},
        "num_labels": 13,
    },
    "deit_distilled": {
        **DEIT,
        **{"use_distillation_token": True, "position_embedding_type": "prefix_patches", "layerscale_value": None},
        **{"classifier_layout": "cls_distillation", "num_labels": 11},
    },
}
CLASSIFIERS = ["deit3", "deit_distilled"]
MODEL_CLASSES = [ViTRegModel, ViTRegBackbone, ViTRegForImageClassification]


def folder_with(path, name, file="model.safetensors", state=None, **options):
    """A folder with the weights of a fixture, or others, as its repository publishes them."""
    ViTRegConfig(**{**CONFIGS[name], **options}).save_pretrained(path)
    state = load(name)[0] if state is None else state
    (save_file if file == "model.safetensors" else torch.save)(state, path / file)
    return path


def classifier_keys(name):
    heads = {"deit3": ["classifier"], "deit_distilled": ["classifier", "distillation_classifier"]}
    return {f"{head}.{param}" for head in heads.get(name, []) for param in ("weight", "bias")}


@torch.no_grad()
def check_outputs(model, name):
    """The outputs are those of the original code, of whatever class the model is."""
    _, inputs, outputs = load(name)
    num_prefix_tokens = model.config.num_prefix_tokens
    for size in [key.removeprefix("tokens/") for key in outputs if key.startswith("tokens/")]:
        expected = outputs[f"tokens/{size}"]
        if isinstance(model, ViTRegBackbone):
            [feature_map] = model(inputs[size]).feature_maps
            found, expected = feature_map.flatten(2).mT, expected[:, num_prefix_tokens:]
        else:
            found = model.base_model(inputs[size]).last_hidden_state
        assert relative_error(found, expected) < TOLERANCE, (name, size)
    if isinstance(model, ViTRegForImageClassification) and name in CLASSIFIERS:
        assert relative_error(model(inputs["20x20"]).logits, outputs["logits/20x20"]) < TOLERANCE


# Loading


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_those_of_the_original_code(tmp_path, name, file):
    folder = folder_with(tmp_path, name, file)
    for model_class in MODEL_CLASSES:
        model, info = model_class.from_pretrained(folder, output_loading_info=True)
        has_classifier = model_class is ViTRegForImageClassification
        if name in CLASSIFIERS and not has_classifier:
            assert info.pop("unexpected_keys") == classifier_keys(name)
        if name not in CLASSIFIERS and has_classifier:
            assert info.pop("missing_keys") == {"classifier.weight", "classifier.bias"}
        assert not any(info.values()), (model_class, info)
        check_outputs(model, name)


def test_auto_classes_load_them_too(tmp_path):
    folder = folder_with(tmp_path, "deit3")
    check_outputs(AutoModel.from_pretrained(folder), "deit3")
    check_outputs(AutoModelForImageClassification.from_pretrained(folder), "deit3")


def test_periods_are_kept_bit_for_bit_in_a_model_in_half_precision(tmp_path):
    model = ViTRegModel.from_pretrained(folder_with(tmp_path, "dinov3"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.encoder.rotary_embeddings.periods, load("dinov3")[0]["rope_embed.periods"])


def test_masked_biases_of_keys_are_zero_where_the_model_has_them(tmp_path):
    model, info = ViTRegModel.from_pretrained(folder_with(tmp_path, "dinov3", key_bias=True), output_loading_info=True)
    assert not any(info.values())
    assert not model.encoder.layer[1].attention.k_proj.bias.any()
    check_outputs(model, "dinov3")


def test_biases_of_keys_without_a_mask_are_not_dropped_unseen(tmp_path):
    state = {name: tensor for name, tensor in load("dinov3")[0].items() if not name.endswith("bias_mask")}
    _, info = ViTRegModel.from_pretrained(folder_with(tmp_path, "dinov3", state=state), output_loading_info=True)
    assert info["unexpected_keys"] == {f"encoder.layer.{layer}.attention.k_proj.bias" for layer in range(2)}


@pytest.mark.parametrize("change", [{"blocks.1.attn.qkv.bias_mask": torch.nan}, {"blocks.1.attn.qkv.bias": None}])
def test_masks_of_a_model_that_was_never_initialized_are_an_error(tmp_path, change):
    state = load("dinov3")[0]
    [(name, value)] = change.items()
    state[name] = state[name] * value if value else None
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        ViTRegModel.from_pretrained(folder_with(tmp_path, "dinov3", state=state))


def test_what_the_model_has_no_place_for_is_reported(tmp_path):
    _, info = ViTRegModel.from_pretrained(
        folder_with(tmp_path, "dinov2_reg4", use_mask_token=False), output_loading_info=True
    )
    assert info["unexpected_keys"] == {"embeddings.mask_token"} and not info["missing_keys"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_our_own_stay_as_they_are(variant):
    model_classes = [ViTRegModel, ViTRegForImageClassification]
    for model_class in model_classes + [ViTRegBackbone] * (VARIANTS[variant].get("final_norm") != "pooled"):
        with torch.device("meta"):
            model = model_class(tiny_config(use_mask_token=True, **VARIANTS[variant]))
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
        for name in model.state_dict():
            assert rename_source_key(name, renamings, converters) == (name, None)
        assert not any(entry.was_used() for entry in mapping)


# Saving


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("options", [{}, {"save_original_format": True}])
def test_what_is_saved_has_names_of_our_own(tmp_path, model_class, options):
    loaded = model_class.from_pretrained(folder_with(tmp_path / "original", "dinov3"))
    new = randomize(model_class(loaded.config))
    for model in (loaded, new):
        model.save_pretrained(tmp_path / "saved", **options)
        saved = load_file(tmp_path / "saved" / "model.safetensors")
        state = model.state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[name], state[name]) for name in saved)


def test_a_model_that_a_vitreg_is_a_part_of_keeps_its_names_too(tmp_path):
    vision = ViTRegModel.from_pretrained(folder_with(tmp_path / "original", "dinov2"))
    text = CLIPTextModel(CLIPTextConfig(vocab_size=31, hidden_size=24, intermediate_size=40, num_hidden_layers=1))
    model = VisionTextDualEncoderModel(vision_model=vision, text_model=text)
    model.save_pretrained(tmp_path / "dual")
    assert load_file(tmp_path / "dual" / "model.safetensors").keys() >= {
        f"vision_model.{name}" for name in vision.state_dict()
    }
    again, info = VisionTextDualEncoderModel.from_pretrained(tmp_path / "dual", output_loading_info=True)
    assert not any(info.values()), info
    check_outputs(again.vision_model, "dinov2")


READER = """
import sys

sys.modules["hf_vitreg"] = None  # the name cannot be imported, installed or not
import torch
from transformers import AutoModel

inputs, outputs, *folders = sys.argv[1:]
pixel_values = torch.load(inputs)
with torch.no_grad():
    tokens = {
        folder: AutoModel.from_pretrained(folder, trust_remote_code=True)(pixel_values).last_hidden_state
        for folder in folders
    }
torch.save(tokens, outputs)
"""


def read_without_the_package(folders, pixel_values, home):
    """All tokens from every folder in a process that cannot import hf_vitreg."""
    torch.save(pixel_values, home / "inputs")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", READER, home / "inputs", home / "outputs", *folders]
    done = subprocess.run(
        list(map(str, arguments)), env=environment, cwd=home, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return torch.load(home / "outputs")


def test_what_is_saved_is_the_model_where_this_package_is_absent(tmp_path):
    _, inputs, outputs = load("dinov3")
    original = folder_with(tmp_path / "original", "dinov3")
    model = ViTRegModel.from_pretrained(original)
    folders = [tmp_path / name for name in ("saved", "original_format", "repository")]
    model.save_pretrained(folders[0])
    model.save_pretrained(folders[1], save_original_format=True)
    write_model_repository(folders[2], model, BitImageProcessor(), CardFacts(name="vitreg", license="unknown"))
    check_model_repository(folders[2])
    # as if the names of the source were written back: with the code beside them, that process cannot see it
    for file in ("configuration_vitreg.py", "modeling_vitreg.py"):
        shutil.copy(folders[0] / file, original)
    tokens = read_without_the_package([*folders, original], inputs["16x28"], tmp_path)
    for folder in folders:
        assert relative_error(tokens[str(folder)], outputs["tokens/16x28"]) < TOLERANCE, folder
    assert relative_error(tokens[str(original)], outputs["tokens/16x28"]) > 0.1
