# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
import torch.nn.functional as F
from original_outputs import load

from hf_vitreg.objectives.losses.regularizers import gram_loss, koleo_loss


BATCH_SIZE, NUM_PATCHES, HIDDEN_SIZE = 5, 11, 7


def test_koleo_is_that_of_the_original_code():
    _, given, expected = load("dinov2_losses")
    cls_tokens = given["backbone_cls"].clone().requires_grad_()
    loss = koleo_loss(cls_tokens)
    loss.backward()
    assert loss.item() == pytest.approx(expected["koleo"].item(), rel=1e-6)
    torch.testing.assert_close(cls_tokens.grad, expected["koleo/gradient"], rtol=1e-5, atol=1e-7)


def test_koleo_by_hand():
    """On the circle at 0, 90 and 210 degrees: the first two are each other's neighbours, the second the third's."""
    angles = torch.tensor([0.0, 90.0, 210.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([[1.0], [5.0], [0.2]])
    chords = [2 * math.sin(math.radians(angle / 2)) for angle in (90, 90, 120)]
    assert koleo_loss(features).item() == pytest.approx(-sum(map(math.log, chords)) / 3, rel=1e-5)


def test_koleo_gradient_is_that_of_finite_differences():
    assert torch.autograd.gradcheck(koleo_loss, torch.randn(BATCH_SIZE, HIDDEN_SIZE).double().requires_grad_())


def test_koleo_sees_directions_only_and_no_order():
    features = torch.randn(BATCH_SIZE, HIDDEN_SIZE)
    rotation = torch.linalg.qr(torch.randn(HIDDEN_SIZE, HIDDEN_SIZE)).Q
    moved = (features @ rotation * torch.rand(BATCH_SIZE, 1))[torch.randperm(BATCH_SIZE)]
    torch.testing.assert_close(koleo_loss(moved), koleo_loss(features))


def test_koleo_falls_as_features_spread():
    center, noise = torch.ones(HIDDEN_SIZE), torch.randn(BATCH_SIZE, HIDDEN_SIZE)
    losses = [koleo_loss(center + spread * noise).item() for spread in (0.0, 0.01, 0.1, 1.0)]
    assert losses == sorted(losses, reverse=True) and math.isfinite(losses[0])


def test_koleo_of_equal_images_is_what_eps_leaves():
    expected = -math.log(1e-8 * math.sqrt(HIDDEN_SIZE) + 1e-8)
    assert koleo_loss(torch.ones(BATCH_SIZE, HIDDEN_SIZE)).item() == pytest.approx(expected, rel=1e-6)


def test_koleo_of_one_image_is_refused():
    with pytest.raises(ValueError, match="two images at least"):
        koleo_loss(torch.randn(1, HIDDEN_SIZE))


@pytest.mark.parametrize("negatives", ["keep", "drop", "drop_teacher"])
def test_gram_is_that_of_the_original_code(negatives):
    _, given, expected = load("dinov3_losses")
    student = given["student_patch_tokens"].clone().requires_grad_()
    loss = gram_loss(student, given["teacher_patch_tokens"], negatives)
    loss.backward()
    assert loss.item() == pytest.approx(expected[f"gram/{negatives}"].item(), rel=1e-6)
    torch.testing.assert_close(student.grad, expected[f"gram/{negatives}/gradient"], rtol=1e-5, atol=1e-9)


def test_gram_by_hand():
    """Two patches at 60 degrees against two at 90: the cosine of the two pairs out of four differs by 0.5."""
    student = torch.tensor([[[2.0, 0.0], [0.5, math.sqrt(0.75)]]])
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
    assert gram_loss(student, teacher).item() == pytest.approx(2 * 0.5**2 / 4)


def test_gram_sees_neither_rotation_nor_length():
    student, teacher = torch.randn(2, BATCH_SIZE, NUM_PATCHES, HIDDEN_SIZE)
    rotation = torch.linalg.qr(torch.randn(HIDDEN_SIZE, HIDDEN_SIZE)).Q
    torch.testing.assert_close(gram_loss(3 * student @ rotation, teacher), gram_loss(student, teacher))
    assert gram_loss(2 * teacher @ rotation, teacher).item() == pytest.approx(0, abs=1e-12)


def test_gram_gradient_reaches_the_student_alone():
    student, teacher = torch.randn(2, BATCH_SIZE, NUM_PATCHES, HIDDEN_SIZE).double().unbind()
    assert torch.autograd.gradcheck(lambda x: gram_loss(x, teacher), student.requires_grad_())
    gram_loss(student, teacher.requires_grad_()).backward()
    assert teacher.grad is None


def test_gram_takes_a_teacher_of_another_width_and_refuses_other_patches():
    student, teacher = torch.randn(2, NUM_PATCHES, 5), torch.randn(2, NUM_PATCHES, 3)
    x, y = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    torch.testing.assert_close(gram_loss(student, teacher), ((x @ x.mT - y @ y.mT) ** 2).mean())
    with pytest.raises(ValueError, match=r"same patches, got \(2, 11, 5\) and \(2, 10, 3\)"):
        gram_loss(student, teacher[:, 1:])
    with pytest.raises(ValueError, match="got 'none'"):
        gram_loss(student, teacher, "none")
