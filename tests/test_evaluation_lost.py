# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import itertools
import json

import lost_cases
import numpy as np
import pytest
import torch
from scipy import ndimage

from hf_vitreg.evaluation import lost
from hf_vitreg.evaluation.lost import attention_boxes, lost_boxes, lost_sweep
from hf_vitreg.metrics.corloc import is_found


FIXTURE = json.loads(lost_cases.FIXTURE.read_text())["cases"]
ROWS, COLS, PATCH = 13, 19, 4


def test_the_fixture_is_of_these_maps():
    assert [{key: case[key] for key in made} for case, made in zip(FIXTURE, lost_cases.cases(), strict=True)] == (
        lost_cases.cases()
    )


@pytest.mark.parametrize("what", ["objects", "noise"])
def test_boxes_are_those_of_the_published_code(what):
    of_kind = [case for case in FIXTURE if case["what"] == what]
    for (rows, cols), group in itertools.groupby(of_kind, key=lambda case: (case["rows"], case["cols"])):
        batch = list(group)
        features = torch.stack([lost_cases.feature_map(case) for case in batch])
        size = (batch[0]["height"], batch[0]["width"])
        found = lost_boxes(features, rows, cols, batch[0]["patch_size"], size, k_patches=batch[0]["k_patches"])
        assert found.boxes.tolist() == [case["box"] for case in batch]
        assert found.seeds.tolist() == [case["seed_patch"] for case in batch]
        assert not found.seed_in_background.any()


def test_attention_boxes_are_those_of_the_published_code():
    for case in FIXTURE:
        if case["what"] == "attention":
            maps = lost_cases.attention_map(case)[None]
            (box,) = attention_boxes(maps, case["rows"], case["cols"], case["patch_size"]).tolist()
            assert box == case["box"]


def test_attention_boxes_end_where_images_do():
    attention = torch.full((2, ROWS * COLS), 1e-4)
    spots = attention.view(2, ROWS, COLS)
    spots[:, 9:13, 14:19] = 1  # the largest, and not the last that a scan meets
    spots[:, 12, 0] = 1
    boxes = attention_boxes(attention, ROWS, COLS, PATCH, [(50, 73), (52, 76)], kept_mass=0.99)
    assert boxes.tolist() == [[56, 36, 73, 50], [56, 36, 76, 52]]


def one_object(top: int, left: int, height: int, width: int, noise: float = 0.1) -> torch.Tensor:
    """One map, `(1, ROWS * COLS, 7)`: the object points one way, all else the other."""
    features = torch.zeros(ROWS, COLS, 7)
    features[..., 0] = -1
    features[top : top + height, left : left + width, 0] = 1
    return (features + noise * torch.randn(features.shape)).reshape(1, -1, 7)


def test_the_box_is_that_of_the_object():
    maps = torch.cat([one_object(2, 3, 5, 7), one_object(8, 11, 3, 2), one_object(0, 0, 2, 9)])
    found = lost_boxes(maps, ROWS, COLS, PATCH)
    assert found.boxes.tolist() == [[12, 8, 40, 28], [44, 32, 52, 44], [0, 0, 36, 8]]
    assert found.masks.sum(dim=(1, 2)).tolist() == [35, 6, 18]
    assert all(mask.flatten()[seed] for mask, seed in zip(found.masks, found.seeds))


def test_an_outlier_token_takes_the_seed_from_the_object():
    clean = torch.cat([one_object(4, 5, 5, 7) for _ in range(5)])
    spoiled = clean.clone()
    spoiled[:, 0] = torch.tensor([0.0, -40, 0, 0, 0, 0, 0])  # a corner, similar to chance alone
    spoiled[:, 1:, 1] = spoiled[:, 1:, 1].abs()
    true = np.array([[20, 16, 48, 36]])
    corloc = [
        np.mean([is_found(box, true) for box in lost_boxes(maps, ROWS, COLS, PATCH).boxes.numpy()])
        for maps in (clean, spoiled)
    ]
    assert corloc == [1, 0]


def test_equal_degrees_are_taken_in_the_order_of_patches():
    """Two objects of one size: every patch of both has the same degree."""
    features = torch.tensor([-1.0, 0, 0]).repeat(ROWS * COLS, 1).view(ROWS, COLS, 3)
    features[7:10, 2:6] = torch.tensor([0, 1.0, 0])
    features[3:6, 9:13] = torch.tensor([0, 0, 1.0])
    found = lost_boxes(features.view(1, -1, 3).repeat(3, 1, 1), ROWS, COLS, PATCH)
    assert found.seeds.tolist() == [3 * COLS + 9] * 3
    assert found.boxes.tolist() == [[36, 12, 52, 24]] * 3


def by_hand(features: np.ndarray, bias: float, k_patches: int) -> tuple[int, np.ndarray]:
    """Seed, and what is similar to the patches that join it, from the whole gram matrix."""
    gram = features @ features.T + bias
    degrees = [sum(gram[i, j] > 0 for j in range(len(gram)) if j != i) for i in range(len(gram))]
    order = sorted(range(len(gram)), key=lambda patch: (degrees[patch], patch))
    joining = [patch for patch in order[:k_patches] if gram[order[0], patch] > 0]
    return order[0], sum((gram[patch] for patch in joining), np.zeros(len(gram))) > 0


@pytest.mark.parametrize("normalize", [False, True])
def test_a_bias_is_added_to_the_similarity_of_raw_or_normalized_features(normalize):
    maps = torch.randn(2, ROWS * COLS, 5, dtype=torch.float64) + 0.3
    maps[:, : 4 * COLS] -= 0.9
    biases = [0.0, -0.05, -0.3, 0.2]
    swept = lost_sweep(maps, ROWS, COLS, PATCH, normalize=normalize, biases=biases, k_patches=17)
    for bias, found in zip(biases, swept):
        alone = lost_boxes(maps, ROWS, COLS, PATCH, normalize=normalize, bias=bias, k_patches=17)
        assert torch.equal(alone.boxes, found.boxes)
        for index, features in enumerate(maps.numpy()):
            compared = features / np.linalg.norm(features, axis=1, keepdims=True) if normalize else features
            seed, similar = by_hand(compared, bias, k_patches=17)
            assert found.seeds[index] == seed
            mask, similar = found.masks[index].numpy(), similar.reshape(ROWS, COLS)
            assert mask.flat[seed] and not (mask & ~similar).any()
            # nothing beside it was left out
            assert not (similar & ~mask & ndimage.binary_dilation(mask)).any()
            assert len(ndimage.find_objects(ndimage.label(mask)[0])) == 1
    assert len({tuple(found.boxes.flatten().tolist()) for found in swept}) > 1


def test_normalized_features_do_not_depend_on_their_norms():
    maps = torch.cat([one_object(2, 3, 5, 7), one_object(8, 11, 3, 2)])
    scaled = maps * torch.rand(2, ROWS * COLS, 1).add(0.1).mul(50)
    expected = lost_boxes(maps, ROWS, COLS, PATCH, normalize=True, bias=-0.3).boxes
    assert torch.equal(lost_boxes(scaled, ROWS, COLS, PATCH, normalize=True, bias=-0.3).boxes, expected)


def test_a_seed_in_the_background_is_counted_and_boxed_alone():
    maps = torch.cat([one_object(2, 3, 5, 7, noise=0.01), 9 * one_object(2, 3, 5, 7, noise=0.01)])
    found = lost_boxes(maps, ROWS, COLS, PATCH, bias=-2.0)
    assert found.seed_in_background.tolist() == [True, False]
    row, col = divmod(int(found.seeds[0]), COLS)
    assert found.boxes[0].tolist() == [col * PATCH, row * PATCH, (col + 1) * PATCH, (row + 1) * PATCH]
    assert found.boxes[1].tolist() == [12, 8, 40, 28]


@pytest.mark.parametrize(("rows_at_once", "cached"), [(3, 1), (100, 2**30)])
def test_nothing_depends_on_what_is_computed_together(monkeypatch, rows_at_once, cached):
    maps = torch.randn(5, ROWS * COLS, 7)
    expected = lost_boxes(maps, ROWS, COLS, PATCH)
    monkeypatch.setattr(lost, "ROWS_AT_ONCE", rows_at_once)
    monkeypatch.setattr(lost, "CACHED_SIMILARITIES", cached)
    for ours, same in zip(lost_boxes(maps, ROWS, COLS, PATCH), expected):
        assert torch.equal(ours, same)


def test_half_precision_and_slices_of_tokens_are_taken():
    tokens = torch.cat([torch.full((1, 3, 7), 99.0), one_object(2, 3, 5, 7)], dim=1)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        found = lost_boxes(tokens.to(dtype)[:, 3:], ROWS, COLS, PATCH, (27, 39))
        assert found.boxes.tolist() == [[12, 8, 39, 27]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"features": torch.randn(2, ROWS * COLS + 1, 5)}, r"13 x 19 = 247"),
        ({"features": torch.randn(0, ROWS * COLS, 5)}, "not be empty"),
        ({"features": torch.full((2, ROWS * COLS, 5), torch.nan)}, "NaN"),
        ({"k_patches": 0}, "k_patches"),
    ],
)
def test_what_lost_cannot_take_is_an_error(change, named):
    arguments = {"features": torch.randn(2, ROWS * COLS, 5), "rows": ROWS, "cols": COLS, "patch_size": PATCH, **change}
    with pytest.raises(ValueError, match=named):
        lost_boxes(**arguments)


@pytest.mark.parametrize(
    ("attention", "kept_mass", "named"),
    [
        (torch.rand(2, ROWS * COLS - 1), 0.6, "247"),
        (torch.rand(2, ROWS * COLS), 1.5, "kept_mass"),
        (torch.full((2, ROWS * COLS), torch.nan), 0.6, "NaN"),
    ],
)
def test_what_attention_boxes_cannot_take_is_an_error(attention, kept_mass, named):
    with pytest.raises(ValueError, match=named):
        attention_boxes(attention, ROWS, COLS, PATCH, kept_mass=kept_mass)
