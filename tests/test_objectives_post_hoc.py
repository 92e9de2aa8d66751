# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import copy

import planted
import pytest
import torch
import torch.nn.functional as F
from reference import COLS, PATCH_SIZE, ROWS, VARIANTS, images, randomize, tiny_config

from hf_vitreg import ViTRegModel
from hf_vitreg.evaluation.monitoring import patch_outliers
from hf_vitreg.objective_options import PostHocOptions
from hf_vitreg.objectives.post_hoc import PostHocObjective
from hf_vitreg.pretrain_recipe import PretrainOptimizerOptions
from hf_vitreg.registers.post_hoc import Views, denoised_features, draw_views
from hf_vitreg.registers.warm_start import add_registers
from hf_vitreg.training.optim import pretraining_groups


BATCH_SIZE, NUM_REGISTERS, NUM_VIEWS = 3, 6, 4
FILL = torch.tensor([1.0, 2.0, 3.0])


def models(variant: str = "default", **overrides) -> tuple[ViTRegModel, ViTRegModel]:
    settings = {**VARIANTS.get(variant, {}), "num_register_tokens": 0, **overrides}
    teacher = randomize(ViTRegModel(tiny_config(**settings)))
    return teacher, add_registers(teacher, NUM_REGISTERS, 0.3)


def objective(variant: str = "default", **options) -> PostHocObjective:
    return PostHocObjective(*models(variant), PostHocOptions(**options), FILL)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    pixel_values = images(batch_size=BATCH_SIZE)
    generator = torch.Generator().manual_seed(1)
    views = draw_views(BATCH_SIZE, NUM_VIEWS, (ROWS, COLS), 0.4, 0.5, generator)
    return {"pixel_values": pixel_values, "view_shifts": views.shifts, "view_flips": views.flips}


def test_the_loss_is_the_distance_to_the_mean_of_the_teachers_views(batch):
    distilled = objective(cosine_weight=0.7, mse_weight=0.3)
    loss, metrics = distilled(batch, 0)
    views = Views(batch["view_shifts"], batch["view_flips"])
    with torch.no_grad():
        target = denoised_features(
            lambda view: distilled.teacher(view).patch_tokens, batch["pixel_values"], views, PATCH_SIZE, FILL
        )
        tokens = distilled.student(batch["pixel_values"]).last_hidden_state
    patches = tokens[:, 1 + NUM_REGISTERS :]
    cosine = 1 - (F.normalize(patches, dim=-1) * F.normalize(target, dim=-1)).sum(dim=-1).mean()
    squared = (patches - target).square().mean()
    torch.testing.assert_close(metrics, {"cosine_loss": cosine, "mse_loss": squared})
    torch.testing.assert_close(loss.detach(), 0.7 * cosine + 0.3 * squared)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("variant", ["default", *VARIANTS])
def test_registers_positions_patch_embedding_and_last_layer_learn_and_nothing_else(batch, variant):
    """Each of them has a gradient, or distributed training would stop, and is in one group of the optimizer."""
    distilled = objective(variant)
    distilled(batch, 0)[0].backward()
    learning = {name for name, parameter in distilled.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, parameter in distilled.named_parameters() if parameter.grad is not None}
    parts = ("register_tokens", "position_embeddings", "patch_embeddings.projection.weight")
    starts = tuple(f"student.{part}" for part in ("encoder.layer.4.", *(f"embeddings.{part}" for part in parts)))
    bias = "student.embeddings.patch_embeddings.projection.bias"
    expected = {name for name, _ in distilled.named_parameters() if name.startswith(starts) or name == bias}
    assert learning == expected and "student.embeddings.register_tokens" in learning
    has_positions = distilled.student.config.position_embedding_type != "rope"
    assert ("student.embeddings.position_embeddings" in learning) == has_positions
    groups = pretraining_groups(distilled, 5, PretrainOptimizerOptions())
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(learning)


def test_what_is_frozen_stays_and_the_student_is_exported(batch):
    torch.manual_seed(0)
    distilled = objective()
    before = copy.deepcopy(distilled.state_dict())
    learning = {name for name, parameter in distilled.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD([each for each in distilled.parameters() if each.requires_grad], lr=0.1)
    distilled(batch, 0)[0].backward()
    optimizer.step()
    distilled.after_step(0)
    changed = {name for name, tensor in distilled.state_dict().items() if not torch.equal(tensor, before[name])}
    # a bias of the keys moves all scores of a query alike
    assert changed == learning - {"student.encoder.layer.4.attention.k_proj.bias"} or changed == learning
    assert distilled.exportable() is distilled.features() is distilled.student
    assert distilled.exportable().config.num_register_tokens == NUM_REGISTERS
    resumed = objective()
    resumed.load_state_dict(distilled.state_dict())
    assert torch.equal(resumed(batch, 1)[0], distilled(batch, 1)[0])


def test_positions_of_the_student_are_those_of_the_teacher(batch):
    """DINOv3 moves its own in training, and would be compared with others."""
    teacher, student = models("rope", drop_path_rate=0.5)
    distilled = PostHocObjective(teacher, student, PostHocOptions(), FILL).train()
    assert student.training and not teacher.training
    for model in (teacher, student):
        assert not model.encoder.rotary_embeddings.training
    for layer in student.encoder.layer:
        assert layer.residual1.training and layer.residual1.drop_prob > 0
    assert distilled(batch, 0)[0] != distilled(batch, 0)[0], "stochastic depth is the student's own"


def test_models_that_are_no_pair_are_refused():
    teacher, student = models()
    with pytest.raises(ValueError, match="has 6 registers already"):
        PostHocObjective(student, student, PostHocOptions(), FILL)
    with pytest.raises(ValueError, match="no registers to learn: set --num_register_tokens"):
        PostHocObjective(teacher, teacher, PostHocOptions(), FILL)
    with pytest.raises(ValueError, match="must be the teacher with registers"):
        PostHocObjective(teacher, models(num_hidden_layers=4)[1], PostHocOptions(), FILL)


MARKED = [(1, 2), (2, 4)]  # cells of the grid where artifacts are


@torch.no_grad()
def model_with_artifacts(scale: float) -> ViTRegModel:
    """Artifacts at two places, whatever the image shows there: what positions say there makes the neuron fire."""
    model = planted.planted_encoder(scale, num_registers=0).model
    projection = model.embeddings.patch_embeddings.projection
    # mirrored patches look alike, as nearly they do to a model that has learned
    projection.weight.copy_((projection.weight + projection.weight.flip(-1)) / 2**0.5)
    for row, col in MARKED:
        model.embeddings.position_embeddings[0, 1 + row * planted.COLS + col] += 1.5 * projection.bias
    up, _ = planted.neuron(model)
    up.bias[planted.NEURON] *= 0.85 / 0.8
    return model


def noise(batch_size: int, generator: torch.Generator) -> torch.Tensor:
    height, width = (side * planted.PATCH_SIZE for side in (planted.ROWS, planted.COLS))
    return 0.5 * torch.randn(batch_size, 3, height, width, generator=generator)


def artifacts(model: ViTRegModel, clean: ViTRegModel, pixel_values: torch.Tensor) -> tuple[float, float, float]:
    """Share of outliers among the norms of patches, cosine and squared distance to clean features."""
    with torch.no_grad():
        outputs = model.eval()(pixel_values, output_hidden_states=[-1])
        wanted = clean(pixel_values).patch_tokens
    norms = outputs.hidden_states[-1][:, model.config.num_prefix_tokens :].norm(dim=-1)
    cosine = 1 - F.cosine_similarity(outputs.patch_tokens, wanted, dim=-1).mean().item()
    return patch_outliers(norms)["outlier_share"], cosine, F.mse_loss(outputs.patch_tokens, wanted).item()


def test_a_student_of_a_planted_teacher_is_rid_of_its_artifacts():
    """Few steps lower the outliers, and bring patches nearer to what they are without the planted neuron."""
    torch.manual_seed(0)
    teacher, clean = model_with_artifacts(400.0), model_with_artifacts(0.0)
    distilled = PostHocObjective(teacher, add_registers(teacher, 4, 0.15), PostHocOptions(), torch.zeros(3))
    generator = torch.Generator().manual_seed(2)
    held_out = noise(50, generator)
    before = artifacts(teacher, clean, held_out)
    assert before[0] == pytest.approx(len(MARKED) / (planted.ROWS * planted.COLS), abs=0.01)
    optimizer = torch.optim.AdamW([each for each in distilled.parameters() if each.requires_grad], lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for step in range(50):
        distilled.train()
        views = draw_views(4, 10, (planted.ROWS, planted.COLS), 0.4, 0.5, generator)
        batch = {"pixel_values": noise(4, generator), "view_shifts": views.shifts, "view_flips": views.flips}
        distilled(batch, step)[0].backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    after = artifacts(distilled.exportable(), clean, held_out)
    assert after[0] < 0.2 * before[0]
    assert after[1] < 0.5 * before[1] and after[2] < 0.5 * before[2]
