# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The command from end to end: what it writes, what it says, and when it writes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from test_conversion_checkpoints import (
    TINY,
    in_chunks,
    linear_head,
    original_checkpoint,
    published_checkpoint,
    training_part,
)
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, BitImageProcessor, pipeline
from typer.testing import CliRunner

from conversion import dinov2, parity, renaming
from conversion.convert import app
from hf_vitreg import ViTRegBackbone, ViTRegConfig, ViTRegForImageClassification, ViTRegModel
from hf_vitreg.hub.export import check_model_repository, sort_files


ROOT = Path(__file__).resolve().parents[1]
TENSORS = original_checkpoint(**TINY)


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(app, ["dinov2", *map(str, arguments)])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


@pytest.fixture
def checkpoint(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pth")
    return tmp_path / "a.pth"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A backbone and a classifier, written once and only read."""
    folder = tmp_path_factory.mktemp("folders")
    torch.save(TENSORS, folder / "a.pth")
    torch.save(linear_head(1000, 5 * 64), folder / "head.pth")
    run(folder / "a.pth", folder / "backbone")
    run(folder / "a.pth", folder / "classifier", "--linear-head", folder / "head.pth")
    return {"backbone": folder / "backbone", "classifier": folder / "classifier"}


def image():
    return Image.effect_noise((301, 263), 90).convert("RGB")


SMALL = {**TINY, "num_layers": 2}
VARIANTS = {
    "registers": original_checkpoint(**SMALL),
    "no registers": original_checkpoint(**{**SMALL, "num_registers": 0}),
    "SwiGLU": original_checkpoint(**{**SMALL, "swiglu": True, "hidden_size": 128, "side": 3}),
    "chunked": in_chunks(original_checkpoint(**SMALL), 1),
    "teacher": training_part(original_checkpoint(**SMALL), "teacher."),
    "training run": {
        "model": training_part(in_chunks(original_checkpoint(**SMALL), 1), "teacher."),
        "iteration": 7,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_backbones_agree_with_timm_and_load(tmp_path, variant):
    torch.save(VARIANTS[variant], tmp_path / "a.pth")
    result = run(tmp_path / "a.pth", tmp_path / "model")
    record = json.loads((tmp_path / "model" / "conversion.json").read_text())
    assert len(record["comparisons"]) == 5
    assert all(row["relative"] < parity.TOLERANCE for row in record["comparisons"])
    assert "Against timm" in result.output and "Traceback" not in result.output
    for part in record["left_aside"]:
        assert part in result.output
    model, loading = ViTRegModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values())
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        tensor.numel()
        for name, tensor in VARIANTS[variant].get("model", VARIANTS[variant]).items()
        if "_head." not in name
    )


@pytest.mark.parametrize("multiple, layout", [(2, "cls_mean"), (5, "last4_cls_mean")])
@pytest.mark.parametrize("num_registers", [0, 3])
def test_heads_agree_with_timm_and_load(tmp_path, multiple, layout, num_registers):
    torch.save(original_checkpoint(**{**TINY, "num_registers": num_registers}), tmp_path / "a.pth")
    torch.save(linear_head(11, multiple * 64), tmp_path / "head.pth")
    run(tmp_path / "a.pth", tmp_path / "model", "--linear-head", tmp_path / "head.pth")
    record = json.loads((tmp_path / "model" / "conversion.json").read_text())
    assert [row["output"] for row in record["comparisons"]] == ["tokens", "logits"] * 5
    assert [source["file"] for source in record["sources"]] == ["a.pth", "head.pth"]
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.classifier_layout == layout and model.config.num_labels == 11
    assert model(torch.randn(2, 3, 42, 56)).logits.shape == (2, 11)


def test_the_record_says_what_was_converted_and_how(folders):
    record = json.loads((folders["classifier"] / "conversion.json").read_text())
    assert record["arch"] == "custom" and record["left_aside"] == [] and record["tolerance"] == 1e-5
    assert record["reference"].startswith("timm ")
    assert [source["file"] for source in record["sources"]] == ["a.pth", "head.pth"]
    assert record["sources"][0]["bytes"] > 5e5 and len(record["sources"][0]["sha256"]) == 64
    assert record["sources"][0]["backbone"] == "*"
    assert record["versions"].keys() == {"hf_vitreg", "torch", "transformers", "safetensors"}
    sizes = {(row["height"], row["width"]) for row in record["comparisons"]}
    assert (70, 70) in sizes and any(height != width for height, width in sizes)
    columns = {"output", "height", "width", "max_abs_diff", "relative", "cosine"}
    assert all(row.keys() == columns for row in record["comparisons"])


def test_the_folder_is_complete_and_readable_by_others(folders):
    for folder in folders.values():
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md",
            "config.json",
            "configuration_vitreg.py",
            "conversion.json",
            "model.safetensors",
            "modeling_vitreg.py",
            "preprocessor_config.json",
        ]
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        assert auto_map == ViTRegConfig().auto_map


def test_the_folder_can_be_published_with_its_record(folders):
    for folder in folders.values():
        check_model_repository(folder)
        published, left_out = sort_files(folder)
        assert "conversion.json" in published and left_out == []
        card = ModelCard.load(folder / "README.md")
        # a file does not say under which licence its weights are, or which model of the Hub they are
        assert card.data.license == "unknown" and card.data.base_model is None
        assert "a.pth" in card.text and "timm" in card.text


def test_loads_where_hf_vitreg_is_imported(folders):
    pixel_values = torch.randn(1, 3, 42, 56)
    for folder in folders.values():
        model = AutoModel.from_pretrained(folder)
        assert type(model) is ViTRegModel
        assert torch.equal(model.embeddings.mask_token, TENSORS["mask_token"])
    classifier = ViTRegForImageClassification.from_pretrained(folders["classifier"])
    assert torch.equal(classifier.vitreg(pixel_values)[0], model(pixel_values)[0])


def test_loads_as_a_backbone(folders):
    tokens = AutoModel.from_pretrained(folders["backbone"])(torch.ones(1, 3, 42, 56)).patch_tokens
    for folder in folders.values():
        backbone, loading = ViTRegBackbone.from_pretrained(folder, out_indices=[2, 4], output_loading_info=True)
        assert not loading["missing_keys"]
        maps = backbone(torch.ones(1, 3, 42, 56)).feature_maps
        assert [tuple(feature_map.shape) for feature_map in maps] == [(1, 64, 3, 4)] * 2
        torch.testing.assert_close(maps[1].flatten(2).mT, tokens)


REMOTE = """
import sys

sys.modules["hf_vitreg"] = None  # the name cannot be imported, installed or not
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.dynamic_module_utils import get_class_from_dynamic_module

backbone, classifier, outputs = sys.argv[1:]
pixel_values = torch.linspace(-2, 2, 3 * 42 * 56).view(1, 3, 42, 56)
tokens = AutoModel.from_pretrained(backbone, trust_remote_code=True)(pixel_values).last_hidden_state
logits = AutoModelForImageClassification.from_pretrained(classifier, trust_remote_code=True)(pixel_values).logits
backbone_class = get_class_from_dynamic_module("modeling_vitreg.ViTRegBackbone", backbone)
[feature_map] = backbone_class.from_pretrained(backbone, out_indices=[4])(pixel_values).feature_maps
assert type(AutoImageProcessor.from_pretrained(backbone)).__name__.startswith("BitImageProcessor")
torch.save([tokens, logits, feature_map], outputs)
"""


def test_loads_with_trust_remote_code_where_hf_vitreg_cannot_be_imported(folders, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", REMOTE, *map(str, folders.values()), str(tmp_path / "outputs")]
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tokens, logits, feature_map = torch.load(tmp_path / "outputs")
    pixel_values = torch.linspace(-2, 2, 3 * 42 * 56).view(1, 3, 42, 56)
    expected = AutoModel.from_pretrained(folders["backbone"])(pixel_values)
    torch.testing.assert_close(tokens, expected.last_hidden_state)
    torch.testing.assert_close(feature_map.flatten(2).mT, expected.patch_tokens)
    classifier = AutoModelForImageClassification.from_pretrained(folders["classifier"])
    torch.testing.assert_close(logits, classifier(pixel_values).logits)


def test_pipelines(folders):
    features = pipeline("image-feature-extraction", model=str(folders["backbone"]))(image())
    assert len(features[0]) == 1 + 3 + 16 * 16 and len(features[0][0]) == 64
    classify = pipeline("image-classification", model=str(folders["classifier"]))
    assert len(classify(image(), top_k=3)) == 3
    assert classify.model.config.id2label[0] == "tench, Tinca tinca"
    assert classify.model.config.label2id["goldfish, Carassius auratus"] == 1
    assert len(classify.model.config.label2id) == 1000


def test_the_image_processor_is_that_of_the_original_evaluation(folders):
    processor = AutoImageProcessor.from_pretrained(folders["backbone"])
    assert processor(image(), return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)
    assert processor.size["shortest_edge"] == 256 and processor.resample == Image.Resampling.BICUBIC
    assert tuple(processor.image_mean) == (0.485, 0.456, 0.406)
    assert tuple(processor.image_std) == (0.229, 0.224, 0.225)


def test_published_names_and_heads_come_from_a_mirror(tmp_path, monkeypatch):
    """The whole way, with a small model in the place of a published one."""
    small = dinov2.Architecture(64, 4, 88, num_register_tokens=3)
    monkeypatch.setitem(dinov2.ARCHITECTURES, "vits14_reg4", small)
    folder = tmp_path / "mirror" / "dinov2_vits14"
    folder.mkdir(parents=True)
    torch.save(TENSORS, folder / "dinov2_vits14_reg4_pretrain.pth")
    torch.save(linear_head(1000, 5 * 64), folder / "dinov2_vits14_reg4_linear4_head.pth")
    addresses = ["--base-url", (tmp_path / "mirror").as_uri(), "--cache-dir", tmp_path / "cache"]
    run("dinov2_vits14_reg4", tmp_path / "model", "--linear-head", "4", *addresses)
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "model").config
    assert config.classifier_layout == "last4_cls_mean" and config.id2label[1] == "goldfish, Carassius auratus"
    assert json.loads((tmp_path / "model" / "conversion.json").read_text())["arch"] == "vits14_reg4"
    card = ModelCard.load(tmp_path / "model" / "README.md").data
    assert (card.license, card.base_model) == ("apache-2.0", "facebook/dinov2-with-registers-small")


def test_weights_in_half_precision_stay_as_they_are(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in TENSORS.items()}
    save_file(half, tmp_path / "a.safetensors")
    run(tmp_path / "a.safetensors", tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.embeddings.position_embeddings, half["pos_embed"])


def bad_inputs(folder):
    """Arguments, and what the message says."""
    (folder / "page.pth").write_text("<html>Sign in</html>")
    (folder / "cut.pth").write_bytes((folder / "a.pth").read_bytes()[:-100])
    torch.save([1, 2], folder / "list.pth")
    torch.save({"weight": torch.nn.Linear(3, 5)}, folder / "code.pth")
    torch.save({name: TENSORS[name] for name in list(TENSORS)[:-1]}, folder / "part.pth")
    torch.save({"visual.class_embedding": torch.ones(3)}, folder / "clip.pth")
    torch.save(TENSORS | {"norm.weight": torch.full([64], torch.nan)}, folder / "nan.pth")
    torch.save(linear_head(11, 3 * 64), folder / "head.pth")
    given = folder / "a.pth"
    return {
        "web page": ([folder / "page.pth"], "is a web page"),
        "cut short": ([folder / "cut.pth"], "is cut short or damaged"),
        "no state dict": ([folder / "list.pth"], "holds a list, not a state dict"),
        "code": ([folder / "code.pth"], "Nothing was run"),
        "a part": ([folder / "part.pth"], "1 tensors that are missing: norm.bias"),
        "another family": ([folder / "clip.pth"], "is no DINOv2 checkpoint"),
        "not finite": ([folder / "nan.pth"], "the weights are not finite"),
        "missing": ([folder / "missing.pth"], "missing.pth does not exist"),
        "near miss": (["dinov2_vits14_reg3"], "Did you mean dinov2_vits14_reg4?"),
        "another arch": ([given, "--arch", "vitb14"], "is not vitb14: hidden_size is 64, not 768"),
        "unknown arch": ([given, "--arch", "vitb16"], "--arch vitb16 is not known. Did you mean vitb14?"),
        "another size": ([given, "--image-size", "224"], "--image-size 224 does not fit"),
        "width of a head": ([given, "--linear-head", folder / "head.pth"], "is a head on 192 features"),
        "no head": ([given, "--linear-head", "none.pth"], "--linear-head none.pth is no file"),
        "no network": (
            ["dinov2_vits14", "--base-url", "http://127.0.0.1:9", "--cache-dir", folder / "cache"],
            "could not be downloaded",
        ),
    }


def test_bad_input_is_one_clear_message_and_nothing_is_written(checkpoint, tmp_path):
    for case, (arguments, message) in bad_inputs(tmp_path).items():
        result = run(arguments[0], tmp_path / "model", *arguments[1:], exit_code=1)
        assert result.stderr.startswith("Error: ") and message in result.stderr, (case, result.stderr)
        assert "Traceback" not in result.output and isinstance(result.exception, SystemExit), case
        assert not list(tmp_path.glob("*model*")), case


def test_a_model_that_differs_from_the_reference_is_not_written(checkpoint, tmp_path, monkeypatch):
    def with_k_and_v_exchanged(tensor, number):
        parts = tensor.chunk(number)
        return parts if number != 3 else (parts[0], parts[2], parts[1])

    monkeypatch.setattr(renaming, "_parts", with_k_and_v_exchanged)
    result = run(checkpoint, tmp_path / "model", exit_code=1)
    assert "The converted model is not the same as timm" in result.stderr
    assert "Against timm" in result.stdout
    assert not list(tmp_path.glob("*model*"))


def test_a_folder_is_replaced_only_when_asked_and_only_when_the_new_one_is_whole(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")
    assert "is not empty" in run(checkpoint, tmp_path / "model", exit_code=1).stderr
    before = sorted(tmp_path.rglob("*"))

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BitImageProcessor, "save_pretrained", interrupted)  # weights and config are written by then
        result = CliRunner().invoke(app, ["dinov2", str(checkpoint), str(tmp_path / "model"), "--overwrite"])
        assert result.exit_code != 0
        assert sorted(tmp_path.rglob("*")) == before
    run(checkpoint, tmp_path / "model", "--overwrite")
    assert not (tmp_path / "model" / "old.txt").exists()
    assert len(list((tmp_path / "model").iterdir())) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "model"]


def test_a_full_disk_is_no_traceback(checkpoint, tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ViTRegModel, "save_pretrained", full)
    result = run(checkpoint, tmp_path / "model", exit_code=1)
    assert "No space left on device" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


SCRIPT = str(ROOT / "conversion" / "convert.py")
# Prints the peak of its own memory: that of `resource` would count what the parent held when it started this process.
MEASURED = """
import atexit, re, runpy, sys
from pathlib import Path

def report():
    print("peak:", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))

atexit.register(report)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_script(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200)


def test_the_script_runs_from_any_folder(checkpoint, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    done = run_script(SCRIPT, "dinov2", checkpoint, tmp_path / "model", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert "ViTRegModel, custom" in done.stdout
    assert (tmp_path / "model" / "conversion.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("name", ["vits14", "vits14_reg4", "vitb14_reg4", "vitl14", "vitg14_reg4"])
def test_published_sizes_agree_and_stay_within_their_memory(tmp_path, name):
    torch.save(published_checkpoint(name), tmp_path / "a.pth")
    done = run_script(
        "-c", MEASURED, SCRIPT, "dinov2", tmp_path / "a.pth", tmp_path / "model", "--arch", name, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    size, peak = (tmp_path / "a.pth").stat().st_size, int(done.stdout.rsplit("peak: ")[1])
    assert peak < 1.3 * size + 1e9, f"{peak / 1e9:.2f} GB for a checkpoint of {size / 1e9:.2f} GB"
    assert json.loads((tmp_path / "model" / "conversion.json").read_text())["arch"] == name
    (tmp_path / "a.pth").unlink()
    (tmp_path / "model" / "model.safetensors").unlink()
