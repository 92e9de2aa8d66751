# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The dataclasses of a pretraining run: types, defaults and help of the flags of `pretrain.py`.

The defaults are a complete small run: DINO and iBOT on the handwritten digits that scikit-learn ships.
"""

import dataclasses
from typing import Literal

from .objective_options import CLIPOptions, CropOptions, DINOOptions, PostHocOptions, SupervisedOptions
from .recipe import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Objective

    Args:
        objective: `dino` trains by self-supervision (DINOv2, DINOv3), `supervised` by labels (DeiT-III), `clip` by
            text (OpenCLIP, SigLIP); `post_hoc` gives registers to a model that was trained without (PH-Reg).
    """

    objective: Literal["dino", "supervised", "clip", "post_hoc"] = "dino"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainDataOptions:
    """Data

    Args:
        dataset_name: `digits` (built in, no download) or the id of a dataset on the Hub.
        dataset_config_name: Configuration of the Hub dataset.
        train_dir: Folder of images, at any depth, in place of a dataset. Folders of its first level are classes, for
            `supervised`; for `clip` every image has a text file of its name beside it, `IMAGE.txt`.
        train_file: Parquet file or pattern, in place of a dataset.
        train_shards: WebDataset tar file or pattern, in place of a dataset.
        train_split: Split of the Hub dataset to train on.
        image_column: Column with the images. Default: the only one that holds images.
        label_column: Column with the labels, for `supervised` and for kNN. Default: the only one of classes.
        caption_column: Column with the texts, for `clip`. Default: `caption` or `text`, or what there is of strings.
        caption_template: Makes captions of class names where there is no text, such as `a photo of a {}.`
        streaming: Read parquet files, tar files or the Hub as they come, without a copy. Needs --max_steps.
        shuffle_buffer_size: Images of a stream that are shuffled among each other; shards are shuffled too.
        max_train_samples: Train on this many images at the most, drawn at random; of a stream, the first.
        on_bad_image: `skip` names an image that cannot be read, counts it and goes on; `raise` stops.
        dataloader_num_workers: Processes that decode and crop; 0 does so in the training process.
        dataloader_prefetch_factor: Batches that each of them has ready.
        validation_dir: Folder with one folder of images a class, to measure features on.
        validation_file: Parquet file or pattern with images and labels, for the same.
        validation_split: Split of the Hub dataset, for the same.
        knn_train_samples: Labelled training images that are the neighbours, drawn at random.
        knn_eval_samples: Images classified by them, drawn at random.
    """

    dataset_name: str = "digits"
    dataset_config_name: str | None = None
    train_dir: str | None = None
    train_file: str | None = None
    train_shards: str | None = None
    train_split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    caption_column: str | None = None
    caption_template: str | None = None
    streaming: bool = False
    shuffle_buffer_size: int = 4096
    max_train_samples: int | None = None
    on_bad_image: Literal["raise", "skip"] = "skip"
    dataloader_num_workers: int = 0
    dataloader_prefetch_factor: int = 2
    validation_dir: str | None = None
    validation_file: str | None = None
    validation_split: str = "validation"
    knn_train_samples: int = 10_000
    knn_eval_samples: int = 2_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainModelOptions:
    """Model

    Args:
        model_name_or_path: ViTReg checkpoint to start from, a folder or a Hub id. Without it a new model is made, of
            the sizes that follow.
        revision: Branch, tag or commit of the Hub checkpoint.
        num_register_tokens: Register tokens. A checkpoint that has none gets this many new ones; one that has some
            keeps them. Default: the checkpoint's, and 4 of a checkpoint without or a new model.
        register_init_std: Standard deviation of new registers, and of a new model's CLS. With DINOv3's 0.02 they are
            apart from the start; with DINOv2's 1e-6 they part slowly, and hardly in a short run.
        hidden_size: Width of a new model.
        num_hidden_layers: Depth of a new model.
        num_attention_heads: Attention heads of a new model.
        patch_size: Patch size of a new model, in pixels.
        image_size: Height and width of what the exported model is to see, in pixels. Default: the checkpoint's, or 32.
        initializer_range: Standard deviation of a new model's weights. Narrow models learn faster from about 1 /
            sqrt(hidden_size) than from the 0.02 of wide ones.
        layerscale_value: LayerScale of a new model at the start; 0 leaves it out. DINOv2: 1e-5, DeiT-III: 1e-4.
        use_swiglu_ffn: SwiGLU in place of GELU in a new model, as in DINOv2 L and g.
        use_pre_layernorm: A norm before the first layer of a new model, as in CLIP.
        patch_bias: A bias in the patch embedding of a new model; CLIP has none.
        pixel_statistics: Mean and deviation that a new model's pixels are normalized with, ImageNet's or CLIP's.
        position_embedding_type: Learned positions with one for CLS (DINOv2), without (DeiT-III), or rotary (DINOv3).
        rope_shift: With `rope`: largest shift of the coordinates in training.
        rope_jitter: With `rope`: largest factor on each axis.
        rope_rescale: With `rope`: largest factor on both axes; 2 in DINOv3.
        drop_path_rate: Stochastic depth.
        drop_path_subset: With `dino`: compute residual branches for the images alone that keep them, as DINOv2 does;
            a rate of 0.3 then saves nearly 0.3 of the student's time. Each batch drops as many as the rate says.
        pack_crops: With `dino`: global and local crops share the matrix products of a layer.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        torch_compile: Compile the layers.
        attn_implementation: Attention of transformers to use, such as `sdpa`, `eager` or `flash_attention_2`.
    """

    model_name_or_path: str | None = None
    revision: str | None = None
    num_register_tokens: int | None = None
    register_init_std: float = 0.02
    hidden_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 3
    patch_size: int = 4
    image_size: int | None = None
    initializer_range: float = 0.02
    layerscale_value: float = 1.0
    use_swiglu_ffn: bool = False
    use_pre_layernorm: bool = False
    patch_bias: bool = True
    pixel_statistics: Literal["imagenet", "clip"] = "imagenet"
    position_embedding_type: Literal["cls_patches", "patches", "rope"] = "cls_patches"
    rope_shift: float | None = None
    rope_jitter: float | None = None
    rope_rescale: float | None = None
    drop_path_rate: float = 0.0
    drop_path_subset: bool = True
    pack_crops: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    attn_implementation: str = "sdpa"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainOptimizerOptions:
    """Optimizer

    Args:
        optimizer: AdamW, or LAMB of timm (DeiT-III).
        learning_rate: Peak learning rate, of a batch of `learning_rate_batch_size` images where it is scaled.
        learning_rate_scaling: How it grows with the global batch: `sqrt` (DINOv2), `linear` (DeiT), or `none`.
        learning_rate_batch_size: The batch that it is given for.
        warmup_ratio: Share of the steps over which the learning rate rises, before it falls as a cosine.
        warmup_learning_rate: Learning rate of the first step.
        min_learning_rate: Learning rate at the end, not scaled.
        constant_learning_rate: After the warmup it stays (DINOv3).
        weight_decay: Weight decay of weight matrices at the start. Biases, norms and LayerScale have none.
        weight_decay_end: At the end of a cosine. Default: it stays.
        decay_tokens: Decay CLS, registers, mask token and position embeddings too, as DINOv2 does and timm does not.
        layer_decay: Factor on the learning rate for each layer further from the output; 1 is off.
        patch_embed_lr_ratio: Factor on the learning rate of the patch embedding.
        adam_beta1: First coefficient of the optimizer.
        adam_beta2: Second coefficient.
        adam_epsilon: What is added to the root of the second moment.
        max_grad_norm: Largest norm of the gradient of each module (backbone, heads, text tower); 0 does not clip.
        ema_decay: `supervised` and `clip`: decay of a moving average of the weights, which is then exported; 0 is off.
        gradient_accumulation_steps: Batches whose gradients make one step.
    """

    optimizer: Literal["adamw", "lamb"] = "adamw"
    learning_rate: float = 2e-3
    learning_rate_scaling: Literal["none", "sqrt", "linear"] = "none"
    learning_rate_batch_size: int = 1024
    warmup_ratio: float = 0.1
    warmup_learning_rate: float = 0.0
    min_learning_rate: float = 1e-6
    constant_learning_rate: bool = False
    weight_decay: float = 0.04
    weight_decay_end: float | None = None
    decay_tokens: bool = False
    layer_decay: float = 1.0
    patch_embed_lr_ratio: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 3.0
    ema_decay: float = 0.0
    gradient_accumulation_steps: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonitorOptions:
    """Watching

    Args:
        eval_steps: Steps between measurements of the features: kNN, outliers among the patch norms. Default: a tenth
            of the run.
        logging_steps: Steps between log lines.
        on_collapse: `warn` says which metric shows a collapse, `stop` ends the run there, `ignore` says nothing.
        min_feature_rank: Collapse is an effective rank of the measured CLS below this share of what it could be.
        min_target_entropy: Collapse is an entropy of the teacher's mean output below this share of the largest.
        max_teacher_entropy: Collapse is a mean entropy of the teacher's outputs above this share of the largest.
        report_to: Trackers of Accelerate, such as `tensorboard`, `wandb` or `trackio`, separated by commas.
        peak_tflops: Of a device, for the share of it that is used (MFU). Default: the published one of known GPUs, or
            what a matrix product reaches on this CPU.
    """

    eval_steps: int | None = None
    logging_steps: int = 10
    on_collapse: Literal["ignore", "warn", "stop"] = "warn"
    min_feature_rank: float = 0.02
    min_target_entropy: float = 0.1
    max_teacher_entropy: float = 0.99
    report_to: str = "none"
    peak_tflops: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainRunOptions:
    """Run

    Args:
        output_dir: Folder for the model repository, the checkpoints and the logs. Default: `runs/pretrain-` and the
            name of the data, with a number where that folder is there already.
        overwrite_output_dir: Start anew in an output_dir that is not empty.
        num_train_epochs: Passes over the training images.
        max_steps: Optimizer steps, in place of epochs.
        max_train_minutes: Stop after this many minutes of training, evaluations and earlier parts of a resumed run
            included, and export what there is. Schedules go by the steps: choose these to fit.
        per_device_train_batch_size: Training images a device and batch.
        per_device_eval_batch_size: Images a device and batch in measurements.
        save_steps: Steps between checkpoints. Default: as `eval_steps`.
        save_total_limit: Checkpoints to keep, beside the best one.
        resume_from_checkpoint: `latest`, or the folder of a checkpoint, to go on from.
        seed: Seed of initialization, order, augmentation, masks and stochastic depth.
        push_to_hub: Publish the model on the Hub at the end.
        hub_model_id: Repository to publish to, as `name` or `organization/name`.
        hub_private: Make that repository private.
        license: Licence of the weights, for the model card.
    """

    output_dir: str | None = None
    overwrite_output_dir: bool = False
    num_train_epochs: int = 20
    max_steps: int | None = None
    max_train_minutes: float | None = None
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 256
    save_steps: int | None = None
    save_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    seed: int = 0
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private: bool = False
    license: str = "apache-2.0"


AT_LEAST_ONE = [
    "shuffle_buffer_size",
    "max_train_samples",
    "dataloader_prefetch_factor",
    "knn_train_samples",
    "knn_eval_samples",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "image_size",
    "num_prototypes",
    "head_mlp_size",
    "head_bottleneck_size",
    "head_num_layers",
    "ibot_num_prototypes",
    "ibot_head_mlp_size",
    "ibot_head_bottleneck_size",
    "sinkhorn_iterations",
    "loss_chunk_rows",
    "num_repeated_augmentations",
    "projection_dim",
    "text_hidden_size",
    "text_num_hidden_layers",
    "text_num_attention_heads",
    "text_max_length",
    "text_vocab_size",
    "num_views",
    "learning_rate_batch_size",
    "gradient_accumulation_steps",
    "eval_steps",
    "logging_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "save_steps",
    "save_total_limit",
    "max_logit_scale",
]
AT_LEAST_ZERO = [
    "dataloader_num_workers",
    "num_register_tokens",
    "register_init_std",
    "initializer_range",
    "layerscale_value",
    "rope_shift",
    "num_local_crops",
    "color_jitter_strength",
    "dino_weight",
    "local_weight",
    "ibot_weight",
    "koleo_weight",
    "gram_weight",
    "gram_update_steps",
    "gram_max_updates",
    "three_augment_color_jitter",
    "rand_augment_num_ops",
    "cosine_weight",
    "mse_weight",
    "mixup_alpha",
    "cutmix_alpha",
    "learning_rate",
    "warmup_learning_rate",
    "min_learning_rate",
    "weight_decay",
    "weight_decay_end",
    "patch_embed_lr_ratio",
    "adam_epsilon",
    "max_grad_norm",
    "max_train_minutes",
    "peak_tflops",
]
SHARES = [
    "drop_path_rate",
    "horizontal_flip",
    "color_jitter",
    "grayscale",
    "local_blur",
    "solarize",
    "center_momentum",
    "teacher_temperature_warmup_ratio",
    "teacher_momentum",
    "teacher_momentum_end",
    "mask_probability",
    "freeze_last_layer_ratio",
    "head_warmup_ratio",
    "gram_start_ratio",
    "label_smoothing",
    "random_crop_min_scale",
    "flip",
    "distillation_weight",
    "clip_crop_min_scale",
    "clip_flip",
    "max_view_shift",
    "view_flip",
    "view_fill",
    "post_hoc_flip",
    "warmup_ratio",
    "layer_decay",
    "adam_beta1",
    "adam_beta2",
    "ema_decay",
    "min_feature_rank",
    "min_target_entropy",
    "max_teacher_entropy",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainRecipe(
    ObjectiveOptions,
    PretrainDataOptions,
    PretrainModelOptions,
    CropOptions,
    DINOOptions,
    SupervisedOptions,
    CLIPOptions,
    PostHocOptions,
    PretrainOptimizerOptions,
    MonitorOptions,
    PretrainRunOptions,
):
    """Trains a ViTReg from nothing or goes on from a checkpoint. Run as `accelerate launch pretrain.py`; bare, it
    learns handwritten digits without their labels."""

    def __post_init__(self):
        for name in AT_LEAST_ONE:
            require(self, name, minimum=1)
        for name in AT_LEAST_ZERO:
            require(self, name, minimum=0)
        for name in SHARES:
            require(self, name, minimum=0, maximum=1)
        for name in ("rope_jitter", "rope_rescale"):
            require(self, name, minimum=1)
        for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            require(self, name, minimum=1e-6)
        require(self, "distillation_temperature", minimum=1e-6)
        require(self, "rand_augment_magnitude", minimum=0, maximum=30)
        self._require_sources()
        self._require_crops()
        if self.objective == "supervised" and self.classification_loss == "bce" and self.label_smoothing:
            raise ValueError(
                "--classification_loss bce takes every smoothed class for a yes: set --label_smoothing 0."
            )
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("--push_to_hub needs --hub_model_id, the repository to publish to: `organization/name`.")

    def _require_sources(self) -> None:
        given = [f"--{name}" for name in ("train_dir", "train_file", "train_shards") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given: choose one source of training images.")
        if self.streaming and (self.train_dir or (not given and self.dataset_name == "digits")):
            raise ValueError("--streaming needs --train_file, --train_shards or a --dataset_name of the Hub.")
        if self.streaming and not self.max_steps:
            raise ValueError("--streaming needs --max_steps: a stream does not tell how long it is.")
        if self.streaming and self.num_repeated_augmentations > 1:
            raise ValueError("--num_repeated_augmentations needs images at hand: leave --streaming out.")

    def _require_crops(self) -> None:
        for name, (low, high) in {
            name: getattr(self, name) if len(getattr(self, name)) == 2 else (1.0, 0.0)
            for name in ("global_crop_scale", "local_crop_scale", "mask_ratio")
        }.items():
            if not 0 <= low <= high <= 1:
                raise ValueError(f"--{name} must be two shares, the smaller one first, got {getattr(self, name)}.")
        if len(self.global_blur) != 2 or not all(0 <= share <= 1 for share in self.global_blur):
            raise ValueError(f"--global_blur must be two probabilities, got {self.global_blur}.")
        sizes = [self.global_crop_size, self.local_crop_size]
        if not self.global_crop_size or len({len(size) for size in sizes}) > 1:
            raise ValueError(
                f"--global_crop_size and --local_crop_size must be as many, got {self.global_crop_size} and "
                f"{self.local_crop_size}."
            )
        if self.crop_size_weights and len(self.crop_size_weights) != len(self.global_crop_size):
            raise ValueError(
                f"--crop_size_weights must be as many as --global_crop_size or none, got {self.crop_size_weights} and "
                f"{self.global_crop_size}."
            )
        if self.gram_crop_size and len(self.gram_crop_size) != len(self.global_crop_size):
            raise ValueError(
                f"--gram_crop_size must be as many as --global_crop_size or none, got {self.gram_crop_size} and "
                f"{self.global_crop_size}."
            )
        crops = {"global_crop_size": self.global_crop_size, "local_crop_size": self.local_crop_size}
        for name, values in {**crops, "gram_crop_size": self.gram_crop_size}.items():
            if any(value < 1 for value in values):
                raise ValueError(f"--{name} must be at least 1, got {values}.")
