# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Images and their texts in one space, as in CLIP (Radford et al., 2021) and SigLIP (Zhai et al., 2023)."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from ..distributed import whole
from ..modeling_vitreg import ViTRegModel
from ..objective_options import CLIPOptions
from .averaging import ema_update, frozen_copy
from .base import Objective
from .losses.contrastive import clip_loss, siglip_loss
from .losses.prototypes import full_precision


# scale and bias of the cosines at the start: CLIP, section 2.5, and SigLIP, section 3.2
INITIAL_LOGITS = {"clip": (1 / 0.07, None), "siglip": (10.0, -10.0)}


class Tower(nn.Module):
    """A model of images or of texts, and the projection of what it pools.

    Args:
        model: With a `pooler_output`, `(batch, hidden_size)`.
        projection: From there to the common space, a linear layer without bias.
    """

    def __init__(self, model: PreTrainedModel, projection: nn.Linear):
        super().__init__()
        self.model = model
        self.projection = projection

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """L2-normalised embeddings, `(batch, projection_dim)`."""
        pooled = self.model(**inputs, return_dict=True).pooler_output
        return F.normalize(full_precision(self.projection(pooled)), dim=-1)


class CosineLogits(nn.Module):
    """What makes logits of cosines. The parameters are vectors of length 1, because FSDP shards no scalars.

    Args:
        scale: At the start; its logarithm is learned.
        bias: At the start, or `None`.
    """

    def __init__(self, scale: float, bias: float | None):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.bias = None if bias is None else nn.Parameter(torch.tensor([bias]))


class Towers(nn.Module):
    """All that is learned of a dual encoder."""

    def __init__(self, vision: Tower, text: Tower, logits: CosineLogits):
        super().__init__()
        self.vision = vision
        self.text = text
        self.logits = logits

    def dual_encoder(self) -> VisionTextDualEncoderModel:
        """The same modules as transformers has them, so that what it learned is known to every loader. Collective.

        The bias of SigLIP has no place there: it is `logit_bias` of the config.
        """
        vision, text = self.vision.model, self.text.model
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            vision.config, text.config, projection_dim=self.vision.projection.out_features
        )
        if self.logits.bias is not None:
            config.logit_bias = whole(self.logits.bias.detach()).item()
        # projections that cost nothing and draw no random numbers, until the true ones are there
        with torch.device("meta"):
            model = VisionTextDualEncoderModel(config, vision_model=vision, text_model=text)
        model.visual_projection = self.vision.projection
        model.text_projection = self.text.projection
        model.logit_scale = nn.Parameter(whole(self.logits.log_scale.detach())[0].clone(), requires_grad=False)
        return model


class CLIPObjective(Objective):
    """Two towers that learn which text belongs to which image, among all images of all processes.

    ```
    image, text = normalize(projection(pooled)) of each tower
    loss = clip_loss(image, text, scale) or siglip_loss(image, text, scale, bias)
    scale = clamp(scale, 1, max_logit_scale)                              # after each step
    ```

    Args:
        vision: With its projection where it has a `projection_dim`, which must be that of the text tower; else it
            gets a new one. The projection moves from the backbone to the dual encoder.
        text: With `text_model` and `text_projection`, as `text_tower` gives it.
        options: The loss.
        ema_decay: Of a moving average of the weights, which is then what is measured and exported; 0 is off.

    Raises:
        ValueError: where the towers project to spaces of different width.
    """

    def __init__(self, vision: ViTRegModel, text: nn.Module, options: CLIPOptions, ema_decay: float = 0.0):
        super().__init__()
        self.options = options
        self.ema_decay = ema_decay
        text_tower = Tower(text.text_model, text.text_projection)
        vision_tower = Tower(vision, _taken_projection(vision, text.text_projection.out_features))
        self.towers = Towers(vision_tower, text_tower, CosineLogits(*INITIAL_LOGITS[options.contrastive_loss]))
        # nothing here reads it, and DDP waits for every gradient
        if vision.embeddings.mask_token is not None:
            vision.embeddings.mask_token.requires_grad_(False)
        self.average = frozen_copy(self.towers) if ema_decay else None
        self.train()

    def train(self, mode: bool = True) -> "CLIPObjective":
        """The towers alone have a training mode: their average drops nothing."""
        super().train(mode)
        if self.average is not None:
            self.average.eval()
        return self

    def forward(self, batch: Mapping[str, torch.Tensor], step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Objective.forward`.

        Args:
            batch: `pixel_values` (batch, num_channels, height, width), `input_ids` and `attention_mask`
                (batch, text_length), the text of each image. Every process has as many.
            step: Steps done before this one.
        """
        images = self.towers.vision(pixel_values=batch["pixel_values"])
        texts = self.towers.text(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        scale, bias = self.towers.logits.log_scale.exp(), self.towers.logits.bias
        loss = clip_loss(images, texts, scale) if bias is None else siglip_loss(images, texts, scale, bias)
        metrics = {"logit_scale": scale.detach()[0]}
        if bias is not None:
            metrics["logit_bias"] = bias.detach()[0]
        found = (images.detach() @ texts.detach().T).argmax(dim=1)
        own = torch.arange(len(found), device=found.device)
        return loss, metrics | {"image_to_text_accuracy": (found == own).float().mean()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Bounds of the scale, and the moving average."""
        self.towers.logits.log_scale.clamp_(0, math.log(self.options.max_logit_scale))
        if self.average is not None:
            ema_update(self.average, self.towers, self.ema_decay)

    def exportable(self) -> VisionTextDualEncoderModel:
        """The dual encoder of the average, where there is one, else of the towers."""
        return self._measured().dual_encoder()

    def features(self) -> ViTRegModel:
        """The vision tower of what is exported, without its projection."""
        return self._measured().vision.model

    def trained(self) -> dict[str, nn.Module]:
        """The towers with their projections, and the scale of the logits."""
        return dict(self.towers.named_children())

    def _measured(self) -> Towers:
        return self.towers if self.average is None else self.average


def _taken_projection(vision: ViTRegModel, projection_dim: int) -> nn.Linear:
    """The projection of a backbone, which it is without from then on, or a new one as CLIP draws it."""
    projection = vision.projection
    if projection is None:
        hidden_size = vision.config.hidden_size
        projection = nn.Linear(hidden_size, projection_dim, bias=False)
        nn.init.normal_(projection.weight, std=hidden_size**-0.5)
    elif projection.out_features != projection_dim:
        raise ValueError(
            f"The model projects images to {projection.out_features} dimensions, and the text tower texts to "
            f"{projection_dim}: set --projection_dim to that of the one that is trained already."
        )
    vision.projection = None
    vision.config.projection_dim = None
    return projection
