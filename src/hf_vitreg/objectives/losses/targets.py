# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What keeps the teacher's targets from collapsing: a running center, or balance by Sinkhorn-Knopp.

Both are a vector over prototypes that is taken from the logits before the softmax, so that targets need not be kept.
"""

from collections.abc import Callable

import torch
from torch import nn

from .collectives import logsumexp_over_processes, sum_over_processes
from .prototypes import CHUNK_ROWS, Assignment, full_precision, log_probabilities, logit_buffers, scaled_logits


class Center(nn.Module):
    """The teacher's mean logits, averaged over steps (DINO, Caron et al., 2021, equation 4).

    ```
    mean = mean(features @ prototypes.T for all rows of all batches of a step and all processes)
    center = momentum * center + (1 - momentum) * mean
    ```

    DINOv2 averages the processes' means of masked patches, however many each has; here every patch counts alike, so
    that several processes are one with the global batch. A step without any row leaves the center as it is.

    Args:
        num_prototypes: Length of the center, which starts at 0.
        momentum: Share that stays at each step.

    Attributes:
        center: `(num_prototypes,)`, for `Assignment.center`.
    """

    def __init__(self, num_prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(num_prototypes))
        # no buffer: each process has its own, and DDP would give that of the first to all
        self._observed: torch.Tensor | None = None

    @torch.no_grad()
    def observe(self, features: torch.Tensor, prototypes: torch.Tensor) -> None:
        """Adds the teacher's rows of one batch to what `update` will average; the center stays.

        Args:
            features: `(..., bottleneck_size)`.
            prototypes: `(num_prototypes, bottleneck_size)`.
        """
        rows = full_precision(features).flatten(0, -2)
        with torch.autocast(rows.device.type, enabled=False):
            # the sum of logits is the logit of the sum, one row in place of all
            logits = full_precision(prototypes) @ rows.sum(dim=0)
        sums = torch.cat([logits, logits.new_tensor([len(rows)])])
        self._observed = sums if self._observed is None else self._observed + sums

    @torch.no_grad()
    def update(self) -> None:
        """Moves the center by what was observed since the last call. Collective; once a step."""
        observed = self.center.new_zeros(len(self.center) + 1) if self._observed is None else self._observed
        self._observed = None
        sums = sum_over_processes(observed)
        num_rows = sums[-1]
        mean = sums[:-1] / num_rows.clamp(min=1)
        self.center.lerp_(mean.to(self.center.dtype), (1 - self.momentum) * (num_rows > 0).to(self.center.dtype))


@torch.no_grad()
def sinkhorn_knopp(teacher: Assignment, num_iterations: int = 3, chunk_rows: int = CHUNK_ROWS) -> torch.Tensor:
    """The center that makes all prototypes be used alike (SwAV, Caron et al., 2020, section 3.1). Collective.

    ```
    Q = exp(features @ prototypes.T / temperature)          # (rows of all processes, num_prototypes)
    repeat num_iterations times:
        Q = Q / sum(Q over rows) / num_prototypes           # every prototype has its share
        Q = Q / sum(Q over prototypes) / num_rows           # every row has its share
    targets = Q * num_rows                                  # each row sums to 1
    ```

    All of it scales columns and rows of the first Q, and the last step is a softmax. So targets = softmax(logits /
    temperature + offsets) with one offset for each prototype, the log of its scale; this returns -temperature *
    offsets, to be set as `Assignment.center`. Constant factors cancel: num_rows, which differs between processes and
    steps, is not needed. An iteration passes over the rows in chunks and keeps none of their logits; sums are taken in
    logarithms, which do not overflow.

    Args:
        teacher: Features `(..., bottleneck_size)`; its own center is not used.
        num_iterations: DINOv2 takes 3.
        chunk_rows: Rows of logits that there is room for; half of them is a chunk.

    Returns:
        `(num_prototypes,)`, the same on all processes; of no rows at all without meaning.

    Raises:
        ValueError: without an iteration.
    """
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations}.")
    rows = teacher.features.flatten(0, -2)
    assignment = teacher._replace(center=None)
    with torch.autocast(rows.device.type, enabled=False):
        offsets = -_log_mass(rows, assignment, scaled_logits, chunk_rows)
        for _ in range(num_iterations - 1):
            assignment = teacher._replace(center=-teacher.temperature * offsets)
            offsets = offsets - _log_mass(rows, assignment, log_probabilities, chunk_rows)
    return -teacher.temperature * offsets


def _log_mass(
    rows: torch.Tensor,
    assignment: Assignment,
    log_weights: Callable[[torch.Tensor, Assignment, torch.Tensor], torch.Tensor],
    chunk_rows: int,
) -> torch.Tensor:
    """log(sum over the rows of all processes of exp(log_weights)) for each prototype, up to a constant."""
    chunk_size = min(max(1, chunk_rows // 2), len(rows))
    buffers = logit_buffers(assignment, 2, chunk_size)
    mass = buffers.new_full((len(assignment.prototypes),), -torch.inf)
    for start in range(0, len(rows), max(1, chunk_size)):
        weights = log_weights(rows[start : start + chunk_size], assignment, buffers)
        largest = weights.amax(dim=0)
        mass = torch.logaddexp(mass, largest + weights.sub_(largest).exp_().sum(dim=0).log())
    mass = logsumexp_over_processes(mass)
    # the softmax does not see a constant, and small numbers are exact
    return mass - mass.mean()
