# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a recipe starts from: new models, checkpoints of several kinds, and what they bring along."""

import logging

import pytest
import safetensors.torch
import torch
from dual_encoders import objective as dual_encoder_objective
from transformers.image_utils import OPENAI_CLIP_MEAN

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.data.transforms import new_image_processor
from hf_vitreg.hub.export import PRETRAINING_HEADS
from hf_vitreg.objective_options import DINOOptions
from hf_vitreg.objectives.dino import DINONetwork
from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.pretraining.models import (
    build_backbone,
    build_classifier,
    build_with_new_registers,
    image_processor,
    load_heads,
    require_whole_patches,
)


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 20, "patch_size": 4}


def checkpoint(folder, **settings) -> str:
    torch.manual_seed(0)
    ViTRegModel(ViTRegConfig(**{**SIZES, "num_register_tokens": 3, **settings})).save_pretrained(folder)
    new_image_processor(20).save_pretrained(folder)
    return str(folder)


def test_a_new_model_has_what_the_recipe_says():
    recipe = PretrainRecipe(**SIZES, layerscale_value=0.0, use_pre_layernorm=True, patch_bias=False, rope_rescale=None)
    model = build_backbone(recipe, use_mask_token=True)
    assert model.config.num_register_tokens == 4 and model.config.layerscale_value is None
    assert model.config.use_pre_layernorm and model.embeddings.patch_embeddings.projection.bias is None
    assert model.embeddings.mask_token is not None
    with pytest.raises(ValueError, match="position_embedding_type rope"):
        build_backbone(PretrainRecipe(**SIZES, rope_rescale=2.0))


def test_a_checkpoint_is_loaded_as_it_is(tmp_path):
    path = checkpoint(tmp_path, position_embedding_type="rope", pos_embed_rescale=2.0)
    model = build_backbone(PretrainRecipe(model_name_or_path=path, drop_path_rate=0.2), use_mask_token=True)
    original = ViTRegModel.from_pretrained(path).state_dict()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in original.items())
    assert model.config.drop_path_rate == 0.2 and model.config.pos_embed_rescale == 2.0
    assert image_processor(PretrainRecipe(model_name_or_path=path)).crop_size["height"] == 20
    assert image_processor(PretrainRecipe(model_name_or_path=path, image_size=28)).crop_size["height"] == 28


@pytest.mark.parametrize("lost", ["embeddings.patch_embeddings.projection.weight", "encoder.layer.1.mlp.fc2.bias"])
def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, lost):
    path = checkpoint(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights[lost]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=lost):
        build_backbone(PretrainRecipe(model_name_or_path=path))


def test_another_number_of_registers_than_there_are_is_refused(tmp_path):
    path = checkpoint(tmp_path)
    with pytest.raises(ValueError, match="has 3 registers"):
        build_backbone(PretrainRecipe(model_name_or_path=path, num_register_tokens=5))
    assert (
        build_backbone(PretrainRecipe(model_name_or_path=path, num_register_tokens=3)).config.num_register_tokens == 3
    )


def test_a_checkpoint_gets_a_new_classifier_and_registers(tmp_path):
    path = checkpoint(tmp_path, num_register_tokens=0)
    recipe = PretrainRecipe(model_name_or_path=path, num_register_tokens=2)
    model = build_classifier(recipe, ["bee", "ant"], classifier_layout="cls")
    assert model.config.id2label == {0: "bee", 1: "ant"} and model.vitreg.embeddings.register_tokens.shape[1] == 2
    assert model.classifier.weight.shape == (2, 24)


def test_the_vision_tower_of_a_dual_encoder_goes_on(tmp_path):
    original = dual_encoder_objective().exportable()
    original.save_pretrained(tmp_path)
    recipe = PretrainRecipe(model_name_or_path=str(tmp_path))
    vision = build_backbone(recipe, use_mask_token=True)
    assert torch.equal(vision.projection.weight, original.visual_projection.weight)
    for name, tensor in original.vision_model.state_dict().items():
        assert torch.equal(vision.state_dict()[name], tensor)
    with pytest.raises(ValueError, match="not a vitreg"):
        build_classifier(recipe, ["bee", "ant"])


def test_released_heads_are_taken_where_they_fit(tmp_path, caplog):
    path = checkpoint(tmp_path, use_mask_token=True)
    options = DINOOptions(num_prototypes=13, head_mlp_size=11, head_bottleneck_size=7)
    released, network = (DINONetwork(ViTRegModel.from_pretrained(path), options) for _ in range(2))
    load_heads(network, path, None)  # none are there
    assert not torch.equal(network.head.mlp[0].weight, released.head.mlp[0].weight)
    heads = {f"dino_head.{name}": tensor.clone() for name, tensor in released.head.state_dict().items()}
    safetensors.torch.save_file(heads, tmp_path / PRETRAINING_HEADS)
    load_heads(network, path, None)
    assert all(torch.equal(network.head.state_dict()[name[10:]], tensor) for name, tensor in heads.items())
    smaller = DINONetwork(ViTRegModel.from_pretrained(path), DINOOptions(num_prototypes=5, head_mlp_size=11))
    with caplog.at_level(logging.WARNING):
        load_heads(smaller, path, None)
    assert "not used" in caplog.text


def test_new_pixels_have_the_statistics_that_were_asked_for():
    assert image_processor(PretrainRecipe(pixel_statistics="clip")).image_mean == tuple(OPENAI_CLIP_MEAN)
    assert image_processor(PretrainRecipe()).crop_size["height"] == 32


def test_images_are_whole_numbers_of_patches():
    with pytest.raises(ValueError, match="--image_size 30"):
        require_whole_patches(PretrainRecipe(image_size=30), ViTRegConfig(**SIZES))


def test_a_checkpoint_is_given_new_registers_beside_itself(tmp_path):
    path = checkpoint(tmp_path / "plain", num_register_tokens=0)
    recipe = PretrainRecipe(model_name_or_path=path, num_register_tokens=5, register_init_std=0.5)
    teacher, student = build_with_new_registers(recipe)
    assert teacher.config.num_register_tokens == 0 and student.config.num_register_tokens == 5
    assert student.embeddings.register_tokens.std().item() == pytest.approx(0.5, rel=0.3)
    new = student.state_dict()
    assert all(torch.equal(new[name], tensor) for name, tensor in teacher.state_dict().items())
    path = checkpoint(tmp_path / "with")
    for name, words in ((None, "name one as --model_name_or_path"), (path, "has 3 registers already")):
        with pytest.raises(ValueError, match=words):
            build_with_new_registers(PretrainRecipe(model_name_or_path=name))
    with pytest.raises(ValueError, match="belong to a new model"):
        build_with_new_registers(PretrainRecipe(model_name_or_path=path, hidden_size=24))
