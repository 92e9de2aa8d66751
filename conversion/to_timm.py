# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A ViTReg model as timm's: a folder for `timm.create_model("local-dir:…")`, or one weight file.

What timm's layout cannot hold is named, and refused where its model would compute something else.
"""

import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.image_processing_utils import BaseImageProcessor

import hf_vitreg
from conversion.exporting import check_same_weights, own_state
from conversion.family import ConversionError, Outputs
from conversion.parity import TOLERANCE, Row, comparison_sizes
from conversion.renaming import Rules, fill, restore
from conversion.timm_layout import (
    ACTIVATIONS,
    TimmOutputs,
    architectures,
    arguments,
    callables,
    create,
    differences,
    head_of,
    our_outputs,
    plain_architecture,
    rules,
)
from conversion.timm_models import CONFIG, INTERPOLATIONS, WEIGHTS
from conversion.timm_reference import require_timm
from conversion.vit_layout import NEW, OLD
from conversion.vitreg_folder import MappedTensors, license_of, local_folder, open_model
from conversion.writing import RECORD, check_output_dir, check_output_file
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification
from hf_vitreg.atomic import atomic_file, atomic_folder


WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
MASK_TOKEN = "embeddings.mask_token"
QKV = OLD + ".attn.qkv."
BACKBONE_ALONE = (
    "To write the backbone alone, save it first: ViTRegModel.from_pretrained(folder).save_pretrained(another)."
)
# Of timm's own architectures those whose weights it changes when it loads them, if others will do.
UNUSUAL = ("siglip", "radio", "flexivit", "test_")
# How the arguments that JSON cannot hold are written in Python.
IN_PYTHON = {"norm_layer": "functools.partial(timm.layers.LayerNorm, eps={eps:g})", "mlp_layer": "timm.layers.{mlp}"}


@dataclass(frozen=True)
class Export:
    """A model in timm's layout, and everything that is needed to compare it and to write it.

    Attributes:
        source: What the user gave.
        tensors: To write.
        architecture: timm's name of the model.
        model_args: What its constructor is called with, where that is not its default.
        python_args: The arguments that only Python can hold, as they are written there.
        config: Of the folder.
        implementation: The ViTReg model, filled from the same tensors.
        reference: timm's model, filled from the tensors that are written.
        reference_name: Its name and version.
        sizes: Height and width in pixels of the images to compare on.
        num_channels: Of these images.
        remarks: What timm's layout does not hold, and what it does in another way.
    """

    source: str
    tensors: dict[str, torch.Tensor]
    architecture: str
    model_args: dict[str, Any]
    python_args: dict[str, str]
    config: dict[str, Any]
    implementation: Callable[[torch.Tensor], Outputs]
    reference: Callable[[torch.Tensor], Outputs]
    reference_name: str
    sizes: list[tuple[int, int]]
    num_channels: int
    remarks: list[str]

    def how_to_load(self, output: Path) -> str:
        """A line of Python."""
        if not is_weight_file(output):
            return f'timm.create_model("local-dir:{output}", pretrained=True)'
        given = [f"{name}={value!r}" for name, value in self.model_args.items()]
        given += [f"{name}={value}" for name, value in self.python_args.items()]
        return f"timm.create_model({', '.join([repr(self.architecture), f'checkpoint_path={str(output)!r}', *given])})"


def is_weight_file(output: Path) -> bool:
    """Whether one weight file is asked for, and not a folder."""
    return output.suffix in WEIGHT_SUFFIXES


def check_output(model: str, output: Path, overwrite: bool):
    """Raises `ConversionError` where the output cannot be written, or would take the model with it."""
    inputs = [Path(model)] if Path(model).exists() else []
    (check_output_file if is_weight_file(output) else check_output_dir)(output, overwrite, inputs)


def prepare(model: str, output: Path) -> Export:
    """A ViTReg model in timm's layout, with timm's model filled from it.

    Args:
        model: A folder, or the name of a repository on the Hub.
        output: What will be written: a weight file by its suffix, else a folder.

    Raises:
        ConversionError: where the model cannot be read, or timm's would compute something else.
    """
    require_timm()
    folder = local_folder(model)
    config, image_processor, tensors, model_class = open_model(str(folder))
    is_classifier = model_class is ViTRegForImageClassification
    _check_can_be_held(config, is_classifier)
    own_rules = _rules(config, is_classifier)
    restored = restore(tensors.without(MASK_TOKEN), own_rules)
    written, remarks = _as_timm_has_them(config, tensors, restored, is_classifier)

    num_classes = config.num_labels if is_classifier else config.projection_dim or 0
    timm_config = _as_timm_pools(config, is_classifier)
    architecture, model_args, python_args = _nearest_architecture(timm_config, num_classes)
    if python_args and not is_weight_file(output):
        raise ConversionError(
            f"timm's {CONFIG} cannot hold {' and '.join(python_args)} of this model (layer_norm_eps="
            f"{config.layer_norm_eps:g}, use_swiglu_ffn={config.use_swiglu_ffn}). Write a weight file, e.g. "
            f"{output}.safetensors: the line that loads it says them in Python."
        )
    preprocessing, more_remarks = _preprocessing(config, image_processor)
    if not preprocessing["fixed_input_size"]:
        model_args["dynamic_img_size"] = True
    timm_model = _filled(architecture, model_args, timm_config, num_classes, written)
    ours = fill(model_class, config, restored | _mask_token(tensors), own_rules)
    check_same_weights(own_state(ours), tensors)
    head = head_of(ours, timm_model)
    reference = TimmOutputs(timm_model, head)
    resizes_alike = config.interpolate_antialias and config.interpolate_offset == 0
    native = tuple(side * config.patch_size for side in config.grid_size)
    if not resizes_alike:
        remarks.append(
            f"timm interpolates position embeddings to a size and antialiases, and this model does not: at "
            f"{native[0]}x{native[1]} pixels the outputs are the same, at other sizes they differ"
            + (". That of the image processor is one of these." if model_args.get("dynamic_img_size") else ".")
        )
    return Export(
        source=model,
        tensors=written,
        architecture=architecture,
        model_args=model_args,
        python_args=python_args,
        config=_config(
            timm_config,
            architecture,
            model_args,
            num_classes,
            preprocessing | _license(folder),
            labels=[config.id2label[index] for index in range(num_classes)] if is_classifier else [],
        ),
        implementation=our_outputs(ours, head),
        reference=reference,
        reference_name=reference.name,
        sizes=_sizes(config, native, resizes_alike),
        num_channels=config.num_channels,
        remarks=remarks + more_remarks,
    )


def write(export: Export, rows: list[Row], output: Path) -> dict[str, Any]:
    """The folder, or the file, and the record of the conversion, which is returned and put into the folder."""
    record = {
        "source": export.source,
        "arch": export.architecture,
        "model_args": export.model_args | export.python_args,
        "load": export.how_to_load(output),
        "remarks": export.remarks,
        "reference": export.reference_name,
        "tolerance": TOLERANCE,
        "comparisons": [asdict(row) for row in rows],
        "versions": {"hf_vitreg": hf_vitreg.__version__}
        | {name: version(name) for name in ("timm", "torch", "transformers", "safetensors")},
    }
    if is_weight_file(output):
        with atomic_file(output) as file:
            _save(export.tensors, file, output.suffix)
        return record
    with atomic_folder(output) as folder:
        for name, content in ((CONFIG, export.config), (RECORD, record)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _save(export.tensors, folder / WEIGHTS, ".safetensors")
        # safetensors writes what only its owner may read
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)
    return record


def _save(tensors: Mapping[str, torch.Tensor], file: Path, suffix: str):
    if suffix == ".safetensors":
        save_file(dict(tensors), file, metadata={"format": "pt"})
    else:
        torch.save(dict(tensors), file)


def _check_can_be_held(config: ViTRegConfig, is_classifier: bool):
    """Refuses what timm's VisionTransformer would compute in another way.

    Raises:
        ConversionError: with every reason.
    """
    is_distilled, layout = config.use_distillation_token, config.classifier_layout
    readable = ("cls_distillation",) if is_distilled else ("pooled", "cls")
    has_registers = config.num_register_tokens > 0
    reasons = {
        'rotary position embeddings (position_embedding_type="rope")': config.position_embedding_type == "rope",
        'a norm of their own for CLS and registers (final_norm="untied")': config.final_norm == "untied",
        f'a classifier with classifier_layout="{layout}" (there are {", ".join(readable)})': is_classifier
        and layout not in readable,
        f"test-time registers (num_test_time_registers={config.num_test_time_registers}; it can do so by hooks: "
        "attach_test_time_registers)": config.num_test_time_registers > 0,
        "registers together with a distillation token": is_distilled and has_registers,
        "a distillation token without a position": is_distilled and config.position_embedding_type != "prefix_patches",
        'a distillation token and final_norm="pooled"': is_distilled and config.final_norm == "pooled",
        f"proj_bias={config.proj_bias} with mlp_bias={config.mlp_bias} (they are one)": config.proj_bias
        != config.mlp_bias,
        f"patch_bias={config.patch_bias} with use_pre_layernorm={config.use_pre_layernorm} (one of both)": (
            config.patch_bias == config.use_pre_layernorm
        ),
        f'hidden_act="{config.hidden_act}" (there are {", ".join(ACTIVATIONS.values())})': not config.use_swiglu_ffn
        and config.hidden_act not in ACTIVATIONS.values(),
        'pooler_type="map" with a SwiGLU MLP, or without biases': config.pooler_type == "map"
        and (config.use_swiglu_ffn or not config.mlp_bias),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ConversionError(
            f"timm's VisionTransformer cannot compute what this model does: {'; '.join(found)}."
            + (f" {BACKBONE_ALONE}" if is_classifier and layout not in readable else "")
        )


def _rules(config: ViTRegConfig, is_classifier: bool) -> Rules:
    """timm has no keys without a bias beside queries and values with one: zeros are the same."""
    own_rules = dict(rules(config, is_classifier))
    if config.qkv_bias and not config.key_bias:
        query, key, value = (f"{NEW}.attention.{part}_proj." for part in "qkv")
        del own_rules[QKV + "{param}"]
        own_rules[QKV + "weight"] = (query + "weight", key + "weight", value + "weight")
        own_rules[QKV + "bias"] = (query + "bias", None, value + "bias")
    return own_rules


def _mask_token(tensors: MappedTensors) -> dict[str, torch.Tensor]:
    return {"mask_token": tensors[MASK_TOKEN]} if MASK_TOKEN in tensors else {}


def _as_timm_has_them(
    config: ViTRegConfig, tensors: MappedTensors, restored: Mapping[str, torch.Tensor], is_classifier: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors that timm's model takes, and what of ours is not among them any more."""
    written, remarks = dict(restored), []
    if MASK_TOKEN in tensors:
        remarks.append("The mask token is left out: timm's model has none.")
    if config.qkv_bias and not config.key_bias:
        remarks.append("The keys have a bias of zeros: timm has queries, keys and values with a bias, or without.")
    if config.projection_dim is not None and not is_classifier:
        # as in timm's own CLIP towers
        written["head.bias"] = written["head.weight"].new_zeros(config.projection_dim)
        remarks.append("The projection is the head, with a bias of zeros.")
    if 0 < config.num_prefix_positions < config.num_prefix_tokens:
        positions = written["pos_embed"]
        written["cls_token"] = _exact_sum(written["cls_token"], positions[:, :1])
        # without what is no more needed of its memory
        written["pos_embed"] = positions[:, 1:].clone()
        remarks.append(
            "The position of CLS is added to CLS, and cannot be told from it any more: registers have no position "
            "here, and timm has one for every token before the patches, or for none."
        )
    return written, remarks


def _exact_sum(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The sum in the dtype of the weights, or in float32 where that would round."""
    total = first.float() + second.float()
    return total.to(first.dtype) if torch.equal(total.to(first.dtype).float(), total) else total


def _as_timm_pools(config: ViTRegConfig, is_classifier: bool) -> ViTRegConfig:
    """The same for timm, whose classifier and pooled vector are of one pooling."""
    config = copy.deepcopy(config)
    if is_classifier and config.classifier_layout != "pooled":
        config.pooler_type = "cls"
    return config


def _nearest_architecture(config: ViTRegConfig, num_classes: int) -> tuple[str, dict[str, Any], dict[str, str]]:
    """The name in timm that needs the fewest arguments, and these: what JSON can hold, and what only Python can."""
    # building one of every name takes seconds: first those that are of this patch size, or do not say theirs
    likely = [name for name in architectures() if f"patch{config.patch_size}_" in name or "patch" not in name]
    found = [_distance(name, config, num_classes) for name in likely if _is_of_the_kind(name, config)]
    if not found or min(found)[0]:
        found = [_distance(name, config, num_classes) for name in architectures() if _is_of_the_kind(name, config)]
    *_, name = min(found)
    base, base_classes, _ = plain_architecture(name)
    wanted, default = arguments(config, num_classes), arguments(base, base_classes)
    model_args = {key: value for key, value in wanted.items() if default[key] != value}
    if model_args.keys() & {"global_pool", "final_norm"}:
        # else it goes by the pooling
        model_args["fc_norm"] = wanted["fc_norm"]
    mlp = "SwiGLUPacked" if config.use_swiglu_ffn else "Mlp"
    python_args = {
        key: IN_PYTHON[key].format(eps=config.layer_norm_eps, mlp=mlp) for key in _only_in_python(base, config)
    }
    return name, model_args, python_args


def _is_of_the_kind(name: str, config: ViTRegConfig) -> bool:
    """Whether a name of timm is of a plain ViT, and of the class that the model needs."""
    plain = plain_architecture(name)
    return plain is not None and plain[0].use_distillation_token == config.use_distillation_token


def _distance(name: str, config: ViTRegConfig, num_classes: int) -> tuple[int, int, bool, str]:
    """Of a model from what a name of timm stands for: arguments in Python, arguments, whether the name is unusual."""
    base, base_classes, _ = plain_architecture(name)
    wanted, default = arguments(config, num_classes), arguments(base, base_classes)
    num_args = sum(default[key] != value for key, value in wanted.items())
    return len(_only_in_python(base, config)), num_args, any(word in name for word in UNUSUAL), name


def _only_in_python(base: ViTRegConfig, config: ViTRegConfig) -> list[str]:
    """The arguments that JSON cannot hold, and in which two models differ."""
    same = {
        "norm_layer": base.layer_norm_eps == config.layer_norm_eps,
        "mlp_layer": base.use_swiglu_ffn == config.use_swiglu_ffn,
    }
    return [name for name, is_same in same.items() if not is_same]


def _sizes(config: ViTRegConfig, native: tuple[int, int], resizes_alike: bool) -> list[tuple[int, int]]:
    """The sizes at which timm computes the same."""
    if not resizes_alike:
        return [native]
    return [*comparison_sizes(config), native] if native[0] != native[1] else comparison_sizes(config)


def _filled(
    architecture: str,
    model_args: Mapping[str, Any],
    config: ViTRegConfig,
    num_classes: int,
    written: Mapping[str, torch.Tensor],
) -> nn.Module:
    """timm's model with the very tensors that are written, on the meta device otherwise."""
    kinds = callables(config)
    base, _, _ = plain_architecture(architecture)
    in_python = {key: kinds[key] for key in _only_in_python(base, config)}
    timm_model = create(architecture, **{**model_args, **in_python, "dynamic_img_size": True})
    difference = next(differences(timm_model, config), None)
    if difference is not None or timm_model.num_classes != num_classes:
        raise AssertionError(f"{architecture} with {model_args} has {difference}.")
    timm_model.load_state_dict(dict(written), assign=True)
    return timm_model.eval()


def _preprocessing(
    config: ViTRegConfig, image_processor: BaseImageProcessor | None
) -> tuple[dict[str, Any], list[str]]:
    """The fields of timm's `pretrained_cfg` on images, and what they cannot say.

    An input size that is not that of the position embeddings makes a model of any size.
    """
    native = [side * config.patch_size for side in config.grid_size]
    if image_processor is None:
        fields = {"input_size": [config.num_channels, *native], "fixed_input_size": True}
        return fields, ["There is no preprocessor_config.json: timm's own statistics and crop are used."]
    size, remarks = dict(image_processor.size), []
    size = {name: value for name, value in size.items() if value is not None}
    resized = [size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))]
    crop = resized
    if getattr(image_processor, "do_center_crop", None):
        crop = [image_processor.crop_size[side] for side in ("height", "width")]
    interpolations = {ours: theirs for theirs, ours in INTERPOLATIONS.items()}
    is_told = None not in resized and image_processor.resample in interpolations
    if not is_told:
        resized, crop = native, native
    crop_pct, crop_mode = _crop_pct(crop[0], resized[0]), "squash" if "height" in size else "center"
    # timm has one number for both sides
    if not is_told or math.floor(crop[1] / crop_pct) != resized[1]:
        remarks.append("timm cannot resize images as the image processor does: look at timm.data.create_transform.")
    normalizes = image_processor.do_normalize
    fields = {
        "input_size": [config.num_channels, *crop],
        "fixed_input_size": crop == native,
        "interpolation": interpolations.get(image_processor.resample, "bicubic"),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "mean": list(image_processor.image_mean) if normalizes else [0.0] * config.num_channels,
        "std": list(image_processor.image_std) if normalizes else [1.0] * config.num_channels,
    }
    return fields, remarks


def _license(folder: Path) -> dict[str, str]:
    license = license_of(folder)
    return {} if license is None else {"license": license}


def _crop_pct(crop: int, resized: int) -> float:
    """The number from which timm gets the size that images are resized to, by cutting off behind the point."""
    ratio = crop / resized
    return ratio if math.floor(crop / ratio) == resized else crop / (resized + 0.5)


def _config(
    config: ViTRegConfig,
    architecture: str,
    model_args: Mapping[str, Any],
    num_classes: int,
    preprocessing: Mapping[str, Any],
    labels: list[str],
) -> dict[str, Any]:
    """The content of timm's config.json."""
    always = {
        name: value
        for name, value in arguments(config, num_classes).items()
        if name in ("num_classes", "in_chans", "img_size", "global_pool", "fc_norm")
    }
    pretrained_cfg = {
        "custom_load": False,
        **preprocessing,
        "num_classes": num_classes,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if config.use_distillation_token else "head",
    }
    content = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": config.hidden_size,
        "global_pool": always["global_pool"],
        "model_args": always | dict(model_args),
        "pretrained_cfg": pretrained_cfg,
    }
    if any(label != f"LABEL_{index}" for index, label in enumerate(labels)) and len(set(labels)) == len(labels):
        content["label_names"] = labels
    return content
