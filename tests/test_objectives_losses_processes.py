# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Two processes compute what one does with the batches of both."""

import pytest
import torch
import torch.nn.functional as F
from two_processes import results_of_two

from hf_vitreg.objectives.losses.contrastive import clip_loss, siglip_loss
from hf_vitreg.objectives.losses.prototypes import Assignment
from hf_vitreg.objectives.losses.regularizers import koleo_loss
from hf_vitreg.objectives.losses.targets import Center, sinkhorn_knopp


BATCH_SIZE, HIDDEN_SIZE, NUM_PROTOTYPES, NUM_MASKED = 12, 7, 19, (11, 0, 3, 9)


def everything(rank: int, num_processes: int) -> dict[str, torch.Tensor]:
    """What a process with its part of the data gets: losses, gradients of a shared weight, centers, targets."""
    torch.manual_seed(0)
    inputs = torch.randn(2, BATCH_SIZE, HIDDEN_SIZE)
    weights = torch.randn(2, HIDDEN_SIZE, HIDDEN_SIZE).requires_grad_()
    scale, bias = torch.tensor(5.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    own = slice(rank * BATCH_SIZE // num_processes, (rank + 1) * BATCH_SIZE // num_processes)
    images, texts = F.normalize(inputs[:, own] @ weights, dim=-1)
    losses = {
        "clip": clip_loss(images, texts, scale),
        "siglip": siglip_loss(images, texts, scale, bias),
        "koleo": koleo_loss(images, across_processes=True),
    }
    found = {name: loss.detach() for name, loss in losses.items()}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, [weights, scale, bias], retain_graph=True, allow_unused=True)
        found |= {f"{name}/{i}": gradient for i, gradient in enumerate(gradients) if gradient is not None}
    return found | teacher_side(rank, num_processes)


def teacher_side(rank: int, num_processes: int) -> dict[str, torch.Tensor]:
    """Two steps of two batches; masked patches are of another number in each, of one batch there are none."""
    prototypes = F.normalize(torch.randn(NUM_PROTOTYPES, HIDDEN_SIZE), dim=1)
    batches = [F.normalize(torch.randn(number, HIDDEN_SIZE), dim=1) for number in NUM_MASKED]
    center, found = Center(NUM_PROTOTYPES), {}
    for step in range(2):
        mine = batches[2 * step : 2 * step + 2]
        for batch in [mine[rank]] if num_processes == 2 else mine:
            center.observe(batch, prototypes)
        center.update()
        rows = mine[rank] if num_processes == 2 else torch.cat(mine)
        teacher = Assignment(rows, prototypes, 0.07)
        balanced = rows @ prototypes.T - sinkhorn_knopp(teacher, chunk_rows=4)
        found[f"targets/{step}"] = (balanced / teacher.temperature).softmax(dim=1)
    return found | {"center": center.center}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """Of two processes that torchrun starts."""
    return results_of_two("test_objectives_losses_processes", "everything", tmp_path_factory.mktemp("processes"))


def test_two_processes_compute_what_one_does(results):
    expected = everything(0, 1)
    assert {name.split("/")[0] for name in expected} == {"clip", "siglip", "koleo", "targets", "center"}
    for name, whole in expected.items():
        parts = [result[name] for result in results]
        if name == "center":
            assert torch.equal(*parts)
        # rows of each process one after the other; losses and gradients as DDP averages them
        joined = torch.cat(parts) if name.startswith("targets/") else (parts[0] + parts[1]) / 2
        torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
