# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The same weights give the same tokens as code that nobody here wrote: timm's, transformers', the original DINOv3.

timm reads the original DINOv2 checkpoints, so it is fed by the original names and its own loader. Every parameter is
drawn at random and large: an ignored bias or a swapped pair would show.
"""

import functools
from pathlib import Path

import pytest
import timm
import torch
from reference import (
    ROPE,
    WITHOUT_CLS,
    dinov2_state_dict,
    from_original_dinov3,
    images,
    randomize,
    relative_error,
    timm_state_dict,
    transformers_deit_state_dict,
    transformers_dinov3_state_dict,
    transformers_state_dict,
)
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from hf_vitreg import ViTRegBackbone, ViTRegConfig, ViTRegForImageClassification, ViTRegModel


TOLERANCE = 1e-5
FIXTURES = Path(__file__).parent / "fixtures"
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


# timm's other transformers


LAYER_NORM_1E_5 = functools.partial(torch.nn.LayerNorm, eps=1e-5)
MEAN = {**WITHOUT_CLS, "pooler_type": "mean"}
TIMM_MODELS = {
    "mean, normed after": ({**MEAN, "final_norm": "pooled"}, {"global_pool": "avg"}),
    "mean, normed before": (MEAN, {"global_pool": "avg", "fc_norm": False}),
    "mean beside CLS": (
        {"pooler_type": "mean", "final_norm": "pooled", "position_embedding_type": "patches"},
        {"global_pool": "avg"},
    ),
    "mean, no prefix": ({**MEAN, "num_register_tokens": 0}, {"global_pool": "avg", "fc_norm": False}),
    "registers with positions": ({"position_embedding_type": "prefix_patches"}, {}),
    "registers with positions, no CLS": ({**MEAN, "position_embedding_type": "prefix_patches"}, {"fc_norm": False}),
    "registers without positions": ({"position_embedding_type": "patches"}, {}),
    "attended": ({**WITHOUT_CLS, "pooler_type": "map", "hidden_act": "gelu_pytorch_tanh"}, {"act_layer": "gelu_tanh"}),
    "pre-norm": (
        {
            "use_pre_layernorm": True,
            "patch_bias": False,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "num_register_tokens": 0,
        },
        {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": LAYER_NORM_1E_5},
    ),
    "queries and keys normed": ({"use_qk_norm": True, "position_embedding_type": "patches"}, {"qk_norm": True}),
    "no bias of queries, keys and values": ({"qkv_bias": False, "num_register_tokens": 0}, {"qkv_bias": False}),
    "no bias of projections": (
        {"proj_bias": False, "mlp_bias": False, "num_register_tokens": 0},
        {"proj_bias": False},
    ),
    "not normed": ({"final_norm": "none", "num_register_tokens": 0}, {"final_norm": False}),
    "tanh": (
        {"hidden_act": "gelu_pytorch_tanh", "layerscale_value": None, "num_register_tokens": 0},
        {"act_layer": "gelu_tanh", "init_values": None},
    ),
}


def timm_model(model: ViTRegForImageClassification, **kwargs) -> VisionTransformer:
    """timm's model of the same size under the same weights, loaded without a missing key."""
    config = model.config
    values = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": config.num_labels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "init_values": config.layerscale_value,
        "class_token": config.use_cls_token,
        "reg_tokens": config.num_register_tokens,
        "no_embed_class": config.position_embedding_type == "patches",
        "global_pool": {"cls": "token", "mean": "avg", "map": "map"}[config.pooler_type],
        "dynamic_img_size": True,
    }
    theirs = VisionTransformer(**{**values, **kwargs}).eval()
    theirs.load_state_dict(timm_state_dict(model.state_dict(), config.final_norm), strict=True)
    return theirs


@pytest.mark.parametrize("name", TIMM_MODELS)
@torch.no_grad()
def test_tokens_pooled_and_logits_equal_timm_at_every_size(name):
    values, kwargs = TIMM_MODELS[name]
    values = {"num_register_tokens": 5, "num_labels": 11, "mlp_ratio": 2.75, "num_hidden_layers": 2, **values}
    model = vitreg(
        "gelu",
        ViTRegForImageClassification,
        **{"image_size": (42, 70), "use_mask_token": False, "classifier_layout": "pooled", **values},
    )
    theirs = timm_model(model, **kwargs)
    for size in ((42, 70), (28, 42), (70, 98), (98, 28)):
        pixel_values = images(*size)
        output, expected = model.vitreg(pixel_values), theirs.forward_features(pixel_values)
        assert relative_error(output.last_hidden_state, expected) < TOLERANCE
        assert relative_error(output.pooler_output, theirs.forward_head(expected, pre_logits=True)) < TOLERANCE
        assert relative_error(model(pixel_values).logits, theirs(pixel_values)) < TOLERANCE


# DINOv3


DINOV3_MLPS = {
    "gelu": ({}, {}),
    "gated": ({"use_swiglu_ffn": True}, {"use_gated_mlp": True, "hidden_act": "silu"}),
}


def transformers_dinov3(model: ViTRegModel, **values) -> DINOv3ViTModel:
    """transformers' DINOv3 of the same size under the same weights; the periods of both follow `rope_theta`."""
    config = model.config
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_register_tokens"]
    names += ["patch_size", "image_size", "layer_norm_eps", "rope_theta", "key_bias", "pos_embed_rescale"]
    theirs = DINOv3ViTModel(DINOv3ViTConfig(**{name: getattr(config, name) for name in names}, **values)).eval()
    theirs.load_state_dict(transformers_dinov3_state_dict(model.state_dict()), strict=True)
    return theirs


@pytest.mark.parametrize("num_register_tokens", [0, 5])
@pytest.mark.parametrize("mlp", DINOV3_MLPS)
@torch.no_grad()
def test_dinov3_equals_transformers_at_every_size(mlp, num_register_tokens):
    ours, theirs = DINOV3_MLPS[mlp]
    model = vitreg("gelu", **ROPE, **ours, num_register_tokens=num_register_tokens, rope_theta=70.0)
    theirs = transformers_dinov3(model, **theirs)
    for size in SIZES:
        pixel_values, mask = images(*size), torch.rand(2, size[0] * size[1] // PATCH_SIZE**2) < 0.4
        for bool_masked_pos in (None, mask):
            kwargs = {"bool_masked_pos": bool_masked_pos}
            expected = tokens(theirs, pixel_values, **kwargs)
            assert relative_error(tokens(model, pixel_values, **kwargs), expected) < TOLERANCE


def test_dinov3_in_training_has_the_gradients_of_transformers():
    """Both scale the coordinates in training, by a number that is drawn alike."""
    model, pixel_values = vitreg("gelu", **ROPE, num_register_tokens=5, pos_embed_rescale=2.0), images(*NON_SQUARE)
    theirs, mask = transformers_dinov3(model), torch.rand(2, 21) < 0.4
    outputs = []
    for each in (model, theirs):
        torch.manual_seed(3)
        outputs.append(each.train()(pixel_values, bool_masked_pos=mask).last_hidden_state)
        outputs[-1].pow(2).sum().backward()
    assert relative_error(*outputs) < TOLERANCE
    assert relative_error(outputs[0], tokens(model.eval(), pixel_values, bool_masked_pos=mask)) > 1e-2
    theirs = dict(theirs.named_parameters())
    gradients = transformers_dinov3_state_dict({name: tensor.grad for name, tensor in model.named_parameters()})
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        assert relative_error(gradient, theirs[name].grad) < TOLERANCE, name


def original_dinov3(name: str, **overrides) -> tuple[ViTRegModel, dict[str, torch.Tensor]]:
    """The model of a fixture, and the fixture."""
    fixture = load_file(FIXTURES / f"{name}.safetensors")
    state_dict = {key.removeprefix("state/"): tensor for key, tensor in fixture.items() if key.startswith("state/")}
    gated = "blocks.0.mlp.w1.weight" in state_dict
    values = {
        "hidden_size": state_dict["norm.weight"].numel(),
        "num_attention_heads": state_dict["norm.weight"].numel() // 64,
        "intermediate_size": state_dict["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": 2,
        "patch_size": 4,
        "image_size": 20,
        "num_register_tokens": 3,
        "use_mask_token": True,
        "use_swiglu_ffn": gated,
        "qkv_bias": not gated,
        "final_norm": "untied" if "cls_norm.weight" in state_dict else "tokens",
    }
    model = ViTRegModel(ViTRegConfig(**{**ROPE, **values, **overrides})).eval()
    state_dict = from_original_dinov3(state_dict)
    if model.prefix_layernorm is None:
        state_dict = {key: tensor for key, tensor in state_dict.items() if not key.startswith("prefix_layernorm.")}
    model.load_state_dict(state_dict, strict=True)
    return model, fixture


@pytest.mark.parametrize(
    ("name", "overrides", "output"),
    [
        ("dinov3", {}, "tokens"),
        ("dinov3_swiglu", {}, "tokens"),
        ("dinov3_swiglu", {"final_norm": "tokens"}, "tokens_without_cls_norm"),
    ],
)
def test_dinov3_equals_the_original_code(name, overrides, output):
    model, fixture = original_dinov3(name, **overrides)
    sizes = [key.removeprefix("input/") for key in fixture if key.startswith("input/")]
    assert len(sizes) == 5
    for size in sizes:
        expected = fixture[f"output/{output}/{size}"]
        assert relative_error(tokens(model, fixture[f"input/{size}"]), expected) < TOLERANCE, size


def test_dinov3_needs_the_periods_that_are_stored():
    """Otherwise the test above would prove nothing about them: no formula gives back what bfloat16 rounded."""
    model, fixture = original_dinov3("dinov3")
    rotary_embeddings = model.encoder.rotary_embeddings
    rotary_embeddings.periods.copy_(rotary_embeddings.initial_periods())
    expected = fixture["output/tokens/16x28"]
    assert relative_error(tokens(model, fixture["input/16x28"]), expected) > 10 * TOLERANCE


# DeiT


@torch.no_grad()
def test_distilled_deit_equals_transformers_at_every_size():
    model = vitreg(
        "gelu",
        ViTRegForImageClassification,
        use_mask_token=False,
        use_distillation_token=True,
        num_register_tokens=0,
        position_embedding_type="prefix_patches",
        layerscale_value=None,
        interpolate_antialias=False,
        classifier_layout="cls_distillation",
        num_labels=11,
    )
    names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size"]
    names += ["num_labels", "layer_norm_eps"]
    config = DeiTConfig(**{name: getattr(model.config, name) for name in names}, image_size=70)
    theirs = DeiTForImageClassificationWithTeacher(config).eval()
    theirs.load_state_dict(transformers_deit_state_dict(model.state_dict()), strict=True)
    for size in SIZES:
        pixel_values, kwargs = images(*size), {"interpolate_pos_encoding": True}
        assert (
            relative_error(tokens(model.vitreg, pixel_values), tokens(theirs.deit, pixel_values, **kwargs)) < TOLERANCE
        )
        assert relative_error(model(pixel_values).logits, theirs(pixel_values, **kwargs).logits) < TOLERANCE


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
