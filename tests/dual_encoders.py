# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A tiny dual encoder and eight images with their captions, which it can learn."""

import PIL.Image
import torch
from transformers import BitImageProcessor

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.data.captions import CaptionCollate, load_or_train_tokenizer
from hf_vitreg.objective_options import CLIPOptions
from hf_vitreg.objectives.clip import CLIPObjective
from hf_vitreg.objectives.text_towers import text_tower


COLOURS = ("red", "lime", "blue", "yellow", "fuchsia", "aqua", "white", "black")
CAPTIONS = [f"A photo of a {colour} wall." for colour in COLOURS]
HEIGHT, WIDTH, PATCH_SIZE, PROJECTION_DIM, TEXT_LENGTH = 14, 21, 7, 29, 17
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": [HEIGHT, WIDTH],
    "patch_size": PATCH_SIZE,
    "num_register_tokens": 3,
}
SIZES = {"size": {"height": HEIGHT, "width": WIDTH}, "do_center_crop": False}
PROCESSOR = BitImageProcessor(**SIZES, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def options(**changes) -> CLIPOptions:
    sizes = {"text_hidden_size": 20, "text_num_hidden_layers": 2, "text_num_attention_heads": 2}
    lengths = {"projection_dim": PROJECTION_DIM, "text_max_length": TEXT_LENGTH, "text_vocab_size": 293}
    return CLIPOptions(**{**sizes, **lengths, **changes})


def tokenizer(**changes):
    return load_or_train_tokenizer(options(**changes), CAPTIONS)


def picture(index: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (43, 31), COLOURS[index])


def objective(ema_decay: float = 0.0, vision: dict | None = None, **changes) -> CLIPObjective:
    chosen = options(**changes)
    config = ViTRegConfig(**{**VISION, "projection_dim": PROJECTION_DIM, **(vision or {})})
    return CLIPObjective(ViTRegModel(config), text_tower(chosen, tokenizer()), chosen, ema_decay)


def batch() -> dict[str, torch.Tensor]:
    """All eight pairs."""
    samples = [
        {"pixel_values": PROCESSOR(picture(index), return_tensors="pt").pixel_values[0], "caption": caption}
        for index, caption in enumerate(CAPTIONS)
    ]
    return CaptionCollate(tokenizer(), TEXT_LENGTH)(samples)


def trained(learner: CLIPObjective, num_steps: int = 100, learning_rate: float = 6e-4) -> dict[str, torch.Tensor]:
    """The last metrics of steps on all pairs."""
    pairs = batch()
    if learner.towers.logits.bias is not None:
        # -10 is for batches of thousands: in this one, one pair of eight belongs together
        torch.nn.init.constant_(learner.towers.logits.bias, -2.0)
    optimizer = torch.optim.AdamW([each for each in learner.parameters() if each.requires_grad], lr=learning_rate)
    for step in range(num_steps):
        loss, metrics = learner(pairs, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.after_step(step)
    return metrics
