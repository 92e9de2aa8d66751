# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import copy

import pytest
import torch
from loss_cases import BOTTLENECK_SIZE, HIDDEN_SIZE, MLP_SIZE, NUM_PROTOTYPES
from original_outputs import assert_close, load
from torch import nn

from hf_vitreg.objectives.heads import DIRECTIONS, NORMS, DINOHead, from_original_head


def small_head(**overrides) -> DINOHead:
    sizes = {"num_prototypes": 29, "mlp_size": 11, "bottleneck_size": 5}
    return DINOHead(7, **{**sizes, **overrides})


def logits(head: DINOHead, tokens: torch.Tensor) -> torch.Tensor:
    features, prototypes = head(tokens)
    return features @ prototypes.T


SPELLINGS = {
    "old": {},
    "present": {
        "last_layer.weight_v": "last_layer.parametrizations.weight.original1",
        "last_layer.weight_g": "last_layer.parametrizations.weight.original0",
    },
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("train_prototype_norms", [False, True])
def test_an_original_head_computes_the_same_logits(spelling, train_prototype_norms):
    state, given, expected = load("dinov2_losses")
    state = {SPELLINGS[spelling].get(name, name): tensor for name, tensor in state.items()}
    head = from_original_head(state, train_prototype_norms)
    assert_close(logits(head, given["tokens"]), expected["head"])
    assert [head.mlp[0].in_features, head.mlp[0].out_features] == [HIDDEN_SIZE, MLP_SIZE]
    assert head.last_layer.weight.shape == (NUM_PROTOTYPES, BOTTLENECK_SIZE)


def test_an_original_head_without_weight_normalisation_computes_the_same_logits():
    """As DINOv3's, of one layer and of two."""
    tokens = torch.randn(3, 2, 7)
    for names in ({"mlp.": nn.Linear(7, 5)}, {"mlp.0.": nn.Linear(7, 11), "mlp.2.": nn.Linear(11, 5)}):
        state = {f"{name}{key}": x for name, layer in names.items() for key, x in layer.state_dict().items()}
        state["last_layer.weight"] = torch.randn(29, 5)
        hidden = tokens
        for index, layer in enumerate(names.values()):
            hidden = layer(nn.functional.gelu(hidden) if index else hidden)
        expected = nn.functional.normalize(hidden, dim=-1) @ state["last_layer.weight"].T
        torch.testing.assert_close(logits(from_original_head(state), tokens), expected)


def test_what_is_no_head_is_refused():
    with pytest.raises(ValueError, match=r"not the state dict of a DINO head.*found blocks\.0"):
        from_original_head({"blocks.0": torch.zeros(1)})
    with pytest.raises(ValueError, match="found nothing"):
        from_original_head({})
    state, *_ = load("dinov2_losses")
    with pytest.raises(ValueError, match="running_mean"):
        from_original_head(state | {"mlp.1.running_mean": torch.zeros(13)})


def test_features_and_prototypes_have_norm_one():
    features, prototypes = small_head()(torch.randn(3, 2, 7))
    assert features.shape == (3, 2, 5) and prototypes.shape == (29, 5)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3, 2))
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(29))


@pytest.mark.parametrize("train_prototype_norms", [False, True])
def test_norms_are_learned_where_asked(train_prototype_norms):
    head = small_head(train_prototype_norms=train_prototype_norms)
    logits(head, torch.randn(3, 7)).square().sum().backward()
    trained = {name for name, parameter in head.named_parameters() if parameter.grad is not None}
    assert (NORMS in trained) == train_prototype_norms
    assert DIRECTIONS in trained and len(trained) == 7 + train_prototype_norms
    # a direction does not learn to be long
    directions = head.last_layer.parametrizations.weight.original1
    torch.testing.assert_close((directions * directions.grad).sum(dim=1), torch.zeros(29), atol=1e-5, rtol=0)


def test_a_copy_holds_all_that_a_teacher_needs():
    head, teacher = small_head(), small_head()
    teacher.load_state_dict(head.state_dict())
    tokens = torch.randn(3, 7)
    assert torch.equal(logits(teacher, tokens), logits(head, tokens))
    assert torch.equal(logits(copy.deepcopy(head), tokens), logits(head, tokens))


def test_number_of_layers_and_their_start():
    head = small_head(num_layers=1)
    assert [type(layer) for layer in head.mlp] == [nn.Linear] and head.mlp[0].weight.shape == (5, 7)
    head = DINOHead(101, num_prototypes=13, mlp_size=103, bottleneck_size=31)
    assert [type(layer) for layer in head.mlp] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(layer.bias.abs().max() == 0 for layer in head.mlp[::2])
