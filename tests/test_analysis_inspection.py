# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What was planted is found, exactly, and nothing where nothing was planted."""

import json
import math
import tracemalloc

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from planted import (
    COLS,
    MEAN,
    NEURON,
    NUM_LAYERS,
    NUM_REGISTERS,
    PATCH_SIZE,
    PLANTED_LAYER,
    ROWS,
    STD,
    neuron,
    patchy_image,
    planted_encoder,
)
from reference import VARIANTS, randomize, tiny_config
from sample_images import write_folder
from sklearn.datasets import load_sample_images
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel

from hf_vitreg import ViTRegModel
from hf_vitreg.analysis import run
from hf_vitreg.analysis.image_files import ImageFiles, find_images
from hf_vitreg.analysis.inspection import inspect
from hf_vitreg.analysis.training_curve import checkpoint_folders, load_checkpoint, training_curve
from hf_vitreg.features import VisionEncoder, load_vit, model_hash


NUM_IMAGES, SCALE = 30, 500.0
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 7, "image_size": 35}


@pytest.fixture(scope="module")
def images():
    return [patchy_image(index)[0] for index in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def constant_patches():
    return np.stack([patchy_image(index)[1] for index in range(NUM_IMAGES)])


@pytest.fixture(scope="module")
def planted(images):
    return inspect(planted_encoder(SCALE), images)


@pytest.fixture(scope="module")
def untouched(images):
    return inspect(planted_encoder(1.0), images)


def hidden_states(encoder, images):
    """By transformers' own output, of patches before the first and after every layer."""
    with torch.no_grad():
        output = encoder.model(encoder.preprocess(images), output_hidden_states=True)
    return torch.stack(output.hidden_states)[:, :, 1 + NUM_REGISTERS :]


def differences(first, second, path=""):
    """Where two results differ by more than 1e-5 of the value."""
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        return [each for key in first for each in differences(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, list):
        assert len(first) == len(second), path
        pairs = enumerate(zip(first, second))
        return [each for index, pair in pairs for each in differences(*pair, f"{path}/{index}")]
    if isinstance(first, float) and isinstance(second, float):
        return [] if math.isclose(first, second, rel_tol=1e-5, abs_tol=1e-5) else [(path, first, second)]
    return [] if first == second else [(path, first, second)]


# The planted phenomenon


def test_planted_artifacts_are_found_with_layer_share_and_positions(planted, constant_patches):
    verdict = planted.metrics["verdict"]
    assert verdict["has_artifacts"] and verdict["split_off_layer"] == PLANTED_LAYER
    assert verdict["num_outliers"] == constant_patches.sum()
    assert verdict["share"] == pytest.approx(constant_patches.mean(), abs=1e-12)
    np.testing.assert_allclose(planted.arrays["outlier_frequency"], constant_patches.mean(0), atol=1e-12)
    assert planted.metrics["positions"]["num_images_with_outliers"] == NUM_IMAGES
    for picture in planted.pictures:
        np.testing.assert_array_equal(picture.outliers, constant_patches[int(picture.name.split()[1])])
    shares = [row["share_beyond_final_threshold"] for row in planted.metrics["layers"]]
    np.testing.assert_allclose(shares, [0] * PLANTED_LAYER + [verdict["share"]] * (NUM_LAYERS + 1 - PLANTED_LAYER))


def test_nothing_is_found_on_the_untouched_model(untouched):
    verdict = untouched.metrics["verdict"]
    assert (verdict["has_artifacts"], verdict["num_outliers"], verdict["split_off_layer"]) == (False, 0, None)
    assert untouched.metrics["probes"]["position"]["outlier"] is None
    every = [each for side in untouched.metrics["thresholds"].values() for each in side.values()]
    assert len(every) == 6 and all(math.isfinite(each["threshold"]) for each in every)


def test_norm_that_the_neuron_induces_is_exact(planted, images, constant_patches):
    encoder, activations = planted_encoder(SCALE), []
    up, down = neuron(encoder.model)
    is_outlier = torch.from_numpy(constant_patches).flatten(1)
    with up.register_forward_hook(lambda module, args, output: activations.append(torch.nn.functional.gelu(output))):
        states = hidden_states(encoder, images)
    fired = activations[0][:, 1 + NUM_REGISTERS :, NEURON]
    assert fired[~is_outlier].abs().max() < 0.01 * fired[is_outlier].min()
    written = fired[is_outlier][:, None] * down.weight[:, NEURON]
    row = planted.metrics["norms"]["outlier"][PLANTED_LAYER]
    norms = states[PLANTED_LAYER][is_outlier].norm(dim=-1)
    assert row["layer"] == PLANTED_LAYER and row["count"] == is_outlier.sum()
    assert row["mean"] == pytest.approx(norms.mean().item(), rel=1e-5)
    assert (row["min"], row["max"]) == pytest.approx((norms.min().item(), norms.max().item()), rel=1e-5)
    # without what the neuron wrote they are as small as any
    rest = (states[PLANTED_LAYER][is_outlier] - written).norm(dim=-1)
    assert rest.max() < planted.metrics["norms"]["rest"][PLANTED_LAYER]["max"] < norms.min() / 5


def test_norms_of_all_kinds_equal_those_of_the_library(planted, images):
    states = hidden_states(planted_encoder(SCALE), images)
    for layer, row in enumerate(planted.metrics["norms"]["patch"]):
        if layer:  # there transformers has position embeddings too
            norms = states[layer].norm(dim=-1)
            assert row["mean"] == pytest.approx(norms.mean().item(), rel=1e-5)
            assert row["std"] == pytest.approx(norms.std(correction=0).item(), rel=1e-4)
    assert [row["layer"] for row in planted.metrics["norms"]["cls"]] == list(range(1, NUM_LAYERS + 1))
    assert {f"register_{index + 1}" for index in range(NUM_REGISTERS)} < planted.metrics["norms"].keys()


def test_outliers_are_found_at_any_layer_that_has_them_and_at_no_other(images):
    for layer in (PLANTED_LAYER - 1, PLANTED_LAYER):
        verdict = inspect(planted_encoder(SCALE), images, layer=layer).metrics["verdict"]
        assert verdict["layer"] == layer and len(verdict["separation_by_layer"]) == layer + 1
        assert verdict["has_artifacts"] == (layer == PLANTED_LAYER)


@pytest.mark.parametrize("threshold", ["otsu", 20.0])
def test_other_thresholds_find_the_same(planted, images, threshold):
    verdict = inspect(planted_encoder(SCALE), images, threshold=threshold).metrics["verdict"]
    assert verdict["has_artifacts"] and verdict["num_outliers"] == planted.metrics["verdict"]["num_outliers"]


# Results


def test_results_are_the_same_for_any_batch_size(planted, images):
    other = inspect(planted_encoder(SCALE), images, batch_size=7)
    assert differences(planted.metrics, other.metrics) == []
    for name, array in planted.arrays.items():
        np.testing.assert_allclose(array, other.arrays[name], atol=1e-5, rtol=1e-5)
    assert [picture.name for picture in planted.pictures] == [picture.name for picture in other.pictures]


def test_metrics_are_json_and_have_stable_keys(planted):
    assert json.loads(json.dumps(planted.metrics, allow_nan=False)) == planted.metrics
    expected = "metrics_version versions model images settings verdict thresholds layers norms positions "
    expected += "neighbour_similarity probes registers attention components cost notes"
    assert list(planted.metrics) == expected.split()
    assert planted.metrics["model"]["sha256"] == model_hash(planted_encoder(SCALE).model)
    assert planted.metrics["model"]["sha256"] != model_hash(planted_encoder(1.0).model)


def test_pictures_show_the_attention_of_the_library(planted, images):
    encoder, picture = planted_encoder(SCALE), planted.pictures[-1]
    index = int(picture.name.split()[1])
    encoder.model.set_attn_implementation("eager")
    with torch.no_grad():
        output = encoder.model(encoder.preprocess([images[index]]), output_attentions=True)
    for layer, attention in enumerate(output.attentions):
        maps = attention[0, :, :, 1 + NUM_REGISTERS :]
        maps = maps / maps.sum(-1, keepdim=True)
        np.testing.assert_allclose(picture.attention_by_layer[layer].ravel(), maps[:, 0].mean(0), rtol=1e-4)
    for register in range(NUM_REGISTERS):
        actual = picture.attention[f"register_{register + 1}"]
        np.testing.assert_allclose(actual.reshape(len(actual), -1), maps[:, 1 + register], rtol=1e-4)
    assert picture.photograph.shape == (ROWS * PATCH_SIZE, COLS * PATCH_SIZE, 3)
    np.testing.assert_array_equal(picture.photograph, np.asarray(images[index]))


def test_components_of_pictures_are_those_of_a_decomposition_of_all_patches(planted, images):
    patches = hidden_states(planted_encoder(SCALE), images)[NUM_LAYERS].double()
    centred = patches.flatten(0, 1) - patches.flatten(0, 1).mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = (left[:, :3] * len(centred) ** 0.5).unflatten(0, patches.shape[:2])
    share = values.square()[:3] / values.square().sum()
    np.testing.assert_allclose(planted.metrics["components"]["variance_share"], share, rtol=1e-4)
    for picture in planted.pictures:
        colours = (picture.components.reshape(-1, 3) - 0.5) * 6
        wanted = expected[int(picture.name.split()[1])].clamp(-3, 3)
        np.testing.assert_allclose(abs(colours), wanted.abs(), atol=1e-3)


def test_norms_of_timm_equal_those_of_its_own_function(images):
    encoder = foreign("timm")
    intermediates = encoder.model.forward_intermediates(
        encoder.preprocess(images), return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    norms = inspect(encoder, images).metrics["norms"]
    for layer, (patches, prefix) in enumerate(intermediates, start=1):
        assert norms["patch"][layer]["layer"] == norms["cls"][layer - 1]["layer"] == layer
        assert norms["patch"][layer]["mean"] == pytest.approx(patches.norm(dim=-1).mean().item(), rel=1e-5)
        assert norms["cls"][layer - 1]["mean"] == pytest.approx(prefix[:, 0].norm(dim=-1).mean().item(), rel=1e-5)


def test_replaced_registers_change_what_comes_out(planted):
    replaced = planted.metrics["registers"]["replaced_by_mean"]
    assert list(replaced) == ["register_1", "register_2", "register_3", "all"]
    assert all(0 <= row["cls_change"] < 0.1 and 0 <= row["patch_change"] < 0.1 for row in replaced.values())
    assert replaced["all"]["cls_change"] > 0


def test_registers_are_replaced_for_some_of_many_images(images, monkeypatch):
    monkeypatch.setattr(run, "NUM_ABLATED_IMAGES", 5)
    results = [inspect(planted_encoder(SCALE), images, batch_size=size).metrics["registers"] for size in (4, 30)]
    assert all(row["num_images"] == 5 for row in results[0]["replaced_by_mean"].values())
    assert differences(*results) == []


def test_classes_of_folders_reach_the_probes(tmp_path):
    files = find_images([write_folder(tmp_path / "images", {"blue": 20, "green": 20, "red": 20})])
    assert files.class_names == ["blue", "green", "red"] and files.why_no_labels is None
    model = randomize(ViTRegModel(tiny_config(num_hidden_layers=2)))
    metrics = inspect(VisionEncoder.wrap(model, "random", MEAN, STD), files).metrics
    scores = metrics["probes"]["image_class"]
    assert scores["cls"]["accuracy"] > 0.8 and scores["register"]["num_test_images"] > 5
    assert metrics["registers"]["replaced_by_mean"]["register_1"]["class_accuracy"] is not None
    assert metrics["images"]["num_classes"] == 3


def test_memory_does_not_grow_with_the_number_of_images():
    """Of Python and NumPy; tensors see below."""
    encoder, peaks = planted_encoder(SCALE, num_registers=0), []
    for number in (4, 16):
        tracemalloc.start()
        inspect(encoder, [patchy_image(index % 4)[0] for index in range(number)], batch_size=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def tensors_of(thing, seen):
    """All that can be reached from it, each once; the model itself is left out."""
    if id(thing) in seen or isinstance(thing, VisionEncoder):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    for part in (*parts, *getattr(thing, "__dict__", {}).values()):
        yield from tensors_of(part, seen)


def test_tensors_that_are_kept_do_not_grow_with_the_number_of_images(tmp_path):
    sizes = []
    for number in (15, 60):
        files = find_images([write_folder(tmp_path / str(number), dict.fromkeys(("blue", "green"), number))])
        asked = run.Run(planted_encoder(SCALE), files, "mad", "high", None, None, 4, 0, False)
        survey = asked.survey()
        examination = asked.examine(survey, 1.0)
        sizes.append(sum(tensor.nbytes for tensor in tensors_of([survey, examination], set())))
    # beside the random key of each token in a sample
    assert sizes[1] - sizes[0] < 16 * 2048 * 8 and sizes[0] > 1e6


# Models


def foreign(name):
    if name == "timm":
        model = VisionTransformer(35, 7, embed_dim=48, depth=3, num_heads=3, num_classes=0, dynamic_img_size=True)
    elif name == "timm_parallel":
        model = VisionTransformer(
            35, 7, embed_dim=48, depth=3, num_heads=3, num_classes=0, block_fn=ParallelScalingBlock, reg_tokens=2
        )
    elif name == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=56))
    elif name == "dinov2_with_registers":
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=2))
    else:
        sizes = {**SIZES, "num_hidden_layers": 4}
        model = ViTRegModel(tiny_config(**{**sizes, "num_register_tokens": 2, **VARIANTS[name]}))
    return VisionEncoder.wrap(randomize(model), name, MEAN, STD)


@pytest.mark.parametrize(
    "name", ["timm", "timm_parallel", "siglip", "dinov2_with_registers", "rope_untied", "distilled", "attended"]
)
def test_photographs_can_be_looked_at_with_any_model(name):
    encoder = foreign(name)
    photographs = [PIL.Image.fromarray(image) for image in load_sample_images().images]
    result = inspect(encoder, photographs, size=(35, 35) if name == "timm_parallel" else (35, 42))
    metrics = result.metrics
    assert (metrics["registers"] is None) == (not encoder.num_registers)
    tokens = ["cls"] * encoder.has_cls + [f"register_{index + 1}" for index in range(encoder.num_registers)]
    tokens = tokens or ["patch_mean"]
    of_registers_alone = tokens[0] == "register_1"
    assert list(metrics["attention"] or ()) == ([] if of_registers_alone else tokens[:1])
    assert ("cls" in metrics["norms"]) == encoder.has_cls
    assert all(list(picture.attention) == tokens for picture in result.pictures)
    assert metrics["images"]["num_images"] == 2
    if name == "timm_parallel":
        assert metrics["cost"] is None and "form of its layers is not known" in metrics["notes"][0]
    else:
        assert metrics["cost"]["4"]["parameters"] > metrics["cost"]["0"]["parameters"]


def test_layers_without_readable_attention_leave_it_out(images, monkeypatch):
    encoder = planted_encoder(SCALE)
    block = encoder.model.encoder.layer[1]
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda states, *args, **kwargs: forward(forward(states, *args, **kwargs)))
    result = inspect(encoder, images[:4])
    assert result.metrics["attention"] is None and not result.pictures[0].attention
    assert result.metrics["notes"][0].startswith("Attention is left out: Layer 1,")


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, "has layers 1 to 5, got 0"),
        ({"layer": 6}, "has layers 1 to 5, got 6"),
        ({"threshold": "mean"}, "must be a number or one of"),
        ({"threshold": -1.0}, "must be positive"),
        ({"side": "both"}, "side must be"),
        ({"size": (30, 42)}, "no multiple of the patch size 7"),
        ({"size": (0, 7)}, "no multiple of the patch size 7"),
        ({"batch_size": 0}, "batch size must be 1 or more"),
    ],
)
def test_options_that_cannot_be_are_refused_before_images_are_read(options, message):
    with pytest.raises(ValueError, match=message):
        inspect(planted_encoder(SCALE), ImageFiles(["gone.png"]), **options)


def test_images_that_cannot_be_used_are_named_and_counted(planted, images, tmp_path):
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index:02d}.png")
    (tmp_path / "05a.jpg").write_bytes(b"no image")
    (tmp_path / "07a.png").write_bytes((tmp_path / "07.png").read_bytes()[:700])
    PIL.Image.new("RGB", (40, PATCH_SIZE - 1)).save(tmp_path / "20a.png")
    (tmp_path / "notes.txt").write_text("not looked at")
    metrics = inspect(planted_encoder(SCALE), find_images([tmp_path])).metrics
    assert (metrics["images"]["num_images"], metrics["images"]["num_unreadable"]) == (NUM_IMAGES, 3)
    named = {each["name"]: each["reason"] for each in metrics["images"]["unreadable"]}
    assert list(named) == [str(tmp_path / name) for name in ("05a.jpg", "07a.png", "20a.png")]
    assert named[str(tmp_path / "05a.jpg")] == "no image that Pillow knows"
    assert named[str(tmp_path / "20a.png")] == "6x40 pixels, smaller than a patch of 7x7"
    assert differences(metrics["verdict"], planted.metrics["verdict"]) == []


def test_no_image_is_an_error_that_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no image in .*\.jpg"):
        find_images([tmp_path])
    with pytest.raises(ValueError, match="no image"):
        find_images([tmp_path / "gone" / "*.png"])
    with pytest.raises(ValueError, match="There are no images"):
        inspect(planted_encoder(1.0), [])
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"None of 1 images can be used. The first, .*broken\.png"):
        inspect(planted_encoder(1.0), find_images([tmp_path]))


def test_images_are_found_sorted_sampled_and_without_doubles(tmp_path):
    write_folder(tmp_path, {"one": 3, "two": 4})
    everything = find_images([tmp_path])
    assert len(everything) == 7 and list(everything.items) == sorted(everything.items)
    assert everything.labels == [0] * 3 + [1] * 4
    sample = find_images([tmp_path], max_images=5, seed=1)
    assert len(sample) == 5 and sample.items == find_images([tmp_path], max_images=5, seed=1).items
    twice = find_images([f"{tmp_path}/one/*.png", tmp_path / "one" / "000.png"])
    assert len(twice) == 3 and twice.labels is None and "not those of one folder" in twice.why_no_labels
    assert find_images([tmp_path / "one"]).why_no_labels == "some images lie in no class folder"
    assert find_images([tmp_path], max_images=1).why_no_labels.startswith("all images lie in one folder")
    with pytest.raises(ValueError, match="1 or more, got 0"):
        find_images([tmp_path], max_images=0)


def test_images_without_normalization_are_refused():
    encoder = VisionEncoder.wrap(planted_encoder(1.0).model)
    with pytest.raises(ValueError, match="normalizes its images with is not known"):
        inspect(encoder, [patchy_image(0)[0]])


def test_model_that_overflows_is_named(images):
    encoder = planted_encoder(SCALE)
    neuron(encoder.model)[1].weight.data[:, NEURON] = math.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        inspect(encoder, images)


# Training time


def test_training_curve_shows_when_outliers_came(images, constant_patches):
    scales = {400: SCALE, 100: 1.0, 250: 3.0}
    loaders = {step: lambda scale=scale: planted_encoder(scale) for step, scale in scales.items()}
    curve = training_curve(loaders, ImageFiles(images))
    assert [(row["step"], row["has_artifacts"]) for row in curve] == [(100, False), (250, False), (400, True)]
    assert curve[-1]["share"] == pytest.approx(constant_patches.mean(), rel=1e-6)
    assert curve[-1]["split_off_layer"] == PLANTED_LAYER


def test_checkpoints_are_read_with_and_without_a_config(tmp_path):
    base, trained = planted_encoder(1.0), planted_encoder(SCALE)
    trained.model.save_pretrained(tmp_path / "checkpoint-20")
    bare = tmp_path / "checkpoint-100"
    trained.model.save_pretrained(bare)
    (bare / "config.json").unlink()
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "runs").mkdir()
    folders = checkpoint_folders(tmp_path)
    assert [step for step, _ in folders] == [20, 100]
    for _, path in folders:
        loaded = load_checkpoint(path, base)
        assert model_hash(loaded.model) == model_hash(trained.model) and loaded.mean == MEAN
    assert model_hash(base.model) == model_hash(planted_encoder(1.0).model), "left as it was"
    with pytest.raises(ValueError, match="has weights and no config"):
        load_checkpoint(bare, None)
    with pytest.raises(ValueError, match="are not those of"):
        load_checkpoint(bare, planted_encoder(1.0, hidden_size=24))


def test_models_that_are_no_vit_are_refused_by_name(tmp_path):
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=8)
    with pytest.raises(ValueError, match="SwinTransformer is no plain ViT"):
        VisionEncoder.wrap(model)
    with pytest.raises(ValueError, match=r"Cannot load .*gone"):
        load_vit(tmp_path / "gone")
