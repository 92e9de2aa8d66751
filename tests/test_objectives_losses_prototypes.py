# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import functools
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from loss_cases import BATCH_SIZE, NUM_GLOBAL, NUM_LOCAL, STUDENT_TEMPERATURE, TEACHER_TEMPERATURE
from original_outputs import assert_close, load
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_vitreg.objectives.losses import prototypes as prototypes_module
from hf_vitreg.objectives.losses.prototypes import Assignment, crop_pair_weights, dino_loss, ibot_loss
from hf_vitreg.objectives.losses.targets import sinkhorn_knopp


NUM_STUDENT, NUM_TEACHER, NUM_ROWS, BOTTLENECK_SIZE, NUM_PROTOTYPES = 5, 2, 13, 7, 31


def assignment(*shape: int, temperature: float, center: bool = False, dtype=torch.float64) -> Assignment:
    """Random features of this shape and prototypes, both of norm 1."""
    features = F.normalize(torch.randn(*shape, BOTTLENECK_SIZE, dtype=dtype), dim=-1)
    prototypes = F.normalize(torch.randn(NUM_PROTOTYPES, BOTTLENECK_SIZE, dtype=dtype), dim=-1)
    return Assignment(
        features.requires_grad_(),
        prototypes.requires_grad_(),
        temperature,
        0.3 * torch.randn(NUM_PROTOTYPES, dtype=dtype) if center else None,
    )


@pytest.fixture
def crops() -> tuple[Assignment, Assignment]:
    student = assignment(NUM_STUDENT, NUM_ROWS, temperature=0.2)
    return student, assignment(NUM_TEACHER, NUM_ROWS, temperature=0.15, center=True)


def probabilities(given: Assignment) -> torch.Tensor:
    logits = given.features @ given.prototypes.T
    return ((logits - (0 if given.center is None else given.center)) / given.temperature).softmax(dim=-1)


def plain_dino_loss(student: Assignment, teacher: Assignment, pair_weights: torch.Tensor) -> torch.Tensor:
    """What the docstring says, all logits at once."""
    targets, log_predictions = probabilities(teacher).detach(), probabilities(student).log()
    return sum(
        pair_weights[s, t] * -(targets[t] * log_predictions[s]).sum(dim=-1).mean()
        for s, t in product(range(len(student.features)), range(len(teacher.features)))
    )


def plain_ibot_loss(student, teacher, patch_weights, num_images) -> torch.Tensor:
    entropies = -(probabilities(teacher).detach() * probabilities(student).log()).sum(dim=-1)
    return (patch_weights * entropies).sum() / num_images


def gradients(loss: torch.Tensor, student: Assignment) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [student.features, student.prototypes]))


@pytest.mark.parametrize("chunk_rows", [1, 21, 23, 10_000])
def test_dino_loss_and_gradient_are_those_of_the_formula(crops, chunk_rows):
    student, teacher = crops
    pair_weights = torch.rand(NUM_STUDENT, NUM_TEACHER, dtype=torch.float64)
    ours = dino_loss(student, teacher, pair_weights, chunk_rows)
    expected = plain_dino_loss(student, teacher, pair_weights)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gradients(3 * ours.loss, student), gradients(3 * expected, student), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("chunk_rows", [1, 6, 10_000])
def test_ibot_loss_and_gradient_are_those_of_the_formula(chunk_rows):
    student = assignment(NUM_ROWS, temperature=0.2)
    teacher = assignment(NUM_ROWS, temperature=0.15, center=True)
    patch_weights = torch.rand(NUM_ROWS, dtype=torch.float64)
    ours = ibot_loss(student, teacher, patch_weights, 6, chunk_rows)
    expected = plain_ibot_loss(student, teacher, patch_weights, 6)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients(ours.loss, student), gradients(expected, student), rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences(crops):
    student, teacher = crops

    def loss(features, prototypes):
        weights = crop_pair_weights(NUM_TEACHER, NUM_STUDENT - NUM_TEACHER)
        return dino_loss(Assignment(features, prototypes, 0.2), teacher, weights, chunk_rows=9).loss

    assert torch.autograd.gradcheck(loss, (student.features, student.prototypes), fast_mode=True)


def test_float32_is_exact_to_a_millionth_at_published_temperatures():
    student = assignment(NUM_STUDENT, NUM_ROWS, temperature=0.1, dtype=torch.float32)
    teacher = assignment(NUM_TEACHER, NUM_ROWS, temperature=0.04, center=True, dtype=torch.float32)
    weights = crop_pair_weights(NUM_TEACHER, NUM_STUDENT - NUM_TEACHER)
    double = [Assignment(*(x.double() if torch.is_tensor(x) else x for x in given)) for given in (student, teacher)]
    ours = dino_loss(student, teacher, weights, chunk_rows=16).loss
    expected = plain_dino_loss(*double, weights.double())
    assert abs(ours.item() / expected.item() - 1) < 1e-6
    for actual, wanted in zip(gradients(ours, student), gradients(expected, student)):
        assert (actual - wanted).abs().max() < 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("centering", ["center", "sinkhorn"])
@pytest.mark.parametrize("chunk_rows", [8, 1000])
def test_losses_are_those_of_the_original_code(centering, chunk_rows):
    _, given, expected = load("dinov2_losses")

    def assignments(name: str) -> tuple[Assignment, Assignment]:
        student = Assignment(
            given[f"student_{name}"].clone().requires_grad_(),
            given["student_prototypes"].clone().requires_grad_(),
            STUDENT_TEMPERATURE,
        )
        teacher = Assignment(given[f"teacher_{name}"], given["teacher_prototypes"], TEACHER_TEMPERATURE)
        center = expected[f"center/{name}"] if centering == "center" else sinkhorn_knopp(teacher)
        return student, teacher._replace(center=center)

    student, teacher = assignments("cls")
    dino = dino_loss(student, teacher, crop_pair_weights(NUM_GLOBAL, NUM_LOCAL), chunk_rows).loss
    masks = given["masks"]
    weights = (1 / masks.sum(dim=1, keepdim=True).clamp(min=1)).expand_as(masks)[masks]
    masked_student, masked_teacher = assignments("patches")
    ibot = ibot_loss(masked_student, masked_teacher, weights, NUM_GLOBAL * BATCH_SIZE, chunk_rows).loss
    for name, loss, parts in (("dino", dino, student), ("ibot", ibot, masked_student)):
        assert loss.item() == pytest.approx(expected[f"{name}/{centering}"].item(), rel=1e-6)
        of_features, of_prototypes = gradients(loss, parts)
        assert_close(of_features, expected[f"{name}/{centering}/gradient/features"])
        assert_close(of_prototypes, expected[f"{name}/{centering}/gradient/prototypes"])


def test_value_by_hand():
    """Two prototypes at 90 degrees; the student's row is the first, the teacher's has 3:1 for it."""
    prototypes = torch.eye(2, dtype=torch.float64)
    student = Assignment(prototypes[:1], prototypes, temperature=1.0)
    teacher = Assignment(prototypes[:1], prototypes, temperature=1 / math.log(3))
    found = ibot_loss(student, teacher, torch.tensor([0.5]), num_images=2)
    cross_entropy = math.log(1 + math.e) - 0.75
    assert found.cross_entropy.item() == pytest.approx(cross_entropy)
    assert found.loss.item() == pytest.approx(cross_entropy * 0.5 / 2)
    assert found.teacher_entropy.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert found.mean_target.tolist() == pytest.approx([0.75, 0.25])


def test_what_else_falls_out_is_that_of_the_formula(crops):
    student, teacher = crops
    found = dino_loss(student, teacher, torch.ones(NUM_STUDENT, NUM_TEACHER), chunk_rows=16)
    targets, log_predictions = probabilities(teacher), probabilities(student).log()
    for s, t in product(range(NUM_STUDENT), range(NUM_TEACHER)):
        expected = -(targets[t] * log_predictions[s]).sum(dim=-1).mean()
        assert found.cross_entropy[s, t].item() == pytest.approx(expected.item())
    assert found.loss.item() == pytest.approx(found.cross_entropy.sum().item())
    assert found.teacher_entropy.item() == pytest.approx(-(targets * targets.log()).sum(dim=-1).mean().item())
    torch.testing.assert_close(found.mean_target, targets.mean(dim=(0, 1)))
    assert not any(part.requires_grad for part in found[1:])


def test_the_teacher_gets_no_gradient(crops):
    student, teacher = crops
    dino_loss(student, teacher, torch.ones(NUM_STUDENT, NUM_TEACHER)).loss.backward()
    assert teacher.features.grad is None and teacher.prototypes.grad is None


def test_order_of_images_and_prototypes_does_not_matter(crops):
    student, teacher = crops
    weights = crop_pair_weights(NUM_TEACHER, NUM_STUDENT - NUM_TEACHER)
    images, order = torch.randperm(NUM_ROWS), torch.randperm(NUM_PROTOTYPES)
    reordered = [
        Assignment(
            given.features[:, images],
            given.prototypes[order],
            given.temperature,
            None if given.center is None else given.center[order],
        )
        for given in crops
    ]
    loss = dino_loss(student, teacher, weights, 16).loss
    torch.testing.assert_close(dino_loss(*reordered, weights, 16).loss, loss, rtol=1e-12, atol=0)


def test_without_masked_patches_the_loss_is_zero_and_has_a_gradient():
    """Another process may have some, and waits for this one's gradient."""
    student = assignment(0, temperature=0.1)
    found = ibot_loss(student, assignment(0, temperature=0.1), torch.zeros(0), 4)
    assert found.loss.item() == 0
    assert [gradient.abs().sum().item() for gradient in gradients(found.loss, student)] == [0, 0]
    assert all(part.isfinite().all() for part in found)


def test_rows_that_do_not_match_are_refused(crops):
    student, teacher = crops
    with pytest.raises(ValueError, match=r"same rows, got \(5, 13, 7\) and \(2, 12, 7\)"):
        dino_loss(student, teacher._replace(features=teacher.features[:, 1:]), torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"shapes \(5, 2\).*got \(1, 2\)"):
        dino_loss(student, teacher, torch.ones(1, 2))
    patches = [given._replace(features=given.features[0]) for given in crops]
    with pytest.raises(ValueError, match=r"\(13,\), rows; got \(1, 1\) and \(1,\)"):
        ibot_loss(*patches, torch.ones(1), 4)


def test_bfloat16_is_near_and_gives_gradients_of_its_own_type():
    student = assignment(NUM_ROWS, temperature=0.1, dtype=torch.float32)
    teacher = assignment(NUM_ROWS, temperature=0.07, dtype=torch.float32)
    half = [Assignment(x.features.bfloat16(), x.prototypes.bfloat16(), x.temperature) for x in (student, teacher)]
    weights = torch.ones(NUM_ROWS)
    found, expected = ibot_loss(*half, weights, 1), ibot_loss(student, teacher, weights, 1)
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    found.loss.backward()
    assert student.features.grad.dtype == torch.float32
    torch.testing.assert_close(student.features.grad, gradients(expected.loss, student)[0], rtol=0.2, atol=0.2)


def test_autocast_does_not_lower_precision(crops):
    student, teacher = (Assignment(*(x.float() if torch.is_tensor(x) else x for x in given)) for given in crops)
    weights = torch.ones(NUM_STUDENT, NUM_TEACHER)
    expected = dino_loss(student, teacher, weights).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dino_loss(student, teacher, weights).loss, expected)


def test_pair_weights_are_a_mean_over_different_crops():
    weights = crop_pair_weights(2, 3)
    assert weights.shape == (5, 2) and weights.sum().item() == pytest.approx(1)
    assert weights[0, 0] == weights[1, 1] == 0 and weights[0, 1] == weights[1, 0] == weights[4, 0]
    halved = crop_pair_weights(2, 3, local_weight=0.5)
    assert halved[:2].equal(weights[:2]) and halved[2:].equal(weights[2:] / 2)
    with pytest.raises(ValueError, match="1 global and 0 local crops make no pair"):
        crop_pair_weights(1, 0)


class LargestTensor(TorchDispatchMode):
    """Records how many numbers the largest storage has that an operation makes, in the backward pass too."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return result


@pytest.mark.parametrize(
    ("num_rows", "sizes"), [(13, [7, 6]), (16, [8, 8]), (7, [7]), (8, [8]), (17, [6, 6, 5]), (0, [])]
)
def test_chunks_are_as_few_as_fit_and_alike(num_rows, sizes, monkeypatch):
    seen, plain = [], prototypes_module.log_probabilities
    monkeypatch.setattr(
        prototypes_module, "log_probabilities", lambda rows, *rest: seen.append(len(rows)) or plain(rows, *rest)
    )
    rows = Assignment(torch.randn(num_rows, 3), torch.randn(5, 3), 0.3)
    ibot_loss(rows, rows, torch.ones(num_rows), 1, chunk_rows=3 * 8 + 2)
    assert seen[::2] == seen[1::2] == sizes  # teacher and student


@pytest.mark.parametrize("loss_name", ["chunked", "plain", "sinkhorn"])
def test_logits_are_never_all_kept(loss_name):
    num_rows, num_prototypes, chunk_rows = 211, 1009, 16
    features = [F.normalize(torch.randn(num_rows, BOTTLENECK_SIZE), dim=1) for _ in range(2)]
    prototypes = F.normalize(torch.randn(num_prototypes, BOTTLENECK_SIZE), dim=1)
    student = Assignment(features[0].requires_grad_(), prototypes.clone().requires_grad_(), 0.1)
    teacher = Assignment(features[1], prototypes, 0.07, torch.zeros(num_prototypes))
    weights = torch.ones(num_rows)
    calls = {
        "chunked": lambda: ibot_loss(student, teacher, weights, 1, chunk_rows).loss.backward(),
        "plain": lambda: plain_ibot_loss(student, teacher, weights, 1).backward(),
        "sinkhorn": functools.partial(sinkhorn_knopp, teacher, chunk_rows=chunk_rows),
    }
    with LargestTensor() as largest:
        calls[loss_name]()
    if loss_name == "plain":
        assert largest.numel == num_rows * num_prototypes
    else:
        assert largest.numel <= chunk_rows * num_prototypes
