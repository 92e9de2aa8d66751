# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""How fast several candidates compute the same, beside one of them and beside the limit of the machine."""

import math
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from .matmul_limit import Product, fastest_product
from .timing import alternate, ratio


# a product takes a turn of about this, which a short disturbance does not double
PRODUCT_SECONDS = 0.05
COLUMNS = ("ms", "images/s", "times faster", "GFLOP/s", "of the limit")


class Candidate(NamedTuple):
    """What is timed: a call of `run`, which multiplies matrices of `dtype`."""

    run: Callable[[], object]
    dtype: torch.dtype


class Speed(NamedTuple):
    """How fast a candidate is.

    Attributes:
        median_ms: Of a call, in milliseconds.
        images_per_second: At that time.
        times_faster: Than the baseline: the median of the ratios within rounds.
        times_faster_quartiles: Of these ratios.
        gflops: 1e9 operations a second, at the median time.
        fraction_of_limit: Of the rate that matrix products of its dtype reached in the same round, the median.
    """

    median_ms: float
    images_per_second: float
    times_faster: float
    times_faster_quartiles: tuple[float, float]
    gflops: float
    fraction_of_limit: float

    def cells(self) -> tuple[str, ...]:
        """Of a row of a table with the columns `COLUMNS`."""
        return (
            f"{self.median_ms:.1f}",
            f"{self.images_per_second:.1f}",
            f"{self.times_faster:.2f}x",
            f"{self.gflops:.0f}",
            f"{self.fraction_of_limit:.2f}",
        )


class Limit(NamedTuple):
    """What the machine reached between the candidates: 1e9 operations a second, the median, and by which product."""

    gflops: float
    product: str

    def __str__(self) -> str:
        return f"{self.gflops:.0f} GFLOP/s by {self.product}"


def measure_speed(
    candidates: Mapping[str, Candidate],
    baseline: str,
    flops: float,
    num_images: int,
    rounds: int,
    device: torch.device,
    progress: bool = True,
) -> tuple[dict[str, Speed], dict[str, Limit]]:
    """Times candidates in turns, and between them the fastest matrix product of each dtype that they compute in.

    A machine that others use too is fast in one minute and slow in the next. Products that take turns with the
    candidates make it known how much of what was possible then a candidate reached.

    Args:
        candidates: By name. They compute the same.
        baseline: Which of them the others are compared with.
        flops: Operations of a call of any of them, in matrix products and convolutions.
        num_images: Of a call.
        rounds: Of all, 2 or more.
        device: Where they compute.
        progress: Show a bar on stderr.

    Returns:
        The speed of every candidate, and the limit by the name of the dtype, as `bfloat16`.

    Raises:
        ValueError: for too few rounds, or a dtype that has no limit.
    """
    dtypes = dict.fromkeys(candidate.dtype for candidate in candidates.values())
    products = {dtype: fastest_product(device, dtype) for dtype in dtypes}
    repeats = {dtype: math.ceil(PRODUCT_SECONDS / product.seconds) for dtype, product in products.items()}
    turns = {name: candidate.run for name, candidate in candidates.items()}
    turns |= {_turn(dtype): _repeated(product, repeats[dtype]) for dtype, product in products.items()}
    seconds = alternate(turns, rounds, device, progress)
    rates = {
        dtype: [repeats[dtype] * product.flops / each for each in seconds[_turn(dtype)]]
        for dtype, product in products.items()
    }
    speeds = {}
    for name, candidate in candidates.items():
        median = statistics.median(seconds[name])
        faster, quartiles = ratio(seconds[baseline], seconds[name])
        fraction, _ = ratio([flops / each for each in seconds[name]], rates[candidate.dtype])
        speeds[name] = Speed(
            median_ms=median * 1e3,
            images_per_second=num_images / median,
            times_faster=faster,
            times_faster_quartiles=quartiles,
            gflops=flops / median / 1e9,
            fraction_of_limit=fraction,
        )
    limits = {
        dtype_name(dtype): Limit(statistics.median(rates[dtype]) / 1e9, str(product))
        for dtype, product in products.items()
    }
    return speeds, limits


def _turn(dtype: torch.dtype) -> str:
    return f"products of {dtype_name(dtype)}"


def _repeated(product: Product, repeats: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(repeats):
            product.multiply()

    return run


def dtype_name(dtype: torch.dtype) -> str:
    """As `bfloat16`."""
    return str(dtype).removeprefix("torch.")
