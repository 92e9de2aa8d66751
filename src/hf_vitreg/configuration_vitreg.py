# Copyright 2026 The ViTReg team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of ViTReg, the vision transformer with register tokens."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import auto_docstring


# Every entry, whichever class is saved: a repository written from the classifier must load as a backbone too.
AUTO_MAP = {
    "AutoConfig": "configuration_vitreg.ViTRegConfig",
    "AutoModel": "modeling_vitreg.ViTRegModel",
    "AutoModelForImageClassification": "modeling_vitreg.ViTRegForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_vitreg.ViTRegForSemanticSegmentation",
    "AutoModelForDepthEstimation": "modeling_vitreg.ViTRegForDepthEstimation",
    "AutoBackbone": "modeling_vitreg.ViTRegBackbone",
}


@auto_docstring(checkpoint="org/vitreg-large")
@strict
class ViTRegConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    mlp_ratio (`float` or `int`, *optional*, defaults to 4.0):
        Width of the MLP over the width of the model, used where `intermediate_size` is not given. With SwiGLU two
        thirds of it are taken and rounded up to a multiple of 8, as in DINOv2.
    layerscale_value (`float`, *optional*, defaults to 1.0):
        Initial value of LayerScale. `None` leaves the parameter out, which is not the same as 1.0: that one trains.
    drop_path_schedule (`str`, *optional*, defaults to `"uniform"`):
        `"uniform"` drops every residual branch with `drop_path_rate` (DINOv2, DeiT-III); `"linear"` raises the rate
        from 0 in the first layer to `drop_path_rate` in the last.
    use_swiglu_ffn (`bool`, *optional*, defaults to `False`):
        Whether the MLP is SwiGLU (DINOv2 g/14) in place of `hidden_act` between two linear layers.
    qkv_bias (`bool`, *optional*, defaults to `True`):
        Whether queries, keys and values have a bias.
    key_bias (`bool`, *optional*, defaults to `True`):
        With `qkv_bias`: whether the keys have one too. DINOv3 masks it, which is the same as having none.
    use_qk_norm (`bool`, *optional*, defaults to `False`):
        Whether queries and keys are normalized in every head before they meet.
    use_cls_token (`bool`, *optional*, defaults to `True`):
        Whether there is a CLS token. Models that pool their patches (timm's `gap` and SigLIP) have none.
    use_distillation_token (`bool`, *optional*, defaults to `False`):
        Whether a distillation token follows CLS (DeiT). It is no register: it has a position and a classifier.
    num_register_tokens (`int`, *optional*, defaults to 4):
        Number of register tokens, 0 or more, test-time registers among them. They stand before the patches, after
        CLS.
    register_init_std (`float`, *optional*, defaults to 1e-06):
        Standard deviation of the registers (and of CLS) at initialization. Must be positive: registers that start
        equal get equal gradients and stay one register.
    num_test_time_registers (`int`, *optional*, defaults to 0):
        How many of the registers, the last ones, were not trained (Jiang et al., 2025): tokens of zeros without a
        parameter and without a position, which receive what the `register_neurons` would have given to patches.
    register_neurons (`dict[int, list[int]]`, *optional*):
        The neurons whose activations are shifted to the test-time registers: from a layer, counted from 0, to
        channels between the activation and the last linear map of its MLP. JSON makes the layers strings, which are
        turned back into numbers.
    register_neuron_reduce (`str`, *optional*, defaults to `"neuron"`):
        What a test-time register receives: of each neuron its own activation of the largest magnitude over the tokens
        (`"neuron"`), or of all neurons of a layer the one that is largest among them (`"layer"`, as the code does that
        was published with the paper).
    use_mask_token (`bool`, *optional*, defaults to `False`):
        Whether the model has a mask token, for masked image modelling.
    position_embedding_type (`str`, *optional*, defaults to `"cls_patches"`):
        The tokens that have a learned position embedding: `"cls_patches"` (DINO, DINOv2, OpenCLIP), `"patches"`
        (DeiT-III) or `"prefix_patches"` (every token before the patches has one too: DeiT with its distillation token,
        some timm models with registers). Or `"rope"`: none, queries and keys of the patches are rotated (DINOv3).
    rope_theta (`float`, *optional*, defaults to 100.0):
        With `"rope"`: base of the periods that a new model starts with. They are stored with the weights, and what is
        stored is used.
    rope_normalize_coords (`str`, *optional*, defaults to `"separate"`):
        With `"rope"`: what the coordinates of a patch are divided by, its own side (`"separate"`), the longer
        (`"max"`) or the shorter one (`"min"`) of the grid.
    pos_embed_shift (`float`, *optional*):
        With `"rope"`, in training: coordinates are shifted by up to this much, each axis for itself.
    pos_embed_jitter (`float`, *optional*):
        With `"rope"`, in training: each axis is scaled by a log-uniform factor between `1 / jitter` and `jitter`.
    pos_embed_rescale (`float`, *optional*):
        With `"rope"`, in training: both axes are scaled by one log-uniform factor between `1 / rescale` and `rescale`
        (2 in DINOv3).
    interpolate_antialias (`bool`, *optional*, defaults to `True`):
        Whether position embeddings are antialiased where they are interpolated. DINOv2 models with registers: `True`,
        without: `False`.
    interpolate_offset (`float`, *optional*, defaults to 0.0):
        0 interpolates position embeddings to the size of the patch grid (DINOv2 models with registers). Another value
        is added to rows and columns, and the resulting scale factors are used (0.1 in DINOv2 models without).
    patch_bias (`bool`, *optional*, defaults to `True`):
        Whether the patch embedding has a bias. OpenCLIP's has none.
    proj_bias (`bool`, *optional*, defaults to `True`):
        Whether the output projection of the attention has a bias.
    mlp_bias (`bool`, *optional*, defaults to `True`):
        Whether the MLP has biases.
    use_pre_layernorm (`bool`, *optional*, defaults to `False`):
        Whether all tokens are normalized once before the first layer (OpenCLIP).
    final_norm (`str`, *optional*, defaults to `"tokens"`):
        What is normalized after the last layer: `"tokens"`; `"untied"`, CLS and registers by a norm of their own
        (DINOv3 allows it); `"pooled"`, the pooled vector and no token (timm's `fc_norm`), which needs
        `classifier_layout="pooled"`; `"none"`.
    pooler_type (`str`, *optional*, defaults to `"cls"`):
        What `pooler_output` is: `"cls"`, the `"mean"` of the patches, or `"map"`, which attends to the patches with a
        learned query (SigLIP) and needs `classifier_layout="pooled"`. Registers are in neither.
    projection_dim (`int`, *optional*):
        Where given, `pooler_output` is projected to this width as `image_embeds` (CLIP). The classifier reads what is
        not projected, and has no projection.
    classifier_layout (`str`, *optional*, defaults to `"cls_mean"`):
        What the classifier reads: `"pooled"` (`pooler_output`), or after the final norm `"cls"`, `"cls_mean"` (CLS and
        the mean of the patches), `"last4_cls"` (CLS of the last four layers: DINO's ViT-S), `"last4_cls_mean"` (these
        and the mean of the last layer's patches: DINOv2's 4-layer heads) or `"cls_distillation"` (two classifiers, on
        CLS and on the distillation token, averaged: DeiT). Registers are in no mean.
    semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
        The label of pixels that have no class: the segmentation loss leaves them out.
    num_depth_bins (`int`, *optional*, defaults to 256):
        Number of depths, evenly from `min_depth` to `max_depth`, whose mean by their predicted weights is the depth.
    min_depth (`float`, *optional*, defaults to 0.001):
        Least depth that the model can predict, in the unit of the labels, which are metres in most data sets.
    max_depth (`float`, *optional*, defaults to 10.0):
        Largest depth that it can predict; the loss leaves out what is farther. DINOv2: 10 for NYU, 80 for KITTI.
    apply_layernorm (`bool`, *optional*, defaults to `True`):
        Whether the final norm is applied to the layers, chosen by `out_indices`, that the backbone returns and the
        segmentation and depth heads read. DINOv2's depth heads are published for `False`.
    reshape_hidden_states (`bool`, *optional*, defaults to `True`):
        Whether the backbone returns maps of shape `(batch_size, hidden_size, rows, cols)` without CLS and registers.
        If `False`, all tokens as `(batch_size, sequence_length, hidden_size)`.
    return_prefix_tokens (`bool`, *optional*, defaults to `False`):
        Whether the backbone returns CLS and registers of every selected stage beside the maps.

    Example:

    ```python
    >>> from hf_vitreg import ViTRegConfig, ViTRegModel

    >>> configuration = ViTRegConfig(num_register_tokens=8)
    >>> model = ViTRegModel(configuration)
    >>> model.config.num_prefix_tokens
    9
    ```"""

    model_type = "vitreg"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float | int = 4.0
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    key_bias: bool = True
    use_qk_norm: bool = False
    patch_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_pre_layernorm: bool = False
    final_norm: Literal["tokens", "untied", "pooled", "none"] = "tokens"
    layerscale_value: float | int | None = 1.0
    drop_path_rate: float | int = 0.0
    drop_path_schedule: Literal["uniform", "linear"] = "uniform"
    use_swiglu_ffn: bool = False
    use_cls_token: bool = True
    use_distillation_token: bool = False
    num_register_tokens: int = 4
    register_init_std: float = 1e-6
    num_test_time_registers: int = 0
    register_neurons: dict[int, list[int]] | dict[str, list[int]] | None = None
    register_neuron_reduce: Literal["neuron", "layer"] = "neuron"
    use_mask_token: bool = False
    position_embedding_type: Literal["cls_patches", "patches", "prefix_patches", "rope"] = "cls_patches"
    rope_theta: float | int = 100.0
    rope_normalize_coords: Literal["separate", "max", "min"] = "separate"
    pos_embed_shift: float | int | None = None
    pos_embed_jitter: float | int | None = None
    pos_embed_rescale: float | int | None = None
    interpolate_antialias: bool = True
    interpolate_offset: float | int = 0.0
    pooler_type: Literal["cls", "mean", "map"] = "cls"
    projection_dim: int | None = None
    classifier_layout: Literal["pooled", "cls", "cls_mean", "last4_cls", "last4_cls_mean", "cls_distillation"] = (
        "cls_mean"
    )
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    semantic_loss_ignore_index: int = 255
    num_depth_bins: int = 256
    min_depth: float | int = 0.001
    max_depth: float | int = 10.0
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    return_prefix_tokens: bool = False

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = int(self.hidden_size * self.mlp_ratio)
            if self.use_swiglu_ffn:
                self.intermediate_size = (int(self.intermediate_size * 2 / 3) + 7) // 8 * 8
        if self.register_neurons is not None:
            self.register_neurons = _layers_as_numbers(self.register_neurons)
        # `strict` calls it too, later and when saved, but wraps its ValueError in one of its own
        self.validate_vitreg()
        self.stage_names = ["stem"] + [f"stage{idx}" for idx in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        kwargs["auto_map"] = dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the first patch: CLS, the distillation token, and the registers as the last."""
        return self.use_cls_token + self.use_distillation_token + self.num_register_tokens

    @property
    def register_slice(self) -> slice:
        """Where the registers are among the tokens."""
        return slice(self.num_prefix_tokens - self.num_register_tokens, self.num_prefix_tokens)

    @property
    def num_prefix_positions(self) -> int:
        """Number of these that have a learned position embedding."""
        positions = {"cls_patches": 1, "prefix_patches": self.num_prefix_tokens - self.num_test_time_registers}
        return positions.get(self.position_embedding_type, 0)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the patch grid that the position embeddings were trained on."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    # PreTrainedConfig refuses `output_attentions` outside eager attention, because its models would return nothing.
    # Ours compute real attention in every implementation.
    @property
    def output_attentions(self) -> bool:
        """Whether forward returns the attention of every layer."""
        return self._output_attentions

    @output_attentions.setter
    def output_attentions(self, value: bool):
        self._output_attentions = value

    def validate_output_attentions(self):
        """Nothing to refuse: see `output_attentions`."""

    def validate_vitreg(self):
        """Raises `ValueError` for values that no ViTReg can have."""
        if self.num_register_tokens < 0:
            raise ValueError(f"num_register_tokens must be 0 or more, got {self.num_register_tokens}.")
        if self.register_init_std <= 0:
            raise ValueError(
                f"register_init_std must be positive, got {self.register_init_std}: registers that start equal stay "
                "equal. DINOv2 uses 1e-6, DINOv3 0.02."
            )
        self._validate_test_time_registers()
        for name in ("patch_size", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not known. There are {', '.join(ACT2FN)}.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and less than 1, got {self.drop_path_rate}.")
        if not 0 <= self.interpolate_offset < 1:
            raise ValueError(f"interpolate_offset must be 0 or more and below 1, got {self.interpolate_offset}.")
        if min(self.grid_size) < 1:
            raise ValueError(
                f"image_size {self.image_size} must be at least one patch of {self.patch_size} pixels each way."
            )
        if self.rope_theta <= 0:
            raise ValueError(f"rope_theta must be positive, got {self.rope_theta}. DINOv3 uses 100.")
        for name, least in (("pos_embed_shift", 0), ("pos_embed_jitter", 1), ("pos_embed_rescale", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, or None, got {value}.")
        if self.num_depth_bins < 2:
            raise ValueError(f"num_depth_bins must be 2 or more, got {self.num_depth_bins}. DINOv2 uses 256.")
        if not 0 <= self.min_depth < self.max_depth:
            raise ValueError(
                f"min_depth must be 0 or more and less than max_depth, got {self.min_depth} and {self.max_depth}."
            )
        self._validate_readers()
        if self.classifier_layout.startswith("last4") and self.num_hidden_layers < 4:
            raise ValueError(
                f'classifier_layout="{self.classifier_layout}" reads four layers, but '
                f'num_hidden_layers={self.num_hidden_layers}. Choose "cls" or "cls_mean".'
            )
        if self.classifier_layout.startswith("last4") and self.final_norm == "none":
            raise ValueError(
                f'classifier_layout="{self.classifier_layout}" reads normalized tokens of four layers, which '
                'final_norm="none" does not give. Choose "cls", "cls_mean" or "pooled".'
            )

    def _validate_test_time_registers(self):
        """Raises `ValueError` for neurons that there are not, and where nothing is shifted or nothing receives it."""
        number, total = self.num_test_time_registers, self.num_register_tokens
        if not 0 <= number <= total:
            raise ValueError(
                f"num_test_time_registers must be 0 to num_register_tokens={total}, of which they are the last, got "
                f"{number}."
            )
        layers = self.register_neurons or {}
        if bool(number) != any(layers.values()):
            raise ValueError(
                f"num_test_time_registers={number} and register_neurons={self.register_neurons} do not go together: "
                "test-time registers receive what register neurons give, and there must be both or neither."
            )
        for layer, neurons in layers.items():
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"register_neurons are of layers 0 to {self.num_hidden_layers - 1}, num_hidden_layers less 1, got "
                    f"{layer}."
                )
            if len(set(neurons)) != len(neurons):
                raise ValueError(f"register_neurons of layer {layer} must be different ones, got {neurons}.")
            wrong = [neuron for neuron in neurons if not 0 <= neuron < self.intermediate_size]
            if wrong:
                raise ValueError(
                    f"register_neurons of layer {layer} are 0 to {self.intermediate_size - 1}, intermediate_size less "
                    f"1, got {', '.join(map(str, wrong))}."
                )

    def _validate_readers(self):
        """Raises `ValueError` where something reads a token that there is not, or nothing reads a pooler."""
        needs = {
            'position_embedding_type="cls_patches"': self.position_embedding_type == "cls_patches",
            'pooler_type="cls"': self.pooler_type == "cls",
            f'classifier_layout="{self.classifier_layout}"': self.classifier_layout != "pooled",
        }
        for name in (name for name, needs_cls in needs.items() if needs_cls and not self.use_cls_token):
            raise ValueError(
                f"{name} needs a CLS token, and use_cls_token=False. Without CLS there are "
                'position_embedding_type="patches", pooler_type="mean" or "map", and classifier_layout="pooled".'
            )
        if self.classifier_layout == "cls_distillation" and not self.use_distillation_token:
            raise ValueError('classifier_layout="cls_distillation" needs use_distillation_token=True.')
        # a parameter that no forward uses stops distributed training
        unread = {'final_norm="pooled"': self.final_norm == "pooled", 'pooler_type="map"': self.pooler_type == "map"}
        for name in (name for name, has_weights in unread.items() if has_weights):
            if self.classifier_layout != "pooled":
                raise ValueError(
                    f'{name} has weights that only classifier_layout="pooled" reads, got '
                    f'classifier_layout="{self.classifier_layout}".'
                )


def _layers_as_numbers(neurons: dict[int, list[int]] | dict[str, list[int]]) -> dict[int, list[int]]:
    """As they were before JSON made the layers strings. Raises `ValueError` for what is no number, or comes twice."""
    try:
        layers = {int(layer): list(each) for layer, each in neurons.items()}
    except ValueError:
        raise ValueError(f"register_neurons go from layers, as numbers, to neurons, got {list(neurons)}.") from None
    if len(layers) < len(neurons):
        raise ValueError(f"register_neurons have a layer twice: {list(neurons)}.")
    return layers


__all__ = ["ViTRegConfig"]
