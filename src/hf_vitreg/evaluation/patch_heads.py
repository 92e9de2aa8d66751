# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What segmentation and depth have in common: training a linear head on cached patch features, and what it becomes.

Images are not augmented, as they are in DINOv2's recipes: their features are extracted once.

Where there are several processes, each trains the whole head on the whole batches, the same ones in the same order.
That is as exact as one process, batch norm included, whose statistics are those of the batch, and sends nothing: a
linear head costs less than the exchange of its gradients would. The first process's head is handed to the others in
the end, so that rounding on unequal devices cannot part them. What is divided among the processes is the evaluation.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors.torch import load_file, save
from torch import nn
from transformers import DPTImageProcessor

from ..atomic import atomic_file
from ..configuration_vitreg import ViTRegConfig
from ..data.image_data import read_ahead
from ..distributed import num_cores
from ..features import VisionEncoder
from ..modeling_vitreg import ViTRegForDepthEstimation, ViTRegForSemanticSegmentation, layers_to_map
from .feature_cache import MappedTensor


# the map of an image at its own size, (height, width), by its number
Targets = Sequence[np.ndarray | torch.Tensor] | Callable[[int], np.ndarray | torch.Tensor]


class PatchFeatures:
    """Cached features of the patches of some layers, after the final norm, as the maps that a head reads.

    Of whole images, `FeatureSpec(preprocessing="stretch")`, since their targets are: a head's maps are resized to
    these.

    Attributes:
        patches: `(num_images, layers, rows * cols, hidden_size)`, row by row, of any floating dtype, on the CPU, where
            they may be memory-mapped.
        grid: Rows and columns.
        cls: `(num_images, layers, hidden_size)`, or None.

    Raises:
        ValueError: where the shapes do not belong together.
    """

    def __init__(
        self,
        patches: torch.Tensor | MappedTensor,
        grid: tuple[int, int],
        cls: torch.Tensor | MappedTensor | None = None,
    ):
        if len(patches.shape) != 4 or patches.shape[2] != math.prod(grid):
            raise ValueError(
                f"Patch features must have shape (images, layers, {grid[0]} * {grid[1]}, hidden_size), got "
                f"{tuple(patches.shape)}."
            )
        if cls is not None and cls.shape != (*patches.shape[:2], patches.shape[3]):
            raise ValueError(
                f"CLS features must have shape {(*patches.shape[:2], patches.shape[3])}, (images, layers, "
                f"hidden_size), as the patches have, got {tuple(cls.shape)}."
            )
        self.patches = patches
        self.grid = grid
        self.cls = cls

    def __len__(self) -> int:
        return len(self.patches)

    @property
    def num_channels(self) -> int:
        """Of a map: all layers, and CLS beside the patches of each where there is one."""
        return self.patches.shape[1] * self.patches.shape[3] * (1 if self.cls is None else 2)

    def map(self, index: int) -> torch.Tensor:
        """`(num_channels, rows, cols)` of one image, in the dtype of the cache."""
        cls = None if self.cls is None else self.cls[index : index + 1]
        return layers_to_map(self.patches[index : index + 1], self.grid, cls)[0]


def read_target(targets: Targets, index: int, size: tuple[int, int] | None = None) -> torch.Tensor:
    """The map of an image, `(height, width)`, with `size` at that of its nearest pixels.

    Raises:
        ValueError: where it is no map.
    """
    target = torch.as_tensor(np.asarray(targets(index) if callable(targets) else targets[index]))
    if target.ndim != 2 or not target.numel():
        raise ValueError(f"Target {index} must have shape (height, width), got {tuple(target.shape)}.")
    if size is None or target.shape == size:
        return target
    rows, cols = (
        # the pixel at the centre of each new one
        torch.arange(new).add(0.5).mul(old / new).long()
        for new, old in zip(size, target.shape)
    )
    return target[rows[:, None], cols]


def train_head(
    head: nn.Module,
    features: PatchFeatures,
    read_labels: Callable[[int], torch.Tensor],
    backward: Callable[[torch.Tensor, list[torch.Tensor], int], float],
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    decay: Callable[[float], float],
    max_grad_norm: float,
    seed: int,
    accelerator: Accelerator | None,
    on_step: Callable[[int, float], object] | None,
) -> nn.Module:
    """Train a head with AdamW. Every image is seen once before one is seen again, in an order drawn from `seed`.

    Args:
        head: From `(batch_size, num_channels, rows, cols)`.
        features: What it reads.
        read_labels: From the number of an image to its labels; called by several threads, some steps ahead.
        backward: From the output of the head, the labels of the batch, on the same device, and the number of the step
            to the loss, of which it has computed the gradients.
        num_steps, batch_size: Of which there are that many. A batch holds at most every image once.
        learning_rate, weight_decay: Of AdamW.
        warmup_steps: In these the rate rises from zero, while it decays.
        decay: From the share of the steps that are done to a factor of the learning rate.
        max_grad_norm: Gradients above are scaled down to it.
        seed: Of the order.
        accelerator: Says the device, and where there are several processes hands the head of the first to all.
        on_step: Gets the number of steps that are done, and the loss of the last.

    Returns:
        The head, in eval mode.

    Raises:
        ValueError: for no images or no steps, and where the loss is no number.
    """
    if not len(features) or num_steps < 1 or batch_size < 1:
        raise ValueError(
            f"Training a head needs images, steps and a batch size, got {len(features)}, {num_steps} and {batch_size}."
        )
    device = accelerator.device if accelerator else next(head.parameters()).device
    head.to(device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: decay(min(step / num_steps, 1)) * min(1, (step + 1) / max(warmup_steps, 1))
    )
    batch_size = min(batch_size, len(features))
    order = islice(_epochs(len(features), seed), num_steps * batch_size)
    with ThreadPoolExecutor(num_cores()) as pool:
        images = read_ahead(lambda index: (features.map(index), read_labels(index)), order, pool, batch_size)
        for step in range(num_steps):
            maps, labels = zip(*islice(images, batch_size))
            optimizer.zero_grad()
            output = head(torch.stack(maps).to(device).float())
            loss = backward(output, [label.to(device) for label in labels], step)
            if not math.isfinite(loss):
                raise ValueError(
                    f"The loss of step {step} is {loss}. Are the features finite? Lower the learning rate."
                )
            nn.utils.clip_grad_norm_(head.parameters(), max_grad_norm)
            optimizer.step()
            schedule.step()
            if on_step:
                on_step(step + 1, loss)
    if accelerator and accelerator.num_processes > 1:
        head.load_state_dict(broadcast({name: tensor.contiguous() for name, tensor in head.state_dict().items()}))
    return head.eval()


def _epochs(num_images: int, seed: int) -> Iterator[int]:
    """Numbers of all images in one order after another, without end."""
    generator = torch.Generator().manual_seed(seed)
    return chain.from_iterable(torch.randperm(num_images, generator=generator).tolist() for _ in iter(int, 1))


@torch.no_grad()
def head_outputs(
    head: nn.Module, features: PatchFeatures, accelerator: Accelerator | None = None, batch_size: int = 16
) -> Iterator[tuple[int, torch.Tensor]]:
    """What a head says of each image, of this process's share of them where there are several.

    Yields:
        The number of the image, and the output, with a batch axis of one.
    """
    device = accelerator.device if accelerator else next(head.parameters()).device
    first, every = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    head.to(device).eval()
    indices = range(first, len(features), every)
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        maps = torch.stack([features.map(index) for index in chosen]).to(device).float()
        yield from zip(chosen, head(maps).split(1))


# Models


def model_with_head(
    model_class: type[ViTRegForSemanticSegmentation | ViTRegForDepthEstimation],
    encoder: VisionEncoder,
    layers: Sequence[int],
    head: nn.Module,
    **settings,
) -> ViTRegForSemanticSegmentation | ViTRegForDepthEstimation:
    """A whole model, in float32 and eval mode: a copy of the encoder's weights, and the head's.

    Args:
        model_class: Of the two.
        encoder: A ViTReg.
        layers: Those whose features, after the final norm, the head was trained on, as `VisionEncoder` takes them.
        head: Its `segmentation_head` or `depth_head`.
        settings: Of the config.

    Raises:
        ValueError: where the encoder is no ViTReg, the layers do not ascend, or the head reads something else.
    """
    if encoder.source != "vitreg":
        raise ValueError(
            f"{encoder.name} is no ViTReg ({encoder.source}), and a head is put into no other. Convert the model "
            "first, and train the head on what was converted: that makes a whole model. Its head alone can be saved "
            "by save_head."
        )
    out_indices = [layer % encoder.num_layers + 1 for layer in layers]
    if not out_indices or out_indices != sorted(set(out_indices)):
        raise ValueError(
            f"layers must ascend, each once, for their features to lie in this order; got {list(layers)}."
        )
    base = encoder.model.config.to_dict()
    for name in ("out_features", "out_indices", "id2label", "label2id", "architectures", "dtype"):
        base.pop(name, None)
    settings |= {"out_indices": out_indices, "apply_layernorm": True}
    if base["final_norm"] == "pooled":
        # tokens have no norm, and what is pooled is not in this model
        settings["final_norm"] = "none"
    model = model_class(ViTRegConfig(**base | settings))
    weights = encoder.model.state_dict()
    model.vitreg.load_state_dict({name: weights[name] for name in model.vitreg.state_dict()})
    own_head = getattr(model, HEADS[model_class])
    expected, given = (each.classifier.weight.shape[1] for each in (own_head, head))
    if expected != given:
        raise ValueError(
            f"The head reads {given} channels, and {len(out_indices)} layers of {encoder.name} have {expected}. Give "
            "the layers that it was trained on."
        )
    own_head.load_state_dict(head.state_dict())
    return model.eval()


HEADS = {ViTRegForSemanticSegmentation: "segmentation_head", ViTRegForDepthEstimation: "depth_head"}


def dense_image_processor(encoder: VisionEncoder, height: int, width: int) -> DPTImageProcessor:
    """What the pipelines of segmentation and depth need beside a model: whole images, resized to one size.

    Nothing is cropped, since every pixel of the image gets its class or its depth back: this is the "stretch" of
    `FeatureSpec`.

    Raises:
        ValueError: where a side is no multiple of the patch size, or mean and std are not known.
    """
    encoder.grid(height, width)
    if encoder.mean is None or encoder.std is None:
        raise ValueError(f"What {encoder.name} normalizes its images with is not known. Give mean and std.")
    return DPTImageProcessor(
        size={"height": height, "width": width},
        ensure_multiple_of=encoder.patch_size,
        keep_aspect_ratio=False,
        do_convert_rgb=True,
        image_mean=list(encoder.mean),
        image_std=list(encoder.std),
    )


def save_head(folder: str | os.PathLike, name: str, head: nn.Module, facts: Mapping[str, object]) -> list[Path]:
    """Write a head without its model: `name.safetensors`, and `name.json` with what one must know to use it.

    Args:
        folder: Made where it does not exist.
        name: Such as `"segmentation_head"`.
        head: Its state dict is written.
        facts: What JSON can say: the encoder, its layers, the classes.

    Returns:
        The two files.

    Raises:
        OSError: where the folder cannot be written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    note = (
        "The head alone. It reads the patches of these layers after the final norm, without CLS and registers. To "
        "have a whole model that AutoModel loads, convert the encoder to ViTReg and train the head on that."
    )
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in head.state_dict().items()}
    # the description last: a folder that has it has both
    contents = {
        folder / f"{name}.safetensors": save(weights),
        folder / f"{name}.json": json.dumps({**facts, "note": note}, indent=2).encode(),
    }
    for path, content in contents.items():
        with atomic_file(path) as file:
            file.write_bytes(content)
    return list(contents)


def load_head(folder: str | os.PathLike, name: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """State dict and facts of a head that `save_head` wrote.

    Raises:
        FileNotFoundError: where it is not there.
    """
    path = Path(folder) / name
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text("utf-8"))
