# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch

from hf_vitreg.objectives.losses.features import cosine_distance, squared_distance


STUDENT = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
TARGET = torch.tensor([[[4.0, 3.0], [0.0, 2.0]]])


def test_values_by_hand():
    # cosines 24 / 25 and 0
    assert cosine_distance(STUDENT, TARGET).item() == pytest.approx(1 - 0.48)
    assert squared_distance(STUDENT, TARGET).item() == pytest.approx((1 + 1 + 1 + 4) / 4)
    assert cosine_distance(STUDENT, 7 * STUDENT).item() == pytest.approx(0, abs=1e-6)
    assert cosine_distance(STUDENT, -STUDENT).item() == pytest.approx(2)


@pytest.mark.parametrize("loss", [cosine_distance, squared_distance])
def test_the_student_alone_has_a_gradient_in_full_precision(loss):
    student, target = STUDENT.clone().requires_grad_(), TARGET.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student.bfloat16(), target.bfloat16())
    value.backward()
    assert value.dtype == torch.float32 and target.grad is None and student.grad.abs().max() > 0
    assert loss(STUDENT.double(), TARGET.double()).dtype == torch.float64


@pytest.mark.parametrize("loss", [cosine_distance, squared_distance])
def test_features_of_other_patches_are_refused(loss):
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) and \(1, 1, 2\)"):
        loss(STUDENT, TARGET[:, :1])
