# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Auto classes, pipelines and folders: with hf_vitreg imported, and as remote code where it is not installed."""

import builtins
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from reference import COLS, HEIGHT, NUM_REGISTERS, ROWS, TINY, WIDTH, images, randomize, relative_error, tiny_config
from safetensors.torch import load_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    BitImageProcessor,
    DPTImageProcessor,
    pipeline,
)
from transformers.models.bit import BitImageProcessorPil

from hf_vitreg import (
    ViTRegBackbone,
    ViTRegConfig,
    ViTRegForDepthEstimation,
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)


# beside each what its head is called
HEADS = {
    ViTRegModel: (),
    ViTRegForImageClassification: ("classifier.",),
    ViTRegForSemanticSegmentation: ("segmentation_head.",),
    ViTRegForDepthEstimation: ("depth_head.",),
    ViTRegBackbone: (),
}
MODEL_CLASSES = list(HEADS)
CODE_FILES = {"configuration_vitreg.py", "modeling_vitreg.py"}


def make(model_class, **overrides):
    return randomize(model_class(tiny_config(**overrides)))


def image_processor():
    return BitImageProcessor(
        size={"height": HEIGHT, "width": WIDTH}, crop_size={"height": HEIGHT, "width": WIDTH}, do_center_crop=False
    )


def photo(height: int = 61, width: int = 83) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier as users publish it: weights, config, code and image processor."""
    path = tmp_path_factory.mktemp("vitreg")
    labels = {index: f"class {index}" for index in range(11)}
    make(ViTRegForImageClassification, id2label=labels, classifier_layout="last4_cls_mean").save_pretrained(path)
    image_processor().save_pretrained(path)
    return path


@pytest.fixture
def nobody_to_ask(monkeypatch):
    """Looks at the end whether anybody was asked: transformers swallows what `input` raises."""
    prompts = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": prompts.append(prompt) or "N")
    yield
    assert prompts == []


def first_tensor(output) -> torch.Tensor:
    return output[0][0] if isinstance(output[0], tuple) else output[0]


# Registration


def test_import_registers_every_auto_class():
    config = AutoConfig.for_model("vitreg", **TINY)
    assert type(config) is ViTRegConfig
    assert type(AutoModel.from_config(config)) is ViTRegModel
    assert type(AutoModelForImageClassification.from_config(config)) is ViTRegForImageClassification
    assert type(AutoModelForSemanticSegmentation.from_config(config)) is ViTRegForSemanticSegmentation
    assert type(AutoModelForDepthEstimation.from_config(config)) is ViTRegForDepthEstimation
    assert type(AutoBackbone.from_config(config)) is ViTRegBackbone


def test_auto_classes_load_a_folder_without_trust(folder, nobody_to_ask):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is ViTRegConfig
    for auto_class, model_class in (
        (AutoModel, ViTRegModel),
        (AutoModelForImageClassification, ViTRegForImageClassification),
        (AutoModelForSemanticSegmentation, ViTRegForSemanticSegmentation),
        (AutoModelForDepthEstimation, ViTRegForDepthEstimation),
    ):
        assert type(auto_class.from_pretrained(folder)) is model_class
    assert type(AutoImageProcessor.from_pretrained(folder)) is BitImageProcessor
    assert type(AutoImageProcessor.from_pretrained(folder, backend="pil")) is BitImageProcessorPil


def test_image_processor_is_found_by_the_config_alone(folder, tmp_path):
    """As for a folder whose preprocessor names no class."""
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor.pop("image_processor_type")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is BitImageProcessor


# Folders


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("values", [{}, {"num_register_tokens": 0, "use_swiglu_ffn": True, "use_mask_token": True}])
def test_saved_and_loaded_model_is_the_model(tmp_path, model_class, values):
    model = make(model_class, **values)
    model.save_pretrained(tmp_path)
    assert CODE_FILES | {"config.json", "model.safetensors"} == {path.name for path in tmp_path.iterdir()}
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    pixel_values = images(28, 35)
    # memory-mapped weights may be aligned differently, and then a product rounds differently
    assert relative_error(first_tensor(loaded(pixel_values)), first_tensor(model(pixel_values))) < 1e-6


@pytest.mark.parametrize("target", MODEL_CLASSES)
@pytest.mark.parametrize("source", MODEL_CLASSES)
def test_every_class_loads_what_another_saved(tmp_path, source, target):
    written = make(source)
    written.save_pretrained(tmp_path)
    model, info = target.from_pretrained(tmp_path, output_loading_info=True)

    def head(model) -> set[str]:
        return (
            {name for name in model.state_dict() if name.startswith(HEADS[type(model)])}
            if HEADS[type(model)]
            else set()
        )

    assert info["missing_keys"] == head(model) - head(written)
    assert info["unexpected_keys"] == head(written) - head(model)
    saved = {
        name.removeprefix("vitreg."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("vitreg.")
        assert name in info["missing_keys"] or torch.equal(saved[name], tensor), name


def test_code_of_every_auto_class_is_saved_whichever_class_was(tmp_path):
    make(ViTRegBackbone).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == tiny_config().auto_map
    # a string for the image processor would make pipelines look for a video processor, and ask whether to trust it
    assert "AutoImageProcessor" not in config["auto_map"]


def test_other_number_of_labels_is_an_error_until_it_is_meant(folder):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ViTRegForImageClassification.from_pretrained(folder, num_labels=7)
    model, info = ViTRegForImageClassification.from_pretrained(
        folder, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert model(images()).logits.shape == (2, 7)


def test_backbone_of_a_published_classifier_selects_stages(folder):
    backbone = ViTRegBackbone.from_pretrained(folder, out_indices=[2, 5])
    assert [feature_map.shape for feature_map in backbone(images()).feature_maps] == [(2, 48, ROWS, COLS)] * 2


# Pipelines


def test_pipelines_run_and_never_ask(folder, nobody_to_ask):
    classifier = pipeline("image-classification", model=str(folder), top_k=11)
    scores = classifier(photo())
    assert {score["label"] for score in scores} == {f"class {index}" for index in range(11)}
    assert sum(score["score"] for score in scores) == pytest.approx(1, abs=1e-5)
    model = ViTRegForImageClassification.from_pretrained(folder)
    logits = model(image_processor()(photo(), return_tensors="pt").pixel_values).logits
    assert scores[0]["label"] == f"class {logits.argmax().item()}"


@pytest.mark.parametrize("pool", [True, False])
def test_feature_pipeline_returns_cls_or_all_tokens(folder, nobody_to_ask, pool):
    features = pipeline("image-feature-extraction", model=str(folder), pool=pool)(photo())
    output = ViTRegModel.from_pretrained(folder)(image_processor()(photo(), return_tensors="pt").pixel_values)
    expected = output.pooler_output if pool else output.last_hidden_state
    assert expected.ndim == (2 if pool else 3)
    assert relative_error(torch.tensor(features), expected) < 1e-5


DENSE = {"image-segmentation": ViTRegForSemanticSegmentation, "depth-estimation": ViTRegForDepthEstimation}


def write_dense(path, task: str):
    """A model for a dense task as users publish it; what it says depends on where in the image."""
    labels = {index: f"class {index}" for index in range(11)}
    model = make(DENSE[task], id2label=labels, out_indices=[-2, -1])
    model.save_pretrained(path)
    # not square, as its images are resized whatever their own sides
    size = {"height": 28, "width": 35}
    DPTImageProcessor(size=size, ensure_multiple_of=7, do_convert_rgb=True).save_pretrained(path)
    return model


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_segmentation_pipeline_gives_each_pixel_of_an_image_its_class(tmp_path, nobody_to_ask, backend, caplog):
    model = write_dense(tmp_path, "image-segmentation")
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    segments = pipeline("image-segmentation", model=str(tmp_path), image_processor=processor)(photo())
    assert "not supported" not in caplog.text
    masks = np.stack([np.asarray(segment["mask"]) == 255 for segment in segments])
    assert masks.shape[1:] == (61, 83) and (masks.sum(axis=0) == 1).all()
    logits = model(processor(photo(), return_tensors="pt").pixel_values).logits
    assert logits.shape == (1, 11, 4, 5)
    classes = torch.nn.functional.interpolate(logits, size=(61, 83), mode="bilinear").argmax(dim=1)[0]
    assert {segment["label"] for segment in segments} == {f"class {index}" for index in classes.unique().tolist()}
    for segment, mask in zip(segments, masks):
        expected = classes == int(segment["label"].split()[1])
        # logits that differ in the last bit may be equal here and not there
        assert (torch.from_numpy(mask) == expected).float().mean() > 0.999


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_depth_pipeline_gives_each_pixel_of_an_image_its_depth(tmp_path, nobody_to_ask, backend):
    model = write_dense(tmp_path, "depth-estimation")
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    output = pipeline("depth-estimation", model=str(tmp_path), image_processor=processor)(photo().convert("L"))
    assert output["depth"].size == (83, 61)
    pixel_values = processor(photo().convert("L"), return_tensors="pt").pixel_values
    depth = model(pixel_values).predicted_depth
    assert depth.shape == (1, 28, 35) and depth.std() > 1e-3
    expected = torch.nn.functional.interpolate(depth[None], size=(61, 83), mode="bicubic")[0, 0]
    assert relative_error(output["predicted_depth"], expected) < 1e-5


# Remote code


REMOTE_DENSE = """
    import sys, warnings

    sys.modules["hf_vitreg"] = None
    warnings.simplefilter("error")
    import torch
    from PIL import Image
    from transformers import (
        AutoImageProcessor, AutoModel, AutoModelForDepthEstimation, AutoModelForSemanticSegmentation, pipeline
    )

    home = sys.argv[1]
    image, trust, facts = Image.open(f"{home}/photo.png"), {"trust_remote_code": True}, {}
    for task, auto_class in {
        "image-segmentation": AutoModelForSemanticSegmentation, "depth-estimation": AutoModelForDepthEstimation
    }.items():
        folder = f"{home}/{task}"
        pixel_values = AutoImageProcessor.from_pretrained(folder, **trust)(image, return_tensors="pt").pixel_values
        facts[task] = auto_class.from_pretrained(folder, **trust)(pixel_values)[0].detach()
        output = pipeline(task, model=folder, **trust)(image)
        facts[f"{task} size"] = (output[0]["mask"] if task == "image-segmentation" else output["depth"]).size
        assert type(AutoModel.from_pretrained(folder, **trust)).__name__ == "ViTRegModel"
    torch.save(facts, f"{home}/facts.pt")
    print("nobody was asked", flush=True)
"""


@pytest.mark.slow  # as the other models
def test_dense_models_are_remote_code_where_hf_vitreg_is_absent(tmp_path):
    photo().save(tmp_path / "photo.png")
    models = {task: write_dense(tmp_path / task, task) for task in DENSE}
    done = run_without_hf_vitreg(REMOTE_DENSE, tmp_path, str(tmp_path))
    assert done.stdout.startswith("nobody was asked")
    facts = torch.load(tmp_path / "facts.pt")
    for task, model in models.items():
        processor = AutoImageProcessor.from_pretrained(tmp_path / task)
        expected = model(processor(photo(), return_tensors="pt").pixel_values)[0]
        assert relative_error(facts[task], expected.detach()) < 1e-5
        assert facts[f"{task} size"] == (83, 61)


def run_without_hf_vitreg(code: str, home, *arguments: str) -> subprocess.CompletedProcess:
    hidden = ("PYTHONPATH", "HF_ENDPOINT")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**env, "HF_HOME": str(home / "home"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


REMOTE = """
    import json, sys, warnings
    from pathlib import Path

    # where hf_vitreg is installed, this hides it
    sys.modules["hf_vitreg"] = None
    warnings.simplefilter("error")
    import torch
    from PIL import Image
    from transformers import (
        AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
    )

    folder, home = sys.argv[1:]
    image = Image.open(f"{home}/photo.png")
    facts, trust = {}, {"trust_remote_code": True}
    processor = AutoImageProcessor.from_pretrained(folder, **trust)
    pixel_values = processor(image, return_tensors="pt").pixel_values
    facts["processor"] = type(processor).__name__
    model = AutoModelForImageClassification.from_pretrained(folder, **trust)
    facts["logits"] = model(pixel_values).logits.tolist()
    base = AutoModel.from_pretrained(folder, **trust)
    facts["registers"] = list(base(pixel_values).register_tokens.shape)
    facts["maps"] = list(base.get_attention_maps(pixel_values, -1, "registers").shape)
    config = AutoConfig.from_pretrained(folder, out_indices=[2], **trust)
    backbone = AutoBackbone.from_config(config, **trust).eval()
    facts["feature maps"] = list(backbone(pixel_values).feature_maps[0].shape)
    facts["label"] = pipeline("image-classification", model=folder, **trust)(image)[0]["label"]
    facts["features"] = len(pipeline("image-feature-extraction", model=folder, pool=True, **trust)(image)[0])
    base.save_pretrained(f"{home}/again")
    facts["saved"] = sorted(path.name for path in Path(f"{home}/again").iterdir())
    facts["auto_map"] = json.loads(Path(f"{home}/again/config.json").read_text())["auto_map"]
    again = AutoModelForImageClassification.from_pretrained(f"{home}/again", **trust)
    facts["loaded again"] = torch.equal(again.vitreg.layernorm.weight, base.layernorm.weight)
    print("trusted until here", flush=True)
    try:
        AutoModel.from_pretrained(folder)
    except ValueError as error:
        facts["without trust"] = str(error)
    Path(f"{home}/facts.json").write_text(json.dumps(facts))
"""


def test_folder_is_remote_code_where_hf_vitreg_is_absent(folder, tmp_path):
    photo().save(tmp_path / "photo.png")
    done = run_without_hf_vitreg(REMOTE, tmp_path, str(folder), str(tmp_path))
    facts = json.loads((tmp_path / "facts.json").read_text())
    # nobody was asked anything
    assert done.stdout.startswith("trusted until here")
    assert "trust_remote_code=True" in facts["without trust"]
    model = ViTRegForImageClassification.from_pretrained(folder)
    logits = model(image_processor()(photo(), return_tensors="pt").pixel_values).logits
    assert relative_error(torch.tensor(facts["logits"]), logits.detach()) < 1e-5
    assert facts["label"] == f"class {logits.argmax().item()}"
    assert facts["processor"] == "BitImageProcessor"
    assert facts["registers"] == [1, NUM_REGISTERS, 48]
    assert facts["maps"] == [1, 3, NUM_REGISTERS, 1 + NUM_REGISTERS + ROWS * COLS]
    assert facts["feature maps"] == [1, 48, ROWS, COLS]
    assert facts["features"] == 48
    assert set(facts["saved"]) == CODE_FILES | {"config.json", "model.safetensors"}
    assert facts["auto_map"] == tiny_config().auto_map
    assert facts["loaded again"]
