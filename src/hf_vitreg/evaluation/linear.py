# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""DINOv2's linear evaluation on cached features: all heads of its sweep in one pass, and the best as a classifier.

A head is a linear layer on the CLS tokens of the last 1 or 4 layers, with or without the mean of the last layer's
patches, at one of 13 learning rates: 52 heads (DINOv2, appendix B.3). Each is trained with SGD, momentum 0.9, no
weight decay and a learning rate that falls to 0 along a cosine, on the same batches. Features are those of the images
as the cache has them; DINOv2 extracts them from random crops anew in every step.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from ..configuration_vitreg import ViTRegConfig
from ..distributed import derived_seed
from ..modeling_vitreg import ViTRegForImageClassification, ViTRegModel
from .labelled import (
    ImageFeatures,
    gathered,
    held_out_split,
    own_share,
    probe_device,
    require_every_class,
    require_features,
    require_labels,
    require_width,
    rows_in_chunks,
)


LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
MOMENTUM = 0.9
INIT_STD = 0.01
# Outputs of the heads that are computed by one product. Enough to keep a device busy, and few enough that 1,000
# classes leave every head to any process.
COLUMNS = 1024
EVALUATION_CHUNK_SIZE = 2048
ORDER, INIT = range(2)  # what a seed is derived for

_LAYOUTS = {(1, False): "cls", (1, True): "cls_mean", (4, False): "last4_cls", (4, True): "last4_cls_mean"}


class HeadSettings(NamedTuple):
    """What a head reads and how fast it learns.

    Attributes:
        num_layers: The last so many layers, whose CLS tokens are read.
        use_patch_mean: Whether the mean of the last layer's patches is read after them.
        learning_rate: For 256 images a step, as it stands in papers.
    """

    num_layers: int
    use_patch_mean: bool
    learning_rate: float

    @property
    def name(self) -> str:
        """For people: `4 layers, patch mean, lr 0.01`."""
        layers = f"{self.num_layers} layer{'s' if self.num_layers > 1 else ''}"
        return f"{layers}{', patch mean' if self.use_patch_mean else ''}, lr {self.learning_rate:g}"


class HeadScore(NamedTuple):
    """A head of the sweep and its scores.

    Attributes:
        settings: Of the head.
        accuracy: Share of the validation images that it classifies correctly; a head that diverged classifies none.
        selection_accuracy: The same on the images that the best head is chosen on.
    """

    settings: HeadSettings
    accuracy: float
    selection_accuracy: float


class LinearHead(NamedTuple):
    """A trained head.

    Attributes:
        settings: What it reads and how it was trained.
        weight: `(num_classes, num_inputs)` on the CPU: the CLS tokens from the earliest layer to the last, then the
            mean of the patches.
        bias: `(num_classes,)`.
    """

    settings: HeadSettings
    weight: torch.Tensor
    bias: torch.Tensor

    def logits(self, cls: torch.Tensor, patch_mean: torch.Tensor | None = None) -> torch.Tensor:
        """`(images, num_classes)` from features as in `ImageFeatures`."""
        inputs = _inputs(ImageFeatures(cls, patch_mean=patch_mean), [self.settings])
        columns = inputs.columns(self.settings)
        rows = inputs.rows(slice(None), self.weight.device)
        return nn.functional.linear(rows[:, columns], self.weight, self.bias)


class LinearSweep(NamedTuple):
    """All heads' scores, best head and its score."""

    scores: tuple[HeadScore, ...]
    best: LinearHead
    best_score: HeadScore


def linear_sweep(
    train: ImageFeatures,
    validation: ImageFeatures,
    num_classes: int,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    layers: Sequence[int] = (1, 4),
    patch_mean: Sequence[bool] = (False, True),
    num_epochs: float = 10,
    num_iterations: int | None = None,
    batch_size: int = 128,
    selection: Literal["validation", "held_out"] = "validation",
    held_out_share: float = 0.1,
    seed: int = 0,
    device: torch.device | str | None = None,
    accelerator: Accelerator | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> LinearSweep:
    """Trains a linear head for every combination of learning rate, layers and patch mean, and chooses the best.

    DINOv2 chooses the best of its heads on the very images that it reports, which flatters a little; its tables are
    comparable to `selection="validation"`. `"held_out"` chooses on a share of the training images, which no head is
    then trained on, and reports the choice on validation images that had no part in it.

    Several processes share the heads, each on the same batches of `batch_size` images, so that their number changes
    no head. DINOv2 divides the batch instead: its batch of 128 on 8 GPUs is `batch_size=1024` here, on any number.

    Args:
        train, validation: Features and labels, of as many layers as are read. Batches are drawn from where they are:
            features on the device train fastest, memory-mapped ones cost no memory.
        num_classes: Number of classes.
        learning_rates: For 256 images a step; they are scaled by `batch_size / 256`.
        layers: Numbers of last layers that heads read.
        patch_mean: Whether they read the mean of the patches too.
        num_epochs: Passes over the training images. DINOv2 takes 12,500 steps, at 8 x 128 images ten passes.
        num_iterations: Steps, in place of `num_epochs`. A small training set needs it: where ten passes are a few
            hundred steps, the learning rates of the sweep, which are for thousands, leave every head half trained.
        batch_size: Images a step, always full: one pass runs into the next.
        selection: Which images the best head is chosen on.
        held_out_share: Of the training images of each class, with `selection="held_out"`.
        seed: Of initial weights, order and held-out images.
        device: Where to compute; by default the accelerator's, else that of the training features.
        accelerator: Of the processes that share the heads.
        on_step: Called with the steps done and the number of steps.

    Returns:
        Scores in the order of layers, patch mean and learning rates; the best head is the first among equals.

    Raises:
        ValueError: If features are NaN or shapes do not fit, labels are out of range, a class has no training image,
            features lack layers or the patch mean, or all heads diverged.
    """
    settings = [HeadSettings(n, mean, rate) for n in layers for mean in patch_mean for rate in learning_rates]
    _require_settings(settings, batch_size, selection)
    train_inputs, train_labels = _checked(train, settings, num_classes, "training")
    validation_inputs, validation_labels = _checked(validation, settings, num_classes, "validation")
    require_width(validation_inputs.cls, train_inputs.cls.shape[-1], "validation")
    chosen, held_out = torch.arange(len(train_labels)), None
    if selection == "held_out":
        chosen, held_out = held_out_split(train_labels, held_out_share, seed)
    require_every_class(train_labels[chosen], num_classes, "training")
    device = probe_device(device, accelerator, train_inputs.cls)
    groups = [
        _HeadGroup(heads, settings, train_inputs, num_classes, batch_size, seed, device)
        for heads in own_share(_groups(settings, num_classes), accelerator)
    ]
    steps = _num_steps(num_epochs, num_iterations, len(chosen), batch_size)
    _train(groups, train_inputs, train_labels, chosen, batch_size, steps, seed, device, on_step)
    accuracies = _accuracies(
        groups, validation_inputs, validation_labels, torch.arange(len(validation_labels)), device
    )
    chosen_by = accuracies
    if held_out is not None:
        chosen_by = _accuracies(groups, train_inputs, train_labels, held_out, device)
    return _best(settings, groups, accuracies, chosen_by, accelerator)


def classifier_from_head(
    model: ViTRegModel | ViTRegForImageClassification, head: LinearHead, class_names: Sequence[str] | None = None
) -> ViTRegForImageClassification:
    """A copy of the model with the head as its classifier: its logits are those of the head on the model's features.

    Args:
        model: That the features are of; of a classifier, what is below the classifier.
        head: On the last 1 or 4 layers.
        class_names: In the order of the labels.

    Returns:
        The classifier in eval mode, in the model's dtype and on its device.

    Raises:
        ValueError: If the head reads other numbers of layers than a classifier can, its width or the number of names
            does not fit, or the model cannot have such a classifier.
    """
    encoder = model.vitreg if isinstance(model, ViTRegForImageClassification) else model
    settings, num_classes = head.settings, len(head.weight)
    layout = _LAYOUTS.get((settings.num_layers, settings.use_patch_mean))
    if layout is None:
        raise ValueError(f"A classifier reads the last 1 or 4 layers, and this head ({settings.name}) others.")
    names = [f"LABEL_{index}" for index in range(num_classes)] if class_names is None else list(class_names)
    if len(names) != num_classes:
        raise ValueError(f"The head has {num_classes} classes, but {len(names)} class_names were given.")
    values = encoder.config.to_dict() | {"classifier_layout": layout, "id2label": dict(enumerate(names))}
    values["label2id"] = {name: index for index, name in enumerate(names)}
    classifier = ViTRegForImageClassification(ViTRegConfig.from_dict(values))
    if classifier.classifier.weight.shape != head.weight.shape:
        raise ValueError(
            f"The head reads {head.weight.shape[1]} channels, but a classifier of this model with "
            f'classifier_layout="{layout}" {classifier.classifier.in_features}: it was trained on another model.'
        )
    kept = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("projection.")}
    classifier.to(device=encoder.device, dtype=encoder.dtype)
    classifier.vitreg.load_state_dict(kept)
    classifier.classifier.load_state_dict({"weight": head.weight, "bias": head.bias})
    return classifier.eval()


def _require_settings(settings: list[HeadSettings], batch_size: int, selection: str) -> None:
    if not settings or len(set(settings)) < len(settings):
        raise ValueError("learning_rates, layers and patch_mean must each hold at least one value, and none twice.")
    for head in settings:
        if head.num_layers < 1 or not 0 < head.learning_rate < math.inf:
            raise ValueError(f"layers must be 1 or more and learning_rates positive, got {head.name}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}.")
    if selection not in ("validation", "held_out"):
        raise ValueError(f'selection must be "validation" or "held_out", got {selection!r}.')


def _num_steps(num_epochs: float, num_iterations: int | None, num_images: int, batch_size: int) -> int:
    steps = max(1, int(num_epochs * num_images / batch_size)) if num_iterations is None else num_iterations
    if steps < 1 or num_epochs <= 0:
        raise ValueError(f"num_epochs and num_iterations must be positive, got {num_epochs} and {num_iterations}.")
    return steps


class _Inputs(NamedTuple):
    """The columns that any head reads: CLS of the last layers, then the patch mean. What a head reads is a slice."""

    cls: torch.Tensor  # (images, num_layers, hidden_size)
    patch_mean: torch.Tensor | None  # (images, hidden_size)

    def columns(self, settings: HeadSettings) -> slice:
        num_layers, hidden_size = self.cls.shape[1:]
        return slice(
            (num_layers - settings.num_layers) * hidden_size, (num_layers + settings.use_patch_mean) * hidden_size
        )

    def rows(self, rows: slice | torch.Tensor, device: torch.device) -> torch.Tensor:
        """`(rows, columns)` in float32."""
        rows = rows if isinstance(rows, slice) else rows.to(self.cls.device)
        cls = self.cls[rows].to(device=device, dtype=torch.float32).flatten(1)
        if self.patch_mean is None:
            return cls
        rows = rows if isinstance(rows, slice) else rows.to(self.patch_mean.device)
        return torch.cat([cls, self.patch_mean[rows].to(device=device, dtype=torch.float32)], dim=1)


def _inputs(features: ImageFeatures, settings: Sequence[HeadSettings], name: str = "given") -> _Inputs:
    """What these heads read of the features, as views.

    Raises:
        ValueError: If layers or the patch mean are missing.
    """
    cls = features.cls[:, None] if features.cls.ndim == 2 else features.cls
    num_layers = max(head.num_layers for head in settings)
    if cls.ndim != 3 or cls.shape[1] < num_layers:
        raise ValueError(
            f"Heads read CLS of the last {num_layers} layers, but the {name} features are of shape {tuple(cls.shape)} "
            "(images, layers, hidden_size). Extract more layers, or give layers=(1,)."
        )
    patch_mean = features.patch_mean if any(head.use_patch_mean for head in settings) else None
    if patch_mean is None and any(head.use_patch_mean for head in settings):
        raise ValueError(f"The {name} features have no patch_mean. Extract it, or give patch_mean=(False,).")
    if patch_mean is not None:
        patch_mean = patch_mean[:, -1] if patch_mean.ndim == 3 else patch_mean
        if patch_mean.shape != (len(cls), cls.shape[-1]):
            raise ValueError(
                f"patch_mean of the {name} features has shape {tuple(patch_mean.shape)}, but cls is of {len(cls)} "
                f"images and {cls.shape[-1]} channels."
            )
    return _Inputs(cls[:, -num_layers:], patch_mean)


def _checked(
    features: ImageFeatures, settings: Sequence[HeadSettings], num_classes: int, name: str
) -> tuple[_Inputs, torch.Tensor]:
    inputs = _inputs(features, settings, name)
    require_features(inputs.cls, name, ndim=3)
    if inputs.patch_mean is not None:
        require_features(inputs.patch_mean, f"{name} patch_mean")
    return inputs, require_labels(features.labels, len(inputs.cls), num_classes, name)


def _groups(settings: Sequence[HeadSettings], num_classes: int) -> list[list[int]]:
    """Heads that read the same, in groups of about `COLUMNS` outputs: a stack of weights, and one product.

    The same groups on any number of processes, or the order of sums would depend on it.
    """
    size = max(1, COLUMNS // num_classes)
    groups = []
    for what in dict.fromkeys(head[:2] for head in settings):
        heads = [index for index, head in enumerate(settings) if head[:2] == what]
        groups += [heads[start : start + size] for start in range(0, len(heads), size)]
    return groups


class _HeadGroup:
    """Heads that read the same columns, stacked as rows of one weight, `(num_heads * num_classes, columns)`.

    SGD is elementwise, so a head's learning rate can be multiplied into its gradient and momentum: then gradient and
    momentum are one product that accumulates, and the step is one sum for all heads.
    """

    def __init__(
        self,
        heads: list[int],
        settings: Sequence[HeadSettings],
        inputs: _Inputs,
        num_classes: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ):
        self.heads, self.num_classes, self.columns = heads, num_classes, inputs.columns(settings[heads[0]])
        num_inputs = self.columns.stop - self.columns.start
        self.weight = torch.cat([_initial_weight(num_classes, num_inputs, seed, head) for head in heads]).to(device)
        self.bias = self.weight.new_zeros(len(self.weight))
        self.weight_momentum, self.bias_momentum = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        rates = [settings[head].learning_rate * batch_size / 256 for head in heads]
        self.rates = self.weight.new_tensor(rates)[:, None]

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """`(batch, num_heads, num_classes)` of all columns that any head reads."""
        logits = torch.addmm(self.bias, inputs[:, self.columns], self.weight.T)
        return logits.unflatten(1, (len(self.heads), self.num_classes))

    def step(self, inputs: torch.Tensor, labels: torch.Tensor, schedule: float) -> None:
        """One step of SGD on the cross entropy of each head; its gradient is `softmax(logits) - one_hot(labels)`."""
        gradient = self.logits(inputs).softmax(dim=2)
        gradient[torch.arange(len(labels), device=labels.device), :, labels] -= 1
        gradient = gradient.mul_(self.rates / len(labels)).flatten(1)
        self.weight_momentum.addmm_(gradient.T, inputs[:, self.columns], beta=MOMENTUM)
        self.bias_momentum.mul_(MOMENTUM).add_(gradient.sum(dim=0))
        self.weight.add_(self.weight_momentum, alpha=-schedule)
        self.bias.add_(self.bias_momentum, alpha=-schedule)

    def head(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of one head, copied to the CPU."""
        rows = slice(self.heads.index(head) * self.num_classes, (self.heads.index(head) + 1) * self.num_classes)
        return self.weight[rows].cpu().clone(), self.bias[rows].cpu().clone()


def _initial_weight(num_classes: int, num_inputs: int, seed: int, head: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, INIT, head))
    return INIT_STD * torch.randn(num_classes, num_inputs, generator=generator)


def _batches(images: torch.Tensor, batch_size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """`steps` batches of indices, all full: passes in an order of their own each, one after the other."""
    waiting, epoch = images[:0], 0
    for _ in range(steps):
        while len(waiting) < batch_size:
            generator = torch.Generator().manual_seed(derived_seed(seed, ORDER, epoch))
            waiting = torch.cat([waiting, images[torch.randperm(len(images), generator=generator)]])
            epoch += 1
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def _train(
    groups: list[_HeadGroup],
    inputs: _Inputs,
    labels: torch.Tensor,
    images: torch.Tensor,
    batch_size: int,
    steps: int,
    seed: int,
    device: torch.device,
    on_step: Callable[[int, int], None] | None,
) -> None:
    """Takes all heads through the same batches."""
    for step, batch in enumerate(_batches(images, batch_size, steps, seed)):
        batch_inputs, batch_labels = inputs.rows(batch, device), labels[batch].to(device)
        schedule = (1 + math.cos(math.pi * step / steps)) / 2
        for group in groups:
            group.step(batch_inputs, batch_labels, schedule)
        if on_step is not None:
            on_step(step + 1, steps)


def _accuracies(
    groups: list[_HeadGroup], inputs: _Inputs, labels: torch.Tensor, images: torch.Tensor, device: torch.device
) -> dict[int, float]:
    """Of each head of this process, on the images with these indices."""
    correct = {head: 0 for group in groups for head in group.heads}
    for rows in rows_in_chunks(len(images), EVALUATION_CHUNK_SIZE):
        chunk_inputs, true = inputs.rows(images[rows], device), labels[images[rows]].to(device)
        for group in groups:
            logits = group.logits(chunk_inputs)
            is_correct = (logits.argmax(dim=2) == true[:, None]) & logits.isfinite().all(dim=2)
            for head, count in zip(group.heads, is_correct.sum(dim=0).tolist()):
                correct[head] += count
    return {head: count / len(images) for head, count in correct.items()}


def _best(
    settings: list[HeadSettings],
    groups: list[_HeadGroup],
    accuracies: Mapping[int, float],
    chosen_by: Mapping[int, float],
    accelerator: Accelerator | None,
) -> LinearSweep:
    """The scores of all processes' heads; the best head's weights come from the process that has them."""
    own = [(head, HeadScore(settings[head], accuracies[head], chosen_by[head])) for head in accuracies]
    scores = [score for _, score in sorted(gathered(own, accelerator))]
    best = max(range(len(scores)), key=lambda head: (scores[head].selection_accuracy, -head))
    weights = [group.head(best) for group in groups if best in group.heads]
    weight, bias = gathered(weights, accelerator)[0]
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError(
            "Every head diverged to NaN or infinite weights. Give smaller learning_rates, or check the scale of the "
            "features: they must be those after the final norm."
        )
    return LinearSweep(tuple(scores), LinearHead(settings[best], weight, bias), scores[best])
