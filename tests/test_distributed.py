# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import torch

from hf_vitreg.distributed import derived_seed, forked_rng


def test_derived_seeds_are_stable_and_distinct():
    seeds = {derived_seed(seed, epoch, index) for seed in range(5) for epoch in range(7) for index in range(11)}
    assert len(seeds) == 5 * 7 * 11
    assert derived_seed(1, 2, 3) == derived_seed(1, 2, 3) != derived_seed(12, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_forked_rng_repeats_and_leaves_no_trace():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with forked_rng(5):
        first = torch.rand(7)
    with forked_rng(5):
        assert torch.equal(first, torch.rand(7))
    assert torch.equal(before, torch.get_rng_state())
