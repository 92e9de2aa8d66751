# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Everything that the registers paper measured, on any ViT and any images, in two passes over them.

The first pass finds the norm beyond which a patch is an outlier, the second what outliers are. Sums are kept and never
tokens, so that memory does not grow with the number of images; results do not depend on the batch size.
"""

import copy
import dataclasses
import hashlib
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors import safe_open

from ..configuration_vitreg import ViTRegConfig
from ..features import VisionEncoder, load_vit
from .attention import MeanAttention
from .cost import register_cost
from .image_files import ImageFiles, ImageStream
from .norms import NormDistribution, NormStatistics, Side
from .outliers import (
    ArtifactVerdict,
    Separation,
    ThresholdMethod,
    artifact_verdict,
    outlier_mask,
    outlier_threshold,
    separation,
)
from .passes import Examination, NormCollector, Picture, Survey, register_kinds


METRICS_VERSION = 1  # raised when a key of the metrics changes its name or its meaning
METHODS = ("mean+3std", "mad", "otsu")
SIDES = ("high", "low")
NUM_PICTURES = 4
NUM_ABLATED_IMAGES = 1000  # each takes a forward pass a register
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was measured.

    Attributes:
        metrics: All numbers, as JSON can say them; what there is none of is `None`.
        distributions: Norms of patches, CLS and every register after each layer, of patches from the embedding on.
        arrays: What figures need beside: outlier frequency over the grid, densities of neighbour similarity.
        pictures: Maps of a few images.
    """

    metrics: dict
    distributions: Mapping[str, list[NormDistribution]]
    arrays: Mapping[str, np.ndarray]
    pictures: Sequence[Picture]


def inspect(
    encoder: VisionEncoder,
    images: ImageFiles | Sequence[Path | PIL.Image.Image],
    *,
    threshold: float | ThresholdMethod = "mad",
    side: Side = "high",
    layer: int | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = False,
) -> Inspection:
    """Measures whether a ViT has artifacts, where, and what they carry.

    Args:
        encoder: From `load_vit` or `VisionEncoder.wrap`.
        images: Files or images; from `find_images` they come with classes, which one of the probes needs.
        threshold: Beyond which norm a patch is an outlier: a number or a method, see `outlier_threshold`.
        side: Of the threshold that outliers are on.
        layer: After which layer patches are looked at, 1 to `num_layers`; by default the last.
        size: Height and width in pixels that images are brought to; by default those of the model.
        batch_size: Only for speed and memory.
        seed: Of the probes' split and draws.
        progress: Show progress bars on stderr.

    Returns:
        The measurements.

    Raises:
        ValueError: where no image can be used, or there is no such layer, size, threshold or side.
    """
    images = images if isinstance(images, ImageFiles) else ImageFiles(images)
    run = _Run(encoder, images, threshold, side, layer, size, batch_size, seed, progress)
    survey = run.survey()
    norm = outlier_threshold(survey.norms.distributions()[run.layer], threshold, side)
    examination = run.examine(survey, norm)
    distributions = {kind: survey.norms.distributions(kind) for kind in survey.norms.kinds}
    metrics = _Metrics(run, survey, examination).collect()
    densities = examination.similarity["patch"]
    arrays = {
        "outlier_frequency": examination.frequency.frequency.numpy(),
        "similarity_edges": densities.rest.edges.numpy(),
        "similarity_outliers": densities.outliers.density.numpy(),
        "similarity_rest": densities.rest.density.numpy(),
    }
    return Inspection(plain(metrics), distributions, arrays, examination.pictures)


class _Run:
    """What was asked for, checked, and the two passes over the images."""

    def __init__(
        self,
        encoder: VisionEncoder,
        images: ImageFiles,
        threshold: float | ThresholdMethod,
        side: Side,
        layer: int | None,
        size: tuple[int, int] | None,
        batch_size: int,
        seed: int,
        progress: bool,
    ):
        if batch_size < 1:
            raise ValueError(f"The batch size must be 1 or more, got {batch_size}.")
        if not len(images):
            raise ValueError("There are no images to inspect the model with.")
        layer = encoder.num_layers if layer is None else layer
        if not 1 <= layer <= encoder.num_layers:
            raise ValueError(f"{encoder.name} has layers 1 to {encoder.num_layers}, got {layer}.")
        self.encoder, self.images, self.threshold, self.side = encoder, images, threshold, side
        self.layer, self.seed, self.batch_size = layer, seed, batch_size
        self.size = encoder.image_size if size is None else size
        self.grid = encoder.grid(*self.size)
        # mistakes are found before the images are read
        outlier_threshold(_one_norm(), threshold, side)
        encoder.preprocess([PIL.Image.new("RGB", (1, 1))], self.size)
        self.stream = ImageStream(encoder, images, self.size, batch_size, progress)
        self.notes: list[str] = []

    def survey(self) -> Survey:
        survey = Survey(self.encoder, self.layer)
        for _, pixel_values in self.stream.batches("Norms"):
            survey.update(pixel_values)
        return survey

    def examine(self, survey: Survey, norm: float) -> Examination:
        readable = [index for index in range(len(self.images)) if index not in self.stream.unreadable]
        pictures = {index: self.images.name(index) for index in _evenly(readable, NUM_PICTURES)}
        ablated = _evenly(readable, NUM_ABLATED_IMAGES)
        num_classes = 0 if self.images.labels is None else len(self.images.class_names)
        examination = Examination(
            survey, norm, self.side, self.grid, num_classes, self.seed, pictures, ablated, self._sees_attention()
        )
        for ids, pixel_values in self.stream.batches("Outliers"):
            labels = torch.tensor([self.images.labels[index] for index in ids]) if num_classes else None
            examination.update(ids, pixel_values, labels)
        return examination

    def _sees_attention(self) -> bool:
        """Whether all layers show it; they do not where they compute none, or several."""
        try:
            blank = torch.zeros(1, 3, *self.size)
            self.encoder.observe(blank, on_attention=lambda index, weights: None)
        except ValueError as error:
            self.notes.append(f"Attention is left out: {error}")
            return False
        return True


@dataclass
class _Metrics:
    """Puts the measurements in words and numbers, a section a method."""

    run: _Run
    survey: Survey
    examination: Examination

    def collect(self) -> dict:
        return {
            "metrics_version": METRICS_VERSION,
            "versions": _versions(),
            "model": self._model(),
            "images": self._images(),
            "settings": self._settings(),
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

    def _model(self) -> dict:
        encoder = self.run.encoder
        names = ("name", "source", "num_layers", "num_heads", "hidden_size", "patch_size", "has_cls", "num_registers")
        return {name: getattr(encoder, name) for name in names} | {
            "num_parameters": sum(parameter.numel() for parameter in encoder.model.parameters()),
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "sha256": model_hash(encoder.model),
        }

    def _images(self) -> dict:
        stream, images = self.run.stream, self.run.images
        height, width = self.run.size
        rows, cols = self.run.grid
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

    def _settings(self) -> dict:
        run = self.run
        return {"threshold": run.threshold, "side": run.side, "layer": run.layer, "seed": run.seed}

    def _verdict(self) -> dict:
        layer, side = self.run.layer, self.run.side
        separations = group_separations(self.examination.groups, layer, side)
        patches = self.survey.norms.distributions()[layer]
        verdict = artifact_verdict(patches, self.examination.threshold, side, separations)
        return _verdict_numbers(verdict) | {
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
                str(method): _verdict_numbers(artifact_verdict(patches, method, side))
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
        """Of CLS at every layer, mean over the heads; of registers see `registers`."""
        if "cls" not in self.examination.queries:
            return None
        layers = enumerate(self.examination.attention, start=1)
        return {"cls": [{"layer": layer, **_attention_numbers(means["cls"], 0)} for layer, means in layers]}

    def _cost(self) -> dict | None:
        config = config_of_same_size(self.run.encoder)
        if config is None:
            self.run.notes.append("What registers would cost is left out: the width of the MLP is not known.")
            return None
        return {
            str(number): dataclasses.asdict(cost)
            for number, cost in register_cost(config, image_size=self.run.size).items()
        }


def group_separations(groups: NormStatistics, layer: int, side: Side) -> list[Separation]:
    """How far outliers are from the rest, from the patch embedding to a layer."""
    pairs = zip(groups.distributions("outlier"), groups.distributions("rest"))
    return [separation(outliers, rest, side) for outliers, rest in pairs][: layer + 1]


def _verdict_numbers(verdict: ArtifactVerdict) -> dict:
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


def _versions() -> dict[str, str]:
    packages = ("hf-vitreg", "torch", "torchvision", "transformers", "timm", "pillow", "numpy")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except ImportError:  # PackageNotFoundError, where it is not installed
            continue
    return versions


def _evenly(indices: Sequence[int], number: int) -> list[int]:
    """Some of them, the first and the last among them, or all where there are no more."""
    positions = np.linspace(0, len(indices) - 1, min(number, len(indices))).round().astype(int)
    return [indices[position] for position in positions]


def _one_norm() -> NormDistribution:
    statistics = NormStatistics()
    statistics.update({"patch": torch.ones(1, 1)})
    return statistics.distributions()[0]


def plain(value: object) -> object:
    """As JSON can say it: numbers that are none, as the mean of nothing, become `None`."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def model_hash(model: torch.nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of all weights, by their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def config_of_same_size(encoder: VisionEncoder) -> ViTRegConfig | None:
    """The model's own, or that of a ViTReg with its sizes; `None` where the width of its MLP is not known."""
    config = getattr(encoder.model, "config", None)
    if isinstance(config, ViTRegConfig) or type(config).__name__ == "ViTRegConfig":
        return config
    uses_swiglu = bool(getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False))
    width = None if getattr(config, "use_swiglu_ffn", False) else _mlp_width(encoder)
    if width is None:
        return None
    return ViTRegConfig(
        hidden_size=encoder.hidden_size,
        num_hidden_layers=encoder.num_layers,
        num_attention_heads=encoder.num_heads,
        intermediate_size=width,
        use_swiglu_ffn=uses_swiglu,
        patch_size=encoder.patch_size,
        image_size=encoder.image_size,
    )


def _mlp_width(encoder: VisionEncoder) -> int | None:
    """Output features of the first projection of the first MLP, whatever it is called."""
    names = re.compile(r"(^|\.)(fc1|up_proj|intermediate\.dense|fc1_x)$")
    for name, module in encoder.model.named_modules():
        if isinstance(module, torch.nn.Linear) and names.search(name):
            return module.out_features
    return None


# Training time


def checkpoint_folders(folder: str | Path) -> list[tuple[int, Path]]:
    """Sub-folders with weights and a number at the end of their names, as `step-00000500` or `checkpoint-500`.

    Returns:
        Step and folder, in the order of the steps.
    """
    found = []
    for path in Path(folder).iterdir() if Path(folder).is_dir() else ():
        number = re.search(r"(\d+)$", path.name)
        if (
            number
            and not path.name.startswith(".")
            and any((path / f).is_file() for f in ("config.json", WEIGHTS_FILE))
        ):
            found.append((int(number[1]), path))
    return sorted(found)


def training_curve(
    encoders: Mapping[int, Callable[[], VisionEncoder]],
    images: ImageFiles,
    *,
    threshold: float | ThresholdMethod = "mad",
    side: Side = "high",
    layer: int | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> list[dict]:
    """Share of the outliers over training: by step, for one checkpoint after the other.

    Args:
        encoders: For every step what loads its model, so that there is one at a time.
        images: And all else as for `inspect`.

    Returns:
        For every step the numbers of a verdict, as under `"thresholds"`, with `step` and `split_off_layer`.
    """
    curve = []
    for step, load in sorted(encoders.items()):
        run = _Run(load(), images, threshold, side, layer, size, batch_size, 0, progress)
        curve.append({"step": step, **_norms_only(run, f"Step {step}")})
    return plain(curve)


def _norms_only(run: _Run, title: str) -> dict:
    """The verdict alone, in two passes that take nothing but norms."""
    encoder, patches, groups = run.encoder, NormStatistics(), NormStatistics()
    threshold = None
    for round_ in (1, 2):
        for _, pixel_values in run.stream.batches(f"{title}, {round_} of 2"):
            collector = NormCollector(encoder)
            encoder.observe(pixel_values, on_patches=collector.on_patches, on_layer=collector.on_layer)
            norms = collector.norms["patch"]
            if round_ == 1:
                patches.update({"patch": norms})
            else:
                mask = outlier_mask(norms[run.layer], threshold, run.side)
                groups.update({"outlier": norms[:, mask], "rest": norms[:, ~mask]})
        threshold = outlier_threshold(patches.distributions()[run.layer], run.threshold, run.side)
    separations = group_separations(groups, run.layer, run.side)
    verdict = artifact_verdict(patches.distributions()[run.layer], threshold, run.side, separations)
    return _verdict_numbers(verdict) | {"split_off_layer": verdict.split_off_layer}


def load_checkpoint(path: Path, base: VisionEncoder | None, device: str = "cpu") -> VisionEncoder:
    """A checkpoint with a config, or only the weights of one, for the model of its run.

    Args:
        path: Folder with `config.json` or only `model.safetensors`.
        base: The model of the run. Weights alone are put into it; images are normalized as for it.
        device: Where to.

    Raises:
        ValueError: where it cannot be loaded.
    """
    if (path / "config.json").is_file():
        encoder = load_vit(path, device=device)
        if encoder.mean is None and base is not None:
            encoder = VisionEncoder.wrap(encoder.model, encoder.name, base.mean, base.std)
        return encoder
    if base is None:
        raise ValueError(
            f"{path} has weights and no config.json. Give the model of the run, and these by --checkpoints."
        )
    with safe_open(path / WEIGHTS_FILE, framework="pt") as file:
        names = file.keys()
        tensors = {name: file.get_tensor(name) for name in names}
    wanted = base.model.state_dict()
    found = {name: _ending(tensors, name) for name in wanted}
    missing = [name for name, tensor in found.items() if tensor is None or tensor.shape != wanted[name].shape]
    if missing:
        raise ValueError(
            f"The weights of {path} are not those of {base.name}: {missing[0]} is missing or of another shape."
        )
    encoder = dataclasses.replace(base, model=copy.deepcopy(base.model), name=str(path))
    encoder.model.load_state_dict(found)
    return encoder


def _ending(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """The tensor of this name, alone or inside a classifier."""
    inside = [each for each in tensors if each == name or each.endswith(f".{name}")]
    return tensors[min(inside, key=len)] if inside else None
