# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What transformers' own classes saved: ViT, DeiT, DINOv2, DINOv3 and CLIP's vision tower.

The converted model equals transformers', which is not everywhere the original. DINO and DINOv2 without registers
interpolate their position embeddings by scale factors with an offset there, and to a size in transformers;
`--interpolate-offset 0.1` gives the original's back. DINOv3 stores the periods of its rotation, rounded, and
transformers computes them.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoImageProcessor,
    CLIPConfig,
    CLIPPreTrainedModel,
    CLIPVisionConfig,
    Dinov2Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from conversion.family import CUSTOM, ConversionError, License, Outputs, Prepared
from conversion.parity import comparison_sizes
from conversion.reading import describe_source, in_one_dtype, read_leaves
from conversion.recognize import hint
from conversion.renaming import fill, shown
from conversion.transformers_hub import Source, architecture_name, hub_models, locate
from conversion.transformers_layouts import LAYOUTS, PERIODS, Layout, periods
from conversion.transformers_reference import TransformersReference, loaded
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel


# The embedding that stands before all others has the whole of what the names of a backbone start with.
FIRST_TOKEN = re.compile(r"((?:.*\.)?)embeddings\.(?:cls_token|class_embedding)")


def prepare(
    checkpoint: str,
    interpolate_antialias: bool | None = None,
    interpolate_offset: float | None = None,
    cache_dir: Path | None = None,
    license: str | None = None,
) -> Prepared:
    """A model of transformers as ViTReg, with transformers' own beside it.

    Args:
        checkpoint: A folder, or a repository of the Hub such as "facebook/dinov2-with-registers-small".
        interpolate_antialias: See `ViTRegConfig`. Where not given as transformers does it.
        interpolate_offset: See `ViTRegConfig`. Where not given as transformers does it: 0.
        cache_dir: Where downloads go; transformers' own cache where not given.
        license: Of the weights, for the card. Where not given what the source's card says.

    Raises:
        ConversionError: for everything that is not a whole model of a type that a ViTReg can be.
    """
    source = locate(checkpoint, cache_dir)
    layout, their_config = read_config(source)
    files = source.weight_files()
    prefix, tensors, left_aside = read_tensors(files, layout)
    asked = {"interpolate_antialias": interpolate_antialias, "interpolate_offset": interpolate_offset}
    fields = layout.fields(their_config, tensors)
    wishes = {name: value for name, value in asked.items() if value not in (None, fields[name])}
    config = _config(source, their_config, fields | wishes)
    _check_wishes(config, wishes)
    [tensors] = in_one_dtype(tensors)
    model_class = ViTRegForImageClassification if layout.has_classifier(tensors) else ViTRegModel
    model = fill(model_class, config, own_tensors(tensors, config), layout.rules(config.use_swiglu_ffn))
    reference = reference_of(layout, their_config, tensors)
    return Prepared(
        model=model,
        image_processor=_image_processor(source, layout, config),
        reference=reference,
        reference_name=reference.name,
        sizes=[_native_size(config)] if wishes or not _takes_every_size(config) else comparison_sizes(config),
        arch=architecture_name(source.repository, config) or CUSTOM,
        sources=[describe_source(file) | source.describe() | {"backbone": f"{prefix}*"} for file in files],
        left_aside=left_aside + _unread(tensors, config, prefix),
        license=License(license) if license else source.license(),
        base_model=source.repository,
        implementation=_implementation(model),
        remarks=_remarks(source, config, their_config, wishes),
    )


def read_config(source: Source) -> tuple[Layout, PreTrainedConfig]:
    """What config.json says. `ConversionError` where it is of no type that a ViTReg can be."""
    content = source.config()
    model_type = content.get("model_type")
    if model_type not in LAYOUTS:
        already = " It is a ViTReg model already: load it with from_pretrained." * (model_type == "vitreg")
        raise ConversionError(
            f"{source.folder} holds a model of type {model_type!r}. There are {', '.join(LAYOUTS)}.{already}"
        )
    layout = LAYOUTS[model_type]
    try:
        return layout, layout.config_class.from_dict(content)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise _unusable_config(source, error) from error


def _unusable_config(source: Source, error: Exception) -> ConversionError:
    return ConversionError(f"{source.folder / 'config.json'}: {' '.join(str(error).split())}")


def read_tensors(files: list[Path], layout: Layout) -> tuple[str, dict[str, torch.Tensor], list[str]]:
    """The prefix of the backbone's names; its tensors without it, with those of heads; and what is left aside.

    Raises:
        ConversionError: where there is no backbone of this layout, or more than one.
    """
    leaves = {name: leaf for file in files for name, leaf in read_leaves(file).items()}
    prefixes = {match[1] for match in map(FIRST_TOKEN.fullmatch, leaves) if match}
    if len(prefixes) != 1:
        found = f"backbones under {', '.join(map(repr, sorted(prefixes)))}" if prefixes else f"{shown(list(leaves))}"
        raise ConversionError(
            f"{files[0]} is no {layout.title} checkpoint of transformers, or not one alone: it has {found}."
            + hint(leaves, "transformers")
        )
    [prefix] = prefixes
    tensors, left_aside = {}, Counter()
    for name, leaf in leaves.items():
        own_name = name.removeprefix(prefix)
        part = layout.left_aside.match(own_name)
        if part is not None:
            left_aside[name.removesuffix(own_name) + part[1]] += 1
        elif isinstance(leaf, torch.Tensor):
            tensors[own_name] = leaf
        else:
            left_aside[name] += 1
    return prefix, tensors, _counted(left_aside)


def _counted(parts: Mapping[str, int]) -> list[str]:
    return [f"{part} ({number} entries)" if number > 1 else part for part, number in parts.items()]


def _config(source: Source, their_config: PreTrainedConfig, fields: Mapping) -> ViTRegConfig:
    """Models without a classifier keep their labels too, for one to come."""
    labels = {name: getattr(their_config, name) for name in ("id2label", "label2id", "problem_type")}
    try:
        return ViTRegConfig(**fields, **labels)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise _unusable_config(source, error) from error


def own_tensors(tensors: Mapping[str, torch.Tensor], config: ViTRegConfig) -> dict[str, torch.Tensor]:
    """Those that ViTReg reads, in its shapes, as views; and the periods of a rotation, which no file has."""
    width = config.hidden_size
    shapes = {
        # with two dimensions in DINOv2, with three everywhere else
        "embeddings.mask_token": (1, width),
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.position_embedding.weight": (1, -1, width),
    }
    unread = _unread_names(tensors, config)
    own = {
        name: tensor.view(shapes[name]) if name in shapes and tensor.shape[-1:] == (width,) else tensor
        for name, tensor in tensors.items()
        if name not in unread
    }
    if config.position_embedding_type == "rope":
        own[PERIODS] = periods(config)
    return own


def _unread_names(tensors: Mapping[str, torch.Tensor], config: ViTRegConfig) -> list[str]:
    """What transformers stores, and no ViTReg of this config: registers where there are none, a norm nobody reads."""
    without_norm = config.final_norm == "none"
    return [
        name
        for name, tensor in tensors.items()
        if tensor.numel() == 0 or (without_norm and name.startswith("post_layernorm."))
    ]


def _unread(tensors: Mapping[str, torch.Tensor], config: ViTRegConfig, prefix: str) -> list[str]:
    names = [name for name in _unread_names(tensors, config) if tensors[name].numel()]
    return _counted(Counter(prefix + name.rpartition(".")[0] for name in names))


def reference_of(
    layout: Layout, their_config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor]
) -> TransformersReference:
    """transformers' model of these tensors, loaded by transformers itself."""
    head = layout.head(tensors)
    model_class = layout.models[head]
    config = their_config
    if model_class.config_class is CLIPVisionConfig:
        config = getattr(their_config, "vision_config", their_config)
    if head == "visual_projection":
        config.projection_dim = tensors["visual_projection.weight"].shape[0]
    prefix = layout.prefix(head)
    heads = tuple(f"{each}." for each in (*layout.models, "distillation_classifier") if each)
    under_their_names = {
        name if name.startswith(heads) else prefix + name: tensor
        for name, tensor in tensors.items()
        if name not in layout.not_in_reference
    }
    model = loaded(model_class, config, under_their_names, layout.options if head == "" else {})
    base_model = getattr(model, prefix.removesuffix(".")) if prefix else model
    norms_cls_only = isinstance(model, CLIPPreTrainedModel) and head != "classifier"
    return TransformersReference(model, base_model, norms_cls_only)


def _image_processor(source: Source, layout: Layout, config: ViTRegConfig) -> BaseImageProcessor:
    if not source.has_image_processor():
        return layout.image_processor(config)
    try:
        return AutoImageProcessor.from_pretrained(source.folder, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ConversionError(
            f"{source.folder} has an image processor that cannot be read: {' '.join(str(error).split())} Remove its "
            f"file to have that of {layout.title} by default."
        ) from error


def _implementation(model: PreTrainedModel) -> Callable[[torch.Tensor], Outputs] | None:
    """With the embeddings of a projection, where there is one."""
    if model.config.projection_dim is None:
        return None

    def outputs(pixel_values: torch.Tensor) -> Outputs:
        returned = model(pixel_values)
        return {"tokens": returned.last_hidden_state, "image_embeds": returned.image_embeds}

    return outputs


def _native_size(config: ViTRegConfig) -> tuple[int, int]:
    rows, cols = config.grid_size
    return rows * config.patch_size, cols * config.patch_size


def _takes_every_size(config: ViTRegConfig) -> bool:
    """Whether transformers can interpolate the position embeddings: it takes them for those of a square grid."""
    rows, cols = config.grid_size
    return rows == cols or config.position_embedding_type == "rope"


def _check_wishes(config: ViTRegConfig, wishes: Mapping):
    """Raises `ConversionError` where there is nothing to interpolate."""
    if wishes and config.position_embedding_type == "rope":
        raise ConversionError(
            f"{', '.join(f'--{name}'.replace('_', '-') for name in wishes)} does not fit: the model has no position "
            "embeddings, it rotates queries and keys. Leave it out."
        )


def _remarks(source: Source, config: ViTRegConfig, their_config: PreTrainedConfig, wishes: Mapping) -> list[str]:
    height, width = _native_size(config)
    rule = ", ".join(f"{name}={value}" for name, value in wishes.items())
    remarks = {
        f"The outputs were compared at {height}x{width} pixels only: transformers cannot interpolate position "
        f"embeddings with {rule}.": bool(wishes),
        f"The outputs were compared at {height}x{width} pixels only: transformers interpolates position embeddings of "
        "square images only.": not _takes_every_size(config),
        "Position embeddings are interpolated as transformers does it, to a size. The original model uses scale "
        f"factors with an offset, --interpolate-offset 0.1: other outputs at every size but {height}x{width}.": (
            not wishes and _original_has_offset(source, their_config)
        ),
        "The periods of the rotation are in no file of transformers: they are computed from rope_theta, as "
        "transformers does it. The original's files have them, rounded; `convert.py dinov3` keeps those.": (
            config.position_embedding_type == "rope"
        ),
        "This is the vision tower alone. Of OpenCLIP's own files `convert.py open_clip` makes a dual encoder with "
        "both towers.": isinstance(their_config, CLIPConfig),
    }
    return [remark for remark, applies in remarks.items() if applies]


def _original_has_offset(source: Source, their_config: PreTrainedConfig) -> bool:
    """Whether this is DINO, which only its name tells from another ViT, or DINOv2 without registers."""
    known = hub_models().get(source.repository)
    return known.config.interpolate_offset != 0 if known else isinstance(their_config, Dinov2Config)
