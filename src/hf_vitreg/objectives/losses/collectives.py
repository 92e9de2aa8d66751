# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Collectives that are the identity on one process, without a gradient but for `gather_with_gradient`."""

import torch
import torch.distributed as dist


def num_processes() -> int:
    """Processes of the run; 1 where torch.distributed is not initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Rank of this process; 0 where torch.distributed is not initialized."""
    return dist.get_rank() if num_processes() > 1 else 0


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of tensors of one shape."""
    return _reduce(values, "SUM")


def logsumexp_over_processes(values: torch.Tensor) -> torch.Tensor:
    """log(sum of exp(values) over all processes), elementwise; a process that has nothing to add gives -inf."""
    if num_processes() == 1:
        return values
    # the largest as a number even where nobody has anything, since inf - inf is none
    largest = _reduce(values, "MAX").clamp(min=torch.finfo(values.dtype).min)
    return largest + _reduce((values - largest).exp(), "SUM").log()


def gather_with_gradient(values: torch.Tensor) -> torch.Tensor:
    """Concatenates the rows of all processes in the order of their ranks; every process must give as many.

    The gradient of a row is the sum of what all processes' losses make of it. With each loss a mean over the own rows,
    and gradients averaged over processes as DDP does, that is the gradient of one process with the global batch.

    Args:
        values: `(batch, ...)`.

    Returns:
        `(num_processes * batch, ...)`.
    """
    return values if num_processes() == 1 else _Gather.apply(values)


def _reduce(values: torch.Tensor, operation: str) -> torch.Tensor:
    values = values.detach().clone()
    if num_processes() > 1:
        dist.all_reduce(values, getattr(dist.ReduceOp, operation))
    return values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        ctx.num_rows = len(values)
        gathered = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(num_processes())]
        dist.all_gather(gathered, values.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        # every backend has all_reduce; only NCCL has the reduce_scatter that would send less
        return sum_over_processes(gradient.contiguous()).split(ctx.num_rows)[process_index()]
