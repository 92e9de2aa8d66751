# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The seam between the loop and a method: one loop trains whatever is an `Objective`."""

import abc
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_vitreg import ViTRegModel


class Objective(nn.Module, abc.ABC):
    """What Accelerate prepares and the loop calls: a backbone, and all that its training needs beside it.

    A step is one update of the weights; with gradient accumulation several batches belong to it. What is drawn at
    random in `forward` comes from torch's generators, which the loop seeds for every batch.
    """

    @property
    def _no_split_modules(self) -> list[str]:
        """Where FSDP may cut, as transformers names it. Only what is there: Accelerate looks for every class."""
        models = [module for module in self.modules() if isinstance(module, PreTrainedModel)]
        named = {name for model in models for name in model._no_split_modules or ()}
        return sorted(named & {type(module).__name__ for module in self.modules()})

    @abc.abstractmethod
    def forward(self, batch: Mapping[str, torch.Tensor], step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, a mean over its images, and what is worth a log line, scalars without gradient.

        Args:
            batch: Tensors on the device of the weights, the first axis over images.
            step: Steps done before this one.
        """

    def after_step(self, step: int) -> None:
        """What follows an update of the weights: the teacher's, the centers'. Collective. Often nothing.

        Args:
            step: The one that was just done, as `forward` had it.
        """

    @abc.abstractmethod
    def exportable(self) -> PreTrainedModel:
        """What is worth publishing: the teacher or the moving average, where there is one. Collective.

        Its modules may be those that learn.
        """

    @abc.abstractmethod
    def features(self) -> ViTRegModel:
        """The backbone that is measured during training, a part of what is exported."""

    @abc.abstractmethod
    def trained(self) -> dict[str, nn.Module]:
        """The modules that learn, by name, of which each has its gradient clipped on its own."""
