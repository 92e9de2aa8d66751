# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a report says, as words and tables made from the metrics of one model or of two."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .outliers import MIN_BIMODALITY, MIN_DISTANCE, MIN_RATIO, MIN_SHARE, MIN_SIGNIFICANCE


NOTHING = "\N{EN DASH}"


class Table(NamedTuple):
    """One of a section; the first row is the head."""

    title: str
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """One question of the report: its title, what is measured, names of figures with captions, tables.

    One that is folded is seen when it is opened.
    """

    title: str
    text: str
    figures: list[tuple[str, str]]
    tables: list[Table]
    after: str = ""
    is_folded: bool = False


def number(value: float | None, digits: int = 3) -> str:
    """With so many digits that matter, or a dash for what there is none of."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """A share, as 2.37 %."""
    return NOTHING if share is None else f"{100 * share:.3g} %"


# The verdict


def verdict_sentences(metrics: Mapping) -> list[str]:
    """The answer first, then share, threshold, layer, and why."""
    verdict, num_layers = metrics["verdict"], metrics["model"]["num_layers"]
    threshold = number(verdict["threshold"], 4)
    if isinstance(metrics["settings"]["threshold"], str):
        threshold += f" ({metrics['settings']['threshold']})"
    beyond = "above" if verdict["side"] == "high" else "below"
    where = f"a norm {beyond} {threshold} after layer {verdict['layer']} of {num_layers}"
    if not verdict["num_outliers"]:
        return ["Artifacts: no.", f"No patch has {where}."]
    share = f"{percent(verdict['share'])} of the patches ({verdict['num_outliers']:,}) have {where}"
    if not verdict["has_artifacts"]:
        return ["Artifacts: no.", f"{share}{_why_not(verdict)}."]
    times = (
        f"{number(verdict['ratio'])} times the norm"
        if verdict["side"] == "high"
        else (f"the norm divided by {number(verdict['ratio'])}")
    )
    return [
        "Artifacts: yes.",
        f"{share}, {times} of the others, with a gap between both.",
        f"They stand apart from layer {verdict['split_off_layer']} on.",
    ]


def _why_not(verdict: Mapping) -> str:
    """What an artifact would need first and these have not."""
    if verdict["share"] < MIN_SHARE:
        return f", which is less than the {percent(MIN_SHARE)} that would count"
    if verdict["ratio"] is None or verdict["ratio"] < MIN_RATIO or verdict["distance"] < MIN_DISTANCE:
        return (
            f", but they are too near the others: {number(verdict['ratio'])} times their norm and "
            f"{number(verdict['distance'])} standard deviations away, where {MIN_RATIO} and {MIN_DISTANCE:g} would "
            "count"
        )
    if verdict["bimodality"] is None or verdict["bimodality"] < MIN_BIMODALITY:
        return ", but they are the tail of the others: there is no gap between both"
    if verdict["significance"] < MIN_SIGNIFICANCE:
        return ", but they are so few that the gap can be chance. Give more images"
    if verdict["split_off_layer"] is None:
        return ", but they were as far apart when they entered the model: they come with the images"
    return ", but they are half of all or more"


def next_steps(metrics: Mapping) -> list[str]:
    """What to do about it."""
    verdict, model = metrics["verdict"], metrics["model"]
    if verdict["has_artifacts"]:
        return [_cure(model), *_until_then(verdict)]
    steps = ["Patch features and attention maps can be used as they are."]
    side = "low" if verdict["side"] == "high" else "high"
    others = metrics["thresholds"][side]
    found = next((method for method, each in others.items() if each["has_artifacts"]), None)
    if found:
        share = percent(others[found]["share"])
        steps.append(
            f"On the {side} side {found} finds a group of {share}; --side {side} tells whether it came with the "
            "images."
        )
    steps.append(
        "The paper found artifacts only in large models, and after a third of their training: look again when the "
        "model has grown or trained on, and at the resolution that you will use (--size)."
    )
    return steps


def _cure(model: Mapping) -> str:
    if model["num_registers"]:
        return (
            f"The model has {model['num_registers']} registers and artifacts all the same: check that it was trained "
            "with them and that they were loaded (their norms below), and try more of them."
        )
    return (
        "Take a checkpoint with registers where one is published (as DINOv2 with registers, DINOv3), or train with "
        "them: ViTRegConfig(num_register_tokens=4)."
    )


def _until_then(verdict: Mapping) -> list[str]:
    beyond = "above" if verdict["side"] == "high" else "below"
    steps = [
        f"Until then leave patches with a norm {beyond} {number(verdict['threshold'], 4)} out of means, dense "
        "features and attention maps."
    ]
    before = verdict["split_off_layer"] - 1
    if before:
        steps.append(f"Or take dense features after layer {before}, where there are none yet.")
    return steps


def comparison(metrics: Sequence[Mapping]) -> list[list[str]]:
    """The most important numbers of all models, one column each."""
    rows = {
        "artifacts": lambda m: "yes" if m["verdict"]["has_artifacts"] else "no",
        "share of outliers": lambda m: percent(m["verdict"]["share"]),
        "threshold": lambda m: number(m["verdict"]["threshold"], 4),
        "stand apart from layer": lambda m: number(m["verdict"]["split_off_layer"]),
        "outliers' norm over the others'": lambda m: number(m["verdict"]["ratio"]),
        "registers": lambda m: str(m["model"]["num_registers"]),
        "neighbour similarity, outliers": lambda m: number(m["neighbour_similarity"]["patch"]["outlier"]["mean"]),
        "neighbour similarity, normal": lambda m: number(m["neighbour_similarity"]["patch"]["rest"]["mean"]),
        "position top-1, normal": lambda m: _score(m, "position", "normal", "top1", percent),
        "pixels L2, normal": lambda m: _score(m, "reconstruction", "normal", "l2_error", number),
        "class from CLS": lambda m: _score(m, "image_class", "cls", "accuracy", percent),
        "parameters": lambda m: f"{m['model']['num_parameters']:,}",
    }
    head = ["", *(each["model"]["name"] for each in metrics)]
    return [head, *([name, *(value(each) for each in metrics)] for name, value in rows.items())]


# Sections


def sections(metrics: Sequence[Mapping], figures: Sequence[str]) -> list[Section]:
    """Of the whole report. `figures` are the names of those that there are."""
    layer = metrics[0]["verdict"]["layer"]
    return [
        Section(
            "Norms",
            "Artifacts are patches whose norm is far from that of all others: a group of their own, apart by a gap.",
            [
                ("norm_histogram", f"Norms of all tokens after layer {layer}, and the threshold."),
                ("norms_by_layer", "Medians at every layer; bands from the smallest to the largest patch."),
                ("outlier_share_by_layer", "Share of the patches beyond the threshold at every layer."),
            ],
            [Table(_title("What other thresholds say", each, metrics), _thresholds(each)) for each in metrics],
            "A threshold decides what is counted; whether there are artifacts is decided by the gap. This table does "
            "not ask whether outliers came with the images; the verdict above does.",
        ),
        Section(
            "Where outliers are",
            "In the paper they fall on patches that look like their neighbours, and more often at the borders.",
            [
                ("pictures", "Photographs as the model sees them, outliers framed, norms, principal components."),
                ("norm_maps", "Norms of the patches over the layers; the same colours in all of them."),
                ("outlier_frequency", "Share of the images in which each cell of the grid is an outlier."),
                ("neighbour_similarity", "Similarity to the four neighbours right after the patch embedding."),
            ],
            [Table(_title("Positions and neighbours", each, metrics), _positions(each)) for each in metrics],
        ),
        Section(
            "What patches carry",
            "Linear probes on single frozen tokens. In the paper outliers know less of their position and pixels than "
            "other patches, and more of the whole image.",
            [],
            [Table(_title("Probes", each, metrics), _probes(each)) for each in metrics],
            "“Normal, as many” are as many normal patches of the same images as there are outliers. The probes are "
            "ridge regressions, scored on a fifth of the images: compare kinds of tokens with each other, and not "
            "with the paper's table.",
        ),
        Section(
            "Attention",
            "What CLS and the registers attend to, or patches where there are neither. 1 is what every patch would "
            "get if all got the same.",
            _attention_figures(figures, layer),
            [Table(_title("Registers", each, metrics), _registers(each)) for each in metrics],
            "Changes are 1 less the cosine similarity, after the final norm, where a register is its mean over the "
            "images in every layer: by zero it would lose its bias on attention too, which overstates its use.",
        ),
        *_attention_of_all_layers(figures),
        Section(
            "What registers cost",
            "Parameters and floating point operations of one image, counted on a ViTReg of these sizes.",
            [],
            [Table(_title("Cost", each, metrics), _cost(each)) for each in metrics],
            "The paper's figures are upper bounds, for its own models at 224x224 pixels.",
        ),
    ]


def _title(title: str, one: Mapping, metrics: Sequence[Mapping]) -> str:
    return title if len(metrics) == 1 else f"{title}: {one['model']['name']}"


def _attention_figures(figures: Sequence[str], layer: int) -> list[tuple[str, str]]:
    heads = [name for name in figures if name.startswith("attention_heads_")]
    words = [_token_words(name.removeprefix("attention_heads_")) for name in heads]
    return [
        ("attention_by_token", f"Attention of {', '.join(words)} in layer {layer}, mean over the heads."),
        *((name, f"Attention of {word} in layer {layer}, head by head.") for name, word in zip(heads, words)),
        ("attention_by_layer", f"Attention of {(words or ['CLS'])[0]} at every layer, mean over the heads."),
    ]


def _attention_of_all_layers(figures: Sequence[str]) -> list[Section]:
    """A section a layer, where these figures were asked for."""
    by_layer: dict[int, list[tuple[str, str]]] = {}
    for name in figures:
        if name.startswith("attention_layer_"):
            layer, kind = name.removeprefix("attention_layer_").split("_", 1)
            caption = f"Attention of {_token_words(kind)} in layer {int(layer)}, head by head."
            by_layer.setdefault(int(layer), []).append((name, caption))
    text = "The first of the pictures."
    return [Section(f"Attention in layer {k}", text, each, [], is_folded=True) for k, each in by_layer.items()]


def _thresholds(metrics: Mapping) -> list[list[str]]:
    rows = [["side, method", "threshold", "share", "times the norm", "gap, 0 to 1", "apart"]]
    for side, methods in metrics["thresholds"].items():
        for method, each in methods.items():
            cells = [number(each["threshold"], 4), percent(each["share"]), number(each["ratio"])]
            cells += [number(each["bimodality"], 2), "yes" if each["has_artifacts"] else "no"]
            rows.append([f"{side}, {method}", *cells])
    return rows


def _positions(metrics: Mapping) -> list[list[str]]:
    positions, similarity = metrics["positions"], metrics["neighbour_similarity"]["patch"]
    row, col = positions["max_frequency_cell"]
    return [
        ["", "value"],
        ["images with outliers", f"{positions['num_images_with_outliers']} of {metrics['images']['num_images']}"],
        ["share at the border", percent(positions["border_share"])],
        ["share inside", percent(positions["inner_share"])],
        ["most often at", f"row {row}, column {col}: {percent(positions['max_frequency'])} of the images"],
        ["neighbour similarity of outliers", number(similarity["outlier"]["mean"])],
        ["neighbour similarity of the others", number(similarity["rest"]["mean"])],
    ]


def _probes(metrics: Mapping) -> list[list[str]]:
    probes = metrics["probes"]
    names = {"normal": "normal", "normal_matched": "normal, as many", "outlier": "outlier"}
    rows = [["tokens", "position top-1", "off by (patches)", "pixels L2", "image class"]]
    for kind, name in names.items():
        cells = [
            _score(metrics, "position", kind, "top1", percent),
            _score(metrics, "position", kind, "mean_distance", number),
        ]
        cells += [_score(metrics, "reconstruction", kind, "l2_error", number), _accuracy(probes, kind)]
        rows.append([name, *cells])
    for kind in probes["image_class"]:
        if kind not in names:
            rows.append([_token_words(kind), NOTHING, NOTHING, NOTHING, _accuracy(probes, kind)])
    return rows


def _score(metrics: Mapping, probe: str, kind: str, key: str, form) -> str:
    score = metrics["probes"][probe].get(kind)
    return NOTHING if score is None else form(score[key])


def _accuracy(probes: Mapping, kind: str) -> str:
    score = probes["image_class"].get(kind)
    if score is None:
        return NOTHING
    return percent(score["accuracy"]) + (f" ± {100 * score['std']:.2g}" if len(score["accuracies"]) > 1 else "")


def _token_words(kind: str) -> str:
    words = {"cls": "CLS", "register": "one of the registers", "patch_mean": "all patches"}
    return words.get(kind, kind.replace("_", " "))


def _registers(metrics: Mapping) -> list[list[str]]:
    registers = metrics["registers"]
    if registers is None:
        return []
    head = [
        "register",
        "norm",
        "similarity to CLS",
        "attention to patches",
        "replaced: CLS",
        "patches",
        "class from CLS",
    ]
    rows = [head]
    for kind, replaced in registers["replaced_by_mean"].items():
        own = registers.get(kind, {})
        cells = [number(own.get("norm_mean")), number(own.get("similarity_to_cls"))]
        cells += [percent(own.get("attention_to_patches")), number(replaced["cls_change"])]
        cells += [number(replaced["patch_change"]), _before_and_after(replaced)]
        rows.append([_token_words(kind).removeprefix("register "), *cells])
    return rows


def _before_and_after(replaced: Mapping) -> str:
    if replaced["class_accuracy"] is None:
        return NOTHING
    return f"{percent(replaced['class_accuracy_before'])} to {percent(replaced['class_accuracy'])}"


def _cost(metrics: Mapping) -> list[list[str]]:
    if metrics["cost"] is None:
        return []
    rows = [["registers", "parameters", "GFLOPs", "more", "in the paper"]]
    for registers, cost in metrics["cost"].items():
        paper = cost["paper_added_flops_percent"]
        cells = [f"{cost['parameters']:,}", number(cost["gflops"], 4), f"{cost['added_gflops_percent']:.2g} %"]
        rows.append([registers, *cells, NOTHING if paper is None else f"up to {paper:g} %"])
    return rows
