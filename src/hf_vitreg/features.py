# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Any ViT, ours, transformers' or timm's, to its CLS, registers and patches, layer by layer.

Tokens of a layer are always those before the final norm: after it the outliers of a model without registers can no
longer be told by their norm ("Vision Transformers Need Registers", Darcet et al., 2024, section 2).
"""

import difflib
import hashlib
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import PIL.ImageOps
import torch
from safetensors import SafetensorError
from torch import nn
from torchvision.transforms.v2 import functional as image_functional
from transformers import AutoImageProcessor, AutoModel, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from .vit_families import (
    LAYOUTS,
    MODEL_TYPES,
    SUPPORTED,
    AttentionObserver,
    Layout,
    layout_name,
    projected,
    show_output,
    show_patches,
    sizes_of_timm,
    sizes_of_transformers,
    through_sdpa,
)


class Tokens(NamedTuple):
    """The tokens of one layer by what they are; a distillation token (DeiT) is none of them.

    Attributes:
        cls: `(batch_size, hidden_size)`, `None` where the model has no CLS token.
        registers: `(batch_size, num_registers, hidden_size)`.
        patches: `(batch_size, rows * cols, hidden_size)`, row by row.
    """

    cls: torch.Tensor | None
    registers: torch.Tensor
    patches: torch.Tensor


# from the name of some queries to their attention, of shape (batch_size, num_heads, num_queries, tokens)
Weights = Callable[[str], torch.Tensor]


# no output of ours reads them, and checkpoints of other heads are without
_NOT_NEEDED = ("pooler.", "head.", "projection.", "embeddings.mask_token", "text_", "visual_projection.", "logit_")


@dataclass(eq=False, kw_only=True)
class VisionEncoder:
    """A ViT in eval mode, and what can be asked of it. Made by `load_vit` or `VisionEncoder.wrap`.

    Attributes:
        model: The module itself, without heads.
        name: What it was loaded from.
        source: What it is: `"vitreg"`, `"transformers dinov2"`, `"timm vit_small_patch14_dinov2"`.
        num_layers, num_heads, hidden_size, patch_size: Its sizes; patches are squares of `patch_size` pixels.
        image_size: Its native height and width in pixels, whole patches.
        has_cls: Whether its first token is CLS.
        num_registers: Number of registers, the last tokens before the patches.
        num_prefix_tokens: Number of tokens before the patches: CLS, distillation token, registers.
        mean, std: What `preprocess` normalizes each channel with; `None` where nobody said.
    """

    model: nn.Module = field(repr=False)
    name: str
    source: str
    num_layers: int
    num_heads: int
    hidden_size: int
    patch_size: int
    image_size: tuple[int, int]
    has_cls: bool
    num_registers: int
    num_prefix_tokens: int
    mean: Sequence[float] | None
    std: Sequence[float] | None
    _layout: Layout = field(repr=False)

    @classmethod
    def wrap(
        cls,
        model: nn.Module,
        name: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> "VisionEncoder":
        """The first ViT inside a model in memory: a classifier, the vision half of a dual encoder, or the ViT itself.

        Args:
            model: It is set to eval mode, and shared, not copied.
            name: To call it by; by default its class.
            mean, std: What its images are normalized with. timm's models know their own.

        Raises:
            ValueError: where there is no ViT inside that could be read.
        """
        found = next(((module, key) for module in model.modules() if (key := layout_name(module))), None)
        if found is None:
            raise ValueError(f"{type(model).__name__} is no plain ViT. {SUPPORTED}")
        vit, key = found
        is_timm = key.startswith("timm.")
        sizes = sizes_of_timm(vit) if is_timm else sizes_of_transformers(vit.config)
        normalization = getattr(vit, "pretrained_cfg", {}) if is_timm else {}
        mean, std = mean or normalization.get("mean"), std or normalization.get("std")
        name = name or type(model).__name__
        return cls(model=vit.eval(), name=name, mean=mean, std=std, _layout=LAYOUTS[key], **sizes)

    # Geometry

    @property
    def register_slice(self) -> slice:
        """Where the registers are among the tokens."""
        return slice(self.num_prefix_tokens - self.num_registers, self.num_prefix_tokens)

    @property
    def patch_slice(self) -> slice:
        """Where the patches are among the tokens."""
        return slice(self.num_prefix_tokens, None)

    @property
    def device(self) -> torch.device:
        """Where the weights are; images are brought there."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; images are brought to it."""
        return next(self.model.parameters()).dtype

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patch grid of an image.

        Raises:
            ValueError: where a side is no multiple of the patch size, with the nearest that are.
        """
        for side, pixels in (("height", height), ("width", width)):
            if pixels % self.patch_size or pixels < 1:
                below = pixels // self.patch_size * self.patch_size
                nearest = f"{below} or {below + self.patch_size}" if below > 0 else f"{self.patch_size}"
                raise ValueError(
                    f"A {side} of {pixels} pixels is no multiple of the patch size {self.patch_size} of {self.name}. "
                    f"The nearest: {nearest}."
                )
        return height // self.patch_size, width // self.patch_size

    def mlp_size(self) -> tuple[int, bool] | None:
        """Hidden width of the MLP in the first layer, and whether it is gated, as SwiGLU is.

        `None` where a layer is not one attention and one MLP, as timm's parallel blocks.
        """
        linears = self._linears_of_mlp(self.blocks[0])
        if not linears:
            return None
        *up, down = linears
        return down.in_features, sum(each.out_features for each in up) == 2 * down.in_features

    @property
    def blocks(self) -> nn.Module:
        """The layers themselves, in their order."""
        return self.model.get_submodule(self._layout.layers)

    def mlps(self) -> list[tuple[nn.Module, nn.Linear]]:
        """The MLP of every layer, and its last linear map, whose inputs are its neurons.

        Raises:
            ValueError: where a layer is not one attention and one MLP.
        """
        found = []
        for index, block in enumerate(self.blocks):
            linears = self._linears_of_mlp(block)
            if not linears:
                raise ValueError(
                    f"Layer {index} of {self.name}, a {type(block).__name__}, is not one attention and one MLP of two "
                    "or three linear maps, so that it has no neurons to look at. Adapters must be merged first."
                )
            mlp = next(each for each in block.modules() if any(child is linears[-1] for child in each.children()))
            found.append((mlp, linears[-1]))
        return found

    def attention_modules(self) -> list[nn.Module | None]:
        """The attention of every layer, `None` where it is not one module."""
        return [getattr(block, self._layout.attention, None) for block in self.blocks]

    def pre_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens as they enter the first layer, of tokens that have their positions: CLIP norms them.

        For models of transformers and timm; ViTReg's embeddings do it themselves.
        """
        norm = None if self._layout.pre_norm is None else getattr(self.model, self._layout.pre_norm, None)
        return tokens if norm is None else norm(tokens)

    def _linears_of_mlp(self, block: nn.Module) -> list[nn.Linear]:
        """In their order, nothing where the layer is not one attention and one MLP."""
        attention = getattr(block, self._layout.attention, None)
        if attention is None:
            return []
        projections = set(attention.modules())
        linears = [each for each in block.modules() if isinstance(each, nn.Linear) and each not in projections]
        return linears if len(linears) in (2, 3) else []

    def split(self, tokens: torch.Tensor) -> Tokens:
        """Tokens of any layer, `(batch_size, tokens, hidden_size)`, by what they are. Views, no copies."""
        return Tokens(
            tokens[:, 0] if self.has_cls else None, tokens[:, self.register_slice], tokens[:, self.patch_slice]
        )

    def final(self, tokens: torch.Tensor) -> torch.Tensor:
        """All tokens of any layer, `(batch_size, tokens, hidden_size)`, after the model's final norm.

        CLIP norms CLS alone; here its norm is applied to every token. Where a model norms nothing but the mean of its
        patches (timm's `fc_norm`), or nothing at all, tokens come back as they are.
        """
        norm = getattr(self.model, "_final_norm", None) or self.model.get_submodule(self._layout.final_norm)
        with torch.no_grad():
            return norm(tokens)

    # Images

    def preprocess(self, images: Sequence[PIL.Image.Image], size: tuple[int, int] | None = None) -> torch.Tensor:
        """Images as the model takes them: resized until they cover `size`, the centre cropped, normalized.

        At any size and for any model this is the same part of an image, so that maps of two can be compared.

        Args:
            images: Of any mode and size.
            size: Height and width in pixels, multiples of the patch size; by default native.

        Returns:
            `(len(images), 3, height, width)`, float32.

        Raises:
            ValueError: where the size is no multiple of the patch size, or mean and std are not known.
        """
        self._require_normalization()
        size = self.image_size if size is None else size
        self.grid(*size)
        return self.normalize(torch.stack([self.fit(image, size) for image in images]))

    def fit(self, image: PIL.Image.Image, size: tuple[int, int]) -> torch.Tensor:
        """One image resized until it covers a size, the centre cropped: what `preprocess` then normalizes.

        Args:
            image: Of any mode and size.
            size: Height and width in pixels.

        Returns:
            `(3, height, width)`, uint8: a quarter of the memory, to be kept or brought to a device.
        """
        height, width = size
        fitted = PIL.ImageOps.fit(image.convert("RGB"), (width, height), PIL.Image.Resampling.BICUBIC)
        return image_functional.pil_to_tensor(fitted)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the model takes of images as they come from `fit`.

        Args:
            pixels: `(batch_size, 3, height, width)`, uint8, on any device.

        Returns:
            The same shape, float32. Raises `ValueError` where mean and std are not known.
        """
        self._require_normalization()
        return image_functional.normalize(pixels.float() / 255, list(self.mean), list(self.std))

    def _require_normalization(self) -> None:
        if self.mean is None or self.std is None:
            raise ValueError(
                f"What {self.name} normalizes its images with is not known: it has no preprocessor_config.json. Save "
                "its image processor beside it, or give mean and std to VisionEncoder.wrap."
            )

    # Observation

    @torch.no_grad()
    def observe(
        self,
        pixel_values: torch.Tensor,
        on_patches: Callable[[torch.Tensor], object] | None = None,
        on_layer: Callable[[int, torch.Tensor], object] | None = None,
        on_attention: Callable[[int, Weights], object] | None = None,
    ) -> None:
        """One forward pass that shows what goes by. What a callback does not keep is gone.

        Args:
            pixel_values: `(batch_size, num_channels, height, width)`.
            on_patches: Gets the patch embeddings, `(batch_size, rows * cols, hidden_size)`, as they leave the patch
                embedding, before the position embeddings.
            on_layer: Gets the index of every layer, from 0, and its output before the final norm,
                `(batch_size, tokens, hidden_size)`, as `split` reads it.
            on_attention: Gets the index of every layer, and a function from `"cls"`, `"registers"` or `"all"` to the
                attention of these tokens to all, `(batch_size, num_heads, num_queries, tokens)`, in float32; from
                `"patch_mean"` to the mean over the patches, one query. It is computed when the function is called,
                from queries and keys as they meet, after norms and rotation.

        Raises:
            ValueError: for images whose size the model cannot take, and with `on_attention` for a layer that computes
            no attention, or several.
        """
        with ExitStack() as stack:
            if on_patches is not None:
                patch_embeddings = self.model.get_submodule(self._layout.patch_embeddings)
                stack.enter_context(patch_embeddings.register_forward_hook(partial(show_patches, on_patches)))
            if on_attention is not None:
                stack.enter_context(through_sdpa(self.model))
                stack.enter_context(AttentionObserver(self.blocks, partial(self._show_attention, on_attention)))
            if on_layer is not None:
                for index, layer in enumerate(self.blocks):
                    stack.enter_context(layer.register_forward_hook(partial(show_output, on_layer, index)))
            self._forward(pixel_values)

    def layers(self, pixel_values: torch.Tensor, indices: Sequence[int]) -> dict[int, torch.Tensor]:
        """The output of some layers before the final norm, `(batch_size, tokens, hidden_size)` by index as given.

        Raises:
            ValueError: where a layer does not exist, or the model cannot take images of this size.
        """
        wanted, found = {index: self.layer_index(index) for index in indices}, {}

        def keep(index: int, tokens: torch.Tensor):
            if index in wanted.values():
                found[index] = tokens

        self.observe(pixel_values, on_layer=keep)
        return {index: found[layer] for index, layer in wanted.items()}

    def attention(self, pixel_values: torch.Tensor, layer: int, queries: str = "cls") -> torch.Tensor:
        """Attention of chosen tokens in one layer.

        Args:
            pixel_values: `(batch_size, num_channels, height, width)`.
            layer: From 0, or from the end with -1 the last.
            queries: `"cls"`, `"registers"` or `"all"`; or `"patch_mean"`, the mean over the patches, one query.

        Returns:
            `(batch_size, num_heads, num_queries, tokens)`, float32; each row sums to 1. The map over the image is
            `weights[..., encoder.patch_slice].unflatten(-1, (rows, cols))`.

        Raises:
            ValueError: where there is no such layer or no such tokens, the layer's attention is none that could be
            read, or the model cannot take images of this size.
        """
        wanted, found = self.layer_index(layer), []
        self._query_slice(queries)

        def keep(index: int, weights: Weights):
            if index == wanted:
                found.append(weights(queries))

        self.observe(pixel_values, on_attention=keep)
        return found[0]

    @torch.no_grad()
    def qkv(self, pixel_values: torch.Tensor, layer: int, facet: str) -> torch.Tensor:
        """Queries, keys or values of one layer as they are projected, before norms and rotation, heads side by side.

        These are the features of LOST (Siméoni et al., 2021), which takes the keys of the last layer.

        Args:
            pixel_values: `(batch_size, num_channels, height, width)`.
            layer: From 0, or from the end with -1 the last.
            facet: `"query"`, `"key"` or `"value"`.

        Returns:
            `(batch_size, tokens, hidden_size)`.

        Raises:
            ValueError: where there is no such layer or facet, or the model cannot take images of this size.
        """
        found = []
        with self.show_projections(layer, [facet], lambda _, values: found.append(values)):
            self._forward(pixel_values)
        return found[0]

    @contextmanager
    def replace_registers(
        self, values: torch.Tensor, registers: Sequence[int] | None = None, layer: int | None = None
    ) -> Iterator[None]:
        """In this context the chosen registers are these vectors in every image, whatever the image made of them.

        A register that is replaced by its mean over images tells what the model loses without what it had to say of
        this one; by zero it would lose its bias on attention too, which overstates it (arXiv:2604.14433). Contexts
        nest: one a layer replaces a register throughout.

        Args:
            values: `(len(registers), hidden_size)`.
            registers: Which ones, from 0; by default all.
            layer: Whose output, from 0 or from the end; by default what enters the first layer, where registers are
                still the same for every image.

        Raises:
            ValueError: where there is no such register or layer, or the values have another shape.
        """
        registers = list(range(self.num_registers) if registers is None else registers)
        if not registers or not all(0 <= register < self.num_registers for register in registers):
            raise ValueError(f"{self.name} has {self.num_registers} registers, counted from 0, got {registers}.")
        if values.shape != (len(registers), self.hidden_size):
            raise ValueError(
                f"values must have shape {(len(registers), self.hidden_size)}, (registers, hidden_size), got "
                f"{tuple(values.shape)}."
            )
        indices = [self.register_slice.start + register for register in registers]

        def replaced(tokens: torch.Tensor) -> torch.Tensor:
            tokens = tokens.clone()
            tokens[:, indices] = values.to(tokens)
            return tokens

        if layer is None:
            hook = self.blocks[0].register_forward_pre_hook(lambda _, args: (replaced(args[0]), *args[1:]))
        else:
            block = self.blocks[self.layer_index(layer)]
            hook = block.register_forward_hook(lambda module, args, tokens: replaced(tokens))
        with hook:
            yield

    def layer_index(self, layer: int) -> int:
        """A layer counted from 0, given so or from the end. Raises `ValueError` where it does not exist."""
        if not -self.num_layers <= layer < self.num_layers:
            raise ValueError(
                f"layer {layer} does not exist: {self.name} has {self.num_layers}, 0 to {self.num_layers - 1}."
            )
        return layer % self.num_layers

    def _query_slice(self, queries: str) -> slice:
        rows = {"cls": slice(0, 1), "registers": self.register_slice, "all": slice(None)}
        rows["patch_mean"] = self.patch_slice
        if queries not in rows:
            raise ValueError(f"queries must be one of {', '.join(map(repr, rows))}, got {queries!r}.")
        if (queries == "cls" and not self.has_cls) or (queries == "registers" and not self.num_registers):
            raise ValueError(f'{self.name} has no such tokens: queries={queries!r}. Ask for "all".')
        return rows[queries]

    def _show_attention(
        self, on_attention: Callable, index: int, query: torch.Tensor, key: torch.Tensor, scale: float
    ):
        def weights(queries: str) -> torch.Tensor:
            chosen = query[:, :, self._query_slice(queries)].float()
            if queries != "patch_mean":
                return (chosen @ key.float().mT).mul_(scale).softmax(dim=-1)
            # image by image: of all patches it is a square matrix for every head
            images = ((one @ keys.mT).mul_(scale).softmax(dim=-1) for one, keys in zip(chosen, key.float()))
            return torch.stack([image.mean(dim=-2, keepdim=True) for image in images])

        on_attention(index, weights)

    def _forward(self, pixel_values: torch.Tensor) -> None:
        """Runs all layers. Raises `ValueError` for images of a shape that the model cannot take."""
        if pixel_values.ndim != 4:
            raise ValueError(
                "pixel_values must have shape (batch_size, num_channels, height, width), got "
                f"{tuple(pixel_values.shape)}."
            )
        size = tuple(pixel_values.shape[-2:])
        self.grid(*size)
        if getattr(self.model, "dynamic_img_size", True) is False and size != self.image_size:
            raise ValueError(
                f"{self.name} takes no images but of {self.image_size[0]}x{self.image_size[1]} pixels, got "
                f"{size[0]}x{size[1]}. Create timm's model with dynamic_img_size=True."
            )
        # off a square grid transformers cannot resize: there these models refuse what is not native
        rows, cols = self.grid(*self.image_size)
        kwargs = {"interpolate_pos_encoding": rows == cols} if self._layout.asks_to_resize else {}
        # timm's heads are not needed, transformers' models have none
        forward = getattr(self.model, "forward_features", self.model)
        forward(pixel_values.to(self.device, self.dtype), **kwargs)

    @contextmanager
    def show_projections(
        self, layer: int, facets: Sequence[str], on_projection: Callable[[str, torch.Tensor], object]
    ) -> Iterator[None]:
        """In this context every forward pass shows what `qkv` returns of one layer.

        Args:
            layer: From 0, or from the end with -1 the last.
            facets: Some of `"query"`, `"key"` and `"value"`.
            on_projection: Gets each of them and its projection, `(batch_size, tokens, hidden_size)`.

        Raises:
            ValueError: where there is no such layer or facet.
        """
        for facet in facets:
            if facet not in ("query", "key", "value"):
                raise ValueError(f'facet must be "query", "key" or "value", got {facet!r}.')
        block = self.blocks[self.layer_index(layer)]
        attention = getattr(block, self._layout.attention, None)
        if attention is None:
            raise ValueError(f"{type(block).__name__} of {self.name} has no projection to a {facets[0]} alone.")

        def show(module: nn.Module, args: tuple, kwargs: dict):
            for facet in facets:
                on_projection(facet, projected(module, facet, args[0] if args else kwargs["hidden_states"]))

        with attention.register_forward_pre_hook(show, with_kwargs=True):
            yield


def model_hash(model: torch.nn.Module) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of all weights, by their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# Loading


def load_vit(name: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> VisionEncoder:
    """Loads a ViT. No code of a repository is run.

    Args:
        name: A folder or a Hub repository of ViTReg or of a ViT of transformers. Or timm's: `timm:NAME` or
            `timm:NAME.TAG` with published weights, `timm:NAME@FILE` with the weights of a file, or `timm:FOLDER` in
            timm's layout, `config.json` with an architecture beside the weights.
        device: Where to.
        dtype: Of the weights; by default as they are stored.

    Raises:
        ValueError: where there is no such model, its weights are not complete, it is no ViT, or timm is not installed.
    """
    name = str(name)
    with _named_errors(name):
        if name.startswith("timm:"):
            model, mean, std = _load_timm(name.removeprefix("timm:")).to(dtype=dtype), None, None
        else:
            model, (mean, std) = _load_transformers(name, dtype), _normalization(name)
        encoder = VisionEncoder.wrap(model, name, mean, std)
    encoder.model.to(device)
    return encoder


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' table of weights that are not used: what matters of it is an error here."""
    before = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if had_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Whatever stops loading, as one `ValueError` that says what could not be loaded."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        # some list every weight that is missing
        raise ValueError(f"Cannot load {name}: {textwrap.shorten(str(error), 800)}") from error


def _load_transformers(name: str, dtype: torch.dtype | None) -> nn.Module:
    if Path(name).is_file():
        raise ValueError("it is a file. Give the folder that it is in, or timm:NAME@FILE for weights of timm's NAME.")
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError("there is no such folder.")
    # not AutoConfig, which would first ask for leave to run the code of models that nobody knows
    config, _ = PreTrainedConfig.get_config_dict(name)
    if not config:
        raise ValueError("there is no config.json in it.")
    if "architecture" in config:
        raise ValueError(f"it is timm's. Write timm:{name} for a folder, timm:hf-hub:{name} for a repository.")
    is_dual = config.get("model_type") == "vision-text-dual-encoder"
    model_type = (config["vision_config"] if is_dual else config).get("model_type")
    if model_type not in MODEL_TYPES:
        found = ", ".join([f"model_type {model_type!r}", *(config.get("architectures") or [])])
        raise ValueError(f"{found} is no plain ViT. {SUPPORTED}")
    model, report = AutoModel.from_pretrained(
        name, trust_remote_code=False, dtype=dtype or "auto", output_loading_info=True
    )
    missing = [key for key in report["missing_keys"] if not key.removeprefix("vision_model.").startswith(_NOT_NEEDED)]
    if missing:
        raise ValueError(
            f"{len(missing)} of its weights are missing, {min(missing)} among them. They would be random, and so "
            "would be what is seen."
        )
    return model


def _normalization(name: str) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Mean and standard deviation of the image processor beside a model; `None` where there is none."""
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return None, None
    return (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)


def _load_timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ValueError("timm is not installed: pip install hf-vitreg[conversion]") from None
    architecture, _, file = name.partition("@")
    if (Path(name) / "config.json").is_file():
        architecture, file = f"local-dir:{name}", ""
    elif ":" in name or "/" in architecture:
        # hf-hub:ORG/NAME@REVISION, or what timm itself explains
        architecture, file = name, ""
    elif not timm.is_model(architecture.split(".")[0]):
        nearest = difflib.get_close_matches(architecture, timm.list_models()) or ["vit_small_patch14_dinov2"]
        raise ValueError(f"timm has no {architecture!r}. It has {', '.join(nearest)}.")
    # refuses what is no ViT before its weights are downloaded, and costs nothing
    with torch.device("meta"):
        VisionEncoder.wrap(timm.create_model(architecture))
    if not file:
        return timm.create_model(architecture, pretrained=True, dynamic_img_size=True)
    if not Path(file).is_file():
        raise ValueError(f"there is no file {file}.")
    # Without its heads, of whatever number of classes: timm accepts a file without some of its weights where it has
    # to drop the head itself.
    tensors = timm.models.load_state_dict(file)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("head.", "head_dist."))}
    overlay = {"state_dict": tensors, "num_classes": 0}
    return timm.create_model(
        architecture, pretrained=True, dynamic_img_size=True, num_classes=0, pretrained_cfg_overlay=overlay
    )
