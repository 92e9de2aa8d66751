# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch
from torch import nn

from hf_vitreg.objectives.averaging import ema_update, frozen_copy


def test_parameters_move_and_buffers_are_copied():
    model = nn.BatchNorm1d(2)
    average = frozen_copy(model)
    nn.init.constant_(average.weight, 1.0)
    nn.init.constant_(model.weight, 3.0)
    model.running_mean.copy_(torch.tensor([5.0, 7.0]))
    model.num_batches_tracked.fill_(11)
    ema_update(average, model, decay=0.75)
    assert average.weight.tolist() == [1.5, 1.5]  # 0.75 * 1 + 0.25 * 3
    ema_update(average, model, decay=0.5)
    assert average.weight.tolist() == [2.25, 2.25]
    assert average.running_mean.tolist() == [5.0, 7.0] and average.num_batches_tracked == 11
    assert model.weight.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(("decay", "is_model"), [(0.0, True), (1.0, False)])
def test_the_ends_are_exact(decay, is_model):
    model = nn.Linear(13, 7)
    average = nn.Linear(13, 7)
    before = average.weight.detach().clone()
    ema_update(average, model, decay)
    assert torch.equal(average.weight, model.weight if is_model else before)


def test_parameters_are_found_by_name():
    model, average = nn.Module(), nn.Module()
    model.first, model.second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    average.second, average.first = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    ema_update(average, model, decay=0.0)
    assert average.first.tolist() == [0, 0] and average.second.tolist() == [1, 1]


def test_a_copy_is_frozen_and_its_model_is_not():
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout())
    average = frozen_copy(model)
    assert not average[1].training and not any(each.requires_grad for each in average.parameters())
    assert model[1].training and all(each.requires_grad for each in model.parameters())
    assert average[0].weight.data_ptr() != model[0].weight.data_ptr()


@pytest.mark.parametrize(
    ("model", "decay", "message"),
    [(nn.Linear(3, 5, bias=False), 0.5, "these two differ"), (nn.Linear(3, 5), 1.5, "decay value 1.5")],
)
def test_what_cannot_be_averaged_is_an_error(model, decay, message):
    with pytest.raises(ValueError, match=message):
        ema_update(nn.Linear(3, 5), model, decay)
