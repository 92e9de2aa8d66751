# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Attention on a CPU by a kernel of our own, which a C++ compiler builds for the processor it runs on.

The kernel of torch's `scaled_dot_product_attention` leaves its small products to MKL, and bfloat16 ones that no matrix
unit (AMX) takes too. `cpu_attention.cpp` multiplies them itself.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import shutil
import subprocess
from pathlib import Path

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..atomic import atomic_file
from ..machine import processor_features, processor_name


logger = logging.getLogger(__name__)

NAME = "vitreg_cpu"  # of the attention implementation
SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
COMPILE_SECONDS = 120  # after which a compiler is given up


class _Heads(ctypes.Structure):
    """Where a tensor `(batch_size, num_heads, tokens, head_dim)` is, and its strides but the last, which is 1."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("token", ctypes.c_int64),
    )


def compiler() -> str | None:
    """The C++ compiler that builds kernels: the one that `CXX` names, or the first that is found."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)


def cache_folder() -> Path:
    """Where built kernels are: `hf_vitreg` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_vitreg"


@functools.cache
def load_kernel() -> ctypes.CDLL | None:
    """The kernel, built if it was not before; `None`, and a warning that says why, where it cannot be.

    It is built once for a source, a compiler and a processor, in about two seconds.
    """
    if compiler() is None:
        logger.warning("There is no C++ compiler: attention stays torch's. Install g++ or name another in CXX.")
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler())))
    except subprocess.CalledProcessError as error:
        logger.warning("%s cannot build the attention kernel, attention stays torch's:\n%s", compiler(), error.stderr)
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("The attention kernel cannot be built or loaded, attention stays torch's: %s", error)
        return None
    for kernel in (library.attention_float32, library.attention_bfloat16):
        kernel.argtypes = (ctypes.POINTER(_Heads), *[ctypes.c_int64] * 4, ctypes.c_float, ctypes.c_int64)
        kernel.restype = None
    return library


def _built(compiler: str) -> Path:
    """The library's file, which is named after all that it depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_SECONDS).stdout
    parts = [SOURCE.read_bytes(), version, *map(str.encode, (*FLAGS, processor_name(), *processor_features()))]
    library = cache_folder() / f"attention_{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if not library.exists():
        with atomic_file(library) as partial:
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(partial)]
            subprocess.run(command, capture_output=True, check=True, timeout=COMPILE_SECONDS, text=True)
    return library


# Any layout will do. Otherwise torch.compile keeps that of three parts of one tensor, each in memory as large as all.
@torch.library.custom_op("hf_vitreg::cpu_attention", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def cpu_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """`softmax(query key^T * scale) value` of float32 or bfloat16 on a CPU, without gradients.

    Args:
        query: `(batch_size, num_heads, tokens, head_dim)`, as the others are, of any strides.
        scale: Usually `head_dim ** -0.5`.

    Returns:
        `(batch_size, tokens, num_heads, head_dim)`, contiguous.
    """
    batch_size, num_heads, tokens, head_dim = query.shape
    output = query.new_empty(batch_size, tokens, num_heads, head_dim)
    # kept until the kernel is done
    tensors = [each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value)]
    heads = [_Heads(each.data_ptr(), *each.stride()[:3]) for each in (*tensors, output.transpose(1, 2))]
    library = load_kernel()
    kernel = library.attention_float32 if query.dtype == torch.float32 else library.attention_bfloat16
    scale *= math.log2(math.e)  # the kernel computes powers of two
    kernel((_Heads * 4)(*heads), batch_size, num_heads, tokens, head_dim, scale, torch.get_num_threads())
    return output


@cpu_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    batch_size, num_heads, tokens, head_dim = query.shape
    return query.new_empty(batch_size, tokens, num_heads, head_dim)


def _attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """In the signature of transformers' attention interface. ViTReg has no mask, and inference no dropout."""
    return cpu_attention(query, key, value, scaling), None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attention_forward)
