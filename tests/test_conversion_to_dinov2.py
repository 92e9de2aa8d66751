# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""ViTReg models in the layout of the original DINOv2."""

import re

import pytest
import torch
from original_outputs import assert_close, load
from safetensors.torch import load_file
from test_conversion_checkpoints import TINY, linear_head, original_checkpoint, published_checkpoint, training_part
from test_convert import MEASURED, SCRIPT, run_script
from typer.testing import CliRunner

from conversion import dinov2, to_dinov2
from conversion.convert import app
from conversion.family import ConversionError
from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.atomic import atomic_file


SWIGLU = {**TINY, "swiglu": True, "hidden_size": 128}
CHECKPOINTS = {
    "registers": original_checkpoint(**TINY),
    "no registers": original_checkpoint(**{**TINY, "num_registers": 0}),
    "SwiGLU": original_checkpoint(**SWIGLU),
    "no registers, SwiGLU": original_checkpoint(**{**SWIGLU, "num_registers": 0}),
    "without biases of queries, keys and values": {
        name: tensor for name, tensor in original_checkpoint(**TINY).items() if not name.endswith("qkv.bias")
    },
    "bfloat16": {name: tensor.bfloat16() for name, tensor in original_checkpoint(**TINY).items()},
}


def run(*arguments, command="to-dinov2", exit_code=0):
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


def vitreg_folder(tmp_path, content, **options):
    """What the conversion from the original makes."""
    torch.save(content, tmp_path / "original.pth")
    prepared = dinov2.prepare(str(tmp_path / "original.pth"), **options)
    prepared.model.save_pretrained(tmp_path / "vitreg", save_original_format=False)
    return tmp_path / "vitreg"


def assert_same_bits(written, given):
    assert written.keys() == given.keys()
    for name, tensor in given.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name


@pytest.mark.parametrize("variant", CHECKPOINTS)
def test_there_and_back_is_the_same_file_to_the_last_bit(tmp_path, variant):
    tensors = CHECKPOINTS[variant]
    result = run(vitreg_folder(tmp_path, tensors), tmp_path / "out.pth")
    assert "Against timm" in result.output and "Left aside: nothing." in result.output
    assert_same_bits(torch.load(tmp_path / "out.pth"), tensors)
    # tensors and their names, and no more of the files that they were mapped from
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "out.pth").stat().st_size < num_bytes + 400 * len(tensors)
    assert {path.name for path in tmp_path.iterdir()} == {"original.pth", "vitreg", "out.pth"}


@pytest.mark.parametrize("name", ["dinov2", "dinov2_reg4"])
@torch.inference_mode()
def test_the_original_code_computes_what_this_model_computes(tmp_path, name):
    """By its state dicts, which the class that wrote them loads strictly, and by its numbers."""
    state, images, outputs = load(name)
    folder = vitreg_folder(tmp_path, state)
    written = to_dinov2.write(str(folder), tmp_path / "out.pth")
    assert_same_bits(torch.load(tmp_path / "out.pth"), state)
    for size, pixel_values in images.items():
        assert_close(written.implementation(pixel_values)["tokens"], outputs[f"tokens/{size}"])
        assert_close(written.reference(pixel_values)["tokens"], outputs[f"tokens/{size}"])


def constructor_arguments(output):
    text = re.search(r"DinoVisionTransformer\((.*)\)", output)[1]
    return eval(f"dict({text})")


def test_the_arguments_of_the_constructor_are_said(tmp_path):
    arguments = constructor_arguments(run(vitreg_folder(tmp_path, CHECKPOINTS["SwiGLU"]), tmp_path / "a.pth").output)
    assert arguments == {
        "img_size": 70,
        "patch_size": 14,
        "in_chans": 3,
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 2,
        "mlp_ratio": 1.5 * 88 / 128,
        "qkv_bias": True,
        "init_values": 1.0,
        "ffn_layer": "swiglufused",
        "block_chunks": 0,
        "num_register_tokens": 3,
        "interpolate_antialias": True,
        "interpolate_offset": 0.0,
    }


@pytest.mark.parametrize("use_swiglu_ffn", [True, False])
def test_the_ratio_gives_the_width_by_the_rule_of_the_original(use_swiglu_ffn):
    """mlp_ratio times the width, cut; SwiGLU takes two thirds, cut, and rounds up to a multiple of 8."""
    for hidden_size in range(64, 2048, 192):
        for intermediate_size in range(8, 3 * hidden_size, 104):
            config = ViTRegConfig(
                hidden_size=hidden_size, intermediate_size=intermediate_size, use_swiglu_ffn=use_swiglu_ffn
            )
            width = int(hidden_size * to_dinov2._mlp_ratio(config))
            if use_swiglu_ffn:
                width = (int(width * 2 / 3) + 7) // 8 * 8
            assert width == intermediate_size, (hidden_size, intermediate_size)


def test_a_model_without_a_mask_token_gets_zeros_and_is_told(tmp_path):
    tensors = {name: tensor for name, tensor in CHECKPOINTS["registers"].items() if name != "mask_token"}
    result = run(vitreg_folder(tmp_path, tensors), tmp_path / "out.pth")
    assert "mask_token is written as zeros" in result.output
    assert_same_bits(torch.load(tmp_path / "out.pth"), tensors | {"mask_token": torch.zeros(1, 64)})


def test_heads_make_a_teacher_checkpoint_in_the_spelling_of_the_original(tmp_path):
    teacher = training_part(CHECKPOINTS["registers"])
    torch.save({"teacher": teacher, "iteration": 7}, tmp_path / "original.pth")
    run(tmp_path / "original.pth", tmp_path / "vitreg", command="dinov2")
    alone = run(tmp_path / "vitreg", tmp_path / "alone.pth")
    assert "Left aside: pretraining_heads.safetensors." in alone.output
    assert_same_bits(torch.load(tmp_path / "alone.pth"), CHECKPOINTS["registers"])
    result = run(tmp_path / "vitreg", tmp_path / "whole.pth", "--with-heads")
    assert "a teacher checkpoint of DINOv2, 72 tensors" in result.output
    content = torch.load(tmp_path / "whole.pth")
    assert content.keys() == {"teacher"}
    assert_same_bits(content["teacher"], teacher)
    # and in again
    run(tmp_path / "whole.pth", tmp_path / "back", command="dinov2")
    heads = [load_file(tmp_path / name / "pretraining_heads.safetensors") for name in ("vitreg", "back")]
    assert_same_bits(*heads)


def test_heads_that_are_not_there(tmp_path):
    folder = vitreg_folder(tmp_path, CHECKPOINTS["registers"])
    result = run(folder, tmp_path / "out.pth", "--with-heads", exit_code=1)
    assert "has no pretraining_heads.safetensors" in result.stderr and "Leave --with-heads out" in result.stderr
    assert not (tmp_path / "out.pth").exists()


def test_a_classifier_is_left_aside_by_name(tmp_path):
    torch.save(linear_head(11, 128), tmp_path / "head.pth")
    folder = vitreg_folder(tmp_path, CHECKPOINTS["registers"], linear_head=str(tmp_path / "head.pth"))
    result = run(folder, tmp_path / "out.pth")
    assert "Left aside: classifier.weight, classifier.bias." in result.output
    assert_same_bits(torch.load(tmp_path / "out.pth"), CHECKPOINTS["registers"])


SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "patch_size": 7,
    "image_size": 35,
    "num_register_tokens": 2,
}
# What the options are changed to, and what the message says.
REFUSED = {
    "rotation": (
        {"position_embedding_type": "rope"},
        "position_embedding_type='rope': in the original DINOv2 CLS and",
    ),
    "positions of the patches": ({"position_embedding_type": "patches"}, "position_embedding_type='patches'"),
    "positions of registers": ({"position_embedding_type": "prefix_patches"}, "no other token"),
    "no CLS": (
        {
            "use_cls_token": False,
            "pooler_type": "mean",
            "position_embedding_type": "patches",
            "classifier_layout": "pooled",
        },
        "use_cls_token=False: in the original DINOv2 there is a CLS token",
    ),
    "distillation": ({"use_distillation_token": True}, "there is no distillation token"),
    "norm before the layers": ({"use_pre_layernorm": True}, "nothing is normed before the first layer"),
    "untied norm": ({"final_norm": "untied"}, "final_norm='untied'"),
    "no norm": ({"final_norm": "none"}, "final_norm='none'"),
    "normed pool": ({"final_norm": "pooled", "classifier_layout": "pooled"}, "final_norm='pooled'"),
    "mean": ({"pooler_type": "mean"}, "pooler_type='mean': in the original DINOv2 the pooled output is CLS"),
    "attention pooling": ({"pooler_type": "map", "classifier_layout": "pooled"}, "pooler_type='map'"),
    "no LayerScale": ({"layerscale_value": None}, "layerscale_value=None: the original DINOv2 has LayerScale"),
    "patches without bias": ({"patch_bias": False}, "patch_bias=False"),
    "projection without bias": ({"proj_bias": False}, "proj_bias=False"),
    "MLP without bias": ({"mlp_bias": False}, "mlp_bias=False"),
    "keys without bias": ({"key_bias": False}, "key_bias=False: in the original DINOv2 queries, keys and values all"),
    "normed queries": ({"use_qk_norm": True}, "use_qk_norm=True"),
    "projected": ({"projection_dim": 5}, "projection_dim=5"),
    "test-time registers": (
        {"num_register_tokens": 1, "num_test_time_registers": 1, "register_neurons": {1: [3]}},
        "num_test_time_registers=1: in the original DINOv2 every register is trained",
    ),
    "not square": ({"image_size": (35, 21)}, r"image_size=.35, 21.: the original DINOv2 takes position embeddings"),
}
REFUSED_BY_THE_ORIGINAL = {
    "epsilon": ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05: in the original DINOv2 it is 1e-06"),
    "activation": ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
    "width of SwiGLU": (
        {"use_swiglu_ffn": True, "intermediate_size": 52},
        "intermediate_size=52: in the original DINOv2 that of SwiGLU is a multiple of 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED | REFUSED_BY_THE_ORIGINAL)
def test_what_the_original_cannot_be_is_refused_with_the_reason(tmp_path, case):
    changes, expected = (REFUSED | REFUSED_BY_THE_ORIGINAL)[case]
    ViTRegModel(ViTRegConfig(**{**SMALL, **changes})).save_pretrained(tmp_path / "vitreg")
    with pytest.raises(ConversionError, match=expected):
        to_dinov2.write(str(tmp_path / "vitreg"), tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_all_reasons_come_together(tmp_path):
    changes = {"patch_bias": False, "layerscale_value": None, "layer_norm_eps": 1e-5}
    ViTRegModel(ViTRegConfig(**{**SMALL, **changes})).save_pretrained(tmp_path / "vitreg")
    result = run(tmp_path / "vitreg", tmp_path / "out.pth", exit_code=1)
    assert result.stderr.startswith("Error: The model cannot be written as the original DINOv2.")
    assert all(name in result.stderr for name in changes)


def test_bad_input_and_outputs_that_are_in_the_way(tmp_path):
    folder = vitreg_folder(tmp_path, CHECKPOINTS["registers"])
    (tmp_path / "old.pth").write_text("old")
    (tmp_path / "empty").mkdir()
    cases = {
        (folder, tmp_path / "old.pth"): "old.pth exists",
        (folder, tmp_path / "empty"): "is a folder",
        (folder, folder / "model.safetensors", "--overwrite"): "is a part of what is converted",
        (tmp_path / "empty", tmp_path / "out.pth"): "has no config.json",
        (tmp_path / "original.pth", tmp_path / "out.pth"): "is a file. Give the folder of a ViTReg model",
    }
    for arguments, message in cases.items():
        result = run(*arguments, exit_code=1)
        assert message in result.stderr and "Traceback" not in result.output, result.stderr
        assert not (tmp_path / "out.pth").exists()
    assert (tmp_path / "old.pth").read_text() == "old"
    run(folder, tmp_path / "old.pth", "--overwrite")
    assert_same_bits(torch.load(tmp_path / "old.pth"), CHECKPOINTS["registers"])


def test_what_is_not_the_same_model_is_not_left_on_the_disk(tmp_path, monkeypatch):
    folder = vitreg_folder(tmp_path, CHECKPOINTS["registers"])
    before = sorted(tmp_path.iterdir())
    right = to_dinov2.restore

    def with_queries_and_keys_exchanged(tensors, rules):
        return {
            name: torch.cat([*tensor.chunk(3)[1::-1], tensor.chunk(3)[2]]) if "qkv" in name else tensor
            for name, tensor in right(tensors, rules).items()
        }

    monkeypatch.setattr(to_dinov2, "restore", with_queries_and_keys_exchanged)
    result = run(folder, tmp_path / "out.pth", exit_code=1)
    assert "What was written is not what was given: encoder.layer" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    folder = vitreg_folder(tmp_path, CHECKPOINTS["registers"] | {"norm.bias": torch.full([64], torch.nan)})
    result = run(folder, tmp_path / "out.pth", exit_code=1)
    assert "the weights are not finite" in result.stderr
    assert not (tmp_path / "out.pth").exists()


def test_an_interrupt_leaves_the_old_file(tmp_path):
    (tmp_path / "old.pth").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "old.pth") as file:
        file.write_text("half")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["old.pth"]
    assert (tmp_path / "old.pth").read_text() == "old"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vits14", "vits14_reg4", "vitb14_reg4"])
def test_published_sizes_go_there_and_back_within_their_memory(tmp_path, name):
    tensors = published_checkpoint(name)
    torch.save(tensors, tmp_path / "a.pth")
    run(tmp_path / "a.pth", tmp_path / "vitreg", command="dinov2")
    done = run_script("-c", MEASURED, SCRIPT, "to-dinov2", tmp_path / "vitreg", tmp_path / "out.pth", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size, peak = (tmp_path / "a.pth").stat().st_size, int(done.stdout.rsplit("peak: ")[1])
    assert peak < 1.3 * size + 1e9, f"{peak / 1e9:.2f} GB for a checkpoint of {size / 1e9:.2f} GB"
    assert_same_bits(torch.load(tmp_path / "out.pth"), tensors)
