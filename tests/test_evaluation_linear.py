# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch
from reference import images, randomize, tiny_config
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from hf_vitreg import ViTRegForImageClassification, ViTRegModel
from hf_vitreg.evaluation import linear
from hf_vitreg.evaluation.labelled import ImageFeatures
from hf_vitreg.evaluation.linear import (
    LEARNING_RATES,
    HeadSettings,
    LinearHead,
    classifier_from_head,
    linear_sweep,
)


NUM_TRAIN, NUM_VALIDATION, NUM_LAYERS, HIDDEN_SIZE, NUM_CLASSES = 97, 41, 5, 13, 7


def features_of(num_images: int, offset: int = 0) -> ImageFeatures:
    labels = (torch.arange(num_images) + offset) % NUM_CLASSES
    means = torch.randn(NUM_CLASSES, NUM_LAYERS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))
    cls = means[labels] + 1.5 * torch.randn(num_images, NUM_LAYERS, HIDDEN_SIZE)
    return ImageFeatures(cls, labels, cls.roll(1, dims=2))


@pytest.fixture
def problem():
    return features_of(NUM_TRAIN), features_of(NUM_VALIDATION, offset=3)


def head_inputs(features: ImageFeatures, settings: HeadSettings) -> torch.Tensor:
    tokens = list(features.cls[:, -settings.num_layers :].unbind(1))
    return torch.cat(tokens + [features.patch_mean[:, -1]] * settings.use_patch_mean, dim=1)


def trained_by_torch(settings: HeadSettings, head: int, train: ImageFeatures, batch_size: int, steps: int, seed: int):
    """The same head, batches and initial weight through autograd and torch's own optimizer and schedule."""
    inputs = head_inputs(train, settings)
    layer = nn.Linear(inputs.shape[1], NUM_CLASSES)
    with torch.no_grad():
        layer.weight.copy_(linear._initial_weight(NUM_CLASSES, inputs.shape[1], seed, head))
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=settings.learning_rate * batch_size / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in linear._batches(torch.arange(len(inputs)), batch_size, steps, seed):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(inputs[batch]), train.labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return layer


@pytest.mark.parametrize("num_layers", [1, 4])
@pytest.mark.parametrize("use_patch_mean", [False, True])
def test_head_is_that_of_torch(problem, num_layers, use_patch_mean):
    train, validation = problem
    options = {"layers": (num_layers,), "patch_mean": (use_patch_mean,), "batch_size": 19, "num_iterations": 60}
    sweep = linear_sweep(train, validation, NUM_CLASSES, learning_rates=(0.5,), seed=11, **options)
    layer = trained_by_torch(sweep.best.settings, 0, train, batch_size=19, steps=60, seed=11)
    torch.testing.assert_close(sweep.best.weight, layer.weight.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(sweep.best.bias, layer.bias.detach(), atol=1e-6, rtol=0)
    expected = layer(head_inputs(validation, sweep.best.settings)).detach()
    torch.testing.assert_close(sweep.best.logits(validation.cls, validation.patch_mean), expected, atol=1e-5, rtol=0)
    accuracy = (expected.argmax(dim=1) == validation.labels).double().mean().item()
    assert sweep.best_score.accuracy == sweep.best_score.selection_accuracy == accuracy


@pytest.mark.parametrize("columns", [1, 3 * NUM_CLASSES, 1024])
def test_stacked_heads_are_those_of_torch(problem, monkeypatch, columns):
    """Whatever else is in their stack. Accuracies of all heads, and the weight of the best."""
    monkeypatch.setattr(linear, "COLUMNS", columns)
    train, validation = problem
    rates = (0.003, 0.03, 0.3, 3.0)
    sweep = linear_sweep(train, validation, NUM_CLASSES, learning_rates=rates, batch_size=29, num_iterations=20)
    assert len(sweep.scores) == 16
    for head, score in enumerate(sweep.scores):
        layer = trained_by_torch(score.settings, head, train, batch_size=29, steps=20, seed=0)
        predicted = layer(head_inputs(validation, score.settings)).argmax(dim=1)
        assert score.accuracy == (predicted == validation.labels).double().mean().item()
        if score == sweep.best_score:
            torch.testing.assert_close(sweep.best.weight, layer.weight.detach(), atol=1e-6, rtol=1e-6)


def test_batches_are_full_and_passes_complete():
    batches = list(linear._batches(torch.arange(40, 53), 5, 26, seed=1))
    assert all(len(batch) == 5 for batch in batches)
    epochs = torch.cat(batches).view(10, 13)
    assert (epochs.sort(dim=1).values == torch.arange(40, 53)).all()
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 10
    # more than there are
    assert [len(batch) for batch in linear._batches(torch.arange(3), 7, 2, seed=1)] == [7, 7]


def test_default_sweep_is_dinov2s(problem):
    sweep = linear_sweep(*problem, NUM_CLASSES, num_iterations=1)
    names = [score.settings.name for score in sweep.scores]
    assert len(names) == len(set(names)) == 52 == 4 * len(LEARNING_RATES)
    assert names[0] == "1 layer, lr 1e-05" and names[-4] == "4 layers, patch mean, lr 0.01"


def test_epochs_are_steps(problem):
    steps = []
    linear_sweep(*problem, NUM_CLASSES, num_epochs=2.5, batch_size=20, on_step=lambda *step: steps.append(step))
    assert steps == [(step, 12) for step in range(1, 13)]


def test_best_head_beats_the_worst_and_equals_logistic_regression():
    values, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    values, labels = torch.from_numpy(values).float()[order] / 8 - 1, torch.from_numpy(labels)[order]
    train, validation = ImageFeatures(values[:1200], labels[:1200]), ImageFeatures(values[1200:], labels[1200:])
    sweep = linear_sweep(train, validation, 10, layers=(1,), patch_mean=(False,), num_iterations=2000)
    reference = LogisticRegression(max_iter=1000).fit(values[:1200], labels[:1200])
    assert sweep.best_score.accuracy == max(score.accuracy for score in sweep.scores)
    assert sweep.best_score.accuracy > min(score.accuracy for score in sweep.scores) + 0.05
    assert sweep.best_score.accuracy == pytest.approx(reference.score(values[1200:], labels[1200:]), abs=0.01)


def test_held_out_images_choose_and_train_nothing(problem):
    train, validation = problem
    options = {"selection": "held_out", "held_out_share": 0.3, "num_iterations": 20, "learning_rates": (1e-5, 1.0)}
    sweep = linear_sweep(train, validation, NUM_CLASSES, **options)
    _, held_out = linear.held_out_split(train.labels, 0.3, seed=0)
    assert sweep.best_score.selection_accuracy == max(score.selection_accuracy for score in sweep.scores)
    predicted = sweep.best.logits(train.cls[held_out], train.patch_mean[held_out]).argmax(dim=1)
    assert sweep.best_score.selection_accuracy == (predicted == train.labels[held_out]).double().mean().item()
    one_head = {**options, "learning_rates": (1.0,), "layers": (1,), "patch_mean": (False,)}
    before = linear_sweep(train, validation, NUM_CLASSES, **one_head)
    train.cls[held_out] *= -100
    after = linear_sweep(train, validation, NUM_CLASSES, **one_head)
    assert torch.equal(before.best.weight, after.best.weight)
    assert before.best_score.selection_accuracy != after.best_score.selection_accuracy


def test_seed_decides_and_nothing_else(problem):
    first, again, other = (
        linear_sweep(*problem, NUM_CLASSES, learning_rates=(0.1,), num_iterations=5, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.best.weight, again.best.weight)
    assert first.best.weight.shape != other.best.weight.shape or not torch.equal(first.best.weight, other.best.weight)


def test_a_head_that_diverges_is_not_chosen(problem):
    rates = (1e39, 1e-2)
    sweep = linear_sweep(*problem, NUM_CLASSES, learning_rates=rates, num_iterations=30)
    assert [score.accuracy for score in sweep.scores if score.settings.learning_rate == 1e39] == [0] * 4
    assert sweep.best.settings.learning_rate == 1e-2
    with pytest.raises(ValueError, match="Every head diverged"):
        linear_sweep(*problem, NUM_CLASSES, learning_rates=rates[:1], num_iterations=30)


@pytest.mark.parametrize(("num_layers", "layout"), [(1, "cls"), (4, "last4_cls")])
@pytest.mark.parametrize("use_patch_mean", [False, True])
def test_classifier_has_the_logits_of_the_head(num_layers, layout, use_patch_mean):
    """On features as the cache has them: every layer after the final norm."""
    model = randomize(ViTRegModel(tiny_config(projection_dim=29)))
    before, pixel_values = copy.deepcopy(model.state_dict()), images()
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True)
        cls = torch.stack([model.layernorm(states)[:, 0] for states in outputs.hidden_states[1:]], dim=1)
        settings = HeadSettings(num_layers, use_patch_mean, 0.1)
        width = (num_layers + use_patch_mean) * model.config.hidden_size
        head = LinearHead(settings, torch.randn(3, width), torch.randn(3))
        classifier = classifier_from_head(model, head, ["ape", "bee", "cat"])
        expected = head.logits(cls, outputs.patch_tokens.mean(dim=1))
        torch.testing.assert_close(classifier(pixel_values).logits, expected, atol=1e-4, rtol=1e-4)
    assert classifier.config.classifier_layout == layout + "_mean" * use_patch_mean
    assert classifier.config.id2label == {0: "ape", 1: "bee", 2: "cat"} and classifier.config.num_labels == 3
    assert not classifier.training and model.config.num_labels == 11
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_classifier_of_a_classifier_saves_and_loads(tmp_path):
    model = randomize(ViTRegForImageClassification(tiny_config(classifier_layout="last4_cls_mean"))).bfloat16()
    head = LinearHead(HeadSettings(1, True, 0.1), torch.randn(3, 96), torch.randn(3))
    classifier = classifier_from_head(model, head)
    classifier.save_pretrained(tmp_path)
    loaded = ViTRegForImageClassification.from_pretrained(tmp_path, dtype="auto")
    pixel_values = images().bfloat16()
    assert torch.equal(loaded(pixel_values).logits, classifier(pixel_values).logits)
    assert loaded.config.id2label[2] == "LABEL_2" and loaded.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("head", "names", "named"),
    [
        ((2, False, 96), None, r"last 1 or 4 layers, and this head \(2 layers, lr 0.1\) others"),
        ((1, False, 48), ["ape"], "3 classes, but 1 class_names"),
        (
            (1, True, 48),
            None,
            'reads 48 channels, but a classifier of this model with classifier_layout="cls_mean" 96',
        ),
    ],
)
def test_heads_that_no_classifier_has_are_refused(head, names, named):
    num_layers, use_patch_mean, width = head
    head = LinearHead(HeadSettings(num_layers, use_patch_mean, 0.1), torch.zeros(3, width), torch.zeros(3))
    with pytest.raises(ValueError, match=named):
        classifier_from_head(ViTRegModel(tiny_config()), head, names)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"cls": torch.zeros(NUM_TRAIN, 3, HIDDEN_SIZE)},
            r"last 4 layers, but the training .* \(97, 3, 13\).*layers=",
        ),
        ({"cls": torch.full((NUM_TRAIN, 4, HIDDEN_SIZE), torch.nan)}, "training features of image 0 are NaN"),
        ({"patch_mean": None}, "training features have no patch_mean"),
        ({"patch_mean": torch.zeros(NUM_TRAIN, 5)}, r"patch_mean of the training features has shape \(97, 5\)"),
        ({"patch_mean": torch.full((NUM_TRAIN, HIDDEN_SIZE), torch.inf)}, "training patch_mean features of image 0"),
        ({"labels": None}, "training images have no labels"),
        ({"labels": torch.arange(NUM_TRAIN) % 8}, "image 7 has 7"),
        ({"labels": torch.arange(NUM_TRAIN) % 6}, "1 of 7 classes have no image"),
    ],
)
def test_features_that_cannot_be_are_refused(problem, changes, named):
    with pytest.raises(ValueError, match=named):
        linear_sweep(problem[0]._replace(**changes), problem[1], NUM_CLASSES)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"learning_rates": ()}, "at least one value"),
        ({"layers": (1, 1)}, "none twice"),
        ({"layers": (0,)}, "layers must be 1 or more"),
        ({"learning_rates": (0.1, -0.1)}, "learning_rates positive, got 1 layer, lr -0.1"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"selection": "test"}, "got 'test'"),
        ({"num_iterations": 0}, "must be positive, got 10 and 0"),
        ({"num_epochs": 0}, "must be positive, got 0 and None"),
    ],
)
def test_options_that_cannot_be_are_refused(problem, options, named):
    with pytest.raises(ValueError, match=named):
        linear_sweep(*problem, NUM_CLASSES, **options)
