# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""OpenCLIP's own model, filled with an original checkpoint: the independent side of a comparison."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTokenizer

from conversion.family import ConversionError, Outputs
from hf_vitreg import ViTRegConfig


try:
    import open_clip
    from open_clip.model import CLIP, resize_pos_embed
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transformer import TextTransformer
except ImportError:
    open_clip = None


def require_open_clip():
    """Raises `ConversionError` where open_clip_torch is not installed."""
    if open_clip is None:
        raise ConversionError(
            "Conversion compares every model with OpenCLIP's own before it is written, and open_clip_torch is not "
            "installed: pip install hf-vitreg[conversion]"
        )


class OpenClipReference:
    """OpenCLIP's model as `parity.compare` calls it.

    Args:
        vision_config: Of the ViTReg model on the other side.
        text_config: Of the text tower there; `None` compares the vision tower alone.
        tensors: The checkpoint under its original names, the text tower's without `text.`. They are shared, not
            copied.
        input_ids: Texts to compare on, `(num_texts, context_length)`.
    """

    def __init__(
        self,
        vision_config: ViTRegConfig,
        text_config: CLIPTextConfig | None,
        tensors: Mapping[str, torch.Tensor],
        input_ids: torch.Tensor | None,
    ):
        self.vision_config = vision_config
        self.text_config = text_config
        self.tensors = dict(tensors)
        self.input_ids = input_ids
        self.text_embeds = None
        self.name = f"open_clip {open_clip.__version__}"

    def __call__(self, pixel_values: torch.Tensor) -> Outputs:
        """`(batch_size, 3, height, width)` to tokens after `ln_post`, embeddings and, with a text tower, logits.

        Embeddings are not normalized, so that their size is compared too.
        """
        model = self._model(*pixel_values.shape[-2:])
        normed = []
        model.visual.ln_post.register_forward_hook(lambda module, args, output: normed.append(output))
        image_embeds = model.encode_image(pixel_values)
        outputs = {"tokens": normed[0], "image_embeds": image_embeds}
        if self.text_config is not None:
            if self.text_embeds is None:
                # the same for images of every size
                self.text_embeds = model.encode_text(self.input_ids)
            images, texts = (nn.functional.normalize(embeds) for embeds in (image_embeds, self.text_embeds))
            outputs |= {"text_embeds": self.text_embeds, "logits": model.logit_scale.exp() * images @ texts.T}
        return outputs

    def _model(self, height: int, width: int) -> nn.Module:
        """One model a size: on the meta device it costs nothing, and the weights are shared."""
        vision, text = self.vision_config, self.text_config or CLIPTextConfig(num_hidden_layers=1)
        with torch.device("meta"):
            model = CLIP(
                embed_dim=self.tensors["visual.proj"].shape[1],
                vision_cfg={
                    "image_size": (height, width),
                    "patch_size": vision.patch_size,
                    "width": vision.hidden_size,
                    "layers": vision.num_hidden_layers,
                    "head_width": vision.hidden_size // vision.num_attention_heads,
                    "mlp_ratio": _mlp_ratio(vision),
                },
                text_cfg={
                    "context_length": text.max_position_embeddings,
                    "vocab_size": text.vocab_size,
                    "width": text.hidden_size,
                    "heads": text.num_attention_heads,
                    "layers": text.num_hidden_layers,
                    "mlp_ratio": _mlp_ratio(text),
                },
                quick_gelu=vision.hidden_act == "quick_gelu",
            )
        tensors = dict(self.tensors)
        resize_pos_embed(tensors, model)
        if self.text_config is None:
            visual = {name.removeprefix("visual."): tensor for name, tensor in tensors.items()}
            model.visual.load_state_dict(visual, assign=True)
        else:
            model.load_state_dict(tensors, assign=True)
            model.attn_mask = _causal_mask(text.max_position_embeddings)
        return model.eval()


def _mlp_ratio(config: ViTRegConfig | CLIPTextConfig) -> float:
    """Half a feature more than there is, because OpenCLIP cuts what rounding may have made smaller."""
    return (config.intermediate_size + 0.5) / config.hidden_size


def _causal_mask(context_length: int) -> torch.Tensor:
    """OpenCLIP's own, which is in no checkpoint, from the smallest text tower that has it."""
    return TextTransformer(context_length, vocab_size=1, width=1, heads=1, layers=1, output_dim=1).attn_mask


def clip_tokenizer(vocab_size: int, context_length: int) -> CLIPTokenizer | None:
    """transformers' tokenizer with the vocabulary that OpenCLIP ships; `None` for one of another size.

    The two special tokens have the names of OpenAI's original. Shorter texts are padded with the end of text, where
    OpenCLIP pads with 0: neither is read, since the text tower is causal and pools at the first end of text.
    """
    original = SimpleTokenizer()
    if vocab_size != original.vocab_size:
        return None
    *tokens, _, _ = original.encoder
    vocabulary = [*tokens, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=list(original.bpe_ranks),
        model_max_length=context_length,
    )
