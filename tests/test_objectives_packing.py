# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.modeling_vitreg import ViTRegLayer
from hf_vitreg.objectives.packing import forward_crops, prepare_for_crops, prepare_for_images


SIZES = [(20, 12), (8, 16)]
BATCH_SIZES = [5, 7]
VARIANTS = {
    "dinov2": {"use_mask_token": True},
    "swiglu, no LayerScale": {"use_swiglu_ffn": True, "layerscale_value": None},
    "rope": {"position_embedding_type": "rope", "use_qk_norm": True},
    "eager": {"attn_implementation": "eager"},
    "untied norms": {"final_norm": "untied"},
    "no norm": {"final_norm": "none"},
    "another activation": {"hidden_act": "quick_gelu"},
    "no bias": {"mlp_bias": False, "proj_bias": False, "qkv_bias": False},
}
# positions among the tokens of all crops of a size, of which each has 18 or 11
READ = [torch.tensor([0, 18, 36, 54, 72, 5, 17, 89, 40]), torch.tensor([11, 76, 0])]


def model(**settings) -> ViTRegModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 12, "patch_size": 4}
    return ViTRegModel(ViTRegConfig(**sizes, num_register_tokens=2, register_init_std=0.5, **settings))


def crops() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(number, 3, *size, generator=generator) for number, size in zip(BATCH_SIZES, SIZES)]


@pytest.mark.parametrize("pack_crops", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_crops_of_several_sizes_are_what_the_model_makes_of_each(variant, pack_crops):
    plain = model(**VARIANTS[variant]).train()
    prepared = copy.deepcopy(plain)
    prepare_for_crops(prepared, pack_crops=pack_crops)
    masks = [None, None]
    if plain.config.use_mask_token:
        masks[0] = torch.rand(BATCH_SIZES[0], 15, generator=torch.Generator().manual_seed(2)) < 0.4
    whole = [plain(pixels, mask).last_hidden_state for pixels, mask in zip(crops(), masks)]
    for read in (None, READ, [READ[0], None]):
        expected = picked(whole, read)
        found = forward_crops(prepared, crops(), masks, read)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert_same_gradients(prepared, plain, found, expected)


def picked(whole: list[torch.Tensor], read: list[torch.Tensor | None] | None) -> list[torch.Tensor]:
    pairs = zip(whole, read or [None] * len(whole))
    return [tokens if positions is None else tokens.flatten(0, 1)[positions] for tokens, positions in pairs]


def assert_same_gradients(one: ViTRegModel, other: ViTRegModel, found: list, expected: list) -> None:
    for backbone, tokens in ((one, found), (other, expected)):
        backbone.zero_grad()
        # all tokens counted alike would leave a confusion of images unseen
        sum((part * torch.arange(part.numel()).view_as(part).cos()).sum() for part in tokens).backward(
            retain_graph=True
        )
    for (name, ours), theirs in zip(one.named_parameters(), other.parameters()):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=lambda told, name=name: name + told
        )


@pytest.mark.parametrize("pack_crops", [False, True])
@pytest.mark.parametrize("drop_path_subset", [False, True])
@pytest.mark.parametrize("layerscale_value", [0.3, None])
def test_reading_some_tokens_drops_the_branches_that_reading_all_does(pack_crops, drop_path_subset, layerscale_value):
    one = model(drop_path_rate=0.45, layerscale_value=layerscale_value).train()
    prepare_for_crops(one, drop_path_subset, pack_crops)
    other, found = copy.deepcopy(one), []
    for backbone, read in ((one, READ), (other, None)):
        torch.manual_seed(5)
        found.append(forward_crops(backbone, crops(), [None, None], read))
    expected = picked(found[1], READ)
    torch.testing.assert_close(found[0], expected)
    assert_same_gradients(one, other, found[0], expected)


def test_of_tokens_that_are_read_alone_the_last_layer_computes_its_mlp():
    backbone, seen = model(), []
    prepare_for_crops(backbone, last_alone=True)
    assert [type(layer).__name__ for layer in backbone.encoder.layer] == ["ViTRegLayer", "ViTRegLayer", "CropsLayer"]
    backbone.encoder.layer[-1].mlp.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape)))
    tokens = forward_crops(backbone, crops(), [None, None], READ)
    assert seen == [(9, 24), (3, 24)]
    whole = [backbone(pixels).last_hidden_state for pixels in crops()]
    torch.testing.assert_close(tokens, picked(whole, READ), rtol=1e-5, atol=1e-5)


LINEAR = ["attention.q_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]


@pytest.mark.parametrize("pack_crops", [False, True])
def test_hooks_on_parts_of_a_layer_are_called(pack_crops):
    backbone, called = model(), []
    prepare_for_crops(backbone, pack_crops=pack_crops)
    for name in (*LINEAR, "attention.k_proj", "attention.v_proj", "norm1", "norm2", "mlp", "mlp.activation_fn"):
        part = backbone.encoder.layer[1].get_submodule(name)
        part.register_forward_hook(lambda *_, name=name: called.append(name))
    forward_crops(backbone, crops(), [None, None], READ)
    assert len(called) == 10 * (1 if pack_crops else 2) and len(set(called)) == 10


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's
@pytest.mark.parametrize("targets", [["q_proj"], ["o_proj"], ["fc1"], ["fc2"], LINEAR])
def test_adapters_learn_as_in_the_model_itself(targets):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        model(layerscale_value=0.3), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    ).train()
    plain = adapted.get_base_model()
    prepared = copy.deepcopy(plain)
    prepare_for_crops(prepared)
    expected = picked([plain(pixels).last_hidden_state for pixels in crops()], READ)
    found = forward_crops(prepared, crops(), [None, None], READ)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(prepared, plain, found, expected)
    learned = [name for name, parameter in prepared.named_parameters() if parameter.grad is not None]
    assert learned and all("lora_" in name for name in learned)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batches_of_one_size_have_the_same_gradients_and_keep_less(variant):
    plain = model(**VARIANTS[variant], drop_path_rate=0.4).train()
    prepared = copy.deepcopy(plain)
    prepare_for_images(prepared)
    tokens, kept = [], []
    for backbone in (prepared, plain):
        saved = {}
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: keep(x, saved), lambda x: x):
            tokens.append([backbone(crops()[0]).last_hidden_state])
        kept.append(sum(storage.nbytes() for storage in saved.values()))
    torch.testing.assert_close(*tokens, rtol=1e-5, atol=1e-5)
    assert_same_gradients(prepared, plain, *tokens)
    assert kept[0] < (1 if variant == "another activation" else 0.8) * kept[1]


def keep(tensor: torch.Tensor, saved: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return tensor


def test_batches_of_one_size_give_what_is_asked_for():
    plain = model().train()
    prepared = copy.deepcopy(plain)
    prepare_for_images(prepared)
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected, found = (each(crops()[0], **asked) for each in (plain, prepared))
    for name in ("hidden_states", "attentions"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    maps = prepared.get_attention_maps(crops()[0], layer=1)
    torch.testing.assert_close(maps, plain.get_attention_maps(crops()[0], layer=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_model(dtype):
    plain = model(layerscale_value=1e-5, drop_path_rate=0.0).train()
    prepared = copy.deepcopy(plain)
    prepare_for_crops(prepared)
    with torch.autocast("cpu", dtype):
        expected = [plain(pixels).last_hidden_state for pixels in crops()]
        found = forward_crops(prepared, crops(), [None, None])
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    for tokens in (expected, found):
        sum((part * torch.arange(part.numel()).view_as(part).cos()).sum() for part in tokens).backward()
    for name in ("residual1.lambda1", "mlp.fc2.weight", "norm1.weight", "attention.q_proj.weight"):
        ours, theirs = (each.encoder.layer[1].get_parameter(name).grad for each in (prepared, plain))
        assert (ours - theirs).norm() < 0.05 * theirs.norm(), name


def test_the_model_stays_usable_as_it_was():
    plain = model(drop_path_rate=0.3).eval()
    prepared = copy.deepcopy(plain)
    prepare_for_crops(prepared)
    pixels = crops()[0]
    assert torch.equal(prepared(pixels).last_hidden_state, plain(pixels).last_hidden_state)
    assert prepared.state_dict().keys() == plain.state_dict().keys()
    assert all(isinstance(layer, ViTRegLayer) for layer in prepared.encoder.layer)


@pytest.mark.parametrize("pack_crops", [False, True])
def test_dropped_branches_are_not_computed_and_the_others_scaled_up(pack_crops):
    backbone = model(drop_path_rate=0.45)
    prepare_for_crops(backbone, pack_crops=pack_crops)
    layer, seen = backbone.encoder.layer[0].train(), []
    layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    tokens = [torch.randn(number, length, 24) for number, length in zip(BATCH_SIZES, (17, 11))]
    kept = [2 * 17, 3 * 11]  # int(5 * 0.55) and int(7 * 0.55) images
    layer(tokens, position_embeddings=[None, None])
    assert seen == ([sum(kept)] if pack_crops else kept)

    # one branch alone: rows are untouched, or have the branch by number of images / number kept
    torch.nn.init.zeros_(layer.mlp.fc2.weight)
    torch.nn.init.zeros_(layer.mlp.fc2.bias)
    after = layer(tokens, position_embeddings=[None, None])
    for before, now, num_kept in zip(tokens, after, (2, 3)):
        branch = layer.attention(layer.norm1(before))[0] * len(before) / num_kept
        changed = (now != before).flatten(1).any(dim=1)
        assert changed.sum() == num_kept
        torch.testing.assert_close(now[changed], (before + branch)[changed], rtol=1e-4, atol=1e-5)


def test_one_image_keeps_its_branches():
    backbone = model(drop_path_rate=0.9).train()
    prepare_for_crops(backbone)
    (tokens,) = forward_crops(backbone, [torch.randn(1, 3, 8, 12)], [None])
    assert torch.isfinite(tokens).all()


def test_without_the_subset_stochastic_depth_is_the_models_own():
    plain = model(drop_path_rate=0.5).train()
    prepared = copy.deepcopy(plain)
    prepare_for_crops(prepared, drop_path_subset=False)
    pixels = crops()[0]
    torch.manual_seed(3)
    (ours,) = forward_crops(prepared, [pixels], [None])
    torch.manual_seed(3)
    torch.testing.assert_close(ours, plain(pixels).last_hidden_state)


def test_gradient_checkpointing_changes_nothing():
    plain = model(drop_path_rate=0.4).train()
    prepare_for_crops(plain)
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    for backbone in (plain, checkpointed):
        torch.manual_seed(4)
        sum(tokens.square().mean() for tokens in forward_crops(backbone, crops(), [None, None])).backward()
    for ours, theirs in zip(checkpointed.parameters(), plain.parameters()):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
