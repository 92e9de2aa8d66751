# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""timm's VisionTransformer, filled with an original checkpoint: the independent side of a comparison.

Of DINO, DINOv2, DeiT and DeiT-III.
"""

import math

import torch
from torch import nn

from conversion.family import ConversionError, Outputs
from hf_vitreg import ViTRegConfig


try:
    import timm
    from timm.data.imagenet_info import ImageNetInfo
    from timm.layers import SwiGLUPacked
    from timm.models.deit import VisionTransformerDistilled
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
        tensors: The backbone under its original names, layers not in chunks, and the classifiers that belong to it
            (`head`, `head_dist`), which are then timm's. They are shared, not copied.
        head: `weight` and `bias` of a linear head that was trained apart; empty where there is none.
    """

    def __init__(self, config: ViTRegConfig, tensors: dict[str, torch.Tensor], head: dict[str, torch.Tensor]):
        self.tensors = dict(tensors)
        self.config = config
        self.head = head
        self.name = f"timm {timm.__version__}"

    def __call__(self, pixel_values: torch.Tensor) -> Outputs:
        """`(batch_size, num_channels, height, width)` to tokens and, with a classifier, logits."""
        model = self._model(*pixel_values.shape[-2:])
        # the last four layers, of shape (batch_size, prefix and patches, hidden_size) after the final norm
        layers = model.forward_intermediates(
            pixel_values,
            indices=min(4, self.config.num_hidden_layers),
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        patches, prefix = layers[-1]
        outputs = {"tokens": torch.cat([prefix, patches], dim=1)}
        if model.num_classes:
            outputs["logits"] = model.forward_head(outputs["tokens"])
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
        # where DINOv2 has registers timm's filter adds the position of CLS to CLS, and only patches keep one
        has_filtered_cls = config.position_embedding_type == "cls_patches" and config.num_register_tokens > 0
        with torch.device("meta"):
            model = (VisionTransformerDistilled if config.use_distillation_token else VisionTransformer)(
                img_size=config.image_size if resizes_itself else (height, width),
                patch_size=config.patch_size,
                in_chans=config.num_channels,
                num_classes=len(self.tensors.get("head.bias", ())),
                embed_dim=config.hidden_size,
                depth=config.num_hidden_layers,
                num_heads=config.num_attention_heads,
                # half a feature more than asked for, because timm cuts what rounding may have made smaller
                mlp_ratio=(hidden_features + 0.5) / config.hidden_size,
                qkv_bias=config.qkv_bias,
                init_values=config.layerscale_value,
                reg_tokens=config.num_register_tokens,
                no_embed_class=has_filtered_cls or config.num_prefix_positions == 0,
                dynamic_img_size=resizes_itself,
                weight_init="skip",
                **swiglu,
            )
        model.load_state_dict(self._state(model, height, width, resizes_itself), assign=True)
        return model.eval()

    def _state(self, model: nn.Module, height: int, width: int, resizes_itself: bool) -> dict[str, torch.Tensor]:
        """The tensors under timm's names, position embeddings for the images."""
        tensors = dict(self.tensors)
        if self.config.position_embedding_type == "cls_patches":
            # timm knows a DINOv2 checkpoint by its mask token, and then drops it
            tensors.setdefault("mask_token", torch.zeros(1, self.config.hidden_size))
        if not resizes_itself:
            # timm interpolates to a size and antialiases, whatever the model was trained with
            rows, cols = height // self.config.patch_size, width // self.config.patch_size
            tensors["pos_embed"] = self._positions(rows, cols)
        return checkpoint_filter_fn(tensors, model, adapt_layer_scale=True)

    def _positions(self, rows: int, cols: int) -> torch.Tensor:
        """Position embeddings for a grid, `(1, num_prefix_positions + rows * cols, hidden_size)`.

        Bicubic in float32, those before the patches as they are. To a size (DeiT and DeiT-III: deit/main.py,
        `--finetune`), or by DINO's rule, also DINOv2's: the offset is added to the new side before it is divided by
        the old one (dinov2/models/vision_transformer.py, `interpolate_pos_encoding`).
        """
        num_prefix_positions = self.config.num_prefix_positions
        positions = self.tensors["pos_embed"].float()
        side = math.isqrt(positions.shape[1] - num_prefix_positions)
        if (rows, cols) == (side, side):
            return positions
        offset = self.config.interpolate_offset
        target = (
            {"scale_factor": ((rows + offset) / side, (cols + offset) / side)} if offset else {"size": (rows, cols)}
        )
        prefix, patches = positions.tensor_split([num_prefix_positions], dim=1)
        # (1, hidden_size, side, side): one image, with the width of the model as its channels
        image = patches.mT.unflatten(-1, (side, side))
        image = nn.functional.interpolate(image, mode="bicubic", antialias=self.config.interpolate_antialias, **target)
        return torch.cat([prefix, image.flatten(2).mT], dim=1)


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
