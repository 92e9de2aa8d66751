# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A ViTReg as a program without its code: one input, named outputs, and any batch size, height and width."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel, VisionTextDualEncoderModel
from transformers.image_processing_utils import BaseImageProcessor

from ..atomic import atomic_file
from ..modeling_vitreg import ViTRegBackbone, ViTRegForImageClassification, ViTRegForSemanticSegmentation


INPUT = "pixel_values"
METADATA = "metadata.json"
# of the largest value of an output
TOLERANCE = 1e-4
# not of the outputs, and of every layer
NOT_EXPORTED = ("loss", "hidden_states", "attentions")


@dataclass(frozen=True)
class Exported:
    """What was written, and how well it agrees with torch.

    Attributes:
        path: The file.
        outputs: The names of its outputs, in order.
        shapes: `(batch_size, num_channels, height, width)` of the images that it was compared on.
        difference: The largest one to torch, relative to the largest value of its output.
    """

    path: Path
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int, int, int, int], ...]
    difference: float


class NamedOutputs(nn.Module):
    """A ViTReg of any head, from images to a dictionary of its outputs.

    The outputs are those of the model, and behind a head also what the `ViTRegModel` below it returns:
    `last_hidden_state`, `pooler_output`, `register_tokens`, `patch_tokens` and `image_embeds`. A backbone returns
    several layers, so the names of its outputs end in the name of the stage: `feature_maps_stage12`,
    `cls_tokens_stage12`, `register_tokens_stage12`. Of a dual encoder it is the image half, and `image_embeds` are
    projected but not normalized. What a model has not, like the registers of one without, is left out.

    The model is copied, to float32 on the CPU and to eval mode; every output is float32, too.

    `(batch_size, num_channels, height, width) -> {name: tensor}`

    Args:
        model: A ViTReg, or a `VisionTextDualEncoderModel` around a `ViTRegModel`.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.projection = None
        if isinstance(model, VisionTextDualEncoderModel):
            self.projection = copy.deepcopy(model.visual_projection).to("cpu", torch.float32)
            model = model.vision_model
        self.model = copy.deepcopy(model).to("cpu", torch.float32)
        # other implementations of attention are for other machines
        self.model.set_attn_implementation("sdpa")
        self.config = self.model.config
        self.config.output_hidden_states = self.config.output_attentions = False
        self.eval().requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        if isinstance(self.model, ViTRegBackbone):
            output = self.model(pixel_values, return_prefix_tokens=True, return_dict=True)
            return self._present(
                {
                    f"{name}_{stage}": tensor
                    for name, tensors in output.items()
                    for stage, tensor in zip(self.model.out_features, tensors)
                }
            )
        below = {}
        # a head returns nothing of what it reads
        handle = self.model.base_model.register_forward_hook(lambda module, args, output: below.update(output))
        try:
            output = self.model(pixel_values, return_dict=True)
        finally:
            handle.remove()
        outputs = {**output, **{name: tensor for name, tensor in below.items() if name not in output}}
        if self.projection is not None:
            outputs["image_embeds"] = self.projection(outputs["pooler_output"])
        return self._present(outputs)

    def _present(self, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Without what there is none of."""
        num_registers = self.config.num_register_tokens
        return {
            name: tensor
            for name, tensor in outputs.items()
            if name not in NOT_EXPORTED and (num_registers or not name.startswith("register_tokens"))
        }


def trace(model: NamedOutputs) -> ExportedProgram:
    """The program of a model, with dynamic batch size, height and width, the last two multiples of the patch size.

    Raises:
        ValueError: where the position embeddings are interpolated by antialiased scale factors, which are numbers of
            one size. No published model has them.
    """
    config = model.config
    learned = config.position_embedding_type != "rope"
    if learned and config.interpolate_antialias and config.interpolate_offset:
        raise ValueError(
            f"A model with interpolate_offset={config.interpolate_offset} and interpolate_antialias=True cannot be "
            "exported for every size. Set interpolate_offset=0 in its config, and evaluate the model again."
        )
    # a size that it is not compared on
    cols = next(cells for cells in (3, 4, 5) if cells - config.grid_size[1] not in (0, 1))
    pixel_values = torch.zeros(2, config.num_channels, 4 * config.patch_size, cols * config.patch_size)
    dynamic = {0: Dim("batch"), 2: config.patch_size * Dim("rows"), 3: config.patch_size * Dim("cols")}
    with torch.no_grad():
        program = torch.export.export(model, (pixel_values,), dynamic_shapes={INPUT: dynamic})
    for node in program.graph.nodes:
        # where the code lies on this machine
        node.meta.pop("stack_trace", None)
    return program


def compare(
    run: Callable[[torch.Tensor], Mapping[str, torch.Tensor]], model: NamedOutputs, path: Path, name: str
) -> Exported:
    """Compares a program with torch, on random images of two shapes that were not seen when it was traced.

    Args:
        run: From images to outputs by name.
        model: What was exported.
        path: The file, for the result.
        name: Of what runs the program, for the error.

    Raises:
        ValueError: where an output is another, or differs by more than 1e-4 of its largest value.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    # the size of the training and another, which is not square, with fewer and more patches along one side
    rows, cols = (max(2, cells) for cells in config.grid_size)
    shapes = tuple(
        (batch_size, config.num_channels, grid[0] * config.patch_size, grid[1] * config.patch_size)
        for batch_size, grid in ((1, (rows, cols)), (3, (rows // 2 + 1, cols + 1)))
    )
    largest = 0.0
    for shape in shapes:
        pixel_values = torch.randn(shape, generator=generator)
        with torch.no_grad():
            expected = model(pixel_values)
        actual = run(pixel_values)
        if list(actual) != list(expected):
            raise ValueError(f"{name} returns {', '.join(actual)}, and torch {', '.join(expected)}.")
        for output, tensor in expected.items():
            difference = _relative_difference(actual[output], tensor)
            # also where it is no number
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"Nothing was written: {name} and torch differ by {difference:.1e} of the largest value of "
                    f"{output}, for {INPUT} of shape {shape}; {TOLERANCE:.0e} is allowed. Please report it with the "
                    "config of the model."
                )
            largest = max(largest, difference)
    return Exported(path, tuple(expected), shapes, largest)


def _relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)).item()


def metadata(model: NamedOutputs, image_processor: BaseImageProcessor | None = None) -> dict[str, Any]:
    """What a user of the file has to know and no program says, as JSON can hold it.

    `image_size` is the height and width that the model was trained for, `patch_size` what others are a multiple of.
    From the image processor are `image_mean` and `image_std`, for each channel of values from 0 to 1. `class_names`,
    of classifiers and segmentation, are in the order of the logits.
    """
    config = model.config
    found = {"image_size": [cells * config.patch_size for cells in config.grid_size], "patch_size": config.patch_size}
    if image_processor is not None:
        mean, std = image_processor.image_mean, image_processor.image_std
        if not image_processor.do_normalize:
            mean, std = [0.0] * config.num_channels, [1.0] * config.num_channels
        found |= {"image_mean": list(mean), "image_std": list(std)}
    if isinstance(model.model, ViTRegForImageClassification | ViTRegForSemanticSegmentation):
        found["class_names"] = [config.id2label[index] for index in range(config.num_labels)]
    return found


def export_program(
    model: PreTrainedModel, path: str | Path, image_processor: BaseImageProcessor | None = None
) -> Exported:
    """Writes a model as a program of torch, a `.pt2` file that needs neither this package nor transformers.

    `torch.export.load(path).module()(pixel_values)` gives the outputs of `NamedOutputs` by their names, for any batch
    size and any height and width of two patches or more. They have to be multiples of the patch size: a program does
    not refuse others, and leaves out the pixels that fill no patch.
    `metadata` is in the extra file `metadata.json`, which `torch.export.load` reads by its argument `extra_files`.

    Args:
        model: As `NamedOutputs` takes it.
        path: The file, replaced where there is one. It is there whole or not at all.
        image_processor: Of the model, for the metadata.

    Raises:
        ValueError: where the program, as it is read back, differs from the model by more than 1e-4 of the largest
            value of an output; nothing is written then.
    """
    path, named = Path(path), NamedOutputs(model)
    program = trace(named)
    with atomic_file(path) as partial:
        # by handle: torch wants to see the suffix .pt2
        with partial.open("wb") as file:
            torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata(named, image_processor))})
        with partial.open("rb") as file:
            module = torch.export.load(file).module()
        return compare(module, named, path, "the exported program")
