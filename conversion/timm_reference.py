# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""timm's VisionTransformer, filled with an original checkpoint: the independent side of a comparison."""

import math

import torch
from torch import nn

from conversion.family import ConversionError, Outputs
from hf_vitreg import ViTRegConfig


try:
    import timm
    from timm.data.imagenet_info import ImageNetInfo
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
except ImportError:
    timm = None


def require_timm():
    """Raises `ConversionError` where timm is not installed."""
    if timm is None:
        raise ConversionError(
            "Conversion compares every model with timm's before it is written, and timm is not installed: "
            "pip install hf-vitreg[conversion]"
        )


class TimmReference:
    """timm's model as `parity.compare` calls it.

    Args:
        config: Of the ViTReg model on the other side.
        tensors: The backbone under its original names, layers not in chunks. They are shared, not copied.
        head: `weight` and `bias` of a linear head; empty where there is none.
    """

    def __init__(self, config: ViTRegConfig, tensors: dict[str, torch.Tensor], head: dict[str, torch.Tensor]):
        # timm knows a DINOv2 checkpoint by its mask token, and then drops it
        self.tensors = {"mask_token": torch.zeros(1, config.hidden_size), **tensors}
        self.config = config
        self.head = head
        self.name = f"timm {timm.__version__}"

    def __call__(self, pixel_values: torch.Tensor) -> Outputs:
        """`(batch_size, num_channels, height, width)` to tokens and, with a head, logits."""
        # the last four layers, of shape (batch_size, prefix and patches, hidden_size) after the final norm
        layers = self._model(*pixel_values.shape[-2:]).forward_intermediates(
            pixel_values,
            indices=min(4, self.config.num_hidden_layers),
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        patches, prefix = layers[-1]
        outputs = {"tokens": torch.cat([prefix, patches], dim=1)}
        if self.head:
            layout = self.config.classifier_layout
            layers_read = layers if layout.startswith("last4") else layers[-1:]
            features = [prefix[:, 0] for _, prefix in layers_read]
            if layout.endswith("mean"):
                features.append(patches.mean(dim=1))
            logits = nn.functional.linear(torch.cat(features, dim=-1), self.head["weight"], self.head["bias"])
            outputs["logits"] = logits
        return outputs

    def _model(self, height: int, width: int) -> nn.Module:
        """One model a size: on the meta device it costs nothing, and the weights are shared."""
        config = self.config
        swiglu = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if config.use_swiglu_ffn else {}
        hidden_features = config.intermediate_size * (2 if config.use_swiglu_ffn else 1)
        resizes_itself = config.interpolate_antialias and config.interpolate_offset == 0
        with torch.device("meta"):
            model = VisionTransformer(
                img_size=config.image_size if resizes_itself else (height, width),
                patch_size=config.patch_size,
                in_chans=config.num_channels,
                num_classes=0,
                global_pool="",
                embed_dim=config.hidden_size,
                depth=config.num_hidden_layers,
                num_heads=config.num_attention_heads,
                # half a feature more than asked for, because timm cuts what rounding may have made smaller
                mlp_ratio=(hidden_features + 0.5) / config.hidden_size,
                qkv_bias=config.qkv_bias,
                init_values=config.layerscale_value,
                reg_tokens=config.num_register_tokens,
                no_embed_class=config.num_register_tokens > 0,
                dynamic_img_size=resizes_itself,
                weight_init="skip",
                **swiglu,
            )
        tensors = dict(self.tensors)
        if not resizes_itself:
            # timm interpolates to a size and antialiases, whatever the model was trained with
            rows, cols = height // config.patch_size, width // config.patch_size
            tensors["pos_embed"] = self._positions(rows, cols)
        model.load_state_dict(checkpoint_filter_fn(tensors, model), assign=True)
        return model.eval()

    def _positions(self, rows: int, cols: int) -> torch.Tensor:
        """Position embeddings for a grid, `(1, 1 + rows * cols, hidden_size)`, by DINOv2's rule.

        Bicubic in float32; the offset is added to the new side before it is divided by the old one
        (dinov2/models/vision_transformer.py, `interpolate_pos_encoding`).
        """
        positions = self.tensors["pos_embed"].float()
        side = math.isqrt(positions.shape[1] - 1)
        if (rows, cols) == (side, side):
            return positions
        offset = self.config.interpolate_offset
        target = (
            {"scale_factor": ((rows + offset) / side, (cols + offset) / side)} if offset else {"size": (rows, cols)}
        )
        # (1, hidden_size, side, side): one image, with the width of the model as its channels
        image = positions[:, 1:].mT.unflatten(-1, (side, side))
        image = nn.functional.interpolate(image, mode="bicubic", antialias=self.config.interpolate_antialias, **target)
        return torch.cat([positions[:, :1], image.flatten(2).mT], dim=1)


def imagenet_labels() -> list[str]:
    """The 1000 descriptions of ImageNet-1k in the order of its classes, each once.

    Two classes are both called "crane"; such have their WordNet id behind them.
    """
    imagenet = ImageNetInfo("imagenet-1k")
    descriptions = imagenet.label_descriptions()
    return [
        text if descriptions.count(text) == 1 else f"{text} ({synset})"
        for text, synset in zip(descriptions, imagenet.label_names())
    ]
