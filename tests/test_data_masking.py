# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import random

import numpy as np
import pytest
import torch
from loss_cases import MASKS
from original_outputs import load

from hf_vitreg.data.masking import batch_masks, block_mask
from hf_vitreg.distributed import derived_seed


@pytest.mark.parametrize(("seed", "num_crops", "rows", "cols"), MASKS)
def test_masks_are_those_of_the_original_code(seed, num_crops, rows, cols):
    _, _, expected = load("dinov2_losses")
    found = batch_masks(seed, num_crops, rows, cols)
    assert torch.equal(found.masks, expected[f"masks/{seed}/masks"])
    assert torch.equal(found.indices, expected[f"masks/{seed}/indices"])
    torch.testing.assert_close(found.weights, expected[f"masks/{seed}/weights"])


def test_half_of_the_crops_are_masked_by_shares_from_all_intervals():
    num_crops, rows, cols = 32, 16, 14
    for step in range(5):
        masks = batch_masks(derived_seed(7, step), num_crops, rows, cols).masks
        shares = masks.float().mean(dim=1).sort().values[num_crops // 2 :]
        assert (masks.sum(dim=1) == 0).sum() == num_crops // 2
        edges = torch.linspace(0.1, 0.5, num_crops // 2 + 1)
        # blocks that do not fit leave a few patches out
        assert (shares <= edges[1:]).all() and (shares >= edges[:-1] - 0.1).all()


def test_masks_are_a_function_of_the_seed_alone():
    random.seed(3)
    first = batch_masks(5, 8, 7, 13)
    random.seed(4)
    state = random.getstate()
    again = batch_masks(5, 8, 7, 13)
    assert torch.equal(first.masks, again.masks) and random.getstate() == state
    assert not torch.equal(first.masks, batch_masks(6, 8, 7, 13).masks)


def test_some_crops_of_a_batch_have_the_masks_that_they_have_in_it():
    whole = batch_masks(3, 12, 7, 13)
    wanted = [2, 3, 8, 9, 0]
    part = batch_masks(3, 12, 7, 13, wanted=wanted)
    assert torch.equal(part.masks, whole.masks[wanted]) and part.masks.any()
    assert torch.equal(part.indices, part.masks.flatten().nonzero()[:, 0])


def test_which_crops_are_masked_changes():
    masked = torch.stack([batch_masks(seed, 6, 7, 13).masks.any(dim=1) for seed in range(40)])
    assert (masked.sum(dim=1) == 3).all() and masked.any(dim=0).all() and not masked.all(dim=0).any()


def test_indices_and_weights_belong_to_the_masks():
    found = batch_masks(1, 8, 7, 13)
    assert found.masks.shape == (8, 7 * 13) and found.masks.dtype == torch.bool
    crops = found.indices // (7 * 13)
    assert torch.equal(found.masks.flatten().nonzero()[:, 0], found.indices)
    for crop in range(8):
        weights = found.weights[crops == crop]
        assert weights.sum().item() == pytest.approx(1.0 if found.masks[crop].any() else 0.0)


@pytest.mark.parametrize(("num_crops", "probability"), [(1, 0.5), (4, 0.0)])
def test_no_crop_may_be_masked(num_crops, probability):
    found = batch_masks(0, num_crops, 7, 13, mask_probability=probability)
    assert not found.masks.any() and len(found.indices) == len(found.weights) == 0


def test_all_crops_may_be_masked():
    assert batch_masks(0, 4, 7, 13, mask_probability=1.0).masks.any(dim=1).all()


def test_never_more_patches_are_masked_than_asked_and_often_just_as_many():
    counts = [int(block_mask(random.Random(seed), 16, 14, num_masked=60, max_block=112).sum()) for seed in range(50)]
    assert max(counts) == 60 and min(counts) > 30 and counts.count(60) > 25


def test_masks_are_of_blocks():
    """Each patch of a first block of twelve or more has neighbours in its row and in its column."""
    for seed in range(20):
        mask = block_mask(random.Random(seed), 11, 17, num_masked=12, max_block=12, min_block=12)
        assert mask.shape == (11, 17) and mask.any()
        rows, cols = (sorted({int(i) for i in where}) for where in np.nonzero(mask))
        assert len(rows) < 11 and len(cols) < 17


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"got 0\.5, 0\.6 and 0\.5"):
        batch_masks(0, 4, 7, 13, min_ratio=0.6)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        batch_masks(0, 4, 7, 13, mask_probability=1.5)
