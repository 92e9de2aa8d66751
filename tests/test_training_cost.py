# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.

import contextlib
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel
from hf_vitreg.data.masking import batch_masks
from hf_vitreg.objectives.clip import CLIPObjective
from hf_vitreg.objectives.dino import DINOObjective
from hf_vitreg.objectives.post_hoc import PostHocObjective
from hf_vitreg.objectives.supervised import SupervisedObjective
from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.registers.post_hoc import draw_views
from hf_vitreg.registers.warm_start import add_registers
from hf_vitreg.training import cost
from hf_vitreg.training.cost import ObjectiveSizes, Transformer, training_cost


BATCH_SIZE = 5
RECIPE = PretrainRecipe(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    patch_size=4,
    image_size=28,
    global_crop_size=[28],
    local_crop_size=[12],
    num_local_crops=3,
    num_prototypes=211,
    head_mlp_size=52,
    head_bottleneck_size=20,
    ibot_num_prototypes=101,
    ibot_head_mlp_size=44,
    ibot_head_bottleneck_size=12,
    per_device_train_batch_size=BATCH_SIZE,
    projection_dim=14,
)
# the counter knows these by their other names only
IN_PLACE = {
    torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1],
    torch.ops.aten.baddbmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * left[2] * right[2],
}


def config(recipe: PretrainRecipe, **settings) -> ViTRegConfig:
    names = "hidden_size num_hidden_layers num_attention_heads patch_size image_size use_swiglu_ffn drop_path_rate"
    sizes = {name: getattr(recipe, name) for name in names.split()}
    # eager: its products are counted on every device
    return ViTRegConfig(**sizes, num_register_tokens=2, attn_implementation="eager", **settings)


class NoTracker(contextlib.nullcontext):
    """In place of what hooks every module to know where it is, which makes the modules be called as they are."""

    parents = ("Global",)


def counted(objective: torch.nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Operations of a forward and a backward pass."""
    counter = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
    counter.mod_tracker = NoTracker()
    with counter:
        loss, _ = objective(batch, step=1)
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_swiglu_ffn": True},
        {"drop_path_rate": 0.3},
        {"drop_path_rate": 0.3, "drop_path_subset": False},
        {"pack_crops": True},
        {"separate_ibot_head": True, "centering": "sinkhorn_knopp", "sinkhorn_iterations": 2},
        {"head_num_layers": 1},
        {"head_num_layers": 4},
        {"ibot_weight": 0.0, "num_local_crops": 2},
        {"koleo_weight": 0.0},
        {"gram_weight": 1.0, "gram_crop_size": [40]},
        {"gradient_checkpointing": True, "drop_path_rate": 0.3},
    ],
    ids=str,
)
def test_dino_costs_what_the_counter_counts(changes, monkeypatch):
    recipe = dataclasses.replace(RECIPE, **changes)
    objective = DINOObjective(
        ViTRegModel(config(recipe, use_mask_token=True)), recipe, 10, recipe.drop_path_subset, recipe.pack_crops
    )
    if recipe.gradient_checkpointing:
        objective.student.backbone.activation_checkpointing_enable()
    masks = batch_masks(3, 2 * BATCH_SIZE, 7, 7)
    shapes = {"global_crops": (2, 28), "local_crops": (recipe.num_local_crops, 12), "gram_crops": (2, 40)}
    batch = {
        **{name: torch.randn(BATCH_SIZE, number, 3, size, size) for name, (number, size) in shapes.items()},
        "masks": masks.masks,
        "mask_indices": masks.indices,
        "mask_weights": masks.weights,
    }
    # blocks mask about as much as was asked for
    asked = cost.num_masked_patches(recipe, ObjectiveSizes.of(objective)) * BATCH_SIZE
    assert len(masks.indices) == pytest.approx(asked, rel=0.25) or not recipe.ibot_weight
    num_masked = len(masks.indices) / BATCH_SIZE if recipe.ibot_weight else 0.0
    monkeypatch.setattr(cost, "num_masked_patches", lambda *_: num_masked)
    found = training_cost(recipe, objective)
    expected = counted(objective, batch)
    assert (found.flops_per_image + found.recomputed_flops) * BATCH_SIZE == pytest.approx(expected, rel=1e-12)


def test_sizes_that_change_cost_their_mean():
    one, other = ({"global_crop_size": [size], "local_crop_size": [local]} for size, local in ((28, 12), (40, 20)))
    both = {"global_crop_size": [28, 40], "local_crop_size": [12, 20]}
    objective = DINOObjective(ViTRegModel(config(RECIPE, use_mask_token=True)), RECIPE, 10)
    single = [training_cost(dataclasses.replace(RECIPE, **sizes), objective).flops_per_image for sizes in (one, other)]
    mixed = training_cost(dataclasses.replace(RECIPE, **both), objective).flops_per_image
    assert mixed == pytest.approx(sum(single) / 2)


@pytest.mark.parametrize("layout", ["cls", "cls_mean", "cls_distillation"])
def test_labels_cost_what_the_counter_counts(layout):
    recipe = dataclasses.replace(RECIPE, objective="supervised")
    token = layout == "cls_distillation"
    settings = {"classifier_layout": layout, "use_distillation_token": token, "num_labels": 13}
    model = ViTRegForImageClassification(config(recipe, **settings))
    teacher = (lambda pixel_values: torch.randn(len(pixel_values), 13)) if token else None
    objective = SupervisedObjective(model, recipe, ema_decay=0.9, teacher=teacher)
    batch = {"pixel_values": torch.randn(BATCH_SIZE, 3, 28, 28), "labels": torch.arange(BATCH_SIZE)}
    found = training_cost(recipe, objective)
    assert found.flops_per_image * BATCH_SIZE == pytest.approx(counted(objective, batch), rel=1e-12)
    assert found.teacher_parameters == model.num_parameters()


@pytest.mark.parametrize("changes", [{}, {"use_swiglu_ffn": True}, {"gradient_checkpointing": True}], ids=str)
def test_registers_for_a_model_without_cost_what_the_counter_counts(changes):
    recipe = dataclasses.replace(RECIPE, objective="post_hoc", num_views=4, **changes)
    model_config = config(recipe)
    model_config.num_register_tokens = 0
    teacher = ViTRegModel(model_config)
    objective = PostHocObjective(teacher, add_registers(teacher, 5), recipe, torch.zeros(3))
    if recipe.gradient_checkpointing:
        objective.student.activation_checkpointing_enable()
    views = draw_views(BATCH_SIZE, 4, (7, 7), 0.3, 0.5, torch.Generator())
    pixel_values = torch.randn(BATCH_SIZE, 3, 28, 28)
    batch = {"pixel_values": pixel_values, "view_shifts": views.shifts, "view_flips": views.flips}
    found = training_cost(recipe, objective)
    total = (found.flops_per_image + found.recomputed_flops) * BATCH_SIZE
    assert total == pytest.approx(counted(objective, batch), rel=1e-12)
    assert found.teacher_parameters + sum(found.parameters.values()) == sum(
        model.num_parameters() for model in (teacher, objective.student)
    )


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_texts_cost_what_the_counter_counts(loss):
    recipe = dataclasses.replace(RECIPE, objective="clip", contrastive_loss=loss, text_max_length=11)
    text = CLIPTextConfig(
        vocab_size=31,
        hidden_size=12,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=11,
        projection_dim=14,
        bos_token_id=29,
        eos_token_id=30,
        attn_implementation="eager",
    )
    objective = CLIPObjective(ViTRegModel(config(recipe)), CLIPTextModelWithProjection(text), recipe)
    tokens = torch.randint(0, 29, (BATCH_SIZE, 11))
    batch = {
        "pixel_values": torch.randn(BATCH_SIZE, 3, 28, 28),
        "input_ids": torch.cat([tokens[:, 1:], torch.full((BATCH_SIZE, 1), 30)], dim=1),
        "attention_mask": torch.ones_like(tokens),
    }
    # how many images find their text is watched, no part of the method
    watched = 2 * BATCH_SIZE**2 * recipe.projection_dim
    found = training_cost(recipe, objective)
    assert found.flops_per_image * BATCH_SIZE == pytest.approx(counted(objective, batch) - watched, rel=1e-12)


def test_a_contrastive_loss_grows_with_the_processes():
    recipe = dataclasses.replace(RECIPE, objective="clip")
    sizes = ObjectiveSizes(
        Transformer(24, 3, 96), 4, 3, 3, text=Transformer(12, 2, 48), trained={"vision": 1}, frozen={}
    )
    one, four = (cost.cost_of_sizes(recipe, sizes, number).flops for number in (1, 4))
    assert four["contrastive loss"] == 4 * one["contrastive loss"]
    assert {**four, "contrastive loss": 0} == {**one, "contrastive loss": 0}


def test_sizes_are_read_without_weights():
    with torch.device("meta"):
        objective = DINOObjective(ViTRegModel(config(RECIPE, use_mask_token=True)), RECIPE, 10)
    sizes = ObjectiveSizes.of(objective)
    assert sizes.num_prefix_tokens == 3
    assert set(sizes.trained) == {"backbone", "head"}
    student = sum(parameter.numel() for parameter in objective.student.parameters())
    # the norms of the prototypes stay
    assert sum(sizes.trained.values()) == student - RECIPE.num_prototypes
    assert sum(sizes.frozen.values()) == student + RECIPE.num_prototypes
