# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The two passes of an inspection: what can be summed at once, and what needs to know which patches are outliers.

Layers are counted from 1, as in the report, and 0 is the patch embedding.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from ..features import Tokens, VisionEncoder
from .accumulate import in_float64
from .attention import Components, MeanAttention, PatchComponents, PrefixSimilarity, attention_maps
from .neighbours import NeighbourSimilarity, OutlierFrequency
from .norms import NormStatistics, Side, token_norms
from .outliers import outlier_mask
from .probes import ImageClassProbe, PositionProbe, ReconstructionProbe, matched_mask, patch_pixels


def register_kinds(encoder: VisionEncoder) -> list[str]:
    """`"register_1"` and so on."""
    return [f"register_{number + 1}" for number in range(encoder.num_registers)]


def token_kinds(encoder: VisionEncoder, tokens: Tokens) -> dict[str, torch.Tensor]:
    """Tokens of one layer, each register as a kind of its own: `(batch, number, dim)`."""
    kinds = {"patch": tokens.patches}
    if tokens.cls is not None:
        kinds["cls"] = tokens.cls[:, None]
    return kinds | dict(zip(register_kinds(encoder), tokens.registers.split(1, dim=1)))


class NormCollector:
    """Callbacks of one forward pass that take the norms of all tokens, layer by layer.

    Attributes:
        norms: For every kind `(layers, batch, number)`; of patches, the first are those of the patch embedding.
    """

    def __init__(self, encoder: VisionEncoder):
        self._encoder = encoder
        self._norms: dict[str, list[torch.Tensor]] = defaultdict(list)

    def on_patches(self, patch_embeddings: torch.Tensor) -> None:
        self._norms["patch"].append(token_norms(patch_embeddings))

    def on_layer(self, index: int, tokens: torch.Tensor) -> None:
        # of all tokens at once, since a GPU waits for each call
        norms = token_norms(tokens)[..., None]
        for kind, values in token_kinds(self._encoder, self._encoder.split(norms)).items():
            self._norms[kind].append(values[..., 0])

    @property
    def norms(self) -> dict[str, torch.Tensor]:
        return {kind: torch.stack(values) for kind, values in self._norms.items()}


class Survey:
    """The first pass: norms at every layer, mean registers, and the covariance of patches.

    Args:
        encoder: The model.
        layer: Whose patches and registers are looked at.
    """

    def __init__(self, encoder: VisionEncoder, layer: int):
        self.encoder, self.layer = encoder, layer
        self.norms = NormStatistics()
        self.components = PatchComponents(min(3, encoder.hidden_size))
        self.similarity = PrefixSimilarity()
        self._register_sums: list[torch.Tensor | float] = [0.0] * encoder.num_layers
        self.num_images = 0

    def update(self, pixel_values: torch.Tensor) -> None:
        """Adds a batch."""
        collector = NormCollector(self.encoder)

        def on_layer(index: int, tokens: torch.Tensor):
            collector.on_layer(index, tokens)
            parts = self.encoder.split(tokens)
            self._register_sums[index] = self._register_sums[index] + in_float64(parts.registers).sum(0)
            if index == self.layer - 1:
                self._look_at(parts)

        self.encoder.observe(pixel_values, on_patches=collector.on_patches, on_layer=on_layer)
        self.norms.update(collector.norms)
        self.num_images += len(pixel_values)

    def _look_at(self, tokens: Tokens) -> None:
        self.components.update(tokens.patches)
        if tokens.cls is not None and self.encoder.num_registers:
            self.similarity.update(torch.cat([tokens.cls[:, None], tokens.registers], dim=1))

    @property
    def mean_registers(self) -> torch.Tensor:
        """Mean over the images after every layer, `(num_layers, num_registers, dim)`."""
        return torch.stack([total / self.num_images for total in self._register_sums])


@dataclass(frozen=True, eq=False)
class Picture:
    """What figures show of one image. Layers are all, from the first.

    Attributes:
        name: Of the image.
        photograph: `(height, width, 3)`, uint8, as the model sees it.
        norms: `(num_layers, rows, cols)`.
        outliers: `(rows, cols)`.
        components: The first three principal components of the patches as colours, `(rows, cols, 3)`, 0 to 1.
        attention: At the layer looked at, for CLS and every register `(num_heads, rows, cols)`, each map summing to 1.
            Of models with neither, for the mean over the patches.
        attention_by_layer: Of the first of these at every layer, mean over the heads, `(num_layers, rows, cols)`;
            `None` where there are none.
        attention_of_all_layers: As `attention` for every layer, where that was asked for, or nothing.
    """

    name: str
    photograph: np.ndarray
    norms: np.ndarray
    outliers: np.ndarray
    components: np.ndarray
    attention: Mapping[str, np.ndarray]
    attention_by_layer: np.ndarray | None
    attention_of_all_layers: Sequence[Mapping[str, np.ndarray]] = ()


@dataclass(eq=False)
class Batch:
    """One batch as the second pass sees it.

    Attributes:
        ids: Of the images.
        pixel_values: `(batch, channels, height, width)`, on the device of the model.
        patch_embeddings: `(batch, rows * cols, dim)`
        norms: Of the patches, `(1 + num_layers, batch, rows * cols)`, from the patch embedding on.
        tokens: At the layer looked at.
        final: After the last layer and the final norm.
        outliers: `(batch, rows * cols)`
        attention: Of every layer, the probabilities of `"cls"` and `"registers"`, or of `"patch_mean"`: `(batch,
            heads, queries, tokens)`.
    """

    ids: Sequence[int]
    pixel_values: torch.Tensor
    patch_embeddings: torch.Tensor
    norms: torch.Tensor
    tokens: Tokens
    final: Tokens
    outliers: torch.Tensor
    attention: list[dict[str, torch.Tensor]] = field(default_factory=list)


class Probes:
    """Linear probes on outliers, on all other patches, and on as many of these as there are outliers."""

    def __init__(self, encoder: VisionEncoder, grid: tuple[int, int], num_classes: int, seed: int):
        self.encoder, self.seed = encoder, seed
        kinds = ("normal", "normal_matched", "outlier")
        # less than their defaults: with twenty and more probes held-out tokens are the largest part of the memory
        tokens, images = {"max_test_tokens": 2048}, {"max_test_images": 1024}
        self.position = {kind: PositionProbe(*grid, seed=seed, **tokens) for kind in kinds}
        self.reconstruction = {kind: ReconstructionProbe(seed=seed, **tokens) for kind in kinds}
        self.image_class: dict[str, ImageClassProbe] = {}
        if num_classes:
            probe = partial(ImageClassProbe, num_classes, seed=seed, **images)
            single, drawn = partial(probe, num_draws=1), partial(probe, num_draws=5)
            self.image_class = {"normal": drawn(), "outlier": drawn()}
            if encoder.has_cls:
                self.image_class["cls"] = single()
            if encoder.num_registers:
                self.image_class |= {"register": drawn()} | {kind: single() for kind in register_kinds(encoder)}

    def update(self, batch: Batch, labels: torch.Tensor | None) -> None:
        """Adds a batch."""
        masks = {
            "normal": ~batch.outliers,
            "normal_matched": matched_mask(batch.ids, batch.outliers, self.seed),
            "outlier": batch.outliers,
        }
        pixels = patch_pixels(batch.pixel_values, self.encoder.patch_size)
        for kind, mask in masks.items():
            self.position[kind].update(batch.ids, batch.tokens.patches, mask)
            self.reconstruction[kind].update(batch.ids, batch.tokens.patches, pixels, mask)
        if labels is not None:
            tokens = token_kinds(self.encoder, batch.tokens) | {"register": batch.tokens.registers}
            for kind, probe in self.image_class.items():
                probe.update(batch.ids, labels, tokens.get(kind, batch.tokens.patches), masks.get(kind))


class Ablation:
    """What changes after the final norm where registers are their means over images, throughout the model.

    It takes a forward pass for each register and one for all, and therefore only some of the images.

    Args:
        encoder: With registers.
        mean_registers: `(num_layers, num_registers, dim)`
        image_ids: The images that take part.
        num_classes: Of the images, 0 where not known.
        seed: Of the class probe.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        mean_registers: torch.Tensor,
        image_ids: Collection[int],
        num_classes: int,
        seed: int,
    ):
        self.encoder, self.mean_registers, self.image_ids = encoder, mean_registers, frozenset(image_ids)
        registers = range(encoder.num_registers)
        self.groups = dict(zip(register_kinds(encoder), ([register] for register in registers)))
        if encoder.num_registers > 1:
            self.groups["all"] = list(registers)
        self._changes = {group: defaultdict(float) for group in self.groups}
        self.cls_probes: dict[str, ImageClassProbe] = {}
        if num_classes and encoder.has_cls:
            probe = partial(ImageClassProbe, num_classes, 1, seed, max_test_images=1024)
            untouched = probe()
            self.cls_probes = {"none": untouched} | {group: probe(penalty_of=untouched) for group in self.groups}

    def update(self, batch: Batch, labels: torch.Tensor | None) -> None:
        """Adds those of a batch that take part."""
        rows = [row for row, index in enumerate(batch.ids) if index in self.image_ids]
        if not rows:
            return
        ids, pixel_values = [batch.ids[row] for row in rows], batch.pixel_values[rows]
        before = Tokens(*(None if part is None else part[rows] for part in batch.final))
        self._probe("none", ids, before, labels, rows)
        for group, registers in self.groups.items():
            with ExitStack() as stack:
                for layer, means in enumerate(self.mean_registers):
                    stack.enter_context(self.encoder.replace_registers(means[registers], registers, layer))
                last = self.encoder.layers(pixel_values, [-1])[-1]
            after = self.encoder.split(self.encoder.final(last))
            self._compare(group, before, after)
            self._probe(group, ids, after, labels, rows)

    def _probe(
        self, group: str, ids: Sequence[int], tokens: Tokens, labels: torch.Tensor | None, rows: Sequence[int]
    ) -> None:
        if self.cls_probes and labels is not None:
            self.cls_probes[group].update(ids, labels[rows], tokens.cls[:, None])

    def _compare(self, group: str, before: Tokens, after: Tokens) -> None:
        parts = {"patches": (before.patches, after.patches)}
        if before.cls is not None:
            parts["cls"] = (before.cls[:, None], after.cls[:, None])
        for part, (old, new) in parts.items():
            cosines = torch.cosine_similarity(in_float64(old), in_float64(new), dim=-1)
            self._changes[group][part] += (1 - cosines).mean(1).sum().item()

    def change(self, group: str, part: str) -> float | None:
        """Mean of 1 less the cosine similarity to before; `None` without CLS."""
        return self._changes[group][part] / len(self.image_ids) if part in self._changes[group] else None


class Examination:
    """The second pass, when the threshold is known.

    Args:
        survey: The first pass.
        threshold: As a norm.
        side: Of the threshold that outliers are on.
        grid: Rows and columns of the patches.
        num_classes: Of the images, 0 where not known.
        seed: Of everything that is drawn.
        picture_names: Of the images to keep pictures of, by id.
        ablated_images: Ids of the images that registers are replaced for.
        sees_attention: Whether the model shows its attention.
        all_layers: Whether pictures keep the attention of every head at every layer.
    """

    def __init__(
        self,
        survey: Survey,
        threshold: float,
        side: Side,
        grid: tuple[int, int],
        num_classes: int,
        seed: int,
        picture_names: Mapping[int, str],
        ablated_images: Collection[int],
        sees_attention: bool,
        all_layers: bool = False,
    ):
        self.encoder, self.layer = survey.encoder, survey.layer
        self.threshold, self.side, self.grid, self.picture_names = threshold, side, grid, picture_names
        self.components: Components = survey.components.fit()
        self.groups = NormStatistics()
        self.frequency = OutlierFrequency()
        self.similarity = {"patch": NeighbourSimilarity("patch"), "pair": NeighbourSimilarity("pair")}
        self.probes = Probes(self.encoder, grid, num_classes, seed)
        self.ablation = None
        if self.encoder.num_registers:
            self.ablation = Ablation(self.encoder, survey.mean_registers, ablated_images, num_classes, seed)
        encoder = self.encoder
        has_tokens = {"cls": encoder.has_cls, "registers": encoder.num_registers > 0}
        # what patches attend to stands in where there is no token that looks at the whole image
        queries = [query for query, is_there in has_tokens.items() if is_there] or ["patch_mean"]
        self.queries = queries if sees_attention else []
        self.all_layers = all_layers
        self.attention = [
            {query: MeanAttention(encoder.num_prefix_tokens, *grid) for query in self.queries}
            for _ in range(encoder.num_layers)
        ]
        self.pictures: list[Picture] = []

    def update(self, ids: Sequence[int], pixel_values: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Adds a batch; `labels` are `(batch,)`."""
        batch = self._observe(ids, pixel_values.to(self.encoder.device))
        on_grid = batch.outliers.unflatten(1, self.grid)
        self.groups.update({"outlier": batch.norms[:, batch.outliers], "rest": batch.norms[:, ~batch.outliers]})
        self.frequency.update(on_grid)
        for similarity in self.similarity.values():
            similarity.update(batch.patch_embeddings.unflatten(1, self.grid), on_grid)
        for means, probabilities in zip(self.attention, batch.attention):
            for query in self.queries:
                means[query].update(probabilities[query])
        self.probes.update(batch, labels)
        if self.ablation:
            self.ablation.update(batch, labels)
        self.pictures += [self._picture(batch, row) for row, index in enumerate(ids) if index in self.picture_names]

    def _observe(self, ids: Sequence[int], pixel_values: torch.Tensor) -> Batch:
        collector, kept, attention = NormCollector(self.encoder), {}, []

        def on_patches(patch_embeddings: torch.Tensor):
            kept["embeddings"] = patch_embeddings
            collector.on_patches(patch_embeddings)

        def on_layer(index: int, tokens: torch.Tensor):
            collector.on_layer(index, tokens)
            if index == self.layer - 1:
                kept["tokens"] = tokens
            kept["last"] = tokens

        def on_attention(index: int, weights):
            attention.append({query: weights(query) for query in self.queries})

        self.encoder.observe(pixel_values, on_patches, on_layer, on_attention if self.queries else None)
        norms = collector.norms["patch"]
        return Batch(
            ids=ids,
            pixel_values=pixel_values,
            patch_embeddings=kept["embeddings"],
            norms=norms,
            tokens=self.encoder.split(kept["tokens"]),
            final=self.encoder.split(self.encoder.final(kept["last"])),
            outliers=outlier_mask(norms[self.layer], self.threshold, self.side),
            attention=attention,
        )

    def _picture(self, batch: Batch, row: int) -> Picture:
        encoder, by_layer = self.encoder, None
        layers = [self._maps(probabilities, row) for probabilities in batch.attention]
        if layers:
            first = next(iter(layers[0]))
            by_layer = np.stack([maps[first].mean(0) for maps in layers])
        colours = self.components.colours(batch.tokens.patches[row]).unflatten(0, self.grid)
        return Picture(
            name=self.picture_names[batch.ids[row]],
            photograph=_photograph(batch.pixel_values[row], encoder),
            norms=batch.norms[1:, row].unflatten(1, self.grid).cpu().numpy(),
            outliers=batch.outliers[row].unflatten(0, self.grid).cpu().numpy(),
            components=colours.numpy(),
            attention=layers[self.layer - 1] if layers else {},
            attention_by_layer=by_layer,
            attention_of_all_layers=layers if self.all_layers else (),
        )

    def _maps(self, probabilities: Mapping[str, torch.Tensor], row: int) -> dict[str, np.ndarray]:
        """`(batch, heads, queries, tokens)` of one layer to `(heads, rows, cols)` of every token of one image."""
        names = {"cls": ["cls"], "registers": register_kinds(self.encoder), "patch_mean": ["patch_mean"]}
        maps = {}
        for query in self.queries:
            image = probabilities[query][row : row + 1]
            by_query = attention_maps(image, self.encoder.num_prefix_tokens, *self.grid)[0].transpose(0, 1)
            maps |= dict(zip(names[query], by_query.cpu().numpy()))
        return maps


def _photograph(pixel_values: torch.Tensor, encoder: VisionEncoder) -> np.ndarray:
    """Normalized pixels as they were."""
    mean, std = (torch.tensor(list(values))[:, None, None] for values in (encoder.mean, encoder.std))
    pixels = pixel_values.float().cpu() * std + mean
    return (255 * pixels.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
