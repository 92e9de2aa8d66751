# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Losses between images and texts, each image against the texts of all processes.

A process computes the rows of its own images and texts, `(batch, num_processes * batch)`, and the gradient reaches the
features of all processes. The mean over processes is the loss of the global batch, and so is that of the gradients.
Every process must give the same number of pairs.
"""

import torch
import torch.nn.functional as F

from .collectives import gather_with_gradient, process_index
from .prototypes import full_precision


def clip_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor | float
) -> torch.Tensor:
    """Finding an image's text among all texts, and a text's image (CLIP, Radford et al., 2021, figure 3).

    ```
    logits = logit_scale * image_features @ text_features.T               # (global batch, global batch)
    labels = 0, 1, ...
    loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    ```

    Args:
        image_features: L2-normalised, `(batch, projection_dim)`.
        text_features: Those of the images' texts, L2-normalised, `(batch, projection_dim)`.
        logit_scale: What the cosines are multiplied with, the exponential of the learned parameter.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = full_precision(image_features), full_precision(text_features)
        labels = process_index() * len(images) + torch.arange(len(images), device=images.device)
        to_texts = logit_scale * images @ gather_with_gradient(texts).T
        to_images = logit_scale * texts @ gather_with_gradient(images).T
        return (F.cross_entropy(to_texts, labels) + F.cross_entropy(to_images, labels)) / 2


def siglip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float,
) -> torch.Tensor:
    """Whether each pair of image and text belongs together (SigLIP, Zhai et al., 2023, section 3.2).

    ```
    logits = logit_scale * image_features @ text_features.T + logit_bias         # (global batch, global batch)
    sign = 1 on the diagonal, -1 elsewhere
    loss = -sum(log(sigmoid(sign * logits))) / global batch
    ```

    Args:
        image_features: L2-normalised, `(batch, projection_dim)`.
        text_features: Those of the images' texts, L2-normalised, `(batch, projection_dim)`.
        logit_scale: The exponential of the learned parameter; starts at 10.
        logit_bias: Learned; starts at -10, since most pairs do not belong together.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = full_precision(image_features), full_precision(text_features)
        logits = logit_scale * images @ gather_with_gradient(texts).T + logit_bias
        signs = torch.full_like(logits, -1)
        first = process_index() * len(images)
        signs[:, first : first + len(images)].fill_diagonal_(1)
        return -F.logsigmoid(signs * logits).sum() / len(images)
