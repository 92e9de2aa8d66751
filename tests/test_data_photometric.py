# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import PIL.Image
import PIL.ImageFilter
import pytest
import torch
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2 import functional as F

from hf_vitreg.data import photometric


STRENGTHS = torch.tensor([0.6, 0.83, 1.0, 1.21, 1.4])
SHIFTS = torch.tensor([-0.1, -0.03, 0.0, 0.05, 0.5])
SIGMAS = torch.tensor([0.1, 0.4, 0.9, 1.3, 2.0])
CHANGES = [
    (photometric.adjust_brightness, F.adjust_brightness, STRENGTHS),
    (photometric.adjust_contrast, F.adjust_contrast, STRENGTHS),
    (photometric.adjust_saturation, F.adjust_saturation, STRENGTHS),
    (photometric.adjust_hue, F.adjust_hue, SHIFTS),
    (photometric.gaussian_blur, lambda crop, sigma: F.gaussian_blur(crop, [9, 9], [sigma, sigma]), SIGMAS),
]


def crops(height: int = 13, width: int = 17) -> torch.Tensor:
    """Five crops: two of noise, one of pure colors, one gray, one black."""
    drawn = torch.rand(5, 3, height, width, generator=torch.Generator().manual_seed(0))
    drawn[2] = drawn[2].round()
    drawn[3] = drawn[3, :1]
    drawn[4] = 0
    return drawn


def photograph() -> PIL.Image.Image:
    return PIL.Image.fromarray(load_sample_image("flower.jpg")).resize((101, 67), PIL.Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("ours", "torchvisions", "strengths"), CHANGES)
def test_each_crop_is_changed_as_torchvision_does_with_its_strength(ours, torchvisions, strengths):
    given = crops()
    expected = torch.stack([torchvisions(crop, float(s)) for crop, s in zip(given, strengths, strict=True)])
    torch.testing.assert_close(ours(given, strengths), expected, atol=5e-6, rtol=0)
    assert torch.equal(given, crops())


@pytest.mark.parametrize(("ours", "torchvisions", "strengths"), CHANGES[:3])
def test_colors_are_those_of_pil_but_for_its_rounding(ours, torchvisions, strengths):
    image = photograph()
    for strength in strengths:
        expected = F.pil_to_tensor(torchvisions(image, float(strength))) / 255
        found = ours(F.pil_to_tensor(image)[None] / 255, strength[None])[0]
        assert (found - expected).abs().max() < 1.6 / 255


def test_hue_is_that_of_pil_but_for_its_256_hues():
    image = photograph()
    for shift in SHIFTS:
        difference = photometric.adjust_hue(F.pil_to_tensor(image)[None] / 255, shift[None])[0]
        difference -= F.pil_to_tensor(F.adjust_hue(image, float(shift))) / 255
        assert difference.abs().mean() < 2 / 255


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_that_of_pil_but_for_its_boxes_and_borders(sigma):
    """DeiT-III blurs with PIL, which adds up three boxes and repeats the border, DINOv2 with a Gaussian of 9 taps."""
    image = photograph()
    expected = F.pil_to_tensor(image.filter(PIL.ImageFilter.GaussianBlur(sigma))) / 255
    given = F.pil_to_tensor(image)[None] / 255
    difference = (photometric.gaussian_blur(given, torch.tensor([sigma]))[0] - expected).abs()
    # half a level of 255 is what rounding alone makes of the mean
    assert difference[:, 5:-5, 5:-5].max() < 0.03 and difference.mean() < 0.004
    assert difference.mean() < 0.35 * (given[0] - expected).abs().mean()


def test_every_level_is_solarized_as_in_8_bits():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = photometric.solarize(levels / 255)
    assert torch.equal((found * 255).round().to(torch.uint8), F.solarize(levels, 128))


def test_gray_is_gray():
    found = photometric.grayscale(crops())
    torch.testing.assert_close(found, F.rgb_to_grayscale(crops(), num_output_channels=3), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (1, 3), (2, 7)])
def test_crops_smaller_than_the_blur_can_be_blurred(height, width):
    found = photometric.gaussian_blur(crops(height, width), SIGMAS)
    assert found.shape == (5, 3, height, width) and found.min() >= 0 and found.max() <= 1.00001
    constant = torch.full((5, 3, height, width), 0.3)
    torch.testing.assert_close(photometric.gaussian_blur(constant, SIGMAS), constant)


def test_jitter_draws_factors_from_their_intervals_and_all_orders(monkeypatch):
    calls = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(
            photometric,
            f"adjust_{name}",
            lambda crops, strengths, name=name: calls.append((name, strengths)) or crops,
        )
    torch.manual_seed(0)
    orders = set()
    for _ in range(300):
        photometric.color_jitter(crops(), 0.4, 0.3, 0.2, 0.1)
        orders.add(tuple(name for name, _ in calls[-4:]))
    assert len(orders) == 24
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.7, 1.3),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        drawn = torch.cat([strengths for own_name, strengths in calls if own_name == name])
        assert len(drawn) == 1500 and drawn.min() >= low and drawn.max() <= high
        assert drawn.min() < low + 0.01 and drawn.max() > high - 0.01
        assert drawn.std() == pytest.approx((high - low) / 12**0.5, rel=0.06)


def test_no_strength_changes_nothing():
    assert torch.equal(photometric.color_jitter(crops(), 0.0, 0.0, 0.0, 0.0), crops())


def test_normalization_is_torchvisions():
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.3, 0.1)
    torch.testing.assert_close(photometric.normalize(crops(), mean, std), F.normalize(crops(), mean, std))
