# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch

from hf_vitreg.analysis.neighbours import (
    NeighbourSimilarity,
    OutlierFrequency,
    neighbour_cosines,
    neighbour_similarity,
)


NUM_IMAGES, ROWS, COLS, DIM = 7, 3, 5, 11
UP, DOWN, LEFT, RIGHT = range(4)
OFFSETS = {UP: (-1, 0), DOWN: (1, 0), LEFT: (0, -1), RIGHT: (0, 1)}


@pytest.fixture
def embeddings():
    return torch.randn(NUM_IMAGES, ROWS, COLS, DIM)


@pytest.fixture
def outliers():
    return torch.rand(NUM_IMAGES, ROWS, COLS) < 0.2


def one_by_one(embeddings: torch.Tensor) -> torch.Tensor:
    """Every cosine for itself, NaN beyond the border."""
    cosines = torch.full((*embeddings.shape[:-1], 4), math.nan)
    for image, row, col in torch.cartesian_prod(*(torch.arange(size) for size in embeddings.shape[:-1])).tolist():
        for side, (down, right) in OFFSETS.items():
            if 0 <= row + down < embeddings.shape[1] and 0 <= col + right < embeddings.shape[2]:
                pair = embeddings[image, row, col], embeddings[image, row + down, col + right]
                cosines[image, row, col, side] = torch.cosine_similarity(*pair, dim=0)
    return cosines


def test_cosines_are_those_of_the_four_neighbours(embeddings):
    actual = neighbour_cosines(embeddings)
    torch.testing.assert_close(actual.float(), one_by_one(embeddings), equal_nan=True)
    mean = one_by_one(embeddings).nanmean(-1)
    torch.testing.assert_close(neighbour_similarity(embeddings).float(), mean)


def test_hand_computed_grid():
    """One row: the same direction, another one at 60 degrees, the opposite of that."""
    directions = torch.tensor([[1.0, 0], [5, 0], [1, 3**0.5], [-2, -2 * 3**0.5]])[None, None]
    expected = torch.tensor([1, 0.75, -0.25, -1], dtype=torch.float64)
    torch.testing.assert_close(neighbour_similarity(directions)[0, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(2, 1, 1, 3), (2, 1, 4, 3), (2, 4, 1, 3)])
def test_grids_may_be_one_patch_wide(shape):
    similarity = neighbour_similarity(torch.randn(shape))
    assert similarity.isnan().all() == (shape[1] * shape[2] == 1)


def test_a_zero_vector_has_no_direction(embeddings):
    embeddings[0, 1, 2] = 0
    cosines = neighbour_cosines(embeddings)
    assert cosines[0, 1, 2].isnan().all() and cosines[0, 0, 2, DOWN].isnan()
    assert cosines[0, 1, 3].isnan().tolist() == [False, False, True, False]


def test_length_does_not_matter_nor_half_precision_much(embeddings):
    expected = neighbour_cosines(embeddings)
    scaled = embeddings * torch.rand(NUM_IMAGES, ROWS, COLS, 1).exp()
    torch.testing.assert_close(neighbour_cosines(scaled), expected, equal_nan=True, atol=1e-6, rtol=0)
    torch.testing.assert_close(neighbour_cosines(embeddings.half()), expected, equal_nan=True, atol=2e-3, rtol=0)


@pytest.mark.parametrize("values", ["patch", "pair"])
def test_densities_are_of_both_groups(embeddings, outliers, values):
    measured = NeighbourSimilarity(values, num_bins=40)
    measured.update(embeddings, outliers)
    cosines = one_by_one(embeddings) if values == "pair" else one_by_one(embeddings).nanmean(-1)
    for density, chosen in [(measured.outliers, outliers), (measured.rest, ~outliers)]:
        expected = cosines[chosen]
        expected = expected[~expected.isnan()].double()
        assert density.count == len(expected)
        assert density.mean == pytest.approx(expected.mean().item(), abs=1e-6)
        assert density.std == pytest.approx(expected.std(correction=0).item(), abs=1e-6)
        assert density.edges.shape == (41,) and density.density.shape == (40,)
        assert (density.density * density.edges.diff()).sum() == pytest.approx(1)
        # the centres of the bins have the same mean, since a value is shared by the two nearest
        centres = (density.edges[1:] + density.edges[:-1]) / 2
        assert (density.density * centres * density.edges.diff()).sum() == pytest.approx(density.mean, abs=1e-5)


def test_outliers_on_even_patches_pile_up_at_one(embeddings):
    outliers = torch.zeros(NUM_IMAGES, ROWS, COLS, dtype=torch.bool)
    outliers[:, 1, 2] = True
    embeddings[:, 1, 1:4] = embeddings[:, 0, 2] = embeddings[:, 2, 2] = torch.ones(DIM)
    measured = NeighbourSimilarity()
    measured.update(embeddings, outliers)
    assert measured.outliers.mean == pytest.approx(1)
    assert measured.outliers.density[-1] == pytest.approx(100)
    assert measured.rest.mean < 0.7


@pytest.mark.parametrize("batch_size", [1, 3])
def test_neither_batches_nor_their_order_matter(embeddings, outliers, batch_size):
    whole, cut = NeighbourSimilarity(), NeighbourSimilarity()
    whole.update(embeddings, outliers)
    for images in torch.randperm(NUM_IMAGES).split(batch_size):
        cut.update(embeddings[images], outliers[images])
    for name in ("outliers", "rest"):
        expected, actual = getattr(whole, name), getattr(cut, name)
        assert (actual.count, actual.mean, actual.std) == pytest.approx((expected.count, expected.mean, expected.std))
        torch.testing.assert_close(actual.density, expected.density)


def test_a_group_may_be_empty(embeddings):
    measured = NeighbourSimilarity()
    measured.update(embeddings, torch.zeros(NUM_IMAGES, ROWS, COLS, dtype=torch.bool))
    assert measured.outliers.count == 0 and math.isnan(measured.outliers.mean)
    assert measured.outliers.density.sum() == 0
    assert measured.rest.count == NUM_IMAGES * ROWS * COLS


def test_bad_input_is_named(embeddings, outliers):
    with pytest.raises(ValueError, match=r"outliers must have shape \(7, 3, 5\), got \(7, 15\)"):
        NeighbourSimilarity().update(embeddings, outliers.flatten(1))
    with pytest.raises(ValueError, match=r"patch_embeddings must have shape \(batch, rows, cols, dim\)"):
        neighbour_cosines(embeddings[0])
    with pytest.raises(ValueError, match="patch_embeddings must be finite, but 11 of"):
        embeddings[0, 0, 0] = math.inf
        neighbour_similarity(embeddings)
    with pytest.raises(ValueError, match='values must be "patch" or "pair", got \'both\''):
        NeighbourSimilarity("both")


# Frequency over the grid


@pytest.mark.parametrize("batch_size", [1, 3, NUM_IMAGES])
def test_frequency_is_the_share_of_images(outliers, batch_size):
    outliers[2] = False
    measured = OutlierFrequency()
    for part in outliers.split(batch_size):
        measured.update(part)
    assert measured.grid == (ROWS, COLS) and measured.num_images == NUM_IMAGES
    torch.testing.assert_close(measured.frequency, outliers.double().mean(0))
    assert measured.num_outliers == outliers.sum()
    assert measured.num_images_with_outliers == outliers.flatten(1).any(1).sum()
    assert measured.share == pytest.approx(outliers.double().mean().item())
    border = torch.cat([outliers[:, [0, -1]].flatten(), outliers[:, 1:-1, [0, -1]].flatten()])
    assert measured.border_share == pytest.approx(border.double().mean().item())
    assert measured.inner_share == pytest.approx(outliers[:, 1:-1, 1:-1].double().mean().item())


def test_grids_with_a_border_only_have_no_inside():
    measured = OutlierFrequency()
    measured.update(torch.tensor([[[True, False, False], [False, False, False]]]))
    assert measured.border_share == pytest.approx(1 / 6) and math.isnan(measured.inner_share)


def test_another_grid_and_no_images_are_refused(outliers):
    measured = OutlierFrequency()
    with pytest.raises(ValueError, match="no image"):
        _ = measured.frequency
    measured.update(outliers)
    with pytest.raises(ValueError, match=r"must have shape \(batch, 3, 5\), got \(7, 5, 3\)"):
        measured.update(outliers.transpose(1, 2))
