# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Zero-shot classification: an image is of the class whose name, in a sentence, is nearest to it.

Learning Transferable Visual Models From Natural Language Supervision (Radford et al., ICML 2021), section 3.1.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.image_data import ImageData, read_ahead
from ..distributed import num_cores
from .progress import progress_bar


TEMPLATES = Path(__file__).with_name("prompt_templates.txt")
DUAL_ENCODERS = ("vision-text-dual-encoder", "clip", "siglip")
_MEANT = (
    "Zero-shot classification is for models of images and texts: OpenCLIP's as conversion/convert.py open_clip writes "
    "them, without --vision-only, and CLIP and SigLIP of transformers."
)


class DualEncoder(NamedTuple):
    """A model of images and texts, in eval mode, and what makes its inputs.

    Attributes:
        model: With `get_image_features` and `get_text_features`.
        tokenizer: Of its text tower.
        image_processor: Of its vision tower.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor


def load_dual_encoder(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DualEncoder:
    """Loads a dual encoder, its tokenizer and its image processor. No code of a repository is run.

    Args:
        path: A folder or a Hub repository: OpenCLIP's model after conversion, or transformers' CLIP or SigLIP.
        device: Where to.
        dtype: Of the weights; by default as they are stored.

    Raises:
        ValueError: where there is no such model, it has no text tower or no tokenizer, or weights are missing.
    """
    try:
        model = _load_model(str(path), dtype)
        tokenizer = _load_part(AutoTokenizer, str(path), "tokenizer")
        _require_own(tokenizer, model.config.text_config.vocab_size)
        image_processor = _load_part(AutoImageProcessor, str(path), "image processor")
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"Cannot load {path}: {textwrap.shorten(str(error), 800)}") from error
    return DualEncoder(model.to(device).eval(), tokenizer, image_processor)


def _load_model(path: str, dtype: torch.dtype | None) -> PreTrainedModel:
    if Path(path).is_file():
        raise ValueError("it is a file. Give the folder that it is in.")
    if not Path(path).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise ValueError("there is no such folder.")
    # not AutoConfig, which would first ask for leave to run the code of models that nobody knows
    config, _ = PreTrainedConfig.get_config_dict(path)
    model_type = config.get("model_type")
    if model_type not in DUAL_ENCODERS:
        what = "its config.json is none of transformers'" if config else "there is no config.json in it"
        what = f"it is a {model_type}, which has no text tower" if model_type else what
        raise ValueError(f"{what}. {_MEANT}")
    model, report = AutoModel.from_pretrained(
        path, trust_remote_code=False, dtype=dtype or "auto", output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} of its weights are missing, {missing[0]} among them. They would be random.")
    return model


def _load_part(auto_class: type, path: str, name: str):
    try:
        return auto_class.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(_missing(name)) from error


def _missing(name: str) -> str:
    return (
        f"there is no {name} beside it. Save its own there: a text is read otherwise by every tokenizer, an image by "
        "every image processor. OpenCLIP's models are converted without a tokenizer where their vocabulary is not "
        "CLIP's."
    )


def _require_own(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    # where its vocabulary is missing, transformers makes a tokenizer that knows no word
    if tokenizer("cat").input_ids == tokenizer("dog").input_ids:
        raise ValueError(_missing("vocabulary of a tokenizer"))
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer beside it has {len(tokenizer)} tokens and its text tower {vocab_size}: it is another "
            "model's. Save its own there."
        )


def load_templates(path: str | Path = TEMPLATES) -> list[str]:
    """Sentences with a place for a class name.

    Args:
        path: A text file with one a line, each with exactly one `{}`; by default a few that are true of most
            photographs.

    Raises:
        ValueError: which names the file and the line, where there is not one `{}`, or another brace.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The prompt templates {path} cannot be read: {error}.") from error
    templates = []
    for number, line in enumerate(map(str.strip, lines), 1):
        if line:
            _check_template(line, f"{path}, line {number}")
            templates.append(line)
    if not templates:
        raise ValueError(f"The file {path} has no prompt template. Write one a line, such as: a photo of a {{}}.")
    return templates


def _check_template(template: str, where: str) -> None:
    if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
        raise ValueError(
            f"{where}: a prompt template has exactly one {{}}, where the class name goes, and no other brace, got "
            f"{template!r}."
        )


@torch.no_grad()
def class_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
) -> torch.Tensor:
    """What stands for each class: the mean of its names' embeddings over the templates, of length 1 like each of them.

    Args:
        model: With `get_text_features`, as `load_dual_encoder` gives it.
        tokenizer: Its own. Longer texts than it can take are cut.
        class_names: As people write them: "golden retriever", not "golden_retriever" or "n02099601".
        templates: Each with one `{}`.
        batch_size: Texts at once.

    Returns:
        `(num_classes, projection_dim)`, float32, on the CPU.

    Raises:
        ValueError: where there are no classes or templates, two classes have one name or a template is none, and for
            embeddings that are not finite.
    """
    if not class_names or not templates:
        raise ValueError(
            f"There are {len(class_names)} classes and {len(templates)} templates; one of each is needed."
        )
    if repeated := {name for name in class_names if list(class_names).count(name) > 1}:
        raise ValueError(f"Two classes are called {min(repeated)!r}, and could not be told apart.")
    for template in templates:
        _check_template(template, "templates")
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    embeds = torch.cat([_embed_texts(model, tokenizer, batch) for batch in batches])
    _require_finite(embeds, texts)
    means = nn.functional.normalize(embeds).unflatten(0, (len(class_names), len(templates))).mean(dim=1)
    return nn.functional.normalize(means)


def _embed_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    longest = min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings)
    # SigLIP was trained on texts of one length without a mask; for the others padding changes nothing
    is_siglip = model.config.model_type == "siglip"
    padding = "max_length" if is_siglip else True
    batch = tokenizer(texts, padding=padding, truncation=True, max_length=longest, return_tensors="pt")
    if is_siglip:
        batch.pop("attention_mask", None)
    return model.get_text_features(**batch.to(model.device)).pooler_output.float().cpu()


@torch.no_grad()
def image_embeddings(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    images: ImageData,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """Embeddings of all images, on every process. Each process reads and embeds every n-th image.

    Args:
        model: With `get_image_features`, as `load_dual_encoder` gives it; on the device of its process.
        image_processor: Its own.
        images: Any number, which need not be a multiple of the number of processes.
        batch_size: Images at once, on each process.
        accelerator: Of several processes.
        progress: Show a bar, on the main process.

    Returns:
        `(len(images), projection_dim)`, float32, on the CPU, not normalised.

    Raises:
        ValueError: which names the image, where one cannot be read or its embedding is not finite, and where there is
            none.
    """
    if not len(images):
        raise ValueError(f"{images.display_name} has no image to classify.")
    rank, num_processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    indices = list(range(rank, len(images), num_processes))
    config = model.config
    # a process may have no image, and must know
    found = [torch.empty(0, getattr(config, "projection_dim", None) or config.vision_config.hidden_size)]
    with progress_bar(progress and rank == 0) as bar:
        task = bar.add_task(f"Embedding {images.display_name}", total=len(indices))
        for pixel_values in _pixel_batches(image_processor, images, indices, batch_size):
            features = model.get_image_features(pixel_values=pixel_values.to(model.device, model.dtype))
            found.append(features.pooler_output.float().cpu())
            bar.advance(task, len(pixel_values))
    embeds = torch.cat(found)
    _require_finite(embeds, [images.name(index) for index in indices])
    return _interleaved(embeds, len(images), accelerator)


def _pixel_batches(
    image_processor: BaseImageProcessor, images: ImageData, indices: Sequence[int], batch_size: int
) -> Iterator[torch.Tensor]:
    """`(batch_size, 3, height, width)`, decoded and resized while the model computes."""

    def pixels(index: int) -> torch.Tensor:
        return image_processor(images.image(index), return_tensors="pt").pixel_values[0]

    with ThreadPoolExecutor(num_cores()) as pool:
        batch = []
        for number, pixel_values in enumerate(read_ahead(pixels, indices, pool, ahead=batch_size), 1):
            batch.append(pixel_values)
            if len(batch) == batch_size or number == len(indices):
                yield _stacked(batch)
                batch = []


def _stacked(batch: list[torch.Tensor]) -> torch.Tensor:
    if sizes := {tuple(image.shape[-2:]) for image in batch} - {tuple(batch[0].shape[-2:])}:
        raise ValueError(
            f"The image processor gives images of several sizes, {tuple(batch[0].shape[-2:])} and {min(sizes)}. Let "
            "it crop to one: set do_center_crop and crop_size in preprocessor_config.json."
        )
    return torch.stack(batch)


def _interleaved(embeds: torch.Tensor, num_images: int, accelerator: Accelerator | None) -> torch.Tensor:
    """The embeddings of all processes in the order of the images; what fills up short shards is left out."""
    if accelerator is None or accelerator.num_processes == 1:
        return embeds
    longest = -(-num_images // accelerator.num_processes)
    padded = torch.zeros(longest, embeds.shape[1], device=accelerator.device)
    padded[: len(embeds)] = embeds
    gathered = accelerator.gather(padded).unflatten(0, (accelerator.num_processes, longest))
    return gathered.transpose(0, 1).flatten(0, 1)[:num_images].cpu()


def _require_finite(embeds: torch.Tensor, names: Sequence[str]) -> None:
    bad = (~embeds.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        others = f", nor are {len(bad) - 1} others" if len(bad) > 1 else ""
        raise ValueError(
            f"The embedding of {names[bad[0]]!r} is not finite{others}. In float16 models "
            "overflow easily; bfloat16 and float32 hold them."
        )


def zero_shot_logits(
    image_embeds: torch.Tensor, class_embeds: torch.Tensor, logit_scale: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """Cosine similarity of every image to every class, times a scale.

    The class is the largest of a row, whatever the scale. Probabilities, as CLIP has them, are the softmax of a row
    with `model.logit_scale.exp()`.

    Args:
        image_embeds: `(num_images, projection_dim)`, of any length.
        class_embeds: `(num_classes, projection_dim)`, of any length.
        logit_scale: A positive number.

    Returns:
        `(num_images, num_classes)`.

    Raises:
        ValueError: where the two are not of one space.
    """
    if image_embeds.ndim != 2 or class_embeds.ndim != 2 or image_embeds.shape[1] != class_embeds.shape[1]:
        raise ValueError(
            "image_embeds and class_embeds must be (number, projection_dim) with the same projection_dim, got "
            f"{tuple(image_embeds.shape)} and {tuple(class_embeds.shape)}."
        )
    return logit_scale * nn.functional.normalize(image_embeds) @ nn.functional.normalize(class_embeds).T
