# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pickle

import pytest
import torch
from dual_encoders import CAPTIONS, TEXT_LENGTH, options
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_vitreg.data.captions import CaptionCollate, load_or_train_tokenizer


STRANGE = ["Naïve CAFÉ", "日本 の 🎉", "it's 1,000 %", "", "ẞ", "\x00", "tab\tand\nline"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_or_train_tokenizer(options(), CAPTIONS)


@pytest.mark.parametrize("text", [*CAPTIONS, *STRANGE])
def test_every_text_comes_back_in_lower_case(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[:-1], "the text tower pools at the first"
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.strip() == " ".join(text.lower().split(" ")).replace("\t", " ").replace("\n", " ").strip()


def test_words_of_the_captions_are_few_tokens(tokenizer):
    assert len(tokenizer) == 293
    assert len(tokenizer("a photo of a").input_ids) < len("a photo of a") + 2
    assert len(tokenizer("jjjj").input_ids) == len(" jjjj") + 2
    assert tokenizer("A  Photo").input_ids == tokenizer("a photo").input_ids


def test_the_end_of_text_is_not_the_old_one_of_clip(tokenizer):
    """For an id of 2 transformers takes the highest id for the end, which here is a word."""
    assert tokenizer.eos_token_id != 2 and tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.model_max_length == TEXT_LENGTH


def test_the_same_captions_make_the_same_tokenizer(tokenizer):
    again = load_or_train_tokenizer(options(), iter(CAPTIONS))
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_folder_keeps_the_tokenizer_of_a_run(tokenizer, tmp_path):
    first = load_or_train_tokenizer(options(), CAPTIONS, tmp_path / "tokenizer")
    second = load_or_train_tokenizer(options(), ["something else entirely"] * 9, tmp_path / "tokenizer")
    for text in (*CAPTIONS, *STRANGE):
        assert first(text).input_ids == second(text).input_ids == tokenizer(text).input_ids
    assert second.model_max_length == TEXT_LENGTH and type(second).__name__ == type(first).__name__


def test_a_tokenizer_can_be_that_of_a_model(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    found = load_or_train_tokenizer(options(text_model_name_or_path=str(tmp_path)), ["not read"])
    assert found(CAPTIONS[0]).input_ids == tokenizer(CAPTIONS[0]).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path)(STRANGE[1]).input_ids == tokenizer(STRANGE[1]).input_ids


def test_tokenizers_that_cannot_serve_are_errors(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"--text_vocab_size must be at least 258, .* got 257"):
        load_or_train_tokenizer(options(text_vocab_size=257), CAPTIONS)
    with pytest.raises(ValueError, match="has no tokenizer that can be loaded"):
        load_or_train_tokenizer(options(text_model_name_or_path=str(tmp_path / "none")), CAPTIONS)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no padding token"):
        load_or_train_tokenizer(options(text_model_name_or_path=str(tmp_path)), CAPTIONS)


def test_batches_have_texts_of_one_length(tokenizer):
    collate = pickle.loads(pickle.dumps(CaptionCollate(tokenizer, TEXT_LENGTH)))
    captions = ["a photo", "xylophones " * 11, ""]
    batch = collate(
        [{"pixel_values": torch.full((3, 5, 7), index), "caption": text} for index, text in enumerate(captions)]
    )
    assert batch["pixel_values"].shape == (3, 3, 5, 7) and batch["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, TEXT_LENGTH)
    assert (batch["input_ids"] == tokenizer.eos_token_id).any(dim=1).all()
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(tokenizer("a photo").input_ids), TEXT_LENGTH, 2]
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}
