# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""CLIP as OpenCLIP has it (Radford et al., ICML 2021; Cherti et al., CVPR 2023): a vision and a text tower.

Sizes are those of the model_configs of the installed package, https://github.com/mlfoundations/open_clip.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import BitImageProcessor, PreTrainedModel, VisionTextDualEncoderModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling

from conversion.family import CUSTOM, Architecture, ConversionError, Family, KnownCheckpoint, Outputs, Prepared
from conversion.open_clip_layout import (
    QUICK_GELU,
    TITLE,
    DualArchitecture,
    architecture_from_shapes,
    dual_config,
    filled,
    flat,
    head_dim,
    read_towers,
)
from conversion.open_clip_published import (
    BASE_URL,
    PUBLISHED,
    QUICK_GELU_SUFFIX,
    check_name,
    fetch,
    settings,
    spelled,
)
from conversion.open_clip_reference import OpenClipReference, clip_tokenizer, require_open_clip
from conversion.parity import comparison_sizes
from conversion.published import known_checkpoints, locate
from conversion.reading import describe_source, in_one_dtype, progress_console
from conversion.vit_layout import check_image_size, matching_arch


def _architecture(patch_size: int, image_size: int, vision: tuple[int, ...], text: tuple[int, ...]) -> Architecture:
    """Of the vision tower width, layers and width of the MLP, of the text tower width, layers and common width."""
    return DualArchitecture(
        *vision,
        patch_size=patch_size,
        image_size=image_size,
        text_hidden_size=text[0],
        text_num_hidden_layers=text[1],
        text_intermediate_size=4 * text[0],
        projection_dim=text[2],
    )


B, L, H = (768, 12, 3072), (1024, 24, 4096), (1280, 32, 5120)
TEXT_OF_B, TEXT_OF_L, TEXT_OF_H = (512, 12, 512), (768, 12, 768), (1024, 24, 1024)
WITH_GELU = {
    "ViT-B-32": _architecture(32, 224, B, TEXT_OF_B),
    "ViT-B-32-256": _architecture(32, 256, B, TEXT_OF_B),
    "ViT-B-16": _architecture(16, 224, B, TEXT_OF_B),
    "ViT-B-16-plus-240": _architecture(16, 240, (896, 12, 3584), (640, 12, 640)),
    "ViT-L-14": _architecture(14, 224, L, TEXT_OF_L),
    "ViT-L-14-336": _architecture(14, 336, L, TEXT_OF_L),
    "ViT-H-14": _architecture(14, 224, H, TEXT_OF_H),
    "ViT-H-14-378": _architecture(14, 378, H, TEXT_OF_H),
    "ViT-g-14": _architecture(14, 224, (1408, 40, 6144), TEXT_OF_H),
    "ViT-bigG-14": _architecture(14, 224, (1664, 48, 8192), (1280, 32, 1280)),
}
ARCHITECTURES = WITH_GELU | {
    name + QUICK_GELU_SUFFIX: replace(architecture, hidden_act=QUICK_GELU) for name, architecture in WITH_GELU.items()
}

# Of a file that has no published name.
DEFAULT_SETTINGS = {
    "mean": OPENAI_CLIP_MEAN,
    "std": OPENAI_CLIP_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


FAMILY = Family(
    name="open_clip",
    title=TITLE,
    architectures=ARCHITECTURES,
    published=PUBLISHED,
    base_url=BASE_URL,
    config=dual_config,
    model_class=VisionTextDualEncoderModel,
    spelled=spelled,
    fetch=fetch,
)


def known() -> list[KnownCheckpoint]:
    """Every published checkpoint, for the list."""
    if not PUBLISHED:
        progress_console.print(
            "OpenCLIP's checkpoints are not listed, because open_clip_torch knows them and is not installed: "
            "pip install hf-vitreg[conversion]",
            markup=False,
        )
    return known_checkpoints(FAMILY)


def prepare(
    checkpoint: str,
    arch: str | None = None,
    quick_gelu: bool | None = None,
    vision_only: bool = False,
    image_size: int | None = None,
    base_url: str | None = None,
    cache_dir: Path | None = None,
    license: str | None = None,
) -> Prepared:
    """An OpenCLIP checkpoint as a dual encoder around ViTReg, with OpenCLIP's model beside it.

    Args:
        checkpoint: A file, or a published name such as "ViT-B-32/openai".
        arch: The architecture that the shapes must be of, e.g. "ViT-B-32-quickgelu"; "custom" allows any.
        quick_gelu: Whether the activation is QuickGELU, which no shape tells. Where neither this nor a published name
            nor `arch` says it, it is in OpenAI's own state dicts and in no others.
        vision_only: Leave the text tower aside: the result is a `ViTRegModel` with its projection. So is that of a
            checkpoint without a text tower.
        image_size: In pixels. What the position embeddings must be for; the shapes decide where not given.
        base_url: Of the Hub that published names are downloaded from.
        cache_dir: Where downloads go; the cache of huggingface_hub where not given.
        license: Of the weights, for the card. Published names have their own; that of a file is "unknown" if not
            given.

    Raises:
        ConversionError: for everything that is not a whole OpenCLIP checkpoint of this architecture.
    """
    require_open_clip()
    check_name(checkpoint)
    said = _said_of_activation(checkpoint, arch, quick_gelu)
    located = locate(FAMILY, checkpoint, arch, base_url, cache_dir, license)
    towers = read_towers(located.file, vision_only)
    if towers.is_openai:
        said["entries that only OpenAI's state dicts have"] = True
    hidden_act, remark = _activation(said)
    found = replace(architecture_from_shapes(located.file, towers), hidden_act=hidden_act)
    arch = _matching_arch(found, located.arch)
    own_settings = settings(located.published) if located.published else DEFAULT_SETTINGS

    [tensors] = in_one_dtype(towers.tensors)
    model = filled(found, tensors)
    vision, text = getattr(model.config, "vision_config", model.config), getattr(model.config, "text_config", None)
    check_image_size(vision, image_size, FAMILY.title)
    input_ids = None if text is None else _seeded_texts(found.vocab_size, found.context_length)
    reference = OpenClipReference(vision, text, flat(tensors), input_ids)
    tokenizer = None if text is None else clip_tokenizer(found.vocab_size, found.context_length)
    return Prepared(
        model=model,
        image_processor=_image_processor(found.image_size, **own_settings),
        reference=reference,
        reference_name=reference.name,
        sizes=comparison_sizes(vision),
        arch=arch,
        sources=[describe_source(located.file) | {"backbone": f"{towers.prefix}{'*' if text else 'visual.*'}"}],
        left_aside=towers.left_aside,
        license=located.license,
        base_model=located.base_model,
        tokenizer=tokenizer,
        implementation=_outputs(model, input_ids),
        remarks=[remark, *_assumptions(found, arch, located.published is not None, tokenizer is not None)],
    )


def _said_of_activation(checkpoint: str, arch: str | None, quick_gelu: bool | None) -> dict[str, bool]:
    """Whether it is QuickGELU, by everything that the user said."""
    said = {}
    published = None if Path(checkpoint).exists() else PUBLISHED.get(spelled(checkpoint))
    if published is not None:
        said[f"the name {checkpoint}"] = ARCHITECTURES[published.arch].hidden_act == QUICK_GELU
    if arch in ARCHITECTURES:
        said[f"--arch {arch}"] = ARCHITECTURES[arch].hidden_act == QUICK_GELU
    if quick_gelu is not None:
        said["--quick-gelu" if quick_gelu else "--no-quick-gelu"] = quick_gelu
    _activation(said)
    return said


def _activation(said: Mapping[str, bool]) -> tuple[str, str]:
    """The activation, and a sentence on how it is known. `ConversionError` where not all say the same."""
    words = {True: "QuickGELU", False: "GELU"}
    if len(set(said.values())) > 1:
        claims = ", ".join(f"{words[is_quick]} by {who}" for who, is_quick in said.items())
        raise ConversionError(
            f"The activation is said to be both: {claims}. Leave out what is wrong. --arch says QuickGELU as "
            f"ViT-B-32{QUICK_GELU_SUFFIX}; convert.py --list shows which published models have it."
        )
    unseen = "The weights do not show it, and the comparison cannot, since both models take the same."
    if not said:
        return "gelu", (
            "Activation: GELU, ASSUMED, because neither a published name nor --arch nor --quick-gelu says it. "
            f"{unseen} OpenAI's, most of MetaCLIP's and some other models need --quick-gelu: convert.py --list shows "
            f"them as …{QUICK_GELU_SUFFIX}."
        )
    is_quick = next(iter(said.values()))
    return QUICK_GELU if is_quick else "gelu", f"Activation: {words[is_quick]}, by {' and '.join(said)}. {unseen}"


def _matching_arch(found: DualArchitecture, arch: str | None) -> str:
    """The name of the architecture: the one asked for, or the one that the shapes are of.

    Raises:
        ConversionError: where the shapes are of another than was asked for, or seem to be a part of one, or where
            nobody but the user can know how texts are read.
    """
    family = FAMILY
    if found.text_hidden_size is None:
        family = replace(FAMILY, architectures={name: one.without_text() for name, one in ARCHITECTURES.items()})
    # which asks a config for the fields of an architecture, and this is one
    name = matching_arch(found, arch, family)
    if arch is None and name == CUSTOM and found.text_hidden_size is not None:
        _check_text_tower(found)
    return name


def _check_text_tower(found: DualArchitecture):
    """Refuses a published width with too few layers, and a vocabulary that is not CLIP's."""
    whole = {
        one.text_num_hidden_layers for one in ARCHITECTURES.values() if one.text_hidden_size == found.text_hidden_size
    }
    if whole and found.text_num_hidden_layers < min(whole):
        raise ConversionError(
            f"The checkpoint has a text tower of a published width ({found.text_hidden_size}), but only "
            f"{found.text_num_hidden_layers} of its {min(whole)} layers. Is it a part of one? If it is whole, say "
            "--arch custom."
        )
    vocab_size = DualArchitecture.vocab_size
    if found.vocab_size != vocab_size:
        raise ConversionError(
            f"The checkpoint has a vocabulary of {found.vocab_size}, and CLIP's has {vocab_size}: how its texts are "
            "read is not in the file. Where the end of a text has the highest id, as in CLIP, say --arch custom. "
            "Else convert the vision tower alone: --vision-only."
        )


def _image_processor(
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
    resize_mode: str,
    **others: object,
) -> BitImageProcessor:
    """open_clip/transform.py, for evaluation: "shortest" crops the middle, "squash" changes the aspect ratio."""
    sizes = {"shortest": {"shortest_edge": image_size}, "squash": {"height": image_size, "width": image_size}}
    return BitImageProcessor(
        size=sizes[resize_mode],
        crop_size={"height": image_size, "width": image_size},
        resample=PILImageResampling[interpolation.upper()],
        image_mean=list(mean),
        image_std=list(std),
    )


def _seeded_texts(vocab_size: int, context_length: int) -> torch.Tensor:
    """Three texts, `(3, context_length)`: one that fills the context, one that ends in the middle, an empty one."""
    start_of_text, end_of_text = vocab_size - 2, vocab_size - 1
    input_ids = torch.randint(start_of_text, (3, context_length), generator=torch.Generator().manual_seed(0))
    input_ids[:, 0] = start_of_text
    for text, end in zip(input_ids, (context_length - 1, context_length // 2, 1)):
        text[end] = end_of_text
        text[end + 1 :] = 0
    return input_ids


def _outputs(model: PreTrainedModel, input_ids: torch.Tensor | None) -> Callable[[torch.Tensor], Outputs]:
    """The model as `parity.compare` calls it. Embeddings are not normalized, so that their size is compared too."""

    def of_vision_tower(pixel_values: torch.Tensor) -> Outputs:
        result = model(pixel_values)
        return {"tokens": result.last_hidden_state, "image_embeds": result.image_embeds}

    def of_both(pixel_values: torch.Tensor) -> Outputs:
        result = model(input_ids=input_ids, pixel_values=pixel_values)
        images, texts = result.vision_model_output, result.text_model_output
        return {
            "tokens": images.last_hidden_state,
            "image_embeds": model.visual_projection(images.pooler_output),
            "text_embeds": model.text_projection(texts.pooler_output),
            "logits": result.logits_per_image,
        }

    return of_vision_tower if input_ids is None else of_both


def _assumptions(found: DualArchitecture, arch: str, is_published: bool, has_tokenizer: bool) -> list[str]:
    """A sentence on everything else that neither weights nor comparison show."""
    sentences = []
    if arch == CUSTOM:
        channels = head_dim(found.hidden_size)
        heads = f"{found.hidden_size // channels} heads of {channels} channels"
        sentences.append(f"Vision tower: {heads}, which goes by its width alone.")
    if not is_published:
        sentences.append(
            "Images: resized with their shorter side, normalized with the mean and std of OpenAI's models, which is "
            "what most are trained with; the file does not say it."
        )
    if has_tokenizer:
        sentences.append(
            "Texts get the ids that OpenCLIP's tokenizer gives them, with two exceptions: that one mends broken "
            "Unicode, curly quotes and HTML entities first, and pads with 0 where this one pads with the end of text "
            "and masks it. The vectors do not depend on the padding."
        )
    elif found.text_hidden_size is not None:
        sentences.append(
            f"No tokenizer: a vocabulary of {found.vocab_size} is not CLIP's. Texts end at the highest id."
        )
    return sentences
