# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The same weights give the same tokens as implementations that nobody here wrote: timm's and transformers' DINOv2.

timm reads the original DINOv2 checkpoints, so it is fed by the original names and its own loader. Every parameter is
drawn at random and large: an ignored bias or a swapped pair would show.
"""

import pytest
import timm
import torch
from reference import dinov2_state_dict, images, randomize, relative_error, transformers_state_dict
from timm.models.vision_transformer import checkpoint_filter_fn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)

from hf_vitreg import ViTRegBackbone, ViTRegConfig, ViTRegForImageClassification, ViTRegModel


TOLERANCE = 1e-5
PATCH_SIZE = 14
NATIVE, SMALLER, LARGER, NON_SQUARE, MIXED = (70, 70), (42, 42), (98, 98), (42, 98), (98, 28)
SIZES = [NATIVE, SMALLER, LARGER, NON_SQUARE, MIXED]
ARCHITECTURES = {
    "gelu": {"hidden_size": 96, "num_attention_heads": 3},
    # two thirds of 5.25 * 96 are 336, which timm is told as the width of the packed pair, 7 * 96
    "swiglu": {"hidden_size": 96, "num_attention_heads": 3, "use_swiglu_ffn": True, "mlp_ratio": 5.25},
    "small": {"hidden_size": 384, "num_attention_heads": 6},
}
WITHOUT_REGISTERS = {"num_register_tokens": 0, "interpolate_antialias": False, "interpolate_offset": 0.1}


def vitreg(architecture: str, model_class=ViTRegModel, **overrides) -> ViTRegModel:
    values = {"num_hidden_layers": 3, "image_size": NATIVE, "use_mask_token": True, **ARCHITECTURES[architecture]}
    return randomize(model_class(ViTRegConfig(**{**values, **overrides})))


def timm_tokens(model: ViTRegModel, pixel_values: torch.Tensor, state_dict=None, **kwargs) -> torch.Tensor:
    """All tokens of timm's DINOv2 of the same size under the same weights, loaded without a missing key."""
    config = model.config
    registers = "_reg4" if config.num_register_tokens else ""
    name = f"vit_{'giant' if config.use_swiglu_ffn else 'small'}_patch14{registers}_dinov2"
    sizes = {
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size * (2 if config.use_swiglu_ffn else 1) / config.hidden_size,
    }
    if registers:
        sizes["reg_tokens"] = config.num_register_tokens
    theirs = timm.create_model(name, **{"img_size": config.image_size, **sizes, **kwargs}).eval()
    state_dict = checkpoint_filter_fn(state_dict or dinov2_state_dict(model.state_dict()), theirs)
    theirs.load_state_dict(state_dict, strict=True)
    with torch.no_grad():
        return theirs.forward_features(pixel_values)


def dinov2_positions(position_embeddings: torch.Tensor, rows: int, cols: int, base: int) -> torch.Tensor:
    """How DINOv2 without registers resizes its position embeddings: by scale factors, 0.1 patches too large."""
    grid = position_embeddings[:, 1:].reshape(1, base, base, -1).permute(0, 3, 1, 2)
    factors = ((rows + 0.1) / base, (cols + 0.1) / base)
    grid = torch.nn.functional.interpolate(grid, scale_factor=factors, mode="bicubic", antialias=False)
    return torch.cat([position_embeddings[:, :1], grid.permute(0, 2, 3, 1).reshape(1, rows * cols, -1)], dim=1)


def transformers_model(model_class, config_class, model: ViTRegModel, **values):
    """transformers' model of the same size under the same weights."""
    config = model.config
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "use_swiglu_ffn", "num_labels"]
    values = {**{name: getattr(config, name) for name in names}, "image_size": config.image_size[0], **values}
    if config.num_register_tokens:
        values["num_register_tokens"] = config.num_register_tokens
    theirs = model_class(config_class(**values)).eval()
    state_dict = transformers_state_dict(model.state_dict())
    state_dict = {name.replace("vitreg.", f"{theirs.base_model_prefix}."): t for name, t in state_dict.items()}
    theirs.load_state_dict(state_dict, strict=True)
    return theirs


@torch.no_grad()
def tokens(model: ViTRegModel, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(pixel_values, **kwargs).last_hidden_state


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_registers_equals_timm_at_every_size(architecture, size):
    model, pixel_values = vitreg(architecture, num_register_tokens=5), images(*size)
    expected = timm_tokens(model, pixel_values, dynamic_img_size=True)
    assert relative_error(tokens(model, pixel_values), expected) < TOLERANCE


def test_with_registers_equals_timm_from_a_non_square_grid():
    model = vitreg("gelu", image_size=(42, 70))
    for size in ((42, 70), (70, 42), (98, 28)):
        pixel_values = images(*size)
        expected = timm_tokens(model, pixel_values, dynamic_img_size=True)
        assert relative_error(tokens(model, pixel_values), expected) < TOLERANCE


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_registers_equals_the_dinov2_convention_at_every_size(architecture, size):
    """timm has no scale factor with an offset, so its position embeddings are resized beforehand."""
    model, pixel_values = vitreg(architecture, **WITHOUT_REGISTERS), images(*size)
    state_dict = dinov2_state_dict(model.state_dict())
    if size != NATIVE:
        rows, cols = (pixels // PATCH_SIZE for pixels in size)
        state_dict["pos_embed"] = dinov2_positions(state_dict["pos_embed"], rows, cols, base=5)
    expected = timm_tokens(model, pixel_values, state_dict, img_size=size)
    assert relative_error(tokens(model, pixel_values), expected) < TOLERANCE


def test_the_conventions_differ_from_each_other_away_from_the_native_size():
    """Otherwise the two tests above would prove nothing about the offset."""
    model, pixel_values = vitreg("gelu", **WITHOUT_REGISTERS), images(*NON_SQUARE)
    assert relative_error(tokens(model, pixel_values), timm_tokens(model, pixel_values, dynamic_img_size=True)) > 1e-2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("architecture", ["gelu", "swiglu"])
def test_with_registers_equals_transformers_at_every_size(architecture, size, masked):
    values = {"use_swiglu_ffn": True, "mlp_ratio": 4} if architecture == "swiglu" else {}
    model, pixel_values = vitreg(architecture, num_register_tokens=3, **values), images(*size)
    theirs = transformers_model(Dinov2WithRegistersModel, Dinov2WithRegistersConfig, model)
    mask = torch.rand(2, size[0] * size[1] // PATCH_SIZE**2) < 0.4 if masked else None
    expected = tokens(theirs, pixel_values, bool_masked_pos=mask)
    assert relative_error(tokens(model, pixel_values, bool_masked_pos=mask), expected) < TOLERANCE


def test_without_registers_equals_transformers_at_the_native_size():
    model, pixel_values = vitreg("gelu", **WITHOUT_REGISTERS), images(*NATIVE)
    theirs = transformers_model(Dinov2Model, Dinov2Config, model)
    assert relative_error(tokens(model, pixel_values), tokens(theirs, pixel_values)) < TOLERANCE


def test_hidden_states_and_attentions_equal_transformers():
    model, pixel_values = vitreg("gelu", num_register_tokens=3), images(*NON_SQUARE)
    theirs = transformers_model(
        Dinov2WithRegistersModel, Dinov2WithRegistersConfig, model, attn_implementation="eager"
    )
    with torch.no_grad():
        ours, theirs = (m(pixel_values, output_hidden_states=True, output_attentions=True) for m in (model, theirs))
    for name in ("hidden_states", "attentions"):
        assert len(ours[name]) == len(theirs[name])
        for actual, expected in zip(ours[name], theirs[name]):
            assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("model_class", "config_class", "values"),
    [
        (Dinov2WithRegistersForImageClassification, Dinov2WithRegistersConfig, {"num_register_tokens": 3}),
        (Dinov2ForImageClassification, Dinov2Config, WITHOUT_REGISTERS),
    ],
)
def test_cls_mean_classifier_equals_transformers(model_class, config_class, values):
    model = vitreg("gelu", ViTRegForImageClassification, classifier_layout="cls_mean", num_labels=11, **values)
    theirs, pixel_values = transformers_model(model_class, config_class, model), images(*NATIVE)
    with torch.no_grad():
        assert relative_error(model(pixel_values).logits, theirs(pixel_values).logits) < TOLERANCE


def test_backbone_equals_transformers():
    stages = {"out_features": ["stage1", "stage3"]}
    model = vitreg("gelu", ViTRegBackbone, num_register_tokens=3, **stages)
    theirs = transformers_model(Dinov2WithRegistersBackbone, Dinov2WithRegistersConfig, model, **stages)
    pixel_values = images(*NON_SQUARE)
    with torch.no_grad():
        ours, theirs = model(pixel_values).feature_maps, theirs(pixel_values).feature_maps
    for actual, expected in zip(ours, theirs, strict=True):
        assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.parametrize("architecture", ["gelu", "swiglu"])
def test_gradients_equal_transformers(architecture):
    values = {"mlp_ratio": 4} if architecture == "swiglu" else {}
    model, pixel_values = vitreg(architecture, num_register_tokens=3, **values), images(*NON_SQUARE)
    theirs = transformers_model(Dinov2WithRegistersModel, Dinov2WithRegistersConfig, model)
    mask = torch.rand(2, 21) < 0.4
    for each in (model, theirs):
        each(pixel_values, bool_masked_pos=mask).last_hidden_state.pow(2).sum().backward()
    theirs = dict(theirs.named_parameters())
    gradients = transformers_state_dict({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        # the bias of the keys shifts every logit of a row alike: its gradient is rounding noise around zero
        if not name.endswith("k_proj.bias"):
            assert relative_error(gradient, theirs[name].grad) < TOLERANCE, name


@pytest.mark.slow
@pytest.mark.parametrize("size", [(518, 518), (224, 224), (98, 196)])
@pytest.mark.parametrize("values", [{"num_register_tokens": 4}, WITHOUT_REGISTERS])
def test_dinov2_small_in_full_equals_timm(values, size):
    """All twelve layers at the sizes of the published model, 518 pixels native."""
    model = vitreg("small", num_hidden_layers=12, image_size=(518, 518), **values)
    pixel_values, state_dict = images(*size), dinov2_state_dict(model.state_dict())
    if not model.config.num_register_tokens and size != (518, 518):
        rows, cols = (pixels // PATCH_SIZE for pixels in size)
        state_dict["pos_embed"] = dinov2_positions(state_dict["pos_embed"], rows, cols, base=37)
    size_kwargs = {"dynamic_img_size": True} if model.config.num_register_tokens else {"img_size": size}
    expected = timm_tokens(model, pixel_values, state_dict, **size_kwargs)
    assert relative_error(tokens(model, pixel_values), expected) < TOLERANCE
