# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Whether registers did what they were given for: the same images through a model before and after.

Outliers of the patches are to fall ("Vision Transformers Need Registers", Darcet et al., 2024, section 2), and CLS,
which classifiers read, is to stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import torch
from torch.nn.functional import cosine_similarity

from ..analysis.image_files import ImageFiles, ImageStream
from ..analysis.inspection import Inspection, inspect
from ..analysis.norms import Side
from ..analysis.outliers import ThresholdMethod
from ..analysis.sections import NOTHING, number, percent
from ..features import VisionEncoder


CLS_TOLERANCE, MIN_FALL = 0.1, 0.5
OWN_THRESHOLD = "mad"  # by which the model after is judged without the threshold of the model before


@dataclass(frozen=True, eq=False)
class Effect:
    """What registers changed.

    Attributes:
        before, after: The inspections; the threshold of the second is that of the first, as a norm.
        output: What the cosines are of: `"CLS"`, or `"the mean of the patches"` where there is none.
        cosine_mean, cosine_min: Cosine of this output before and after, after the final norm; over the images.
        cls_tolerance: How far 1 less the mean cosine may be above 0 in a success.
        min_fall: The share of the outliers that is gone in a success.
    """

    before: Inspection
    after: Inspection
    output: str
    cosine_mean: float
    cosine_min: float
    cls_tolerance: float
    min_fall: float

    @property
    def outlier_shares(self) -> tuple[float, float]:
        """Of all patches, beyond the norm that is the threshold of the model before."""
        return self.before.metrics["verdict"]["share"], self.after.metrics["verdict"]["share"]

    @property
    def own_outlier_share(self) -> float:
        """Of the patches that stand apart by the norms of the model after alone, 0 where none do.

        A model whose norms are all smaller has fewer beyond any number, and artifacts all the same.
        """
        own = self.after.metrics["thresholds"][self.before.metrics["verdict"]["side"]][OWN_THRESHOLD]
        return own["share"] if own["has_artifacts"] else 0.0

    @property
    def norm_ratios(self) -> tuple[float, float]:
        """The largest norm of a patch over the median, before and after; on the low side the median over the least."""
        return _norm_ratio(self.before), _norm_ratio(self.after)

    @property
    def attention_to_patches(self) -> tuple[float | None, float | None]:
        """Share of the attention of CLS in the last layer that patches get, mean over heads and images.

        Of the patches' attention where there is no CLS, and `None` where the model shows none.
        """
        return _attention(self.before), _attention(self.after)

    @property
    def had_artifacts(self) -> bool:
        """Whether there was something to take away."""
        return self.before.metrics["verdict"]["has_artifacts"]

    @property
    def outliers_fell(self) -> bool:
        """By as much as was asked for, by the norm of the model before and by the norms of the model after."""
        before, after = self.outlier_shares
        return max(after, self.own_outlier_share) <= (1 - self.min_fall) * before

    @property
    def output_stayed(self) -> bool:
        """Within the tolerance."""
        return 1 - self.cosine_mean <= self.cls_tolerance

    @property
    def succeeded(self) -> bool:
        """There were artifacts, they fell, and CLS stayed."""
        return self.had_artifacts and self.outliers_fell and self.output_stayed

    def sentences(self) -> list[str]:
        """The verdict with its reasons, then the numbers."""
        before, after = map(percent, self.outlier_shares)
        where = _where(self.before)
        verdict = f"Success: outliers fell from {before} to {after} of the patches, by their norm {where}."
        if not self.succeeded:
            verdict = f"No success: {'; and '.join(self._reasons())}."
        ratios = " to ".join(number(ratio) for ratio in self.norm_ratios)
        of_norms = "The median norm of a patch over the smallest went from"
        if self.before.metrics["verdict"]["side"] == "high":
            of_norms = "The largest norm of a patch over the median went from"
        sentences = [verdict, f"{of_norms} {ratios}."]
        if None not in self.attention_to_patches:
            shares = " to ".join(percent(share) for share in self.attention_to_patches)
            whose = "CLS" if self.output == "CLS" else "patches"
            sentences.append(f"The attention of {whose} that patches get in the last layer went from {shares}.")
        moved = f"cosine {self.cosine_mean:.4f} on average, {self.cosine_min:.4f} where it changed most"
        output = self.output[0].upper() + self.output[1:]
        return [*sentences, f"{output} before and after, past the final norm: {moved}."]

    def markdown(self) -> str:
        """The same for a model card: the verdict, a table, and what was measured on."""
        verdict, *_ = self.sentences()
        output = self.output[0].upper() + self.output[1:]
        rows = [
            ("Patches that are outliers", *map(percent, self.outlier_shares)),
            ("They are artifacts", *(_yes(each) for each in (self.before, self.after))),
            (_RATIO[self.before.metrics["verdict"]["side"]], *map(number, self.norm_ratios)),
            ("Attention to patches in the last layer", *map(percent, self.attention_to_patches)),
            (f"{output}: mean cosine with before", NOTHING, f"{self.cosine_mean:.4f}"),
            (f"{output}: smallest cosine with before", NOTHING, f"{self.cosine_min:.4f}"),
        ]
        table = [("", "Before", "After"), ("---", "---:", "---:"), *rows]
        images = self.before.metrics["images"]
        return "\n".join(
            [
                f"**{verdict.partition(':')[0]}**:{verdict.partition(':')[2]}",
                "",
                *(f"| {' | '.join(row)} |" for row in table),
                "",
                f"Measured on {images['num_images']} images at {images['height']}x{images['width']} pixels (SHA-256 "
                f"`{images['sha256'][:16]}`). Outliers are patches with a norm {_where(self.before)}, in both models. "
                f"A success has at least {percent(self.min_fall)} fewer of them, and a mean cosine of at least "
                f"{1 - self.cls_tolerance:g}.",
            ]
        )

    def _reasons(self) -> list[str]:
        """Why it is no success."""
        before, after = self.outlier_shares
        reasons = []
        if not self.had_artifacts:
            reasons.append(
                f"there were no artifacts to take away ({percent(before)} of the patches had a norm "
                f"{_where(self.before)}, and {percent(after)} have now)"
            )
        elif not self.outliers_fell:
            fell = f"outliers went from {percent(before)} to {percent(after)} of the patches"
            if self.own_outlier_share > after:
                fell += f", but by its own norms {percent(self.own_outlier_share)} stand apart"
            reasons.append(f"{fell}, where a fall by {percent(self.min_fall)} was asked for")
        if not self.output_stayed:
            reasons.append(
                f"{self.output} moved by {1 - self.cosine_mean:.3g} (1 less the mean cosine), where the tolerance is "
                f"{self.cls_tolerance:g}"
            )
        return reasons


def measure_effect(
    before: VisionEncoder,
    after: VisionEncoder,
    images: ImageFiles | Sequence[Path | PIL.Image.Image],
    *,
    threshold: float | ThresholdMethod = "mad",
    side: Side = "high",
    layer: int | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 16,
    seed: int = 0,
    cls_tolerance: float = CLS_TOLERANCE,
    min_fall: float = MIN_FALL,
    progress: bool = False,
) -> Effect:
    """Inspects a model without registers and the same model with them, and compares what comes out of both.

    Five passes over the images: two for each inspection, one for the cosines.

    Args:
        before, after: The models, of one size.
        images, size, batch_size, seed, progress: As for `inspect`.
        threshold: What an outlier is in the model before, as for `inspect`; after, it is the same norm.
        side: Of the threshold that outliers are on.
        layer: After which layer patches are looked at, 1 to `num_layers`; by default the last.
        cls_tolerance: Of 1 less the mean cosine of CLS before and after.
        min_fall: Share of the outliers that is to be gone.

    Raises:
        ValueError: as `inspect`; for models of different sizes, and limits that are not between 0 and 1.
    """
    require_limits(cls_tolerance, min_fall)
    for name in ("hidden_size", "patch_size", "num_layers", "has_cls"):
        if getattr(before, name) != getattr(after, name):
            raise ValueError(
                f"{before.name} and {after.name} are not one model before and after: their {name} is "
                f"{getattr(before, name)} and {getattr(after, name)}."
            )
    images = images if isinstance(images, ImageFiles) else ImageFiles(images)
    options = {"side": side, "layer": layer, "size": size, "batch_size": batch_size, "seed": seed}
    first = inspect(before, images, threshold=threshold, progress=progress, **options)
    norm = first.metrics["verdict"]["threshold"]
    second = inspect(after, images, threshold=norm, progress=progress, **options)
    stream = ImageStream(before, images, before.image_size if size is None else size, batch_size, progress)
    batches = [_cosines(before, after, pixel_values) for _, pixel_values in stream.batches("CLS")]
    cosines = torch.cat(batches)
    output = "CLS" if before.has_cls else "the mean of the patches"
    mean, least = cosines.mean().item(), cosines.min().item()
    return Effect(first, second, output, mean, least, cls_tolerance, min_fall)


def require_limits(cls_tolerance: float, min_fall: float) -> None:
    """Raises `ValueError` for a tolerance below 0, and a fall by nothing or by more than all."""
    if not cls_tolerance >= 0:
        raise ValueError(f"The tolerance of CLS must be 0 or more, got {cls_tolerance}.")
    if not 0 < min_fall <= 1:
        raise ValueError(f"The fall of the outliers must be above 0 and at most 1, all of them, got {min_fall}.")


def _cosines(before: VisionEncoder, after: VisionEncoder, pixel_values: torch.Tensor) -> torch.Tensor:
    """Of every image, `(batch_size,)` in float64."""
    return cosine_similarity(*(_output(encoder, pixel_values) for encoder in (before, after)), dim=-1)


def _output(encoder: VisionEncoder, pixel_values: torch.Tensor) -> torch.Tensor:
    """CLS or the mean of the patches, after the final norm, `(batch_size, hidden_size)`."""
    tokens = encoder.split(encoder.final(encoder.layers(pixel_values, [-1])[-1]))
    return (tokens.patches.mean(dim=1) if tokens.cls is None else tokens.cls).cpu().double()


_RATIO = {"high": "Largest norm of a patch over the median", "low": "Median norm of a patch over the smallest"}


def _norm_ratio(inspection: Inspection) -> float:
    verdict = inspection.metrics["verdict"]
    norms = next(row for row in inspection.metrics["norms"]["patch"] if row["layer"] == verdict["layer"])
    return norms["max"] / norms["median"] if verdict["side"] == "high" else norms["median"] / norms["min"]


def _attention(inspection: Inspection) -> float | None:
    attention = inspection.metrics["attention"]
    if attention is None:
        return None
    [layers] = attention.values()
    return layers[-1]["attention_to_patches"]


def _where(inspection: Inspection) -> str:
    """ "above 12.3 after layer 5"."""
    verdict = inspection.metrics["verdict"]
    beyond = "above" if verdict["side"] == "high" else "below"
    return f"{beyond} {number(verdict['threshold'], 4)} after layer {verdict['layer']}"


def _yes(inspection: Inspection) -> str:
    return "yes" if inspection.metrics["verdict"]["has_artifacts"] else "no"
