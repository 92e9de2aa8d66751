# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from reference import PATCH_SIZE, randomize, tiny_config
from torch.nn.functional import interpolate

from hf_vitreg import ViTRegForDepthEstimation, ViTRegModel
from hf_vitreg.evaluation.depth import build_depth_model, depth_loss, evaluate_depth, train_depth_head
from hf_vitreg.evaluation.patch_heads import PatchFeatures
from hf_vitreg.features import VisionEncoder
from hf_vitreg.metrics.depth import DepthErrors


ROWS, COLS = 4, 6


def ramps(num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that are the brighter the farther away, and their depth, which falls or rises evenly across them."""
    generator = torch.Generator().manual_seed(seed)
    corners = 1 + 8 * torch.rand(num_images, 1, 2, 2, generator=generator)
    depth = interpolate(corners, size=(ROWS * PATCH_SIZE, COLS * PATCH_SIZE), mode="bilinear", align_corners=True)
    pixel_values = (depth - 5).expand(-1, 3, -1, -1) / 2
    return pixel_values + 0.1 * torch.randn(pixel_values.shape, generator=generator), depth[:, 0]


def features_of(encoder: VisionEncoder, pixel_values: torch.Tensor) -> PatchFeatures:
    layers = [encoder.split(encoder.final(tokens)) for tokens in encoder.layers(pixel_values, [0, -1]).values()]
    patches, cls = (torch.stack([getattr(layer, kind) for layer in layers], dim=1) for kind in ("patches", "cls"))
    return PatchFeatures(patches.half(), (ROWS, COLS), cls.half())


@pytest.fixture(scope="module")
def encoder():
    return VisionEncoder.wrap(randomize(ViTRegModel(tiny_config(num_hidden_layers=2))), "tiny")


@pytest.fixture(scope="module")
def trained(encoder):
    """A head, one that has hardly begun, and the features and depths that they have not seen."""
    pixel_values, depth = ramps(48, seed=0)
    features, depth = features_of(encoder, pixel_values), depth.numpy()
    heads = [
        train_depth_head(features, depth, num_steps=steps, batch_size=8, learning_rate=0.01, scale_steps=20)
        for steps in (1, 150)
    ]
    pixel_values, depth = ramps(9, seed=1)
    return *heads, features_of(encoder, pixel_values), depth, pixel_values


def test_head_learns_ramps(trained):
    untrained, head, features, depth, _ = trained
    before, after = (evaluate_depth(each, features, depth) for each in (untrained, head))
    spread = (depth - depth.mean(dim=(1, 2), keepdim=True)).square().mean(dim=(1, 2)).sqrt().mean().item()
    # better than the mean depth of each image
    assert after["rmse"] < min(before["rmse"] / 3, spread / 2)
    assert after["delta1"] > 0.9 > before["delta1"]


def test_errors_are_those_of_the_metric_at_the_size_of_each_target(trained):
    _, head, features, depth, _ = trained
    targets = [each[: 20 + index, : 30 + index].numpy().copy() for index, each in enumerate(depth)]
    for index, target in enumerate(targets):
        target[: index + 1] = 0
    metric, seen = DepthErrors(max_depth=8.0), {}
    errors = evaluate_depth(
        head, features, targets.__getitem__, max_depth=8.0, on_image=lambda index, each: seen.update({index: each})
    )
    for index, target in enumerate(targets):
        with torch.no_grad():
            predicted = head(features.map(index)[None].float())
        predicted = interpolate(predicted[None], size=target.shape, mode="bilinear")[0, 0]
        torch.testing.assert_close(seen[index], predicted)
        metric.add(prediction=seen[index].clamp(1e-3, 8.0).numpy(), reference=target)
    assert errors == pytest.approx(metric.compute())


def test_built_model_has_the_depth_and_the_loss_of_the_head(encoder, trained):
    _, head, features, depth, pixel_values = trained
    model = build_depth_model(encoder, [0, -1], head)
    assert type(model) is ViTRegForDepthEstimation
    with torch.no_grad():
        output = model(pixel_values, labels=depth)
        depths = head(torch.stack([features.map(index) for index in range(9)]).float())
    # the features that the head was given are of half precision
    assert (output.predicted_depth - depth).square().mean().sqrt() < 0.6
    loss = depth_loss(depths, list(depth), max_depth=10.0)
    assert loss.item() == pytest.approx(output.loss.item(), rel=0.02)


def test_loss_of_labels_of_several_sizes_is_that_of_all_their_pixels():
    depths, labels = torch.rand(2, 8, 12) + 1, [torch.rand(9, 13) + 1, torch.rand(15, 11) + 1]
    fitted = [
        interpolate(depth[None, None], size=label.shape, mode="bilinear")[0, 0] for depth, label in zip(depths, labels)
    ]
    logs = [(predicted + 1e-3).log() - (label + 1e-3).log() for predicted, label in zip(fitted, labels)]
    everything = torch.cat([log.flatten() for log in logs])
    expected = (everything.var() + 0.15 * everything.mean() ** 2).sqrt()
    torch.testing.assert_close(depth_loss(depths, labels, 10.0, gradient_weight=0.0), expected)
    warm_up = depth_loss(depths, labels, 10.0, gradient_weight=0.0, warming_up=True)
    torch.testing.assert_close(warm_up, 0.15**0.5 * everything.mean().abs())
    changes = 0.0
    for stride in (1, 2, 4, 6):
        strided = [log[::stride, ::stride] for log in logs]
        total = sum((log[2:] - log[:-2]).abs().sum() + (log[:, 2:] - log[:, :-2]).abs().sum() for log in strided)
        changes += total / sum(log.numel() for log in strided)
    torch.testing.assert_close(depth_loss(depths, labels, 10.0, gradient_weight=2.0), expected + 2 * changes)


_generator = torch.Generator().manual_seed(0)
WITH_CLS = PatchFeatures(
    torch.randn(5, 2, ROWS * COLS, 3, generator=_generator), (ROWS, COLS), torch.randn(5, 2, 3, generator=_generator)
)
DEPTHS = list((10 * torch.rand(5, 16, 18, generator=_generator)).numpy())


def small_head(features=WITH_CLS, targets=DEPTHS, **values):
    return train_depth_head(features, targets, **{"num_bins": 7, "num_steps": 5, "batch_size": 2, **values})


def test_training_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first = small_head(seed=3).state_dict()
    torch.manual_seed(2)
    second, other = small_head(seed=3).state_dict(), small_head(seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_first_steps_learn_the_scale_alone():
    all_scale, none = (small_head(scale_steps=steps, gradient_weight=0.0, learning_rate=0.1) for steps in (5, 0))
    assert not torch.equal(all_scale.classifier.weight, none.classifier.weight)


def test_labels_can_be_brought_to_a_size_for_the_loss():
    smaller = small_head(targets=[depth[1::2, 1::2] for depth in DEPTHS]).state_dict()
    asked = small_head(label_size=(8, 9)).state_dict()
    assert all(torch.equal(smaller[name], asked[name]) for name in asked)


def test_model_without_cls_has_a_head_on_patches_alone():
    head = small_head(PatchFeatures(WITH_CLS.patches, WITH_CLS.grid))
    assert head.classifier.weight.shape == (7, 6, 1, 1) and small_head().classifier.weight.shape == (7, 12, 1, 1)


@pytest.mark.parametrize("unknown", [0.0, float("nan"), float("inf")])
def test_depth_that_is_not_known_counts_nowhere(unknown):
    spoiled = [depth.copy() for depth in DEPTHS]
    for depth in spoiled:
        depth[:9] = unknown
    expected = [depth.copy() for depth in DEPTHS]
    for depth in expected:
        depth[:9] = 20.0
    first, second = (small_head(targets=targets).state_dict() for targets in (spoiled, expected))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert evaluate_depth(small_head(), WITH_CLS, spoiled) == evaluate_depth(small_head(), WITH_CLS, expected)


def test_targets_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match="There are 4 targets for the features of 5 images"):
        small_head(targets=DEPTHS[:4])
    with pytest.raises(ValueError, match=r"0 <= min_depth < max_depth, got 3\.0 and 2\.0"):
        small_head(min_depth=3.0, max_depth=2.0)
    head = small_head()
    with pytest.raises(ValueError, match=r"Target 4 has no depth between 0.001 and 10. Leave the image out"):
        evaluate_depth(head, WITH_CLS, [*DEPTHS[:4], np.zeros((3, 4))])
    with pytest.raises(ValueError, match="There are 3 targets for the features of 5 images"):
        evaluate_depth(head, WITH_CLS, DEPTHS[:3])
