# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.modeling_vitreg import ViTRegLayer
from hf_vitreg.objectives.packing import forward_crops, prepare_for_crops


SIZES = [(20, 12), (8, 16)]
BATCH_SIZES = [5, 7]
VARIANTS = {
    "dinov2": {"use_mask_token": True},
    "swiglu, no LayerScale": {"use_swiglu_ffn": True, "layerscale_value": None},
    "rope": {"position_embedding_type": "rope", "use_qk_norm": True},
    "eager": {"attn_implementation": "eager"},
}


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
    expected = [plain(pixels, mask).last_hidden_state for pixels, mask in zip(crops(), masks)]
    found = forward_crops(prepared, crops(), masks)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    sum(tokens.square().mean() for tokens in found).backward()
    sum(tokens.square().mean() for tokens in expected).backward()
    for (name, ours), theirs in zip(prepared.named_parameters(), plain.parameters()):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda told, name=name: name + told
        )


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
