# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch

from hf_vitreg.registers.post_hoc import Views, denoised_features, draw_views, make_view, map_back


BATCH_SIZE, NUM_VIEWS, PATCH_SIZE, ROWS, COLS, WIDTH = 3, 7, 2, 5, 11, 13
FILL = torch.tensor([2.0, 3.0, 5.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(BATCH_SIZE, 3, ROWS * PATCH_SIZE, COLS * PATCH_SIZE, generator=generator())


@pytest.fixture
def views() -> Views:
    return draw_views(BATCH_SIZE, NUM_VIEWS, (ROWS, COLS), 0.4, 0.5, generator(1))


def test_the_first_view_is_the_image_and_shifts_stay_in_their_share_of_each_side():
    shifts, flips = draw_views(50, NUM_VIEWS, (ROWS, COLS), 0.3, 0.5, generator())
    assert shifts.shape == (50, NUM_VIEWS, 2) and flips.shape == (50, NUM_VIEWS)
    assert not shifts[:, 0].any() and not flips[:, 0].any()
    # 1.5 rows and 3.3 columns
    assert shifts[..., 0].unique().tolist() == [-2, -1, 0, 1, 2]
    assert shifts[..., 1].unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert flips[:, 1:].float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_views_are_those_of_the_generator():
    first, again, other = (draw_views(4, NUM_VIEWS, (9, 9), 0.3, 0.5, generator(seed)) for seed in (2, 2, 3))
    assert all(torch.equal(one, two) for one, two in zip(first, again))
    assert not torch.equal(first.shifts, other.shifts)
    assert not torch.equal(first.shifts[0], first.shifts[1]), "each image has its own"


def test_shifts_repeat_only_when_there_are_no_others():
    shifts, _ = draw_views(20, 9, (7, 7), 0.15, 0.5, generator())
    for of_image in shifts.tolist():
        assert len({tuple(shift) for shift in of_image}) == 9
    assert not draw_views(4, 5, (7, 7), 0.0, 0.5, generator()).shifts.any()


def test_shifts_are_far_from_each_other():
    """Each is at least as far from those before it as all that follow."""
    shifts, _ = draw_views(20, NUM_VIEWS, (40, 60), 0.5, 0.5, generator())
    distances = torch.cdist(shifts.double(), shifts.double())
    gaps = torch.stack([distances[:, index, :index].amin(dim=1) for index in range(1, NUM_VIEWS)])
    assert (gaps.diff(dim=0) <= 0).all() and gaps.min() > 5


def test_no_view_is_no_mean():
    with pytest.raises(ValueError, match="num_views must be at least 1"):
        draw_views(2, 0, (7, 7), 0.1, 0.5, generator())


def slow_view(image: torch.Tensor, shift: list[int], flip: bool) -> torch.Tensor:
    """Pixel by pixel."""
    _, height, width = image.shape
    view = FILL[:, None, None].expand_as(image).clone()
    for row in range(height):
        for col in range(width):
            to_row, to_col = row + PATCH_SIZE * shift[0], col + PATCH_SIZE * shift[1]
            if 0 <= to_row < height and 0 <= to_col < width:
                view[:, to_row, width - 1 - to_col if flip else to_col] = image[:, row, col]
    return view


def test_a_view_is_the_image_moved_and_then_mirrored(pixel_values, views):
    for index in range(NUM_VIEWS):
        shifts, flips = views.shifts[:, index], views.flips[:, index]
        found = make_view(pixel_values, shifts, flips, PATCH_SIZE, FILL)
        for image in range(BATCH_SIZE):
            expected = slow_view(pixel_values[image], shifts[image].tolist(), flips[image].item())
            assert torch.equal(found[image], expected)


def test_what_is_mapped_back_is_where_it_was(pixel_values, views):
    """Mean pixels of a patch are features that move with it."""
    patches = pixel_values.unfold(2, PATCH_SIZE, PATCH_SIZE).unfold(3, PATCH_SIZE, PATCH_SIZE).mean(dim=(-1, -2))
    for index in range(NUM_VIEWS):
        shifts, flips = views.shifts[:, index], views.flips[:, index]
        view = make_view(pixel_values, shifts, flips, PATCH_SIZE, FILL)
        means = view.unfold(2, PATCH_SIZE, PATCH_SIZE).unfold(3, PATCH_SIZE, PATCH_SIZE).mean(dim=(-1, -2))
        found, is_shown = map_back(means.permute(0, 2, 3, 1), shifts, flips)
        expected = patches.permute(0, 2, 3, 1) * is_shown[..., None]
        torch.testing.assert_close(found, expected)
        kept = (ROWS - shifts[:, 0].abs()) * (COLS - shifts[:, 1].abs())
        assert torch.equal(is_shown.sum(dim=(1, 2)), kept)


def patchwise(pixel_values: torch.Tensor) -> torch.Tensor:
    """A linear map of each patch, which mirrors do not change."""
    kernel = torch.randn(WIDTH, 3, PATCH_SIZE, PATCH_SIZE, generator=generator(5))
    features = torch.nn.functional.conv2d(pixel_values, kernel + kernel.flip(-1), stride=PATCH_SIZE)
    return features.flatten(2).mT


def test_what_follows_the_image_is_its_own_mean(pixel_values, views):
    found = denoised_features(patchwise, pixel_values, views, PATCH_SIZE, FILL)
    torch.testing.assert_close(found, patchwise(pixel_values))


def test_what_stays_where_it_is_fades(pixel_values, views):
    """An artifact at one place of the grid is divided among the patches that were there in one view or another."""
    artifact = torch.zeros(ROWS, COLS)
    artifact[2, 3] = 1.0

    def model(view: torch.Tensor) -> torch.Tensor:
        return patchwise(view) + artifact.flatten()[:, None]

    found = denoised_features(model, pixel_values, views, PATCH_SIZE, FILL) - patchwise(pixel_values)
    for image in range(BATCH_SIZE):
        total, counts = torch.zeros(ROWS, COLS), torch.zeros(ROWS, COLS)
        for (down, right), flip in zip(views.shifts[image].tolist(), views.flips[image].tolist()):
            for row in range(ROWS):
                for col in range(COLS):
                    in_row, in_col = row + down, col + right
                    if 0 <= in_row < ROWS and 0 <= in_col < COLS:
                        total[row, col] += artifact[in_row, COLS - 1 - in_col if flip else in_col]
                        counts[row, col] += 1
        expected = (total / counts).flatten()[:, None].expand(-1, WIDTH)
        torch.testing.assert_close(found[image], expected, rtol=1e-4, atol=1e-5)
        assert 0 < found[image].max() < 0.7


def test_means_of_half_precision_are_in_full(pixel_values, views):
    found = denoised_features(lambda view: patchwise(view).bfloat16(), pixel_values, views, PATCH_SIZE, FILL)
    assert found.dtype == torch.float32
    doubles = denoised_features(lambda view: patchwise(view).double(), pixel_values, views, PATCH_SIZE, FILL)
    assert doubles.dtype == torch.float64
