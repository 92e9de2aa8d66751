# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
from reference import COLS, HEIGHT, ROWS, TINY, VARIANTS, WIDTH, tiny_config

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.analysis.cost import NUM_REGISTERS, PAPER_ADDED_FLOPS, register_cost


# of the 24 layers a few have the same proportions
LARGE = {"hidden_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 16}


def flops_by_formula(num_tokens: int) -> int:
    """Two a multiplication: patch embedding, projections and MLP with 12 dim**2 a token, two products of attention."""
    dim, patch_size = TINY["hidden_size"], TINY["patch_size"]
    layer = 12 * num_tokens * dim**2 + 2 * num_tokens**2 * dim
    return 2 * (ROWS * COLS * 3 * patch_size**2 * dim + TINY["num_hidden_layers"] * layer)


def test_flops_are_those_of_the_formula_and_a_register_is_one_vector():
    costs = register_cost(tiny_config())
    assert tuple(costs) == NUM_REGISTERS
    for number, cost in costs.items():
        assert cost.parameters - costs[0].parameters == number * TINY["hidden_size"]
        assert cost.gflops == pytest.approx(flops_by_formula(1 + number + ROWS * COLS) / 1e9, rel=1e-12)
        added = flops_by_formula(1 + number + ROWS * COLS) / flops_by_formula(1 + ROWS * COLS) - 1
        assert cost.added_gflops_percent == pytest.approx(100 * added)


@pytest.mark.parametrize("values", [{}, *VARIANTS.values()])
def test_parameters_are_those_of_the_model(values):
    costs = register_cost(tiny_config(**values), numbers=(3, 0))
    assert list(costs) == [3, 0]
    for number, cost in costs.items():
        model = ViTRegModel(tiny_config(**{**values, "num_register_tokens": number}))
        assert cost.parameters == model.num_parameters()
    assert costs[0].added_parameters_percent == costs[0].added_gflops_percent == 0
    assert costs[3].added_parameters_percent == pytest.approx(100 * (costs[3].parameters / costs[0].parameters - 1))


def test_the_papers_figures_stand_beside():
    costs = register_cost(ViTRegConfig(image_size=224, patch_size=14, **LARGE), numbers=(4, 8, 16))
    assert {number: cost.paper_added_flops_percent for number, cost in costs.items()} == {4: 2, 8: None, 16: 6}
    assert costs[4].added_gflops_percent < PAPER_ADDED_FLOPS[4]
    # the paper rounds to "up to 6 %"
    assert costs[16].added_gflops_percent == pytest.approx(PAPER_ADDED_FLOPS[16], abs=0.5)


def test_larger_images_make_registers_cheaper():
    small, large = (register_cost(tiny_config(), (16,), size)[16] for size in [None, (2 * HEIGHT, 3 * WIDTH)])
    assert large.gflops > 5 * small.gflops
    assert large.added_gflops_percent < small.added_gflops_percent / 3


def test_config_is_left_as_it_was():
    config = tiny_config(attn_implementation="sdpa")
    before = config.to_dict()
    register_cost(config, numbers=(1,))
    assert config.to_dict() == before and config._attn_implementation == "sdpa"


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="must be 0 or more, got 4, -1"):
        register_cost(tiny_config(), numbers=(4, -1))


def test_a_model_with_test_time_registers_costs_what_its_sizes_do():
    plain = tiny_config(num_register_tokens=0)
    shifted = tiny_config(num_register_tokens=2, num_test_time_registers=2, register_neurons={1: [3, 0]})
    assert register_cost(shifted) == register_cost(plain)
