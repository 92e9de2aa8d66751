# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Models that transformers saved, by folder or by their name on the Hub, and the list of those that are well known."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError

from conversion import deit, dino, dinov2, dinov3
from conversion.family import (
    APACHE_2,
    MIT,
    UNKNOWN_LICENSE,
    Architecture,
    ConversionError,
    KnownCheckpoint,
    License,
)
from conversion.published import nearest
from conversion.renaming import shown
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel
from hf_vitreg.hub.export import CARD, CONFIG, INDEX, WEIGHTS


HUB_URL = "https://huggingface.co"
PYTORCH_WEIGHTS, PYTORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # of dual encoders it is a part of the latter
SHARDS = "model-*-of-*.safetensors"
FILES_TO_FETCH = [CONFIG, *PROCESSORS, CARD, WEIGHTS, INDEX, SHARDS]
PYTORCH_FILES_TO_FETCH = [PYTORCH_WEIGHTS, PYTORCH_INDEX, "pytorch_model-*-of-*.bin"]


@dataclass(frozen=True)
class HubModel:
    """A well-known repository.

    Attributes:
        arch: The name of its architecture.
        license: Of the weights, "unknown" where the card names none.
        config: Of the same shapes.
        is_classifier: Whether it has a classifier.
    """

    arch: str
    license: License
    config: ViTRegConfig
    is_classifier: bool = False


def _vit(hidden_size: int, num_hidden_layers: int, patch_size: int) -> Architecture:
    return Architecture(hidden_size, num_hidden_layers, 4 * hidden_size, patch_size=patch_size)


VIT_ARCHITECTURES = {
    "vitb16": _vit(768, 12, 16),
    "vitb32": _vit(768, 12, 32),
    "vitl16": _vit(1024, 24, 16),
    "vitl32": _vit(1024, 24, 32),
    "vith14": _vit(1280, 32, 14),
}
# google/vit-…: architecture, name, side of the images, classes
VITS = (
    ("vitb16", "base-patch16-224", 224, 1000),
    ("vitb16", "base-patch16-384", 384, 1000),
    ("vitb32", "base-patch32-384", 384, 1000),
    ("vitl16", "large-patch16-224", 224, 1000),
    ("vitl16", "large-patch16-384", 384, 1000),
    ("vitl32", "large-patch32-384", 384, 1000),
    ("vitb16", "base-patch16-224-in21k", 224, 0),
    ("vitb32", "base-patch32-224-in21k", 224, 0),
    ("vitl16", "large-patch16-224-in21k", 224, 0),
    ("vitl32", "large-patch32-224-in21k", 224, 0),
    ("vith14", "huge-patch14-224-in21k", 224, 0),
)
CLIP_ARCHITECTURES = {
    "clip_vitb32": _vit(768, 12, 32),
    "clip_vitb16": _vit(768, 12, 16),
    "clip_vitl14": _vit(1024, 24, 14),
    "clip_vith14": _vit(1280, 32, 14),
    "clip_vitbigg14": Architecture(1664, 48, 8192, patch_size=14),
}
# repository, architecture, side of the images, width of the projection, licence
CLIPS = (
    ("openai/clip-vit-base-patch32", "clip_vitb32", 224, 512, UNKNOWN_LICENSE),
    ("openai/clip-vit-base-patch16", "clip_vitb16", 224, 512, UNKNOWN_LICENSE),
    ("openai/clip-vit-large-patch14", "clip_vitl14", 224, 768, UNKNOWN_LICENSE),
    ("openai/clip-vit-large-patch14-336", "clip_vitl14", 336, 768, UNKNOWN_LICENSE),
    ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "clip_vith14", 224, 1024, MIT),
    ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "clip_vitbigg14", 224, 1280, MIT),
)
# What tells two architectures apart.
SHAPE_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "intermediate_size",
    "patch_size",
    "use_swiglu_ffn",
    "num_register_tokens",
    "use_distillation_token",
    "use_pre_layernorm",
    "position_embedding_type",
)


@functools.cache
def hub_models() -> dict[str, HubModel]:
    """By their names on the Hub: those that the originals' families know, and those that only the Hub has."""
    models = {}
    for family in (dino.FAMILY, dinov2.FAMILY, dinov3.FAMILY, deit.FAMILY):
        is_classifier = family.model_class is ViTRegForImageClassification
        for one in family.published.values():
            if one.base_model is not None:
                config = family.config(family.architectures[one.arch])
                models[one.base_model] = HubModel(one.arch, one.license, config, is_classifier)
    for one in dinov2.FAMILY.published.values():
        architecture = dinov2.ARCHITECTURES[one.arch]
        config = dinov2.config({**vars(architecture), "image_size": 518, "use_mask_token": True, "num_labels": 1000})
        models[f"{one.base_model}-imagenet1k-1-layer"] = HubModel(one.arch, APACHE_2, config, is_classifier=True)
    for arch, name, side, num_labels in VITS:
        config = deit.config({**vars(VIT_ARCHITECTURES[arch]), "image_size": side, "num_labels": num_labels})
        models[f"google/vit-{name}"] = HubModel(arch, APACHE_2, config, is_classifier=num_labels > 0)
    for name, arch, side, width, license in CLIPS:
        config = _clip_config(CLIP_ARCHITECTURES[arch], side, width)
        models[name] = HubModel(arch, license, config)
    return models


def _clip_config(architecture: Architecture, image_size: int, projection_dim: int) -> ViTRegConfig:
    return ViTRegConfig(
        **{**vars(architecture), "image_size": image_size},
        num_attention_heads=16,
        layerscale_value=None,
        patch_bias=False,
        use_pre_layernorm=True,
        projection_dim=projection_dim,
        classifier_layout="cls",
    )


def known_checkpoints() -> list[KnownCheckpoint]:
    """Every well-known repository, for the list."""
    return [
        KnownCheckpoint(
            family="transformers",
            name=name,
            arch=model.arch,
            source=f"{HUB_URL}/{name}",
            num_registers=model.config.num_register_tokens,
            patch_size=model.config.patch_size,
            num_parameters=_num_parameters(model),
            license=str(model.license),
        )
        for name, model in hub_models().items()
    ]


def _num_parameters(known: HubModel) -> int:
    with torch.device("meta"):
        model = (ViTRegForImageClassification if known.is_classifier else ViTRegModel)(known.config)
    return sum(parameter.numel() for parameter in model.parameters())


def architecture_name(repository: str | None, config: ViTRegConfig) -> str | None:
    """Of a well-known repository, or of one with the same shapes."""
    models = hub_models()
    if repository in models:
        return models[repository].arch
    same = [
        model.arch
        for model in models.values()
        if all(getattr(model.config, name) == getattr(config, name) for name in SHAPE_FIELDS)
    ]
    return next(iter(same), None)


@dataclass(frozen=True)
class Source:
    """A model that transformers saved.

    Attributes:
        folder: With its files.
        repository: Its name on the Hub, where it is from there.
    """

    folder: Path
    repository: str | None

    def describe(self) -> dict:
        """For the record: the repository and the commit, by which its folder in the cache is called."""
        return {"repository": self.repository, "revision": self.folder.name} if self.repository else {}

    def config(self) -> dict[str, Any]:
        """What config.json says. `ConversionError` where it cannot be read."""
        path = self.folder / CONFIG
        if not path.is_file():
            raise ConversionError(
                f"{self.folder} has no {CONFIG}. Give the folder that a model of transformers was saved to, or a "
                "repository of the Hub."
            )
        return _read_json(path)

    def weight_files(self) -> list[Path]:
        """What `from_pretrained` would read: a single file, or the shards of an index, safetensors first."""
        for single, index in ((WEIGHTS, INDEX), (PYTORCH_WEIGHTS, PYTORCH_INDEX)):
            if (self.folder / single).is_file():
                return [self.folder / single]
            if (self.folder / index).is_file():
                return self._shards(self.folder / index)
        raise ConversionError(
            f"{self.folder} has no weights: there is neither {WEIGHTS} nor {PYTORCH_WEIGHTS}, nor the index of either."
        )

    def _shards(self, index: Path) -> list[Path]:
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise ConversionError(f"{index} is no index of weights: it has no weight_map.")
        names = sorted(set(weight_map.values()))
        absent = [name for name in names if not (self.folder / name).is_file()]
        if absent:
            raise ConversionError(f"{self.folder} lacks {shown(absent)} of the {len(names)} files of its weights.")
        return [self.folder / name for name in names]

    def has_image_processor(self) -> bool:
        """Whether one was saved, by itself or as a part of a dual encoder's processor."""
        single, whole = (self.folder / name for name in PROCESSORS)
        return single.is_file() or (whole.is_file() and "image_processor" in _read_json(whole))

    def license(self) -> License:
        """What the card says; else, of a well-known repository, what is known; else "unknown"."""
        known = hub_models().get(self.repository)
        return self._license_of_card() or (known.license if known else UNKNOWN_LICENSE)

    def _license_of_card(self) -> License | None:
        try:
            metadata = ModelCard.load(self.folder / CARD).data.to_dict()
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError):
            return None
        license, name, link = (metadata.get(key) for key in ("license", "license_name", "license_link"))
        if license != "other":
            return License(license) if isinstance(license, str) else None
        if link and "://" not in link and self.repository is not None:
            link = f"{HUB_URL}/{self.repository}/blob/main/{link}"
        # a link to a file that stays behind leads nowhere
        return License(license, name, link) if name and link and "://" in link else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is no valid JSON: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a JSON object. Download it again.")
    return content


def locate(checkpoint: str, cache_dir: Path | None = None) -> Source:
    """A folder, where there is one of this name, else a repository of the Hub, of which what is needed is downloaded.

    Args:
        checkpoint: A folder, or the name of a repository.
        cache_dir: Where downloads go; transformers' own cache where not given.

    Raises:
        ConversionError: where there is neither, or the Hub does not answer.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return Source(path, None)
    if path.exists():
        raise ConversionError(f"{checkpoint} is a file. Give the folder that it is in: the config is needed too.")
    try:
        folder = Path(snapshot_download(checkpoint, allow_patterns=FILES_TO_FETCH, cache_dir=cache_dir))
        if not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
            snapshot_download(checkpoint, allow_patterns=PYTORCH_FILES_TO_FETCH, cache_dir=cache_dir)
    except HFValidationError as error:
        raise ConversionError(
            f"{checkpoint} is neither a folder nor the name of a repository. {nearest(checkpoint, hub_models())}"
        ) from error
    except GatedRepoError as error:
        raise ConversionError(
            f"{checkpoint} is published under a licence that everybody accepts for themselves. Accept it at "
            f"{HUB_URL}/{checkpoint}, log in with `hf auth login`, and repeat."
        ) from error
    except OSError as error:
        raise ConversionError(
            f"{checkpoint} is no folder, and cannot be had from the Hub: {str(error).strip().splitlines()[0]} Check "
            f"the name and the network; for a private repository log in with `hf auth login`.{_meant(checkpoint)}"
        ) from error
    return Source(folder, checkpoint)


def _meant(checkpoint: str) -> str:
    """The nearest well-known name, if this is none."""
    return "" if checkpoint in hub_models() else f" {nearest(checkpoint, hub_models())}"
