# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What several processes need, and one does not notice; and randomness that a restarted process finds again."""

import contextlib
import hashlib
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedType
from torch.distributed.tensor import DTensor


def derived_seed(*keys: int) -> int:
    """A seed for this combination of seed, epoch, step, rank or image, independent of those of all others."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits


@contextlib.contextmanager
def forked_rng(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator for a block, and puts it back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def num_cores() -> int:
    """Cores that this process may use; all there are where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores() -> None:
    """Gives each process on this machine its share of the cores. `accelerate launch` leaves it one on a CPU."""
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(torch.get_num_threads(), num_cores() // num_local_processes))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All values of a tensor that may be sharded. Collective where it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds the whole model."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def require_sharding_as_asked(accelerator: Accelerator) -> None:
    """Raises `ValueError` where FSDP was asked for and Accelerate fell back to plain replication, as on CPUs."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not is_sharded(accelerator):
        raise ValueError(
            f"FSDP was asked for, but Accelerate runs {accelerator.distributed_type.value} on "
            f"{accelerator.device.type}. Launch without FSDP, or on several GPUs."
        )
