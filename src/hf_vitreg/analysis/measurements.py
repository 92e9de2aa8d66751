# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The numbers of an inspection, as `metrics.json` has them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..features import VisionEncoder, model_hash
from ..machine import package_versions
from .attention import MeanAttention
from .cost import config_of_same_size, register_cost
from .norms import NormStatistics, Side
from .outliers import ArtifactVerdict, Separation, artifact_verdict, outlier_threshold, separation
from .passes import Examination, Survey, register_kinds
from .run import Run


METRICS_VERSION = 1  # raised when a key of the metrics changes its name or its meaning
METHODS = ("mean+3std", "mad", "otsu")
SIDES = ("high", "low")


@dataclass
class Measurements:
    """Puts the measurements in words and numbers, a section a method."""

    run: Run
    survey: Survey
    examination: Examination

    def collect(self) -> dict:
        return {
            "metrics_version": METRICS_VERSION,
            "versions": package_versions(),
            "model": model_numbers(self.run.encoder),
            "images": image_numbers(self.run),
            "settings": settings(self.run),
            "verdict": self._verdict(),
            "thresholds": self._thresholds(),
            "layers": self._layers(),
            "norms": self._norms(),
            "positions": self._positions(),
            "neighbour_similarity": self._similarity(),
            "probes": self._probes(),
            "registers": self._registers(),
            "attention": self._attention(),
            "components": {"variance_share": self.examination.components.variance_share.tolist()},
            "cost": self._cost(),
            "notes": self.run.notes,
        }

    def _verdict(self) -> dict:
        layer, side = self.run.layer, self.run.side
        separations = group_separations(self.examination.groups, layer, side)
        patches = self.survey.norms.distributions()[layer]
        verdict = artifact_verdict(patches, self.examination.threshold, side, separations)
        return verdict_numbers(verdict) | {
            "layer": layer,
            # counted, where the histogram's share is smooth
            "share": self.examination.frequency.share,
            "num_outliers": self.examination.frequency.num_outliers,
            "split_off_layer": verdict.split_off_layer,
            "separation_by_layer": [{"layer": k, **dataclasses.asdict(each)} for k, each in enumerate(separations)],
        }

    def _thresholds(self) -> dict:
        """What every method says; whether outliers came with the images is not asked here."""
        patches = self.survey.norms.distributions()[self.run.layer]
        return {
            side: {
                str(method): verdict_numbers(artifact_verdict(patches, method, side))
                for method in dict.fromkeys((*METHODS, self.run.threshold))
            }
            for side in SIDES
        }

    def _layers(self) -> list[dict]:
        rows, side = [], self.run.side
        for layer, patches in enumerate(self.survey.norms.distributions()):
            threshold = outlier_threshold(patches, self.run.threshold, side)
            rows.append(
                {
                    "layer": layer,
                    "threshold": threshold,
                    "outlier_share": patches.share_beyond(threshold, side),
                    "share_beyond_final_threshold": patches.share_beyond(self.examination.threshold, side),
                    "bimodality": artifact_verdict(patches, threshold, side).bimodality,
                }
            )
        return rows

    def _norms(self) -> dict:
        statistics = {kind: self.survey.norms.distributions(kind) for kind in self.survey.norms.kinds}
        statistics |= {kind: self.examination.groups.distributions(kind) for kind in self.examination.groups.kinds}
        last = self.run.encoder.num_layers
        return {
            kind: [{"layer": last + 1 - len(each) + index, **row.summary()} for index, row in enumerate(each)]
            for kind, each in statistics.items()
        }

    def _positions(self) -> dict:
        frequency = self.examination.frequency
        highest = frequency.frequency.flatten().argmax().item()
        return {
            "num_images_with_outliers": frequency.num_images_with_outliers,
            "max_frequency": frequency.frequency.max().item(),
            "max_frequency_cell": list(divmod(highest, self.run.grid[1])),
            "border_share": frequency.border_share,
            "inner_share": frequency.inner_share,
            "frequency": frequency.frequency.tolist(),
        }

    def _similarity(self) -> dict:
        def numbers(density):
            return {"count": density.count, "mean": density.mean, "std": density.std}

        return {
            values: {"outlier": numbers(each.outliers), "rest": numbers(each.rest)}
            for values, each in self.examination.similarity.items()
        }

    def _probes(self) -> dict:
        probes = self.examination.probes
        results = {"image_class_left_out": self.run.images.why_no_labels}
        for name in ("position", "reconstruction", "image_class"):
            scores = {kind: probe.result() for kind, probe in getattr(probes, name).items()}
            results[name] = {kind: score and dataclasses.asdict(score) for kind, score in scores.items()}
        return results

    def _registers(self) -> dict | None:
        ablation = self.examination.ablation
        if ablation is None:
            return None
        by_register = {
            kind: self._register(index, kind) for index, kind in enumerate(register_kinds(ablation.encoder))
        }
        if ablation.encoder.has_cls:
            by_register["similarity"] = self.survey.similarity.matrix.tolist()
        return by_register | {"replaced_by_mean": {group: self._ablated(group) for group in ablation.groups}}

    def _register(self, index: int, kind: str) -> dict:
        layer = self.run.layer
        norms = self.survey.norms.distributions(kind)[layer - 1]
        row = {"norm_mean": norms.mean, "norm_std": norms.std, "similarity_to_cls": None}
        if self.run.encoder.has_cls:
            row["similarity_to_cls"] = self.survey.similarity.matrix[0, 1 + index].item()
        if "registers" in self.examination.queries:
            row |= _attention_numbers(self.examination.attention[layer - 1]["registers"], index)
        return row

    def _ablated(self, group: str) -> dict:
        ablation = self.examination.ablation
        scores = [ablation.cls_probes[each].result() if ablation.cls_probes else None for each in ("none", group)]
        before, after = (score and score.accuracy for score in scores)
        return {
            "num_images": len(ablation.image_ids),
            "cls_change": ablation.change(group, "cls"),
            "patch_change": ablation.change(group, "patches"),
            "class_accuracy_before": before,
            "class_accuracy": after,
        }

    def _attention(self) -> dict | None:
        """Of CLS, or of patches where there is none, at every layer, mean over the heads; of registers see there."""
        query = next((query for query in self.examination.queries if query != "registers"), None)
        if query is None:
            return None
        layers = enumerate(self.examination.attention, start=1)
        return {query: [{"layer": layer, **_attention_numbers(means[query], 0)} for layer, means in layers]}

    def _cost(self) -> dict | None:
        config = config_of_same_size(self.run.encoder)
        if config is None:
            self.run.notes.append("What registers would cost is left out: the form of its layers is not known.")
            return None
        return {
            str(number): dataclasses.asdict(cost)
            for number, cost in register_cost(config, image_size=self.run.size).items()
        }


def model_numbers(encoder: VisionEncoder) -> dict:
    """What the model is: sizes, dtype, and the hash of its weights."""
    names = ("name", "source", "num_layers", "num_heads", "hidden_size", "patch_size", "has_cls", "num_registers")
    return {name: getattr(encoder, name) for name in names} | {
        "num_parameters": sum(parameter.numel() for parameter in encoder.model.parameters()),
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "sha256": model_hash(encoder.model),
    }


def image_numbers(run: Run) -> dict:
    """What the images are, after a pass over them."""
    stream, images = run.stream, run.images
    height, width = run.size
    rows, cols = run.grid
    return {
        "num_images": len(images) - len(stream.unreadable),
        "num_unreadable": len(stream.unreadable),
        "unreadable": [
            {"name": images.name(index), "reason": reason} for index, reason in sorted(stream.unreadable.items())
        ],
        "num_classes": len(images.class_names) if images.labels is not None else None,
        "sha256": stream.sha256,
        "height": height,
        "width": width,
        "rows": rows,
        "cols": cols,
    }


def settings(run: Run) -> dict:
    """What was asked for."""
    return {"threshold": run.threshold, "side": run.side, "layer": run.layer, "seed": run.seed}


def group_separations(groups: NormStatistics, layer: int, side: Side) -> list[Separation]:
    """How far outliers are from the rest, from the patch embedding to a layer."""
    pairs = zip(groups.distributions("outlier"), groups.distributions("rest"))
    return [separation(outliers, rest, side) for outliers, rest in pairs][: layer + 1]


def verdict_numbers(verdict: ArtifactVerdict) -> dict:
    numbers = dataclasses.asdict(verdict)
    apart = numbers.pop("separation")
    del numbers["split_off_layer"]
    return numbers | {"distance": apart["distance"], "ratio": apart["ratio"]}


def _attention_numbers(means: MeanAttention, query: int) -> dict:
    """Mean over the heads of the share that goes to patches, and of the entropy in nats."""
    return {
        "attention_to_patches": 1 - means.prefix_mass[:, query].mean().item(),
        "attention_entropy": means.entropy[:, query].mean().item(),
    }


def plain(value: object) -> object:
    """As JSON can say it: numbers that are none, as the mean of nothing, become `None`."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
