# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Which library multiplies float32 matrices on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .machine import processor_family, processor_name


ZEN_5 = 26  # the family of AMD's first processors that compute 512 bits at once
MAX_RELATIVE_ERROR = 2e-6  # of a float32 product; one of bfloat16 has 2e-3
PROBES = ((64, 256, 256), (512, 384, 384), (2048, 96, 384))  # rows, inner and columns of what layers multiply


def use_fast_float32_matmul() -> bool:
    """Lets oneDNN multiply float32 matrices on this CPU where it is faster than MKL and as exact.

    MKL, which torch takes by default, has no use for AVX-512 on processors that are not Intel's; oneDNN has. That
    counts where 512 bits are computed at once, on AMD's from Zen 5 on: on Zen 4, which takes two turns for them, a
    step of pretraining took 7 % longer by oneDNN. Torch has one switch for it,
    `set_float32_matmul_precision("medium")`, and that allows bfloat16 too. Where a CPU has matrix units (AMX) oneDNN
    would take it, so some products are tried, and the default stays where they are not float32's.

    The choice depends on the processor and on no clock, so that a resumed run makes it again. A precision that was
    set before is kept. It is for processes that compute on a CPU: on a GPU the same switch allows TensorFloat-32.

    Returns:
        Whether oneDNN multiplies now.
    """
    if torch.get_float32_matmul_precision() != "highest" or not _mkl_is_slow():
        return False
    torch.set_float32_matmul_precision("medium")
    if _relative_error() <= MAX_RELATIVE_ERROR:
        return True
    torch.set_float32_matmul_precision("highest")
    return False


@contextmanager
def fast_float32_matmul() -> Iterator[None]:
    """`use_fast_float32_matmul` in this context alone."""
    before = torch.get_float32_matmul_precision()
    use_fast_float32_matmul()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _mkl_is_slow() -> bool:
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return has_both and has_avx512 and "AMD" in processor_name() and (processor_family() or 0) >= ZEN_5


def _relative_error() -> float:
    """The largest of products of normal numbers, against float64."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for rows, inner, cols in PROBES:
        left, right = (torch.randn(size, generator=generator) for size in ((rows, inner), (cols, inner)))
        exact = left.double() @ right.double().T
        errors.append((torch.nn.functional.linear(left, right) - exact).norm() / exact.norm())
    return max(errors).item()
