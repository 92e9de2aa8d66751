# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch
import torch.nn.functional as F
from reference import VARIANTS, images, randomize, tiny_config

from hf_vitreg import ViTRegForImageClassification
from hf_vitreg.objective_options import SupervisedOptions
from hf_vitreg.objectives.supervised import SupervisedObjective


BATCH_SIZE, NUM_LABELS = 5, 11


def classifier(**changes) -> ViTRegForImageClassification:
    return randomize(ViTRegForImageClassification(tiny_config(classifier_layout="cls", **changes)))


def distilled() -> ViTRegForImageClassification:
    return randomize(ViTRegForImageClassification(tiny_config(**VARIANTS["distilled"])))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {"pixel_values": images(batch_size=BATCH_SIZE), "labels": torch.randint(NUM_LABELS, (BATCH_SIZE,))}


def mixed(labels: torch.Tensor) -> torch.Tensor:
    """Labels and those of the next image, as mixup leaves them."""
    one_hot = F.one_hot(labels, NUM_LABELS).float()
    return 0.7 * one_hot + 0.3 * one_hot.roll(1, dims=0)


def test_cross_entropy_is_that_of_the_model_itself(batch):
    """transformers' loss on labels."""
    model = classifier()
    loss, metrics = SupervisedObjective(model, SupervisedOptions(classification_loss="ce")).eval()(batch, 0)
    expected = model(**batch)
    torch.testing.assert_close(loss, expected.loss)
    assert metrics["accuracy"] == (expected.logits.argmax(dim=1) == batch["labels"]).float().mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_mixed_labels_is_that_of_timm(batch, smoothing):
    from timm.loss import SoftTargetCrossEntropy

    model, targets = classifier(), mixed(batch["labels"])
    options = SupervisedOptions(classification_loss="ce", label_smoothing=smoothing)
    loss, metrics = SupervisedObjective(model, options).eval()({**batch, "labels": targets}, 0)
    smoothed = (1 - smoothing) * targets + smoothing / NUM_LABELS
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(model(batch["pixel_values"]).logits, smoothed))
    assert metrics == {}


def test_binary_cross_entropy_counts_every_mixed_class(batch):
    model, targets = classifier(), mixed(batch["labels"])
    loss, _ = SupervisedObjective(model, SupervisedOptions()).eval()({**batch, "labels": targets}, 0)
    logits = model(batch["pixel_values"]).logits
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, (targets > 0).float()))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation_is_the_formula_of_deit(batch, kind):
    """Equations 2 and 3, with both classifiers computed from the tokens; the teacher sees what the model sees."""
    model, seen = distilled(), []
    says = torch.randn(BATCH_SIZE, NUM_LABELS)

    def teacher(pixel_values):
        assert not torch.is_grad_enabled()
        seen.append(pixel_values)
        return says

    options = SupervisedOptions(
        classification_loss="ce", distillation=kind, distillation_weight=0.3, distillation_temperature=3.0
    )
    loss, metrics = SupervisedObjective(model, options, teacher=teacher).eval()(batch, 0)
    assert len(seen) == 1 and seen[0] is batch["pixel_values"]
    tokens = model.vitreg(batch["pixel_values"]).last_hidden_state
    on_cls = tokens[:, 0] @ model.classifier.weight.T + model.classifier.bias
    on_token = tokens[:, 1] @ model.distillation_classifier.weight.T + model.distillation_classifier.bias
    torch.testing.assert_close((on_cls + on_token) / 2, model(batch["pixel_values"]).logits)
    rows = torch.arange(BATCH_SIZE)
    on_labels = -on_cls.log_softmax(dim=1)[rows, batch["labels"]].mean()
    if kind == "hard":
        on_teacher = -on_token.log_softmax(dim=1)[rows, says.argmax(dim=1)].mean()
    else:
        p, q = (says / 3).softmax(dim=1), (on_token / 3).softmax(dim=1)
        on_teacher = 9 * (p * (p.log() - q.log())).sum() / (BATCH_SIZE * NUM_LABELS)
    torch.testing.assert_close(loss, 0.7 * on_labels + 0.3 * on_teacher)
    torch.testing.assert_close(metrics["classification_loss"], on_labels)
    torch.testing.assert_close(metrics["distillation_loss"], on_teacher)


def test_each_classifier_learns_from_its_own_target(batch):
    model = distilled()
    options = SupervisedOptions(classification_loss="ce", distillation_weight=1.0)
    loss, _ = SupervisedObjective(model, options, teacher=lambda pixel_values: torch.eye(BATCH_SIZE, 11))(batch, 0)
    loss.backward()
    assert model.classifier.weight.grad.abs().max() == 0
    assert model.distillation_classifier.weight.grad.abs().max() > 0


def test_a_teacher_needs_a_distillation_token():
    with pytest.raises(ValueError, match='is "cls" and must be "cls_distillation"'):
        SupervisedObjective(classifier(), SupervisedOptions(), teacher=lambda pixel_values: pixel_values)


@pytest.mark.parametrize("teacher", [None, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 21 * 49, 11))])
def test_every_weight_that_learns_gets_a_gradient_and_no_other_is_saved(batch, teacher):
    """Or distributed training would stop; a teacher is no part of a checkpoint."""
    variant = {"classifier_layout": "cls"} if teacher is None else VARIANTS["distilled"]
    model = randomize(ViTRegForImageClassification(tiny_config(use_mask_token=True, **variant)))
    objective = SupervisedObjective(model, SupervisedOptions(), ema_decay=0.9, teacher=teacher)
    objective(batch, 0)[0].backward()
    learning = [name for name, parameter in objective.named_parameters() if parameter.grad is not None]
    assert learning == [name for name, parameter in objective.named_parameters() if parameter.requires_grad]
    assert "model.vitreg.embeddings.mask_token" not in learning
    assert {name.partition(".")[0] for name in objective.state_dict()} == {"model", "average"}
    assert all(id(parameter) in map(id, objective.trained()["model"].parameters()) for parameter in model.parameters())


def test_the_average_is_exported_and_a_checkpoint_holds_it(batch):
    torch.manual_seed(1)
    objective = SupervisedObjective(classifier(drop_path_rate=0.5), SupervisedOptions(), ema_decay=0.75)
    before = objective.model.classifier.weight.detach().clone()
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.5)
    objective(batch, 0)[0].backward()
    optimizer.step()
    objective.after_step(0)
    exported = objective.exportable()
    expected = 0.75 * before + 0.25 * objective.model.classifier.weight
    torch.testing.assert_close(exported.classifier.weight, expected)
    assert objective.features() is exported.vitreg and objective.model.training and not exported.training
    resumed = SupervisedObjective(classifier(), SupervisedOptions(), ema_decay=0.75)
    resumed.load_state_dict(objective.state_dict())
    assert torch.equal(resumed.exportable().classifier.weight, exported.classifier.weight)


def test_without_an_average_the_model_is_exported():
    model = classifier()
    objective = SupervisedObjective(model, SupervisedOptions())
    objective.after_step(0)
    assert objective.exportable() is model and objective.features() is model.vitreg
