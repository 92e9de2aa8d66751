# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a training step holds in the memory of a device and sends to the others, on paper."""

from typing import Literal

from ..pretrain_recipe import PretrainRecipe
from .cost import NUM_GLOBAL_CROPS, ObjectiveSizes, Transformer, kept_share, num_masked_patches, num_read_tokens


Strategy = Literal["ddp", "fsdp2"]
FLOAT32, HALF = 4, 2


def device_memory(
    recipe: PretrainRecipe, sizes: ObjectiveSizes, num_devices: int, strategy: Strategy = "ddp", half: bool = True
) -> dict[str, float]:
    """Bytes on one device by part, at the end of the forward pass, where most is held.

    Weights, gradients and moments are float32, as autocast and FSDP2's mixed precision keep them. What libraries need
    and what an allocator cannot use are not in it: plan for a tenth more.

    Args:
        recipe: Batch size of a device, crops and losses.
        sizes: Of the objective.
        num_devices: That share an FSDP model.
        strategy: `ddp` holds everything everywhere, `fsdp2` a share of weights, gradients and moments.
        half: Whether activations are of 2 bytes.
    """
    share = 1 / num_devices if strategy == "fsdp2" else 1.0
    trained, frozen = sum(sizes.trained.values()), sum(sizes.frozen.values())
    memory = {
        "weights": FLOAT32 * trained * share,
        "teacher or average": FLOAT32 * frozen * share,
        "gradients": FLOAT32 * trained * share,
        "optimizer": 2 * FLOAT32 * trained * share,
        "activations": _activations(recipe, sizes, half),
        "images": FLOAT32 * _num_pixels(recipe, sizes),
    }
    if recipe.objective == "dino":
        memory["heads and logits"] = _heads(recipe, sizes, half)
    if strategy == "fsdp2":
        memory["gathered weights"] = _gathered(sizes, half)
    elif num_devices > 1:
        # DDP sends gradients from buckets of their own
        memory["buckets"] = FLOAT32 * trained
    return memory


def _num_tokens(recipe: PretrainRecipe, sizes: ObjectiveSizes) -> list[float]:
    """Tokens that a layer of the student computes, for each kind of crop; the largest of the sizes a recipe has."""
    if recipe.objective != "dino":
        return [recipe.per_device_train_batch_size * (sizes.num_prefix_tokens + sizes.num_patches(recipe.image_size))]
    kinds = ((NUM_GLOBAL_CROPS, max(recipe.global_crop_size)), (recipe.num_local_crops, max(recipe.local_crop_size)))
    return [
        num_crops * recipe.per_device_train_batch_size * (sizes.num_prefix_tokens + sizes.num_patches(image_size))
        for num_crops, image_size in kinds
    ]


def _activations(recipe: PretrainRecipe, sizes: ObjectiveSizes, half: bool) -> float:
    """What layers keep for the backward pass."""
    num_tokens = _num_tokens(recipe, sizes)
    if recipe.objective == "dino":
        of_layer, of_last = _kept_of_crops(recipe, sizes, num_tokens, half)
    else:
        is_frozen = recipe.objective == "post_hoc"
        of_layer = num_tokens[0] * _kept_by_layer(sizes.vision, half, is_frozen)
        of_last = num_tokens[0] * _kept_by_layer(sizes.vision, half)
    kept = of_layer * (sizes.vision.num_layers - 1) + of_last
    if recipe.gradient_checkpointing:
        # what a layer keeps is there for one layer at a time
        kept = of_layer + sum(num_tokens) * sizes.vision.num_layers * sizes.vision.hidden_size * FLOAT32
    if sizes.text is not None:
        num_of_text = recipe.per_device_train_batch_size * recipe.text_max_length
        kept += num_of_text * _kept_by_layer(sizes.text, half) * sizes.text.num_layers
    return kept


def _kept_by_layer(stack: Transformer, half: bool, is_frozen: bool = False) -> float:
    """Bytes of a token. In units of the width: what both norms read (2, always float32); normed tokens, which queries,
    keys and values copy under autocast each for itself (2, or 4); queries, keys, values and what was attended (4);
    both branches for the gradient of LayerScale (2); in units of the MLP's, before and after GELU, or SwiGLU's four.
    Weights that are frozen need no gradient, and what they are multiplied with is not kept.
    """
    num_of_mlp = (2 if stack.mlp_products == 2 else 4) - is_frozen
    num_of_width = 4 if is_frozen else (4 if half else 2) + 4 + 2 * stack.has_layerscale
    size = HALF if half else FLOAT32
    return 2 * FLOAT32 * stack.hidden_size + size * (num_of_width * stack.hidden_size + num_of_mlp * stack.mlp_size)


def _kept_of_crops(
    recipe: PretrainRecipe, sizes: ObjectiveSizes, num_tokens: list[float], half: bool
) -> tuple[float, float]:
    """Bytes of all crops in a layer, which computes most of what others keep again, and in the last one.

    In units of the width: what both norms read (2, always float32); queries, keys, values and what was attended (4),
    again where the crops' are put together (1), or where the last layer picks what is read (1); in units of the MLP's,
    before GELU, or both of SwiGLU's.
    """
    stack, size = sizes.vision, HALF if half else FLOAT32
    shares = (kept_share(recipe, num_crops) for num_crops in (NUM_GLOBAL_CROPS, recipe.num_local_crops))
    num_kept = [tokens * share for tokens, share in zip(num_tokens, shares)]
    of_mlp = FLOAT32 * stack.hidden_size + size * (stack.mlp_products - 1) * stack.mlp_size
    of_attention = (FLOAT32 + 4 * size) * stack.hidden_size
    of_packing = size * stack.hidden_size
    of_layer = sum(num_kept) * (of_attention + recipe.pack_crops * of_packing + of_mlp)
    num_read = recipe.per_device_train_batch_size * recipe.num_local_crops
    if recipe.gram_weight:
        num_read += num_kept[0]
    else:
        num_read += recipe.per_device_train_batch_size * NUM_GLOBAL_CROPS * num_read_tokens(recipe, sizes)
    return of_layer, sum(num_kept) * of_attention + num_read * (of_packing + of_mlp)


def _num_pixels(recipe: PretrainRecipe, sizes: ObjectiveSizes) -> float:
    if recipe.objective != "dino":
        values = recipe.image_size**2
    else:
        crop = max(recipe.global_crop_size) ** 2 + max([0, *recipe.gram_crop_size]) ** 2
        values = NUM_GLOBAL_CROPS * crop + recipe.num_local_crops * max(recipe.local_crop_size) ** 2
    return recipe.per_device_train_batch_size * sizes.num_channels * values


def prototype_sizes(recipe: PretrainRecipe) -> list[tuple[int, int]]:
    """Number and width of the prototypes of each head."""
    heads = [(recipe.num_prototypes, recipe.head_bottleneck_size)]
    if recipe.separate_ibot_head and recipe.ibot_weight:
        heads.append((recipe.ibot_num_prototypes, recipe.ibot_head_bottleneck_size))
    return heads


def _heads(recipe: PretrainRecipe, sizes: ObjectiveSizes, half: bool) -> float:
    """Normed prototypes of student and teacher, their gradient of each loss, a chunk's logits, the heads' rows."""
    heads = prototype_sizes(recipe)
    num_losses = 2 if recipe.ibot_weight else 1
    prototypes = sum(number * width for number, width in heads) * FLOAT32
    gradients = num_losses / len(heads) * prototypes
    logits = recipe.loss_chunk_rows * max(number for number, _ in heads) * FLOAT32
    rows = NUM_GLOBAL_CROPS + recipe.num_local_crops + num_masked_patches(recipe, sizes)
    kept = 2 * (recipe.head_num_layers - 1) * recipe.head_mlp_size * (HALF if half else FLOAT32)
    return 2 * prototypes + gradients + logits + recipe.per_device_train_batch_size * rows * kept


def _gathered(sizes: ObjectiveSizes, half: bool) -> float:
    """Whole weights that FSDP2 has at a time: of two layers, one ahead, and of all that is in no layer."""
    stacks = [stack for stack in (sizes.vision, sizes.text) if stack is not None]
    in_layers = sum(stack.num_layers * stack.layer_weights for stack in stacks)
    outside = sum(max(0, sum(part.values()) - in_layers) for part in (sizes.trained, sizes.frozen))
    return (HALF if half else FLOAT32) * (2 * max(stack.layer_weights for stack in stacks) + outside)


def step_communication(
    recipe: PretrainRecipe, sizes: ObjectiveSizes, num_devices: int, strategy: Strategy = "ddp", half: bool = True
) -> dict[str, float]:
    """Bytes that a device sends in a step, by purpose, with collectives that go around a ring.

    Reducing a tensor on all of N devices sends 2 (N - 1) / N of its size, gathering or scattering it (N - 1) / N.

    Args:
        recipe: Losses and batch size.
        sizes: Of the objective.
        num_devices: Of the run.
        strategy: As in `device_memory`.
        half: Whether FSDP2 sends weights and gradients in 2 bytes; DDP's gradients have 4.
    """
    around = (num_devices - 1) / num_devices
    trained, frozen = sum(sizes.trained.values()), sum(sizes.frozen.values())
    if strategy == "ddp":
        sent = {"gradients": 2 * around * FLOAT32 * trained}
    else:
        size = HALF if half else FLOAT32
        # whole weights are let go after a layer's forward pass; averages that only follow are never gathered
        gathers = 2 * trained + (frozen if recipe.objective == "dino" else 0)
        if recipe.objective == "post_hoc":
            gathers += 2 * sizes.frozen["student"] + recipe.num_views * sizes.frozen["teacher"]
        sent = {"weights": around * size * gathers, "gradients": around * size * trained}
    if recipe.objective == "dino":
        sent["targets"] = 2 * around * FLOAT32 * _num_statistics(recipe)
        if recipe.koleo_across_processes:
            sent["KoLeo"] = NUM_GLOBAL_CROPS * _gathered_features(recipe, sizes.vision.hidden_size, num_devices)
    if recipe.objective == "clip":
        sent["features"] = 2 * _gathered_features(recipe, recipe.projection_dim, num_devices)
    return sent


def _num_statistics(recipe: PretrainRecipe) -> int:
    """Numbers that processes reduce for centers, or for Sinkhorn-Knopp, whose sums of exponentials need a maximum."""
    num_prototypes = sum(number for number, _ in prototype_sizes(recipe))
    if not (recipe.separate_ibot_head or not recipe.ibot_weight):
        num_prototypes *= 2
    return num_prototypes * (2 * recipe.sinkhorn_iterations if recipe.centering == "sinkhorn_knopp" else 1)


def _gathered_features(recipe: PretrainRecipe, width: int, num_devices: int) -> float:
    """Features of all devices, and their gradient, which is reduced on all."""
    gathered = FLOAT32 * recipe.per_device_train_batch_size * width
    return (num_devices - 1) * gathered + 2 * (num_devices - 1) * gathered
