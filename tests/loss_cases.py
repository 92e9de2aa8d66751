# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Features, masks and schedules from seeds, and what the original repositories' losses make of them.

`python tests/loss_cases.py DINOV2 DINOV3 DEIT`, with folders of the three repositories at the commits below, writes
fixtures/*_losses.safetensors. `all_reduce` does nothing there, since one process ran; DINOv2 calls it without asking.
"""

import itertools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hf_vitreg.distributed import derived_seed


FIXTURES = Path(__file__).parent / "fixtures"
REPOSITORIES = {
    "dinov2_losses": ("facebookresearch/dinov2", "b8931f7bf91576930313be2c6d6af376033b35f0", "Apache-2.0"),
    "dinov3_losses": ("facebookresearch/dinov3", "6876159a11b4df116f30f667f8c9888617df0751", "DINOv3 License"),
    "deit_losses": ("facebookresearch/deit", "7e160fe43f0252d17191b71cbb5826254114ea5b", "Apache-2.0"),
}
SEED = 12
NUM_GLOBAL, NUM_LOCAL, BATCH_SIZE, NUM_PATCHES = 2, 3, 5, 11
HIDDEN_SIZE, MLP_SIZE, BOTTLENECK_SIZE, NUM_PROTOTYPES = 17, 13, 7, 97
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE, CENTER_MOMENTUM = 0.1, 0.07, 0.9
# seed, crops, rows, cols
MASKS = [(0, 8, 16, 16), (1, 7, 7, 13), (2, 2, 8, 8), (3, 12, 16, 11), (4, 1, 5, 3)]
SCHEDULES = {
    "learning_rate": {"base_value": 4e-3, "final_value": 1e-6, "total_iters": 101, "warmup_iters": 13},
    "weight_decay": {"base_value": 0.04, "final_value": 0.4, "total_iters": 101},
    "momentum": {"base_value": 0.992, "final_value": 1, "total_iters": 101},
    "teacher_temperature": {
        "base_value": 0.07,
        "final_value": 0.07,
        "total_iters": 31,
        "warmup_iters": 31,
        "start_warmup_value": 0.04,
    },
    "frozen": {
        "base_value": 2.0,
        "final_value": 0.5,
        "total_iters": 43,
        "warmup_iters": 7,
        "start_warmup_value": 0.3,
        "freeze_iters": 5,
    },
    "one_warmup_step": {"base_value": 2.0, "final_value": 0.5, "total_iters": 5, "warmup_iters": 1},
}


def tensors() -> dict[str, torch.Tensor]:
    """Everything that goes into a loss; features and prototypes have norm 1."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    masks = torch.rand(NUM_GLOBAL * BATCH_SIZE, NUM_PATCHES, generator=generator) < 0.4
    masks[3] = False
    num_masked = int(masks.sum())
    features = {
        "student_cls": normal(NUM_GLOBAL + NUM_LOCAL, BATCH_SIZE, BOTTLENECK_SIZE),
        "teacher_cls": normal(NUM_GLOBAL, BATCH_SIZE, BOTTLENECK_SIZE),
        "student_patches": normal(num_masked, BOTTLENECK_SIZE),
        "teacher_patches": normal(num_masked, BOTTLENECK_SIZE),
        "student_prototypes": normal(NUM_PROTOTYPES, BOTTLENECK_SIZE),
        "teacher_prototypes": normal(NUM_PROTOTYPES, BOTTLENECK_SIZE),
    }
    return {
        **{name: F.normalize(tensor, dim=-1) for name, tensor in features.items()},
        "masks": masks,
        "backbone_cls": normal(BATCH_SIZE, HIDDEN_SIZE) * 3 + 1,
        "tokens": normal(BATCH_SIZE, NUM_PATCHES, HIDDEN_SIZE),
        "student_patch_tokens": normal(BATCH_SIZE, NUM_PATCHES, HIDDEN_SIZE),
        "teacher_patch_tokens": normal(BATCH_SIZE, NUM_PATCHES, HIDDEN_SIZE),
        "logits": 3 * normal(BATCH_SIZE, HIDDEN_SIZE),
        "teacher_logits": 3 * normal(BATCH_SIZE, HIDDEN_SIZE),
    }


def dinov2_losses(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As dinov2/train/ssl_meta_arch.py calls them, its factors included."""
    from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss

    dino, ibot = DINOLoss(NUM_PROTOTYPES, center_momentum=CENTER_MOMENTUM), iBOTPatchLoss(NUM_PROTOTYPES)
    teacher_cls = (given["teacher_cls"] @ given["teacher_prototypes"].T).flatten(0, 1)
    teacher_patches = given["teacher_patches"] @ given["teacher_prototypes"].T
    for _ in range(2):
        dino.update_center(teacher_cls)
        dino.apply_center_update()
        ibot.update_center(teacher_patches[None])
        ibot.apply_center_update()
    num_masked = torch.tensor([len(teacher_patches)])
    targets = {
        "center/cls": dino.softmax_center_teacher(teacher_cls, TEACHER_TEMPERATURE),
        "center/patches": ibot.softmax_center_teacher(teacher_patches[None], TEACHER_TEMPERATURE)[0],
        "sinkhorn/cls": dino.sinkhorn_knopp_teacher(teacher_cls, TEACHER_TEMPERATURE),
        "sinkhorn/patches": ibot.sinkhorn_knopp_teacher(teacher_patches, TEACHER_TEMPERATURE, num_masked),
    }
    found = {f"targets/{name}": tensor for name, tensor in targets.items()}
    found |= {"center/cls": dino.center[0], "center/patches": ibot.center.flatten()}
    for centering in ("center", "sinkhorn"):
        student = {
            name: given[f"student_{name}"].clone().requires_grad_() for name in ("cls", "patches", "prototypes")
        }
        of_crops = targets[f"{centering}/cls"].view(NUM_GLOBAL, BATCH_SIZE, -1)
        logits = student["cls"] @ student["prototypes"].T
        num_terms = NUM_LOCAL * NUM_GLOBAL + (NUM_GLOBAL - 1) * NUM_GLOBAL
        local_loss = dino(list(logits[NUM_GLOBAL:]), list(of_crops)) / num_terms
        # teacher crops in reverse order, so that each student crop meets the other one
        global_loss = dino([logits[:NUM_GLOBAL].flatten(0, 1)], [of_crops.flip(0).flatten(0, 1)]) * 2 / num_terms
        patch_loss = ibot.forward_masked(
            student["patches"] @ student["prototypes"].T,
            targets[f"{centering}/patches"],
            student_masks_flat=given["masks"],
        )
        losses = {"dino": local_loss + global_loss, "ibot": patch_loss}
        for name, loss in losses.items():
            parts = [student["cls" if name == "dino" else "patches"], student["prototypes"]]
            gradients = torch.autograd.grad(loss, parts)
            found |= {f"{name}/{centering}": loss, f"{name}/{centering}/gradient/features": gradients[0]}
            found |= {f"{name}/{centering}/gradient/prototypes": gradients[1]}
    cls = given["backbone_cls"].clone().requires_grad_()
    koleo = KoLeoLoss()(cls)
    return found | {"koleo": koleo, "koleo/gradient": torch.autograd.grad(koleo, cls)[0]}


def reseeding(generator: Callable, seed: int) -> Callable:
    """The original generator of masks, with `random` seeded anew before each mask and before they are shuffled."""
    seeds = (derived_seed(seed, position) for position in itertools.count())

    def call(num_masked: int):
        mask = generator(num_masked)
        random.seed(next(seeds))
        return mask

    random.seed(next(seeds))
    return call


def dinov2_rest(given: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State dict of a head with its logits, masks, schedules."""
    from dinov2.data import MaskingGenerator, collate_data_and_cast
    from dinov2.layers import DINOHead
    from dinov2.utils.utils import CosineScheduler

    torch.manual_seed(SEED)
    head = DINOHead(HIDDEN_SIZE, NUM_PROTOTYPES, hidden_dim=MLP_SIZE, bottleneck_dim=BOTTLENECK_SIZE)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
        head.last_layer.weight_g.abs_().add_(0.5)
    found = {"head": head(given["tokens"])}
    for seed, num_crops, rows, cols in MASKS:
        empty = ({"global_crops": [torch.zeros(1)] * num_crops, "local_crops": [torch.zeros(1)]}, None)
        generator = reseeding(MaskingGenerator((rows, cols), max_num_patches=0.5 * rows * cols), seed)
        batch = collate_data_and_cast([empty], (0.1, 0.5), 0.5, torch.float32, rows * cols, generator)
        names = ("collated_masks", "mask_indices_list", "masks_weight")
        found |= {f"masks/{seed}/{name}": batch[full] for name, full in zip(("masks", "indices", "weights"), names)}
    for name, arguments in SCHEDULES.items():
        found[f"schedule/{name}"] = torch.tensor(CosineScheduler(**arguments).schedule, dtype=torch.float64)
    return dict(head.state_dict()), found


def dinov3_losses(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The Gram loss in its three variants."""
    from dinov3.loss.gram_loss import GramLoss

    variants = {"keep": (False, False), "drop": (True, False), "drop_teacher": (False, True)}
    found = {}
    for name, (both, teacher_only) in variants.items():
        student = given["student_patch_tokens"].clone().requires_grad_()
        loss = GramLoss(remove_neg=both, remove_only_teacher_neg=teacher_only)(student, given["teacher_patch_tokens"])
        found |= {f"gram/{name}": loss, f"gram/{name}/gradient": torch.autograd.grad(loss, student)[0]}
    return found


def deit_losses(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Distillation alone, without the loss on labels."""
    from losses import DistillationLoss

    found = {}
    for kind in ("soft", "hard"):
        teacher = mock.Mock(return_value=given["teacher_logits"])
        criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), teacher, kind, alpha=1.0, tau=3.0)
        found[kind] = criterion(None, (given["logits"], given["logits"]), torch.zeros(BATCH_SIZE, dtype=torch.long))
    return found


def write(name: str, given: dict, found: dict, state: dict | None = None) -> None:
    """One file as fixtures/README.md describes them."""
    repository, commit, licence = REPOSITORIES[name]
    parts = {"state": state or {}, "input": given, "output": found}
    flat = {
        f"{part}/{own_name}": tensor.detach().clone().contiguous()
        for part, named in parts.items()
        for own_name, tensor in named.items()
    }
    arguments = {
        "student_temp": STUDENT_TEMPERATURE,
        "teacher_temp": TEACHER_TEMPERATURE,
        "center_momentum": CENTER_MOMENTUM,
        "n_iterations": 3,
    }
    metadata = {
        "repository": repository,
        "commit": commit,
        "license": licence,
        "class": "see tests/loss_cases.py",
        "arguments": json.dumps(arguments if name == "dinov2_losses" else {}),
        "torch": torch.__version__,
        "seed": str(SEED),
    }
    save_file(flat, FIXTURES / f"{name}.safetensors", metadata)


def main(dinov2: str, dinov3: str, deit: str) -> None:
    given = tensors()
    sys.path[:0] = [dinov2, dinov3, deit]
    with mock.patch("torch.distributed.all_reduce"):
        state, rest = dinov2_rest(given)
        write("dinov2_losses", given, dinov2_losses(given) | rest, state)
    write("dinov3_losses", given, dinov3_losses(given))
    write("deit_losses", given, deit_losses(given))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
