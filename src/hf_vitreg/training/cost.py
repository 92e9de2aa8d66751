# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a training step computes, on paper: floating point operations by part, and parameters by module.

Matrix products and convolutions count, a multiplication and its addition as two operations. A product costs twice as
much in the backward pass as in the forward pass: the gradient of either factor is a product of that size.
"""

import dataclasses
import math
from typing import Any

from torch import nn

from ..objective_options import NUM_GLOBAL_CROPS
from ..pretrain_recipe import PretrainRecipe


@dataclasses.dataclass(frozen=True)
class Transformer:
    """Sizes of a stack of layers.

    Attributes:
        hidden_size: Width.
        num_layers: Depth.
        mlp_size: Width of the MLP.
        mlp_products: Linear layers of an MLP, 3 with SwiGLU.
        has_layerscale: Whether branches are scaled before they are added.
    """

    hidden_size: int
    num_layers: int
    mlp_size: int
    mlp_products: int = 2
    has_layerscale: bool = False

    @classmethod
    def of(cls, config: Any) -> "Transformer":
        """Of a config that names its sizes as transformers does."""
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.intermediate_size,
            mlp_products=3 if getattr(config, "use_swiglu_ffn", False) else 2,
            has_layerscale=getattr(config, "layerscale_value", None) is not None,
        )

    @property
    def layer_weights(self) -> int:
        """Entries of a layer's matrices."""
        return self.hidden_size * (4 * self.hidden_size + self.mlp_products * self.mlp_size)

    def weight_flops(self, num_tokens: int) -> float:
        """Of one sequence and the matrices of a layer."""
        return 2.0 * num_tokens * self.layer_weights

    def forward_flops(self, num_tokens: int) -> float:
        """Of one sequence through all layers."""
        attention = 4.0 * num_tokens**2 * self.hidden_size
        return self.num_layers * (self.weight_flops(num_tokens) + attention)

    def crop_flops(self, num_tokens: int, num_read: float | None, share: float = 1.0) -> float:
        """Of a crop of which some tokens are read, or all, where a share of the crops has residual branches.

        The last layer computes what is behind its attention for tokens that are read alone, dropped or not. (Of a
        model that norms CLS and patches apart it computes all.)
        """
        layers = share * self.forward_flops(num_tokens)
        if num_read is None:
            return layers
        behind_attention = 2.0 * (self.layer_weights - 3 * self.hidden_size**2)
        return layers + (num_read - share * num_tokens) * behind_attention


@dataclasses.dataclass(frozen=True)
class ObjectiveSizes:
    """What the cost of an objective depends on beside the recipe.

    Attributes:
        vision: The backbone's layers.
        patch_size: In pixels.
        num_channels: Of an image.
        num_prefix_tokens: CLS, distillation token and registers.
        num_register_tokens: Registers among them.
        text: Layers of the text tower.
        linear_layers: Weights of the classifiers or projections, which see one token of an image or text.
        trained: Parameters that have a gradient, by module.
        frozen: Those of teachers and moving averages.
    """

    vision: Transformer
    patch_size: int
    num_channels: int
    num_prefix_tokens: int
    num_register_tokens: int = 0
    text: Transformer | None = None
    linear_layers: int = 0
    trained: dict[str, int] = dataclasses.field(default_factory=dict)
    frozen: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, objective: nn.Module) -> "ObjectiveSizes":
        """Of an `objectives.base.Objective`, which may be on the meta device."""
        config = objective.features().config
        towers = getattr(objective, "towers", None)
        model = getattr(objective, "model", None)
        linear = [towers.vision.projection, towers.text.projection] if towers else []
        linear += [getattr(model, name, None) for name in ("classifier", "distillation_classifier")]
        return cls(
            vision=Transformer.of(config),
            patch_size=config.patch_size,
            num_channels=config.num_channels,
            num_prefix_tokens=config.num_prefix_tokens,
            num_register_tokens=config.num_register_tokens,
            text=Transformer.of(towers.text.model.config) if towers else None,
            linear_layers=sum(layer.weight.numel() for layer in linear if isinstance(layer, nn.Linear)),
            trained={name: _num_parameters(module, True) for name, module in objective.trained().items()},
            frozen={name: _num_parameters(module, False) for name, module in objective.named_children()},
        )

    def num_patches(self, image_size: int) -> int:
        return (image_size // self.patch_size) ** 2

    def patch_flops(self, image_size: int) -> float:
        """Of the patch embedding of an image."""
        pixels = self.num_patches(image_size) * self.patch_size**2
        return 2 * pixels * self.num_channels * self.vision.hidden_size

    def num_tokens(self, image_size: int) -> int:
        return self.num_prefix_tokens + self.num_patches(image_size)

    def layer_flops(self, image_size: int) -> float:
        """Of an image through all layers."""
        return self.vision.forward_flops(self.num_tokens(image_size))


def _num_parameters(module: nn.Module, trained: bool) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad == trained)


@dataclasses.dataclass(frozen=True)
class TrainingCost:
    """What an image costs in training, where all losses are on; a mean over the crop sizes of the recipe.

    Attributes:
        flops: Of an image, by part, forward and backward.
        recomputed_flops: Of what gradient checkpointing does again, of an image: no part of the utilisation.
        parameters: Those that learn, by module.
        teacher_parameters: Of teachers and moving averages.
    """

    flops: dict[str, float]
    recomputed_flops: float
    parameters: dict[str, int]
    teacher_parameters: int

    @property
    def flops_per_image(self) -> float:
        return sum(self.flops.values())


def training_cost(recipe: PretrainRecipe, objective: nn.Module, num_processes: int = 1) -> TrainingCost:
    """The cost of an image for an objective. A distillation teacher is not counted.

    Args:
        recipe: Crops, losses and batch size.
        objective: Read for its sizes, as `ObjectiveSizes.of` does.
        num_processes: Contrastive losses compare an image with the texts of all of them.
    """
    return cost_of_sizes(recipe, ObjectiveSizes.of(objective), num_processes)


def cost_of_sizes(recipe: PretrainRecipe, sizes: ObjectiveSizes, num_processes: int = 1) -> TrainingCost:
    """As `training_cost`, of sizes alone."""
    if recipe.objective == "dino":
        flops, student = _dino_flops(recipe, sizes)
    elif recipe.objective == "supervised":
        flops, student = _image_flops(recipe, sizes)
    elif recipe.objective == "post_hoc":
        flops, student = _post_hoc_flops(recipe, sizes)
    else:
        flops, student = _clip_flops(recipe, sizes, num_processes)
    recomputed = student if recipe.gradient_checkpointing else 0.0
    return TrainingCost(flops, recomputed, sizes.trained, sum(sizes.frozen.values()))


def _image_flops(recipe: PretrainRecipe, sizes: ObjectiveSizes) -> tuple[dict[str, float], float]:
    layers = sizes.layer_flops(recipe.image_size)
    # no gradient goes to pixels
    backbone = 2 * sizes.patch_flops(recipe.image_size) + 3 * layers
    return {"backbone": backbone, "linear layers": 6.0 * sizes.linear_layers}, layers


def _post_hoc_flops(recipe: PretrainRecipe, sizes: ObjectiveSizes) -> tuple[dict[str, float], float]:
    size, num_tokens = recipe.image_size, sizes.num_tokens(recipe.image_size)
    layers, patches = sizes.layer_flops(size), sizes.patch_flops(size)
    # the gradient goes through all layers to the registers, but the weights of the last one alone have one
    of_frozen = (sizes.vision.num_layers - 1) * sizes.vision.weight_flops(num_tokens)
    teacher = sizes.vision.forward_flops(num_tokens - sizes.num_register_tokens) + patches
    return {"teacher": recipe.num_views * teacher, "student": 2 * patches + 3 * layers - of_frozen}, layers


def _clip_flops(recipe: PretrainRecipe, sizes: ObjectiveSizes, num_processes: int) -> tuple[dict[str, float], float]:
    images, layers = _image_flops(recipe, sizes)
    text = sizes.text.forward_flops(recipe.text_max_length)
    num_pairs = recipe.per_device_train_batch_size * num_processes
    num_products = 2 if recipe.contrastive_loss == "clip" else 1
    contrastive = 6.0 * num_products * num_pairs * recipe.projection_dim
    return {**images, "text tower": 3 * text, "contrastive loss": contrastive}, layers


def _dino_flops(recipe: PretrainRecipe, sizes: ObjectiveSizes) -> tuple[dict[str, float], float]:
    parts, student = {}, 0.0
    of_global = num_read_tokens(recipe, sizes)
    crops = {
        "global crops": (recipe.global_crop_size, NUM_GLOBAL_CROPS, None if recipe.gram_weight else of_global),
        "local crops": (recipe.local_crop_size, recipe.num_local_crops, 1.0),
    }
    for name, (image_sizes, num_crops, num_read) in crops.items():
        share = kept_share(recipe, num_crops)
        of_crop = _mean(sizes.vision.crop_flops(sizes.num_tokens(size), num_read, share) for size in image_sizes)
        patches = num_crops * _mean(map(sizes.patch_flops, image_sizes))
        parts[f"student, {name}"] = 2 * patches + 3 * num_crops * of_crop
        student += num_crops * of_crop
    parts["teacher"] = NUM_GLOBAL_CROPS * _mean(
        sizes.vision.crop_flops(sizes.num_tokens(size), of_global) + sizes.patch_flops(size)
        for size in recipe.global_crop_size
    )
    parts.update(_head_flops(recipe, sizes))
    if recipe.gram_weight:
        parts["Gram teacher"], parts["Gram loss"] = _gram_flops(recipe, sizes)
    return parts, student


def kept_share(recipe: PretrainRecipe, num_crops: int) -> float:
    """Share of the crops of a batch that a residual branch is computed for."""
    if not (recipe.drop_path_rate and recipe.drop_path_subset):
        return 1.0
    num_images = num_crops * recipe.per_device_train_batch_size
    return max(1, int(num_images * (1 - recipe.drop_path_rate))) / max(1, num_images)


def num_masked_patches(recipe: PretrainRecipe, sizes: ObjectiveSizes) -> float:
    """Masked patches of an image, over its global crops: what is aimed at, and blocks fill most of it."""
    if not recipe.masks_patches:
        return 0.0
    num_patches = _mean(map(sizes.num_patches, recipe.global_crop_size))
    return NUM_GLOBAL_CROPS * recipe.mask_probability * sum(recipe.mask_ratio) / 2 * num_patches


def num_read_tokens(recipe: PretrainRecipe, sizes: ObjectiveSizes) -> float:
    """Tokens of a global crop that teacher and student compare: CLS and what is masked."""
    return 1 + num_masked_patches(recipe, sizes) / NUM_GLOBAL_CROPS


def _head_flops(recipe: PretrainRecipe, sizes: ObjectiveSizes) -> dict[str, float]:
    num_masked = num_masked_patches(recipe, sizes)
    num_student, width = NUM_GLOBAL_CROPS + recipe.num_local_crops, sizes.vision.hidden_size
    mlp = {"": _mlp_flops(width, recipe.head_mlp_size, recipe.head_bottleneck_size, recipe.head_num_layers)}
    logits = {"": 2.0 * recipe.head_bottleneck_size * recipe.num_prototypes}
    if recipe.separate_ibot_head:
        mlp["ibot"] = _mlp_flops(
            width, recipe.ibot_head_mlp_size, recipe.ibot_head_bottleneck_size, recipe.head_num_layers
        )
        logits["ibot"] = 2.0 * recipe.ibot_head_bottleneck_size * recipe.ibot_num_prototypes
    of_masked = mlp.get("ibot", mlp[""]), logits.get("ibot", logits[""])
    # the teacher's logits once for the loss, and for each iteration of Sinkhorn-Knopp
    passes = 1 + (recipe.sinkhorn_iterations if recipe.centering == "sinkhorn_knopp" else 0)
    return {
        "heads": (3 * num_student + NUM_GLOBAL_CROPS) * mlp[""] + 4 * num_masked * of_masked[0],
        # the gradient is taken with the logits at hand: nothing is computed twice
        "prototypes": (3 * num_student + passes * NUM_GLOBAL_CROPS) * logits[""]
        + (3 + passes) * num_masked * of_masked[1],
        "losses": _loss_flops(recipe, sizes, num_student, num_masked),
    }


def _mlp_flops(hidden_size: int, mlp_size: int, bottleneck_size: int, num_layers: int) -> float:
    if num_layers == 1:
        return 2.0 * hidden_size * bottleneck_size
    return 2.0 * (hidden_size * mlp_size + (num_layers - 2) * mlp_size**2 + mlp_size * bottleneck_size)


def _loss_flops(recipe: PretrainRecipe, sizes: ObjectiveSizes, num_student: int, num_masked: float) -> float:
    """Products of targets and log probabilities, in a loss and in its gradient; entropies; KoLeo's neighbours."""
    num_ibot_prototypes = recipe.ibot_num_prototypes if recipe.separate_ibot_head else recipe.num_prototypes
    of_cls = (2 * num_student + 1) * NUM_GLOBAL_CROPS * 2.0 * recipe.num_prototypes
    koleo = 2.0 * recipe.per_device_train_batch_size * sizes.vision.hidden_size if recipe.koleo_weight else 0.0
    return of_cls + num_masked * 3 * 2.0 * num_ibot_prototypes + NUM_GLOBAL_CROPS * koleo


def _gram_flops(recipe: PretrainRecipe, sizes: ObjectiveSizes) -> tuple[float, float]:
    image_sizes = recipe.gram_crop_size or recipe.global_crop_size
    teacher = NUM_GLOBAL_CROPS * _mean(sizes.layer_flops(size) + sizes.patch_flops(size) for size in image_sizes)
    products = _mean(2.0 * sizes.num_patches(size) ** 2 * sizes.vision.hidden_size for size in recipe.global_crop_size)
    return teacher, NUM_GLOBAL_CROPS * 4 * products


def _mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
