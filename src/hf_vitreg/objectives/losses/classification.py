# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Losses on labels: cross entropies for targets that mixup and cutmix have mixed, and distillation."""

import torch
import torch.nn.functional as F

from .prototypes import full_precision


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """mean(-sum(targets[b] * log_softmax(logits[b])) for all b).

    Args:
        logits: `(batch, num_labels)`.
        targets: Probabilities, `(batch, num_labels)`, or labels, `(batch,)`.
        label_smoothing: Share of the targets that is spread over all classes.
    """
    logits = full_precision(logits)
    targets = targets.to(logits.dtype) if targets.is_floating_point() else targets
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def binary_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Each class a yes or no of its own, yes for all that were mixed (DeiT III, Touvron et al., 2022, section 3).

    ```
    yes = targets > 0                                                     # 1 or 0
    loss = mean(-yes * log(sigmoid(logits)) - (1 - yes) * log(sigmoid(-logits)))     # over batch and labels
    ```

    Label smoothing would make all classes a yes: it must be off.

    Args:
        logits: `(batch, num_labels)`.
        targets: Probabilities, `(batch, num_labels)`, or labels, `(batch,)`.
    """
    logits = full_precision(logits)
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, (targets > 0).to(logits.dtype))


def hard_distillation(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Cross entropy with the class that the teacher finds (DeiT, Touvron et al., 2021, equation 3).

    ```
    loss = mean(-log_softmax(logits[b])[argmax(teacher_logits[b])] for all b)
    ```

    DeiT takes the mean of this, on the distillation token, and of the loss on labels, on CLS.

    Args:
        logits: Of the distillation token's classifier, `(batch, num_labels)`.
        teacher_logits: `(batch, num_labels)`.
    """
    return F.cross_entropy(full_precision(logits), teacher_logits.argmax(dim=1))


def soft_distillation(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback-Leibler divergence from the teacher (DeiT, equation 2).

    ```
    p, q = softmax(teacher_logits / temperature), softmax(logits / temperature)
    loss = temperature ** 2 * mean(p * (log(p) - log(q)))          # over batch and labels
    ```

    DeiT's code divides by the number of labels too, which the paper does not.

    Args:
        logits: Of the distillation token's classifier, `(batch, num_labels)`.
        teacher_logits: `(batch, num_labels)`; no gradient reaches them.
        temperature: 3 in the paper.
    """
    log_q = (full_precision(logits) / temperature).log_softmax(dim=1)
    log_p = (full_precision(teacher_logits.detach()) / temperature).log_softmax(dim=1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).mean()
