# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

from hf_vitreg.analysis import probes
from hf_vitreg.analysis.probes import (
    HELD_OUT,
    ImageClassProbe,
    PositionProbe,
    ReconstructionProbe,
    image_part,
    matched_mask,
    patch_pixels,
)


NUM_IMAGES, ROWS, COLS, DIM, PATCH_SIZE, NUM_CLASSES = 61, 3, 5, 17, 2, 4
NUM_PATCHES, NUM_PIXELS = ROWS * COLS, 3 * PATCH_SIZE**2
IDS = [7 * number - 50 for number in range(NUM_IMAGES)]


def parts(seed: int = 0, test_share: float = 0.2) -> torch.Tensor:
    return torch.tensor([image_part(image_id, seed, test_share) for image_id in IDS])


def updated(probe, *tensors: torch.Tensor | None, order: torch.Tensor | None = None, batch_size: int = NUM_IMAGES):
    """The probe, with the images in batches and in any order."""
    order = torch.arange(NUM_IMAGES) if order is None else order
    for images in order.split(batch_size):
        ids = [IDS[image] for image in images.tolist()]
        probe.update(ids, *(None if tensor is None else tensor[images] for tensor in tensors))
    return probe


def assert_close(actual, expected):
    for name, value in asdict(expected).items():
        assert getattr(actual, name) == pytest.approx(value, rel=1e-9), name


# Images


def test_split_follows_from_seed_and_id_alone():
    everything = torch.tensor([image_part(image_id, 0, 0.2) for image_id in range(5000)])
    shares = torch.bincount(everything) / 5000
    torch.testing.assert_close(shares, torch.tensor([0.4, 0.4, 0.2]), atol=0.02, rtol=0)
    assert image_part(3, 1, 0.2) == image_part(torch.tensor(3), 1, 0.2)
    assert (parts(seed=1) != parts()).any()


def test_pixels_of_a_patch_are_those_that_its_embedding_sees():
    pixel_values = torch.randn(2, 3, ROWS * PATCH_SIZE + 1, COLS * PATCH_SIZE)
    convolution = nn.Conv2d(3, DIM, PATCH_SIZE, PATCH_SIZE, bias=False)
    embedded = patch_pixels(pixel_values, PATCH_SIZE) @ convolution.weight.flatten(1).T
    torch.testing.assert_close(embedded, convolution(pixel_values).flatten(2).mT)


def test_matched_patches_are_as_many_as_the_outliers_of_the_image():
    outliers = torch.rand(NUM_IMAGES, NUM_PATCHES) < 0.2
    outliers[0], outliers[1] = False, torch.arange(NUM_PATCHES) > 1
    matched = matched_mask(IDS, outliers, seed=3)
    assert not (matched & outliers).any()
    expected = torch.minimum(outliers.sum(1), (~outliers).sum(1))
    assert torch.equal(matched.sum(1), expected) and expected[1] == 2
    assert torch.equal(matched_mask(IDS[5:9], outliers[5:9], seed=3), matched[5:9])
    assert not torch.equal(matched_mask(IDS, outliers, seed=4), matched)


# Position


def position_tokens(noise: float = 0.0) -> torch.Tensor:
    """Tokens that hold their cell one-hot, rotated, with a mean and different scales."""
    tokens = torch.eye(NUM_PATCHES, DIM).expand(NUM_IMAGES, -1, -1) + noise * torch.randn(NUM_IMAGES, NUM_PATCHES, DIM)
    return tokens @ torch.randn(DIM, DIM) * torch.logspace(-2, 2, DIM) + 50


def test_tokens_that_hold_their_position_tell_it():
    score = updated(PositionProbe(ROWS, COLS), position_tokens()).result()
    assert (score.top1, score.mean_distance) == (1, 0)
    num_test_images = int((parts() == HELD_OUT).sum())
    assert score.num_test_tokens == num_test_images * NUM_PATCHES
    assert score.num_train_tokens == (NUM_IMAGES - num_test_images) * NUM_PATCHES


def test_tokens_that_hold_their_row_miss_the_column():
    rows = nn.functional.one_hot(torch.arange(ROWS).repeat_interleave(COLS), DIM).float()
    score = updated(PositionProbe(ROWS, COLS), rows.expand(NUM_IMAGES, -1, -1)).result()
    assert score.top1 == pytest.approx(1 / COLS)
    # one column is predicted for all, at worst an outer one
    assert 6 / 5 - 1e-9 <= score.mean_distance <= 2


def test_random_tokens_tell_their_position_by_chance():
    score = updated(PositionProbe(ROWS, COLS), torch.randn(NUM_IMAGES, NUM_PATCHES, DIM)).result()
    cells = torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLS)).double()
    assert score.top1 == pytest.approx(1 / NUM_PATCHES, abs=0.06)
    assert score.mean_distance == pytest.approx(torch.cdist(cells, cells).mean().item(), abs=0.4)


def test_masked_tokens_take_no_part():
    mask = torch.rand(NUM_IMAGES, NUM_PATCHES) < 0.3
    tokens = position_tokens(noise=0.3)
    expected = updated(PositionProbe(ROWS, COLS), tokens, mask).result()
    assert expected.num_train_tokens == mask[parts() != HELD_OUT].sum()
    assert expected.num_test_tokens == mask[parts() == HELD_OUT].sum()
    tokens[~mask] = 1e6
    assert_close(updated(PositionProbe(ROWS, COLS), tokens, mask).result(), expected)


def test_normal_tokens_know_more_than_outliers():
    outliers = torch.rand(NUM_IMAGES, NUM_PATCHES) < 0.2
    tokens = position_tokens(noise=0.02)
    tokens[outliers] = 500 * torch.randn(int(outliers.sum()), DIM)
    matched = updated(PositionProbe(ROWS, COLS), tokens, matched_mask(IDS, outliers)).result()
    outlier = updated(PositionProbe(ROWS, COLS), tokens, outliers).result()
    assert matched.num_train_tokens == pytest.approx(outlier.num_train_tokens, rel=0.05)
    assert matched.top1 > 0.9 > 0.3 > outlier.top1
    assert matched.mean_distance < 0.2 < 1 < outlier.mean_distance


@pytest.mark.parametrize("batch_size", [1, 8])
def test_neither_batches_nor_their_order_matter(batch_size):
    mask, order = torch.rand(NUM_IMAGES, NUM_PATCHES) < 0.5, torch.randperm(NUM_IMAGES)
    tokens, pixels = position_tokens(noise=0.3), torch.randn(NUM_IMAGES, NUM_PATCHES, NUM_PIXELS)
    labels = torch.randint(NUM_CLASSES, (NUM_IMAGES,))
    cases = [
        (lambda: PositionProbe(ROWS, COLS, max_test_tokens=29), (tokens, mask)),
        (lambda: ReconstructionProbe(max_test_tokens=29), (tokens, pixels, mask)),
        (lambda: ImageClassProbe(NUM_CLASSES, max_test_images=9), (labels, tokens, mask)),
    ]
    for make, tensors in cases:
        cut = updated(make(), *tensors, order=order, batch_size=batch_size).result()
        assert_close(cut, updated(make(), *tensors).result())


def test_seed_decides_the_split_and_the_draws():
    tokens, labels = position_tokens(noise=0.5), torch.randint(NUM_CLASSES, (NUM_IMAGES,))
    for make, tensors in [
        (lambda seed: PositionProbe(ROWS, COLS, seed), (tokens,)),
        (lambda seed: ImageClassProbe(NUM_CLASSES, seed=seed), (labels, tokens)),
    ]:
        first, again, other = (updated(make(seed), *tensors).result() for seed in (1, 1, 2))
        assert first == again != other


def test_held_out_tokens_are_sampled_evenly_and_their_number_is_bounded():
    sample = probes._Sample(200)
    for number in range(40):
        keys = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        sample.update(keys, torch.full((50, 3), float(number)), torch.arange(50))
        assert len(sample) == min(50 * (number + 1), 200)
    numbers, positions = sample.tensors
    assert numbers.shape == (200, 3) and positions.dtype == torch.int64
    assert numbers[:, 0].mean() == pytest.approx(19.5, abs=3)
    assert numbers.unique().numel() > 35 and positions.unique().numel() > 40


# Pixels


def test_tokens_that_hold_the_pixels_give_them_back():
    pixels = torch.randn(NUM_IMAGES, NUM_PATCHES, NUM_PIXELS)
    tokens = torch.cat([pixels, torch.randn(NUM_IMAGES, NUM_PATCHES, DIM - NUM_PIXELS)], dim=-1) @ torch.randn(
        DIM, DIM
    )
    score = updated(ReconstructionProbe(), tokens, pixels).result()
    assert score.l2_error < 1e-4 and score.rmse < 1e-4


def test_error_is_the_length_of_what_tokens_do_not_hold():
    """One token channel a pixel value but for one value, which is +-2 at random: its mean is all that is known."""
    pixels = torch.randn(NUM_IMAGES, NUM_PATCHES, NUM_PIXELS)
    pixels[..., 5] = 4.0 * (torch.rand(NUM_IMAGES, NUM_PATCHES) < 0.5) - 2
    tokens = pixels.clone()
    tokens[..., 5] = 0
    score = updated(ReconstructionProbe(), tokens, pixels).result()
    assert score.l2_error == pytest.approx(2, abs=0.05)
    assert score.rmse == pytest.approx(2 / NUM_PIXELS**0.5, abs=0.02)


def test_random_tokens_give_the_mean_patch():
    pixels = torch.randn(NUM_IMAGES, NUM_PATCHES, NUM_PIXELS) + 7
    score = updated(ReconstructionProbe(), torch.randn(NUM_IMAGES, NUM_PATCHES, DIM), pixels).result()
    held_out = (pixels[parts() == HELD_OUT] - 7).norm(dim=-1).mean().item()
    assert score.l2_error == pytest.approx(held_out, rel=0.03)


# Image class


@pytest.fixture
def labels():
    return torch.arange(NUM_IMAGES) % NUM_CLASSES


def class_tokens(labels: torch.Tensor, num_tokens: int) -> torch.Tensor:
    tokens = nn.functional.one_hot(labels, DIM)[:, None] + 0.1 * torch.randn(NUM_IMAGES, num_tokens, DIM)
    return tokens + 3


@pytest.mark.parametrize(("num_tokens", "num_draws"), [(1, 1), (NUM_PATCHES, 5)])
def test_tokens_that_hold_the_class_tell_it(labels, num_tokens, num_draws):
    score = updated(ImageClassProbe(NUM_CLASSES, num_draws), labels, class_tokens(labels, num_tokens)).result()
    assert (score.accuracy, score.std, score.accuracies) == (1, 0, (1,) * num_draws)
    assert score.num_train_images + score.num_test_images == NUM_IMAGES
    assert score.num_left_out == 0


def test_only_tokens_of_the_kind_are_drawn(labels):
    mask = torch.rand(NUM_IMAGES, NUM_PATCHES) < 0.2
    tokens = torch.where(mask[..., None], class_tokens(labels, NUM_PATCHES), torch.randn(1, 1, DIM))
    assert updated(ImageClassProbe(NUM_CLASSES), labels, tokens, mask).result().accuracy == 1
    assert updated(ImageClassProbe(NUM_CLASSES), labels, tokens, ~mask).result().accuracy < 0.6


def test_spread_is_over_the_draws(labels):
    """Half of the tokens know the class, so that a draw decides."""
    tokens = class_tokens(labels, 2)
    tokens[:, 1] = 3 + 0.1 * torch.randn(NUM_IMAGES, DIM)
    score = updated(ImageClassProbe(NUM_CLASSES, num_draws=4), labels, tokens).result()
    mean = sum(score.accuracies) / 4
    assert len(set(score.accuracies)) > 1 and score.accuracy == pytest.approx(mean)
    assert score.std == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in score.accuracies) / 4))


def test_a_penalty_can_be_that_of_another_probe(labels):
    tokens = class_tokens(labels, 1) + 3 * torch.randn(NUM_IMAGES, 1, DIM)
    chooses = ImageClassProbe(NUM_CLASSES, 1)
    takes = ImageClassProbe(NUM_CLASSES, 1, penalty_of=chooses)
    for probe in (chooses, takes):
        updated(probe, labels, tokens)
    assert takes.result() == chooses.result()
    other = ImageClassProbe(NUM_CLASSES, 1)
    updated(other, labels, torch.randn(NUM_IMAGES, 1, DIM))
    assert ImageClassProbe(NUM_CLASSES, 1, penalty_of=other).penalty == other.penalty != chooses.penalty


def test_images_without_the_kind_are_left_out_and_counted(labels):
    mask = torch.ones(NUM_IMAGES, NUM_PATCHES, dtype=torch.bool)
    mask[::3] = False
    tokens = class_tokens(labels, NUM_PATCHES)
    score = updated(ImageClassProbe(NUM_CLASSES), labels, tokens, mask, batch_size=1).result()
    assert score.num_left_out == 21
    assert score.num_train_images + score.num_test_images == NUM_IMAGES - 21
    assert score.accuracy == 1


# Nothing to measure


def test_no_tokens_have_no_score(labels):
    tokens = torch.randn(NUM_IMAGES, NUM_PATCHES, DIM)
    nothing = torch.zeros(NUM_IMAGES, NUM_PATCHES, dtype=torch.bool)
    pixels = torch.randn(NUM_IMAGES, NUM_PATCHES, NUM_PIXELS)
    assert PositionProbe(ROWS, COLS).result() is None
    assert updated(PositionProbe(ROWS, COLS), tokens, nothing).result() is None
    assert updated(ReconstructionProbe(), tokens, pixels, nothing).result() is None
    assert updated(ImageClassProbe(NUM_CLASSES), labels, tokens, nothing).result() is None
    # a model without registers
    assert updated(ImageClassProbe(NUM_CLASSES), labels, tokens[:, :0]).result() is None
    # no image to test on, then none to train on
    for part in (0, HELD_OUT):
        mask = nothing | (parts() == part)[:, None]
        assert updated(PositionProbe(ROWS, COLS), tokens, mask).result() is None


def test_bad_input_is_named(labels):
    tokens = torch.randn(NUM_IMAGES, NUM_PATCHES, DIM)
    with pytest.raises(ValueError, match=r"patch_tokens must have shape \(61, 15, dim\), got \(61, 14, 17\)"):
        PositionProbe(ROWS, COLS).update(IDS, tokens[:, 1:])
    with pytest.raises(ValueError, match=r"mask must have shape \(61, 15\)"):
        PositionProbe(ROWS, COLS).update(IDS, tokens, torch.ones(NUM_IMAGES, 1))
    with pytest.raises(ValueError, match=r"pixels must have shape \(61, 15, channels"):
        ReconstructionProbe().update(IDS, tokens, torch.randn(NUM_IMAGES, 14, NUM_PIXELS))
    with pytest.raises(ValueError, match="Labels must be 0 to 3, got 0 to 4"):
        ImageClassProbe(NUM_CLASSES).update(IDS, torch.arange(NUM_IMAGES) % 5, tokens)
    with pytest.raises(ValueError, match="num_draws must be 1 or more, got 0"):
        ImageClassProbe(NUM_CLASSES, num_draws=0)
    with pytest.raises(ValueError, match="test_share must be between 0 and 1, got 1"):
        PositionProbe(ROWS, COLS, test_share=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_are_refused(labels, value):
    tokens, pixels = torch.randn(NUM_IMAGES, NUM_PATCHES, DIM), torch.randn(NUM_IMAGES, NUM_PATCHES, NUM_PIXELS)
    broken, broken_pixels = tokens.clone(), pixels.clone()
    broken[3, 2, 1] = broken_pixels[3, 2, 1] = value
    for probe, *tensors in [
        (PositionProbe(ROWS, COLS), broken),
        (ReconstructionProbe(), broken, pixels),
        (ReconstructionProbe(), tokens, broken_pixels),
        (ImageClassProbe(NUM_CLASSES), labels, broken),
    ]:
        with pytest.raises(ValueError, match="must be finite, but 1 of"):
            probe.update(IDS, *tensors)
