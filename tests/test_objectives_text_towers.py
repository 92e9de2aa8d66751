# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import dual_encoders
import pytest
import torch
from dual_encoders import CAPTIONS, PROJECTION_DIM, options, tokenizer
from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModelWithProjection, GPT2Config, GPT2Model

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.objectives.clip import CLIPObjective
from hf_vitreg.objectives.text_towers import text_tower


SIZES = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 293}


def clip_config(**changes) -> CLIPTextConfig:
    kwargs = {"intermediate_size": 31, "projection_dim": PROJECTION_DIM, "bos_token_id": 0, "eos_token_id": 1}
    return CLIPTextConfig(**{**SIZES, **kwargs, "max_position_embeddings": 19, **changes})


def saved(model, folder) -> str:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_new_tower_reads_texts_up_to_their_end():
    """Whatever is behind the end of text, and as transformers' own pools it."""
    tower, words = text_tower(options(), tokenizer()), tokenizer()
    assert type(tower) is CLIPTextModelWithProjection
    config = tower.config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (20, 2, 80)
    assert (config.projection_dim, config.max_position_embeddings, config.vocab_size) == (
        PROJECTION_DIM,
        17,
        len(words),
    )
    short, long = (
        words(CAPTIONS, padding="max_length", max_length=length, return_tensors="pt") for length in (15, 17)
    )
    tower.eval()
    with torch.no_grad():
        embeds = tower(**long).text_embeds
        torch.testing.assert_close(tower(**short).text_embeds, embeds)
        ends = (long.input_ids == words.eos_token_id).int().argmax(dim=1)
        states = tower.text_model(**long).last_hidden_state[torch.arange(len(CAPTIONS)), ends]
        torch.testing.assert_close(tower.text_projection(states), embeds)
    assert ends.max() < 16 and torch.pdist(embeds).min() > 1e-3


def test_the_tower_of_clip_comes_with_its_projection(tmp_path):
    original = CLIPTextModelWithProjection(clip_config())
    tower = text_tower(options(text_model_name_or_path=saved(original, tmp_path)), tokenizer())
    assert torch.equal(tower.text_projection.weight, original.text_projection.weight)
    ids = tokenizer()("cat", return_tensors="pt").input_ids
    expected = original.eval()(ids).text_embeds
    torch.testing.assert_close(tower.text_projection(tower.text_model.eval()(ids).pooler_output), expected)


def test_the_tower_of_a_dual_encoder_comes_with_its_projection(tmp_path):
    dual = dual_encoders.objective().exportable()
    tower = text_tower(options(text_model_name_or_path=saved(dual, tmp_path)), tokenizer())
    assert torch.equal(tower.text_projection.weight, dual.text_projection.weight)
    for name, parameter in dual.text_model.named_parameters():
        assert torch.equal(tower.text_model.get_parameter(name), parameter)


def test_any_model_that_pools_gets_a_new_projection_and_learns(tmp_path):
    bert = BertModel(BertConfig(**SIZES, intermediate_size=31, max_position_embeddings=23))
    chosen = options(text_model_name_or_path=saved(bert, tmp_path))
    tower = text_tower(chosen, tokenizer())
    assert tower.text_projection.weight.shape == (PROJECTION_DIM, 20)
    learner = CLIPObjective(ViTRegModel(ViTRegConfig(**dual_encoders.VISION)), tower, chosen)
    dual_encoders.trained(learner, num_steps=2)
    assert all(parameter.grad is not None for parameter in learner.parameters())
    assert type(learner.exportable().text_model) is BertModel


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            CLIPTextModelWithProjection(clip_config(projection_dim=31)),
            {},
            "to 31 dimensions, and --projection_dim is 29",
        ),
        (CLIPTextModelWithProjection(clip_config()), {"text_max_length": 23}, "at the most: set --text_max_length"),
        (ViTRegModel(ViTRegConfig(**dual_encoders.VISION)), {}, "is no text model"),
        (GPT2Model(GPT2Config(n_embd=20, n_layer=1, n_head=2, vocab_size=293)), {}, "GPT2Model, which pools nothing"),
    ],
    ids=["projection", "length", "no texts", "no pooling"],
)
def test_towers_that_do_not_fit_are_an_error(model, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        text_tower(options(text_model_name_or_path=saved(model, tmp_path), **changes), tokenizer())


def test_weights_that_are_missing_are_an_error(tmp_path):
    saved(CLIPTextModelWithProjection(clip_config()), tmp_path)
    clip_config(num_hidden_layers=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of its weights are missing, .*layers\.2"):
        text_tower(options(text_model_name_or_path=str(tmp_path)), tokenizer())


def test_sizes_that_do_not_divide_and_models_that_are_not_there_are_errors(tmp_path):
    with pytest.raises(ValueError, match="--text_hidden_size 20 must be a multiple of --text_num_attention_heads 3"):
        text_tower(options(text_num_attention_heads=3), tokenizer())
    with pytest.raises(ValueError, match="Cannot load the text tower of --text_model_name_or_path"):
        text_tower(options(text_model_name_or_path=str(tmp_path / "none")), tokenizer())
