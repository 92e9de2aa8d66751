# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from two_processes import results_of_two

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.data.masking import describe
from hf_vitreg.objective_options import DINOOptions
from hf_vitreg.objectives.dino import DINOObjective


BATCH_SIZE, NUM_LOCAL, TOTAL_STEPS = 6, 3, 40
OPTIONS = DINOOptions(
    num_prototypes=31,
    head_mlp_size=19,
    head_bottleneck_size=11,
    ibot_num_prototypes=29,
    ibot_head_mlp_size=17,
    ibot_head_bottleneck_size=7,
    koleo_across_processes=True,
)


def backbone(**settings) -> ViTRegModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 12, "patch_size": 4}
    settings = {"use_mask_token": True, "num_register_tokens": 2, "register_init_std": 0.02, **settings}
    return ViTRegModel(ViTRegConfig(**sizes | settings))


def objective(options: DINOOptions = OPTIONS, model: dict | None = None, **changes) -> DINOObjective:
    return DINOObjective(backbone(**model or {}), dataclasses.replace(options, **changes), TOTAL_STEPS)


def batch(images: slice = slice(None), seed: int = 1) -> dict[str, torch.Tensor]:
    """Crops of other sizes, not square, and the masks of some of the global ones."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        "global_crops": torch.randn(BATCH_SIZE, 2, 3, 12, 20, generator=generator)[images],
        "local_crops": torch.randn(BATCH_SIZE, NUM_LOCAL, 3, 8, 12, generator=generator)[images],
    }
    masks = torch.rand(2, BATCH_SIZE, 15, generator=generator) < 0.3
    masks[0, ::2] = False
    masks = describe(masks[:, images].flatten(0, 1))
    return drawn | {"masks": masks.masks, "mask_indices": masks.indices, "mask_weights": masks.weights}


def logits(head, tokens: torch.Tensor) -> torch.Tensor:
    features, prototypes = head(tokens)
    return features @ prototypes.T


def cross_entropy(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return -(targets * (logits / OPTIONS.student_temperature).log_softmax(dim=-1)).sum(dim=-1)


def sinkhorn(teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """As it is written, on all rows at once."""
    rows = teacher_logits.flatten(0, -2)
    shares = (rows / temperature).exp().double()
    for _ in range(3):
        shares = shares / shares.sum(dim=0, keepdim=True) / shares.shape[1]
        shares = shares / shares.sum(dim=1, keepdim=True) / shares.shape[0]
    return (shares * len(rows)).float().view_as(teacher_logits)


def written_out(trained: DINOObjective, given: dict[str, torch.Tensor], temperature: float) -> dict[str, torch.Tensor]:
    """DINOv2's losses with whole logits, crop by crop and image by image."""
    crops = [*given["global_crops"].unbind(1), *given["local_crops"].unbind(1)]
    masks = given["masks"].unflatten(0, (2, -1))
    student, teacher = trained.student, trained.teacher
    patch_heads = (student.ibot_head or student.head, teacher.ibot_head or teacher.head)
    seen = [student.backbone(crop, masks[i] if i < 2 else None) for i, crop in enumerate(crops)]
    whole = [teacher.backbone(crop) for crop in crops[:2]]
    sharpen = sinkhorn if trained.options.centering == "sinkhorn_knopp" else lambda x, t: (x / t).softmax(dim=-1)

    on_cls = torch.stack([logits(teacher.head, outputs.last_hidden_state[:, 0]) for outputs in whole])
    targets = sharpen(on_cls, temperature)
    predictions = [logits(student.head, outputs.last_hidden_state[:, 0]) for outputs in seen]
    pairs = [(s, t) for s in range(len(crops)) for t in range(2) if s != t]
    dino = sum(cross_entropy(targets[t], predictions[s]).mean() for s, t in pairs) / len(pairs)

    masked = torch.cat([outputs.patch_tokens[mask] for outputs, mask in zip(whole, masks)])
    targets = sharpen(logits(patch_heads[1], masked), temperature)
    ibot, first = 0.0, 0
    for outputs, crop_masks in zip(seen, masks):
        for patches, mask in zip(outputs.patch_tokens, crop_masks):
            if mask.any():
                own = targets[first : first + mask.sum()]
                ibot = ibot + cross_entropy(own, logits(patch_heads[0], patches[mask])).mean()
                first += mask.sum()

    koleo = 0.0
    for outputs in seen[:2]:
        cls = F.normalize(outputs.last_hidden_state[:, 0], dim=-1)
        distances = torch.cdist(cls, cls) + 10 * torch.eye(len(cls))
        koleo = koleo - distances.min(dim=1).values.log().mean()
    return {"dino_loss": dino, "ibot_loss": ibot / (2 * BATCH_SIZE), "koleo_loss": koleo}


@pytest.mark.parametrize("centering", ["softmax", "sinkhorn_knopp"])
@pytest.mark.parametrize("separate_ibot_head", [False, True])
def test_the_loss_is_that_of_dinov2_written_out(centering, separate_ibot_head):
    trained = objective(centering=centering, separate_ibot_head=separate_ibot_head, ibot_weight=0.7)
    given = batch()
    assert_is_written_out(trained, given)


@pytest.mark.parametrize(
    "settings",
    [
        {"position_embedding_type": "rope"},
        {"use_swiglu_ffn": True, "layerscale_value": 0.3},
        {"num_hidden_layers": 1},
        {"final_norm": "untied"},
    ],
    ids=str,
)
def test_the_loss_is_that_of_other_backbones_too(settings):
    assert_is_written_out(objective(ibot_weight=0.7, model=settings), batch())


def assert_is_written_out(trained: DINOObjective, given: dict[str, torch.Tensor]) -> None:
    loss, metrics = trained(given, step=0)
    expected = written_out(trained, given, OPTIONS.teacher_temperature_start)
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-4, atol=1e-5)
    total = expected["dino_loss"] + 0.7 * expected["ibot_loss"] + 0.1 * expected["koleo_loss"]
    torch.testing.assert_close(loss, total, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(loss, list(trained.student.backbone.encoder.parameters()))
    theirs = torch.autograd.grad(total, list(trained.student.backbone.encoder.parameters()))
    for found, wanted in zip(ours, theirs):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("anchors", [False, True])
def test_the_last_layer_computes_what_losses_read(anchors):
    trained, seen = objective(gram_weight=float(anchors)), {"student": [], "teacher": []}
    for name, sizes in seen.items():
        mlp = getattr(trained, name).backbone.encoder.layer[-1].mlp
        mlp.register_forward_pre_hook(lambda _, given, sizes=sizes: sizes.append(given[0].shape[:-1].numel()))
    given = batch()
    given["gram_crops"] = given["global_crops"]
    _, metrics = trained(given, 0)
    num_read = 2 * BATCH_SIZE + len(given["mask_indices"])
    assert seen["student"] == [2 * BATCH_SIZE * 18 if anchors else num_read, NUM_LOCAL * BATCH_SIZE]
    assert seen["teacher"] == [num_read]
    for name, value in written_out(trained, given, OPTIONS.teacher_temperature_start).items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-4, atol=1e-5)


def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none():
    trained = objective()
    trained(batch(), step=0)[0].backward()
    without = {name for name, parameter in trained.student.named_parameters() if parameter.grad is None}
    assert without == {"head.last_layer.parametrizations.weight.original0"}  # norms that stay 1
    assert trained.student.backbone.embeddings.register_tokens.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in trained.teacher.parameters())


def test_the_teacher_follows_the_student_and_is_what_is_exported():
    trained = objective(teacher_momentum=0.75, teacher_momentum_end=0.75)
    before = trained.teacher.backbone.embeddings.register_tokens.clone()
    with torch.no_grad():
        trained.student.backbone.embeddings.register_tokens.add_(1.0)
    trained.after_step(0)
    torch.testing.assert_close(trained.exportable().embeddings.register_tokens, before + 0.25)
    assert trained.exportable() is trained.features() is trained.teacher.backbone
    assert type(trained.exportable().encoder.layer[0]).__name__ == "ViTRegLayer"


def test_teachers_have_no_training_mode():
    trained = objective(gram_weight=1.0)
    trained.train()
    assert trained.student.training
    assert not trained.teacher.training and not trained.gram_teacher.training


def test_centers_see_every_batch_of_a_step_and_move_once():
    together, apart = objective(), objective()
    given = batch()
    halves = [batch(slice(0, BATCH_SIZE // 2)), batch(slice(BATCH_SIZE // 2, None))]
    together(given, 0)
    for half in halves:
        apart(half, 0)
    assert not apart.center.center.any()
    together.after_step(0)
    apart.after_step(0)
    assert together.center.center.any()
    torch.testing.assert_close(apart.center.center, together.center.center)
    torch.testing.assert_close(apart.ibot_center.center, together.ibot_center.center)


def test_measuring_moves_no_center():
    trained = objective().eval()
    trained(batch(), 0)
    trained.after_step(0)
    assert not trained.center.center.any()


def test_without_masks_there_is_no_loss_on_patches_and_no_mask_token_is_asked_for():
    trained = DINOObjective(backbone(use_mask_token=False), dataclasses.replace(OPTIONS, ibot_weight=0.0), TOTAL_STEPS)
    given = {name: crops for name, crops in batch().items() if "mask" not in name}
    loss, metrics = trained(given, 0)
    assert "ibot_loss" not in metrics
    loss.backward()
    with pytest.raises(ValueError, match="--ibot_weight 0"):
        DINOObjective(backbone(use_mask_token=False), OPTIONS, TOTAL_STEPS)


def test_without_local_crops_the_global_ones_are_compared():
    given = batch()
    given["local_crops"] = given["local_crops"][:, :0]
    assert objective()(given, 0)[0].isfinite()


def test_what_shows_a_collapse_is_a_share_of_the_most_it_could_be():
    trained = objective(teacher_temperature_start=1e4, teacher_temperature=1e4)
    _, metrics = trained(batch(), 0)
    assert metrics["teacher_entropy"].item() == pytest.approx(1, abs=1e-4)
    assert metrics["target_entropy"].item() == pytest.approx(1, abs=1e-4)
    trained = objective(teacher_temperature_start=1e-4, teacher_temperature=1e-4)
    with torch.no_grad():
        trained.teacher.backbone.layernorm.weight.zero_()
        trained.teacher.backbone.layernorm.bias.fill_(1)
    given = batch()
    _, metrics = trained(given, 0)
    assert metrics["target_entropy"].item() == pytest.approx(0, abs=1e-3)


def test_gram_anchors_patches_at_another_resolution():
    trained = objective(gram_weight=2.0)
    given = batch()
    square = {"global_crops": given["global_crops"][..., :12], "local_crops": given["local_crops"]}
    masks = describe(given["masks"][:, :9])
    square |= {"masks": masks.masks, "mask_indices": masks.indices, "mask_weights": masks.weights}
    square["gram_crops"] = F.interpolate(square["global_crops"].flatten(0, 1), (24, 24)).unflatten(0, (-1, 2))
    loss, metrics = trained(square, 0)
    anchor = trained.gram_teacher(square["gram_crops"].transpose(0, 1).flatten(0, 1)).patch_tokens
    anchor = F.interpolate(anchor.mT.unflatten(-1, (6, 6)), (3, 3), mode="bicubic", antialias=True).flatten(-2).mT
    crops = square["global_crops"].transpose(0, 1).flatten(0, 1)
    patches = F.normalize(trained.student.backbone(crops, square["masks"]).patch_tokens, dim=-1)
    anchor = F.normalize(anchor, dim=-1)
    expected = (patches @ patches.mT - anchor @ anchor.mT).square().mean()
    torch.testing.assert_close(metrics["gram_loss"], expected.detach(), rtol=1e-4, atol=1e-6)
    assert loss.isfinite()


def test_the_anchor_is_taken_when_anchoring_starts_and_replaced_as_often_as_allowed():
    options = {"gram_weight": 1.0, "gram_start_ratio": 0.25, "gram_update_steps": 5, "gram_max_updates": 2}
    trained = objective(**options)
    taken = []
    for step in range(TOTAL_STEPS):
        with torch.no_grad():
            trained.teacher.backbone.layernorm.bias.fill_(step + 1)
            trained.student.backbone.layernorm.bias.fill_(step + 1)
        trained.after_step(step)
        if trained.gram_teacher.layernorm.bias[0] == step + 1:
            taken.append(step + 1)
    assert taken == [10, 15, 20]
    given = DINOObjective(backbone(), dataclasses.replace(OPTIONS, **options), TOTAL_STEPS, gram_teacher=backbone())
    assert [step for step in range(TOTAL_STEPS) if given._anchor_is_due(step)] == [15, 20]


def trained_for_two_steps(rank: int, num_processes: int) -> dict[str, dict[str, torch.Tensor]]:
    """The weights after two steps of each kind of centering, as DDP trains them, in float64."""
    found = {}
    for centering in ("softmax", "sinkhorn_knopp"):
        trained = objective(centering=centering, separate_ibot_head=True, teacher_momentum=0.5).double()
        wrapped = trained if num_processes == 1 else torch.nn.parallel.DistributedDataParallel(trained)
        optimizer = torch.optim.SGD([each for each in trained.parameters() if each.requires_grad], lr=0.1)
        part = BATCH_SIZE // num_processes
        for step in range(2):
            own = batch(slice(rank * part, (rank + 1) * part), seed=step)
            loss, _ = wrapped(
                {name: each.double() if each.is_floating_point() else each for name, each in own.items()}, step
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trained.after_step(step)
        found[centering] = trained.state_dict()
    return found


@pytest.mark.slow  # as a whole run in test_pretrain.py
def test_two_processes_are_one_with_the_global_batch(tmp_path):
    results = results_of_two("test_objectives_dino", "trained_for_two_steps", tmp_path)
    expected = trained_for_two_steps(0, 1)
    for found in results:
        for centering, state in expected.items():
            for name, value in state.items():
                torch.testing.assert_close(
                    found[centering][name], value, rtol=1e-5, atol=1e-5, msg=lambda told, name=name: name + told
                )


def test_an_anchor_that_the_teacher_could_not_replace_is_refused_at_once():
    options = dataclasses.replace(OPTIONS, gram_weight=1.0, gram_update_steps=5)
    with pytest.raises(ValueError, match="--gram_update_steps 0"):
        DINOObjective(backbone(), options, TOTAL_STEPS, gram_teacher=backbone(num_register_tokens=0))
    kept = dataclasses.replace(options, gram_update_steps=0)
    DINOObjective(backbone(), kept, TOTAL_STEPS, gram_teacher=backbone(num_register_tokens=0))
