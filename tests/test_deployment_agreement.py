# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
from reference import NUM_REGISTERS, images, randomize, tiny_config

from hf_vitreg import ViTRegBackbone, ViTRegModel
from hf_vitreg.deployment.agreement import Agreement, agreement, outputs_of, tolerance


def test_outputs_agree_with_themselves_and_stages_have_numbers():
    for model_class, names in (
        (ViTRegModel, ["last_hidden_state", "pooler_output", "register_tokens", "patch_tokens"]),
        (ViTRegBackbone, ["feature_maps.0", "feature_maps.1"]),
    ):
        model = randomize(model_class(tiny_config(num_hidden_layers=2, out_indices=[1, 2])))
        found = outputs_of(model.to(torch.bfloat16), images())
        assert list(found) == names and {tensor.dtype for tensor in found.values()} == {torch.float32}
        same = agreement(found, found)
        assert same.relative_error == 0 and same.least_cosine == pytest.approx(1)


def test_numbers_are_those_computed_by_hand():
    patches = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [8.0, 0.0]]])
    other = patches.clone()
    other[1, 0] = torch.tensor([2.0, 2.0])
    found = agreement({"patch_tokens": other}, {"patch_tokens": patches})
    half = math.cos(math.pi / 4)
    assert found.relative_error == 2 / 8
    assert found.least_cosine == pytest.approx(half) and found.cosine == pytest.approx((1 + half) / 2)


def test_channels_of_maps_are_compared():
    maps = torch.randn(2, 5, 3, 7)
    other = maps * torch.rand(2, 1, 3, 7)
    assert agreement({"feature_maps.0": other}, {"feature_maps.0": maps}).least_cosine == pytest.approx(1)


def test_registers_count_in_float32_alone():
    expected = outputs_of(randomize(ViTRegModel(tiny_config(num_hidden_layers=1))), images())
    actual = {name: tensor.clone() for name, tensor in expected.items()}
    actual["register_tokens"][:] = 0
    actual["last_hidden_state"][:, 1 : 1 + NUM_REGISTERS] = 0
    found = agreement(actual, expected)
    assert found.relative_error > 0.1 and found.least_cosine == pytest.approx(1)


def test_tolerances():
    exact, close, far = Agreement(9e-6, 1.0, 1.0), Agreement(0.02, 0.99991, 0.99), Agreement(0.1, 0.9991, 0.9)
    lost = Agreement(math.nan, math.nan, math.nan)
    sufficient = {
        dtype: [each.suffices(dtype) for each in (exact, close, far, lost)]
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
    }
    assert sufficient == {
        torch.float32: [True, False, False, False],
        torch.bfloat16: [True, True, False, False],
        torch.int8: [True, True, True, False],
    }
    assert close.describe(torch.int8) == "cosine 0.99991" and tolerance(torch.int8) == "a cosine of 0.999 or more"
    assert exact.describe(torch.float32) == "relative error 9.0e-06"
    assert tolerance(torch.float32) == "a relative error of 1e-05 or less"


def test_what_is_no_number_agrees_with_nothing():
    tokens = torch.ones(2, 3, 5)
    spoiled = tokens.clone()
    spoiled[1, 2, 4] = math.nan
    found = agreement({"patch_tokens": spoiled}, {"patch_tokens": tokens})
    assert math.isnan(found.relative_error) and math.isnan(found.cosine)


def test_other_names_or_shapes_are_refused():
    with pytest.raises(ValueError, match=r"Outputs have the shapes .*logits.* expected are"):
        agreement({"logits": torch.ones(2, 3)}, {"logits": torch.ones(2, 4)})
