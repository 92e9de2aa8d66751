# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""ViTReg models as transformers' own DINOv2, with registers and without."""

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from reference import randomize
from safetensors.torch import load_file, save_file
from test_conversion_checkpoints import linear_head, original_checkpoint, published_checkpoint
from test_conversion_to_dinov2 import REFUSED, SMALL, assert_same_bits, vitreg_folder
from test_conversion_transformers import LABELS, save, tiny_model
from test_convert import MEASURED, SCRIPT, run_script
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessor,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)
from typer.testing import CliRunner

from conversion import to_transformers
from conversion.convert import app
from conversion.family import ConversionError
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel


WEIGHTS = "model.safetensors"


def run(*arguments, command="to-transformers", exit_code=0):
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_classifier", "registers", "registers_classifier"])
def test_there_and_back_is_the_same_folder_to_the_last_bit(tmp_path, kind):
    save(tmp_path / "given", kind)
    BitImageProcessor(size={"shortest_edge": 24}, crop_size=20).save_pretrained(tmp_path / "given")
    run(tmp_path / "given", tmp_path / "vitreg", command="transformers")
    result = run(tmp_path / "vitreg", tmp_path / "out")
    assert "Against transformers" in result.output and "Left aside: nothing." in result.output
    # the very names that save_pretrained writes today
    assert_same_bits(load_file(tmp_path / "out" / WEIGHTS), load_file(tmp_path / "given" / WEIGHTS))
    given, out = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("given", "out"))
    assert out == given
    processors = [json.loads((tmp_path / name / "preprocessor_config.json").read_text()) for name in ("given", "out")]
    assert processors[0] == processors[1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {WEIGHTS, "config.json", "preprocessor_config.json"}
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


# 64 wide and two and three times that, for the ratio of transformers is an integer
FROM_THE_ORIGINAL = {
    "registers": {"num_registers": 3},
    "no registers": {},
    "SwiGLU": {"num_registers": 3, "swiglu": True, "intermediate_size": 88},
    "no registers, SwiGLU": {"swiglu": True, "intermediate_size": 88},
}


@pytest.mark.parametrize("variant", FROM_THE_ORIGINAL)
def test_from_the_original_to_transformers_and_back_is_the_same_file_to_the_last_bit(tmp_path, variant):
    sizes = {"hidden_size": 64, "num_layers": 4, "intermediate_size": 192, "side": 5, **FROM_THE_ORIGINAL[variant]}
    tensors = original_checkpoint(**sizes)
    run(vitreg_folder(tmp_path, tensors), tmp_path / "there")
    has_registers = "num_registers" in sizes
    assert type(AutoModel.from_pretrained(tmp_path / "there")) is (
        Dinov2WithRegistersModel if has_registers else Dinov2Model
    )
    # what transformers does at other sizes is not what the original without registers does
    options = [] if has_registers else ["--interpolate-offset", "0.1"]
    run(tmp_path / "there", tmp_path / "back", *options, command="transformers")
    run(tmp_path / "back", tmp_path / "back.pth", command="to-dinov2")
    assert_same_bits(torch.load(tmp_path / "back.pth"), tensors)


PLAIN = """
import sys

sys.modules["hf_vitreg"] = None  # the name cannot be imported, installed or not
import torch
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

folder, outputs = sys.argv[1:]
pixel_values = torch.linspace(-2, 2, 3 * 12 * 28).view(1, 3, 12, 28)
classifier, report = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
assert not any(report.values()), report
assert AutoImageProcessor.from_pretrained(folder).crop_size["height"] == 20
with torch.no_grad():
    logits = classifier(pixel_values).logits
    tokens = AutoModel.from_pretrained(folder)(pixel_values).last_hidden_state
    # AutoBackbone.from_pretrained itself takes repositories of the Hub and no folders
    backbone_class = type(AutoBackbone.from_config(AutoConfig.from_pretrained(folder)))
    [feature_map] = backbone_class.from_pretrained(folder, out_indices=[2])(pixel_values).feature_maps
torch.save([tokens, logits, feature_map, classifier.config.id2label, type(classifier).__name__], outputs)
"""


@torch.inference_mode()
def test_plain_transformers_loads_it_where_hf_vitreg_cannot_be_imported(tmp_path):
    model = save(tmp_path / "given", "registers_classifier").eval()
    BitImageProcessor(size={"shortest_edge": 24}, crop_size=20).save_pretrained(tmp_path / "given")
    run(tmp_path / "given", tmp_path / "vitreg", command="transformers")
    run(tmp_path / "vitreg", tmp_path / "out")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", PLAIN, str(tmp_path / "out"), str(tmp_path / "outputs")]
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tokens, logits, feature_map, id2label, name = torch.load(tmp_path / "outputs")
    ours = ViTRegForImageClassification.from_pretrained(tmp_path / "vitreg")
    pixel_values = torch.linspace(-2, 2, 3 * 12 * 28).view(1, 3, 12, 28)
    expected = ours.vitreg(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(tokens, expected.last_hidden_state)
    torch.testing.assert_close(logits, ours(pixel_values).logits)
    torch.testing.assert_close(logits, model(pixel_values).logits)
    patches = ours.vitreg._final_norm(expected.hidden_states[2])[:, ours.config.num_prefix_tokens :]
    torch.testing.assert_close(feature_map.flatten(2).mT, patches)
    assert id2label == dict(enumerate(LABELS)) and name == "Dinov2WithRegistersForImageClassification"


def test_linear_heads_of_the_original_become_classifiers(tmp_path):
    torch.save(linear_head(11, 128), tmp_path / "head.pth")
    tensors = original_checkpoint(hidden_size=64, num_layers=4, intermediate_size=128, side=5)
    folder = vitreg_folder(tmp_path, tensors, linear_head=str(tmp_path / "head.pth"))
    run(folder, tmp_path / "out")
    model = Dinov2ForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(model.classifier.weight, linear_head(11, 128)["weight"])
    pixel_values = torch.randn(2, 3, 70, 70)
    expected = ViTRegForImageClassification.from_pretrained(folder)(pixel_values).logits
    torch.testing.assert_close(model(pixel_values).logits, expected)


def vitreg(folder, model_class=ViTRegModel, **changes):
    """A small model that transformers can hold, with these changes."""
    config = ViTRegConfig(**{**SMALL, "use_mask_token": True, "num_labels": 11, **changes})
    model = randomize(model_class(config))
    model.save_pretrained(folder)
    return model


def test_a_model_without_a_mask_token_gets_zeros_and_is_told(tmp_path):
    vitreg(tmp_path / "vitreg", use_mask_token=False)
    result = run(tmp_path / "vitreg", tmp_path / "out")
    assert "embeddings.mask_token is written as zeros" in result.output
    assert "has no image processor, so none is written" in result.output
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    mask_token = load_file(tmp_path / "out" / WEIGHTS)["embeddings.mask_token"]
    assert mask_token.shape == (1, 48) and not mask_token.any()


def test_an_offset_is_written_with_a_clear_word_and_compared_where_it_says_the_same(tmp_path):
    changes = {"num_register_tokens": 0, "interpolate_antialias": False, "interpolate_offset": 0.1}
    model = vitreg(tmp_path / "vitreg", **changes)
    result = run(tmp_path / "vitreg", tmp_path / "out")
    assert "The outputs are the same at 35x35 pixels only, where they were compared" in result.output
    assert result.output.count("tokens │") == 1
    theirs = AutoModel.from_pretrained(tmp_path / "out")
    for size, is_same in ((35, True), (49, False)):
        pixel_values = torch.randn(1, 3, size, size)
        tokens = [each(pixel_values).last_hidden_state for each in (model, theirs)]
        assert torch.allclose(*tokens, atol=1e-4) is is_same


def test_a_schedule_that_transformers_has_not_is_named(tmp_path):
    vitreg(tmp_path / "vitreg", drop_path_rate=0.2, drop_path_schedule="linear")
    assert "drop_path_schedule='linear' is not kept" in run(tmp_path / "vitreg", tmp_path / "out").output


def test_half_precision_and_shards_are_kept_and_joined(tmp_path):
    model = vitreg(tmp_path / "whole").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "vitreg", max_shard_size="50KB")
    assert len(list((tmp_path / "vitreg").glob("*.safetensors"))) > 2
    run(tmp_path / "vitreg", tmp_path / "out")
    theirs = AutoModel.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.embeddings.register_tokens, model.embeddings.register_tokens)


REFUSED_BY_TRANSFORMERS = {
    "antialias without registers": (
        {"num_register_tokens": 0},
        "interpolate_antialias=True: DINOv2 in transformers does not antialias position embeddings",
    ),
    "no antialias with registers": (
        {"interpolate_antialias": False},
        "interpolate_antialias=False: DINOv2 with registers in transformers antialiases position embeddings",
    ),
    "offset with registers": ({"interpolate_offset": 0.1}, "interpolate_offset=0.1: .* interpolates .* to a size"),
    "width of the MLP": (
        {"mlp_ratio": 2.5},
        r"intermediate_size=120: in transformers it is an integer times hidden_size \(48\)$",
    ),
    "width of SwiGLU": (
        {"use_swiglu_ffn": True, "intermediate_size": 72},
        r"intermediate_size=72: .* times hidden_size \(48\), of which two thirds are taken and rounded up to a mult",
    ),
}


@pytest.mark.parametrize("case", REFUSED | REFUSED_BY_TRANSFORMERS)
def test_what_transformers_cannot_hold_is_refused_with_the_reason(case):
    changes, expected = (REFUSED | REFUSED_BY_TRANSFORMERS)[case]
    expected = expected.replace("the original DINOv2", "DINOv2 with registers in transformers")
    config = ViTRegConfig.from_dict(ViTRegConfig(**{**SMALL, **changes}).to_dict())
    with pytest.raises(ConversionError, match=expected):
        to_transformers.their_config(config, ViTRegModel)


@pytest.mark.parametrize("layout", ["cls", "last4_cls_mean", "pooled"])
def test_classifiers_that_read_something_else_are_refused(tmp_path, layout):
    vitreg(tmp_path / "vitreg", ViTRegForImageClassification, classifier_layout=layout)
    result = run(tmp_path / "vitreg", tmp_path / "out", exit_code=1)
    assert f"classifier_layout='{layout}': in transformers the classifier reads CLS and the mean" in result.stderr
    assert not (tmp_path / "out").exists()
    # the way out that the message tells
    ViTRegModel.from_pretrained(tmp_path / "vitreg").save_pretrained(tmp_path / "alone")
    run(tmp_path / "alone", tmp_path / "out")


@pytest.mark.parametrize("use_swiglu_ffn", [False, True])
def test_every_ratio_of_transformers_is_found(use_swiglu_ffn):
    for ratio in range(1, 9):
        config = ViTRegConfig(hidden_size=48, num_attention_heads=3, mlp_ratio=ratio, use_swiglu_ffn=use_swiglu_ffn)
        theirs = to_transformers.their_config(config, ViTRegModel)
        assert theirs.mlp_ratio == ratio and type(theirs.mlp_ratio) is int


def test_bad_input_and_folders_that_are_in_the_way(tmp_path):
    vitreg(tmp_path / "vitreg")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.txt").write_text("old")
    save(tmp_path / "theirs", "registers")
    cut = tmp_path / "cut"
    vitreg(cut)
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:-100])
    part = tmp_path / "part"
    vitreg(part)
    tensors = load_file(part / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if name != "layernorm.bias"}, part / WEIGHTS)
    cases = {
        (tmp_path / "vitreg", tmp_path / "full"): "is not empty",
        (tmp_path / "vitreg", tmp_path, "--overwrite"): "which replacing it would delete",
        (tmp_path / "theirs", tmp_path / "out"): "a model of type 'dinov2_with_registers', not 'vitreg'",
        (cut, tmp_path / "out"): "is cut short or damaged",
        (part, tmp_path / "out"): "1 tensors are missing: layernorm.bias",
        (tmp_path / "none", tmp_path / "out"): "Give the folder of a ViTReg model",
    }
    for arguments, message in cases.items():
        result = run(*arguments, exit_code=1)
        assert message in result.stderr and "Traceback" not in result.output, result.stderr
        assert not (tmp_path / "out").exists()
    run(tmp_path / "vitreg", tmp_path / "full", "--overwrite")
    assert {path.name for path in (tmp_path / "full").iterdir()} == {WEIGHTS, "config.json"}


def test_what_is_not_the_same_model_is_not_left_on_the_disk(tmp_path, monkeypatch):
    vitreg(tmp_path / "vitreg")
    right = to_transformers.restore

    def with_registers_exchanged(tensors, rules):
        return {
            name: tensor.flip(1) if "register" in name else tensor for name, tensor in right(tensors, rules).items()
        }

    with monkeypatch.context() as patch:
        patch.setattr(to_transformers, "restore", with_registers_exchanged)
        result = run(tmp_path / "vitreg", tmp_path / "out", exit_code=1)
    assert "What was written is not what was given: embeddings.register_tokens." in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["vitreg"]
    right_config = to_transformers.their_config

    def with_another_epsilon(config, model_class):
        theirs = right_config(config, model_class)
        theirs.layer_norm_eps = 0.1
        return theirs

    monkeypatch.setattr(to_transformers, "their_config", with_another_epsilon)
    result = run(tmp_path / "vitreg", tmp_path / "out", exit_code=1)
    assert "The converted model is not the same as transformers" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["vitreg"]


def test_the_processor_is_the_given_one(tmp_path):
    vitreg(tmp_path / "vitreg")
    BitImageProcessor(size={"shortest_edge": 40}, crop_size=35, image_std=[0.2, 0.3, 0.4]).save_pretrained(
        tmp_path / "vitreg"
    )
    run(tmp_path / "vitreg", tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_std) == [0.2, 0.3, 0.4] and processor.size["shortest_edge"] == 40


def test_the_licence_travels(tmp_path):
    save(tmp_path / "given", "registers")
    (tmp_path / "given" / "README.md").write_text("---\nlicense: mit\n---\n")
    run(tmp_path / "given", tmp_path / "vitreg", command="transformers")
    run(tmp_path / "vitreg", tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"


def test_the_names_are_those_of_every_transformers_model_of_this_kind():
    """Of the classifier too, without a way through any file."""
    model = tiny_model("registers_classifier")
    assert isinstance(model, Dinov2WithRegistersForImageClassification)
    assert all(name.startswith(("dinov2_with_registers.", "classifier.")) for name in model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vits14", "vits14_reg4", "vitb14_reg4"])
def test_published_sizes_agree_and_stay_within_their_memory(tmp_path, name):
    torch.save(published_checkpoint(name), tmp_path / "a.pth")
    run(tmp_path / "a.pth", tmp_path / "vitreg", command="dinov2")
    done = run_script("-c", MEASURED, SCRIPT, "to-transformers", tmp_path / "vitreg", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size, peak = (tmp_path / "a.pth").stat().st_size, int(done.stdout.rsplit("peak: ")[1])
    assert peak < 1.3 * size + 1e9, f"{peak / 1e9:.2f} GB for a checkpoint of {size / 1e9:.2f} GB"
    given = load_file(tmp_path / "vitreg" / WEIGHTS)
    state = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    state = {each.replace("layer_scale", "residual"): tensor for each, tensor in state.items()}
    assert_same_bits(state, given)
