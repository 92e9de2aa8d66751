# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import torch
import torch.nn.functional as F
from loss_cases import CENTER_MOMENTUM, TEACHER_TEMPERATURE
from original_outputs import load

from hf_vitreg.objectives.losses.prototypes import Assignment
from hf_vitreg.objectives.losses.targets import Center, sinkhorn_knopp


NUM_ROWS, BOTTLENECK_SIZE, NUM_PROTOTYPES = 23, 7, 11


def teacher(temperature: float = 0.07, num_rows: int = NUM_ROWS, dtype=torch.float64) -> Assignment:
    features = F.normalize(torch.randn(num_rows, BOTTLENECK_SIZE, dtype=dtype), dim=1)
    return Assignment(
        features, F.normalize(torch.randn(NUM_PROTOTYPES, BOTTLENECK_SIZE, dtype=dtype), dim=1), temperature
    )


def targets(given: Assignment, center: torch.Tensor) -> torch.Tensor:
    return ((given.features @ given.prototypes.T - center) / given.temperature).softmax(dim=1)


def plain_sinkhorn_knopp(given: Assignment, num_iterations: int) -> torch.Tensor:
    """What the docstring says, on the whole matrix: `(rows, num_prototypes)`."""
    assigned = (given.features @ given.prototypes.T / given.temperature).exp()
    for _ in range(num_iterations):
        assigned = assigned / assigned.sum(dim=0) / assigned.shape[1]
        assigned = assigned / assigned.sum(dim=1, keepdim=True) / assigned.shape[0]
    return assigned * assigned.shape[0]


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("chunk_rows", [1, 6, 1000])
def test_sinkhorn_knopp_is_that_of_the_formula(num_iterations, chunk_rows):
    given = teacher()
    center = sinkhorn_knopp(given, num_iterations, chunk_rows)
    torch.testing.assert_close(
        targets(given, center), plain_sinkhorn_knopp(given, num_iterations), rtol=1e-10, atol=1e-14
    )


def test_sinkhorn_knopp_balances_rows_and_prototypes():
    given = teacher(temperature=0.3)
    found = targets(given, sinkhorn_knopp(given, num_iterations=200))
    torch.testing.assert_close(found.sum(dim=1), torch.ones(NUM_ROWS, dtype=torch.float64))
    share = torch.full((NUM_PROTOTYPES,), NUM_ROWS / NUM_PROTOTYPES, dtype=torch.float64)
    torch.testing.assert_close(found.sum(dim=0), share)


def test_sinkhorn_knopp_does_not_see_what_all_rows_prefer():
    """One prototype that everybody likes gets its share and no more."""
    given = teacher(temperature=0.3)
    crowded = torch.cat([given.features, 9 * torch.ones(NUM_ROWS, 1, dtype=torch.float64)], dim=1)
    prototypes = torch.cat([given.prototypes, torch.zeros(NUM_PROTOTYPES, 1, dtype=torch.float64)], dim=1)
    prototypes[3, -1] = 1
    moved = given._replace(features=crowded, prototypes=prototypes)
    before, after = (targets(x, sinkhorn_knopp(x, num_iterations=3)) for x in (given, moved))
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("name", ["cls", "patches"])
def test_sinkhorn_knopp_is_that_of_the_original_code(name):
    _, given, expected = load("dinov2_losses")
    features = given[f"teacher_{name}"].flatten(0, -2)
    assignment = Assignment(features, given["teacher_prototypes"], TEACHER_TEMPERATURE)
    found = targets(assignment, sinkhorn_knopp(assignment, chunk_rows=8))
    assert (found - expected[f"targets/sinkhorn/{name}"]).abs().max() < 1e-6


def test_sinkhorn_knopp_in_float32_is_exact_to_a_millionth_at_the_sharpest_temperature():
    given = teacher(temperature=0.04, num_rows=101, dtype=torch.float32)
    double = given._replace(features=given.features.double(), prototypes=given.prototypes.double())
    found = targets(given, sinkhorn_knopp(given, chunk_rows=16))
    assert (found - plain_sinkhorn_knopp(double, 3)).abs().max() < 2e-6
    assert (found.sum(dim=1) - 1).abs().max() < 1e-6


def test_sinkhorn_knopp_does_not_overflow():
    """The formula itself makes infinities of these."""
    given = teacher(temperature=0.002, dtype=torch.float32)
    assert not plain_sinkhorn_knopp(given, 3).isfinite().all()
    found = targets(given, sinkhorn_knopp(given))
    torch.testing.assert_close(found.sum(dim=1), torch.ones(NUM_ROWS))


def test_sinkhorn_knopp_takes_no_rows_and_refuses_no_iterations():
    given = teacher()
    assert sinkhorn_knopp(given._replace(features=given.features[:0])).shape == (NUM_PROTOTYPES,)
    with pytest.raises(ValueError, match="num_iterations must be at least 1, got 0"):
        sinkhorn_knopp(given, num_iterations=0)


@pytest.mark.parametrize("name", ["cls", "patches"])
def test_center_is_that_of_the_original_code(name):
    _, given, expected = load("dinov2_losses")
    features, prototypes = given[f"teacher_{name}"], given["teacher_prototypes"]
    center = Center(len(prototypes), CENTER_MOMENTUM)
    for _ in range(2):
        center.observe(features, prototypes)
        center.update()
    torch.testing.assert_close(center.center, expected[f"center/{name}"], rtol=1e-5, atol=1e-7)
    assignment = Assignment(features, prototypes, TEACHER_TEMPERATURE)
    found = targets(assignment._replace(features=features.flatten(0, -2)), center.center)
    assert (found - expected[f"targets/center/{name}"]).abs().max() < 1e-6


def test_center_by_hand():
    center = Center(2, momentum=0.75)
    center.observe(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([[6.0, 0.0], [0.0, 3.0]]))
    assert center.center.tolist() == [0, 0]
    center.update()
    assert center.center.tolist() == pytest.approx([0.25 * 4, 0.25 * 1])
    center.observe(torch.tensor([[0.0, 1.0]]), torch.tensor([[6.0, 0.0], [0.0, 3.0]]))
    center.update()
    assert center.center.tolist() == pytest.approx([0.75 * 1, 0.75 * 0.25 + 0.25 * 3])


def test_center_of_accumulated_batches_is_that_of_one_batch():
    """However many rows each has."""
    given = teacher(dtype=torch.float32)
    whole, accumulated = Center(NUM_PROTOTYPES), Center(NUM_PROTOTYPES)
    whole.observe(given.features, given.prototypes)
    for part in given.features.split([3, 0, 11, 9]):
        accumulated.observe(part, given.prototypes)
    whole.update(), accumulated.update()
    torch.testing.assert_close(accumulated.center, whole.center)
    expected = 0.1 * (given.features @ given.prototypes.T).mean(dim=0)
    torch.testing.assert_close(whole.center, expected)


def test_center_stays_where_nothing_was_observed():
    center = Center(NUM_PROTOTYPES)
    center.center.normal_()
    before = center.center.clone()
    center.update()
    center.observe(torch.empty(0, BOTTLENECK_SIZE), torch.ones(NUM_PROTOTYPES, BOTTLENECK_SIZE))
    center.update()
    assert torch.equal(center.center, before)


def test_center_is_saved_and_what_waits_is_no_buffer():
    center = Center(NUM_PROTOTYPES)
    center.observe(torch.ones(1, BOTTLENECK_SIZE), torch.ones(NUM_PROTOTYPES, BOTTLENECK_SIZE))
    assert list(center.state_dict()) == ["center"] and len(list(center.buffers())) == 1
