# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The model card: metadata that the Hub reads, and a page that says what was measured and nothing else."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id, yaml_dump
from transformers import PreTrainedConfig, VisionTextDualEncoderConfig

from ..configuration_vitreg import ViTRegConfig


# Stands in every code block for the repository; `export.publish` puts the true id there, which no folder knows.
MODEL_ID = "org/name"

PIPELINE_TAGS = {
    "ViTRegForImageClassification": "image-classification",
    "ViTRegForSemanticSegmentation": "image-segmentation",
    "ViTRegForDepthEstimation": "depth-estimation",
    "ViTRegModel": "image-feature-extraction",
    "ViTRegBackbone": "image-feature-extraction",
}
# its vision tower is a ViTReg, the rest is transformers' own
DUAL_ENCODER, DUAL_ENCODER_TAG = "VisionTextDualEncoderModel", "zero-shot-image-classification"
DENSE = ("ViTRegForSemanticSegmentation", "ViTRegForDepthEstimation")
CLASSIFIER_INPUTS = {
    "cls": "CLS",
    "cls_mean": "CLS and the mean of the patches",
    "last4_cls": "CLS of the last four layers",
    "last4_cls_mean": "CLS of the last four layers and the mean of the last layer's patches",
    "cls_distillation": "CLS and the distillation token, each by a classifier of its own, averaged",
}
POOLED = {
    "cls": "CLS",
    "mean": "the mean of the patches",
    "map": "the patches as a learned query attends to them",
}
MAX_LABELS = 12


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything that a card may say beside what the model itself tells. What is not given is not mentioned.

    Args:
        name: the title, like `"digits"`.
        license: an id that the Hub knows, or `"other"` together with `license_name` and `license_link`.
        base_model: what the weights start from. A local path is not mentioned: nobody else can follow it.
        datasets: ids on the Hub of what it was trained on.
        dataset_name: display name of the data, like `"scikit-learn digits"`; by default the first of `datasets`.
        dataset_type: id on the Hub or builder (`"imagefolder"`) of the data that `metrics` were measured on; by
            default the first of `datasets`, else `dataset_name`.
        metrics: what was measured, by the name of the metric.
        recipe: the resolved settings of the run.
        machine: the machine in words, like `"2 CPU cores"`.
        seconds: training time.
        curves: name of a picture in the repository.
        notes: Markdown, for what has no field.

    Raises:
        `ValueError`: for a licence "other" without name and link, for metrics without a data set, and for a value
            that is no number.
    """

    name: str
    license: str = "apache-2.0"
    license_name: str | None = None
    license_link: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    dataset_name: str | None = None
    dataset_type: str | None = None
    dataset_split: str | None = None
    num_train_images: int | None = None
    num_validation_images: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    recipe: Mapping[str, object] = field(default_factory=dict)
    command: str | None = None
    machine: str | None = None
    seconds: float | None = None
    curves: str | None = None
    notes: str | None = None

    def __post_init__(self):
        if self.license == "other" and not (self.license_name and self.license_link):
            raise ValueError('license="other" needs license_name and license_link, which the Hub shows in its place.')
        if self.metrics and not (self.dataset_name or self.datasets):
            raise ValueError("metrics need the data they were measured on: give dataset_name or datasets.")
        try:
            metrics = {name: float(value) for name, value in self.metrics.items()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"metrics must map names to numbers, got {dict(self.metrics)}.") from error
        # NumPy and torch scalars count as numbers, but cannot be written as YAML
        object.__setattr__(self, "metrics", metrics)


def render_card(
    config: ViTRegConfig | VisionTextDualEncoderConfig,
    facts: CardFacts,
    num_parameters: int,
    has_tokenizer: bool = True,
) -> ModelCard:
    """The card of a saved model.

    Args:
        config: of a model that was saved, or loaded, as what it is: the head is read from `config.architectures`.
        facts: all else.
        num_parameters: of the whole model.
        has_tokenizer: whether a dual encoder has one beside it, without which no pipeline loads.

    Raises:
        `ValueError`: where `config.architectures` names no class of this package, nor a dual encoder.

    Metadata: https://huggingface.co/docs/hub/model-cards
    """
    architecture = published_architecture(config.architectures)
    is_dual = architecture == DUAL_ENCODER
    vision = config.vision_config if is_dual else config
    pipeline_tag = DUAL_ENCODER_TAG if is_dual else PIPELINE_TAGS[architecture]
    card = ModelCard.from_template(
        _metadata(pipeline_tag, vision, facts),
        template_path=str(_template()),
        config=vision,
        facts=facts,
        model_id=MODEL_ID,
        architecture=architecture,
        has_tokenizer=has_tokenizer,
        **_words_on_model(vision, architecture, num_parameters),
        **_words_on_texts(config if is_dual else None),
        **_words_on_facts(facts),
    )
    # the template has its conditions on lines of their own, where they leave blank ones
    card.text = re.sub(r"\n{3,}", "\n\n", card.text).rstrip() + "\n"
    return card


def published_architecture(architectures: list[str] | None) -> str:
    """The class that `config.architectures` names. `ValueError` where it is none that can be published."""
    known = (*PIPELINE_TAGS, DUAL_ENCODER)
    if not architectures or architectures[0] not in known:
        raise ValueError(
            f"`architectures` of the config must name one of {', '.join(known)}, got {architectures}. "
            "`save_pretrained` of these classes writes it."
        )
    return architectures[0]


def check_card(card: ModelCard) -> None:
    """`ValueError` that names all that the Hub would refuse, or misread, in the card's metadata."""
    data = card.data
    problems = [f"{name} is missing" for name in ("license", "pipeline_tag") if not data.get(name)]
    if data.get("library_name") != "transformers":
        problems.append(f"library_name must be transformers, got {data.get('library_name')}")
    if data.get("license") == "other" and not (data.get("license_name") and data.get("license_link")):
        problems.append("license: other needs license_name and license_link")
    for name in ("base_model", "datasets"):
        ids = data.get(name, [])
        wrong = [one for one in (ids if isinstance(ids, list) else [ids]) if not _is_well_formed(one)]
        if wrong:
            problems.append(f"{name} must be ids on the Hub, like org/name, got {', '.join(map(str, wrong))}")
    for result in data.get("eval_results", []):
        if isinstance(result.metric_value, float) and not math.isfinite(result.metric_value):
            problems.append(f"model-index: {result.metric_type} is {result.metric_value}, which is no number")
    if problems:
        raise ValueError(f"The metadata of README.md cannot be published: {'; '.join(problems)}.")


def load_card(path: Path) -> ModelCard:
    """The card in a file, checked. `ValueError` where its header cannot be read or would be refused."""
    try:
        card = ModelCard.load(path)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The metadata of {path} (YAML between two lines of ---) cannot be read: {reason}") from error
    check_card(card)
    return card


def _template() -> Path:
    """In an installed package beside this file, in a checkout where people look for it."""
    installed = Path(__file__).with_name("template.md")
    return installed if installed.exists() else Path(__file__).parents[3] / "model_cards" / "template.md"


def _metadata(pipeline_tag: str, config: ViTRegConfig, facts: CardFacts) -> ModelCardData:
    measured = {name: value for name, value in facts.metrics.items() if math.isfinite(value)}
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=facts.dataset_type or (*facts.datasets, facts.dataset_name)[0],
            dataset_name=_dataset_name(facts),
            dataset_split=facts.dataset_split,
            metric_type=name,
            metric_value=value,
        )
        for name, value in measured.items()
    ]
    return ModelCardData(
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        base_model=_hub_id(facts.base_model),
        datasets=[name for name in facts.datasets if _hub_id(name)] or None,
        metrics=list(measured) or None,
        tags=[
            "vitreg",
            "vision-transformer",
            *["clip"] * (pipeline_tag == DUAL_ENCODER_TAG),
            *["register-tokens"] * bool(config.num_register_tokens),
        ],
        model_name=facts.name if results else None,
        eval_results=results or None,
    )


def _words_on_model(config: ViTRegConfig, architecture: str, num_parameters: int) -> dict[str, object]:
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    rows, cols = config.grid_size
    num_registers = config.num_register_tokens
    names = [name for index, name in config.id2label.items() if name != f"LABEL_{index}"]
    labels = ", ".join(f"`{name}`".replace("|", r"\|") for name in names[:MAX_LABELS])
    return {
        "is_classifier": architecture == "ViTRegForImageClassification",
        "head": architecture.removeprefix("ViTReg") if "For" in architecture else None,
        # the weights of which segmentation and depth do without
        "has_pooler": architecture not in DENSE or (config.pooler_type != "map" and config.final_norm != "pooled"),
        "read_layers": _listed([f"`{name}`" for name in config.out_features]),
        "registers": f"with {num_registers} register token{'s' * (num_registers != 1)}"
        if num_registers
        else "without register tokens",
        "tokens": _listed(
            [
                *["CLS"] * config.use_cls_token,
                *["the distillation token"] * config.use_distillation_token,
                *[f"{num_registers} register{'s' * (num_registers != 1)}"] * bool(num_registers),
                "the patches row by row",
            ]
        ),
        "queries": "registers" if num_registers else "cls" if config.use_cls_token else "all",
        "pooled": POOLED[config.pooler_type],
        "size": _size(config, "SwiGLU MLP" if config.use_swiglu_ffn else f"MLP (`{config.hidden_act}`)"),
        "parameters": f"{num_parameters:,}",
        "height": height,
        "width": width,
        "rows": rows,
        "cols": cols,
        "labels": labels + ", …" * (len(names) > MAX_LABELS),
        "classifier_input": CLASSIFIER_INPUTS.get(config.classifier_layout, POOLED[config.pooler_type]),
        "image_mode": "L" if config.num_channels == 1 else "RGB",
    }


def _words_on_texts(config: VisionTextDualEncoderConfig | None) -> dict[str, object]:
    """Of the text tower and the common space; nothing where there is none."""
    if config is None:
        return {"text": None}
    text = config.text_config
    return {
        "text": text,
        "text_size": _size(text, f"MLP (`{text.hidden_act}`)"),
        "projection_dim": config.projection_dim,
        # transformers has no place for it: `logit_bias` is an extra of the config
        "logit_bias": getattr(config, "logit_bias", None),
    }


def _size(config: PreTrainedConfig, mlp: str) -> str:
    heads = f"{config.num_attention_heads} head{'s' * (config.num_attention_heads != 1)}"
    return (
        f"{config.num_hidden_layers} layers of width {config.hidden_size}, {heads}, {mlp} of width "
        f"{config.intermediate_size}"
    )


def _listed(items: list[str]) -> str:
    """["a", "b", "c"] -> "a, b, and c"."""
    if len(items) < 3:
        return " and ".join(items)
    return f"{', '.join(items[:-1])}, and {items[-1]}"


def _words_on_facts(facts: CardFacts) -> dict[str, object]:
    base_model = _hub_id(facts.base_model)
    links = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in facts.datasets if _hub_id(name))
    is_named = facts.dataset_name and facts.dataset_name not in facts.datasets
    dataset = f"{facts.dataset_name} ({links})" if is_named and links else links or facts.dataset_name
    duration = None if facts.seconds is None else _duration(facts.seconds)
    return {
        "base_model": base_model,
        "dataset": dataset,
        "evaluated_on": _dataset_name(facts),
        "duration": duration,
        "has_origin": any((base_model, dataset, duration, facts.command, facts.curves)),
        "recipe": yaml_dump(_plain(facts.recipe), sort_keys=False).strip() if facts.recipe else None,
        "starts_from_dinov2": "dinov2" in (base_model or "").lower(),
    }


def _dataset_name(facts: CardFacts) -> str | None:
    return facts.dataset_name or next(iter(facts.datasets), None)


def _hub_id(name: str | None) -> str | None:
    """The name, if it can be a repository on the Hub; None for a local path, which transformers would load first."""
    return name if name and _is_well_formed(name) and not os.path.exists(name) else None


def _is_well_formed(repo_id: object) -> bool:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return False
    return repo_id is not None


def _duration(seconds: float) -> str:
    """1.5 -> "1.5 s", 75 -> "1 min 15 s", 8000 -> "2 h 13 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def _plain(value: object) -> object:
    """What YAML can say: containers and plain values as they are, anything else as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
