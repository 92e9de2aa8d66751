# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""From captions to token ids: tokenizers, made or found, and batches of images with their texts."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..objective_options import CLIPOptions
from .collate import collate


START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
NUM_BYTES = 256


def load_or_train_tokenizer(
    options: CLIPOptions, captions: Iterable[str], folder: str | os.PathLike | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of `text_model_name_or_path`, or a new one.

    A new one is a byte-level BPE of lower-cased text, which knows every string. Each text starts with
    `<|startoftext|>` and ends with `<|endoftext|>`, which also pads: CLIP's text tower pools at the first of them.

    Args:
        options: Name of the model, or size of the new vocabulary and most tokens of a text.
        captions: What a new one is trained on.
        folder: Where a new one is kept. One that is there already is taken as it is, whatever the captions, so that
            processes and resumed runs have the same.

    Raises:
        ValueError: where there is no tokenizer of that name, it cannot pad, or the vocabulary has no room for the
            bytes.
    """
    if options.text_model_name_or_path is not None:
        tokenizer = _loaded(options.text_model_name_or_path)
    elif folder is not None and (Path(folder) / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = _trained(captions, options.text_vocab_size, options.text_max_length)
        if folder is not None:
            tokenizer.save_pretrained(folder)
    # once its threads have run, every worker that is forked would warn of them
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return tokenizer


def _loaded(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--text_model_name_or_path {name} has no tokenizer that can be loaded: {error}") from error
    # where the vocabulary is missing, transformers makes a tokenizer that knows no word
    if tokenizer("cat").input_ids == tokenizer("dog").input_ids:
        raise ValueError(f"--text_model_name_or_path {name} has no vocabulary beside it. Save its own there.")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"The tokenizer of --text_model_name_or_path {name} has no padding token. Choose another.")
    return tokenizer


def _trained(captions: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    special_tokens = [START_OF_TEXT, END_OF_TEXT]
    if vocab_size < NUM_BYTES + len(special_tokens):
        raise ValueError(
            f"--text_vocab_size must be at least {NUM_BYTES + len(special_tokens)}, the bytes and two ends of a text, "
            f"got {vocab_size}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START_OF_TEXT} $A {END_OF_TEXT}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special_tokens],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
    )


@dataclass(frozen=True)
class CaptionCollate:
    """Stacks samples and tokenizes their captions: `input_ids` and `attention_mask`, `(batch, max_length)`.

    Attributes:
        tokenizer: With a padding token.
        max_length: Of every text, in tokens: longer ones are cut before their end token, shorter ones padded.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        captions = [sample["caption"] for sample in samples]
        texts = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        images = collate([{key: sample[key] for key in sample if key != "caption"} for sample in samples])
        return {**images, "input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}
