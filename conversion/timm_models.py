# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Vision transformers of timm, with and without registers: by name, from a folder, or from a weight file.

Architectures, names, licences and preprocessing are what the installed timm says (timm/models/vision_transformer.py
and deit.py); what its models compute is read from the models themselves, see timm_layout.py.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import BitImageProcessor
from transformers.image_utils import PILImageResampling

from conversion.family import UNKNOWN_LICENSE, ConversionError, KnownCheckpoint, License, Prepared
from conversion.linear_heads import set_labels
from conversion.parity import comparison_sizes
from conversion.published import nearest
from conversion.reading import describe_source, in_one_dtype, read_leaves
from conversion.recognize import hint, recognize
from conversion.renaming import fill
from conversion.timm_layout import (
    MODULES,
    POOL,
    TimmOutputs,
    architectures,
    config_of,
    create,
    head_of,
    module_of,
    our_outputs,
    plain_architecture,
    rules,
)
from conversion.timm_reference import require_timm
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel


try:
    from timm.models import (
        get_deprecated_models,
        get_pretrained_cfg,
        is_model,
        list_pretrained,
        split_model_name_tag,
    )
except ImportError:
    get_pretrained_cfg = None


CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB = "https://huggingface.co"
# Licences that the Hub knows by these ids, https://huggingface.co/docs/hub/repositories-licenses
HUB_LICENSES = ("apache-2.0", "mit", "cc-by-nc-4.0", "cc-by-4.0", "bsd-3-clause", "apple-ascl", "apple-amlr")
INTERPOLATIONS = {name.lower(): PILImageResampling[name] for name in ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS")}

# Models that are called vit_ or deit_ and are none, by the module of timm that builds them.
OTHER_MODULES = {
    "eva": "rotary position embeddings, or other parts of EVA",
    "vision_transformer_relpos": "relative position biases",
    "vision_transformer_hybrid": "a convolutional network before the patches",
    "vision_transformer_sam": "windowed attention with relative positions",
    "naflexvit": "a layout of its own, for images of any shape",
}
DINOV3 = (
    "timm leaves out the periods of DINOv3's rotary embeddings, which are stored rounded. Convert Meta's file with "
    "the command dinov3, or the repository in transformers' layout with the command transformers."
)
# Of two networks in a training checkpoint timm takes the average of the weights, and so do we.
PREFIXES = ("state_dict_ema.", "model_ema.", "state_dict.", "model.", "")
WRAPPERS = re.compile(r"(?:(?:module|_orig_mod)\.)*")
# Families whose names are among timm's, and what DINOv2 has beside them.
SAME_NAMES = (None, "timm", "dino", "deit", "dinov2")
DINOV2_NAMES = {"mask_token", "register_tokens"}


@dataclass(frozen=True)
class _Source:
    """What the user asked for.

    Attributes:
        title: Of the model, in messages.
        name: What `timm.create_model` is called with.
        architecture: timm's name of it.
        weights: The file.
        file_name: In the record.
        license: As its owner says, `None` where nobody does.
        repository: On the Hub.
        label_names: Of the classes, where they are told.
        shapes_decide: Whether classes and image size are those that the tensors are for.
        remarks: For the user.
    """

    title: str
    name: str
    architecture: str
    weights: Path
    file_name: str
    license: str | None = None
    repository: str | None = None
    label_names: list[str] = field(default_factory=list)
    shapes_decide: bool = False
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _State:
    """A state dict: what stood before its names, and what lay beside it."""

    prefix: str
    tensors: dict[str, torch.Tensor]
    left_aside: list[str]


def prepare(
    checkpoint: str, arch: str | None = None, cache_dir: Path | None = None, license: str | None = None
) -> Prepared:
    """A vision transformer of timm as ViTReg, with timm's model beside it.

    Args:
        checkpoint: A published name ("vit_betwixt_patch16_reg4_gap_256" or, with its tag, "….sbb_in12k_ft_in1k"), a
            repository of the Hub or a folder in timm's layout, or a weight file.
        arch: Of a weight file: timm's name of its architecture. The number of classes and the image size are those
            that the tensors are for.
        cache_dir: Where downloads go; the Hub's cache where not given.
        license: Of the weights, for the card. Else what timm or the folder says, or "unknown".

    Raises:
        ConversionError: for everything that is not a whole checkpoint of a plain ViT.
    """
    require_timm()
    source = _locate(checkpoint, arch, cache_dir)
    _check_module(source.title, source.architecture)
    model = create(source.name, dynamic_img_size=True)
    config = config_of(model, source.title)
    state = _read(source.weights, source.architecture, config)
    if source.shapes_decide:
        model = _for_shapes(source, model, config, state.tensors)
        config = config_of(model, source.title)
    [tensors] = in_one_dtype(state.tensors)
    left_aside = list(state.left_aside)

    num_classes, ours = model.num_classes, dict(tensors)
    if _is_projection(config, tensors):
        config.projection_dim, num_classes = num_classes, 0
        ours.pop("head.bias")
        left_aside.append("head.bias (zeros: the head is a projection)")
    elif num_classes:
        _set_labels(config, num_classes, source.label_names)
    model_class = ViTRegForImageClassification if num_classes else ViTRegModel
    image_processor, remarks = _image_processor(model.pretrained_cfg, config, source.shapes_decide)
    try:
        filled = fill(model_class, config, ours, rules(config, is_classifier=num_classes > 0))
    except ConversionError as error:
        raise ConversionError(f"{source.weights} is no {source.architecture} as timm builds it. {error}") from error
    model.load_state_dict(tensors, assign=True)
    head = head_of(filled, model)
    reference = TimmOutputs(model.eval(), head)
    return Prepared(
        model=filled,
        image_processor=image_processor,
        reference=reference,
        reference_name=reference.name,
        sizes=comparison_sizes(config),
        arch=source.architecture,
        sources=[describe_source(source.weights) | {"file": source.file_name, "backbone": f"{state.prefix}*"}],
        left_aside=left_aside,
        license=License(license) if license else _license(source),
        base_model=source.repository,
        remarks=source.remarks + remarks,
        implementation=our_outputs(filled, head),
    )


def known_checkpoints() -> list[KnownCheckpoint]:
    """Every published name of timm that can be converted, for the list. Empty where timm is not installed."""
    if get_pretrained_cfg is None:
        return []
    known = []
    for name in list_pretrained():
        architecture = name.partition(".")[0]
        cfg = get_pretrained_cfg(name)
        # some weights are published in their original layout only
        if module_of(architecture) not in MODULES or not cfg.hf_hub_id:
            continue
        if (plain := plain_architecture(architecture)) is None:
            continue
        config, num_classes, num_parameters = plain
        # a tag has its own number of classes and its own image size
        rows, cols = (side // config.patch_size for side in cfg.input_size[1:])
        num_heads = 2 if config.use_distillation_token else 1
        num_parameters += (cfg.num_classes - num_classes) * (config.hidden_size + 1) * num_heads
        num_parameters += (rows * cols - math.prod(config.grid_size)) * config.hidden_size
        known.append(
            KnownCheckpoint(
                family="timm",
                name=name,
                arch=architecture,
                source=f"{HUB}/{cfg.hf_hub_id}",
                num_registers=config.num_register_tokens,
                patch_size=config.patch_size,
                num_parameters=num_parameters,
                license=str(cfg.license or UNKNOWN_LICENSE),
            )
        )
    return known


def _locate(checkpoint: str, arch: str | None, cache_dir: Path | None) -> _Source:
    """What is meant by a path, a repository or a published name; the last two are downloaded."""
    path = Path(checkpoint)
    if arch is not None:
        if not path.is_file():
            what = "names no file" if not path.exists() else "is a folder, whose config.json says what it is"
            raise ConversionError(f"--arch is for a weight file, and {checkpoint} {what}. Leave it out.")
        architecture, tag = _registered(arch)
        return _Source(
            title=arch,
            name=f"{architecture}.{tag}" if tag else architecture,
            architecture=architecture,
            weights=path,
            file_name=path.name,
            shapes_decide=True,
        )
    if path.is_dir():
        return _folder(path, checkpoint)
    if path.exists():
        raise ConversionError(
            f"{checkpoint} is a file, which does not say what it is. Give timm's name of its architecture, e.g. "
            "--arch vit_base_patch16_224."
        )
    repository = re.sub("^hf[-_]hub:", "", checkpoint)
    if repository.count("/") == 1 and not repository.startswith("timm/"):
        return _folder(_download(repository, cache_dir), repository, repository)
    if path.name != checkpoint and not repository.startswith("timm/"):
        raise ConversionError(f"{checkpoint} does not exist. Give a folder, a weight file or a name of timm.")
    return _published(repository.removeprefix("timm/"), cache_dir)


def _published(name: str, cache_dir: Path | None) -> _Source:
    """A name that timm publishes weights under, and its file, downloaded."""
    architecture, tag = _registered(name)
    _check_plain(name, architecture)
    cfg = get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    if not cfg.hf_hub_id:
        where = f", but in another layout at {cfg.url}" if cfg.url else ""
        raise ConversionError(f"{name} has no weights on the Hub in timm's layout{where}.")
    folder = _download(cfg.hf_hub_id, cache_dir)
    # the file may be another name's too: timm's own table, and not the config beside it, decides what it is
    content = _read_config(folder) if (folder / CONFIG).is_file() else {}
    return _Source(
        title=name,
        name=f"{architecture}.{cfg.tag}" if cfg.tag else architecture,
        architecture=architecture,
        weights=_weights_in(folder, cfg.hf_hub_id),
        file_name=f"{cfg.hf_hub_id}/{WEIGHTS}",
        license=cfg.license or content.get("pretrained_cfg", {}).get("license"),
        repository=cfg.hf_hub_id,
        label_names=_label_names(content),
        remarks=_same_weights(f"{architecture}.{cfg.tag}", cfg.hf_hub_id),
    )


def _same_weights(name: str, repository: str) -> list[str]:
    """What to know where timm has the weights of a repository under several names, as it has those of CLIP."""
    others = [one for one in list_pretrained() if get_pretrained_cfg(one).hf_hub_id == repository and one != name]
    return [
        f"timm computes something else with the same weights under the name {other}: choose the one whose activation "
        "they were trained with."
        for other in others
    ]


def _folder(folder: Path, title: str, repository: str | None = None) -> _Source:
    """A folder in the layout of timm's repositories."""
    if not (folder / CONFIG).is_file():
        raise ConversionError(f"{title} has no {CONFIG}. A folder of timm has {CONFIG} and {WEIGHTS}.")
    content = _read_config(folder)
    architecture = content.get("architecture")
    if not isinstance(architecture, str) or not is_model(architecture):
        model_type = content.get("model_type")
        hint = f" It is one of transformers, {model_type}: use the command transformers." if model_type else ""
        raise ConversionError(f"{folder / CONFIG} names no architecture of timm, but {architecture!r}.{hint}")
    return _Source(
        title=title,
        name=f"local-dir:{folder}",
        architecture=architecture,
        weights=_weights_in(folder, title),
        file_name=f"{repository}/{WEIGHTS}" if repository else WEIGHTS,
        license=content.get("license") or content.get("pretrained_cfg", content).get("license"),
        repository=repository,
        label_names=_label_names(content),
    )


def _registered(name: str) -> tuple[str, str]:
    """Architecture and tag of a name, "" where it has none.

    Raises:
        ConversionError: where timm knows no such name.
    """
    # timm had other names for some
    architecture, tag = split_model_name_tag(get_deprecated_models().get(name) or name)
    if not is_model(architecture):
        raise ConversionError(f"timm has no model {architecture}. {_nearest(architecture, architectures())}")
    tags = [known.partition(".")[2] for known in list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        hint = _nearest(name, [f"{architecture}.{known}" for known in tags]) if tags else "It has none."
        raise ConversionError(f"timm has no weights {name}. {hint}")
    return architecture, tag


def _nearest(name: str, allowed: list[str]) -> str:
    hint = nearest(name, allowed)
    return hint if len(hint) < 400 else "python conversion/convert.py --list has all that can be converted."


def _check_module(title: str, architecture: str):
    """Refuses what is no plain ViT by the module of timm that builds it, before it is downloaded."""
    module = module_of(architecture)
    if module not in MODULES:
        reason = OTHER_MODULES.get(module, f"what timm's {module} builds")
        hint = f" {DINOV3}" if "dinov3" in architecture else ""
        raise ConversionError(f"{title} is no plain ViT, and ViTReg cannot hold it: it has {reason}.{hint}")


def _check_plain(title: str, architecture: str):
    """Refuses what is no plain ViT by its structure, before it is downloaded."""
    _check_module(title, architecture)
    if plain_architecture(architecture) is None:
        config_of(create(architecture), title)


def _download(repository: str, cache_dir: Path | None) -> Path:
    """Config and weights of a repository of the Hub, of one commit."""
    try:
        return Path(snapshot_download(repository, allow_patterns=[CONFIG, WEIGHTS], cache_dir=cache_dir))
    except (OSError, HFValidationError) as error:
        raise ConversionError(
            f"{repository} cannot be had from the Hub: {str(error).strip().splitlines()[0]} Check the name and the "
            "network, or fetch the files elsewhere and give the folder."
        ) from error


def _weights_in(folder: Path, title: str) -> Path:
    if not (folder / WEIGHTS).is_file():
        raise ConversionError(
            f"{title} has no {WEIGHTS}. Give its weight file in another format itself, with --arch and timm's name of "
            "the architecture."
        )
    return folder / WEIGHTS


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not the config of a model.")
    return content


def _label_names(content: Mapping) -> list[str]:
    """Class names, described where there are descriptions; empty where the config has none."""
    names = content.get("label_names") or content.get("pretrained_cfg", {}).get("label_names")
    if not isinstance(names, list):
        return []
    descriptions = content.get("label_descriptions") or {}
    described = [descriptions.get(name, name) for name in names]
    return [text if described.count(text) == 1 else f"{text} ({name})" for text, name in zip(described, names)]


def _read(file: Path, architecture: str, config: ViTRegConfig) -> _State:
    """The state dict in a file, of several the one that timm would take.

    Raises:
        ConversionError: where it is of another layout.
    """
    leaves = read_leaves(file)
    prefix = next((prefix for prefix in PREFIXES if _starts_state_dict(leaves, prefix)), "")
    tensors, left_aside = {}, {}
    for name, leaf in leaves.items():
        own_name = WRAPPERS.sub("", name.removeprefix(prefix), count=1)
        # timm leaves it out too: its models without attention pooling were cut from those with it
        is_pool = "siglip" in architecture and config.pooler_type != "map" and own_name.startswith(POOL)
        if name.startswith(prefix) and isinstance(leaf, torch.Tensor) and not is_pool:
            tensors[own_name] = leaf
        else:
            part = "attn_pool" if is_pool else name.partition(".")[0]
            left_aside[part] = left_aside.get(part, 0) + 1
    _check_layout(file, tensors)
    parts = [f"{part} ({number} entries)" if number > 1 else part for part, number in left_aside.items()]
    return _State(prefix, tensors, parts)


def _check_layout(file: Path, names: Mapping):
    """Refuses the layouts of other families, which timm would bring to its own when it loads them."""
    if recognize(names) not in SAME_NAMES:
        raise ConversionError(f"{file} is not in timm's layout.{hint(names, 'timm')}")
    if DINOV2_NAMES & names.keys():
        raise ConversionError(
            f"{file} is not in timm's layout but in that of DINOv2: `convert.py dinov2` reads it, and keeps what timm "
            "leaves out."
        )


def _starts_state_dict(names: Mapping, prefix: str) -> bool:
    return any(
        WRAPPERS.sub("", name.removeprefix(prefix), count=1) == "patch_embed.proj.weight"
        for name in names
        if name.startswith(prefix)
    )


def _for_shapes(source: _Source, model: nn.Module, config: ViTRegConfig, tensors: Mapping) -> nn.Module:
    """timm's model for the classes and the image size that tensors are for.

    Raises:
        ConversionError: where their position embeddings are for no square grid.
    """
    model_args: dict[str, Any] = {"num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0}
    num_positions = tensors["pos_embed"].shape[1] if getattr(tensors.get("pos_embed"), "ndim", 0) == 3 else 0
    if num_positions not in (0, model.pos_embed.shape[1]):
        num_prefix_positions = model.pos_embed.shape[1] - model.patch_embed.num_patches
        side = math.isqrt(max(num_positions - num_prefix_positions, 0))
        if side**2 + num_prefix_positions != num_positions or side == 0:
            raise ConversionError(
                f"{source.weights} is no {source.architecture}: its {num_positions} position embeddings are for no "
                f"square grid and {num_prefix_positions} tokens before it."
            )
        model_args["img_size"] = side * config.patch_size
    return create(source.name, dynamic_img_size=True, **model_args)


def _is_projection(config: ViTRegConfig, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a head is CLIP's projection, which has no bias: timm holds it as a classifier with a bias of zeros."""
    return config.use_pre_layernorm and "head.bias" in tensors and not tensors["head.bias"].any()


def _set_labels(config: ViTRegConfig, num_classes: int, label_names: list[str]):
    """Names the classes: as the config of the weights does, or ImageNet-1k's where there are 1000."""
    set_labels(config, num_classes)
    if len(set(label_names)) == num_classes:
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: index for index, label in enumerate(label_names)}


def _license(source: _Source) -> License:
    """What timm says, as the Hub's metadata has it."""
    if source.license in HUB_LICENSES:
        return License(source.license)
    if source.license and source.repository:
        return License("other", source.license, f"{HUB}/{source.repository}")
    return UNKNOWN_LICENSE


def _image_processor(cfg: Mapping, config: ViTRegConfig, shapes_decide: bool) -> tuple[BitImageProcessor, list[str]]:
    """What `timm.data.create_transform` does in evaluation, and remarks on what is done in another way.

    The shorter side is resized to `input_size / crop_pct`, cut off behind the point, and the middle is cropped; where
    `crop_mode` is "squash", both sides are resized to that.
    """
    native = tuple(side * config.patch_size for side in config.grid_size)
    height, width = native if shapes_decide else tuple(cfg["input_size"])[1:]
    resized = [math.floor(side / cfg["crop_pct"]) for side in (height, width)]
    crop = [side // config.patch_size * config.patch_size for side in (height, width)]
    remarks = []
    if crop != [height, width]:
        remarks.append(
            f"Images are cropped to {crop[0]}x{crop[1]} pixels, whole patches; timm crops to {height}x{width}, and "
            "leaves out the last pixels of both sides."
        )
    crop_mode = cfg.get("crop_mode") or "center"
    if crop_mode not in ("center", "squash") or (crop_mode == "center" and height != width):
        remarks.append(
            f'timm\'s crop_mode="{crop_mode}" at {height}x{width} pixels has no counterpart: the shorter side of '
            f"images is resized to {max(resized)} pixels, and the middle is cropped."
        )
    size = {"height": resized[0], "width": resized[1]} if crop_mode == "squash" else {"shortest_edge": max(resized)}
    processor = BitImageProcessor(
        size=size,
        crop_size={"height": crop[0], "width": crop[1]},
        resample=INTERPOLATIONS.get(cfg["interpolation"], PILImageResampling.BICUBIC),
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
    )
    return processor, remarks
