# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Features without artifacts of a model that has them: the mean over views that are shifted, flipped and mapped back.

Registers are then distilled from it ("Vision Transformers with Self-Distilled Registers", Chen et al., 2025, PH-Reg).
What is at fault with an artifact is where it is: it does not follow the image when the image moves, and the mean over
views that moved is nearly free of it. An artifact that follows the image stays.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


# candidates that the shifts of an image are chosen among, for each view
CANDIDATES_PER_VIEW = 10


class Views(NamedTuple):
    """How views are made of their images: the content moves, then what is there is mirrored left to right.

    Attributes:
        shifts: Patches that the content moves down and to the right, integers `(batch, num_views, 2)`.
        flips: Whether the view is mirrored, booleans `(batch, num_views)`.
    """

    shifts: torch.Tensor
    flips: torch.Tensor


def draw_views(
    num_images: int,
    num_views: int,
    grid_size: tuple[int, int],
    max_shift: float,
    flip_probability: float,
    generator: torch.Generator,
) -> Views:
    """Views of each image, of which the first is the image itself.

    The shifts of an image are far from each other: of ten times as many as there are views, drawn evenly, each in turn
    is the one that is farthest from all before it. The search starts at the image itself; the published code starts
    at any of them and then puts the image in its place.

    Args:
        num_images: Images of the batch; each gets views of its own.
        num_views: Of an image, itself included.
        grid_size: Rows and columns of patches.
        max_shift: Largest shift as a share of the rows and of the columns, rounded to patches.
        flip_probability: Of each view but the first.
        generator: On the CPU.

    Raises:
        ValueError: without a view.
    """
    if num_views < 1:
        raise ValueError(f"num_views must be at least 1, the image itself, got {num_views}.")
    largest = torch.tensor([round(max_shift * side) for side in grid_size])
    shape = num_images, CANDIDATES_PER_VIEW * num_views, 2
    draws = torch.rand(shape, dtype=torch.float64, generator=generator)
    candidates = (draws * (2 * largest + 1)).long() - largest
    flips = torch.rand(num_images, num_views, generator=generator) < flip_probability
    flips[:, 0] = False
    return Views(_farthest_points(candidates, num_views), flips)


def _farthest_points(candidates: torch.Tensor, num_points: int) -> torch.Tensor:
    """The origin and then always the candidate, `(batch, num_candidates, 2)`, that is farthest from all before."""
    images = torch.arange(len(candidates))
    points = candidates.new_zeros(len(candidates), num_points, 2)
    distances = candidates.square().sum(dim=-1)
    for index in range(1, num_points):
        points[:, index] = candidates[images, distances.argmax(dim=1)]
        to_point = (candidates - points[:, index, None]).square().sum(dim=-1)
        distances = torch.minimum(distances, to_point)
    return points


def make_view(
    pixel_values: torch.Tensor, shifts: torch.Tensor, flips: torch.Tensor, patch_size: int, fill: torch.Tensor
) -> torch.Tensor:
    """One view of each image.

    Args:
        pixel_values: `(batch, num_channels, height, width)`, whole patches.
        shifts: Patches that the content moves down and to the right, integers `(batch, 2)`.
        flips: Whether the view is then mirrored, booleans `(batch,)`.
        patch_size: In pixels.
        fill: What is seen where a shifted image ends, a value for each channel `(num_channels,)`.

    Returns:
        As `pixel_values`.
    """
    height, width = pixel_values.shape[-2:]
    # of each place in the view that in the image
    rows = torch.arange(height, device=pixel_values.device) - patch_size * shifts[:, :1]
    cols = _mirrored(torch.arange(width, device=pixel_values.device), flips, width) - patch_size * shifts[:, 1:]
    found, is_inside = _looked_up(pixel_values.permute(0, 2, 3, 1), rows, cols)
    return torch.where(is_inside[..., None], found, fill.to(found)).permute(0, 3, 1, 2)


def map_back(features: torch.Tensor, shifts: torch.Tensor, flips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of a view where their patches are in the image.

    Args:
        features: `(batch, rows, cols, hidden_size)`.
        shifts, flips: That made the view, as for `make_view`.

    Returns:
        As `features`, with 0 for the patches that the view does not show; and which it shows, `(batch, rows, cols)`.
    """
    num_rows, num_cols = features.shape[1:3]
    # of each place in the image that in the view
    rows = torch.arange(num_rows, device=features.device) + shifts[:, :1]
    cols = _mirrored(torch.arange(num_cols, device=features.device) + shifts[:, 1:], flips, num_cols)
    found, is_inside = _looked_up(features, rows, cols)
    return torch.where(is_inside[..., None], found, 0), is_inside


def _mirrored(places: torch.Tensor, flips: torch.Tensor, length: int) -> torch.Tensor:
    """Places in a row, those opposite where it is mirrored: `(batch, length)`. What is beyond an end stays beyond."""
    return torch.where(flips[:, None], length - 1 - places, places)


def _looked_up(maps: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What maps `(batch, height, width, channels)` have at rows and columns, `(batch, rows)` and `(batch, cols)`.

    Beyond the map it is what its border has; the second tensor, booleans `(batch, rows, cols)`, says where.
    """
    height, width = maps.shape[1:3]
    is_inside = ((rows >= 0) & (rows < height))[:, :, None] & ((cols >= 0) & (cols < width))[:, None, :]
    images = torch.arange(len(maps), device=maps.device)[:, None, None]
    rows, cols = rows.clamp(0, height - 1)[:, :, None], cols.clamp(0, width - 1)[:, None, :]
    return maps[images, rows, cols], is_inside


def denoised_features(
    model: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    views: Views,
    patch_size: int,
    fill: torch.Tensor,
) -> torch.Tensor:
    """What a model makes of the patches of images, averaged over views: what registers are distilled from.

    ```
    mean(map_back(model(view)) for all views of the image that show the patch)
    ```

    One view of all images is computed at a time, so that there is room where there is for the images themselves.

    Args:
        model: From pixel values to patches after the final norm, `(batch, rows * cols, hidden_size)`, row by row.
        pixel_values: `(batch, num_channels, height, width)`, whole patches.
        views: Of these images, on their device; the first shows all of the image, as `draw_views` has it.
        patch_size: In pixels.
        fill: As for `make_view`.

    Returns:
        `(batch, rows * cols, hidden_size)`, in float32 or above.
    """
    grid_size = tuple(pixels // patch_size for pixels in pixel_values.shape[-2:])
    total = counts = 0
    for shifts, flips in zip(views.shifts.unbind(1), views.flips.unbind(1)):
        patches = model(make_view(pixel_values, shifts, flips, patch_size, fill))
        # a sum of many in half precision loses what they differ in
        patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
        mapped, is_shown = map_back(patches.unflatten(1, grid_size), shifts, flips)
        total, counts = total + mapped, counts + is_shown.long()
    return (total / counts[..., None]).flatten(1, 2)
