# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The formulas of cost and memory beside what small models take here, for `scaling.py --check`."""

import dataclasses
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from timing import save
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from hf_vitreg.data.masking import batch_masks
from hf_vitreg.objectives.base import Objective
from hf_vitreg.objectives.clip import CLIPObjective
from hf_vitreg.objectives.dino import DINOObjective
from hf_vitreg.objectives.supervised import SupervisedObjective
from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.pretraining.models import build_backbone, build_classifier
from hf_vitreg.training.cost import ObjectiveSizes, training_cost
from hf_vitreg.training.footprint import device_memory


SMALL = PretrainRecipe(
    hidden_size=192,
    num_hidden_layers=6,
    patch_size=7,
    image_size=112,
    global_crop_size=[112],
    local_crop_size=[49],
    num_prototypes=8192,
    ibot_num_prototypes=4096,
    text_hidden_size=128,
    text_num_hidden_layers=4,
    text_num_attention_heads=4,
    text_max_length=32,
    text_vocab_size=1000,
    projection_dim=64,
    per_device_train_batch_size=8,
)
RECIPES = {
    "DINO": SMALL,
    "DINO, drop path 0.3": dataclasses.replace(SMALL, drop_path_rate=0.3),
    "DINO, Sinkhorn, two heads": dataclasses.replace(SMALL, centering="sinkhorn_knopp", separate_ibot_head=True),
    "DINO, SwiGLU, packed": dataclasses.replace(SMALL, use_swiglu_ffn=True, pack_crops=True),
    "DINO, checkpointing": dataclasses.replace(SMALL, gradient_checkpointing=True),
    "labels": dataclasses.replace(SMALL, objective="supervised"),
    "text": dataclasses.replace(SMALL, objective="clip"),
}
IN_PLACE = {
    torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1],
    torch.ops.aten.baddbmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * left[2] * right[2],
}


def check() -> None:
    """FLOPs and peak memory of a step, counted and on paper."""
    rows = {name: compare(recipe) for name, recipe in RECIPES.items()}
    table = Table(
        "", "GFLOP, paper", "counted", "ratio", "MB, paper", "peak", "ratio", title="Formulas and this machine"
    )
    for name, row in rows.items():
        flops, memory = (row["gflops_on_paper"], row["gflops_counted"]), (row["mb_on_paper"], row["mb_at_peak"])
        table.add_row(
            name,
            *(f"{value:.2f}" for value in (*flops, flops[0] / flops[1])),
            *(f"{value:.0f}" for value in memory),
            f"{memory[0] / memory[1]:.2f}",
        )
    Console().print(table)
    setting = f"one step in float32 of width {SMALL.hidden_size}, {SMALL.num_hidden_layers} layers, batch 8"
    save("scaling_check", torch.device("cpu"), setting=setting, checked=rows)


def compare(recipe: PretrainRecipe) -> dict[str, float]:
    torch.manual_seed(0)
    objective, batch = objective_and_batch(recipe)
    if recipe.gradient_checkpointing:
        objective.student.backbone.activation_checkpointing_enable()
    step = one_step(objective, batch)
    step()  # gradients and moments are there before memory is measured
    sizes = ObjectiveSizes.of(objective)
    cost = training_cost(recipe, objective)
    held = sum(tensor.numel() * 4 for tensor in [*objective.parameters(), *batch.values()])
    moments = 2 * 4 * sum(sizes.trained.values())
    peak = held + moments + peak_of_tensors(step)
    objective.features().set_attn_implementation("eager")  # its products are counted on a CPU
    for module in objective.modules():
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("eager")
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        step()
    on_paper = (cost.flops_per_image + cost.recomputed_flops) * recipe.per_device_train_batch_size
    return {
        "gflops_on_paper": on_paper / 1e9,
        "gflops_counted": counter.get_total_flops() / 1e9,
        "mb_on_paper": sum(device_memory(recipe, sizes, 1, half=False).values()) / 1e6,
        "mb_at_peak": peak / 1e6,
    }


def objective_and_batch(recipe: PretrainRecipe) -> tuple[Objective, dict[str, torch.Tensor]]:
    size, images = recipe.image_size, recipe.per_device_train_batch_size
    if recipe.objective == "dino":
        objective = DINOObjective(build_backbone(recipe, use_mask_token=True), recipe, 1, pack_crops=recipe.pack_crops)
        side = recipe.global_crop_size[0] // recipe.patch_size
        masks = batch_masks(0, 2 * images, side, side)
        return objective, {
            "global_crops": torch.randn(images, 2, 3, size, size),
            "local_crops": torch.randn(images, recipe.num_local_crops, 3, *recipe.local_crop_size * 2),
            "masks": masks.masks,
            "mask_indices": masks.indices,
            "mask_weights": masks.weights,
        }
    batch = {"pixel_values": torch.randn(images, 3, size, size)}
    if recipe.objective == "supervised":
        objective = SupervisedObjective(build_classifier(recipe, [str(label) for label in range(100)]), recipe)
        return objective, {**batch, "labels": torch.arange(images)}
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=recipe.text_vocab_size,
            hidden_size=recipe.text_hidden_size,
            intermediate_size=4 * recipe.text_hidden_size,
            num_hidden_layers=recipe.text_num_hidden_layers,
            num_attention_heads=recipe.text_num_attention_heads,
            max_position_embeddings=recipe.text_max_length,
            projection_dim=recipe.projection_dim,
            eos_token_id=recipe.text_vocab_size - 1,
        )
    )
    tokens = torch.full((images, recipe.text_max_length), recipe.text_vocab_size - 1)
    batch.update(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    return CLIPObjective(build_backbone(recipe), text, recipe), batch


def one_step(objective: Objective, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    parameters = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters)

    def step() -> None:
        loss, _ = objective(batch, 0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(0)

    return step


def peak_of_tensors(step: Callable[[], None]) -> int:
    """Bytes that a call allocates at most beyond what is there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
