# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""timm's VisionTransformer: the names of its tensors, the arguments of its constructor, and which models are plain.

A plain ViT is one that can be built a second time from nothing but its ViTReg config. Whether that gives the same
modules with the same settings is looked up (`config_of`), so that no variant is taken for another by its name.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from conversion.family import ConversionError, Outputs
from conversion.parity import vitreg_outputs
from conversion.renaming import Rules
from conversion.vit_layout import BACKBONE_RULES, CLASSIFIER_RULES, LAYER_SCALE_RULES, NEW, OLD
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification


try:
    import timm
    from timm.layers import Attention, AttentionPoolLatent, GluMlp, LayerNorm, Mlp, PatchEmbed, SwiGLUPacked
    from timm.layers.activations import GELU, GELUTanh, QuickGELU
    from timm.models import list_models, model_entrypoint
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Block, VisionTransformer
except ImportError:
    timm = None


MODULES = ("vision_transformer", "deit")  # of timm, that build plain ViTs
POOL = "attn_pool."

# What is in every layout; `rules` adds what depends on the config.
COMMON_RULES: Rules = {
    **BACKBONE_RULES,
    **LAYER_SCALE_RULES,
    **CLASSIFIER_RULES,
    "reg_token": "embeddings.register_tokens",
    "dist_token": "embeddings.distillation_token",
    "mask_token": "embeddings.mask_token",
    "norm_pre.{param}": "embeddings.pre_layernorm.{param}",
    OLD + ".attn.q_norm.{param}": NEW + ".attention.q_norm.{param}",
    OLD + ".attn.k_norm.{param}": NEW + ".attention.k_norm.{param}",
    POOL + "latent": "pooler.latent",
    POOL + "q.{param}": "pooler.q_proj.{param}",
    POOL + "kv.{param}": ("pooler.k_proj.{param}", "pooler.v_proj.{param}"),
    POOL + "proj.{param}": "pooler.o_proj.{param}",
    POOL + "norm.{param}": "pooler.norm.{param}",
    POOL + "mlp.fc1.{param}": "pooler.mlp.fc1.{param}",
    POOL + "mlp.fc2.{param}": "pooler.mlp.fc2.{param}",
    "head_dist.{param}": "distillation_classifier.{param}",
}

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
# Modules of timm that no ViTReg has, by their class.
UNLIKE = {
    "DiffAttention": "differential attention",
    "DiffParallelScalingBlock": "differential attention and parallel blocks with scaled norms",
    "ParallelScalingBlock": "parallel blocks: attention and MLP read the same norm",
    "ParallelThingsBlock": "parallel blocks: several attentions side by side",
    "ResPostBlock": "norms after the residual branches",
    "AttentionPoolPrr": "pooling with a residual of its own",
    "RmsNorm": "RMS norms in the place of layer norms",
    "SimpleNorm": "norms without a mean in the place of layer norms",
    "SwiGLU": "a SwiGLU MLP with a norm of its own",
    "HybridEmbed": "a convolutional network before the patches",
    "AttentionRope": "rotary position embeddings",
}
# Settings that change nothing at sizes that are a multiple of the patch and outside of training.
WITHOUT_EFFECT = {
    "training",
    "dynamic_img_size",
    "dynamic_img_pad",
    "strict_img_size",
    "flatten",
    "output_fmt",
    "img_size",
    "grad_checkpointing",
    "weight_init_mode",
    "fix_init",
    "inplace",
    "init_values",
    "global_pool",  # read by `config_of`
    "no_embed_class",  # seen in the shape of the position embeddings
    "distilled_training",
}
IN_TRAINING_ONLY = ("Dropout", "DropPath", "PatchDropout")


def rules(config: ViTRegConfig, is_classifier: bool) -> Rules:
    """timm's names to ViTReg's.

    Args:
        config: Of the ViTReg model.
        is_classifier: Whether the head is a classifier; a projection otherwise, where the config has one.
    """
    own = dict(COMMON_RULES)
    if config.final_norm == "pooled":
        own["fc_norm.{param}"] = own.pop("norm.{param}")
    if config.use_swiglu_ffn:
        own[OLD + ".mlp.fc1.{param}"] = (NEW + ".mlp.gate_proj.{param}", NEW + ".mlp.up_proj.{param}")
        own[OLD + ".mlp.fc2.{param}"] = NEW + ".mlp.down_proj.{param}"
    if config.projection_dim is not None and not is_classifier:
        own["head.weight"] = "projection.weight"
        del own["head.{param}"]
    return own


def arguments(config: ViTRegConfig, num_classes: int) -> dict[str, Any]:
    """What timm's constructor is called with, as far as JSON can hold it. `callables` has the rest."""
    rows, cols = (side * config.patch_size for side in config.grid_size)
    hidden_features = config.intermediate_size * (2 if config.use_swiglu_ffn else 1)
    activations = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return {
        "img_size": rows if rows == cols else [rows, cols],
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "num_classes": num_classes,
        "global_pool": {"cls": "token", "mean": "avg", "map": "map"}[config.pooler_type],
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": _ratio(hidden_features, config.hidden_size),
        "qkv_bias": config.qkv_bias,
        "qk_norm": config.use_qk_norm,
        "proj_bias": config.proj_bias,
        # timm takes 0 for none, and drops an argument that is None
        "init_values": 0.0 if config.layerscale_value is None else config.layerscale_value or 1e-5,
        "class_token": config.use_cls_token,
        "no_embed_class": config.num_prefix_tokens > 0 and not _has_prefix_positions(config),
        "reg_tokens": config.num_register_tokens,
        "pre_norm": config.use_pre_layernorm,
        "final_norm": config.final_norm != "none",
        "fc_norm": config.final_norm == "pooled",
        "act_layer": "silu" if config.use_swiglu_ffn else activations[config.hidden_act],
    }


def callables(config: ViTRegConfig) -> dict[str, Any]:
    """The arguments of timm's constructor that JSON cannot hold."""
    return {
        "norm_layer": functools.partial(LayerNorm, eps=config.layer_norm_eps),
        "mlp_layer": SwiGLUPacked if config.use_swiglu_ffn else Mlp,
    }


def build(config: ViTRegConfig, num_classes: int, **changes: Any) -> nn.Module:
    """timm's model on the meta device, by the constructor of its class."""
    model_class = VisionTransformerDistilled if config.use_distillation_token else VisionTransformer
    with no_init_weights(), torch.device("meta"):
        return model_class(**{**arguments(config, num_classes), **callables(config), "weight_init": "skip", **changes})


def create(name: str, **model_args: Any) -> nn.Module:
    """timm's model on the meta device, by its name or by "local-dir:" and a folder.

    Raises:
        ConversionError: where timm refuses the arguments.
    """
    try:
        with no_init_weights(), torch.device("meta"):
            return timm.create_model(name, pretrained=False, weight_init="skip", **model_args)
    except (AssertionError, TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ConversionError(
            f"timm {timm.__version__} cannot build {name}: {' '.join(str(error).split())}"
        ) from error


def architectures() -> list[str]:
    """Names of all models of timm that may be plain ViTs."""
    return list_models(module=MODULES)


@functools.cache
def plain_architecture(name: str) -> tuple[ViTRegConfig, int, int] | None:
    """Config, classes and parameters of a model of timm with the arguments that it has by default.

    `None` where it is no plain ViT. On the meta device, 20 ms a name.
    """
    model = create(name)
    try:
        config = config_of(model, name)
    except ConversionError:
        return None
    return config, model.num_classes, sum(parameter.numel() for parameter in model.parameters())


def module_of(architecture: str) -> str:
    """The module of timm that builds the models of a name."""
    return model_entrypoint(architecture).__module__.rpartition(".")[2]


def config_of(model: nn.Module, name: str) -> ViTRegConfig:
    """The config of the ViTReg that computes the same, from the attributes of a model on the meta device.

    Args:
        model: Of timm.
        name: For messages.

    Raises:
        ConversionError: where ViTReg cannot compute the same.
    """

    def refuse_if(condition: bool, reason: str):
        if condition:
            raise ConversionError(f"{name} is no plain ViT, and ViTReg cannot hold it: it has {reason}.")

    refuse_if(type(model) not in (VisionTransformer, VisionTransformerDistilled), f"the class {type(model).__name__}")
    for path, module in model.named_modules():
        refuse_if(type(module).__name__ in UNLIKE, f"{UNLIKE.get(type(module).__name__)} ({path})")
    block, pool = model.blocks[0], model.attn_pool
    kinds = {"blocks.0": (block, Block), "patch_embed": (model.patch_embed, PatchEmbed)}
    kinds |= {"attn_pool": (pool, AttentionPoolLatent)} if pool is not None else {}
    for path, (module, kind) in kinds.items():
        refuse_if(type(module) is not kind, f"a {type(module).__name__} in the place of {path}")
    refuse_if(type(block.attn) is not Attention, f"{type(block.attn).__name__} in its blocks")
    refuse_if(type(block.mlp) not in (Mlp, GluMlp), f"{type(block.mlp).__name__} in its blocks")
    refuse_if(model.pos_embed is None, "no position embeddings")
    refuse_if(len(set(model.patch_embed.patch_size)) > 1, "patches that are not square")
    refuse_if(model.pool_include_prefix and pool is not None, "attention pooling of CLS and registers too")
    pools = {"token": "cls", "avg": "mean", "map": "map", "": "cls" if model.has_class_token else "mean"}
    refuse_if(model.global_pool not in pools, f'global_pool="{model.global_pool}"')
    is_pooled = not isinstance(model.fc_norm, nn.Identity) or model.num_classes > 0
    refuse_if(model.global_pool == "" and is_pooled, "a head on every token")
    refuse_if(type(model) is VisionTransformerDistilled and model.num_reg_tokens > 0, "registers, but forgets them")
    has_activation = _activation(block.mlp.act)
    refuse_if(has_activation is None, f"{type(block.mlp.act).__name__} as its activation")

    config = _config(model, pools[model.global_pool], ACTIVATIONS[has_activation or "gelu"])
    difference = next(differences(model, config), None)
    refuse_if(difference is not None, str(difference))
    return config


def _config(model: nn.Module, pooler_type: str, hidden_act: str) -> ViTRegConfig:
    """What the attributes of a model say, whatever else it may have."""
    block, patch_embed = model.blocks[0], model.patch_embed
    is_distilled = type(model) is VisionTransformerDistilled
    is_glu = type(block.mlp) is GluMlp
    patch_size = patch_embed.patch_size[0]
    height, width = (side * patch_size for side in patch_embed.grid_size)
    num_prefix_positions = model.pos_embed.shape[1] - patch_embed.num_patches
    norms_pooled = not isinstance(model.fc_norm, nn.Identity)
    has_final_norm = norms_pooled or not isinstance(model.norm, nn.Identity)
    reads_cls = pooler_type == "cls" and not norms_pooled
    return ViTRegConfig(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc2.in_features,
        hidden_act="gelu" if is_glu else hidden_act,
        layer_norm_eps=block.norm1.eps,
        image_size=height if height == width else (height, width),
        patch_size=patch_size,
        num_channels=model.in_chans,
        qkv_bias=block.attn.qkv.bias is not None,
        use_qk_norm=not isinstance(block.attn.q_norm, nn.Identity),
        patch_bias=patch_embed.proj.bias is not None,
        proj_bias=block.attn.proj.bias is not None,
        mlp_bias=block.mlp.fc1.bias is not None,
        use_pre_layernorm=not isinstance(model.norm_pre, nn.Identity),
        final_norm=("pooled" if norms_pooled else "tokens") if has_final_norm else "none",
        layerscale_value=getattr(block.ls1, "init_values", None),
        # the rule by which timm spreads a drop_path_rate over the layers
        drop_path_schedule="linear",
        use_swiglu_ffn=is_glu,
        use_cls_token=model.has_class_token,
        use_distillation_token=is_distilled,
        num_register_tokens=model.num_reg_tokens,
        position_embedding_type=_position_embedding_type(model, num_prefix_positions),
        # timm/layers/pos_embed.py: to a size, antialiased
        interpolate_antialias=True,
        interpolate_offset=0.0,
        pooler_type=pooler_type,
        classifier_layout="cls_distillation" if is_distilled else ("cls" if reads_cls else "pooled"),
    )


def _position_embedding_type(model: nn.Module, num_prefix_positions: int) -> str:
    if num_prefix_positions == 0:
        return "patches"
    return "cls_patches" if num_prefix_positions == 1 and model.has_class_token else "prefix_patches"


def _has_prefix_positions(config: ViTRegConfig) -> bool:
    """Whether every token before the patches has a position in timm's layout, where it is all or none."""
    return config.num_prefix_positions == config.num_prefix_tokens


def differences(model: nn.Module, config: ViTRegConfig) -> Iterator[str]:
    """Modules and settings that a model has and the one that is built from its config has not, in words.

    Blocks are compared among each other, so that the second model needs only one.
    """
    plain = build(config, model.num_classes, depth=1)
    expected, found = dict(_settings(plain)), dict(_settings(model, num_blocks=1))
    for path in [*found, *(path for path in expected if path not in found)]:
        if expected.get(path) != found.get(path):
            yield _in_words(path, found.get(path), expected.get(path))
    first = dict(_settings(model.blocks[0]))
    for index, block in enumerate(model.blocks):
        if dict(_settings(block)) != first:
            yield f"blocks that differ: the first and number {index}"


def _settings(model: nn.Module, num_blocks: int | None = None) -> Iterator[tuple[str, tuple]]:
    """Every module's path with its class, its own tensors' shapes and its settings."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        number = path.split(".")[1] if path.startswith("blocks.") else "0"
        if kind in IN_TRAINING_ONLY or (num_blocks is not None and int(number) >= num_blocks):
            continue
        if (activation := _activation(module)) is not None:
            yield path, (activation,)
        elif not _stands_for_dropout(path, kind):
            tensors = {name: tuple(tensor.shape) for name, tensor in module.named_parameters(recurse=False)}
            tensors |= {name: tuple(tensor.shape) for name, tensor in module.named_buffers(recurse=False)}
            yield path, (kind, tensors, _simple_attributes(module))


def _in_words(path: str, found: tuple | None, expected: tuple | None) -> str:
    """Of two entries of `_settings` what the first has and the second has not."""
    if found is None or expected is None or found[0] != expected[0] or len(found) == 1:
        here, there = (entry[0] if entry else "nothing" for entry in (found, expected))
        return f"{here} as {path}, not {there}"
    settings = [
        f"{name}={these.get(name)}, not {those.get(name)}"
        for these, those in zip(found[1:], expected[1:])
        for name in [*these, *those]
        if these.get(name) != those.get(name)
    ]
    return f"{settings[0]}" + (f" ({path})" if path else "")


def _stands_for_dropout(path: str, kind: str) -> bool:
    """Whether this is what timm puts in the place of a dropout with the rate 0."""
    return kind == "Identity" and "drop" in path.rpartition(".")[2]


def _simple_attributes(module: nn.Module) -> dict[str, Any]:
    simple = (bool, int, float, str, tuple, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, simple) and not name.startswith("_") and name not in WITHOUT_EFFECT
    }


def _activation(module: nn.Module) -> str | None:
    """timm's name of an activation that ViTReg has too."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
    return {GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu", nn.SiLU: "silu"}.get(type(module))


def _ratio(hidden_features: int, width: int) -> float:
    """`mlp_ratio` for a width of the MLP, which timm gets back by cutting off what is behind the point."""
    ratio = hidden_features / width
    return ratio if int(width * ratio) == hidden_features else (hidden_features + 0.5) / width


class TimmOutputs:
    """timm's model as `parity.compare` calls it.

    Args:
        model: Filled, in eval mode, and able to take the sizes that it is compared at.
        head: What its head is: "logits", "image_embeds" of a projection, or "pooled" where it has none. "" where
            ViTReg has nothing of that kind.
    """

    def __init__(self, model: nn.Module, head: str):
        self.model = model
        self.head = head
        self.name = f"timm {timm.__version__}"

    def __call__(self, pixel_values: torch.Tensor) -> Outputs:
        """`(batch_size, num_channels, height, width)` to tokens and what the head makes of them."""
        tokens = self.model.forward_features(pixel_values)
        outputs = {"tokens": tokens}
        return outputs if self.head == "" else {**outputs, self.head: self.model.forward_head(tokens)}


def head_of(model: PreTrainedModel, timm_model: nn.Module) -> str:
    """What is compared beside the tokens, see `TimmOutputs`."""
    if isinstance(model, ViTRegForImageClassification):
        return "logits" if timm_model.num_classes > 0 else ""
    if model.config.projection_dim is not None:
        return "image_embeds"
    # timm has a mean of CLS and distillation token there, or all tokens
    return "" if model.config.use_distillation_token or timm_model.global_pool == "" else "pooled"


def our_outputs(model: PreTrainedModel, head: str) -> Callable[[torch.Tensor], Outputs]:
    """A ViTReg model as `parity.compare` calls it, with outputs of the same names as `TimmOutputs`."""
    if head in ("logits", ""):
        return vitreg_outputs(model)

    def outputs(pixel_values: torch.Tensor) -> Outputs:
        result = model(pixel_values)
        pooled = result.image_embeds if head == "image_embeds" else result.pooler_output
        return {"tokens": result.last_hidden_state, head: pooled}

    return outputs
