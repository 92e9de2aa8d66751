# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The dataclasses of a run: types, defaults and help of every flag, and how flags and YAML recipes become one of them.

Flags are those that users of the transformers examples type. A flag overrides the recipe given by `--config`, the
recipe overrides the default. Devices, precision and processes belong to `accelerate`.
"""

import dataclasses
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser


Recipe = TypeVar("Recipe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data

    Args:
        dataset_name: `digits` (built in, no download) or the id of a dataset on the Hub.
        dataset_config_name: Configuration of the Hub dataset.
        train_dir: Folder with one folder of images a class, in place of a dataset.
        validation_dir: The same for validation. Without it a part of the training images is held out.
        train_file: Parquet file or pattern with an image and a label column, in place of a dataset.
        validation_file: The same for validation.
        train_split: Split of the Hub dataset to train on.
        validation_split: Split to validate on. Where the dataset lacks it a part of the training split is held out.
        image_column: Column with the images.
        label_column: Column with the labels.
        validation_fraction: Share of the training images held out where there is no validation data, by class.
        max_train_samples: Train on this many images at the most, drawn at random.
        max_eval_samples: Validate on this many images at the most, drawn at random.
        on_bad_image: `raise` stops at an image that cannot be read and names it, `skip` names it and goes on.
        dataloader_num_workers: Processes that decode images; 0 decodes in the training process.
    """

    dataset_name: str = "digits"
    dataset_config_name: str | None = None
    train_dir: str | None = None
    validation_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    image_column: str = "image"
    label_column: str = "label"
    validation_fraction: float = 0.2
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    on_bad_image: Literal["raise", "skip"] = "raise"
    dataloader_num_workers: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Model

    Args:
        model_name_or_path: ViTReg checkpoint to start from, a folder or a Hub id. Without it a new model is made, of
            the sizes that follow.
        revision: Branch, tag or commit of the Hub checkpoint.
        hidden_size: Width of a new model.
        num_hidden_layers: Depth of a new model.
        num_attention_heads: Attention heads of a new model.
        patch_size: Patch size of a new model, in pixels.
        num_register_tokens: Register tokens of a new model.
        register_init_std: Standard deviation of a new model's CLS and registers. With DINOv3's 0.02 they are apart
            from the start; with DINOv2's 1e-6 they part slowly, and hardly in a short run.
        image_size: Height and width of the images that the model sees, in pixels. Default: the checkpoint's, or 32.
        classifier_layout: What the classifier reads. Default: the checkpoint's, or `cls_mean`.
        drop_path_rate: Stochastic depth.
        ignore_mismatched_sizes: Replace the classifier of a checkpoint that has another number of classes.
        freeze_backbone: Train the classifier only.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        attn_implementation: Attention of transformers to use, such as `sdpa`, `eager` or `flash_attention_2`.
    """

    model_name_or_path: str | None = None
    revision: str | None = None
    hidden_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 3
    patch_size: int = 8
    num_register_tokens: int = 4
    register_init_std: float = 0.02
    image_size: int | None = None
    classifier_layout: Literal["cls", "cls_mean", "last4_cls_mean"] | None = None
    drop_path_rate: float = 0.0
    ignore_mismatched_sizes: bool = False
    freeze_backbone: bool = False
    gradient_checkpointing: bool = False
    attn_implementation: str = "sdpa"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationOptions:
    """Augmentation

    Args:
        random_crop_min_scale: Smallest share of the image that the random crop keeps; 1 crops nothing.
        horizontal_flip: Probability of a horizontal flip. 0 suits digits and text, 0.5 photographs.
        rand_augment_num_ops: Operations of RandAugment an image; 0 is off.
        rand_augment_magnitude: Their strength, 0 to 30.
        mixup_alpha: Beta parameter of mixup; 0 is off.
        cutmix_alpha: Beta parameter of cutmix; 0 is off. Where both are on, each batch draws one.
        label_smoothing_factor: Share of the target spread over all classes.
    """

    random_crop_min_scale: float = 0.8
    horizontal_flip: float = 0.0
    rand_augment_num_ops: int = 0
    rand_augment_magnitude: int = 9
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    label_smoothing_factor: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer

    Args:
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of weight matrices. Biases, norms and LayerScale have none.
        decay_tokens: Decay CLS, registers, mask token and position embeddings too, as DINOv2 does and timm does not.
        layer_decay: Factor on the learning rate for each layer further from the classifier; 1 is off.
        adam_beta1: First AdamW coefficient.
        adam_beta2: Second AdamW coefficient.
        max_grad_norm: Largest norm of the gradient; 0 does not clip.
        warmup_ratio: Share of the steps over which the learning rate rises from 0, before it falls as a cosine.
        min_learning_rate_ratio: Learning rate at the end, as a share of the peak.
        ema_decay: Decay of the moving average of the weights, which is then evaluated and saved; 0 is off.
        gradient_accumulation_steps: Batches whose gradients make one step.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    decay_tokens: bool = False
    layer_decay: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    warmup_ratio: float = 0.1
    min_learning_rate_ratio: float = 0.01
    ema_decay: float = 0.0
    gradient_accumulation_steps: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Run

    Args:
        output_dir: Folder for the model repository, the checkpoints and the logs. Default: `runs/` and the name of
            the data, with a number where that folder is there already.
        overwrite_output_dir: Start anew in an output_dir that is not empty.
        num_train_epochs: Passes over the training images.
        max_steps: Optimizer steps, in place of epochs.
        per_device_train_batch_size: Training images a device and batch.
        per_device_eval_batch_size: Validation images a device and batch.
        eval_steps: Steps between evaluations. Default: an epoch.
        save_steps: Steps between checkpoints. Default: an epoch.
        logging_steps: Steps between log lines.
        save_total_limit: Checkpoints to keep, beside the best one.
        resume_from_checkpoint: `latest`, or the folder of a checkpoint, to go on from.
        seed: Seed of initialization, order, augmentation and stochastic depth.
        report_to: Trackers of Accelerate, such as `tensorboard`, `wandb` or `trackio`, separated by commas.
        push_to_hub: Publish the model on the Hub at the end.
        hub_model_id: Repository to publish to, as `name` or `organization/name`.
        hub_private: Make that repository private.
        license: Licence of the weights, for the model card.
    """

    output_dir: str | None = None
    overwrite_output_dir: bool = False
    num_train_epochs: int = 25
    max_steps: int | None = None
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 128
    eval_steps: int | None = None
    save_steps: int | None = None
    logging_steps: int = 10
    save_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    seed: int = 0
    report_to: str = "none"
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private: bool = False
    license: str = "apache-2.0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(DataOptions, ModelOptions, AugmentationOptions, OptimizerOptions, RunOptions):
    """Fine-tunes a ViTReg classifier. Run as `accelerate launch finetune.py`; bare, it learns handwritten digits."""

    def __post_init__(self):
        for name in ("train_batch_size", "eval_batch_size"):
            require(self, f"per_device_{name}", minimum=1)
        for name in ("gradient_accumulation_steps", "logging_steps", "save_total_limit", "num_train_epochs"):
            require(self, name, minimum=1)
        for name in ("max_steps", "eval_steps", "save_steps", "image_size", "max_train_samples", "max_eval_samples"):
            require(self, name, minimum=1)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"):
            require(self, name, minimum=1)
        for name in ("num_register_tokens", "register_init_std", "rand_augment_num_ops", "dataloader_num_workers"):
            require(self, name, minimum=0)
        require(self, "rand_augment_magnitude", minimum=0, maximum=30)
        for name in ("learning_rate", "weight_decay", "mixup_alpha", "cutmix_alpha", "max_grad_norm"):
            require(self, name, minimum=0)
        for name in ("horizontal_flip", "warmup_ratio", "min_learning_rate_ratio", "label_smoothing_factor"):
            require(self, name, minimum=0, maximum=1)
        for name in ("random_crop_min_scale", "layer_decay", "drop_path_rate", "ema_decay", "validation_fraction"):
            require(self, name, minimum=0, maximum=1)
        if self.train_dir and self.train_file:
            raise ValueError("--train_dir and --train_file were both given: choose one source of training images.")
        if (self.validation_dir and not self.train_dir) or (self.validation_file and not self.train_file):
            raise ValueError("--validation_dir needs --train_dir, and --validation_file needs --train_file.")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push_to_hub needs --hub_model_id, the repository to publish to: `organization/name`.")


def require(recipe, name: str, minimum: float, maximum: float = float("inf")) -> None:
    """Raises `ValueError` where a value that was given lies outside its range."""
    value = getattr(recipe, name)
    if value is not None and not minimum <= value <= maximum:
        allowed = f"at least {minimum}" if maximum == float("inf") else f"between {minimum} and {maximum}"
        raise ValueError(f"--{name} must be {allowed}, got {value}.")


def parse_recipe(
    recipe_class: type[Recipe], arguments: Sequence[str] | None = None, prog: str | None = None
) -> Recipe:
    """The recipe that a command line asks for.

    Args:
        recipe_class: Dataclass of the run; each dataclass it inherits from is a group in `--help`.
        arguments: The command line, `sys.argv[1:]` by default.
        prog: Name of the program for `--help`.

    Raises:
        ValueError: for an unknown flag or key (the nearest known one is named), a value of a wrong type, a recipe file
            that does not exist.
    """
    parser = ArgumentParser(prog=prog, description=recipe_class.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML recipe; flags override it.")
    for group in recipe_class.__bases__:
        parser.add_class_arguments(group)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        namespace = parser.parse_args(_normalized(arguments, recipe_class))
    except ArgumentError as error:
        raise ValueError(f"{error}.{_suggestion(str(error), recipe_class)}") from None
    values = namespace.as_dict()
    values.pop("config", None)
    return recipe_class(**values)


def _normalized(arguments: list[str], recipe_class: type) -> list[str]:
    """Recipes before flags, since what comes later wins, and `true` behind a switch that stands alone."""
    switches = {f"--{field.name}" for field in dataclasses.fields(recipe_class) if field.type is bool}
    recipes, flags = [], []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        following = arguments[position + 1 : position + 2]
        position += 1
        if argument == "--config" and following:
            recipes += ["--config", *following]
            position += 1
        elif argument.startswith("--config="):
            recipes.append(argument)
        elif argument in switches:
            given = bool(following) and following[0].lower() in ("true", "false")
            flags += [argument, following[0].lower() if given else "true"]
            position += given
        else:
            flags.append(argument)
    return recipes + flags


def _suggestion(message: str, recipe_class: type) -> str:
    """The known name nearest to the unknown one that a message of the parser quotes, as a sentence."""
    if "unrecognized" not in message and "not accepted" not in message:
        return ""
    known = [field.name for field in dataclasses.fields(recipe_class)]
    for unknown in re.findall(r"--([\w-]+)|'(\w+)'", message):
        unknown = "".join(unknown).replace("-", "_")
        nearest = (
            [name for name in known if name.endswith(unknown)]
            or [name for name in known if name.startswith(unknown)]
            or difflib.get_close_matches(unknown, known, n=1)
        )
        if nearest:
            return f" Did you mean `{nearest[0]}`?"
    return " `--help` lists what is known; a pattern of several files needs quotes."


def save_recipe(recipe, path: str | Path) -> None:
    """Writes the resolved recipe as YAML that `--config` reads back."""
    Path(path).write_text(recipe_yaml(recipe), encoding="utf-8")


def recipe_yaml(recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)
