# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Classification as in DeiT III (Touvron et al., 2022), and distillation as in DeiT (Touvron et al., 2021)."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..modeling_vitreg import ViTRegForImageClassification, ViTRegModel
from ..objective_options import SupervisedOptions
from .averaging import ema_update, frozen_copy
from .base import Objective
from .losses.classification import binary_cross_entropy, hard_distillation, soft_cross_entropy, soft_distillation


class SupervisedObjective(Objective):
    """A classifier that learns the labels, and by its distillation token what a teacher says.

    ```
    loss = (1 - distillation_weight) * classification_loss(classifier on CLS, labels)
         + distillation_weight * distillation(classifier on the distillation token, teacher's logits)
    ```

    Without a teacher the loss is that of the labels, on whatever the model's classifier reads.

    Args:
        model: What learns. With a teacher its `classifier_layout` is `cls_distillation`.
        options: Losses, and their weights.
        ema_decay: Of a moving average of the weights, which is then what is measured and exported; 0 is off.
        teacher: Takes pixel values as the model gets them and gives logits of the same classes. It is called, and is
            no part of this module: put it where the pixel values are. Checkpoints are without it.

    Raises:
        ValueError: for a teacher and a model that has no classifier on a distillation token.
    """

    def __init__(
        self,
        model: ViTRegForImageClassification,
        options: SupervisedOptions,
        ema_decay: float = 0.0,
        teacher: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        super().__init__()
        if teacher is not None and model.distillation_classifier is None:
            raise ValueError(
                "--distillation_teacher teaches a distillation token, and this model has no classifier on one: its "
                f'classifier_layout is "{model.config.classifier_layout}" and must be "cls_distillation".'
            )
        self.model = model
        self.options = options
        self.ema_decay = ema_decay
        # nothing here reads it, and DDP waits for every gradient
        if model.vitreg.embeddings.mask_token is not None:
            model.vitreg.embeddings.mask_token.requires_grad_(False)
        self.average = frozen_copy(model) if ema_decay else None
        # a module inside of a tuple is none of this module's
        self._teacher = (teacher,)
        self.train()

    def train(self, mode: bool = True) -> "SupervisedObjective":
        """The model alone has a training mode: its average drops nothing."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def forward(self, batch: Mapping[str, torch.Tensor], step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Objective.forward`.

        Args:
            batch: `pixel_values` (batch, num_channels, height, width) and `labels`, integers (batch,) or, where
                images are mixed, probabilities (batch, num_labels).
            step: Steps done before this one.
        """
        pixel_values, labels = batch["pixel_values"], batch["labels"]
        [teacher] = self._teacher
        if teacher is None:
            logits = self.model(pixel_values).logits
            loss = self._classification_loss(logits, labels)
            metrics = {}
        else:
            logits, distilled = self._both_logits(pixel_values)
            on_labels, on_teacher = (
                self._classification_loss(logits, labels),
                self._distillation_loss(distilled, teacher, pixel_values),
            )
            weight = self.options.distillation_weight
            loss = (1 - weight) * on_labels + weight * on_teacher
            metrics = {"classification_loss": on_labels.detach(), "distillation_loss": on_teacher.detach()}
        if labels.ndim == 1:
            metrics["accuracy"] = (logits.argmax(dim=1) == labels).float().mean()
        return loss, metrics

    def _both_logits(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of CLS and of the distillation token, of which the model itself gives the mean."""
        tokens = self.model.vitreg(pixel_values).last_hidden_state
        return self.model.classifier(tokens[:, 0]), self.model.distillation_classifier(tokens[:, 1])

    def _classification_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.options.classification_loss == "bce":
            return binary_cross_entropy(logits, labels)
        return soft_cross_entropy(logits, labels, self.options.label_smoothing)

    def _distillation_loss(self, logits: torch.Tensor, teacher: Callable, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher(pixel_values)
        if self.options.distillation == "hard":
            return hard_distillation(logits, teacher_logits)
        return soft_distillation(logits, teacher_logits, self.options.distillation_temperature)

    def after_step(self, step: int) -> None:
        """The moving average."""
        if self.average is not None:
            ema_update(self.average, self.model, self.ema_decay)

    def exportable(self) -> ViTRegForImageClassification:
        """The average, where there is one, else the model."""
        return self.model if self.average is None else self.average

    def features(self) -> ViTRegModel:
        """The backbone of what is exported."""
        return self.exportable().vitreg

    def trained(self) -> dict[str, nn.Module]:
        """The model."""
        return {"model": self.model}
