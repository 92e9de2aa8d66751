# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.

import dataclasses

import pytest
import torch

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.objectives.dino import DINOObjective
from hf_vitreg.objectives.post_hoc import PostHocObjective
from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.registers.warm_start import add_registers
from hf_vitreg.training.cost import ObjectiveSizes, Transformer, num_masked_patches
from hf_vitreg.training.footprint import device_memory, step_communication


RECIPE = PretrainRecipe(
    hidden_size=48,
    num_hidden_layers=5,
    num_attention_heads=3,
    patch_size=4,
    global_crop_size=[44],
    local_crop_size=[20],
    num_local_crops=4,
    num_prototypes=211,
    head_mlp_size=52,
    head_bottleneck_size=20,
    per_device_train_batch_size=5,
)
# trained and frozen parameters that are easy to reckon with
SIZES = ObjectiveSizes(
    Transformer(48, 5, 192, has_layerscale=True),
    4,
    3,
    5,
    trained={"backbone": 900, "head": 100},
    frozen={"teacher": 600},
)


def kept_bytes(objective: DINOObjective, recipe: PretrainRecipe) -> int:
    """What the student's pass over its crops keeps for the backward pass beside its parameters."""
    kept = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    crops = [torch.randn(number, 5, 3, size, size) for number, size in ((2, 44), (recipe.num_local_crops, 20))]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masked = torch.arange(round(5 * num_masked_patches(recipe, ObjectiveSizes.of(objective))))
        masks = torch.zeros(10, 121, dtype=torch.bool)
        objective._student_tokens(*crops, masks, masked, all_patches=bool(recipe.gram_weight))
    for parameter in objective.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_swiglu_ffn": True},
        {"drop_path_rate": 0.4},
        {"drop_path_rate": 0.4, "drop_path_subset": False},
        {"pack_crops": True, "drop_path_rate": 0.4},
        {"gram_weight": 1.0},
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    config = ViTRegConfig(
        hidden_size=48,
        num_hidden_layers=5,
        num_attention_heads=3,
        patch_size=4,
        image_size=44,
        layerscale_value=1e-5,
        use_mask_token=True,
        use_swiglu_ffn=recipe.use_swiglu_ffn,
        drop_path_rate=recipe.drop_path_rate,
    )
    objective = DINOObjective(ViTRegModel(config), recipe, 10, recipe.drop_path_subset, recipe.pack_crops)
    on_paper = device_memory(recipe, ObjectiveSizes.of(objective), 1, half=False)["activations"]
    # the final norm, and a number a token and head of the attention, are left out
    assert on_paper == pytest.approx(kept_bytes(objective, recipe), rel=0.06)
    assert on_paper < kept_bytes(objective, recipe)


def test_fsdp_shares_weights_gradients_and_moments():
    one = device_memory(RECIPE, SIZES, 1, "fsdp2")
    many = device_memory(RECIPE, SIZES, 8, "fsdp2")
    for part in ("weights", "teacher or average", "gradients", "optimizer"):
        assert many[part] == one[part] / 8
    assert many["activations"] == one["activations"]
    assert one["weights"] == 4 * 1000
    assert one["optimizer"] == 8 * 1000


def test_ddp_holds_all_of_it_and_its_buckets():
    alone, among_four = (device_memory(RECIPE, SIZES, number, "ddp") for number in (1, 4))
    assert among_four == {**alone, "buckets": 4 * 1000}


def test_checkpointing_keeps_what_enters_the_layers_and_one_layer():
    recipe = dataclasses.replace(RECIPE, gradient_checkpointing=True)
    checkpointed = device_memory(recipe, SIZES, 1, half=False)["activations"]
    num_tokens = 5 * (2 * (5 + 121) + 4 * (5 + 25))
    # a layer keeps six of the width and one of the MLP's
    assert checkpointed == num_tokens * 4 * (6 * 48 + 192) + 5 * num_tokens * 48 * 4


def test_ddp_sends_each_gradient_around_the_ring():
    sent = step_communication(RECIPE, SIZES, 4, "ddp")
    assert sent["gradients"] == 2 * 3 / 4 * 4 * 1000
    # centers of CLS and of patches
    assert sent["targets"] == 2 * 3 / 4 * 4 * 2 * 211
    assert all(number == 0 for number in step_communication(RECIPE, SIZES, 1, "ddp").values())


def test_fsdp_sends_weights_for_each_pass_and_the_teachers_once():
    sent = step_communication(RECIPE, SIZES, 4, "fsdp2")
    assert sent["weights"] == 3 / 4 * 2 * (2 * 1000 + 600)
    assert sent["gradients"] == 3 / 4 * 2 * 1000


def test_sinkhorn_sends_a_maximum_and_a_sum_each_time():
    recipe = dataclasses.replace(
        RECIPE, centering="sinkhorn_knopp", sinkhorn_iterations=5, separate_ibot_head=True, ibot_num_prototypes=101
    )
    assert step_communication(recipe, SIZES, 2, "ddp")["targets"] == 4 * 2 * 5 * (211 + 101)


def test_contrast_sends_features_and_their_gradients():
    recipe = dataclasses.replace(RECIPE, objective="clip", projection_dim=14)
    sizes = dataclasses.replace(SIZES, text=Transformer(12, 2, 48))
    sent = step_communication(recipe, sizes, 3, "ddp")
    # images and texts; a gather sends to two others, and the gradient of all is reduced
    assert sent["features"] == 2 * (2 + 2 * 2) * 4 * 5 * 14
    assert "targets" not in sent


@pytest.mark.parametrize("use_swiglu_ffn", [False, True])
def test_frozen_layers_keep_what_their_inputs_gradient_needs(use_swiglu_ffn):
    recipe = dataclasses.replace(RECIPE, objective="post_hoc", image_size=44)
    sizes = {"hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 3, "patch_size": 4, "image_size": 44}
    config = ViTRegConfig(**sizes, layerscale_value=1e-5, use_swiglu_ffn=use_swiglu_ffn, num_register_tokens=0)
    teacher = ViTRegModel(config)
    objective = PostHocObjective(teacher, add_registers(teacher, 4), recipe, torch.zeros(3))
    kept = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective.student(torch.randn(5, 3, 44, 44))
    for parameter in objective.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    on_paper = device_memory(recipe, ObjectiveSizes.of(objective), 1, half=False)["activations"]
    assert on_paper == pytest.approx(sum(kept.values()), rel=0.06)


def test_fsdp_gathers_the_teacher_for_each_view():
    recipe = dataclasses.replace(RECIPE, objective="post_hoc", num_views=7)
    sizes = dataclasses.replace(SIZES, trained={"student": 100}, frozen={"student": 500, "teacher": 590})
    sent = step_communication(recipe, sizes, 4, "fsdp2")
    assert sent["weights"] == 3 / 4 * 2 * (2 * 600 + 7 * 590)
    assert sent["gradients"] == 3 / 4 * 2 * 100
