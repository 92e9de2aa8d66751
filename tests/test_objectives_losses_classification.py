# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
from original_outputs import load

from hf_vitreg.objectives.losses.classification import (
    binary_cross_entropy,
    hard_distillation,
    soft_cross_entropy,
    soft_distillation,
)


BATCH_SIZE, NUM_LABELS = 5, 7


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(BATCH_SIZE, NUM_LABELS)


@pytest.fixture
def mixed() -> torch.Tensor:
    """Two labels for each image, as mixup leaves them."""
    first, second = torch.randint(NUM_LABELS, (2, BATCH_SIZE))
    share = torch.rand(BATCH_SIZE, 1)
    one_hot = torch.eye(NUM_LABELS)
    return share * one_hot[first] + (1 - share) * one_hot[second]


def test_soft_cross_entropy_is_that_of_timm_and_of_labels(logits, mixed):
    from timm.loss import SoftTargetCrossEntropy

    torch.testing.assert_close(soft_cross_entropy(logits, mixed), SoftTargetCrossEntropy()(logits, mixed))
    labels = torch.randint(NUM_LABELS, (BATCH_SIZE,))
    torch.testing.assert_close(
        soft_cross_entropy(logits, labels), soft_cross_entropy(logits, torch.eye(NUM_LABELS)[labels])
    )


def test_label_smoothing_is_that_of_timm(logits):
    from timm.loss import LabelSmoothingCrossEntropy

    labels = torch.randint(NUM_LABELS, (BATCH_SIZE,))
    expected = LabelSmoothingCrossEntropy(0.13)(logits, labels)
    torch.testing.assert_close(soft_cross_entropy(logits, labels, 0.13), expected)
    torch.testing.assert_close(soft_cross_entropy(logits, torch.eye(NUM_LABELS)[labels], 0.13), expected)


def test_binary_cross_entropy_is_that_of_timm(logits, mixed):
    from timm.loss import BinaryCrossEntropy

    timm_loss = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0, sum_classes=False)
    torch.testing.assert_close(binary_cross_entropy(logits, mixed), timm_loss(logits, mixed))
    labels = torch.randint(NUM_LABELS, (BATCH_SIZE,))
    torch.testing.assert_close(binary_cross_entropy(logits, labels), timm_loss(logits, labels))


def test_binary_cross_entropy_by_hand():
    """Both mixed classes count fully, whatever their shares."""
    logits = torch.tensor([[math.log(3), 0.0, -math.log(4)]])
    targets = torch.tensor([[0.999, 0.001, 0.0]])
    expected = -(math.log(3 / 4) + math.log(1 / 2) + math.log(4 / 5)) / 3
    assert binary_cross_entropy(logits, targets).item() == pytest.approx(expected)


def test_distillation_is_that_of_the_original_code():
    _, given, expected = load("deit_losses")
    soft = soft_distillation(given["logits"], given["teacher_logits"], temperature=3.0)
    assert soft.item() == pytest.approx(expected["soft"].item(), rel=1e-5)
    hard = hard_distillation(given["logits"], given["teacher_logits"])
    assert hard.item() == pytest.approx(expected["hard"].item(), rel=1e-6)


def test_soft_distillation_is_zero_for_the_teacher_itself_and_gives_it_no_gradient(logits):
    teacher = logits.clone().requires_grad_()
    student = (logits + 1.5).requires_grad_()  # a constant is not seen
    soft = soft_distillation(student, teacher, temperature=2.0)
    assert soft.item() == pytest.approx(0, abs=1e-7)
    soft.backward()
    assert teacher.grad is None and student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("loss", [soft_cross_entropy, binary_cross_entropy, hard_distillation])
def test_half_precision_is_raised(loss, logits, mixed):
    found = loss(logits.bfloat16(), mixed)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(logits.bfloat16().float(), mixed))
