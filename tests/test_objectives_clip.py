# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import math

import dual_encoders
import pytest
import torch
from dual_encoders import PROJECTION_DIM, batch, objective, picture, trained
from torch import nn
from transformers import AutoModel

from hf_vitreg import ViTRegModel
from hf_vitreg.evaluation.zero_shot import class_embeddings, image_embeddings, load_dual_encoder, zero_shot_logits
from hf_vitreg.hub.card import CardFacts
from hf_vitreg.hub.export import write_model_repository
from hf_vitreg.pretrain_recipe import PretrainOptimizerOptions
from hf_vitreg.training.optim import pretraining_groups


LOSSES = pytest.mark.parametrize("contrastive_loss", ["clip", "siglip"])


class Pictures:
    """The images that the captions are of."""

    display_name = "pictures"

    def __len__(self):
        return len(dual_encoders.COLOURS)

    def name(self, index):
        return dual_encoders.COLOURS[index]

    def content(self, index):
        return self.image(index).tobytes()

    def image(self, index):
        return picture(index)


def test_loss_and_gradients_are_those_of_transformers():
    learner, pairs = objective(), batch()
    loss, _ = learner(pairs, 0)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in learner.towers.named_parameters()}
    learner.zero_grad()
    dual = learner.exportable()
    dual.logit_scale.requires_grad_()
    expected = dual(**pairs, return_loss=True)
    expected.loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    for name, parameter in learner.towers.named_parameters():
        gradient = dual.logit_scale.grad[None] if name == "logits.log_scale" else parameter.grad
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_siglip_loss_is_that_of_open_clip():
    from open_clip.loss import SigLipLoss

    learner, pairs = objective(contrastive_loss="siglip"), batch()
    loss, metrics = learner(pairs, 0)
    outputs = learner.exportable()(**pairs)
    expected = SigLipLoss()(outputs.image_embeds, outputs.text_embeds, torch.tensor(10.0), torch.tensor(-10.0))
    torch.testing.assert_close(loss, expected)
    assert (metrics["logit_scale"].item(), metrics["logit_bias"].item()) == pytest.approx((10, -10))


@LOSSES
def test_eight_pairs_are_learned(contrastive_loss):
    learner = objective(contrastive_loss=contrastive_loss)
    _, first = learner(batch(), 0)
    metrics = trained(learner)
    assert first["image_to_text_accuracy"] < 0.6 and metrics["image_to_text_accuracy"] == 1


@LOSSES
def test_a_written_run_classifies_without_examples(contrastive_loss, tmp_path):
    """By the average, by names that stand in other sentences than in training."""
    learner = objective(ema_decay=0.5, contrastive_loss=contrastive_loss)
    trained(learner)
    bias, scale = learner.average.logits.bias, learner.average.logits.log_scale
    write_model_repository(
        tmp_path,
        learner.exportable(),
        dual_encoders.PROCESSOR,
        CardFacts(name="walls"),
        tokenizer=dual_encoders.tokenizer(),
    )
    model, tokenizer, processor = load_dual_encoder(tmp_path)
    assert type(model) is type(AutoModel.from_pretrained(tmp_path))
    assert model.logit_scale.shape == () and model.logit_scale == scale[0]
    assert getattr(model.config, "logit_bias", None) == (None if bias is None else bias.item())
    classes = class_embeddings(model, tokenizer, dual_encoders.COLOURS, ["a photo of a {} wall."])
    logits = zero_shot_logits(image_embeddings(model, processor, Pictures(), progress=False), classes)
    assert logits.argmax(dim=1).tolist() == list(range(8))


@LOSSES
def test_export_leaves_no_trace(contrastive_loss):
    learner = objective(contrastive_loss=contrastive_loss)
    trained(learner, num_steps=2)
    weights = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    modes = [module.training for module in learner.modules()]
    random_state = torch.get_rng_state()
    first, second = learner.exportable(), learner.exportable()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in learner.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in learner.state_dict().items())
    assert all(
        torch.equal(one, other) for one, other in zip(first.state_dict().values(), second.state_dict().values())
    )
    assert all(tensor.device.type == "cpu" for tensor in first.state_dict().values())


@pytest.mark.parametrize(("start", "expected"), [(7.0, math.log(50)), (-1.0, 0.0), (2.0, 2.0)])
def test_the_scale_stays_in_its_bounds(start, expected):
    learner = objective(max_logit_scale=50.0)
    nn.init.constant_(learner.towers.logits.log_scale, start)
    learner.after_step(0)
    assert learner.towers.logits.log_scale.item() == pytest.approx(expected)


def test_what_learns_is_clipped_once_and_can_be_sharded():
    """FSDP shards no scalars, and wraps layers that are there."""
    learner = objective(ema_decay=0.9, vision={"use_mask_token": True})
    learner(batch(), 0)[0].backward()
    learning = {name for name, parameter in learner.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, parameter in learner.named_parameters() if parameter.grad is not None}
    parts = learner.trained()
    assert list(parts) == ["vision", "text", "logits"]
    clipped = [id(each) for part in parts.values() for each in part.parameters() if each.requires_grad]
    assert len(clipped) == len(set(clipped)) == len(learning)
    assert all(parameter.ndim for parameter in learner.parameters())
    assert learner._no_split_modules == ["CLIPEncoderLayer", "CLIPTextEmbeddings", "ViTRegEmbeddings", "ViTRegLayer"]


def test_scale_and_bias_do_not_decay():
    groups = pretraining_groups(objective(contrastive_loss="siglip"), 2, PretrainOptimizerOptions())
    decaying = {name for group in groups if group["decays"] for name in group["names"]}
    assert not {"towers.logits.log_scale", "towers.logits.bias"} & decaying
    assert {"towers.vision.projection.weight", "towers.text.projection.weight"} < decaying


def test_the_average_is_exported_and_a_checkpoint_holds_it():
    learner = objective(ema_decay=0.75)
    before = {name: parameter.detach().clone() for name, parameter in learner.towers.named_parameters()}
    trained(learner, num_steps=1)
    for name, parameter in learner.average.named_parameters():
        expected = 0.75 * before[name] + 0.25 * learner.towers.get_parameter(name)
        torch.testing.assert_close(parameter, expected)
    assert learner.features() is learner.exportable().vision_model is learner.average.vision.model
    assert learner.towers.training and not learner.average.training
    resumed = objective(ema_decay=0.75)
    resumed.load_state_dict(learner.state_dict())
    assert torch.equal(resumed.features().embeddings.cls_token, learner.features().embeddings.cls_token)


def test_a_projection_moves_to_the_dual_encoder():
    learner = objective()
    assert learner.features().projection is None and learner.features().config.projection_dim is None
    assert learner.exportable().visual_projection.weight.shape == (PROJECTION_DIM, 24)
    assert type(learner.features()) is ViTRegModel
    new = objective(vision={"projection_dim": None}).exportable().visual_projection.weight
    assert new.shape == (PROJECTION_DIM, 24) and 0.15 < new.std() < 0.26  # 24 ** -0.5 is 0.2


def test_towers_of_different_spaces_are_an_error():
    with pytest.raises(ValueError, match=r"images to 23 dimensions, and the text tower texts to 29: .*projection_dim"):
        objective(vision={"projection_dim": 23})
