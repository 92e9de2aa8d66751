# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch

from hf_vitreg.deployment.timing import WARM_UP_ROUNDS, alternate, ratio, summary


CPU = torch.device("cpu")


def test_all_take_turns_in_changing_orders():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = alternate(candidates, 5, CPU, progress=False)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 5, "b": 5, "c": 5}
    rounds = [tuple(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == 5 + WARM_UP_ROUNDS and len(set(rounds)) > 2
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert all(each > 0 for values in seconds.values() for each in values)


def test_a_single_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be 2 or more, got 1"):
        alternate({}, 1, CPU, progress=False)


def test_ratios_are_within_rounds():
    """A machine that is twice as slow in one round is that for both."""
    ours, theirs = [1.0, 2.0, 1.0, 4.0], [3.0, 6.0, 3.0, 12.0]
    assert ratio(theirs, ours) == (3.0, (3.0, 3.0))
    rows = summary({"hf_vitreg": ours, "peer": theirs})
    assert rows["peer"] == {"median_ms": 4500.0, "ratio_to_ours": 3.0, "ratio_quartiles": [3.0, 3.0]}
    assert rows["hf_vitreg"]["ratio_to_ours"] == 1.0
    assert summary({"hf_vitreg": ours, "peer": theirs}, ours="peer")["hf_vitreg"]["ratio_to_ours"] == 1 / 3
