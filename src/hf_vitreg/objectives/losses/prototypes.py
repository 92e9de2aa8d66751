# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Cross entropy between a teacher's and a student's assignment to prototypes, without keeping their logits.

With 65,536 prototypes a row of logits is 256 KiB, and a batch has thousands of rows: student and teacher, crops and
masked patches. So the logits are made chunk by chunk from the bottleneck features, and a chunk's gradient is taken
while its logits are there: what stays has the size of the features and of the prototypes. Nothing is computed twice.
"""

import math
from typing import NamedTuple

import torch


# rows of logits that there is room for: as much memory as the prototypes of 256 numbers take
CHUNK_ROWS = 256


class Assignment(NamedTuple):
    """A distribution over prototypes for each row, softmax((features @ prototypes.T - center) / temperature).

    Attributes:
        features: Normalised bottleneck features of the head, `(..., bottleneck_size)`.
        prototypes: Normalised weight of the head's last layer, `(num_prototypes, bottleneck_size)`.
        temperature: Small is sharp.
        center: `(num_prototypes,)`, of a teacher: `Center.center` or what `sinkhorn_knopp` returns. None is 0.
    """

    features: torch.Tensor
    prototypes: torch.Tensor
    temperature: float
    center: torch.Tensor | None = None


class PrototypeLoss(NamedTuple):
    """A loss, and what else fell out of its chunks, without gradient.

    Attributes:
        loss: Scalar.
        cross_entropy: Mean over rows for each pair, `(num_student_crops, num_teacher_crops)`, in nats.
        teacher_entropy: Mean entropy of the teacher's rows, in nats. Subtracted from a cross entropy it leaves the
            Kullback-Leibler divergence.
        mean_target: The teacher's distribution averaged over this process's rows, `(num_prototypes,)`; all zero
            without rows. Where its entropy falls, all images go to the same prototypes.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    mean_target: torch.Tensor


def dino_loss(
    student: Assignment, teacher: Assignment, pair_weights: torch.Tensor, chunk_rows: int = CHUNK_ROWS
) -> PrototypeLoss:
    """Cross entropy on CLS between crops of an image (DINO, Caron et al., 2021, equation 3).

    ```
    p[t, b] = softmax((teacher.features[t, b] @ teacher.prototypes.T - teacher.center) / teacher.temperature)
    log_q[s, b] = log_softmax(student.features[s, b] @ student.prototypes.T / student.temperature)
    loss = sum(pair_weights[s, t] * mean(-sum(p[t, b] * log_q[s, b] for all prototypes) for all b) for all s, t)
    ```

    Args:
        student: Features `(num_student_crops, batch, bottleneck_size)`.
        teacher: Features `(num_teacher_crops, batch, bottleneck_size)`; no gradient reaches it.
        pair_weights: `(num_student_crops, num_teacher_crops)`, see `crop_pair_weights`.
        chunk_rows: Rows of logits that there is room for; chunks have a third of them at most. The result
            depends on it by rounding alone.

    Raises:
        ValueError: where student, teacher and weights are not of the same rows and crops.
    """
    batch_size = student.features.shape[1]
    row_weights = student.features.new_full((batch_size,), 1 / max(batch_size, 1))
    return _chunked_cross_entropy(student, teacher, pair_weights, row_weights, chunk_rows)


def ibot_loss(
    student: Assignment,
    teacher: Assignment,
    patch_weights: torch.Tensor,
    num_images: int,
    chunk_rows: int = CHUNK_ROWS,
) -> PrototypeLoss:
    """Cross entropy on masked patches (iBOT, Zhou et al., 2022, equation 2), every masked image counting alike.

    ```
    p[i] = softmax((teacher.features[i] @ teacher.prototypes.T - teacher.center) / teacher.temperature)
    log_q[i] = log_softmax(student.features[i] @ student.prototypes.T / student.temperature)
    loss = sum(patch_weights[i] * -sum(p[i] * log_q[i] for all prototypes) for all i) / num_images
    ```

    Args:
        student: Features of the masked patches of all images, `(num_masked, bottleneck_size)`.
        teacher: Features of the same patches, which the teacher sees, `(num_masked, bottleneck_size)`.
        patch_weights: 1 / number of masked patches of the patch's image, `(num_masked,)`, as `BlockMasks.weights`.
        num_images: Crops of the batch, masked or not, as DINOv2 counts them.
        chunk_rows: As in `dino_loss`.

    Raises:
        ValueError: where student, teacher and weights are not of the same patches.
    """
    return _chunked_cross_entropy(
        student._replace(features=student.features[None]),
        teacher._replace(features=teacher.features[None]),
        torch.ones(1, 1),
        patch_weights / num_images,
        chunk_rows,
    )


def crop_pair_weights(num_global_crops: int, num_local_crops: int, local_weight: float = 1.0) -> torch.Tensor:
    """What each pair of student's and teacher's crop counts: a mean over all pairs but those of a crop with itself.

    DINOv2 divides by one more where there are no local crops.

    Args:
        num_global_crops: Crops that teacher and student see; they come first among the student's.
        num_local_crops: Crops that the student alone sees.
        local_weight: Factor on the pairs of local crops, 0.5 at the end of DINOv3's training.

    Returns:
        `(num_global_crops + num_local_crops, num_global_crops)`.

    Raises:
        ValueError: where there is no pair of different crops.
    """
    num_pairs = num_global_crops * (num_global_crops - 1 + num_local_crops)
    if num_pairs <= 0:
        raise ValueError(
            f"{num_global_crops} global and {num_local_crops} local crops make no pair of different crops: take two "
            "global crops, or one and a local one."
        )
    weights = torch.full((num_global_crops + num_local_crops, num_global_crops), 1 / num_pairs)
    weights[num_global_crops:] *= local_weight
    return weights.fill_diagonal_(0.0)


def logit_buffers(assignment: Assignment, num_buffers: int, num_rows: int) -> torch.Tensor:
    """Room for the logits of a chunk, `(num_buffers, num_rows, num_prototypes)`, to be used for every chunk.

    On a CPU the first touch of fresh memory takes a fifth of the time of the loss.
    """
    dtype = full_precision(assignment.features.new_empty(0)).dtype
    return assignment.features.new_empty((num_buffers, num_rows, len(assignment.prototypes)), dtype=dtype)


def log_probabilities(features: torch.Tensor, assignment: Assignment, buffers: torch.Tensor) -> torch.Tensor:
    """Log of the distribution of rows `(rows, bottleneck_size)` under an assignment, `(rows, num_prototypes)`.

    It lies in the second buffer; in the first are the logits.
    """
    return torch.log_softmax(scaled_logits(features, assignment, buffers), dim=-1, out=buffers[1, : len(features)])


def scaled_logits(features: torch.Tensor, assignment: Assignment, buffers: torch.Tensor) -> torch.Tensor:
    """(features @ prototypes.T - center) / temperature, `(rows, num_prototypes)`, in the first buffer.

    The division falls on the features, which are 256 times smaller than the logits.
    """
    prototypes, logits = assignment.prototypes, buffers[0, : len(features)]
    features = (features / assignment.temperature).to(prototypes.dtype)
    if prototypes.dtype == logits.dtype:
        torch.mm(features, prototypes.mT, out=logits)
    else:
        logits.copy_(features @ prototypes.mT)
    return logits if assignment.center is None else logits.sub_(assignment.center / assignment.temperature)


def full_precision(values: torch.Tensor) -> torch.Tensor:
    """float32 in place of half precision; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


def _chunked_cross_entropy(
    student: Assignment, teacher: Assignment, pair_weights: torch.Tensor, row_weights: torch.Tensor, chunk_rows: int
) -> PrototypeLoss:
    """sum(pair_weights[s, t] * row_weights[b] * H(teacher[t, b], student[s, b]) for all s, t, b).

    Args:
        student: Features `(num_student_crops, batch, bottleneck_size)`.
        teacher: Features `(num_teacher_crops, batch, bottleneck_size)`.
        pair_weights: `(num_student_crops, num_teacher_crops)`.
        row_weights: `(batch,)`.
        chunk_rows: Rows of logits in all three buffers.
    """
    if student.features.shape[1:] != teacher.features.shape[1:]:
        raise ValueError(
            f"Student and teacher must have features of the same rows, got {tuple(student.features.shape)} and "
            f"{tuple(teacher.features.shape)}, (crops, rows, bottleneck_size)."
        )
    num_pairs, num_rows = (len(student.features), len(teacher.features)), student.features.shape[1]
    num_chunks = math.ceil(num_rows / max(1, chunk_rows // (3 * max(pair_weights.shape))))
    if pair_weights.shape != num_pairs or row_weights.shape != (num_rows,):
        raise ValueError(
            f"Weights must have shapes {num_pairs}, (student crops, teacher crops), and ({num_rows},), rows; got "
            f"{tuple(pair_weights.shape)} and {tuple(row_weights.shape)}."
        )
    with torch.autocast(student.features.device.type, enabled=False):
        return PrototypeLoss(
            *_ChunkedCrossEntropy.apply(
                student.features,
                student.prototypes,
                student.temperature,
                teacher,
                pair_weights.to(student.features.device),
                row_weights,
                # all alike: reading the prototypes takes as long for a last chunk of few rows as for a whole one
                math.ceil(num_rows / max(1, num_chunks)),
                torch.is_grad_enabled(),
            )
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Takes the gradient in the forward pass, where the logits of a chunk are at hand: four products of rows and
    prototypes in all, where recomputing them in the backward pass takes six, and the same memory at the peak.
    """

    @staticmethod
    def forward(
        ctx,
        features: torch.Tensor,
        prototypes: torch.Tensor,
        temperature: float,
        teacher: Assignment,
        pair_weights: torch.Tensor,
        row_weights: torch.Tensor,
        chunk_size: int,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        student = Assignment(features, prototypes, temperature)
        sums = _Sums.zeros(student, teacher)
        gradients = _Gradients.zeros(student) if with_gradient and any(ctx.needs_input_grad[:2]) else None
        buffers = logit_buffers(student, 3, chunk_size * max(pair_weights.shape))
        for start in range(0, features.shape[1], max(1, chunk_size)):
            rows = slice(start, start + chunk_size)
            targets = _teacher_chunk(teacher, rows, sums, buffers[:2])
            _student_chunk(student, rows, targets, pair_weights, row_weights[rows], sums, gradients, buffers[1:])
        if gradients is not None:
            ctx.save_for_backward(gradients.features.to(features.dtype), gradients.prototypes.to(prototypes.dtype))
        outputs = sums.outputs(pair_weights, features.shape[1])
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, gradient: torch.Tensor, *_):
        of_features, of_prototypes = ctx.saved_tensors
        return (
            gradient.to(of_features.dtype) * of_features if ctx.needs_input_grad[0] else None,
            gradient.to(of_prototypes.dtype) * of_prototypes if ctx.needs_input_grad[1] else None,
            *[None] * 6,
        )


class _Sums(NamedTuple):
    """Sums over rows, filled in place chunk by chunk."""

    weighted: torch.Tensor  # cross entropy of each pair, weighted by row
    cross_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def zeros(cls, student: Assignment, teacher: Assignment) -> "_Sums":
        num_pairs = (len(student.features), len(teacher.features))
        like = full_precision(student.features.new_empty(0))
        return cls(*(like.new_zeros(shape) for shape in (num_pairs, num_pairs, (), (len(teacher.prototypes),))))

    def outputs(self, pair_weights: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, ...]:
        num_rows = max(num_rows, 1)
        num_targets = num_rows * self.cross_entropy.shape[1]
        loss = (self.weighted * pair_weights).sum()
        return loss, self.cross_entropy / num_rows, self.teacher_entropy / num_targets, self.targets / num_targets


class _Gradients(NamedTuple):
    features: torch.Tensor
    prototypes: torch.Tensor

    @classmethod
    def zeros(cls, student: Assignment) -> "_Gradients":
        dtype = full_precision(student.features.new_empty(0)).dtype
        return cls(*(torch.zeros_like(part, dtype=dtype) for part in (student.features, student.prototypes)))


def _teacher_chunk(teacher: Assignment, rows: slice, sums: _Sums, buffers: torch.Tensor) -> torch.Tensor:
    """The targets of these rows, `(rows, num_teacher_crops, num_prototypes)`, in the first buffer."""
    features = teacher.features[:, rows].transpose(0, 1)
    log_targets = log_probabilities(features.flatten(0, 1), teacher, buffers)
    targets = torch.exp(log_targets, out=buffers[0, : len(log_targets)])
    sums.teacher_entropy.sub_((targets[:, None] @ log_targets[:, :, None]).sum())
    sums.targets.add_(targets.sum(dim=0))
    return targets.unflatten(0, features.shape[:2])


def _student_chunk(
    student: Assignment,
    rows: slice,
    targets: torch.Tensor,
    pair_weights: torch.Tensor,
    row_weights: torch.Tensor,
    sums: _Sums,
    gradients: _Gradients | None,
    buffers: torch.Tensor,
) -> None:
    """Adds the cross entropy of these rows and its gradient.

    With w = pair_weights * row_weight: gradient of logits[s] = (sum_t(w[s, t]) * softmax(s) - sum_t(w[s, t] * p[t])) /
    temperature.
    """
    crops = student.features[:, rows].transpose(0, 1)
    features = crops.flatten(0, 1)
    log_predictions = log_probabilities(features, student, buffers).unflatten(0, crops.shape[:2])
    cross_entropy = -(log_predictions @ targets.mT)
    sums.cross_entropy.add_(cross_entropy.sum(dim=0))
    sums.weighted.add_((row_weights[:, None, None] * cross_entropy).sum(dim=0))
    if gradients is None:
        return
    weights = (row_weights[:, None, None] * pair_weights / student.temperature).to(targets.dtype)
    logit_gradient = log_predictions.exp_().mul_(weights.sum(dim=2, keepdim=True))
    logit_gradient = logit_gradient.baddbmm_(weights, targets, alpha=-1).flatten(0, 1).to(student.prototypes.dtype)
    gradients.features[:, rows] = (logit_gradient @ student.prototypes).unflatten(0, crops.shape[:2]).transpose(0, 1)
    _add_product(gradients.prototypes, logit_gradient.mT, features.to(logit_gradient.dtype))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, without room for the product where the types agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
