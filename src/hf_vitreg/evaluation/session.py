# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What all tasks are given, and what they give back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator

from ..data.image_data import ImageData, StreamedData, content_hash
from ..features import VisionEncoder, load_vit, model_hash
from .extraction import FeatureSpec, extract
from .feature_cache import Features
from .options import EvaluationOptions
from .zero_shot import DualEncoder, load_dual_encoder


@dataclass(frozen=True)
class Outcome:
    """What a task measured.

    Attributes:
        metrics: The numbers of its tables, the first of them the one that models are compared by.
        data: Images that it was measured on, in words and numbers: `name`, `split`, `num_images` and the like.
        details: All else, as JSON takes it.
    """

    metrics: Mapping[str, float]
    data: Mapping[str, object]
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(eq=False)
class Session:
    """A model, its data, and how they are evaluated.

    Attributes:
        model: As for `load_vit`.
        data: Where its images are, as the task reads them.
        folder: Where the main process puts files; `None` on the others.
        options: Of the task.
        accelerator: Of the processes that share the work.
        device: Where to compute.
        progress: Whether the main process shows how far it is.
    """

    model: str | Path
    data: str | Path
    folder: Path | None
    options: EvaluationOptions
    accelerator: Accelerator | None
    device: torch.device
    progress: bool
    _encoder: VisionEncoder | None = None
    _dual_encoder: DualEncoder | None = None

    @property
    def encoder(self) -> VisionEncoder:
        """The model, loaded when it is first asked for. Raises `ValueError` as `load_vit`."""
        if self._encoder is None:
            self._encoder = load_vit(self.model, device=self.device)
        return self._encoder

    @property
    def dual_encoder(self) -> DualEncoder:
        """The model as one of images and texts. Raises `ValueError` as `load_dual_encoder`."""
        if self._dual_encoder is None:
            self._dual_encoder = load_dual_encoder(self.model, device=self.device)
        return self._dual_encoder

    def about_model(self) -> dict[str, object]:
        """What results say of the model that the task asked for."""
        if self._dual_encoder is not None:
            return {"name": str(self.model), "sha256": model_hash(self.dual_encoder.model)}
        names = ("name", "source", "num_layers", "hidden_size", "patch_size", "num_registers")
        facts = {name: getattr(self.encoder, name) for name in names}
        return facts | {"sha256": model_hash(self.encoder.model)}

    @property
    def shows_progress(self) -> bool:
        """Of one of the processes."""
        return self.progress and self.folder is not None

    def source(self) -> str | Path | dict[str, str | Path]:
        """The data, or where its two splits are."""
        if self.options.validation_data is None:
            return self.data
        return {"train": self.data, "validation": self.options.validation_data}

    def layer_index(self) -> int:
        """From 0; layers of options are counted from 1."""
        layer, number = self.options.layer, self.encoder.num_layers
        if layer is None:
            return number - 1
        if not 1 <= layer <= number:
            raise ValueError(f"{self.encoder.name} has layers 1 to {number}, got {layer}.")
        return layer - 1

    def last_layers(self, number: int) -> tuple[int, ...]:
        """The indices of the last so many, ascending. Raises `ValueError` where there are not so many."""
        if not 1 <= number <= self.encoder.num_layers:
            raise ValueError(f"{self.encoder.name} has {self.encoder.num_layers} layers, {number} were asked for.")
        return tuple(range(self.encoder.num_layers - number, self.encoder.num_layers))

    def features(
        self, data: ImageData | StreamedData, kinds: Sequence[str], layers: Sequence[int], preprocessing: str
    ) -> Features:
        """Those of all images, from the cache where there is one."""
        options = self.options
        return extract(
            self.encoder,
            data,
            FeatureSpec(kinds=tuple(kinds), layers=tuple(layers), size=options.size, preprocessing=preprocessing),
            cache_dir=options.cache_dir,
            accelerator=self.accelerator,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            progress=self.progress,
            on_bad_image="skip" if options.skip_bad_images else "raise",
        )

    def about(self, data: ImageData | StreamedData, number: int) -> dict[str, object]:
        """What results say of their images: of a stream its identity, else the hash of their content."""
        is_stream = not hasattr(data, "__len__")
        return {
            "name": data.display_name,
            "split": getattr(data, "split", None),
            "num_images": number,
            **({"stream": data.identity} if is_stream else {"sha256": content_hash(data, self.accelerator)}),
        }
