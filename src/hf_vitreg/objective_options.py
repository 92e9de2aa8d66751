# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What an objective of pretraining is told: its losses and the crops, views and texts that it sees."""

import dataclasses
from typing import Literal


# of an image, those that the teacher sees
NUM_GLOBAL_CROPS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropOptions:
    """Crops of `dino`

    Args:
        global_crop_size: Height and width of the global crops, in pixels. Several are drawn from, one a step, as in
            DINOv3's high-resolution stage.
        local_crop_size: Of the local crops; as many as global ones, and drawn with them.
        crop_size_weights: How often each of these sizes is drawn, against the others. Default: all alike.
        num_local_crops: Local crops an image.
        global_crop_scale: Smallest and largest share of the image in a global crop.
        local_crop_scale: Smallest and largest share in a local crop.
        horizontal_flip: Probability of a horizontal flip.
        color_jitter: Probability of color jitter.
        color_jitter_strength: Factor on its brightness and contrast 0.4, saturation 0.2 and hue 0.1.
        grayscale: Probability of grayscale.
        global_blur: Probabilities of blur of the first and of the second global crop.
        local_blur: Probability of blur of the local crops.
        solarize: Probability of solarization of the second global crop.
        legacy_blur_probability: Blur with the probability of not blurring, as DINOv2's and DINOv3's code does.
    """

    global_crop_size: list[int] = dataclasses.field(default_factory=lambda: [32])
    local_crop_size: list[int] = dataclasses.field(default_factory=lambda: [16])
    crop_size_weights: list[float] = dataclasses.field(default_factory=list)
    num_local_crops: int = 8
    global_crop_scale: list[float] = dataclasses.field(default_factory=lambda: [0.32, 1.0])
    local_crop_scale: list[float] = dataclasses.field(default_factory=lambda: [0.05, 0.32])
    horizontal_flip: float = 0.5
    color_jitter: float = 0.8
    color_jitter_strength: float = 1.0
    grayscale: float = 0.2
    global_blur: list[float] = dataclasses.field(default_factory=lambda: [1.0, 0.1])
    local_blur: float = 0.5
    solarize: float = 0.2
    legacy_blur_probability: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINOOptions:
    """Losses of `dino`

    Args:
        dino_weight: Weight of the loss on CLS.
        local_weight: Factor on the pairs of local crops; DINOv3: 1 to 0.5.
        ibot_weight: Weight of the loss on masked patches; 0 masks nothing.
        koleo_weight: Weight of KoLeo, the sum over the two global crops.
        koleo_across_processes: Look for neighbours among the images of all processes, not of one.
        num_prototypes: Prototypes of the head on CLS.
        head_mlp_size: Width of the head.
        head_bottleneck_size: Width of the head's bottleneck.
        head_num_layers: Linear layers of the head.
        train_prototype_norms: Learn the norms of the prototypes, as DINOv2 does.
        separate_ibot_head: Patches have a head of their own.
        ibot_num_prototypes: Its prototypes.
        ibot_head_mlp_size: Its width.
        ibot_head_bottleneck_size: The width of its bottleneck.
        centering: What keeps the teacher from collapsing: a running center with softmax, or Sinkhorn-Knopp.
        center_momentum: Share of the center that stays at each step.
        sinkhorn_iterations: Iterations of Sinkhorn-Knopp.
        student_temperature: Temperature of the student.
        teacher_temperature: Temperature of the teacher after its warmup.
        teacher_temperature_start: Temperature of the teacher at the start.
        teacher_temperature_warmup_ratio: Share of the steps over which it changes, linearly.
        teacher_momentum: Momentum of the teacher at the start; rises as a cosine.
        teacher_momentum_end: Momentum at the end.
        mask_probability: Share of the global crops that are masked.
        mask_ratio: Smallest and largest share of a masked crop's patches.
        freeze_last_layer_ratio: Share of the steps in which the prototypes stay.
        head_warmup_ratio: Share of the steps in which the heads alone learn: for weights that come without heads.
        gram_weight: Weight of DINOv3's Gram anchoring; 0 is off.
        gram_teacher: ViTReg checkpoint that anchors. Default: the teacher as it is when anchoring starts.
        gram_start_ratio: Share of the steps after which anchoring starts.
        gram_update_steps: Steps after which the anchor is replaced by the teacher; 0 never.
        gram_max_updates: Most replacements.
        gram_crop_size: Height and width at which the anchor sees the global crops; as many as there are of these.
            Default: that of the global crops.
        loss_chunk_rows: Rows of logits that there is room for at once; the loss does not depend on it.
    """

    dino_weight: float = 1.0
    local_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_across_processes: bool = False
    num_prototypes: int = 1024
    head_mlp_size: int = 512
    head_bottleneck_size: int = 128
    head_num_layers: int = 3
    train_prototype_norms: bool = False
    separate_ibot_head: bool = False
    ibot_num_prototypes: int = 1024
    ibot_head_mlp_size: int = 512
    ibot_head_bottleneck_size: int = 128
    centering: Literal["softmax", "sinkhorn_knopp"] = "softmax"
    center_momentum: float = 0.9
    sinkhorn_iterations: int = 3
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup_ratio: float = 0.3
    teacher_momentum: float = 0.992
    teacher_momentum_end: float = 1.0
    mask_probability: float = 0.5
    mask_ratio: list[float] = dataclasses.field(default_factory=lambda: [0.1, 0.5])
    freeze_last_layer_ratio: float = 0.01
    head_warmup_ratio: float = 0.0
    gram_weight: float = 0.0
    gram_teacher: str | None = None
    gram_start_ratio: float = 0.0
    gram_update_steps: int = 0
    gram_max_updates: int = 3
    gram_crop_size: list[int] = dataclasses.field(default_factory=list)
    loss_chunk_rows: int = 256

    @property
    def masks_patches(self) -> bool:
        """Whether there is a loss on masked patches."""
        return bool(self.ibot_weight and self.mask_probability)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedOptions:
    """Labels, of `supervised`

    Args:
        classification_loss: Binary cross entropy (DeiT-III on ImageNet-1k) or cross entropy (on ImageNet-21k).
        classifier_layout: What the classifier reads.
        label_smoothing: Share of the target spread over all classes; with binary cross entropy it must be 0.
        three_augment: DeiT-III's augmentation: grayscale, solarization or blur, then color jitter and flip.
        three_augment_color_jitter: Strength of that jitter.
        train_crop: `simple_random_crop` resizes and crops with a reflected border of 4 pixels;
            `random_resized_crop` takes a part.
        random_crop_min_scale: Smallest share of the image in a random resized crop.
        flip: Probability of a horizontal flip.
        rand_augment_num_ops: Operations of RandAugment, in place of 3-Augment; 0 is off.
        rand_augment_magnitude: Their strength, 0 to 30.
        mixup_alpha: Beta parameter of mixup; 0 is off.
        cutmix_alpha: Beta parameter of cutmix; 0 is off. Where both are on, each batch draws one.
        num_repeated_augmentations: Times that an image is in a global batch, each time augmented anew.
        distillation_teacher: Classifier to distil from (DeiT): a folder or id of transformers, or `timm:NAME`. Its
            classes must be those of the data, in their order. The model gets a distillation token.
        distillation: Its kind.
        distillation_weight: Its share of the loss.
        distillation_temperature: Temperature of soft distillation.
    """

    classification_loss: Literal["bce", "ce"] = "bce"
    classifier_layout: Literal["cls", "cls_mean"] = "cls"
    label_smoothing: float = 0.0
    three_augment: bool = True
    three_augment_color_jitter: float = 0.3
    train_crop: Literal["simple_random_crop", "random_resized_crop"] = "random_resized_crop"
    random_crop_min_scale: float = 0.08
    flip: float = 0.5
    rand_augment_num_ops: int = 0
    rand_augment_magnitude: int = 9
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    num_repeated_augmentations: int = 1
    distillation_teacher: str | None = None
    distillation: Literal["hard", "soft"] = "hard"
    distillation_weight: float = 0.5
    distillation_temperature: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPOptions:
    """Text, of `clip`

    Args:
        contrastive_loss: `clip` compares with all texts of the batch, `siglip` judges each pair.
        text_model_name_or_path: Text tower and tokenizer of transformers to start from. Without it new ones are made.
        projection_dim: Width of the space that images and texts share.
        text_hidden_size: Width of a new text tower.
        text_num_hidden_layers: Depth of a new text tower.
        text_num_attention_heads: Attention heads of a new text tower.
        text_max_length: Most tokens of a text.
        text_vocab_size: Most tokens that a new tokenizer, trained on the captions, knows.
        clip_crop_min_scale: Smallest share of the image in its random crop.
        clip_flip: Probability of a horizontal flip; texts that say left and right forbid it.
        max_logit_scale: Largest factor on the cosines.
    """

    contrastive_loss: Literal["clip", "siglip"] = "clip"
    text_model_name_or_path: str | None = None
    projection_dim: int = 512
    text_hidden_size: int = 512
    text_num_hidden_layers: int = 12
    text_num_attention_heads: int = 8
    text_max_length: int = 77
    text_vocab_size: int = 49408
    clip_crop_min_scale: float = 0.9
    clip_flip: float = 0.0
    max_logit_scale: float = 100.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PostHocOptions:
    """Distillation of registers, of `post_hoc`

    Args:
        num_views: Views of an image that the teacher's features are averaged over, the image itself among them.
        max_view_shift: Largest shift of a view, as a share of the patch grid.
        view_flip: Probability that a view is mirrored.
        view_fill: Brightness of what is beyond the border of a shifted image, 0 black to 1 white.
        cosine_weight: Weight of the distance between the directions of patches.
        mse_weight: Weight of the squared distance between them.
        post_hoc_flip: Probability that the image itself is mirrored, after it is resized and a square is cropped.
    """

    num_views: int = 10
    max_view_shift: float = 0.15
    view_flip: float = 0.5
    view_fill: float = 1.0
    cosine_weight: float = 1.0
    mse_weight: float = 1.0
    post_hoc_flip: float = 0.5
