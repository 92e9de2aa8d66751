# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What `features` shows of a model equals what transformers, timm, or a hook written by hand show of it."""

import functools
import json
import sys
import weakref

import pytest
import timm
import torch
import torchvision
from reference import VARIANTS, images, randomize, relative_error, tiny_config
from sample_images import colour_image
from timm.layers import SwiGLUPacked
from timm.models import save_for_hf
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock, VisionTransformer
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
    dynamic_module_utils,
)

from hf_vitreg import ViTRegForImageClassification, ViTRegModel
from hf_vitreg.features import VisionEncoder, load_vit


TOLERANCE = 1e-5
PATCH_SIZE, NUM_LAYERS, NUM_HEADS, HIDDEN_SIZE = 7, 3, 2, 40
NATIVE, LARGER = (35, 35), (42, 63)
SIZES = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "intermediate_size": 56,
    "patch_size": PATCH_SIZE,
    "image_size": NATIVE[0],
}
TIMM_SIZES = {
    "embed_dim": HIDDEN_SIZE,
    "depth": NUM_LAYERS,
    "num_heads": NUM_HEADS,
    "patch_size": PATCH_SIZE,
    "img_size": NATIVE,
    "num_classes": 0,
    "dynamic_img_size": True,
}
DINOV2 = {name: value for name, value in SIZES.items() if name != "intermediate_size"}


def ours(**overrides):
    return ViTRegModel(tiny_config(**{**SIZES, "num_register_tokens": 3, **overrides}))


def transformers_model(model_class, config_class, sizes=SIZES, **values):
    return lambda: model_class(config_class(**sizes, **values))


def timm_model(model_class=VisionTransformer, **values):
    return lambda: model_class(**{**TIMM_SIZES, **values})


# beside each: whether it has CLS, and the number of registers and of tokens before the patches
FAMILIES = {
    "vitreg": (ours, True, 3, 4),
    **{
        f"vitreg {name}": (functools.partial(ours, num_hidden_layers=4, **VARIANTS[name]), *expected)
        for name, expected in {
            "rope_untied": (True, 3, 4),
            "distilled": (True, 3, 5),
            "projected": (True, 3, 4),
            "mean_normed": (False, 3, 3),
            "normed_queries": (True, 3, 4),
        }.items()
    },
    "vit": (transformers_model(ViTModel, ViTConfig), True, 0, 1),
    "vit_msn": (transformers_model(ViTMSNModel, ViTMSNConfig), True, 0, 1),
    "ijepa": (transformers_model(IJepaModel, IJepaConfig), False, 0, 0),
    "deit": (transformers_model(DeiTModel, DeiTConfig), True, 0, 2),
    "dinov2": (transformers_model(Dinov2Model, Dinov2Config, DINOV2), True, 0, 1),
    "dinov2_with_registers": (
        transformers_model(Dinov2WithRegistersModel, Dinov2WithRegistersConfig, DINOV2, num_register_tokens=3),
        True,
        3,
        4,
    ),
    "dinov3_vit": (transformers_model(DINOv3ViTModel, DINOv3ViTConfig, num_register_tokens=3), True, 3, 4),
    "clip_vision_model": (transformers_model(CLIPVisionModel, CLIPVisionConfig), True, 0, 1),
    "siglip_vision_model": (transformers_model(SiglipVisionModel, SiglipVisionConfig), False, 0, 0),
    "timm": (timm_model(), True, 0, 1),
    "timm registers": (timm_model(reg_tokens=3, no_embed_class=True, init_values=0.1), True, 3, 4),
    "timm registers with positions": (timm_model(reg_tokens=3), True, 3, 4),
    "timm distilled": (timm_model(VisionTransformerDistilled), True, 0, 2),
    "timm mean": (timm_model(class_token=False, global_pool="avg", reg_tokens=3), False, 3, 3),
    "timm pre-norm": (timm_model(pre_norm=True, qk_norm=True), True, 0, 1),
    "timm parallel": (timm_model(block_fn=ParallelScalingBlock, qk_norm=True, reg_tokens=3), True, 3, 4),
    "timm eva": (timm_model(Eva, use_rot_pos_emb=True, num_reg_tokens=3, rope_type="dinov3"), True, 3, 4),
    "timm eva unfused": (timm_model(Eva, qkv_fused=False, use_rot_pos_emb=True, global_pool="token"), True, 0, 1),
}
TRANSFORMERS = [name for name in FAMILIES if not name.startswith("timm")]
TIMM = [name for name in FAMILIES if name.startswith("timm")]
WITH_REGISTERS = [name for name, (_, _, num_registers, _) in FAMILIES.items() if num_registers]
ATTENTION_IN_ITS_BLOCK = "timm parallel"
REGISTERS = ["register_tokens", "reg_token"]


def make(family: str) -> VisionEncoder:
    return VisionEncoder.wrap(randomize(FAMILIES[family][0]()))


def resized(encoder: VisionEncoder) -> dict[str, bool]:
    """What transformers' models must be told at other sizes."""
    asks = {"vit", "vit_msn", "ijepa", "deit", "clip_vision_model", "siglip_vision_model"}
    return {"interpolate_pos_encoding": True} if encoder.source.removeprefix("transformers ") in asks else {}


def blocks(encoder: VisionEncoder) -> list[torch.nn.Module]:
    """Found by another way than the encoder's own: the longest list of modules."""
    lists = [m for m in encoder.model.modules() if isinstance(m, (torch.nn.ModuleList, torch.nn.Sequential))]
    return list(max(lists, key=len))


def attention_module(block: torch.nn.Module) -> torch.nn.Module:
    [module] = [module for module in block.children() if "Attention" in type(module).__name__]
    return module


@torch.no_grad()
def expected_tokens(encoder: VisionEncoder, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The output of every layer before the final norm, and of the model, by its own library."""
    if encoder.source.startswith("timm"):
        layers = encoder.model.forward_intermediates(
            pixel_values, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
        return [torch.cat([prefix, patches], dim=1) for patches, prefix in layers], encoder.model.forward_features(
            pixel_values
        )
    output = encoder.model(pixel_values, output_hidden_states=True, **resized(encoder))
    return list(output.hidden_states[1:]), output.last_hidden_state


# Tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_model(family):
    _, has_cls, num_registers, num_prefix_tokens = FAMILIES[family]
    encoder = make(family)
    assert encoder.num_layers == len(blocks(encoder)) and not encoder.model.training
    assert (encoder.num_heads, encoder.hidden_size, encoder.patch_size) == (NUM_HEADS, HIDDEN_SIZE, PATCH_SIZE)
    assert encoder.image_size == NATIVE and encoder.grid(*LARGER) == (6, 9)
    actual = (encoder.has_cls, encoder.num_registers, encoder.num_prefix_tokens)
    assert actual == (has_cls, num_registers, num_prefix_tokens)
    library = family.split()[0]
    assert encoder.source.split()[0] == (library if library in ("vitreg", "timm") else "transformers")


@pytest.mark.parametrize("size", [NATIVE, LARGER, (63, 28)])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_equal_those_of_the_library_and_come_before_the_final_norm(family, size):
    encoder, pixel_values, seen = make(family), images(*size), []
    layers, output = expected_tokens(encoder, pixel_values)
    encoder.observe(pixel_values, on_layer=lambda index, tokens: seen.append((index, tokens)))
    assert [index for index, _ in seen] == list(range(len(layers)))
    for (_, actual), expected in zip(seen, layers, strict=True):
        assert relative_error(actual, expected) < TOLERANCE
    is_normed_after = family != "clip_vision_model"
    normed = encoder.final(seen[-1][1])
    assert relative_error(normed if is_normed_after else seen[-1][1], output) < TOLERANCE
    has_norm = family not in ("vitreg mean_normed", "vitreg normed_queries", "timm mean", "timm eva")
    assert (relative_error(normed, seen[-1][1]) > 1e-2) == has_norm


@torch.no_grad()
def test_clip_norms_cls_as_the_model_does():
    encoder, pixel_values = make("clip_vision_model"), images(*NATIVE)
    last = encoder.layers(pixel_values, [-1])[-1]
    expected = encoder.model(pixel_values).pooler_output
    assert relative_error(encoder.split(encoder.final(last)).cls, expected) < TOLERANCE


def test_layers_are_counted_from_both_ends_and_named_as_asked():
    encoder, pixel_values = make("timm registers"), images(*LARGER)
    layers, _ = expected_tokens(encoder, pixel_values)
    chosen = encoder.layers(pixel_values, [1, -1, 2])
    assert list(chosen) == [1, -1, 2]
    assert torch.equal(chosen[1], layers[1])
    assert torch.equal(chosen[-1], layers[2]) and torch.equal(chosen[2], layers[2])
    for layer in (3, -4):
        with pytest.raises(ValueError, match=f"layer {layer} does not exist: VisionTransformer has 3, 0 to 2"):
            encoder.layers(pixel_values, [layer])


def without_layers(family: str) -> VisionEncoder:
    """Its layers add nothing to what enters them."""
    encoder = make(family)
    with torch.no_grad():
        for block in blocks(encoder):
            for parameter in block.parameters():
                parameter.zero_()
    return encoder


def changed_tokens(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return (after - before).abs().amax(dim=(0, 2)).nonzero().flatten().tolist()


def last_tokens(encoder: VisionEncoder, pixel_values: torch.Tensor) -> torch.Tensor:
    return encoder.layers(pixel_values, [-1])[-1]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_token_is_where_it_is_said_to_be(family):
    """A change of one parameter of the prefix, or of one patch of the image, changes one token."""
    encoder, pixel_values = without_layers(family), images(*LARGER)
    tokens, registers = last_tokens(encoder, pixel_values), encoder.register_slice
    parameters = {name.split(".")[-1]: parameter for name, parameter in encoder.model.named_parameters()}
    positions = {"cls_token": [0], "class_embedding": [0], "dist_token": [1], "distillation_token": [1]}
    positions |= dict.fromkeys(REGISTERS, range(registers.start, registers.stop))
    found = [
        (parameters[name].view(-1, HIDDEN_SIZE)[row], position)
        for name in positions.keys() & parameters.keys()
        for row, position in enumerate(positions[name])
    ]
    assert len(found) == encoder.num_prefix_tokens
    for vector, position in found:
        before = vector.clone()
        vector.mul_(-1)
        assert changed_tokens(tokens, last_tokens(encoder, pixel_values)) == [position]
        vector.copy_(before)
    pixel_values[:, :, 14:21, 35:42] *= -1
    assert changed_tokens(tokens, last_tokens(encoder, pixel_values)) == [encoder.num_prefix_tokens + 2 * 9 + 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_split_by_what_they_are(family):
    encoder = make(family)
    tokens = torch.randn(2, encoder.num_prefix_tokens + 54, HIDDEN_SIZE)
    cls, registers, patches = encoder.split(tokens)
    assert cls is None if not encoder.has_cls else torch.equal(cls, tokens[:, 0])
    assert torch.equal(registers, tokens[:, encoder.num_prefix_tokens - encoder.num_registers : -54])
    assert registers.shape == (2, encoder.num_registers, HIDDEN_SIZE)
    assert torch.equal(patches, tokens[:, -54:])


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_are_those_of_the_patch_embedding_alone(family):
    encoder, pixel_values, seen = make(family), images(*LARGER), []
    encoder.observe(pixel_values, on_patches=seen.append)
    [projection] = [module for module in encoder.model.modules() if isinstance(module, torch.nn.Conv2d)]
    with torch.no_grad():
        expected = projection(pixel_values).permute(0, 2, 3, 1).reshape(2, 6 * 9, HIDDEN_SIZE)
    assert len(seen) == 1 and relative_error(seen[0], expected) < TOLERANCE


def test_nothing_is_kept_that_a_callback_does_not_keep():
    encoder, references, alive = make("dinov3_vit"), [], []

    def watch(index, tokens):
        references.append(weakref.ref(tokens))
        alive.append(sum(reference() is not None for reference in references))

    encoder.observe(images(*NATIVE), on_layer=watch, on_attention=lambda index, weights: weights("all"))
    # of the layers before only the one that this layer's output was made from
    assert max(alive) <= 2 and all(reference() is None for reference in references)


# Attention


@torch.no_grad()
def expected_attention(family: str, pixel_values: torch.Tensor, layer: int) -> torch.Tensor:
    """All of one layer, from transformers' eager attention, or from where timm drops some of it in training."""
    encoder = make(family)
    if family.startswith("timm"):
        block, found = blocks(encoder)[layer], []
        for module in block.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
                module.attn_drop.register_forward_hook(lambda module, args, output: found.append(output))
        encoder.model(pixel_values)
        return found[0]
    encoder.model.set_attn_implementation("eager")
    return encoder.model(pixel_values, output_attentions=True, **resized(encoder)).attentions[layer]


@pytest.mark.parametrize("size", [NATIVE, LARGER])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_equals_that_of_the_library(family, size):
    encoder, pixel_values = make(family), images(*size)
    for layer in (1, -1):
        expected = expected_attention(family, pixel_values, layer)
        actual = encoder.attention(pixel_values, layer, "all")
        assert relative_error(actual, expected) < TOLERANCE
        torch.testing.assert_close(actual.sum(dim=-1), torch.ones(actual.shape[:-1]))
    if encoder.has_cls:
        assert relative_error(encoder.attention(pixel_values, -1), expected[:, :, :1]) < TOLERANCE
    mean = expected[:, :, encoder.patch_slice].mean(dim=2, keepdim=True)
    assert relative_error(encoder.attention(pixel_values, -1, "patch_mean"), mean) < TOLERANCE
    if encoder.num_registers:
        rows = encoder.attention(pixel_values, -1, "registers")
        assert relative_error(rows, expected[:, :, encoder.register_slice]) < TOLERANCE


def test_attention_of_ours_equals_its_attention_maps():
    encoder, pixel_values = make("vitreg rope_untied"), images(*LARGER)
    for queries in ("cls", "registers", "all"):
        expected = encoder.model.get_attention_maps(pixel_values, 2, queries)
        assert relative_error(encoder.attention(pixel_values, 2, queries), expected) < TOLERANCE


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("family", ["vitreg", "vit", "dinov3_vit", "siglip_vision_model"])
def test_attention_is_the_same_in_every_implementation_which_stays(family, implementation):
    pixel_values = images(*NATIVE)
    encoder = make(family)
    expected = encoder.attention(pixel_values, 1, "all")
    encoder.model.set_attn_implementation(implementation)
    assert relative_error(encoder.attention(pixel_values, 1, "all"), expected) < TOLERANCE
    assert {m.config._attn_implementation for m in encoder.model.modules() if hasattr(m, "config")} == {implementation}


def test_attention_of_timm_without_fused_attention():
    encoder, pixel_values = make("timm eva"), images(*NATIVE)
    expected = encoder.attention(pixel_values, 1, "all")
    modules = [module for module in encoder.model.modules() if hasattr(module, "fused_attn")]
    for module in modules:
        module.fused_attn = False
    assert relative_error(encoder.attention(pixel_values, 1, "all"), expected) < TOLERANCE
    assert len(modules) == NUM_LAYERS and not any(module.fused_attn for module in modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_size_of_the_mlp_is_found(family):
    # DINOv2's and timm's are four times as wide as the model
    width = 4 * HIDDEN_SIZE if family.startswith(("timm", "dinov2")) else SIZES["intermediate_size"]
    expected = None if family == "timm parallel" else (width, family == "vitreg rope_untied")
    assert make(family).mlp_size() == expected


def test_gated_mlps_of_others_are_known():
    with torch.device("meta"):
        giant = Dinov2Model(Dinov2Config(**DINOV2, use_swiglu_ffn=True))
        packed = timm_model(mlp_layer=SwiGLUPacked, mlp_ratio=5)()
    assert VisionEncoder.wrap(giant).mlp_size() == (112, True)
    assert VisionEncoder.wrap(packed).mlp_size() == (HIDDEN_SIZE * 5 // 2, True)


def test_one_pass_shows_patches_layers_and_attention_of_several_queries():
    encoder, pixel_values, seen = make("dinov2_with_registers"), images(*LARGER), []
    encoder.observe(
        pixel_values,
        on_patches=lambda patches: seen.append(("patches", patches)),
        on_layer=lambda index, tokens: seen.append((index, tokens)),
        on_attention=lambda index, weights: seen.append((index, (weights("cls"), weights("registers")))),
    )
    assert [kind for kind, _ in seen] == ["patches", 0, 0, 1, 1, 2, 2]
    cls, registers = seen[3][1]
    assert relative_error(cls, encoder.attention(pixel_values, 1, "cls")) < TOLERANCE
    assert relative_error(registers, encoder.attention(pixel_values, 1, "registers")) < TOLERANCE
    assert relative_error(seen[4][1], encoder.layers(pixel_values, [1])[1]) < TOLERANCE


def test_attention_is_float32_and_sums_to_one_in_half_precision():
    encoder = VisionEncoder.wrap(randomize(ours()).to(torch.bfloat16))
    weights = encoder.attention(images(*LARGER), -1, "registers")
    assert weights.dtype == torch.float32 and encoder.dtype == torch.bfloat16
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


def test_attention_that_is_no_one_map_is_refused():
    encoder = VisionEncoder.wrap(timm_model(block_fn=DiffParallelScalingBlock)())
    with pytest.raises(ValueError, match="Layer 0, a DiffParallelScalingBlock, computes attention 2 times"):
        encoder.attention(images(*NATIVE), 1)
    assert len(encoder.layers(images(*NATIVE), [0, 1])) == 2


@pytest.mark.parametrize(
    ("family", "queries", "message"),
    [
        ("vitreg", "patches", "queries must be one of 'cls', 'registers', 'all', 'patch_mean', got 'patches'"),
        ("vit", "registers", "ViTModel has no such tokens: queries='registers'"),
        ("siglip_vision_model", "cls", "SiglipVisionModel has no such tokens: queries='cls'"),
    ],
)
def test_queries_that_are_not_there_are_refused(family, queries, message):
    with pytest.raises(ValueError, match=message):
        make(family).attention(images(*NATIVE), 0, queries)


# Queries, keys and values


@torch.no_grad()
def expected_facets(encoder: VisionEncoder, pixel_values: torch.Tensor, layer: int) -> list[torch.Tensor]:
    """From the input of the attention, by its weights."""
    module, found = attention_module(blocks(encoder)[layer]), []

    def hook(module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        expected_tokens(encoder, pixel_values)
    if getattr(module, "qkv", None) is None:
        projections = [module.q_proj, module.k_proj, module.v_proj]
        return [torch.nn.functional.linear(found[0], each.weight, each.bias) for each in projections]
    bias = module.qkv.bias
    if getattr(module, "q_bias", None) is not None:
        bias = torch.cat([module.q_bias, torch.zeros(HIDDEN_SIZE), module.v_bias])
    return list((found[0] @ module.qkv.weight.T + bias).split(HIDDEN_SIZE, dim=-1))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != ATTENTION_IN_ITS_BLOCK])
def test_facets_equal_the_projections(family):
    encoder, pixel_values = make(family), images(*LARGER)
    expected = expected_facets(encoder, pixel_values, 1)
    for facet, tokens in zip(("query", "key", "value"), expected, strict=True):
        assert relative_error(encoder.qkv(pixel_values, 1, facet), tokens) < TOLERANCE


def test_facets_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match='facet must be "query", "key" or "value", got \'keys\''):
        make("vit").qkv(images(*NATIVE), 0, "keys")
    with pytest.raises(ValueError, match="ParallelScalingBlock of VisionTransformer has no projection to a key"):
        make(ATTENTION_IN_ITS_BLOCK).qkv(images(*NATIVE), 0, "key")
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        make("vit").qkv(images(*NATIVE), 7, "key")


# Registers


@pytest.mark.parametrize("family", [each for each in WITH_REGISTERS if "projected" not in each])
def test_replaced_where_they_enter_they_are_other_parameters(family):
    encoder, pixel_values, values = make(family), images(*LARGER), torch.randn(2, HIDDEN_SIZE)
    with encoder.replace_registers(values, registers=[2, 0]):
        actual = last_tokens(encoder, pixel_values)
    before = last_tokens(encoder, pixel_values)
    parameters = {name.split(".")[-1]: parameter for name, parameter in encoder.model.named_parameters()}
    [registers] = [parameters[name] for name in REGISTERS if name in parameters]
    with torch.no_grad():
        # those with a position have it added afterwards
        position = torch.zeros(3, HIDDEN_SIZE)
        if family == "vitreg distilled":
            position = encoder.model.embeddings.position_embeddings[0, 2:5]
        elif family.startswith("timm") and family != "timm registers" and encoder.model.pos_embed is not None:
            position = encoder.model.pos_embed[0, encoder.register_slice]
        registers[0, [2, 0]] = values - position[[2, 0]]
    assert relative_error(actual, last_tokens(encoder, pixel_values)) < TOLERANCE
    assert relative_error(actual, before) > 1e-3


@torch.no_grad()
def test_replaced_at_a_layer_the_layers_after_it_see_them():
    encoder, pixel_values, values = make("dinov2_with_registers"), images(*LARGER), torch.randn(1, HIDDEN_SIZE)
    tokens = encoder.layers(pixel_values, [1])[1].clone()
    tokens[:, 2] = values
    with encoder.replace_registers(values, registers=[1], layer=1):
        seen = encoder.layers(pixel_values, [0, 1, 2])
    assert torch.equal(seen[0], encoder.layers(pixel_values, [0])[0])
    assert torch.equal(seen[1], tokens)
    assert relative_error(seen[2], blocks(encoder)[2](tokens)) < TOLERANCE


@torch.no_grad()
def test_replacements_nest():
    encoder, pixel_values = make("timm eva"), images(*LARGER)
    first, second = torch.randn(3, HIDDEN_SIZE), torch.randn(3, HIDDEN_SIZE)
    with encoder.replace_registers(first, layer=0), encoder.replace_registers(second, layer=-1):
        seen = encoder.layers(pixel_values, [0, 2])
    assert torch.equal(encoder.split(seen[0]).registers, first.expand(2, -1, -1))
    assert torch.equal(encoder.split(seen[2]).registers, second.expand(2, -1, -1))


@torch.no_grad()
def test_a_register_that_is_its_mean_anyway_changes_nothing():
    encoder, pixel_values = make("dinov3_vit"), images(*NATIVE, batch_size=1).expand(2, -1, -1, -1)
    before = encoder.layers(pixel_values, [1, 2])
    means = encoder.split(before[1]).registers.mean(dim=0)
    with encoder.replace_registers(means, layer=1):
        assert relative_error(last_tokens(encoder, pixel_values), before[2]) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "shape", "arguments", "message"),
    [
        ("vit", (0, 40), {}, r"ViTModel has 0 registers, counted from 0, got \[\]"),
        ("vitreg", (1, 40), {"registers": [3]}, r"ViTRegModel has 3 registers, counted from 0, got \[3\]"),
        ("vitreg", (3, 39), {}, r"values must have shape \(3, 40\), \(registers, hidden_size\), got \(3, 39\)"),
        ("vitreg", (3, 40), {"layer": 3}, "layer 3 does not exist"),
    ],
)
def test_registers_that_are_not_there_are_refused(family, shape, arguments, message):
    with pytest.raises(ValueError, match=message), make(family).replace_registers(torch.zeros(shape), **arguments):
        pass


# Hooks


def hooks(encoder: VisionEncoder) -> list[int]:
    """Those of every module; transformers installs some of its own when it is first asked for hidden states."""
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in encoder.model.modules()]


@pytest.mark.parametrize("family", ["vitreg", "clip_vision_model", "timm registers", "timm eva"])
def test_no_hook_stays(family):
    encoder, pixel_values = make(family), images(*NATIVE)
    before = hooks(encoder)

    def fail(*args):
        raise InterruptedError

    encoder.observe(pixel_values, lambda _: None, lambda *_: None, lambda *_: None)
    encoder.attention(pixel_values, 0, "all")
    encoder.qkv(pixel_values, 0, "key")
    for callbacks in ({"on_patches": fail}, {"on_layer": fail}, {"on_attention": fail}):
        with pytest.raises(InterruptedError):
            encoder.observe(pixel_values, **callbacks)
    with pytest.raises((RuntimeError, ValueError), match="channels"):
        encoder.qkv(images(*NATIVE)[:, :2], 0, "key")
    if encoder.num_registers:
        for arguments in ({}, {"layer": 0}):
            with (
                pytest.raises(InterruptedError),
                encoder.replace_registers(torch.zeros(3, HIDDEN_SIZE), **arguments),
            ):
                fail()
    assert hooks(encoder) == before
    assert torch.overrides._get_current_function_mode_stack() == []


def test_what_a_callback_returns_changes_nothing():
    encoder, pixel_values = make("timm"), images(*NATIVE)
    expected = last_tokens(encoder, pixel_values)
    found = []

    def keep(index, tokens):
        found.append(tokens)
        return torch.zeros_like(tokens)

    encoder.observe(pixel_values, lambda patches: patches * 0, keep, lambda index, weights: 0)
    assert relative_error(found[-1], expected) < TOLERANCE
    assert not found[-1].requires_grad


# Images


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((36, 35), "A height of 36 pixels is no multiple of the patch size 7 of VisionTransformer. .* 35 or 42"),
        ((35, 6), "A width of 6 pixels is no multiple .* The nearest: 7"),
        ((0, 35), "A height of 0 pixels"),
    ],
)
def test_sizes_of_no_whole_patches_are_refused(size, message):
    encoder = make("timm")
    with pytest.raises(ValueError, match=message):
        encoder.observe(images(*size))
    with pytest.raises(ValueError, match=message):
        encoder.grid(*size)


def test_images_of_another_shape_or_of_a_size_that_the_model_cannot_take_are_refused():
    with pytest.raises(ValueError, match=r"\(batch_size, num_channels, height, width\), got \(3, 35, 35\)"):
        make("vit").observe(images(*NATIVE)[0])
    static = VisionEncoder.wrap(timm_model(dynamic_img_size=False)())
    assert last_tokens(static, images(*NATIVE)).shape == (2, 26, HIDDEN_SIZE)
    with pytest.raises(ValueError, match=r"no images but of 35x35 pixels, got 42x63.*dynamic_img_size=True"):
        static.observe(images(*LARGER))


def test_native_sizes_need_not_be_square():
    vit = VisionEncoder.wrap(ViTModel(ViTConfig(**{**SIZES, "image_size": (21, 49)})))
    assert vit.image_size == (21, 49) and last_tokens(vit, images(21, 49)).shape == (2, 22, HIDDEN_SIZE)
    with pytest.raises(ValueError, match="doesn't match model"):
        vit.observe(images(49, 21))
    for model in (ours(image_size=(21, 49)), timm_model(img_size=(21, 49), reg_tokens=3)()):
        encoder = VisionEncoder.wrap(model)
        assert encoder.image_size == (21, 49)
        assert last_tokens(encoder, images(49, 21)).shape == (2, 4 + 21, HIDDEN_SIZE)


def test_native_size_is_that_of_whole_patches():
    """SigLIP of 384 pixels has patches of 14."""
    encoder = VisionEncoder.wrap(SiglipVisionModel(SiglipVisionConfig(**{**SIZES, "image_size": 38})))
    assert encoder.image_size == (35, 35)
    pixel_values = images(38, 38)
    with torch.no_grad():
        expected = encoder.model(pixel_values, output_hidden_states=True).hidden_states[-1]
    assert relative_error(last_tokens(encoder, pixel_values[:, :, :35, :35]), expected) < TOLERANCE


def test_patches_that_are_no_squares_are_refused():
    with pytest.raises(ValueError, match="Patches must be square, got 7x5 pixels"):
        VisionEncoder.wrap(timm_model(patch_size=(7, 5))())


def test_images_are_fitted_and_normalized():
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    encoder = VisionEncoder.wrap(ours(), mean=mean, std=std)
    processor = BitImageProcessor(
        size={"shortest_edge": 35}, crop_size={"height": 35, "width": 35}, resample=3, image_mean=mean, image_std=std
    )
    pictures = [colour_image(0, 1, 70, 98), colour_image(1, 2, 98, 70)]
    expected = processor(pictures, return_tensors="pt")["pixel_values"]
    actual = encoder.preprocess(pictures)
    # pixels are rounded once here and twice there
    assert actual.shape == expected.shape and (actual - expected).abs().max() < 3 / 255 / 0.4
    assert encoder.preprocess([colour_image(0, 1).convert("L")], size=(63, 42)).shape == (1, 3, 63, 42)
    with pytest.raises(ValueError, match="A width of 43 pixels"):
        encoder.preprocess(pictures, size=(63, 43))


def test_images_are_not_normalized_by_a_guess():
    with pytest.raises(ValueError, match=r"mine normalizes .* not known: it has no preprocessor_config.json"):
        VisionEncoder.wrap(ours(), name="mine").preprocess([colour_image(0, 1)])


# Loading


def same(encoder: VisionEncoder, model: torch.nn.Module, size=LARGER) -> bool:
    """Whether what was loaded sees what the model in memory sees."""
    pixel_values = images(*size)
    expected = last_tokens(VisionEncoder.wrap(model), pixel_values)
    return relative_error(last_tokens(encoder, pixel_values), expected) < TOLERANCE


@pytest.mark.parametrize("family", [each for each in TRANSFORMERS if each.split()[-1] not in ("projected",)])
def test_a_folder_loads_with_its_normalization(family, tmp_path):
    model = make(family).model
    model.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    encoder = load_vit(str(tmp_path))
    assert encoder.name == str(tmp_path) and same(encoder, model)
    assert (list(encoder.mean), list(encoder.std)) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


@pytest.mark.parametrize(
    "build",
    [
        lambda: ViTRegForImageClassification(tiny_config(**SIZES, num_register_tokens=3)),
        lambda: ViTForImageClassification(ViTConfig(**SIZES)),
        lambda: Dinov2ForImageClassification(Dinov2Config(**DINOV2)),
    ],
)
def test_a_classifier_loads_without_its_head(build, tmp_path):
    model = randomize(build())
    model.save_pretrained(tmp_path)
    encoder = load_vit(tmp_path)
    assert same(encoder, model) and encoder.mean is None
    assert not any("classifier" in name for name, _ in encoder.model.named_modules())


def clip() -> CLIPModel:
    text = {"vocab_size": 13, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "intermediate_size": 24}
    return CLIPModel(CLIPConfig(vision_config=CLIPVisionConfig(**SIZES).to_dict(), text_config=text))


def dual_encoder() -> VisionTextDualEncoderModel:
    text = BertConfig(vocab_size=13, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    return VisionTextDualEncoderModel(vision_model=ours(), text_model=BertModel(text))


@pytest.mark.parametrize(("build", "source"), [(clip, "transformers clip_vision_model"), (dual_encoder, "vitreg")])
def test_a_dual_encoder_loads_its_vision_half(build, source, tmp_path):
    model = randomize(build())
    model.save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    encoder = load_vit(str(tmp_path), dtype=torch.float64)
    assert encoder.source == source and encoder.dtype == torch.float64
    pixel_values = images(*LARGER)
    assert encoder.attention(pixel_values, 1).shape == (2, NUM_HEADS, 1, 54 + encoder.num_prefix_tokens)
    assert same(encoder.model.float() and encoder, model)


TIMM_NORMALIZATION = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}


def tiny_timm(**values) -> VisionTransformer:
    return randomize(timm.create_model("test_vit", dynamic_img_size=True, **values))


def test_timm_loads_a_folder(tmp_path):
    sizes = {"embed_dim": HIDDEN_SIZE, "depth": 2, "num_heads": 2, "reg_tokens": 3, "img_size": 32}
    model = tiny_timm(num_classes=5, **sizes)
    save_for_hf(model, tmp_path, model_config=TIMM_NORMALIZATION, model_args=sizes, safe_serialization=True)
    encoder = load_vit(f"timm:{tmp_path}")
    assert (encoder.source, encoder.num_layers, encoder.num_registers) == ("timm test_vit", 2, 3)
    assert same(encoder, model, (48, 64)) and encoder.image_size == (32, 32)
    with pytest.raises(ValueError, match=f"it is timm's. Write timm:{tmp_path}"):
        load_vit(str(tmp_path))


def test_timm_loads_a_file_into_a_name(tmp_path):
    model = tiny_timm()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    encoder = load_vit(f"timm:test_vit@{tmp_path / 'weights.pth'}", dtype=torch.float64)
    assert encoder.dtype == torch.float64 and same(encoder, model.double(), (32, 64))
    assert encoder.mean == model.pretrained_cfg["mean"] and encoder.image_size == (160, 160)


def test_timm_asks_for_published_weights_of_vits_only(monkeypatch):
    """By name and tag; here in place of the download."""
    asked, create_model = [], timm.create_model

    def create(name, **kwargs):
        asked.append((name, kwargs))
        return create_model(name, **{**kwargs, "pretrained": False})

    monkeypatch.setattr(timm, "create_model", create)
    encoder = load_vit("timm:test_vit.r160_in1k")
    assert encoder.name == "timm:test_vit.r160_in1k" and same(encoder, encoder.model, (32, 64))
    assert asked[-1] == ("test_vit.r160_in1k", {"pretrained": True, "dynamic_img_size": True})
    with pytest.raises(ValueError, match="SwinTransformer is no plain ViT"):
        load_vit("timm:swin_tiny_patch4_window7_224")
    assert asked[-1] == ("swin_tiny_patch4_window7_224", {})


@pytest.mark.parametrize("num_classes", [0, 11])
def test_files_need_no_head_of_the_same_size(tmp_path, num_classes):
    model = tiny_timm(num_classes=num_classes)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    encoder = load_vit(f"timm:test_vit@{tmp_path / 'weights.pth'}")
    assert same(encoder, model, (32, 64))


def test_files_of_other_weights_are_refused(tmp_path):
    torch.save(tiny_timm(depth=1).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"Cannot load timm:test_vit@.*Missing key"):
        load_vit(f"timm:test_vit@{tmp_path / 'weights.pth'}")
    with pytest.raises(ValueError, match=r"Cannot load timm:test_vit@.*there is no file .*nowhere.pth"):
        load_vit(f"timm:test_vit@{tmp_path / 'nowhere.pth'}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:test_resnet", "ResNet is no plain ViT"),
        ("timm:test_convnext", "ConvNeXt is no plain ViT"),
        ("timm:vit_smal_patch14_dinov2", "timm has no 'vit_smal_patch14_dinov2'. It has .*vit_small_patch14_dinov2"),
        ("timm:org/name", "Use 'hf-hub:org/name'"),
        ("timm:vit_small_patch14_dinov2", "Cannot load timm:vit_small_patch14_dinov2"),
        ("org/name", "Cannot load org/name"),
        ("./org/name", "Cannot load ./org/name: there is no such folder"),
        (__file__, "it is a file. Give the folder that it is in"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(name, message):
    with pytest.raises(ValueError, match=message):
        load_vit(name)


def test_timm_that_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm is not installed: pip install hf-vitreg\[conversion\]"):
        load_vit("timm:test_vit")


@pytest.mark.parametrize(
    ("model_class", "config", "found"),
    [
        (SwinModel, SwinConfig(embed_dim=8, depths=[1], num_heads=[1], image_size=32, window_size=4), "swin"),
        (ConvNextModel, ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=32), "convnext"),
    ],
)
def test_models_of_windows_or_convolutions_are_refused_by_what_they_are(model_class, config, found, tmp_path):
    model = model_class(config)
    config.architectures = [model_class.__name__]
    # the weights are not even asked for
    config.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"model_type '{found}', {model_class.__name__} is no plain ViT. There are ViTReg"
    ):
        load_vit(str(tmp_path))
    with pytest.raises(ValueError, match=f"{model_class.__name__} is no plain ViT"):
        VisionEncoder.wrap(model)


def test_a_class_of_the_same_name_is_not_taken_for_timms():
    model = torchvision.models.VisionTransformer(35, 7, 1, 2, 40, 56)
    with pytest.raises(ValueError, match="VisionTransformer is no plain ViT"):
        VisionEncoder.wrap(model)


def test_a_hybrid_is_refused_by_its_patches():
    with pytest.raises(ValueError, match="makes its patches by a HybridEmbed"):
        VisionEncoder.wrap(timm.create_model("vit_tiny_r_s16_p8_224"))


def test_a_folder_without_all_weights_is_refused(tmp_path):
    model = ours()
    state_dict = {name: tensor for name, tensor in model.state_dict().items() if "layer.1." not in name}
    model.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(
        ValueError, match=r"18 of its weights are missing, encoder.layer.1.attention.k_proj.bias among"
    ):
        load_vit(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"Cannot load {tmp_path}"):
        load_vit(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"Cannot load {tmp_path}.*safetensors"):
        load_vit(str(tmp_path))


def test_code_of_a_repository_is_not_run_nor_asked_for(tmp_path):
    (tmp_path / "modeling.py").write_text("raise SystemExit")
    auto_map = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other", "auto_map": auto_map}))
    with pytest.raises(ValueError, match="model_type 'other' is no plain ViT"):
        load_vit(str(tmp_path))


def test_ours_with_its_code_beside_it_is_loaded_by_the_code_that_is_here(tmp_path):
    model = randomize(ours())
    model.save_pretrained(tmp_path)
    (tmp_path / "modeling_vitreg.py").write_text("raise SystemExit")
    assert same(load_vit(str(tmp_path)), model)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"Cannot load {tmp_path}: there is no config.json in it"):
        load_vit(str(tmp_path))


def test_ours_is_known_by_the_code_of_its_repository_too(tmp_path, monkeypatch):
    """Whoever loads it with `trust_remote_code=True` where hf_vitreg was not imported yet has another class."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = randomize(ours())
    model.save_pretrained(tmp_path / "model")
    model_class = dynamic_module_utils.get_class_from_dynamic_module("modeling_vitreg.ViTRegModel", tmp_path / "model")
    remote = model_class.from_pretrained(tmp_path / "model")
    assert not isinstance(remote, ViTRegModel) and same(VisionEncoder.wrap(model), remote)
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
