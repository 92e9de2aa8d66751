# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A ViTReg model as the input of a conversion to another layout: a folder, or a repository of the Hub."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from conversion.family import UNKNOWN_LICENSE, ConversionError
from conversion.renaming import shown
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel
from hf_vitreg.hub.export import CARD, CONFIG, INDEX, WEIGHTS


PROCESSOR = "preprocessor_config.json"
# A backbone is a model whose pooler nobody reads.
MODEL_CLASSES = {
    "ViTRegModel": ViTRegModel,
    "ViTRegBackbone": ViTRegModel,
    "ViTRegForImageClassification": ViTRegForImageClassification,
}
FILES_TO_FETCH = [CONFIG, PROCESSOR, CARD, INDEX, "model*.safetensors"]


class OpenModel(NamedTuple):
    """A model that is not loaded.

    Attributes:
        config: Its config.
        image_processor: `None` where the folder has none.
        tensors: Every weight, read when it is asked for. Names are those of the families' rules: the backbone's as in
            `ViTRegModel`, a classifier's as in `ViTRegForImageClassification`.
        model_class: What the weights are of.
    """

    config: ViTRegConfig
    image_processor: BaseImageProcessor | None
    tensors: "MappedTensors"
    model_class: type[PreTrainedModel]


class MappedTensors(Mapping[str, torch.Tensor]):
    """Tensors of safetensors files. Each is mapped when it is asked for, and only for as long as somebody holds it.

    Args:
        places: For every name, the file and the name there.
    """

    def __init__(self, places: Mapping[str, tuple[Path, str]]):
        self._places = places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def without(self, *names: str) -> "MappedTensors":
        """The others."""
        return MappedTensors({name: place for name, place in self._places.items() if name not in names})

    def __getitem__(self, name: str) -> torch.Tensor:
        path, name_there = self._places[name]
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name_there)


def open_model(model: str) -> OpenModel:
    """A ViTReg model by its folder or, where there is no such folder, by its name on the Hub.

    Raises:
        ConversionError: where there is neither, where it is of another model type or its weights are not those of its
            config.
    """
    folder = local_folder(model)
    config = _config(folder)
    [architecture] = config.architectures or ["ViTRegModel"]
    if architecture not in MODEL_CLASSES:
        raise ConversionError(f"{folder} is a {architecture}. There are {', '.join(MODEL_CLASSES)}.")
    model_class = MODEL_CLASSES[architecture]
    image_processor = AutoImageProcessor.from_pretrained(folder) if (folder / PROCESSOR).is_file() else None
    return OpenModel(config, image_processor, _tensors(folder, model_class, config), model_class)


def license_of(folder: Path) -> str | None:
    """What the model card says of the weights, `None` where it says nothing."""
    try:
        license = ModelCard.load(folder / CARD).data.license if (folder / CARD).is_file() else None
    except ValueError:  # no card that can be read
        return None
    return None if license == str(UNKNOWN_LICENSE) else license


def short_card(folder: Path, text: str) -> ModelCard | None:
    """A card for the same weights in another layout, with their licence and origin; `None` where neither is known."""
    if license_of(folder) is None:
        return None
    data = ModelCard.load(folder / CARD).data
    kept = {name: data.get(name) for name in ("license", "license_name", "license_link", "base_model")}
    kept |= {"library_name": "transformers", "pipeline_tag": data.get("pipeline_tag")}
    return ModelCard(f"---\n{ModelCardData(**kept).to_yaml()}\n---\n\n{text}\n")


def local_folder(model: str) -> Path:
    """The folder that is meant, or the one that a repository of the Hub was downloaded to.

    Raises:
        ConversionError: where there is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    if Path(model).exists():
        raise ConversionError(f"{model} is a file. Give the folder of a ViTReg model, or its name on the Hub.")
    try:
        return Path(snapshot_download(model, allow_patterns=FILES_TO_FETCH))
    except HFValidationError as error:
        raise ConversionError(f"{model} does not exist. Give the folder of a ViTReg model.") from error
    except OSError as error:
        raise ConversionError(
            f"{model} is no folder, and cannot be had from the Hub: {str(error).strip().splitlines()[0]} Check the "
            "name and the network; for a private repository log in with `hf auth login`."
        ) from error


def _config(folder: Path) -> ViTRegConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise ConversionError(f"{folder} has no {CONFIG}, so it is no model. Give a folder that ViTReg was saved to.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is no valid JSON: {error}.") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type != ViTRegConfig.model_type:
        raise ConversionError(
            f"{folder} holds a model of type {model_type!r}, not {ViTRegConfig.model_type!r}. Convert it to ViTReg "
            "first: python conversion/convert.py --help."
        )
    try:
        return ViTRegConfig.from_pretrained(folder)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"{path}: {' '.join(str(error).split())}") from error


def _tensors(folder: Path, model_class: type[PreTrainedModel], config: ViTRegConfig) -> MappedTensors:
    """Every tensor's place, once it is known that the model's are there, of its shapes, and no others."""
    with torch.device("meta"):
        model = model_class(config)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    expected = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found, places = {}, {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                for name in names:
                    own_name = name.removeprefix(prefix)
                    places[own_name] = (path, name)
                    found[own_name] = tuple(file.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ConversionError(f"{path} is cut short or damaged: {error}. Write or download it again.") from error
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": [name for name in expected if found.get(name, expected[name]) != expected[name]],
    }
    lines = [f"{len(names)} tensors are {what}: {shown(names)}" for what, names in problems.items() if names]
    if lines:
        raise ConversionError(
            f"The weights in {folder} are not those of its {CONFIG}, a {model_class.__name__}.\n  "
            + "\n  ".join(lines)
        )
    return MappedTensors({name: places[name] for name in expected})


def _weight_files(folder: Path) -> list[Path]:
    """What `from_pretrained` would read: the single file if there is one, else the shards of the index."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ConversionError(
            f"{folder} has no weights: there is neither {WEIGHTS} nor {INDEX}. Weights in other formats are read by "
            "from_pretrained and written as safetensors by save_pretrained."
        )
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{folder / INDEX} is no index of weights. Write the model again.") from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ConversionError(f"{folder} lacks {shown(absent)} of the {len(names)} files of its weights.")
    return [folder / name for name in names]
