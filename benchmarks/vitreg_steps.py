# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""DINOv2 by hf_vitreg, for `pretraining_step.py`, which starts it: what `pretrain.py` does between two batches."""

import itertools

import torch
from step_turns import Turns

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.data.masking import batch_masks
from hf_vitreg.matmul import use_fast_float32_matmul
from hf_vitreg.objectives.dino import DINOObjective
from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.training.cost import training_cost
from hf_vitreg.training.optim import Schedule, pretraining_optimizer


NUM_STEPS = 125_000  # that schedules are over


def recipe_of(setting: dict) -> PretrainRecipe:
    """The same losses, sizes and schedules as those of the other side."""
    return PretrainRecipe(
        per_device_train_batch_size=setting["batch_size"],
        patch_size=setting["patch_size"],
        drop_path_rate=setting["drop_path_rate"],
        pack_crops=setting["pack_crops"],
        gradient_checkpointing=setting["gradient_checkpointing"],
        global_crop_size=[setting["global_size"]],
        local_crop_size=[setting["local_size"]],
        num_local_crops=setting["num_local_crops"],
        num_prototypes=setting["num_prototypes"],
        head_mlp_size=setting["head_mlp_size"],
        head_bottleneck_size=setting["head_bottleneck_size"],
        separate_ibot_head=setting["separate_ibot_head"],
        ibot_num_prototypes=setting["num_prototypes"],
        ibot_head_mlp_size=setting["head_mlp_size"],
        ibot_head_bottleneck_size=setting["head_bottleneck_size"],
        centering=setting["centering"],
        train_prototype_norms=True,
        loss_chunk_rows=setting["loss_chunk_rows"],
        learning_rate=4e-3,
        learning_rate_scaling="sqrt",
        weight_decay_end=0.4,
        decay_tokens=True,
        layer_decay=0.9,
        patch_embed_lr_ratio=0.2,
        max_steps=NUM_STEPS,
    )


def main():
    turns = Turns()
    setting, device = turns.setting, turns.device
    if device.type == "cpu":
        use_fast_float32_matmul()
    recipe = recipe_of(setting)
    config = ViTRegConfig(
        hidden_size=setting["hidden_size"],
        num_hidden_layers=setting["num_hidden_layers"],
        num_attention_heads=setting["num_attention_heads"],
        patch_size=setting["patch_size"],
        image_size=setting["global_size"],
        num_register_tokens=4,
        layerscale_value=1e-5,
        drop_path_rate=setting["drop_path_rate"],
        use_mask_token=True,
    )
    backbone = ViTRegModel(config)
    if recipe.gradient_checkpointing:
        backbone.activation_checkpointing_enable()
    objective = DINOObjective(backbone, recipe, NUM_STEPS, recipe.drop_path_subset, recipe.pack_crops).to(device)
    cost = training_cost(recipe, objective)
    backbone_parameters = backbone.num_parameters()
    turns.say(
        backbone_parameters=backbone_parameters,
        head_parameters=sum(parameter.numel() for parameter in objective.student.parameters()) - backbone_parameters,
        flops_per_image=cost.flops_per_image,
    )
    optimizer = pretraining_optimizer(objective, config.num_hidden_layers, recipe)
    schedule = Schedule(recipe, NUM_STEPS, setting["batch_size"], recipe.freeze_last_layer_ratio)
    side = setting["global_size"] // setting["patch_size"]
    batches = turns.batches()
    for step in itertools.count():
        turns.wait()
        global_crops, local_crops = batches[step % len(batches)]
        masks = batch_masks(step, 2 * setting["batch_size"], side, side)
        batch = {
            "global_crops": global_crops,
            "local_crops": local_crops,
            "masks": masks.masks.to(device),
            "mask_indices": masks.indices.to(device),
            "mask_weights": masks.weights.to(device),
        }
        schedule.apply(optimizer, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=setting["precision"] == "bfloat16"):
            loss, metrics = objective(batch, step)
        loss.backward()
        for module in objective.trained().values():
            torch.nn.utils.clip_grad_norm_(module.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(step)
        losses = {name: float(value) for name, value in metrics.items() if name.endswith("loss")}
        turns.done({"train_loss": float(loss.detach()), **losses})


if __name__ == "__main__":
    main()
