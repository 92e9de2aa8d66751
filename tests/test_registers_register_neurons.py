# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Planted neurons are found, exactly; scores are those of the published code, written out image by image."""

import dataclasses

import pytest
import timm
import torch
from planted import (
    MANY_COLS,
    MANY_ROWS,
    MEAN,
    NUM_LAYERS,
    PATCH_SIZE,
    REGISTER_NEURONS,
    STD,
    patchy_image,
    planted_encoder,
    planted_neurons,
)
from reference import transformers_state_dict
from timm.models.vision_transformer import ParallelScalingBlock
from transformers import Dinov2Config, Dinov2Model

from hf_vitreg.features import VisionEncoder
from hf_vitreg.registers.neuron_scores import NeuronScores
from hf_vitreg.registers.register_neurons import PUBLISHED, find_register_neurons
from hf_vitreg.registers.test_time import with_test_time_registers


NUM_IMAGES, THRESHOLD = 30, 30.0
NUM_PLANTED = sum(map(len, REGISTER_NEURONS.values()))


@pytest.fixture(scope="module")
def images():
    return [patchy_image(index, MANY_ROWS, MANY_COLS)[0] for index in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def found(images):
    return find_register_neurons(planted_neurons(), images)


def chosen(neurons) -> dict[int, set[int]]:
    return {layer: set(each) for layer, each in neurons.items()}


def transformers_dinov2(encoder: VisionEncoder) -> VisionEncoder:
    """The same model as transformers has it, whose grids are square."""
    config = encoder.model.config
    theirs = Dinov2Model(
        Dinov2Config(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            patch_size=config.patch_size,
            image_size=config.image_size[0],
        )
    )
    weights = transformers_state_dict(encoder.model.state_dict())
    theirs.load_state_dict({**weights, "embeddings.mask_token": torch.zeros(1, config.hidden_size)})
    return VisionEncoder.wrap(theirs, "dinov2", MEAN, STD)


# The planted phenomenon


def test_automatic_settings_find_exactly_the_planted_neurons(found):
    assert chosen(found.neurons) == chosen(REGISTER_NEURONS)
    assert {(layer, neuron) for layer, neurons in REGISTER_NEURONS.items() for neuron in neurons} == set(found.ranking)
    # most outliers are at the places that the last neuron makes outliers of
    assert found.highest_layer == max(REGISTER_NEURONS) and found.detect_layer == NUM_LAYERS - 1
    assert found.num_images == found.num_images_with_outliers == NUM_IMAGES
    assert found.target_share == pytest.approx(0.05 * found.outlier_share)
    assert found.shifted_share == found.tried[NUM_PLANTED] <= found.target_share < found.tried[NUM_PLANTED - 1]
    assert found.reaches_target


def test_what_was_found_cures_the_model(found, images):
    encoder = planted_neurons()
    shifted = VisionEncoder.wrap(with_test_time_registers(encoder.model, found.neurons))
    shares = [
        (each.layers(encoder.preprocess(images), [-1])[-1][:, each.patch_slice].norm(dim=-1) > found.threshold)
        .float()
        .mean()
        .item()
        for each in (encoder, shifted)
    ]
    assert shares == pytest.approx([found.outlier_share, found.shifted_share], abs=1e-7)


@pytest.mark.parametrize("values", [{"use_swiglu_ffn": True}, {"num_registers": 3}], ids=["swiglu", "registers"])
def test_other_models_with_planted_neurons(images, values):
    settings = {"threshold": THRESHOLD, "highest_layer": 3, "num_neurons": NUM_PLANTED}
    found = find_register_neurons(planted_neurons(**values), images, **settings)
    assert chosen(found.neurons) == chosen(REGISTER_NEURONS)
    assert (found.threshold, found.target_share, found.shifted_share, found.reaches_target) == (30, None, None, None)


def test_a_model_of_transformers_has_the_same_neurons_and_is_left_as_it_was(found):
    square = (MANY_ROWS * PATCH_SIZE,) * 2
    images = [patchy_image(index, MANY_ROWS, MANY_ROWS)[0] for index in range(NUM_IMAGES)]
    ours = planted_neurons(image_size=square, mlp_ratio=4, interpolate_antialias=False)
    theirs = transformers_dinov2(ours)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in theirs.model.modules()]
    expected, actual = (find_register_neurons(encoder, images) for encoder in (ours, theirs))
    assert chosen(actual.neurons) == chosen(expected.neurons) == chosen(REGISTER_NEURONS)
    assert actual.tried == expected.tried
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-4, atol=1e-6)
    after = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in theirs.model.modules()]
    assert after == hooks and not any("forward" in block.__dict__ for block in theirs.blocks)


def test_results_do_not_depend_on_the_batch_size(found, images):
    again = find_register_neurons(planted_neurons(), images, batch_size=7)
    assert again.neurons == found.neurons and again.tried == found.tried
    torch.testing.assert_close(again.scores, found.scores, rtol=1e-5, atol=1e-7)


# The published scores


def activations_and_outputs(encoder, image) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of every layer what enters the last linear map of its MLP, and what it returns, for one image."""
    hidden, outputs = [], []
    hooks = [block.register_forward_hook(lambda *args: outputs.append(args[2][0])) for block in encoder.blocks]
    hooks += [down.register_forward_pre_hook(lambda _, args: hidden.append(args[0][0])) for _, down in encoder.mlps()]
    with torch.no_grad():
        encoder.model(encoder.preprocess([image]))
    for hook in hooks:
        hook.remove()
    return hidden, outputs


def published_scores(encoder, images, threshold, detect_layer, only_patches, only_sparse):
    """As in the released code, one image at a time, with every activation kept."""
    scores = []
    for image in images:
        hidden, outputs = activations_and_outputs(encoder, image)
        where = [token for token, norm in enumerate(outputs[detect_layer].norm(dim=-1).tolist()) if norm > threshold]
        if only_patches:
            where = [token for token in where if token >= encoder.num_prefix_tokens]
        if where:
            of_image = torch.stack([activations[where].abs().mean(0) for activations in hidden])
            sparse = torch.stack([(activations < 0.5).float().mean(0) >= 0.5 for activations in hidden])
            scores.append(of_image * sparse if only_sparse else of_image)
    return torch.stack(scores).mean(0), len(scores)


@pytest.mark.parametrize("only_patches", [True, False])
@pytest.mark.parametrize("only_sparse", [True, False])
def test_scores_are_the_published_ones(images, only_patches, only_sparse):
    encoder = planted_neurons(use_swiglu_ffn=only_patches, num_registers=2)
    # some neurons are active everywhere, in CLS too
    with torch.no_grad():
        mlp = encoder.model.encoder.layer[0].mlp
        (mlp.up_proj if only_patches else mlp.fc1).bias[20:30] = 3.0
        encoder.model.embeddings.cls_token.mul_(100)
    settings = (THRESHOLD, -2, only_patches, only_sparse)
    expected, num_used = published_scores(encoder, images[:9], *settings)
    found = find_register_neurons(
        encoder,
        images[:9],
        threshold=THRESHOLD,
        detect_layer=-2,
        highest_layer=NUM_LAYERS - 1,
        num_neurons=20,
        only_patches=only_patches,
        only_sparse=only_sparse,
        batch_size=4,
    )
    assert found.num_images_with_outliers == num_used
    torch.testing.assert_close(found.scores, expected.double(), rtol=1e-4, atol=1e-5)
    least = expected.flatten().topk(20).values[-1]
    assert all(expected[layer, neuron] > 0.999 * least for layer, neuron in found.ranking)


def test_images_without_outliers_count_for_nothing(images):
    encoder = planted_neurons()
    with torch.no_grad():
        encoder.model.encoder.layer[3].mlp.fc2.weight[:, 7] = 0
        pixel_values = torch.cat([encoder.preprocess(images[:3]), torch.randn(2, 3, *encoder.image_size)])
    scores, expected = (NeuronScores(encoder, THRESHOLD, NUM_LAYERS - 1) for _ in range(2))
    scores.update(pixel_values)
    expected.update(pixel_values[:3])
    assert (scores.num_images, scores.num_images_with_outliers) == (5, 3)
    torch.testing.assert_close(scores.mean, expected.mean)


# Settings


def test_published_settings_are_arguments(images):
    assert all(settings["num_neurons"] in (10, 45, 50) for settings in PUBLISHED.values())
    found = find_register_neurons(planted_neurons(), images, **{**PUBLISHED["openclip-base-code"], "highest_layer": 3})
    assert len(found.ranking) == 10 and found.threshold == 30
    planted = {(layer, neuron) for layer, neurons in REGISTER_NEURONS.items() for neuron in neurons}
    assert set(found.ranking[:NUM_PLANTED]) == planted


def test_neurons_are_of_the_layers_that_were_asked_for(images):
    encoder = planted_neurons()
    found = find_register_neurons(encoder, images, threshold=THRESHOLD, highest_layer=2, num_neurons=2)
    assert chosen(found.neurons) == {1: set(REGISTER_NEURONS[1])}


def test_a_target_that_is_never_reached_is_said(images):
    found = find_register_neurons(planted_neurons(), images, highest_layer=2, max_neurons=5)
    assert found.reaches_target is False and set(found.tried) == {1, 2, 4, 5}
    assert found.shifted_share == min(found.tried.values()) > found.target_share
    # of equal shares that of the fewest neurons
    assert chosen(found.neurons) == {1: set(REGISTER_NEURONS[1])}


def test_another_target_needs_fewer_neurons(images):
    found = find_register_neurons(planted_neurons(), images, target_share=0.02)
    assert found.reaches_target and len(found.ranking) < NUM_PLANTED


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"threshold": 1e4},
            r"No patch of 30 images has a norm above 1e\+04 after layer 4 of planted; the largest is",
        ),
        ({"threshold": -1.0}, "threshold must be positive and finite"),
        ({"threshold": "mean"}, "one of 'mean\\+3std'"),
        ({"detect_layer": 5}, "layer 5 does not exist"),
        ({"highest_layer": 5}, "has layers 0 to 4, got highest_layer=5"),
        ({"num_neurons": 0}, "num_neurons must be 1 or more, got 0"),
        ({"num_neurons": 10**6, "highest_layer": 1}, "Layers 0 to 1 have 384 neurons, 1000000 were asked for"),
        ({"target_share": 1.0}, "target_share must be 0 or more and below 1, got 1.0"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"images": []}, "There are no images"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_so(images, changes, named):
    with pytest.raises(ValueError, match=named):
        find_register_neurons(planted_neurons(), **{"images": images, **changes})


def test_a_model_without_artifacts_is_refused_unless_the_threshold_is_given(images):
    encoder = planted_encoder(1.0)
    with pytest.raises(
        ValueError, match=r"are the tail of the others and no artifacts.*give the threshold as a number"
    ):
        find_register_neurons(encoder, images)
    norms = encoder.layers(encoder.preprocess(images), [-1])[-1][:, encoder.patch_slice].norm(dim=-1)
    found = find_register_neurons(encoder, images, threshold=norms.quantile(0.98).item(), num_neurons=1)
    assert found.outlier_share == pytest.approx(0.02, abs=2e-3)


def test_models_that_have_no_such_neurons_are_refused(images):
    encoder = planted_neurons()
    shifted = with_test_time_registers(encoder.model, REGISTER_NEURONS)
    with pytest.raises(ValueError, match="has 1 test-time registers already"):
        find_register_neurons(VisionEncoder.wrap(shifted, mean=MEAN, std=STD), images)
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 7, "img_size": 35, "num_classes": 0}
    parallel = timm.models.VisionTransformer(**sizes, block_fn=ParallelScalingBlock)
    with pytest.raises(ValueError, match=r"Layer 0 of .*, a ParallelScalingBlock, is not one attention and one MLP"):
        find_register_neurons(VisionEncoder.wrap(parallel, mean=MEAN, std=STD), images, threshold=THRESHOLD)


def test_what_was_found_cannot_be_changed(found):
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.threshold = 3.0
