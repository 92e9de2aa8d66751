# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""OpenCLIP's published models by name: those that can be converted, where they are, and why the others cannot.

The names are those of the installed package (open_clip/pretrained.py). Licences: docs/PRETRAINED.md of
https://github.com/mlfoundations/open_clip for MetaCLIP and DFN, a maintainer's answer there (thread 177) for what was
trained on LAION's data, unknown where neither says it.
"""

import difflib
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from conversion.family import MIT, UNKNOWN_LICENSE, ConversionError, License, Published
from conversion.open_clip_reference import open_clip


BASE_URL = "https://huggingface.co"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
QUICK_GELU_SUFFIX = "-quickgelu"
CC_BY_NC = License("other", "CC-BY-NC", "https://github.com/facebookresearch/MetaCLIP")
APPLE = License("other", "Apple", "https://huggingface.co/apple/DFN5B-CLIP-ViT-H-14-384/blob/main/LICENSE")
LICENSES = {"openai": MIT, "laion": MIT, "metaclip": CC_BY_NC, "dfn": APPLE}  # by the start of a tag


def out_of_reach(model: str) -> str | None:
    """Why a model of OpenCLIP's is no ViT with CLIP's text tower; `None` where it is one."""
    config = open_clip.get_model_config(model) or {}
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if "timm_model_name" in vision:
        return f"its vision tower is timm's {vision['timm_model_name']}"
    if "multimodal_cfg" in config:
        return "it is a CoCa, which has a text decoder"
    if isinstance(vision.get("layers"), list):
        return "its vision tower is a ResNet"
    for name in ("hf_model_name", "hf_tokenizer_name"):
        if name in text:
            return f"its text tower is not CLIP's: it reads the tokens of {text[name]}"
    return None


def published() -> dict[str, Published]:
    """`ViT-B-32/openai` and its like. A repository that OpenCLIP names twice is there once."""
    found, repositories = {}, set()
    for model, tag in open_clip.list_pretrained() if open_clip is not None else ():
        settings = open_clip.get_pretrained_cfg(model, tag)
        repository = settings["hf_hub"].rstrip("/")
        if out_of_reach(model) is None and repository not in repositories:
            repositories.add(repository)
            license = next((own for start, own in LICENSES.items() if tag.startswith(start)), UNKNOWN_LICENSE)
            arch = model + QUICK_GELU_SUFFIX * settings.get("quick_gelu", False)
            found[f"{model}/{tag}"] = Published(arch, repository, license, repository)
    return found


PUBLISHED = published()


def spelled(name: str) -> str:
    """OpenCLIP prints `ViT-B-32:openai`, and has models with QuickGELU as `ViT-B-32-quickgelu` too."""
    name = name.replace(":", "/")
    model, _, tag = name.partition("/")
    plain = f"{model.removesuffix(QUICK_GELU_SUFFIX)}/{tag}"
    return plain if plain in PUBLISHED and PUBLISHED[plain].arch == model else name


def settings(name: str) -> dict:
    """What OpenCLIP says of a published model beside its weights, like the mean and std of its images."""
    return open_clip.get_pretrained_cfg(*name.split("/"))


def fetch(repository: str, endpoint: str | None = None, cache_dir: Path | None = None) -> Path:
    """The weights in a repository on the Hub, from the Hub's cache where they are there already.

    Args:
        repository: Its id.
        endpoint: Of the Hub; that of huggingface_hub where not given.
        cache_dir: Where downloads go; the cache of huggingface_hub where not given.

    Raises:
        ConversionError: where they are neither there nor in the cache.
    """
    failures = []
    for name in FILES:
        # where the Hub does not answer once, it is not asked again
        unreachable = any(not isinstance(error, RemoteEntryNotFoundError) for error in failures)
        try:
            return Path(
                hf_hub_download(repository, name, endpoint=endpoint, cache_dir=cache_dir, local_files_only=unreachable)
            )
        except OSError as error:
            failures.append(error)
    raise ConversionError(
        f"{repository} could not be downloaded from the Hub: {' '.join(str(failures[0]).split())} Check the network, "
        f"or fetch its {' or '.join(FILES)} elsewhere, and give its path and --arch."
    ) from failures[0]


def check_name(checkpoint: str):
    """Raises `ConversionError` for a name that is none of those that can be converted. A path is none."""
    name = spelled(checkpoint)
    if name in PUBLISHED or Path(checkpoint).exists():
        return
    model, slash, tag = name.partition("/")
    is_known = model in open_clip.list_models()
    if is_known and (reason := out_of_reach(model)):
        raise ConversionError(
            f"{checkpoint} cannot be converted: {reason}. In reach is OpenCLIP's own ViT with CLIP's text tower: "
            "convert.py --list has them all."
        )
    close = difflib.get_close_matches(name, PUBLISHED, n=1)
    if is_known and open_clip.get_pretrained_cfg(model, tag):
        raise ConversionError(
            f"{checkpoint} has no weights of its own: OpenCLIP names a repository for it that is of another model. "
            f"Give {_owner(model, tag)}."
        )
    if is_known or close or not slash:
        hint = f"Did you mean {close[0]}?" if close else "convert.py --list has them all."
        raise ConversionError(f"{checkpoint} is neither a file nor a published name. {hint}")


def _owner(model: str, tag: str) -> str:
    """The name that the repository of another name is listed under."""
    repository = open_clip.get_pretrained_cfg(model, tag)["hf_hub"].rstrip("/")
    return next(name for name, one in PUBLISHED.items() if one.path == repository)
