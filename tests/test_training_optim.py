# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch

from hf_vitreg import ViTRegConfig, ViTRegForImageClassification
from hf_vitreg.recipe import OptimizerOptions
from hf_vitreg.training.optim import adamw, layer_index, parameter_groups, set_learning_rate


LAYERS = 3


@pytest.fixture(scope="module")
def model():
    config = ViTRegConfig(
        hidden_size=14,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=6,
        patch_size=2,
        use_mask_token=True,
    )
    return ViTRegForImageClassification(config)


def groups_by_name(model, **options):
    groups = parameter_groups(model, LAYERS, OptimizerOptions(weight_decay=0.1, **options))
    return groups, {name: group for group in groups for name in group["names"]}


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_groups_partition_the_trainable_parameters(model, layer_decay):
    groups, _ = groups_by_name(model, layer_decay=layer_decay)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_frozen_parameters_are_in_no_group(model):
    model.vitreg.requires_grad_(False)
    _, by_name = groups_by_name(model)
    model.vitreg.requires_grad_(True)
    assert set(by_name) == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("decay_tokens", [False, True])
def test_only_matrices_decay_and_tokens_as_asked(model, decay_tokens):
    _, by_name = groups_by_name(model, decay_tokens=decay_tokens)
    decaying = {name for name, group in by_name.items() if group["weight_decay"] == 0.1}
    tokens = {
        f"vitreg.embeddings.{name}" for name in ("cls_token", "register_tokens", "mask_token", "position_embeddings")
    }
    matrices = {name for name in by_name if name.endswith("weight") and "norm" not in name}
    assert decaying == (matrices | tokens if decay_tokens else matrices)


def test_no_token_of_any_family_decays_by_accident():
    sizes = {
        "hidden_size": 12,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "image_size": 6,
        "patch_size": 2,
    }
    distilled = ViTRegConfig(
        use_distillation_token=True,
        position_embedding_type="prefix_patches",
        classifier_layout="cls_distillation",
        use_pre_layernorm=True,
        **sizes,
    )
    pooled = ViTRegConfig(
        use_cls_token=False,
        position_embedding_type="patches",
        pooler_type="map",
        classifier_layout="pooled",
        use_qk_norm=True,
        **sizes,
    )
    for config in (distilled, pooled):
        _, by_name = groups_by_name(ViTRegForImageClassification(config), decay_tokens=False)
        decaying = {name for name, group in by_name.items() if group["weight_decay"] > 0}
        assert decaying == {name for name in by_name if name.endswith("weight") and "norm" not in name}


def test_learning_rate_falls_with_the_distance_from_the_head(model):
    _, by_name = groups_by_name(model, layer_decay=0.5)
    scales = {name: group["lr_scale"] for name, group in by_name.items()}
    assert scales["classifier.weight"] == scales["vitreg.layernorm.weight"] == 1.0
    for layer in range(LAYERS):
        assert scales[f"vitreg.encoder.layer.{layer}.mlp.fc1.weight"] == 0.5 ** (LAYERS - layer)
    for token in ("register_tokens", "cls_token", "position_embeddings"):
        assert scales[f"vitreg.embeddings.{token}"] == 0.5 ** (LAYERS + 1)


def test_layer_index_reads_two_digits():
    assert layer_index("vitreg.encoder.layer.23.norm1.weight", 24) == 24


def test_set_learning_rate_reaches_the_optimizer(model):
    optimizer = adamw(model, LAYERS, OptimizerOptions(layer_decay=0.5, learning_rate=1.0))
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25 * 0.5**power for power in range(LAYERS + 2)}
    assert isinstance(optimizer, torch.optim.AdamW)
