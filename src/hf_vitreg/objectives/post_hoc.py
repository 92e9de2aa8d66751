# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Registers for a model that was trained without, distilled from its own features (PH-Reg, Chen et al., 2025)."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..modeling_vitreg import ViTRegModel
from ..objective_options import PostHocOptions
from ..registers.post_hoc import Views, denoised_features
from .base import Objective
from .losses.features import cosine_distance, squared_distance


class PostHocObjective(Objective):
    """A student with new registers that finds in one look what its teacher finds in the mean over many views.

    ```
    target = denoised_features(teacher, images, views)                    # patches after the final norm
    loss = cosine_weight * cosine_distance(student's patches, target)
         + mse_weight * squared_distance(student's patches, target)
    ```

    CLS and registers take part in no loss. What learns are the registers, the position embeddings where there are any,
    the patch embedding and the last layer; all else stays what it is in the teacher ("Vision Transformers with
    Self-Distilled Registers", Chen et al., 2025).

    Args:
        teacher: Without registers. It stays as it is.
        student: The same model with registers, as `registers.warm_start.add_registers` gives it.
        options: Views and weights.
        fill: What is seen beyond the border of a shifted image, a value for each channel of the pixel values.

    Raises:
        ValueError: for a teacher that has registers, or a student that has none or is another model.
    """

    def __init__(self, teacher: ViTRegModel, student: ViTRegModel, options: PostHocOptions, fill: torch.Tensor):
        super().__init__()
        _require_new_registers(teacher, student)
        self.options = options
        self.student = student.requires_grad_(False)
        for parameter in learned_parameters(student):
            parameter.requires_grad_(True)
        self.teacher = teacher.requires_grad_(False)
        self.register_buffer("fill", fill, persistent=False)
        self.train()

    def train(self, mode: bool = True) -> "PostHocObjective":
        """The student alone has a training mode, but its positions are those of the teacher, which moves none."""
        super().train(mode)
        self.teacher.eval()
        if self.student.encoder.rotary_embeddings is not None:
            self.student.encoder.rotary_embeddings.eval()
        return self

    def forward(self, batch: Mapping[str, torch.Tensor], step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Objective.forward`.

        Args:
            batch: `pixel_values` (batch, num_channels, height, width); `view_shifts` (batch, num_views, 2) and
                `view_flips` (batch, num_views), which are `registers.post_hoc.Views`.
            step: Steps done before this one.
        """
        pixel_values = batch["pixel_values"]
        target = self._target(pixel_values, Views(batch["view_shifts"], batch["view_flips"]))
        patches = self.student(pixel_values).patch_tokens
        cosine, squared = cosine_distance(patches, target), squared_distance(patches, target)
        loss = self.options.cosine_weight * cosine + self.options.mse_weight * squared
        return loss, {"cosine_loss": cosine.detach(), "mse_loss": squared.detach()}

    @torch.no_grad()
    def _target(self, pixel_values: torch.Tensor, views: Views) -> torch.Tensor:
        def patches_of(view: torch.Tensor) -> torch.Tensor:
            return self.teacher(view).patch_tokens

        return denoised_features(patches_of, pixel_values, views, self.teacher.config.patch_size, self.fill)

    def exportable(self) -> ViTRegModel:
        """The student."""
        return self.student

    def features(self) -> ViTRegModel:
        """The student."""
        return self.student

    def trained(self) -> dict[str, nn.Module]:
        """The student, of which most is frozen."""
        return {"student": self.student}


def learned_parameters(student: ViTRegModel) -> Iterator[nn.Parameter]:
    """What distillation changes: registers, position embeddings, patch embedding, last layer with its norms."""
    embeddings = student.embeddings
    yield embeddings.register_tokens
    if embeddings.position_embeddings is not None:
        yield embeddings.position_embeddings
    yield from embeddings.patch_embeddings.parameters()
    yield from student.encoder.layer[-1].parameters()


def _require_new_registers(teacher: ViTRegModel, student: ViTRegModel) -> None:
    if teacher.config.num_register_tokens:
        raise ValueError(
            f"The teacher has {teacher.config.num_register_tokens} registers already: start from a model without."
        )
    if not student.config.num_register_tokens:
        raise ValueError("The student has no registers to learn: set --num_register_tokens to 1 or more.")
    sizes = ("hidden_size", "num_hidden_layers", "patch_size", "num_channels")
    theirs, ours = ({name: getattr(model.config, name) for name in sizes} for model in (teacher, student))
    if theirs != ours:
        raise ValueError(f"The student must be the teacher with registers, got {ours} and {theirs}.")
