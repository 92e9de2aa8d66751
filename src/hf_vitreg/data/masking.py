# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Which patches the student does not see: masks made of blocks, as DINOv2 draws them (BEiT, Bao et al., 2022)."""

import dataclasses
import math
import random
from collections.abc import Sequence

import numpy as np
import torch

from ..distributed import derived_seed


# attempts at a block before an image has to do with those it has
MAX_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class BlockMasks:
    """Masks of the crops of a batch.

    Attributes:
        masks: True where a patch is masked, `(num_crops, rows * cols)`, row by row: the model's `bool_masked_pos`.
        indices: Positions of the masked patches in the flattened `masks`, `(num_masked,)`.
        weights: For each of them 1 / number of masked patches of its crop, `(num_masked,)`.
    """

    masks: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor


def batch_masks(
    seed: int,
    num_crops: int,
    rows: int,
    cols: int,
    mask_probability: float = 0.5,
    min_ratio: float = 0.1,
    max_ratio: float = 0.5,
    wanted: Sequence[int] | None = None,
) -> BlockMasks:
    """Masks for a batch, or for some crops of it, a pure function of its arguments.

    Of all crops `mask_probability` are masked, the i-th of them by a share of its patches drawn from the i-th of as
    many equal intervals between the two ratios, so that every batch has masks of all sizes; then crops are shuffled.
    A crop may get fewer masked patches than drawn, since blocks that do not fit are given up.

    Args:
        seed: Of this batch, such as `derived_seed(seed, step, process)`: a resumed run finds the same masks again.
        num_crops: Global crops of the batch.
        rows: Rows of the patch grid.
        cols: Its columns.
        mask_probability: Share of the crops that are masked.
        min_ratio: Smallest share of a masked crop's patches.
        max_ratio: Largest share, and the largest block.
        wanted: Crops of the batch whose masks to draw, such as those of one process. Default: all.

    Raises:
        ValueError: for shares outside of 0 to 1, or a minimum above the maximum.
    """
    if not (0 <= mask_probability <= 1 and 0 <= min_ratio <= max_ratio <= 1):
        raise ValueError(
            "mask_probability, min_ratio and max_ratio must lie between 0 and 1, and the ratios in this order, got "
            f"{mask_probability}, {min_ratio} and {max_ratio}."
        )
    num_patches, num_masked_crops = rows * cols, int(num_crops * mask_probability)
    edges = np.linspace(min_ratio, max_ratio, num_masked_crops + 1)
    intervals = list(range(num_crops))
    random.Random(derived_seed(seed, num_crops)).shuffle(intervals)
    drawn = []
    for interval in intervals if wanted is None else [intervals[crop] for crop in wanted]:
        # a generator for each mask, so that nobody has to draw those of others
        generator, num_masked = random.Random(derived_seed(seed, interval)), 0
        if interval < num_masked_crops:
            num_masked = int(num_patches * generator.uniform(edges[interval], edges[interval + 1]))
        drawn.append(block_mask(generator, rows, cols, num_masked, max_block=int(max_ratio * num_patches)))
    return describe(torch.from_numpy(np.stack(drawn)).flatten(1))


def block_mask(
    generator: random.Random,
    rows: int,
    cols: int,
    num_masked: int,
    max_block: int,
    min_block: int = 4,
    min_aspect: float = 0.3,
) -> np.ndarray:
    """A mask of rectangles, `(rows, cols)`, with `num_masked` patches at the most and fewer where blocks do not fit.

    Args:
        generator: Where to draw from.
        rows: Rows of the patch grid.
        cols: Its columns.
        num_masked: Patches to mask.
        max_block: Largest area of a block, in patches.
        min_block: Smallest area.
        min_aspect: Smallest ratio of height and width, whose inverse is the largest.
    """
    mask = np.zeros((rows, cols), dtype=bool)
    while (missing := num_masked - mask.sum()) > 0:
        if not _add_block(mask, generator, min_block, min(missing, max_block), min_aspect):
            break
    return mask


def _add_block(mask: np.ndarray, generator: random.Random, min_block: int, max_block: int, min_aspect: float) -> bool:
    """Masks a block that adds one patch or more and `max_block` at the most; False where no attempt found one."""
    rows, cols = mask.shape
    for _ in range(MAX_ATTEMPTS):
        area = generator.uniform(min_block, max_block)
        aspect = math.exp(generator.uniform(math.log(min_aspect), -math.log(min_aspect)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= cols:
            continue
        top, left = generator.randint(0, rows - height), generator.randint(0, cols - width)
        block = mask[top : top + height, left : left + width]
        if 0 < block.size - block.sum() <= max_block:
            block[:] = True
            return True
    return False


def describe(masks: torch.Tensor) -> BlockMasks:
    """Indices and weights of the masked patches of `(num_crops, num_patches)`."""
    weights = 1 / masks.sum(dim=1, keepdim=True).clamp(min=1)
    return BlockMasks(masks, masks.flatten().nonzero().flatten(), weights.expand_as(masks)[masks])
