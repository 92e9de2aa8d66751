# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Contracts of the model that no other implementation can be asked about; tests/test_parity.py holds the rest."""

import copy
import math
import re

import pytest
import torch
from reference import (
    BATCH_SIZE,
    COLS,
    NUM_REGISTERS,
    ROPE,
    ROWS,
    TINY,
    VARIANTS,
    WITHOUT_CLS,
    images,
    randomize,
    relative_error,
    tiny_config,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, initialization

from hf_vitreg import (
    ViTRegBackbone,
    ViTRegConfig,
    ViTRegForDepthEstimation,
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)
from hf_vitreg.modeling_vitreg import _interpolate_symbolic


HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS = TINY["hidden_size"], TINY["num_hidden_layers"], TINY["num_attention_heads"]
NUM_TOKENS = 1 + NUM_REGISTERS + ROWS * COLS
LAYOUTS = ["cls", "cls_mean", "last4_cls", "last4_cls_mean"]
DENSE_CLASSES = [ViTRegForSemanticSegmentation, ViTRegForDepthEstimation]
MODEL_CLASSES = [ViTRegModel, ViTRegForImageClassification, ViTRegBackbone, *DENSE_CLASSES]
CONVENTIONS = [
    {"interpolate_offset": 0.0, "interpolate_antialias": True},
    {"interpolate_offset": 0.1, "interpolate_antialias": False},
]
# flex attention has no backward on a CPU
IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]


def make(model_class=ViTRegModel, **overrides):
    """A tiny model with every parameter drawn at random, in eval mode."""
    return randomize(model_class(tiny_config(**overrides)))


@pytest.fixture
def pixel_values():
    return images()


# Tokens


@pytest.mark.parametrize("num_register_tokens", [0, 1, NUM_REGISTERS])
def test_output_names_every_token(pixel_values, num_register_tokens):
    output = make(num_register_tokens=num_register_tokens)(pixel_values)
    assert output.pooler_output.shape == (BATCH_SIZE, HIDDEN_SIZE)
    assert output.register_tokens.shape == (BATCH_SIZE, num_register_tokens, HIDDEN_SIZE)
    assert output.patch_tokens.shape == (BATCH_SIZE, ROWS * COLS, HIDDEN_SIZE)
    named = torch.cat([output.pooler_output.unsqueeze(1), output.register_tokens, output.patch_tokens], dim=1)
    assert torch.equal(named, output.last_hidden_state)


def test_output_is_after_the_final_norm_and_hidden_states_before(pixel_values):
    model = make()
    output = model(pixel_values, output_hidden_states=True)
    assert len(output.hidden_states) == NUM_LAYERS + 1
    assert torch.equal(output.hidden_states[0], model.embeddings(pixel_values))
    assert torch.equal(model.layernorm(output.hidden_states[-1]), output.last_hidden_state)


def test_first_two_outputs_are_those_of_every_transformers_model(pixel_values):
    output = make()(pixel_values)
    assert output[0] is output.last_hidden_state
    assert output[1] is output.pooler_output


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_config_and_argument_ask_for_tuples(pixel_values, model_class):
    model = make(model_class)
    named = model(pixel_values)
    by_argument = model(pixel_values, return_dict=False)
    model.config.return_dict = False
    by_config = model(pixel_values)
    assert isinstance(by_argument, tuple) and isinstance(by_config, tuple)
    for tensors in zip(named.to_tuple(), by_argument, by_config, strict=True):
        first, *others = (part[0] if isinstance(part, tuple) else part for part in tensors)
        assert all(torch.equal(first, other) for other in others)
    assert model(pixel_values, return_dict=True).keys() == named.keys()


def test_registers_follow_cls_and_carry_no_position(pixel_values):
    model = make()
    before = model.embeddings(pixel_values)
    assert torch.equal(before[:, 1 : 1 + NUM_REGISTERS], model.embeddings.register_tokens.expand(BATCH_SIZE, -1, -1))
    with torch.no_grad():
        model.embeddings.position_embeddings.add_(1)
    moved = model.embeddings(pixel_values) - before
    assert moved[:, 1 : 1 + NUM_REGISTERS].abs().max() == 0
    torch.testing.assert_close(moved[:, 0], torch.ones(BATCH_SIZE, HIDDEN_SIZE))
    torch.testing.assert_close(moved[:, 1 + NUM_REGISTERS :], torch.ones(BATCH_SIZE, ROWS * COLS, HIDDEN_SIZE))


# beside each: the tokens before the registers, and how many tokens have a position
PREFIXES = [
    ({"use_distillation_token": True}, ["cls_token", "distillation_token"], 1),
    (
        {"use_distillation_token": True, "position_embedding_type": "prefix_patches"},
        ["cls_token", "distillation_token"],
        7,
    ),
    ({"position_embedding_type": "prefix_patches"}, ["cls_token"], 6),
    ({"position_embedding_type": "patches"}, ["cls_token"], 0),
    (VARIANTS["rope"], ["cls_token"], 0),
    (VARIANTS["attended"], [], 0),
    (VARIANTS["mean"], [], 5),
]


@pytest.mark.parametrize(("values", "names", "num_positions"), PREFIXES)
def test_registers_are_the_last_of_the_prefix(pixel_values, values, names, num_positions):
    model = make(**values)
    embeddings = model.embeddings
    expected = torch.cat([getattr(embeddings, name) for name in [*names, "register_tokens"]], dim=1)
    if num_positions:
        expected[:, :num_positions] += embeddings.position_embeddings[:, :num_positions]
    assert model.config.num_prefix_tokens == expected.shape[1]
    assert torch.equal(embeddings(pixel_values)[:, : expected.shape[1]], expected.expand(BATCH_SIZE, -1, -1))
    output = model(pixel_values)
    registers = output.last_hidden_state[:, len(names) : len(names) + NUM_REGISTERS]
    assert torch.equal(output.register_tokens, registers)
    assert torch.equal(output.patch_tokens, output.last_hidden_state[:, len(names) + NUM_REGISTERS :])


@pytest.mark.parametrize("values", [WITHOUT_CLS, {**WITHOUT_CLS, **ROPE}])
def test_model_may_have_patches_only(values):
    output = make(**values, pooler_type="mean", num_register_tokens=0)(images(28, 35))
    assert output.last_hidden_state.shape == (BATCH_SIZE, 4 * 5, HIDDEN_SIZE)
    assert output.register_tokens.shape == (BATCH_SIZE, 0, HIDDEN_SIZE)


def test_patches_are_in_rows(pixel_values):
    model = make()
    changed = pixel_values.clone()
    # row 1, column 4
    changed[:, :, 7:14, 28:35] += 1
    difference = (model.embeddings(changed) - model.embeddings(pixel_values)).abs().amax(dim=(0, 2))
    assert difference.nonzero().flatten().tolist() == [1 + NUM_REGISTERS + 1 * COLS + 4]


# Position embeddings


def test_native_grid_uses_the_stored_position_embeddings():
    embeddings = make().embeddings
    cls_position, patch_positions = embeddings.interpolated_position_embeddings(ROWS, COLS)
    assert torch.equal(torch.cat([cls_position, patch_positions], dim=1), embeddings.position_embeddings)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("rows", "cols"), [(2, 5), (COLS, ROWS), (5, 11), (1, 21)])
def test_other_grids_interpolate_by_the_convention(convention, rows, cols):
    """Also where the number of patches is the native one but the shape is not."""
    embeddings = make(**convention).embeddings
    grid = embeddings.position_embeddings[0, 1:].reshape(ROWS, COLS, HIDDEN_SIZE).permute(2, 0, 1)[None]
    target = {"size": (rows, cols), "antialias": True}
    if convention["interpolate_offset"]:
        target = {"scale_factor": ((rows + 0.1) / ROWS, (cols + 0.1) / COLS)}
    expected = torch.nn.functional.interpolate(grid, mode="bicubic", **target)[0].flatten(1).T
    cls_position, patch_positions = embeddings.interpolated_position_embeddings(rows, cols)
    assert torch.equal(patch_positions[0], expected)
    assert torch.equal(cls_position, embeddings.position_embeddings[:, :1])


@pytest.mark.parametrize(("offset", "antialias"), [(0.0, True), (0.0, False), (0.1, False)])
@pytest.mark.parametrize("base", [(ROWS, COLS), (37, 16), (1, 5)])
def test_exported_programs_interpolate_as_torch_does(offset, antialias, base):
    """Up and down, by matrices, because a program has no sizes as Python numbers."""
    grid = torch.randn(1, 11, *base)
    for rows, cols in ((1, 1), (2, 29), (64, 11), (36, 17), base):
        target = {"size": (rows, cols), "antialias": antialias}
        if offset and (rows, cols) != base:
            target = {"scale_factor": ((rows + offset) / base[0], (cols + offset) / base[1])}
        expected = torch.nn.functional.interpolate(grid, mode="bicubic", **target)
        actual = _interpolate_symbolic(grid, rows, cols, offset, antialias)
        assert relative_error(actual, expected) < 1e-5, (rows, cols)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_positions_are_interpolated_in_float32(convention):
    """In a bfloat16 model they are rounded where they are stored and where they are returned, and nowhere between."""
    embeddings = make(**convention).to(torch.bfloat16).embeddings
    actual = embeddings.interpolated_position_embeddings(5, 11)[1]
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, embeddings.float().interpolated_position_embeddings(5, 11)[1].to(torch.bfloat16))


# Rotation


def rope_model(model_class=ViTRegModel, **overrides):
    """Its periods are those of no `rope_theta`."""
    model = make(model_class, **{**ROPE, **overrides})
    periods = model.base_model.encoder.rotary_embeddings.periods
    periods.copy_(1 + 9 * torch.rand(periods.shape, generator=torch.Generator().manual_seed(1)))
    return model


def coordinates(rotation: tuple[torch.Tensor, torch.Tensor], periods: torch.Tensor) -> torch.Tensor:
    """Those of rows and columns, `(rows * cols, 2)`, that these angles were made from, if they are small."""
    cosines, sines = (angles[1 + NUM_REGISTERS :] for angles in rotation)
    return torch.atan2(sines, cosines)[:, : 2 * len(periods)].unflatten(1, (2, -1))[..., -1] * periods[-1] / math.tau


@pytest.mark.parametrize(("normalize", "divisors"), [("separate", (5, 3)), ("max", (5, 5)), ("min", (3, 3))])
def test_angles_equal_the_formula_computed_by_hand(normalize, divisors):
    rows, cols, quarter = 5, 3, HIDDEN_SIZE // NUM_HEADS // 4
    rotary_embeddings = rope_model(rope_normalize_coords=normalize).encoder.rotary_embeddings
    expected = torch.zeros(1 + NUM_REGISTERS + rows * cols, 4 * quarter)
    for row in range(rows):
        for col in range(cols):
            for channel in range(4 * quarter):
                axis = channel // quarter % 2
                coordinate = 2 * ((row, col)[axis] + 0.5) / divisors[axis] - 1
                angle = math.tau * coordinate / rotary_embeddings.periods[channel % quarter]
                expected[1 + NUM_REGISTERS + row * cols + col, channel] = angle
    actual = rotary_embeddings(rows, cols)
    torch.testing.assert_close(actual, (expected.cos(), expected.sin()))
    assert torch.equal(actual[0][: 1 + NUM_REGISTERS], torch.ones(1 + NUM_REGISTERS, 4 * quarter))


@pytest.mark.parametrize("normalize", ["max", "min"])
def test_coordinates_differ_by_their_divisor_off_square_only(normalize):
    separate, other = rope_model(), rope_model(rope_normalize_coords=normalize)
    for size, is_square in (((35, 35), True), ((21, 49), False), ((49, 21), False)):
        pixel_values = images(*size)
        tokens = [model(pixel_values).last_hidden_state for model in (separate, other)]
        assert torch.equal(*tokens) == is_square


def test_cls_and_registers_are_not_rotated(pixel_values):
    """What they are to each other depends on no angle, what they are to the patches does."""
    model = rope_model()

    def logits():
        maps = model.get_attention_maps(pixel_values, 0, "all")[:, :, : 1 + NUM_REGISTERS].log()
        return maps - maps[..., :1]

    before = logits()
    model.encoder.rotary_embeddings.periods.mul_(1.7)
    after = logits()
    torch.testing.assert_close(before[..., : 1 + NUM_REGISTERS], after[..., : 1 + NUM_REGISTERS])
    assert (before - after)[..., 1 + NUM_REGISTERS :].abs().mean() > 0.1


def test_new_periods_follow_theta():
    periods = ViTRegModel(tiny_config(**ROPE, rope_theta=81.0)).encoder.rotary_embeddings.periods
    torch.testing.assert_close(periods, torch.tensor([1.0, 3.0, 9.0, 27.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_stored_periods_are_used_to_the_last_bit_in_every_dtype(tmp_path, model_class, dtype):
    model = rope_model(model_class)
    expected = model.base_model.encoder.rotary_embeddings.periods
    assert not torch.equal(expected, expected.bfloat16().float())
    model.save_pretrained(tmp_path / "first")
    model_class.from_pretrained(tmp_path / "first", dtype=dtype).save_pretrained(tmp_path / "second")
    loaded = model_class.from_pretrained(tmp_path / "second", dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    actual = loaded.base_model.encoder.rotary_embeddings.periods
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)


def augmented(seed: int, **option) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates without and with an option of training."""
    rotary_embeddings = rope_model(**option).encoder.rotary_embeddings
    rotary_embeddings.periods.fill_(50)
    plain = coordinates(rotary_embeddings(5, 3), rotary_embeddings.periods)
    torch.manual_seed(seed)
    return plain, coordinates(rotary_embeddings.train()(5, 3), rotary_embeddings.periods)


@pytest.mark.parametrize("seed", range(3))
def test_shift_moves_each_axis_by_less_than_it_says(seed):
    plain, shifted = augmented(seed, pos_embed_shift=0.3)
    shifts = (shifted - plain)[0]
    torch.testing.assert_close(shifted, plain + shifts, rtol=0, atol=1e-4)
    assert shifts.abs().max() < 0.3 and (shifts[0] - shifts[1]).abs() > 1e-3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("option", "is_one"), [("pos_embed_jitter", False), ("pos_embed_rescale", True)])
def test_jitter_scales_each_axis_and_rescale_both(option, is_one, seed):
    plain, scaled = augmented(seed, **{option: 1.7})
    factors = (scaled / plain)[0]
    torch.testing.assert_close(scaled, plain * factors, rtol=0, atol=1e-4)
    assert factors.min() > 1 / 1.7 and factors.max() < 1.7
    assert ((factors[0] - factors[1]).abs() < 1e-4) == is_one


@pytest.mark.parametrize("option", ["pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"])
def test_coordinates_are_augmented_in_training_only(pixel_values, option):
    model, plain = rope_model(**{option: 1.7}), rope_model()
    expected = plain(pixel_values).last_hidden_state
    assert torch.equal(model(pixel_values).last_hidden_state, expected)
    model.train()
    first, second = (model(pixel_values).last_hidden_state for _ in range(2))
    assert relative_error(first, expected) > 1e-3 and relative_error(first, second) > 1e-3
    assert torch.equal(plain.train()(pixel_values).last_hidden_state, expected)


def test_rotation_needs_heads_of_whole_quarters():
    with pytest.raises(ValueError, match="heads of a multiple of 4 channels, got 6"):
        ViTRegModel(tiny_config(**ROPE, num_attention_heads=8))


# Norms and pooling


def test_every_norm_has_the_epsilon_of_the_config():
    values = {"use_qk_norm": True, "use_pre_layernorm": True, "final_norm": "untied", "pooler_type": "map"}
    model = make(**values, classifier_layout="pooled", layer_norm_eps=1e-3)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    # in every layer before attention and MLP, of queries and keys; before all layers, two after, one in the pooler
    assert len(norms) == 4 * NUM_LAYERS + 4
    assert {norm.eps for norm in norms} == {1e-3}


def test_untied_norms_are_of_the_prefix_and_of_the_patches(pixel_values):
    model = make(final_norm="untied")
    output = model(pixel_values, output_hidden_states=True)
    prefix, patches = output.hidden_states[-1].tensor_split([1 + NUM_REGISTERS], dim=1)
    expected = torch.cat([model.prefix_layernorm(prefix), model.layernorm(patches)], dim=1)
    assert torch.equal(output.last_hidden_state, expected)
    backbone = ViTRegBackbone(tiny_config(final_norm="untied", return_prefix_tokens=True)).eval()
    backbone.load_state_dict(model.state_dict())
    maps = backbone(pixel_values)
    assert torch.equal(maps.feature_maps[0].flatten(2).mT, output.patch_tokens)
    assert torch.equal(maps.cls_tokens[0], output.pooler_output)
    assert torch.equal(maps.register_tokens[0], output.register_tokens)


def test_mean_may_be_normed_before_or_after(pixel_values):
    before, after = make(**VARIANTS["mean"]), make(**VARIANTS["mean_normed"])
    output = before(pixel_values)
    torch.testing.assert_close(output.pooler_output, output.patch_tokens.mean(dim=1))
    output = after(pixel_values, output_hidden_states=True)
    assert torch.equal(output.last_hidden_state, output.hidden_states[-1])
    torch.testing.assert_close(output.pooler_output, after.layernorm(output.patch_tokens.mean(dim=1)))


def test_projection_is_of_what_was_pooled_and_no_part_of_the_classifier(pixel_values):
    model, classifier = make(projection_dim=29), make(ViTRegForImageClassification, projection_dim=29)
    output = model(pixel_values)
    torch.testing.assert_close(output.image_embeds, output.pooler_output @ model.projection.weight.T)
    assert make()(pixel_values).image_embeds is None
    assert not [name for name, _ in classifier.named_parameters() if "projection" in name and "patch" not in name]


def test_a_classifier_on_a_model_with_a_projection_loads_without_it(tmp_path):
    make(projection_dim=29).save_pretrained(tmp_path)
    _, report = ViTRegForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"] and set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_backbone_of_every_variant_computes_what_the_model_does(variant):
    model, pixel_values = make(**VARIANTS[variant]), images(28, 35)
    backbone = ViTRegBackbone(tiny_config(**VARIANTS[variant])).eval()
    unread = backbone.load_state_dict(model.state_dict(), strict=False)
    assert unread.missing_keys == []
    output, expected = (
        backbone(pixel_values, output_hidden_states=True),
        model(pixel_values, output_hidden_states=True),
    )
    torch.testing.assert_close(output.hidden_states, expected.hidden_states, rtol=0, atol=0)
    assert torch.equal(output.feature_maps[0].flatten(2).mT, expected.patch_tokens)


def overwrite_last(model, tokens: slice):
    """Hook that overwrites these tokens after the last attention."""

    def hook(module, args, output):
        output = output.clone()
        output[:, tokens] = 1e3
        return output

    return model.base_model.encoder.layer[-1].residual2.register_forward_hook(hook)


@pytest.mark.parametrize("variant", VARIANTS)
def test_registers_are_in_nothing_that_is_pooled(pixel_values, variant):
    model = make(ViTRegForImageClassification, **VARIANTS[variant])
    expected = model(pixel_values).logits, model.vitreg(pixel_values).pooler_output
    overwrite_last(model, model.config.register_slice)
    actual = model(pixel_values).logits, model.vitreg(pixel_values).pooler_output
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_model_without_cls_has_no_maps_of_it(pixel_values):
    model = make(**VARIANTS["attended"])
    with pytest.raises(
        ValueError, match=r'no CLS token \(use_cls_token=False\). Ask for queries="registers" or "all"'
    ):
        model.get_attention_maps(pixel_values, 0)


def test_backbone_without_cls_hands_back_registers_only(pixel_values):
    model = make(ViTRegBackbone, **VARIANTS["mean"], return_prefix_tokens=True)
    tokens = make(ViTRegBackbone, **VARIANTS["mean"], reshape_hidden_states=False)(pixel_values).feature_maps[0]
    output = model(pixel_values)
    assert output.cls_tokens is None
    assert torch.equal(output.register_tokens[0], tokens[:, :NUM_REGISTERS])
    assert torch.equal(output.feature_maps[0].flatten(2).mT, tokens[:, NUM_REGISTERS:])


# Inputs that cannot be


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((24, 49), "height of 24 pixels.*patch size 7.*21 or 28"),
        ((21, 48), "width of 48 pixels.*patch size 7.*42 or 49"),
        ((5, 49), r"height of 5 pixels.*nearest that is: 7\."),
        ((21, 0), r"width of 0 pixels.*nearest that is: 7\."),
    ],
)
def test_size_that_fills_no_whole_patches_is_an_error_that_names_the_nearest(model_class, size, message):
    with pytest.raises(ValueError, match=message):
        make(model_class, num_hidden_layers=4)(images(*size))


@pytest.mark.parametrize("shape", [(2, 1, 21, 49), (3, 21, 49), (2, 21, 49, 3)])
def test_image_of_another_shape_is_an_error_that_names_it(shape):
    with pytest.raises(ValueError, match=rf"\(batch_size, 3, height, width\), got {re.escape(str(shape))}"):
        make()(torch.randn(shape))


# Masks


def test_mask_token_replaces_patches_before_their_position(pixel_values):
    model = make(use_mask_token=True)
    mask = torch.rand(BATCH_SIZE, ROWS * COLS) < 0.4
    plain = model.embeddings(pixel_values)[:, 1 + NUM_REGISTERS :]
    masked = model.embeddings(pixel_values, mask)[:, 1 + NUM_REGISTERS :]
    positions = model.embeddings.position_embeddings[:, 1:].expand_as(masked)
    assert torch.equal(masked[mask], (model.embeddings.mask_token + positions)[mask])
    assert torch.equal(masked[~mask], plain[~mask])


def test_masked_pixels_are_invisible(pixel_values):
    model = make(use_mask_token=True)
    mask = torch.zeros(BATCH_SIZE, ROWS * COLS, dtype=torch.bool)
    mask[:, 4] = True
    changed = pixel_values.clone()
    changed[:, :, :7, 28:35] += 1
    hidden, seen = model(pixel_values, mask).last_hidden_state, model(changed, mask).last_hidden_state
    assert torch.equal(hidden, seen)


def test_mask_token_is_invisible_where_nothing_is_masked(pixel_values):
    model = make(use_mask_token=True)
    expected = model(pixel_values).last_hidden_state
    nothing = torch.zeros(BATCH_SIZE, ROWS * COLS, dtype=torch.bool)
    assert torch.equal(model(pixel_values, nothing).last_hidden_state, expected)
    assert torch.equal(model.train()(pixel_values).last_hidden_state, expected)


def test_mask_token_exists_only_on_request():
    assert "embeddings.mask_token" in make(use_mask_token=True).state_dict()
    assert "embeddings.mask_token" not in make().state_dict()


def test_mask_without_mask_token_is_an_error(pixel_values):
    with pytest.raises(ValueError, match="use_mask_token=True"):
        make()(pixel_values, torch.ones(BATCH_SIZE, ROWS * COLS, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(BATCH_SIZE, ROWS, COLS), (BATCH_SIZE, 1)])
def test_mask_of_another_shape_is_an_error(pixel_values, shape):
    with pytest.raises(ValueError, match=rf"bool_masked_pos must have shape \(2, 21\).*{re.escape(str(shape))}"):
        make(use_mask_token=True)(pixel_values, torch.ones(shape, dtype=torch.bool))


# Layers


@pytest.mark.parametrize("layerscale_value", [1.0, 1e-5, None])
def test_layerscale_is_a_parameter_with_a_value_or_absent(layerscale_value):
    layer = ViTRegModel(tiny_config(layerscale_value=layerscale_value)).encoder.layer[-1]
    for residual in (layer.residual1, layer.residual2):
        if layerscale_value is None:
            assert residual.lambda1 is None
        else:
            assert torch.equal(residual.lambda1, torch.full((HIDDEN_SIZE,), layerscale_value))


def test_layerscale_of_one_computes_what_none_computes(pixel_values):
    scaled, unscaled = ViTRegModel(tiny_config()), ViTRegModel(tiny_config(layerscale_value=None))
    randomize(scaled)
    for layer in scaled.encoder.layer:
        torch.nn.init.ones_(layer.residual1.lambda1)
        torch.nn.init.ones_(layer.residual2.lambda1)
    unexpected = unscaled.load_state_dict(scaled.state_dict(), strict=False).unexpected_keys
    assert all(name.endswith("lambda1") for name in unexpected)
    outputs = [model.eval()(pixel_values).last_hidden_state for model in (scaled, unscaled)]
    assert relative_error(*outputs) < 1e-5


@pytest.mark.parametrize(
    ("schedule", "rates"), [("uniform", [0.4, 0.4, 0.4, 0.4, 0.4]), ("linear", [0.0, 0.1, 0.2, 0.3, 0.4])]
)
def test_drop_path_rates_follow_the_schedule(schedule, rates):
    model = ViTRegModel(tiny_config(drop_path_rate=0.4, drop_path_schedule=schedule))
    for layer, rate in zip(model.encoder.layer, rates, strict=True):
        assert layer.residual1.drop_prob == layer.residual2.drop_prob == pytest.approx(rate)


def test_linear_drop_path_of_a_single_layer_drops_nothing():
    model = ViTRegModel(tiny_config(num_hidden_layers=1, drop_path_rate=0.4, drop_path_schedule="linear"))
    assert model.encoder.layer[0].residual1.drop_prob == model.encoder.layer[0].residual2.drop_prob == 0


def test_another_activation_is_used_with_and_without_gradients():
    mlp = ViTRegModel(tiny_config()).encoder.layer[0].mlp
    mlp.activation_fn = torch.nn.ReLU()
    hidden_states = torch.randn(2, 3, HIDDEN_SIZE)
    with torch.no_grad():
        without = mlp(hidden_states)
    assert torch.equal(mlp(hidden_states), without)


def test_a_hook_on_the_activation_sees_its_input_without_gradients():
    mlp, seen = ViTRegModel(tiny_config()).encoder.layer[0].mlp, []
    hidden_states = torch.randn(2, 3, HIDDEN_SIZE)
    mlp.activation_fn.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        mlp(hidden_states)
        assert torch.equal(seen[0], mlp.fc1(hidden_states))


def test_the_residual_stream_is_float32_under_autocast():
    model = ViTRegModel(tiny_config(layerscale_value=None)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        states = model(
            torch.randn(1, 3, 3 * model.config.patch_size, 5 * model.config.patch_size), output_hidden_states=True
        )
    assert {state.dtype for state in states.hidden_states} == {torch.float32}


PATCHES_ONLY = {**WITHOUT_CLS, **ROPE, "pooler_type": "mean", "num_register_tokens": 0}


@pytest.mark.parametrize("values", [*VARIANTS.values(), PATCHES_ONLY], ids=[*VARIANTS, "patches only"])
def test_the_residual_stream_of_every_variant_is_float32_under_autocast(values):
    model, pixel_values = make(**{**values, "layerscale_value": None}), images(28, 35)
    expected = model(pixel_values, output_hidden_states=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixel_values, output_hidden_states=True)
    assert {state.dtype for state in output.hidden_states} == {torch.float32}
    assert relative_error(output.hidden_states[-1], expected.hidden_states[-1]) < 0.05


@pytest.mark.parametrize("layerscale_value", [1.0, None])
def test_drop_path_drops_branches_of_whole_samples_and_keeps_the_mean(layerscale_value):
    residual_module = make(drop_path_rate=0.25, layerscale_value=layerscale_value).encoder.layer[0].residual1
    residual, branch = torch.randn(2, 4096, 2, HIDDEN_SIZE)
    scale = 1 if layerscale_value is None else residual_module.lambda1.detach()
    torch.testing.assert_close(residual_module(residual, branch), residual + scale * branch)
    added = residual_module.train()(residual, branch).detach() - residual
    dropped = added.abs().amax(dim=(1, 2)) == 0
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(added[~dropped], (scale * branch / 0.75)[~dropped], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "relu"])
def test_mlp_applies_the_chosen_activation(hidden_act):
    mlp = make(hidden_act=hidden_act).encoder.layer[0].mlp
    hidden = mlp.fc1(torch.randn(BATCH_SIZE, NUM_TOKENS, HIDDEN_SIZE))
    expected = {
        "gelu": torch.nn.functional.gelu,
        "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": torch.relu,
    }[hidden_act](hidden)
    inputs = torch.linalg.lstsq(mlp.fc1.weight, (hidden - mlp.fc1.bias).flatten(0, 1).T).solution.T
    with torch.no_grad():
        actual = mlp(inputs.unflatten(0, hidden.shape[:2]))
    torch.testing.assert_close(actual, mlp.fc2(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("use_swiglu_ffn", [False, True])
def test_inference_that_reuses_memory_equals_training_mode_arithmetic(pixel_values, use_swiglu_ffn):
    model = make(use_swiglu_ffn=use_swiglu_ffn)
    with torch.no_grad():
        reused = model(pixel_values).last_hidden_state
    assert torch.equal(reused, model(pixel_values).last_hidden_state)


@pytest.mark.parametrize("name", ["fc1", "gate_proj", "up_proj"])
def test_inference_leaves_what_a_hook_keeps_alone(pixel_values, name):
    mlp = make(use_swiglu_ffn=name != "fc1").encoder.layer[2].mlp
    kept = []
    getattr(mlp, name).register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    with torch.no_grad():
        mlp(torch.randn(BATCH_SIZE, NUM_TOKENS, HIDDEN_SIZE))
    ((tensor, at_first),) = kept
    assert torch.equal(tensor, at_first)


# Attention


def logsumexp_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """What flex attention returns on a GPU: beside the output not the weights but the normalizer of each row."""
    logits = query @ key.transpose(2, 3) * scaling
    return (logits.softmax(-1) @ value).transpose(1, 2), logits.logsumexp(-1)


AttentionInterface.register("logsumexp_attention", logsumexp_attention)


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "logsumexp_attention"])
@torch.no_grad()
def test_every_implementation_returns_the_same_tokens_and_real_attention(pixel_values, model_class, implementation):
    model = make(model_class)
    model.set_attn_implementation("eager")
    expected = model(pixel_values, output_attentions=True)
    model.set_attn_implementation(implementation)
    output = model(pixel_values, output_attentions=True)
    for actual, reference in zip(output.attentions, expected.attentions, strict=True):
        assert actual.shape == (BATCH_SIZE, NUM_HEADS, NUM_TOKENS, NUM_TOKENS)
        torch.testing.assert_close(actual, reference)
        torch.testing.assert_close(actual.sum(-1), torch.ones(actual.shape[:-1]))
    first, reference = (out[0][0] if isinstance(out[0], tuple) else out[0] for out in (output, expected))
    assert relative_error(first, reference) < 1e-5
    assert model(pixel_values).attentions is None


def test_attention_explains_the_output_of_its_layer(pixel_values):
    """The returned weights are those that were used: applied to the values they give what the layer added."""
    model = make()
    output = model(pixel_values, output_attentions=True, output_hidden_states=True)
    layer = model.encoder.layer[3]
    values = layer.attention.v_proj(layer.norm1(output.hidden_states[3])).unflatten(-1, (NUM_HEADS, -1))
    mixed = torch.einsum("bhqk,bkhd->bqhd", output.attentions[3], values).flatten(2)
    states = output.hidden_states[3] + layer.residual1.lambda1 * layer.attention.o_proj(mixed)
    states = states + layer.residual2.lambda1 * layer.mlp(layer.norm2(states))
    torch.testing.assert_close(states, output.hidden_states[4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@torch.no_grad()
def test_config_asks_for_attention_in_every_implementation(tmp_path, pixel_values, implementation):
    made = ViTRegModel(tiny_config(output_attentions=True, attn_implementation=implementation)).eval()
    made.save_pretrained(tmp_path)
    kwargs = {"output_attentions": True, "attn_implementation": implementation}
    loaded = ViTRegModel.from_pretrained(tmp_path, **kwargs)
    changed = ViTRegModel.from_pretrained(tmp_path, attn_implementation=implementation)
    changed.config.output_attentions = True
    for model in (made, loaded, changed):
        assert model.config._attn_implementation == implementation
        assert len(model(pixel_values).attentions) == NUM_LAYERS
        assert model(pixel_values, output_attentions=False).attentions is None


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_dispatched_to(monkeypatch, pixel_values, implementation):
    """Its kernels need a GPU, so a stand-in is called under its name, and returns no weights as it does."""
    model, calls = make(), []
    expected = model(pixel_values, output_attentions=True)

    def stand_in(module, query, key, value, attention_mask, scaling, dropout, **kwargs):
        calls.append((scaling, dropout, module.is_causal, "output_attentions" in kwargs))
        return logsumexp_attention(module, query, key, value, attention_mask, scaling)[0], None

    assert model._supports_flash_attn
    monkeypatch.setitem(AttentionInterface._global_mapping, implementation, stand_in)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", implementation)
    output = model(pixel_values, output_attentions=True)
    assert calls == [(0.25, 0.0, False, False)] * NUM_LAYERS
    assert relative_error(output.last_hidden_state, expected.last_hidden_state) < 1e-5
    torch.testing.assert_close(output.attentions, expected.attentions)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_dropout_works_in_training_only(pixel_values, implementation):
    model = make(attention_probs_dropout_prob=0.5, attn_implementation=implementation)
    assert torch.equal(model(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)
    model.train()
    assert not torch.equal(model(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)


def one_dtype_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """As the kernels that mix none: flash and flex attention."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    return logsumexp_attention(module, query, key, value, attention_mask, scaling)


AttentionInterface.register("one_dtype_attention", one_dtype_attention)


@pytest.mark.parametrize("variant", ["rope", "normed_queries"])
@torch.no_grad()
def test_norms_and_rotation_leave_queries_and_keys_the_dtype_of_the_values(pixel_values, variant):
    model = make(**VARIANTS[variant])
    expected = model(pixel_values).last_hidden_state
    model.set_attn_implementation("one_dtype_attention")
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(model(pixel_values).last_hidden_state, expected) < 0.05
        assert model.get_attention_maps(pixel_values, 0).dtype == torch.bfloat16
    assert relative_error(model.to(torch.bfloat16)(pixel_values).last_hidden_state.float(), expected) < 0.05


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({}, "qkvo"),
        ({"qkv_bias": False}, "o"),
        ({"key_bias": False}, "qvo"),
        ({"proj_bias": False}, "qkv"),
        ({"qkv_bias": False, "proj_bias": False}, ""),
    ],
)
def test_biases_of_the_attention_are_options(values, names):
    attention = make(**values).encoder.layer[0].attention
    assert [name for name in "qkvo" if getattr(attention, f"{name}_proj").bias is not None] == list(names)


QUERIES = {"cls": slice(0, 1), "registers": slice(1, 1 + NUM_REGISTERS), "all": slice(None)}


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("layer", [0, 2, -1, -NUM_LAYERS])
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_attention_maps_are_slices_of_the_attentions(model_class, layer, queries):
    model, pixel_values = make(model_class), images(28, 35)
    expected = model(pixel_values, output_attentions=True).attentions[layer][:, :, QUERIES[queries]]
    maps = model.get_attention_maps(pixel_values, layer, queries)
    assert not maps.requires_grad
    torch.testing.assert_close(maps, expected.detach())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_attention_maps_of_every_variant_are_slices_of_the_attentions(variant):
    model, pixel_values = make(**VARIANTS[variant]), images(28, 35)
    tokens = {**QUERIES, "registers": model.config.register_slice}
    if not model.config.use_cls_token:
        del tokens["cls"]
    for layer, expected in enumerate(model(pixel_values, output_attentions=True).attentions):
        for queries in tokens:
            maps = model.get_attention_maps(pixel_values, layer, queries)
            torch.testing.assert_close(maps, expected[:, :, tokens[queries]])


def test_attention_maps_are_of_cls_unless_asked_otherwise(pixel_values):
    model = make()
    assert torch.equal(model.get_attention_maps(pixel_values, 1), model.get_attention_maps(pixel_values, 1, "cls"))


class Operations(TorchDispatchMode):
    """Notes the shape of every tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        outputs = output if isinstance(output, (tuple, list)) else [output]
        self.shapes += [(func, tuple(tensor.shape)) for tensor in outputs if isinstance(tensor, torch.Tensor)]
        return output


@pytest.mark.parametrize(("queries", "num_queries"), [("cls", 1), ("registers", NUM_REGISTERS)])
def test_attention_maps_compute_no_other_attention(pixel_values, queries, num_queries):
    model = make(attn_implementation="sdpa")
    with Operations() as operations:
        model.get_attention_maps(pixel_values, 3, queries)
    assert all(shape[-2:] != (NUM_TOKENS, NUM_TOKENS) for _, shape in operations.shapes)
    softmaxed = [shape for func, shape in operations.shapes if func == torch.ops.aten._softmax.default]
    assert softmaxed == [(BATCH_SIZE, NUM_HEADS, num_queries, NUM_TOKENS)]
    # three layers before, and of the fourth no MLP: the layers after it do not run
    assert sum(func == torch.ops.aten.gelu_.default for func, _ in operations.shapes) == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layer": NUM_LAYERS}, "layer 5 does not exist: the model has 5, 0 to 4"),
        ({"layer": -NUM_LAYERS - 1}, "layer -6 does not exist"),
        ({"layer": 0, "queries": "patches"}, "one of 'cls', 'registers', 'all', got 'patches'"),
    ],
)
def test_attention_maps_of_what_does_not_exist_are_errors(pixel_values, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make().get_attention_maps(pixel_values, **kwargs)


def test_attention_maps_of_registers_that_a_model_lacks_are_an_error(pixel_values):
    with pytest.raises(ValueError, match=r"no registers \(num_register_tokens=0\)"):
        make(num_register_tokens=0).get_attention_maps(pixel_values, 0, "registers")


# Classification


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_register_tokens", [0, NUM_REGISTERS])
def test_logits_equal_the_layout_computed_by_hand(pixel_values, layout, num_register_tokens):
    model = make(ViTRegForImageClassification, classifier_layout=layout, num_register_tokens=num_register_tokens)
    hidden_states = model.vitreg(pixel_values, output_hidden_states=True).hidden_states
    normed = [model.vitreg.layernorm(states) for states in hidden_states]
    patch_mean = normed[-1][:, 1 + num_register_tokens :].sum(dim=1) / (ROWS * COLS)
    features = {
        "cls": [normed[-1][:, 0]],
        "cls_mean": [normed[-1][:, 0], patch_mean],
        "last4_cls": [normed[layer][:, 0] for layer in (2, 3, 4, 5)],
        "last4_cls_mean": [*(normed[layer][:, 0] for layer in (2, 3, 4, 5)), patch_mean],
    }[layout]
    expected = torch.cat(features, dim=-1) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(model(pixel_values).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_distilled_logits_are_the_mean_of_two_classifiers(pixel_values):
    model = make(ViTRegForImageClassification, **VARIANTS["distilled"])
    tokens = model.vitreg(pixel_values).last_hidden_state
    logits = torch.stack([model.classifier(tokens[:, 0]), model.distillation_classifier(tokens[:, 1])])
    torch.testing.assert_close(model(pixel_values).logits, logits.mean(dim=0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_untied_norms_are_in_every_layout(pixel_values, layout):
    model = make(ViTRegForImageClassification, classifier_layout=layout, final_norm="untied")
    expected = model(pixel_values).logits
    with torch.no_grad():
        model.vitreg.layernorm.bias.add_(1)
    assert torch.equal(model(pixel_values).logits, expected) == (layout in ("cls", "last4_cls"))
    with torch.no_grad():
        model.vitreg.layernorm.bias.sub_(1)
        model.vitreg.prefix_layernorm.bias.add_(1)
    assert not torch.allclose(model(pixel_values).logits, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_registers_are_in_no_mean(pixel_values, layout):
    """What the last layer writes into the registers, after the last attention, reaches no logit."""
    model = make(ViTRegForImageClassification, classifier_layout=layout)
    expected = model(pixel_values).logits

    def overwrite(tokens):
        handle = overwrite_last(model, tokens)
        logits = model(pixel_values).logits
        handle.remove()
        return logits

    assert torch.equal(overwrite(slice(1, 1 + NUM_REGISTERS)), expected)
    assert not torch.equal(overwrite(slice(0, 1)), expected)
    assert torch.equal(overwrite(slice(1 + NUM_REGISTERS, None)), expected) == (layout in ("cls", "last4_cls"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("requested", "returned"),
    [(True, [0, 1, 2, 3, 4, 5]), (1, [1]), (-2, [4]), ([0, -1], [0, 5]), (False, None), (None, None)],
)
def test_requested_hidden_states_come_back_whatever_the_classifier_reads(pixel_values, layout, requested, returned):
    model = make(ViTRegForImageClassification, classifier_layout=layout)
    expected = model.vitreg(pixel_values, output_hidden_states=True).hidden_states
    plain, output = model(pixel_values), model(pixel_values, output_hidden_states=requested)
    assert plain.hidden_states is None
    assert torch.equal(output.logits, plain.logits)
    if returned is None:
        assert output.hidden_states is None
        return
    assert len(output.hidden_states) == NUM_LAYERS + 1
    assert [index for index, states in enumerate(output.hidden_states) if states is not None] == returned
    assert all(torch.equal(output.hidden_states[index], expected[index]) for index in returned)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_asks_for_hidden_states_and_the_argument_overrides_it(pixel_values, layout):
    model = make(ViTRegForImageClassification, classifier_layout=layout, output_hidden_states=True)
    assert len(model(pixel_values).hidden_states) == NUM_LAYERS + 1
    assert model(pixel_values, output_hidden_states=False).hidden_states is None


def test_loss_is_the_cross_entropy(pixel_values):
    model, labels = make(ViTRegForImageClassification), torch.tensor([10, 3])
    output = model(pixel_values, labels=labels)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert model(pixel_values).loss is None


def test_without_labels_the_classifier_returns_its_features(pixel_values):
    model = make(ViTRegForImageClassification, num_labels=0, classifier_layout="cls")
    assert torch.equal(model(pixel_values).logits, model.vitreg(pixel_values).pooler_output)


def test_classifier_masks_patches_too(pixel_values):
    model = make(ViTRegForImageClassification, use_mask_token=True)
    mask = torch.ones(BATCH_SIZE, ROWS * COLS, dtype=torch.bool)
    logits = model(pixel_values, bool_masked_pos=mask).logits
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_model_has_a_float32_loss(pixel_values, layout):
    model = make(ViTRegForImageClassification, classifier_layout=layout)
    expected = model(pixel_values, labels=torch.tensor([10, 3]))
    output = model.to(torch.bfloat16)(pixel_values, labels=torch.tensor([10, 3]), output_attentions=True)
    assert output.logits.dtype == output.attentions[0].dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    output.loss.backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_in_bfloat16(pixel_values, variant):
    model = make(ViTRegForImageClassification, **VARIANTS[variant])
    expected = model(pixel_values).logits
    output = model.to(torch.bfloat16)(pixel_values, labels=torch.tensor([10, 3]), output_hidden_states=True)
    assert {tensor.dtype for tensor in (output.logits, *output.hidden_states)} == {torch.bfloat16}
    assert relative_error(output.logits.float(), expected) < 0.1
    output.loss.backward()


# Backbone


@pytest.mark.parametrize("apply_layernorm", [True, False])
def test_backbone_returns_maps_of_the_patches(apply_layernorm):
    stages = ["stem", "stage2", "stage5"]
    model = make(ViTRegBackbone, out_features=stages, apply_layernorm=apply_layernorm)
    output = model(images(28, 35), output_hidden_states=True)
    assert len(output.feature_maps) == len(stages)
    for feature_map, layer in zip(output.feature_maps, (0, 2, 5)):
        states = output.hidden_states[layer]
        states = model.layernorm(states) if apply_layernorm else states
        assert feature_map.shape == (BATCH_SIZE, HIDDEN_SIZE, 4, 5)
        assert torch.equal(feature_map[:, :, 3, 2], states[:, 1 + NUM_REGISTERS + 3 * 5 + 2])
    assert output.cls_tokens is None and output.register_tokens is None
    assert model(images(28, 35)).hidden_states is None


@pytest.mark.parametrize("num_register_tokens", [0, NUM_REGISTERS])
@pytest.mark.parametrize("by_config", [True, False])
def test_backbone_hands_back_cls_and_registers_on_request(pixel_values, by_config, num_register_tokens):
    stages = {"out_features": ["stage1", "stage5"], "num_register_tokens": num_register_tokens}
    model = make(ViTRegBackbone, return_prefix_tokens=by_config, **stages)
    output = model(pixel_values) if by_config else model(pixel_values, return_prefix_tokens=True)
    tokens = make(ViTRegBackbone, reshape_hidden_states=False, **stages)(pixel_values).feature_maps
    assert len(output.cls_tokens) == len(output.register_tokens) == len(tokens) == 2
    for feature_map, cls_token, registers, all_tokens in zip(
        output.feature_maps, output.cls_tokens, output.register_tokens, tokens
    ):
        patches = feature_map.flatten(2).transpose(1, 2)
        assert registers.shape == (BATCH_SIZE, num_register_tokens, HIDDEN_SIZE)
        assert torch.equal(torch.cat([cls_token.unsqueeze(1), registers, patches], dim=1), all_tokens)
    assert model(pixel_values, return_prefix_tokens=False).cls_tokens is None


def test_backbone_tells_frameworks_what_it_returns():
    model = make(ViTRegBackbone, out_indices=[1, 3, 5])
    assert model.out_features == ["stage1", "stage3", "stage5"]
    assert model.channels == [HIDDEN_SIZE] * 3
    model.out_features = ["stage2"]
    assert len(model(images()).feature_maps) == 1


def test_backbone_selects_hidden_states(pixel_values):
    states = make(ViTRegBackbone)(pixel_values, output_hidden_states=[0, -1]).hidden_states
    assert [index for index, state in enumerate(states) if state is not None] == [0, NUM_LAYERS]


# Training


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_register_tokens", [0, 4])
@pytest.mark.parametrize("use_mask_token", [True, False])
def test_every_parameter_of_the_classifier_gets_a_gradient(pixel_values, layout, num_register_tokens, use_mask_token):
    """Distributed training waits for the gradient of every parameter, and waits forever for one that never comes."""
    model = make(
        ViTRegForImageClassification,
        classifier_layout=layout,
        num_register_tokens=num_register_tokens,
        use_mask_token=use_mask_token,
        drop_path_rate=0.3,
    ).train()
    model(pixel_values, labels=torch.tensor([10, 3])).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("masked", [None, True, False])
@pytest.mark.parametrize("model_class", [ViTRegModel, ViTRegBackbone])
def test_every_parameter_gets_a_gradient_masked_or_not(pixel_values, model_class, masked):
    model = make(model_class, use_mask_token=True).train()
    kwargs = {}
    if masked is not None and model_class is ViTRegModel:
        kwargs["bool_masked_pos"] = torch.full((BATCH_SIZE, ROWS * COLS), masked)
    output = model(pixel_values, **kwargs)
    (output.pooler_output if model_class is ViTRegModel else output.feature_maps[0]).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model_class", [ViTRegModel, ViTRegForImageClassification, ViTRegBackbone])
def test_every_parameter_of_every_variant_gets_a_gradient(pixel_values, model_class, variant):
    model = make(model_class, **VARIANTS[variant], use_mask_token=True).train()
    if model_class is ViTRegForImageClassification:
        model(pixel_values, labels=torch.tensor([10, 3])).loss.backward()
    elif model_class is ViTRegModel:
        output = model(pixel_values)
        (output.pooler_output if output.image_embeds is None else output.image_embeds).square().sum().backward()
    else:
        model(pixel_values).feature_maps[0].square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def gradients(model, pixel_values):
    model.zero_grad()
    torch.manual_seed(0)
    output = model(pixel_values, labels=torch.arange(len(pixel_values)), output_hidden_states=True)
    output.loss.backward()
    return output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kwargs", [{"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("every_n_layers", [1, 2])
@pytest.mark.parametrize(
    "values", [{"classifier_layout": "last4_cls_mean"}, VARIANTS["rope_untied"], VARIANTS["rope"]]
)
def test_gradient_checkpointing_changes_no_gradient(kwargs, every_n_layers, values):
    # of two images stochastic depth might drop both, and compare zeros
    pixel_values = images(batch_size=8)
    model = make(ViTRegForImageClassification, drop_path_rate=0.3, **values).train()
    expected_output, expected = gradients(model, pixel_values)
    model.activation_checkpointing_enable(kwargs, every_n_layers=every_n_layers)
    output, actual = gradients(model, pixel_values)
    assert len(output.hidden_states) == len(expected_output.hidden_states)
    for name, gradient in expected.items():
        # the bias of the keys shifts every logit of a row alike: its gradient is rounding noise around zero
        if not name.endswith("k_proj.bias"):
            assert relative_error(actual[name], gradient) < 1e-5, name


def register_distances(model) -> torch.Tensor:
    """Between any two registers."""
    return torch.pdist(model.embeddings.register_tokens.detach()[0])


def train_on_noise(model, steps: int = 60):
    """Fits random targets: anything that has a gradient moves."""
    pixel_values, targets = torch.randn(8, 3, 21, 21), torch.randn(8, HIDDEN_SIZE)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(steps):
        loss = (model(pixel_values).last_hidden_state[:, 0] - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


# as wide as the activations of a large model: attention that cannot tell registers apart cannot part them
FROM_SCRATCH = {**TINY, "num_hidden_layers": 2, "image_size": 21, "initializer_range": 0.2}


def test_registers_trained_from_scratch_become_different_from_one_another():
    """Registers that start equal, as transformers' do at zero, get equal gradients and stay one register."""
    ours = ViTRegModel(ViTRegConfig(**FROM_SCRATCH, register_init_std=1e-6))
    theirs = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**FROM_SCRATCH))
    at_start = register_distances(ours)
    assert at_start.min() > 0 and at_start.max() < 1e-4
    assert (register_distances(train_on_noise(ours)) > 10 * at_start).all()
    # equal but for the last bit, in which a sum may depend on the place of its terms in memory
    assert register_distances(train_on_noise(theirs)).max() < 1e-6
    assert theirs.embeddings.register_tokens.norm(dim=-1).min() > 1e-1


def test_registers_that_start_apart_stay_apart():
    model = train_on_noise(ViTRegModel(ViTRegConfig(**FROM_SCRATCH, register_init_std=0.02)))
    assert register_distances(model).min() > 0.5 * model.embeddings.register_tokens.norm(dim=-1).mean()


# Initialization


def test_initial_values_are_those_of_dinov2():
    config = tiny_config(use_mask_token=True, hidden_size=480, layerscale_value=1e-5)
    model = ViTRegModel(config)
    embeddings, layer = model.embeddings, model.encoder.layer[-1]
    for weight in (layer.mlp.fc1.weight, layer.attention.q_proj.weight, embeddings.position_embeddings):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    for token in (embeddings.cls_token, embeddings.register_tokens):
        assert token.std().item() == pytest.approx(1e-6, rel=0.2)
    assert len(set(embeddings.register_tokens[0, :, 0].tolist())) == NUM_REGISTERS
    assert embeddings.mask_token.abs().max() == layer.mlp.fc1.bias.abs().max() == 0
    assert embeddings.patch_embeddings.projection.bias.abs().max() == 0
    assert torch.equal(layer.norm1.weight, torch.ones(480))


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize(
    "values", [{"use_swiglu_ffn": True}, {}, *VARIANTS.values()], ids=["swiglu", "gelu", *VARIANTS]
)
def test_no_parameter_is_forgotten_by_the_initialization(model_class, values):
    """Filled with NaN beforehand, a parameter or a buffer that nobody initializes cannot hide."""
    config = tiny_config(use_mask_token=True, **values)
    with torch.device("meta"):
        model = model_class(config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.constant_(tensor, float("nan") if tensor.is_floating_point() else -1)
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    assert [name for name, tensor in model.state_dict().items() if tensor.isnan().any() or (tensor == -1).any()] == []


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("values", [{}, *VARIANTS.values()], ids=["default", *VARIANTS])
def test_missing_weights_are_initialized_as_a_new_model_is(monkeypatch, model_class, values):
    def seeded(fill):
        return lambda *args, **kwargs: (torch.manual_seed(0), fill(*args, **kwargs))

    # loading draws no numbers that it would throw away, so each weight gets a seed of its own to be comparable
    for name in ("normal_", "trunc_normal_"):
        monkeypatch.setattr(initialization, name, seeded(getattr(initialization, name)))
    config = tiny_config(use_mask_token=True, **values)
    made = model_class(copy.deepcopy(config)).state_dict()
    filled = model_class.from_pretrained(None, config=copy.deepcopy(config), state_dict={}).state_dict()
    assert made.keys() == filled.keys()
    assert [name for name in made if not torch.equal(made[name], filled[name])] == []


def linear(*names: str) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def test_names_of_the_weights_never_change():
    """Published checkpoints depend on them."""
    attention = [f"attention.{name}_proj" for name in "qkvo"]
    layer = [*linear("norm1", "norm2", *attention, "mlp.fc1", "mlp.fc2"), "residual1.lambda1", "residual2.lambda1"]
    tokens = ["cls_token", "register_tokens", "mask_token", "position_embeddings"]
    embeddings = [*tokens, *linear("patch_embeddings.projection")]
    base = [f"embeddings.{name}" for name in embeddings]
    base += [f"encoder.layer.0.{name}" for name in layer]
    base += linear("layernorm")
    config = {"num_hidden_layers": 1, "use_mask_token": True}
    assert sorted(make(**config).state_dict()) == sorted(base)
    assert sorted(make(ViTRegBackbone, **config).state_dict()) == sorted(base)
    classifier = [f"vitreg.{name}" for name in base] + linear("classifier")
    assert sorted(make(ViTRegForImageClassification, **config).state_dict()) == sorted(classifier)
    swiglu = [name for name in make(use_swiglu_ffn=True, **config).state_dict() if ".mlp." in name]
    projections = ["gate_proj", "up_proj", "down_proj"]
    assert sorted(swiglu) == sorted(linear(*(f"encoder.layer.0.mlp.{name}" for name in projections)))


NOT_IN_ROPE = ["embeddings.position_embeddings", "encoder.layer.0.attention.k_proj.bias"]
POOLER = [f"pooler.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "norm", "mlp.fc1", "mlp.fc2")]
# beside each: what it has and the default has not, and the other way round
NAMES = {
    "rope": (["encoder.rotary_embeddings.periods"], NOT_IN_ROPE),
    "rope_untied": (["encoder.rotary_embeddings.periods", *linear("prefix_layernorm")], NOT_IN_ROPE),
    "distilled": (["embeddings.distillation_token"], [f"encoder.layer.0.residual{index}.lambda1" for index in (1, 2)]),
    "without_cls_position": ([], []),
    "projected": (
        ["projection.weight", *linear("embeddings.pre_layernorm")],
        ["embeddings.patch_embeddings.projection.bias"],
    ),
    "mean": ([], ["embeddings.cls_token"]),
    "mean_normed": ([], ["embeddings.cls_token"]),
    "attended": (["pooler.latent", *linear(*POOLER)], ["embeddings.cls_token"]),
    "normed_queries": (
        linear("encoder.layer.0.attention.q_norm", "encoder.layer.0.attention.k_norm"),
        [
            *(f"encoder.layer.0.attention.{name}_proj.bias" for name in "qkvo"),
            *(f"encoder.layer.0.mlp.{name}.bias" for name in ("fc1", "fc2")),
            *linear("layernorm"),
        ],
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_of_the_weights_of_every_variant_never_change(variant):
    variant_config = tiny_config(**VARIANTS[variant])
    default = set(make(use_swiglu_ffn=variant_config.use_swiglu_ffn).state_dict())
    names = set(ViTRegModel(variant_config).state_dict())
    # of the first layer, for all are alike
    added, absent = (
        sorted(name for name in difference if not re.search(r"layer\.[1-9]", name))
        for difference in (names - default, default - names)
    )
    assert (added, absent) == tuple(map(sorted, NAMES[variant]))


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_a_copy_is_equal_and_independent(pixel_values, model_class):
    model = make(model_class, output_attentions=True)
    twin = copy.deepcopy(model)
    outputs = [each(pixel_values) for each in (model, twin)]
    torch.testing.assert_close(outputs[0].attentions, outputs[1].attentions, rtol=0, atol=0)
    with torch.no_grad():
        twin.get_input_embeddings().projection.weight.add_(1)
    assert torch.equal(model(pixel_values).attentions[0], outputs[0].attentions[0])
    assert not torch.equal(twin(pixel_values).attentions[0], outputs[0].attentions[0])
