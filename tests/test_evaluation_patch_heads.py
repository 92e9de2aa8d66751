# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json
from itertools import pairwise

import numpy as np
import PIL.Image
import pytest
import torch
from reference import COLS, HEIGHT, ROWS, VARIANTS, WIDTH, images, randomize, tiny_config
from transformers import AutoModelForDepthEstimation, AutoModelForSemanticSegmentation, Dinov2Config, Dinov2Model
from transformers import DPTImageProcessor as ImageProcessor
from transformers.models.dpt import DPTImageProcessorPil as ImageProcessorPil

from hf_vitreg import ViTRegForDepthEstimation, ViTRegForSemanticSegmentation, ViTRegModel
from hf_vitreg.evaluation.depth import build_depth_model, save_depth_head
from hf_vitreg.evaluation.extraction import FeatureSpec, preprocess
from hf_vitreg.evaluation.feature_cache import MappedTensor
from hf_vitreg.evaluation.patch_heads import (
    PatchFeatures,
    dense_image_processor,
    head_outputs,
    load_head,
    read_target,
    train_head,
)
from hf_vitreg.evaluation.segmentation import build_segmentation_model, save_segmentation_head
from hf_vitreg.features import VisionEncoder, load_vit
from hf_vitreg.modeling_vitreg import ViTRegDepthHead, ViTRegSegmentationHead


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
NAMES = ["sky", "road", "tree"]
BUILT = {"segmentation": ViTRegForSemanticSegmentation, "depth": ViTRegForDepthEstimation}


def encoder_of(**values) -> VisionEncoder:
    return VisionEncoder.wrap(randomize(ViTRegModel(tiny_config(**values))), "tiny", MEAN, STD)


def cached(encoder: VisionEncoder, pixel_values: torch.Tensor, layers: list[int], with_cls: bool) -> PatchFeatures:
    """What the cache would hold of these images."""
    tokens = encoder.layers(pixel_values, layers)
    split = [encoder.split(encoder.final(tokens[layer])) for layer in layers]
    cls = torch.stack([each.cls for each in split], dim=1) if with_cls and encoder.has_cls else None
    return PatchFeatures(
        torch.stack([each.patches for each in split], dim=1), encoder.grid(*pixel_values.shape[-2:]), cls
    )


def head_for(task: str, features: PatchFeatures):
    torch.manual_seed(3)
    if task == "depth":
        return ViTRegDepthHead(features.num_channels, 19, 0.5, 7.0)
    head = ViTRegSegmentationHead(features.num_channels, len(NAMES)).eval()
    torch.nn.init.normal_(head.batch_norm.running_mean)
    return head


def built(task: str, encoder, layers, head):
    if task == "depth":
        return build_depth_model(encoder, layers, head)
    return build_segmentation_model(encoder, layers, head, NAMES)


@pytest.mark.parametrize("task", BUILT)
@pytest.mark.parametrize("layers", [[-1], [1, 4], [-4, -3, -2, -1]])
@pytest.mark.parametrize("variant", ["rope", "attended", "mean_normed", "projected", "distilled", "normed_queries"])
def test_built_model_says_of_images_what_the_head_says_of_their_cached_features(tmp_path, variant, layers, task):
    encoder = encoder_of(**VARIANTS[variant])
    pixel_values = images(28, 35)
    features = cached(encoder, pixel_values, layers, with_cls=task == "depth")
    head = head_for(task, features)
    expected = torch.cat([output for _, output in head_outputs(head, features)])
    model = built(task, encoder, layers, head)
    if task == "depth":
        expected = torch.nn.functional.interpolate(expected[:, None], size=(28, 35), mode="bilinear")[:, 0]
        assert (model.config.num_depth_bins, model.config.min_depth, model.config.max_depth) == (19, 0.5, 7.0)
    else:
        assert list(model.config.id2label.values()) == NAMES and model.config.label2id["tree"] == 2
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values)[0], expected)
    # the encoder is as it was
    assert encoder.model.config.id2label != model.config.id2label


@pytest.mark.parametrize("task", BUILT)
def test_saved_model_and_processor_load_by_their_auto_classes(tmp_path, task):
    encoder = encoder_of()
    features = cached(encoder, images(), [-2, -1], with_cls=task == "depth")
    model = built(task, encoder, [-2, -1], head_for(task, features))
    model.save_pretrained(tmp_path)
    dense_image_processor(encoder, 28, 35).save_pretrained(tmp_path)
    auto_class = AutoModelForDepthEstimation if task == "depth" else AutoModelForSemanticSegmentation
    loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is BUILT[task] and not any(report.values())
    processor = ImageProcessor.from_pretrained(tmp_path)
    gray = np.arange(61 * 83, dtype=np.uint8).reshape(61, 83, 1).repeat(3, axis=2)
    pixel_values = processor(gray, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 28, 35)
    assert tuple(processor.image_mean) == MEAN and tuple(processor.image_std) == STD
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values)[0], model(pixel_values)[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_encoder_can_be_loaded_from_what_was_saved(tmp_path, variant):
    encoder, pixel_values = encoder_of(**VARIANTS[variant]), images(28, 35)
    features = cached(encoder, pixel_values, [-1], with_cls=False)
    built("segmentation", encoder, [-1], head_for("segmentation", features)).save_pretrained(tmp_path)
    dense_image_processor(encoder, 28, 35).save_pretrained(tmp_path)
    loaded = load_vit(tmp_path)
    assert tuple(loaded.mean) == MEAN
    again = cached(loaded, pixel_values, [-1], with_cls=False)
    torch.testing.assert_close(again.patches, features.patches)


def test_half_precision_encoder_makes_a_float32_model():
    encoder = encoder_of()
    features = cached(encoder, images(), [-1], with_cls=False)
    encoder.model.to(torch.bfloat16)
    model = built("segmentation", encoder, [-1], head_for("segmentation", features))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_head_of_another_model_is_saved_alone_and_what_to_do_is_said(tmp_path):
    config = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=21, patch_size=7)
    encoder = VisionEncoder.wrap(Dinov2Model(config), "org/dinov2", MEAN, STD)
    features = PatchFeatures(torch.randn(2, 1, 9, 48), (3, 3), torch.randn(2, 1, 48))
    for task, save in (("segmentation", save_segmentation_head), ("depth", save_depth_head)):
        head = head_for(task, features)
        with pytest.raises(
            ValueError, match=r"org/dinov2 is no ViTReg \(transformers dinov2\).*Convert the model first"
        ):
            built(task, encoder, [-1], head)
        names = (NAMES,) if task == "segmentation" else ()
        save(tmp_path, encoder, [-1], head, *names)
        state, facts = load_head(tmp_path, f"{task}_head")
        assert all(torch.equal(tensor, state[name]) for name, tensor in head.state_dict().items())
        assert facts["encoder"] == "org/dinov2" and facts["layers"] == [-1] and "convert the encoder" in facts["note"]
    assert facts["max_depth"] == 7.0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "depth_head.json",
        "depth_head.safetensors",
        "segmentation_head.json",
        "segmentation_head.safetensors",
    ]
    assert json.loads((tmp_path / "segmentation_head.json").read_text())["classes"] == NAMES


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([-1, -2], "layers must ascend"),
        ([1, 1], "layers must ascend"),
        ([], "layers must ascend"),
        ([0, -1], "The head reads 48 channels, and 2 layers of tiny have 96"),
    ],
)
def test_layers_that_are_not_those_of_the_head_are_refused(layers, message):
    encoder = encoder_of()
    head = head_for("segmentation", cached(encoder, images(), [-1], with_cls=False))
    with pytest.raises(ValueError, match=message):
        built("segmentation", encoder, layers, head)


def test_class_names_are_as_many_as_classes():
    encoder = encoder_of()
    head = head_for("segmentation", cached(encoder, images(), [-1], with_cls=False))
    with pytest.raises(ValueError, match="There are 2 class names for a head of 3"):
        build_segmentation_model(encoder, [-1], head, NAMES[:2])


def test_processor_needs_whole_patches_and_a_normalization():
    with pytest.raises(ValueError, match="height of 27 pixels is no multiple of the patch size 7"):
        dense_image_processor(encoder_of(), 27, 35)
    encoder = encoder_of()
    encoder.mean = None
    with pytest.raises(ValueError, match="tiny normalizes its images with is not known"):
        dense_image_processor(encoder, 28, 35)


@pytest.mark.parametrize("backend", [ImageProcessor, ImageProcessorPil])
def test_processor_makes_of_an_image_what_the_features_were_made_of(tmp_path, backend):
    encoder = encoder_of()
    dense_image_processor(encoder, 28, 35).save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels).resize((83, 61), PIL.Image.Resampling.BICUBIC)
    spec = FeatureSpec(kinds=("patches",), size=(28, 35), preprocessing="stretch")
    actual = backend.from_pretrained(tmp_path)(image, return_tensors="pt").pixel_values[0]
    # two of 256 steps of brightness
    torch.testing.assert_close(actual, preprocess(encoder, image, spec), rtol=0, atol=2 / 255 / min(STD) + 1e-5)


# Features and targets


def test_features_are_read_from_several_mapped_files():
    patches, cls = torch.randn(5, 2, 6, 3), torch.randn(5, 2, 3)
    whole = PatchFeatures(patches, (2, 3), cls)
    parts = PatchFeatures(MappedTensor(patches.split(2)), (2, 3), MappedTensor(cls.split(3)))
    assert len(parts) == 5 and parts.num_channels == whole.num_channels == 12
    assert all(torch.equal(parts.map(index), whole.map(index)) for index in range(5))


def test_features_say_what_shape_they_must_have():
    with pytest.raises(ValueError, match=r"shape \(images, layers, 3 \* 7, hidden_size\), got \(2, 1, 20, 5\)"):
        PatchFeatures(torch.randn(2, 1, 20, 5), (3, 7))
    with pytest.raises(ValueError, match=r"CLS features must have shape \(2, 1, 5\)"):
        PatchFeatures(torch.randn(2, 1, ROWS * COLS, 5), (ROWS, COLS), torch.randn(2, 1, 4))


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_targets_are_read_from_a_sequence_or_a_function(kind):
    maps = [kind(np.arange(6).reshape(2, 3) + index) for index in range(4)]
    for targets in (maps, maps.__getitem__):
        assert read_target(targets, 3).tolist() == [[3, 4, 5], [6, 7, 8]]


def test_resized_targets_hold_the_nearest_pixels():
    target = torch.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    for size in ((5, 11), (40, 60), (HEIGHT, WIDTH)):
        expected = torch.nn.functional.interpolate(target[None, None].double(), size=size, mode="nearest-exact")
        assert torch.equal(read_target([target], 0, size), expected[0, 0].long())


def test_what_is_no_map_is_refused():
    for target in (np.zeros((2, 3, 4)), np.zeros((0, 3))):
        with pytest.raises(ValueError, match=r"Target 0 must have shape \(height, width\)"):
            read_target([target], 0)


# Training


def train(features, num_steps: int = 11, batch_size: int = 3, seed: int = 5, **values):
    """What is seen, and the learning rate and number of each step, of a head that learns nothing."""
    seen, rates = [], []
    head = torch.nn.Conv2d(features.num_channels, 1, 1)

    def backward(output, labels, step):
        seen.extend(label.item() for label in labels)
        weight = head.weight.detach().clone()
        head.weight.grad, head.bias.grad = torch.ones_like(head.weight), torch.ones_like(head.bias)
        rates.append(weight)
        return 1.0

    settings = {
        "learning_rate": 0.1,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "decay": lambda done: 1 - done,
        "max_grad_norm": 1.0,
        "accelerator": None,
        "on_step": None,
    }
    train_head(
        head,
        features,
        torch.tensor,
        backward,
        num_steps=num_steps,
        batch_size=batch_size,
        seed=seed,
        **settings | values,
    )
    rates.append(head.weight.detach())
    steps = [(before - after).mean().item() for before, after in pairwise(rates)]
    return seen, steps


FEATURES = PatchFeatures(torch.randn(7, 1, 6, 2), (2, 3))


def test_every_image_is_seen_before_one_is_seen_again():
    seen, _ = train(FEATURES, num_steps=14)
    assert len(seen) == 42
    epochs = [seen[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert train(FEATURES, num_steps=14)[0] == seen != train(FEATURES, num_steps=14, seed=6)[0]
    # no more than all at once
    assert sorted(train(FEATURES, num_steps=1, batch_size=100)[0]) == list(range(7))


def test_learning_rate_rises_and_decays():
    """Adam's steps under equal gradients are the learning rate."""
    _, steps = train(FEATURES, num_steps=10, warmup_steps=4)
    expected = [0.1 * (1 - step / 10) * min(1, (step + 1) / 4) for step in range(10)]
    assert steps == pytest.approx(expected, rel=1e-4)


def test_steps_are_reported():
    reports = []
    train(FEATURES, num_steps=3, on_step=lambda step, loss: reports.append((step, loss)))
    assert reports == [(1, 1.0), (2, 1.0), (3, 1.0)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_steps": 0}, "needs images, steps and a batch size, got 7, 0 and 3"),
        ({"batch_size": 0}, "got 7, 11 and 0"),
    ],
)
def test_nothing_to_train_is_an_error(values, message):
    with pytest.raises(ValueError, match=message):
        train(FEATURES, **values)
    with pytest.raises(ValueError, match="got 0, 11 and 3"):
        train(PatchFeatures(torch.randn(0, 1, 6, 2), (2, 3)))
