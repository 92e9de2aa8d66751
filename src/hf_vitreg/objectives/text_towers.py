# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Text towers of dual encoders: new ones as CLIP has them, and those of other people's models."""

import torch
from torch import nn
from transformers import (
    AutoModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..objective_options import CLIPOptions


class TextTower(nn.Module):
    """A text model of any kind, and a projection of what it pools.

    Attributes:
        text_model: With a `pooler_output`, `(batch, hidden_size)`.
        text_projection: To `(batch, projection_dim)`.
    """

    def __init__(self, text_model: PreTrainedModel, text_projection: nn.Linear):
        super().__init__()
        self.text_model = text_model
        self.text_projection = text_projection


def text_tower(options: CLIPOptions, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """A module with `text_model` and `text_projection`, as `CLIPObjective` takes it. No code of a repository is run.

    Of `text_model_name_or_path` it is the text tower of CLIP or of a dual encoder, with its projection, or any text
    model of transformers that pools, such as BERT, with a new projection. Without a name it is a new one of CLIP's.

    Args:
        options: Name, or sizes.
        tokenizer: As `load_or_train_tokenizer` gives it.

    Raises:
        ValueError: where there is no such model, it cannot take these texts, or it projects to another width.
    """
    if options.text_model_name_or_path is None:
        return _new(options, tokenizer)
    name = options.text_model_name_or_path
    try:
        tower = _loaded(name, options.projection_dim)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"Cannot load the text tower of --text_model_name_or_path {name}: {error}") from error
    _check(tower, options, tokenizer)
    return tower


def _new(options: CLIPOptions, tokenizer: PreTrainedTokenizerBase) -> CLIPTextModelWithProjection:
    """OpenCLIP's: GELU, four times the width in the MLP, the states of the end of text pooled."""
    if options.text_hidden_size % options.text_num_attention_heads:
        raise ValueError(
            f"--text_hidden_size {options.text_hidden_size} must be a multiple of --text_num_attention_heads "
            f"{options.text_num_attention_heads}."
        )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.text_hidden_size,
        intermediate_size=4 * options.text_hidden_size,
        projection_dim=options.projection_dim,
        num_hidden_layers=options.text_num_hidden_layers,
        num_attention_heads=options.text_num_attention_heads,
        max_position_embeddings=options.text_max_length,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def _loaded(name: str, projection_dim: int) -> nn.Module:
    # not AutoConfig, which would first ask for leave to run the code of models that nobody knows
    model_type = PreTrainedConfig.get_config_dict(name)[0].get("model_type")
    is_clip = model_type in ("clip", "clip_text_model")
    model_class = CLIPTextModelWithProjection if is_clip else AutoModel
    kwargs = {} if is_clip else {"trust_remote_code": False}
    model, report = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **kwargs)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} of its weights are missing, {missing[0]} among them. They would be random.")
    if hasattr(model, "text_projection"):
        return TextTower(model.text_model, model.text_projection)
    if not hasattr(model.config, "vocab_size"):
        raise ValueError(f"a {type(model).__name__} is no text model: choose CLIP, a dual encoder or BERT.")
    projection = nn.Linear(model.config.hidden_size, projection_dim, bias=False)
    nn.init.normal_(projection.weight, std=model.config.hidden_size**-0.5)
    return TextTower(model, projection)


@torch.no_grad()
def _check(tower: nn.Module, options: CLIPOptions, tokenizer: PreTrainedTokenizerBase) -> None:
    name, config = options.text_model_name_or_path, tower.text_model.config
    if tower.text_projection.out_features != options.projection_dim:
        raise ValueError(
            f"{name} projects texts to {tower.text_projection.out_features} dimensions, and --projection_dim is "
            f"{options.projection_dim}: set it to the same."
        )
    longest = config.max_position_embeddings
    if options.text_max_length > longest:
        raise ValueError(f"{name} takes texts of {longest} tokens at the most: set --text_max_length to that or less.")
    texts = tokenizer("cat", return_tensors="pt")
    outputs = tower.text_model(input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], return_dict=True)
    if getattr(outputs, "pooler_output", None) is None:
        raise ValueError(f"{name} is a {type(tower.text_model).__name__}, which pools nothing: choose CLIP or BERT.")
