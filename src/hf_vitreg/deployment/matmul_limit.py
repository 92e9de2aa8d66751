# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a machine reaches at best when it multiplies matrices, which bounds a transformer's speed."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional


# Rows, inner size and columns: cubes and projections, and the MLP of a ViT-S on 8 images and of a ViT-L on 64. What
# is best differs by machine: small matrices stay in caches, large ones keep all units busy.
CPU_SHAPES = ((2088, 384, 1536), (1536, 1536, 1536), (4096, 1024, 1024))
GPU_SHAPES = ((8192, 8192, 8192), (16704, 1024, 4096), (16704, 4096, 1024))
REPEATS = 3


@dataclass(frozen=True, eq=False)
class Product:
    """A product of two matrices, by one library.

    Attributes:
        library: Which.
        shape: Rows, inner size and columns.
        dtype: Of what is multiplied.
        multiply: Does it once.
        seconds: What that takes, the median.
    """

    library: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    multiply: Callable[[], torch.Tensor]
    seconds: float

    @property
    def flops(self) -> int:
        """Operations, a multiplication and its addition as two, of integers too."""
        rows, inner, cols = self.shape
        return 2 * rows * inner * cols

    def __str__(self) -> str:
        return f"{self.library}, {'x'.join(map(str, self.shape))}"


def matmul_limit(device: torch.device, dtype: torch.dtype) -> float:
    """The highest rate at which this machine multiplies matrices: of all libraries that torch reaches, and of sizes
    as transformers have them, the best. About a second on a CPU.

    Args:
        device: That multiplies.
        dtype: Of the matrices: `torch.int8`, summed in int32, or floating point.

    Returns:
        Floating point operations a second, of integers operations a second; a multiplication and its addition are two.

    Raises:
        ValueError: where the dtype is of another kind.
    """
    fastest = fastest_product(device, dtype)
    return fastest.flops / fastest.seconds


@torch.no_grad()
def fastest_product(device: torch.device, dtype: torch.dtype) -> Product:
    """The product that reaches `matmul_limit`, to be timed beside what it is the limit of. Raises as that."""
    shapes = GPU_SHAPES if device.type == "cuda" else CPU_SHAPES
    products = (
        Product(library, shape, dtype, multiply, _median_seconds(multiply, device))
        for shape in shapes
        for library, multiply in _libraries(device, dtype, shape)
    )
    return max(products, key=lambda product: product.flops / product.seconds)


def _libraries(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Those that multiply by a matrix of weights `(columns, inner)`, and how."""
    rows, inner, cols = shape
    if dtype == torch.int8:
        left, right = (torch.randint(-127, 128, (size, inner), dtype=dtype, device=device) for size in (rows, cols))
        yield "torch._int_mm", lambda: torch._int_mm(left, right.T)
        return
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be torch.int8 or floating point, as torch.bfloat16, got {dtype}.")
    left, right = (torch.randn(size, inner, device=device).to(dtype) for size in (rows, cols))
    yield "torch's default", lambda: functional.linear(left, right)
    if device.type == "cpu" and _onednn_packs(dtype):
        # The faster one of oneDNN's ways, and always of this dtype: by `set_float32_matmul_precision("medium")` it
        # may take bfloat16.
        packed = torch.ops.mkldnn._reorder_linear_weight(right, rows)
        yield "oneDNN, packed", lambda: torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")


def _onednn_packs(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _median_seconds(multiply: Callable[[], torch.Tensor], device: torch.device) -> float:
    seconds = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        multiply()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
