# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch

from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel
from hf_vitreg.objective_options import DINOOptions
from hf_vitreg.objectives.dino import DINOObjective
from hf_vitreg.pretrain_recipe import PretrainOptimizerOptions
from hf_vitreg.recipe import OptimizerOptions
from hf_vitreg.training.optim import (
    Schedule,
    adamw,
    layer_index,
    parameter_groups,
    pretraining_groups,
    pretraining_optimizer,
    set_learning_rate,
)


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


def pretraining(**options) -> tuple[DINOObjective, list[dict], dict[str, dict]]:
    config = ViTRegConfig(
        hidden_size=14,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=6,
        patch_size=2,
        use_mask_token=True,
    )
    sizes = {"num_prototypes": 11, "head_mlp_size": 7, "head_bottleneck_size": 5, "ibot_num_prototypes": 13}
    objective = DINOObjective(ViTRegModel(config), DINOOptions(separate_ibot_head=True, **sizes), total_steps=10)
    groups = pretraining_groups(objective, LAYERS, PretrainOptimizerOptions(**options))
    return objective, groups, {name: group for group in groups for name in group["names"]}


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_pretraining_groups_partition_what_is_trained(layer_decay):
    objective, groups, _ = pretraining(layer_decay=layer_decay, patch_embed_lr_ratio=0.2)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in objective.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert not {id(parameter) for parameter in objective.teacher.parameters()} & set(grouped)


def test_pretraining_groups_are_dinov2s():
    _, _, by_name = pretraining(layer_decay=0.5, patch_embed_lr_ratio=0.2, decay_tokens=True)
    expected = {  # share of the learning rate, whether it decays
        "student.backbone.embeddings.register_tokens": (0.5**4, True),
        "student.backbone.embeddings.mask_token": (0.5**4, True),
        "student.backbone.embeddings.patch_embeddings.projection.weight": (0.2 * 0.5**4, True),
        "student.backbone.embeddings.patch_embeddings.projection.bias": (0.2 * 0.5**4, False),
        "student.backbone.encoder.layer.0.mlp.fc1.weight": (0.5**3, True),
        "student.backbone.encoder.layer.2.residual1.lambda1": (0.5, False),
        "student.backbone.layernorm.weight": (1.0, False),
        "student.head.mlp.0.weight": (1.0, True),
        "student.ibot_head.mlp.0.bias": (1.0, False),
    }
    for name, values in expected.items():
        assert (by_name[name]["lr_scale"], by_name[name]["decays"]) == pytest.approx(values), name
    _, _, by_name = pretraining()
    assert not by_name["student.backbone.embeddings.register_tokens"]["decays"]


def test_prototypes_and_backbone_are_held_back_by_their_names():
    _, _, by_name = pretraining()
    last = {name for name, group in by_name.items() if group["is_last_layer"]}
    assert last == {f"student.{head}.last_layer.parametrizations.weight.original1" for head in ("head", "ibot_head")}
    assert {name for name, group in by_name.items() if not group["is_backbone"]} == {
        name for name in by_name if "head." in name
    }


def values(objective, schedule: Schedule, optimizer, step: int) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay that a parameter has at a step."""
    schedule.apply(optimizer, step)
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_a_schedule_gives_each_group_its_values():
    options = PretrainOptimizerOptions(
        learning_rate=0.4,
        learning_rate_scaling="sqrt",
        learning_rate_batch_size=64,
        warmup_ratio=0.5,
        min_learning_rate=0.01,
        weight_decay=0.1,
        weight_decay_end=0.3,
    )
    objective, _, _ = pretraining()
    optimizer = pretraining_optimizer(objective, LAYERS, options)
    schedule = Schedule(options, 10, batch_size=16, frozen_last_layer_ratio=0.4, head_warmup_ratio=0.2)
    matrix, bias = "student.backbone.encoder.layer.0.mlp.fc1.weight", "student.backbone.encoder.layer.0.mlp.fc1.bias"
    prototypes = "student.head.last_layer.parametrizations.weight.original1"
    first, fourth, sixth = (values(objective, schedule, optimizer, step) for step in (1, 4, 5))
    assert first[matrix][0] == 0 and first["student.head.mlp.0.weight"][0] > 0
    assert first[prototypes][0] == 0 and fourth[prototypes][0] == fourth[matrix][0] > 0
    assert sixth[matrix] == pytest.approx((0.2, 0.2))  # sqrt(16 / 64) of the rate; halfway between the decays
    assert sixth[bias] == pytest.approx((0.2, 0.0))
    assert values(objective, schedule, optimizer, 10)[matrix] == pytest.approx((0.01, 0.3))


def test_lamb_is_timms():
    from timm.optim import Lamb

    objective, _, _ = pretraining()
    options = PretrainOptimizerOptions(optimizer="lamb", adam_beta1=0.8)
    optimizer = pretraining_optimizer(objective, LAYERS, options)
    assert isinstance(optimizer, Lamb) and optimizer.param_groups[0]["betas"] == (0.8, 0.999)
    assert optimizer.param_groups[0]["max_grad_norm"] is None  # the loop clips


def test_a_text_tower_has_one_learning_rate_and_its_embeddings_do_not_decay():
    from dual_encoders import objective

    groups = pretraining_groups(objective(), 2, PretrainOptimizerOptions(layer_decay=0.5))
    by_name = {name: group for group in groups for name in group["names"]}
    of_text = {name: group for name, group in by_name.items() if ".text." in name}
    assert {group["lr_scale"] for group in of_text.values()} == {1.0}
    assert not any(group["decays"] for name, group in of_text.items() if "embedding" in name)
    assert any(group["decays"] for group in of_text.values())


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_an_update_is_adamws_and_goes_on_where_it_was(weight_decay):
    options = PretrainOptimizerOptions(weight_decay=weight_decay, adam_beta2=0.95, adam_epsilon=1e-6)
    settings = {"lr": options.learning_rate, "betas": (0.9, 0.95), "eps": 1e-6}

    def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    def start() -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        linear = torch.nn.Linear(7, 11)
        return list(linear.parameters()), pretraining_optimizer(linear, LAYERS, options)

    ours, optimizer = start()
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    groups = [{"params": [one], "weight_decay": weight_decay * decays} for one, decays in zip(theirs, (True, False))]
    plain = torch.optim.AdamW(groups, **settings, foreach=False)
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay * group["decays"]
    step(ours, optimizer, 0)
    resumed, again = start()
    for parameter, value in zip(resumed, ours):
        parameter.data.copy_(value.data)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in (1, 2):
        step(ours, optimizer, number)
        step(resumed, again, number)
    for number in range(3):
        step(theirs, plain, number)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert all(map(torch.equal, ours, resumed))
