# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What each objective needs of data, how its model is measured, and what is written of it."""

import abc
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.augmentations import clip_transform, post_hoc_transform
from ..data.captions import CaptionCollate, load_or_train_tokenizer
from ..data.collate import collate
from ..data.deit3 import label_mixing, supervised_transform
from ..data.multicrop import CropFinish, MultiCropTransform
from ..data.pretraining_data import KNNData, PretrainingData
from ..distributed import derived_seed
from ..evaluation.monitoring import Measuring, classifier_accuracy, measure_features, zero_shot_accuracy
from ..hub.card import CardFacts
from ..hub.export import write_model_repository
from ..objectives.base import Objective
from ..objectives.clip import CLIPObjective
from ..objectives.dino import DINOObjective
from ..objectives.post_hoc import PostHocObjective
from ..objectives.supervised import SupervisedObjective
from ..objectives.text_towers import text_tower
from ..pretrain_recipe import PretrainRecipe
from ..registers.post_hoc import draw_views
from ..teachers import load_classifier
from .models import build_backbone, build_classifier, build_with_new_registers, load_backbone, load_heads


Batch = dict[str, torch.Tensor]
TOKENIZER_CAPTIONS = 200_000


class Method(abc.ABC):
    """The parts of a run that differ between objectives.

    Args:
        recipe: Of the run.
        data: What `wants` asked for.
        processor: What images go through at evaluation.
        accelerator: Of the processes.
        folder: Of the run, for what it has to find again when it goes on.

    Attributes:
        wants: What is read beside images.
        best_metric: What chooses the best checkpoint, the higher the better.
    """

    wants: str
    best_metric: str

    def __init__(
        self,
        recipe: PretrainRecipe,
        data: PretrainingData,
        processor: BaseImageProcessor,
        accelerator: Accelerator,
        folder: Path,
    ):
        self.recipe = recipe
        self.data = data
        self.processor = processor
        self.accelerator = accelerator
        self.folder = folder

    @property
    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of pixels."""
        return self.processor.image_mean, self.processor.image_std

    @abc.abstractmethod
    def transform(self) -> Callable:
        """From an image to the tensors of a sample."""

    def collate(self) -> Callable[[list[dict]], Batch]:
        """From samples to a batch."""
        return collate

    def finish(self, objective: Objective) -> Callable[[Batch, int], Batch]:
        """What a batch gets in the training process, by its number."""
        return lambda batch, number: batch

    @abc.abstractmethod
    def objective(self, total_steps: int) -> Objective:
        """What is trained."""

    def held_back(self) -> dict[str, float]:
        """Shares of the steps in which some parameters stay, as `training.optim.Schedule` takes them."""
        return {}

    def measure(self, objective: Objective, knn: KNNData, how: Measuring) -> dict[str, float]:
        """Of held-out images: outliers, and where they have labels nearest neighbours. Collective."""
        return measure_features(objective.features(), knn.validation, knn.train, how)

    def write(
        self, folder: Path, model: PreTrainedModel, facts: CardFacts, files: Mapping, state_dict: Mapping
    ) -> None:
        """The repository of what was trained."""
        write_model_repository(folder, model, self.processor, facts, files, state_dict)


class DINOMethod(Method):
    wants = "images"
    best_metric = "knn_accuracy"

    def transform(self) -> Callable:
        return MultiCropTransform(self.recipe, *self.statistics)

    def finish(self, objective: Objective) -> Callable[[Batch, int], Batch]:
        return CropFinish(
            self.recipe,
            objective.features().config.patch_size,
            self.recipe.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.recipe.per_device_train_batch_size,
        )

    def objective(self, total_steps: int) -> Objective:
        recipe = self.recipe
        backbone = build_backbone(recipe, use_mask_token=recipe.masks_patches)
        anchor = load_backbone(recipe.gram_teacher) if recipe.gram_weight and recipe.gram_teacher else None
        objective = DINOObjective(backbone, recipe, total_steps, recipe.drop_path_subset, recipe.pack_crops, anchor)
        if recipe.model_name_or_path is not None:
            for network in (objective.student, objective.teacher):
                load_heads(network, recipe.model_name_or_path, recipe.revision)
        return objective

    def held_back(self) -> dict[str, float]:
        return {
            "frozen_last_layer_ratio": self.recipe.freeze_last_layer_ratio,
            "head_warmup_ratio": self.recipe.head_warmup_ratio,
        }


class SupervisedMethod(Method):
    wants = "labels"
    best_metric = "validation_accuracy"

    def transform(self) -> Callable:
        return supervised_transform(self.recipe, self.recipe.image_size, *self.statistics)

    def finish(self, objective: Objective) -> Callable[[Batch, int], Batch]:
        num_labels = len(self.data.class_names)
        return label_mixing(self.recipe, num_labels, self.recipe.seed, self.accelerator.process_index)

    def objective(self, total_steps: int) -> Objective:
        recipe, teacher = self.recipe, None
        settings = {"classifier_layout": recipe.classifier_layout}
        if recipe.distillation_teacher:
            settings = {"classifier_layout": "cls_distillation", "use_distillation_token": True}
            teacher = load_classifier(recipe.distillation_teacher, self.data.class_names, *self.statistics)
            teacher = teacher.to(self.accelerator.device)
        model = build_classifier(recipe, self.data.class_names, **settings)
        return SupervisedObjective(model, recipe, recipe.ema_decay, teacher)

    def measure(self, objective: Objective, knn: KNNData, how: Measuring) -> dict[str, float]:
        measured = super().measure(objective, knn, how)
        if knn.train is None:
            return measured
        return {**measured, **classifier_accuracy(objective.exportable(), knn.validation, how)}


class CLIPMethod(Method):
    wants = "captions"
    best_metric = "zero_shot_accuracy"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        kept = self.folder / "tokenizer"
        with self.accelerator.main_process_first():
            if self.accelerator.is_main_process and not self.recipe.resume_from_checkpoint:
                shutil.rmtree(kept, ignore_errors=True)  # of a run that this one takes the place of
            self.tokenizer = load_or_train_tokenizer(self.recipe, captions(self.data), kept)

    def transform(self) -> Callable:
        return clip_transform(self.recipe, self.recipe.image_size, *self.statistics)

    def collate(self) -> Callable[[list[dict]], Batch]:
        return CaptionCollate(self.tokenizer, self.recipe.text_max_length)

    def objective(self, total_steps: int) -> Objective:
        vision = build_backbone(self.recipe, projection_dim=self.recipe.projection_dim)
        return CLIPObjective(vision, text_tower(self.recipe, self.tokenizer), self.recipe, self.recipe.ema_decay)

    def measure(self, objective: Objective, knn: KNNData, how: Measuring) -> dict[str, float]:
        measured = super().measure(objective, knn, how)
        if knn.train is None:
            return measured
        template = self.recipe.caption_template or "a photo of a {}."
        model = objective.exportable()
        return {**measured, **zero_shot_accuracy(model, self.tokenizer, knn.validation, how, template)}

    def write(
        self, folder: Path, model: PreTrainedModel, facts: CardFacts, files: Mapping, state_dict: Mapping
    ) -> None:
        write_model_repository(folder, model, self.processor, facts, files, state_dict, tokenizer=self.tokenizer)


class PostHocMethod(Method):
    wants = "images"
    # what registers must not cost: nothing of CLS is distilled
    best_metric = "knn_accuracy"

    def transform(self) -> Callable:
        return post_hoc_transform(self.recipe, self.recipe.image_size, *self.statistics)

    def finish(self, objective: Objective) -> Callable[[Batch, int], Batch]:
        recipe, patch_size = self.recipe, objective.features().config.patch_size
        grid_size = (recipe.image_size // patch_size,) * 2
        batch_size = recipe.per_device_train_batch_size
        # those of a process are a part of those that one process draws for the global batch
        own = slice(self.accelerator.process_index * batch_size, (self.accelerator.process_index + 1) * batch_size)
        num_images = self.accelerator.num_processes * batch_size

        def finish(batch: Batch, number: int) -> Batch:
            generator = torch.Generator().manual_seed(derived_seed(recipe.seed, number))
            options = recipe.num_views, grid_size, recipe.max_view_shift, recipe.view_flip
            views = draw_views(num_images, *options, generator)
            return {**batch, "view_shifts": views.shifts[own], "view_flips": views.flips[own]}

        return finish

    def objective(self, total_steps: int) -> Objective:
        teacher, student = build_with_new_registers(self.recipe)
        mean, std = map(torch.tensor, self.statistics)
        return PostHocObjective(teacher, student, self.recipe, (self.recipe.view_fill - mean) / std)


def captions(data: PretrainingData) -> Iterable[str]:
    """All texts, or of a stream as many as show what words there are."""
    if data.num_images is not None:
        return data.dataset["caption"]
    return (row["caption"] for row in data.dataset.take(TOKENIZER_CAPTIONS))


METHODS = {"dino": DINOMethod, "supervised": SupervisedMethod, "clip": CLIPMethod, "post_hoc": PostHocMethod}
