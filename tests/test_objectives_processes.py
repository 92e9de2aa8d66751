# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A step of an objective in two processes of DDP or FSDP is that of one process with the batches of both."""

import dual_encoders
import pytest
import torch
from reference import COLS, ROWS, VARIANTS, images, tiny_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from two_processes import results_of_two

from hf_vitreg import ViTRegForImageClassification, ViTRegModel
from hf_vitreg.objective_options import PostHocOptions, SupervisedOptions
from hf_vitreg.objectives.base import Objective
from hf_vitreg.objectives.post_hoc import PostHocObjective
from hf_vitreg.objectives.supervised import SupervisedObjective
from hf_vitreg.registers.post_hoc import draw_views
from hf_vitreg.registers.warm_start import add_registers


BATCH_SIZE, NUM_LABELS = 8, 11


def objectives() -> dict[str, Objective]:
    torch.manual_seed(0)
    plain = tiny_config(classifier_layout="cls_mean", use_mask_token=True)
    distilled = tiny_config(**VARIANTS["distilled"])
    without = ViTRegModel(tiny_config(num_register_tokens=0, use_mask_token=True))
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 21 * 49, NUM_LABELS)).requires_grad_(False)
    return {
        "supervised": SupervisedObjective(ViTRegForImageClassification(plain), SupervisedOptions(), 0.75),
        "distilled": SupervisedObjective(
            ViTRegForImageClassification(distilled), SupervisedOptions(classification_loss="ce"), teacher=teacher
        ),
        "clip": dual_encoders.objective(ema_decay=0.75, vision={"use_mask_token": True}),
        "siglip": dual_encoders.objective(contrastive_loss="siglip"),
        "post_hoc": PostHocObjective(without, add_registers(without, 2), PostHocOptions(), torch.zeros(3)),
    }


def everything(rank: int, num_processes: int) -> dict[str, torch.Tensor]:
    """Loss, gradients and weights after a step, of a process with its part of the batch."""
    found = {}
    for kind, objective in objectives().items():
        called = DistributedDataParallel(objective) if num_processes > 1 else objective
        loss = after_a_step(kind, called, objective, rank, num_processes)
        found[f"{kind}/loss"] = loss
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad:
                found[f"{kind}/{name}/gradient"] = parameter.grad
        found |= {f"{kind}/{name}": tensor for name, tensor in objective.state_dict().items()}
    return found | exported(rank, num_processes)


def exported(rank: int, num_processes: int) -> dict[str, torch.Tensor]:
    """What is published after a step, by two processes with the weights sharded."""
    found = {}
    for kind, objective in objectives().items():
        if num_processes > 1:
            mesh = init_device_mesh("cpu", (num_processes,))
            layers = [each for each in objective.modules() if type(each).__name__ in objective._no_split_modules]
            for part in (*layers, objective):
                fully_shard(part, mesh=mesh)
        after_a_step(kind, objective, objective, rank, num_processes)
        for name, tensor in objective.exportable().state_dict().items():
            found[f"exported {kind}/{name}"] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found


def after_a_step(kind: str, called, objective: Objective, rank: int, num_processes: int) -> torch.Tensor:
    """The loss of this process's part of the batch; the weights have moved."""
    torch.manual_seed(1)
    own = slice(rank * BATCH_SIZE // num_processes, (rank + 1) * BATCH_SIZE // num_processes)
    labelled = {"pixel_values": images(batch_size=BATCH_SIZE), "labels": torch.randint(NUM_LABELS, (BATCH_SIZE,))}
    whole = dual_encoders.batch() if kind in ("clip", "siglip") else labelled
    if kind == "post_hoc":
        views = draw_views(BATCH_SIZE, 3, (ROWS, COLS), 0.4, 0.5, torch.Generator().manual_seed(3))
        whole = {**labelled, "view_shifts": views.shifts, "view_flips": views.flips}
    loss, _ = called({name: tensor[own] for name, tensor in whole.items()}, 0)
    loss.backward()
    torch.optim.SGD([each for each in objective.parameters() if each.requires_grad], lr=0.1).step()
    objective.after_step(0)
    return loss.detach()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """Of two processes that torchrun starts."""
    return results_of_two("test_objectives_processes", "everything", tmp_path_factory.mktemp("processes"))


def test_a_step_of_two_processes_is_that_of_one(results):
    expected = everything(0, 1)
    kinds = list(objectives())
    assert {name.split("/")[0] for name in expected} == {*kinds, *(f"exported {kind}" for kind in kinds)}
    assert results[0].keys() == results[1].keys() == expected.keys()
    for name, whole in expected.items():
        first, second = (result[name] for result in results)
        if not name.endswith("/loss"):
            assert torch.equal(first, second), name
        torch.testing.assert_close(
            (first + second) / 2, whole, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
