# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
import torch.nn.functional as F

from hf_vitreg.objectives.losses.contrastive import clip_loss, siglip_loss


BATCH_SIZE, PROJECTION_DIM = 5, 7


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    return F.normalize(torch.randn(2, BATCH_SIZE, PROJECTION_DIM, dtype=torch.float64), dim=-1).unbind()


def test_losses_are_those_of_open_clip(features):
    from open_clip.loss import ClipLoss, SigLipLoss

    scale, bias = torch.tensor(9.0).double(), torch.tensor(-3.0).double()
    torch.testing.assert_close(clip_loss(*features, scale), ClipLoss()(*features, scale))
    torch.testing.assert_close(siglip_loss(*features, scale, bias), SigLipLoss()(*features, scale, bias))


def test_values_by_hand():
    """Two pairs at right angles: each image has logit 2 with its text and 0 with the other."""
    pairs = torch.eye(2)
    assert clip_loss(pairs, pairs, 2.0).item() == pytest.approx(math.log(1 + math.exp(-2)))
    own, other = math.log(1 + math.exp(-(2 - 1.5))), math.log(1 + math.exp(-1.5))
    assert siglip_loss(pairs, pairs, 2.0, -1.5).item() == pytest.approx(own + other)


def test_gradients_are_those_of_finite_differences(features):
    images, texts = (x.clone().requires_grad_() for x in features)
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (5.0, -2.0))
    assert torch.autograd.gradcheck(clip_loss, (images, texts, scale))
    assert torch.autograd.gradcheck(siglip_loss, (images, texts, scale, bias))


def test_images_and_texts_may_change_places_and_pairs_their_order(features):
    images, texts = features
    order = torch.randperm(BATCH_SIZE)
    for loss in (lambda x, y: clip_loss(x, y, 7.0), lambda x, y: siglip_loss(x, y, 7.0, -4.0)):
        torch.testing.assert_close(loss(texts, images), loss(images, texts))
        torch.testing.assert_close(loss(images[order], texts[order]), loss(images, texts))


def test_pairs_that_belong_together_cost_less(features):
    images, texts = features
    assert clip_loss(images, images, 7.0) < clip_loss(images, texts, 7.0)
    assert siglip_loss(images, images, 7.0, -4.0) < siglip_loss(images, texts, 7.0, -4.0)
