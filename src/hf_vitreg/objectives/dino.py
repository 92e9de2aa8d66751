# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Self-supervision as in DINOv2 (Oquab et al., 2024) and DINOv3 (Siméoni et al., 2025)."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..modeling_vitreg import ViTRegModel
from ..objective_options import NUM_GLOBAL_CROPS, DINOOptions
from ..training.schedules import cosine, linear
from .averaging import ema_update
from .base import Objective
from .heads import DINOHead
from .losses.prototypes import Assignment, PrototypeLoss, crop_pair_weights, dino_loss, ibot_loss
from .losses.regularizers import gram_loss, koleo_loss
from .losses.targets import Center, sinkhorn_knopp
from .packing import forward_crops, prepare_for_crops


class CropTokens(NamedTuple):
    """What a network makes of the crops of a batch.

    Attributes:
        cls: Normed CLS, `(num_crops, batch, hidden_size)`.
        masked: Normed patch tokens of the global crops that losses read, `(num_masked, hidden_size)`.
        patches: All of them where Gram anchors, `(2 * batch, num_patches, hidden_size)`.
    """

    cls: torch.Tensor
    masked: torch.Tensor | None
    patches: torch.Tensor | None = None


class DINONetwork(nn.Module):
    """A backbone, and heads that map its tokens to where prototypes are.

    Args:
        backbone: With a mask token, where patches are masked.
        options: Sizes of the heads.
    """

    def __init__(self, backbone: ViTRegModel, options: DINOOptions):
        super().__init__()
        self.backbone = backbone
        self.head = DINOHead(
            backbone.config.hidden_size,
            options.num_prototypes,
            options.head_mlp_size,
            options.head_bottleneck_size,
            options.head_num_layers,
            options.train_prototype_norms,
        )
        self.ibot_head = None
        if options.separate_ibot_head and options.ibot_weight:
            self.ibot_head = DINOHead(
                backbone.config.hidden_size,
                options.ibot_num_prototypes,
                options.ibot_head_mlp_size,
                options.ibot_head_bottleneck_size,
                options.head_num_layers,
                options.train_prototype_norms,
            )

    def assignments(
        self, cls: torch.Tensor, patches: torch.Tensor | None, temperature: float
    ) -> tuple[Assignment, Assignment | None]:
        """Of CLS `(num_crops, batch, hidden_size)` and of masked patches `(num_masked, hidden_size)`."""
        if patches is None:
            return Assignment(*self.head(cls), temperature), None
        if self.ibot_head is not None:
            return Assignment(*self.head(cls), temperature), Assignment(*self.ibot_head(patches), temperature)
        num_cls = cls.shape[0] * cls.shape[1]
        features, prototypes = self.head(torch.cat([cls.flatten(0, 1), patches]))
        of_cls = features[:num_cls].unflatten(0, cls.shape[:2])
        return Assignment(of_cls, prototypes, temperature), Assignment(features[num_cls:], prototypes, temperature)


class DINOObjective(Objective):
    """A student that finds from its crops, and from what is left of masked ones, what its teacher makes of whole ones.

    ```
    loss = dino_weight * dino_loss(CLS of all student crops, CLS of the teacher's global crops)
         + ibot_weight * ibot_loss(masked patches of the student, the same patches of the teacher)
         + koleo_weight * sum(koleo_loss(CLS of the student's global crop c) for both c)
         + gram_weight * gram_loss(patches of the student's global crops, those of the Gram teacher)
    teacher = momentum * teacher + (1 - momentum) * student             # after each step
    ```

    Registers take part in no loss.

    Args:
        backbone: What the student starts from, and the teacher too.
        options: Weights, sizes and schedules.
        total_steps: Steps of the run, that the schedules are over.
        drop_path_subset, pack_crops: See `packing.prepare_for_crops`.
        gram_teacher: What anchors; by default the teacher as it is when anchoring starts.

    Raises:
        ValueError: for a backbone without CLS, or without a mask token where patches are masked; for an anchor that
            the teacher is to replace and cannot.
    """

    def __init__(
        self,
        backbone: ViTRegModel,
        options: DINOOptions,
        total_steps: int,
        drop_path_subset: bool = True,
        pack_crops: bool = False,
        gram_teacher: ViTRegModel | None = None,
    ):
        super().__init__()
        if not backbone.config.use_cls_token:
            raise ValueError("DINO compares CLS tokens, and this model has none: choose one with use_cls_token.")
        if options.masks_patches and not backbone.config.use_mask_token:
            raise ValueError("iBOT needs a model with a mask token: set use_mask_token, or --ibot_weight 0.")
        self.options = options
        self.total_steps = total_steps
        self.student = DINONetwork(backbone, options)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.gram_teacher = None
        if options.gram_weight:
            if gram_teacher is not None and options.gram_update_steps:
                _require_same_weights(gram_teacher, backbone)
            self.gram_teacher = (gram_teacher or copy.deepcopy(backbone)).requires_grad_(False)
        self.anchors_on_own_teacher = gram_teacher is None
        prepare_for_crops(self.student.backbone, drop_path_subset, pack_crops)
        prepare_for_crops(self.teacher.backbone, last_alone=True)
        for part in (backbone.pooler, backbone.projection):
            if part is not None:  # nothing here reaches them, and DDP waits for every gradient
                part.requires_grad_(False)
        num_ibot_prototypes = options.ibot_num_prototypes if self.student.ibot_head else options.num_prototypes
        self.center = Center(options.num_prototypes, options.center_momentum)
        self.ibot_center = Center(num_ibot_prototypes, options.center_momentum)
        self.train()

    def train(self, mode: bool = True) -> "DINOObjective":
        """The student alone has a training mode: teachers drop nothing and augment no positions."""
        super().train(mode)
        self.teacher.eval()
        if self.gram_teacher is not None:
            self.gram_teacher.eval()
        return self

    def forward(self, batch: Mapping[str, torch.Tensor], step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """See `Objective.forward`.

        Args:
            batch: `global_crops` (batch, 2, num_channels, height, width), `local_crops` (batch, num_local_crops,
                num_channels, height, width); where patches are masked `masks` (2 * batch, num_patches), crop by crop,
                `mask_indices` and `mask_weights` (num_masked,); where Gram anchors `gram_crops`, as the global ones.
            step: Steps done before this one.
        """
        global_crops = batch["global_crops"].transpose(0, 1)
        local_crops = batch["local_crops"].transpose(0, 1)
        masked = batch["mask_indices"] if self.options.masks_patches else None
        with torch.no_grad():
            teacher = self._teacher_assignments(global_crops, masked, step)
        anchors = self.gram_teacher is not None and step >= self._gram_start()
        masks = batch["masks"] if self.options.masks_patches else None
        tokens = self._student_tokens(global_crops, local_crops, masks, masked, anchors)
        student = self.student.assignments(tokens.cls, tokens.masked, self.options.student_temperature)

        pair_weights = crop_pair_weights(NUM_GLOBAL_CROPS, len(local_crops), self.options.local_weight)
        on_cls = dino_loss(student[0], teacher[0], pair_weights, self.options.loss_chunk_rows)
        losses = {"dino_loss": (self.options.dino_weight, on_cls.loss)}
        on_patches = None
        if self.options.masks_patches:
            weights, num_crops = batch["mask_weights"], len(masks)
            on_patches = ibot_loss(student[1], teacher[1], weights, num_crops, self.options.loss_chunk_rows)
            losses["ibot_loss"] = (self.options.ibot_weight, on_patches.loss)
        if self.options.koleo_weight:
            losses["koleo_loss"] = (self.options.koleo_weight, self._koleo(tokens.cls[:NUM_GLOBAL_CROPS]))
        if anchors:
            losses["gram_loss"] = (self.options.gram_weight, self._gram(tokens.patches, batch["gram_crops"]))
        loss = sum(weight * part for weight, part in losses.values())
        metrics = {name: part.detach() for name, (_, part) in losses.items()}
        return loss, metrics | self._health(on_cls, on_patches)

    def _teacher_assignments(
        self, global_crops: torch.Tensor, masked: torch.Tensor | None, step: int
    ) -> tuple[Assignment, Assignment | None]:
        """What the teacher says of whole global crops, sharpened and balanced."""
        pixels = global_crops.flatten(0, 1)
        (tokens,) = forward_crops(self.teacher.backbone, [pixels], [None], [self._positions(pixels, masked)])
        cls = tokens[: len(pixels)].unflatten(0, global_crops.shape[:2])
        patches = None if masked is None else tokens[len(pixels) :]
        on_cls, on_patches = self.teacher.assignments(cls, patches, self._teacher_temperature(step))
        on_cls = self._balanced(on_cls, self.center)
        return on_cls, None if on_patches is None else self._balanced(on_patches, self.ibot_center)

    def _balanced(self, assignment: Assignment, center: Center) -> Assignment:
        if self.options.centering == "sinkhorn_knopp":
            offsets = sinkhorn_knopp(assignment, self.options.sinkhorn_iterations, self.options.loss_chunk_rows)
            return assignment._replace(center=offsets)
        if self.training:
            center.observe(assignment.features, assignment.prototypes)
        return assignment._replace(center=center.center)

    def _student_tokens(
        self,
        global_crops: torch.Tensor,
        local_crops: torch.Tensor,
        masks: torch.Tensor | None,
        masked: torch.Tensor | None,
        all_patches: bool = False,
    ) -> CropTokens:
        crops = [crops.flatten(0, 1) for crops in (global_crops, local_crops) if len(crops)]
        read = [self._positions(pixels, index) for pixels, index in zip(crops, (masked, None))]
        if all_patches:
            whole, *local = forward_crops(self.student.backbone, crops, (masks, None), [None, *read[1:]])
            patches = whole[:, self.student.backbone.config.num_prefix_tokens :]
            tokens = whole.flatten(0, 1)[read[0]]
        else:
            tokens, *local = forward_crops(self.student.backbone, crops, (masks, None), read)
            patches = None
        num_crops = len(crops[0])
        cls = torch.cat([tokens[:num_crops], *local]).unflatten(0, (-1, global_crops.shape[1]))
        return CropTokens(cls, None if masked is None else tokens[num_crops:], patches)

    def _positions(self, pixels: torch.Tensor, masked: torch.Tensor | None) -> torch.Tensor:
        """Where CLS and masked patches are among all tokens of these crops."""
        config = self.student.backbone.config
        num_patches = (pixels.shape[-2] // config.patch_size) * (pixels.shape[-1] // config.patch_size)
        length = config.num_prefix_tokens + num_patches
        cls = torch.arange(len(pixels), device=pixels.device) * length
        if masked is None:
            return cls
        return torch.cat([cls, masked // num_patches * length + config.num_prefix_tokens + masked % num_patches])

    def _koleo(self, cls: torch.Tensor) -> torch.Tensor:
        """Of one global crop at a time: the two of an image are alike and should be."""
        return sum(koleo_loss(crop, self.options.koleo_across_processes) for crop in cls)

    def _gram(self, patches: torch.Tensor, gram_crops: torch.Tensor) -> torch.Tensor:
        """How the student's patches relate, against how the anchor's do at the student's resolution."""
        pixels = gram_crops.transpose(0, 1).flatten(0, 1)
        with torch.no_grad():
            anchor = self.gram_teacher(pixels).patch_tokens
            anchor = _resampled(anchor, pixels, self.gram_teacher.config.patch_size, patches.shape[1])
        return gram_loss(patches, anchor)

    def _health(self, on_cls: PrototypeLoss, on_patches: PrototypeLoss | None) -> dict[str, torch.Tensor]:
        """What shows a collapse, each as a share of the most it could be."""
        parts = {"": on_cls} if on_patches is None else {"": on_cls, "ibot_": on_patches}
        health = {}
        for prefix, part in parts.items():
            most = torch.tensor(float(len(part.mean_target))).log()
            health[f"{prefix}teacher_entropy"] = part.teacher_entropy / most
            health[f"{prefix}target_entropy"] = torch.special.entr(part.mean_target).sum() / most
        return health

    def after_step(self, step: int) -> None:
        """Teacher, centers, and where it is due the anchor."""
        momentum = cosine(step, self.total_steps, self.options.teacher_momentum, self.options.teacher_momentum_end)
        ema_update(self.teacher, self.student, momentum)
        if self.options.centering == "softmax":
            self.center.update()
            if self.options.masks_patches:
                self.ibot_center.update()
        if self.gram_teacher is not None and self._anchor_is_due(step + 1):
            ema_update(self.gram_teacher, self.teacher.backbone, 0.0)

    def _anchor_is_due(self, step: int) -> bool:
        """Whether the anchor becomes the teacher before this step: when anchoring starts, and at its updates."""
        since = step - self._gram_start()
        if since <= 0:
            return since == 0 and self.anchors_on_own_teacher
        every = self.options.gram_update_steps
        return bool(every) and since % every == 0 and since // every <= self.options.gram_max_updates

    def _gram_start(self) -> int:
        return round(self.options.gram_start_ratio * self.total_steps)

    def _teacher_temperature(self, step: int) -> float:
        warmup_steps = round(self.options.teacher_temperature_warmup_ratio * self.total_steps)
        return linear(step, warmup_steps, self.options.teacher_temperature_start, self.options.teacher_temperature)

    def exportable(self) -> ViTRegModel:
        """The teacher's backbone, which is the better one throughout training (DINO, section 5.2)."""
        return self.teacher.backbone

    def features(self) -> ViTRegModel:
        """The teacher's backbone."""
        return self.teacher.backbone

    def trained(self) -> dict[str, nn.Module]:
        """The student's backbone and heads."""
        return {name: module for name, module in self.student.named_children() if module is not None}


def _require_same_weights(anchor: ViTRegModel, backbone: ViTRegModel) -> None:
    """Raises `ValueError` where the teacher could not take the place of the anchor."""
    shapes = [{name: each.shape for name, each in model.named_parameters()} for model in (anchor, backbone)]
    different = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if different:
        raise ValueError(
            f"The Gram teacher has other weights than the model, {different[0]} first, and cannot be replaced by its "
            "teacher: set --gram_update_steps 0, or give a checkpoint of the same kind."
        )


def _resampled(patches: torch.Tensor, pixels: torch.Tensor, patch_size: int, num_patches: int) -> torch.Tensor:
    """Patch tokens of square crops, `(num_crops, P, hidden_size)`, on a square grid of `num_patches`, bicubic."""
    if patches.shape[1] == num_patches:
        return patches
    rows, cols = (side // patch_size for side in pixels.shape[-2:])
    side = round(num_patches**0.5)
    grid = patches.mT.unflatten(-1, (rows, cols))
    return F.interpolate(grid, (side, side), mode="bicubic", antialias=True).flatten(-2).mT
