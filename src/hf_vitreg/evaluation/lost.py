# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""One object an image without supervision: LOST on patch features, and DINO's attention as its baseline.

LOST (Siméoni et al., 2021, "Localizing Objects with Self-Supervised Transformers and no Labels", section 3) takes the
patch that is similar to the fewest others as its seed, adds what is similar to the seed, and boxes the connected part
of it around the seed. With a bias on the gram matrix and normalized features it is what "Vision Transformers Need
Registers" (Darcet et al., 2024, section 3.3) evaluates.

Boxes are those of the published code on the same features, with two differences. Equal degrees are taken in the order
of the patches; there the order depends on the sort. And a seed that is not similar to itself, as with a bias below
minus its squared norm, gets the box of its own patch; there it is an error.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional


ROWS_AT_ONCE = 112  # rows of a gram matrix that are computed together
CACHED_SIMILARITIES = 2**18  # float32 numbers that a core keeps close: 1 MB
SIMILARITIES_ON_GPU = 2**26
# neighbours above, below, left and right; none in another image
_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)

ImageSizes = tuple[int, int] | Sequence[tuple[int, int]] | torch.Tensor


class LostBoxes(NamedTuple):
    """What LOST finds in a batch of images.

    Attributes:
        boxes: `(batch_size, 4)` pixels on the CPU: left, top, and right and bottom that are not part of it.
        seeds: `(batch_size,)`, index of the seed among the patches, row by row.
        masks: `(batch_size, rows, cols)`, the patches of the object.
        seed_in_background: `(batch_size,)`, whether the seed was not similar to itself, and its patch is the box.
    """

    boxes: torch.Tensor
    seeds: torch.Tensor
    masks: torch.Tensor
    seed_in_background: torch.Tensor


def lost_boxes(
    features: torch.Tensor,
    rows: int,
    cols: int,
    patch_size: int,
    image_sizes: ImageSizes | None = None,
    *,
    k_patches: int = 100,
    normalize: bool = False,
    bias: float = 0.0,
) -> LostBoxes:
    """The object of each image, by LOST.

    Args:
        features: `(batch_size, rows * cols, hidden_size)`, patches without the tokens before them.
        rows, cols: The patch grid.
        patch_size: Pixels of the side of a patch.
        image_sizes: Height and width that boxes are cut to, of all images or of each: images are padded to whole
            patches. By default those of the grid.
        k_patches: How many patches with the lowest degrees may join the seed.
        normalize: Compare directions only.
        bias: Added to every similarity.

    Returns:
        Boxes, seeds and masks.

    Raises:
        ValueError: where shapes do not fit, there is no patch, or features are NaN or infinite.
    """
    return lost_sweep(
        features, rows, cols, patch_size, image_sizes, k_patches=k_patches, normalize=normalize, biases=[bias]
    )[0]


@torch.no_grad()
def lost_sweep(
    features: torch.Tensor,
    rows: int,
    cols: int,
    patch_size: int,
    image_sizes: ImageSizes | None = None,
    *,
    k_patches: int = 100,
    normalize: bool = False,
    biases: Sequence[float],
) -> list[LostBoxes]:
    """`lost_boxes` for each bias; the gram matrix, which is nearly all of the work, is computed once for all."""
    _require_features(features, rows, cols, k_patches)
    parts = []
    for images in features.split(_images_at_once(features)):
        images = (images if images.dtype == torch.float64 else images.float()).contiguous()
        images = functional.normalize(images, dim=-1) if normalize else images
        degrees = _degrees(images, biases)
        parts.append([_expand(images, each, bias, k_patches) for each, bias in zip(degrees, biases)])
    joined = ([torch.cat(pieces) for pieces in zip(*part)] for part in zip(*parts))
    return [_box(seeds.cpu(), similar.cpu(), rows, cols, patch_size, image_sizes) for seeds, similar in joined]


def _require_features(features: torch.Tensor, rows: int, cols: int, k_patches: int) -> None:
    if features.ndim != 3 or features.shape[1] != rows * cols or not features.numel():
        raise ValueError(
            f"features must have shape (batch_size, {rows} x {cols} = {rows * cols}, hidden_size) and not be empty, "
            f"got {tuple(features.shape)}. Leave out the tokens before the patches."
        )
    if k_patches < 1:
        raise ValueError(f"k_patches must be 1 or more, got {k_patches}.")


def _images_at_once(features: torch.Tensor) -> int:
    """So many that a block of their gram matrices stays in the cache: from memory, counting takes as long again."""
    numbers = CACHED_SIMILARITIES * torch.get_num_threads() if features.device.type == "cpu" else SIMILARITIES_ON_GPU
    return max(1, numbers // (min(ROWS_AT_ONCE, features.shape[1]) * features.shape[1]))


def _degrees(features: torch.Tensor, biases: Sequence[float]) -> torch.Tensor:
    """How many other patches each is similar to: `(batch_size, patches, D) -> (biases, batch_size, patches)`.

    The gram matrix is symmetric. What is below its diagonal is not computed but counted by columns, block by block.
    """
    batch_size, num_patches, _ = features.shape
    degrees = features.new_zeros(len(biases), batch_size, num_patches)
    similarities = features.new_empty(batch_size * min(ROWS_AT_ONCE, num_patches) * num_patches)
    counted = torch.empty_like(similarities)
    for start in range(0, num_patches, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, num_patches)
        shape = (batch_size, stop - start, num_patches - start)
        size = shape[0] * shape[1] * shape[2]
        block, positive = similarities[:size].view(shape), counted[:size].view(shape)
        torch.bmm(features[:, start:stop], features[:, start:].mT, out=block)
        block.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        for degree, bias in zip(degrees, biases):
            torch.gt(block, -bias, out=positive)
            degree[:, start:stop] += positive.sum(dim=2)
            degree[:, stop:] += positive[:, :, stop - start :].sum(dim=1)
    return degrees


def _expand(
    features: torch.Tensor, degrees: torch.Tensor, bias: float, k_patches: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds `(batch_size,)`, and which patches are similar to them and theirs, `(batch_size, patches)`.

    The sum of the gram matrix's rows is the similarity to the sum of the patches.
    """
    potential = degrees.argsort(dim=1, stable=True)[:, :k_patches]
    first_patches = torch.arange(0, features.shape[0] * features.shape[1], features.shape[1], device=features.device)
    rows = (potential + first_patches[:, None]).flatten()
    candidates = features.flatten(0, 1).index_select(0, rows).unflatten(0, potential.shape)
    joins = torch.bmm(candidates, candidates[:, :1].mT).mT + bias > 0
    joins = joins.to(features.dtype)
    similarity = torch.bmm(features, torch.bmm(joins, candidates).mT).squeeze(2) + bias * joins.sum(dim=2)
    if not similarity.isfinite().all():
        raise ValueError(
            "Features are NaN or infinite, and so are their similarities. Compute them in float32 or bfloat16: tokens "
            "overflow float16 easily."
        )
    return potential[:, 0], similarity > 0


def _box(
    seeds: torch.Tensor, similar: torch.Tensor, rows: int, cols: int, patch_size: int, image_sizes: ImageSizes | None
) -> LostBoxes:
    images = torch.arange(len(seeds))
    in_background = ~similar[images, seeds]
    similar[in_background] = False  # what is around such a seed is not part of it
    similar[images, seeds] = True
    components, _ = ndimage.label(similar.view(-1, rows, cols).numpy(), _IN_PLANE)
    at_seed = torch.from_numpy(components).flatten(1)[images, seeds]
    masks = torch.from_numpy(components) == at_seed[:, None, None]
    return LostBoxes(_cut(_bounds(masks) * patch_size, image_sizes), seeds, masks, in_background)


def _bounds(masks: torch.Tensor) -> torch.Tensor:
    """Left, top, right and bottom of masks that are not empty, in patches: `(batch_size, 4)`."""
    sides = []
    for used in (masks.any(dim=1), masks.any(dim=2)):
        used = used.to(torch.uint8)  # argmax takes the first of equals
        sides.append((used.argmax(dim=1), used.shape[1] - used.flip(1).argmax(dim=1)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], dim=1).float()


def _cut(boxes: torch.Tensor, image_sizes: ImageSizes | None) -> torch.Tensor:
    """Boxes of padded images that end where the images do."""
    if image_sizes is not None:
        sizes = torch.as_tensor(image_sizes).cpu().expand(len(boxes), 2)
        boxes[:, 2:] = torch.minimum(boxes[:, 2:], sizes.flip(1).to(boxes))
    return boxes


# The baseline


def attention_boxes(
    attention: torch.Tensor,
    rows: int,
    cols: int,
    patch_size: int,
    image_sizes: ImageSizes | None = None,
    *,
    kept_mass: float = 0.6,
) -> torch.Tensor:
    """The object of each image by the attention of CLS, the baseline that LOST is compared with ("DINO-seg").

    The strongest patches that hold `kept_mass` of the attention are kept, and their largest connected part is boxed.
    As the published code does, the part that ends a scan by rows is never taken, and where there is no other, or none
    at all, the box is that of everything else; its numbers are to be compared with.

    Args:
        attention: `(batch_size, rows * cols)`, of CLS to the patches in one head; it need not sum to 1.
        rows, cols: The patch grid.
        patch_size: Pixels of the side of a patch.
        image_sizes: Height and width that boxes are cut to, of all images or of each; by default, and in the
            published code, those of the grid.
        kept_mass: Share of the attention that is kept.

    Returns:
        `(batch_size, 4)` pixels on the CPU: left, top, and right and bottom that are not part of it.

    Raises:
        ValueError: where shapes do not fit, attention is NaN, or `kept_mass` is no share.
    """
    if attention.ndim != 2 or attention.shape[1] != rows * cols:
        raise ValueError(
            f"attention must have shape (batch_size, {rows} x {cols} = {rows * cols}), got {tuple(attention.shape)}."
        )
    if not 0 < kept_mass <= 1:
        raise ValueError(f"kept_mass must be above 0 and at most 1, got {kept_mass}.")
    if not attention.isfinite().all():
        raise ValueError("attention is NaN or infinite.")
    kept = _strongest(attention.float().cpu(), kept_mass).view(-1, rows, cols).numpy()
    masks = torch.from_numpy(np.stack([_largest_part(each) for each in kept]))
    return _cut(_bounds(masks) * patch_size, image_sizes)


def _strongest(attention: torch.Tensor, kept_mass: float) -> torch.Tensor:
    values, order = attention.sort(dim=1, stable=True)
    values = values / values.sum(dim=1, keepdim=True)
    kept = values.cumsum(dim=1) > 1 - kept_mass
    return torch.zeros_like(kept).scatter_(1, order, kept)


def _largest_part(kept: np.ndarray) -> np.ndarray:
    parts, num_parts = ndimage.label(kept)
    sizes = np.bincount(parts.ravel(), minlength=num_parts + 1)
    # without the last part, see attention_boxes
    largest = int(sizes[1:num_parts].argmax()) + 1 if num_parts > 1 else 0
    mask = parts == largest
    return mask if mask.any() else kept
