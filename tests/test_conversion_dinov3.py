# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import hashlib
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torchvision.transforms.v2.functional as images
from huggingface_hub import ModelCard
from original_outputs import load
from PIL import Image
from reference import relative_error
from safetensors.torch import save_file
from test_conversion_checkpoints import linear_head, training_part
from test_convert import MEASURED, SCRIPT, run_script
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)
from typer.testing import CliRunner

from conversion import convert, dinov3
from conversion.convert import app
from conversion.family import ConversionError
from conversion.parity import TOLERANCE, vitreg_outputs
from conversion.renaming import rename
from conversion.transformers_reference import filled
from hf_vitreg import ViTRegModel


# 64 wide, 3 registers, 88 in the MLP, 2 layers, heads of 32 channels
TINY = {"hidden_size": 64, "num_layers": 2, "intermediate_size": 88, "head_dim": 32, "num_registers": 3}


def original_checkpoint(
    hidden_size: int,
    num_layers: int,
    intermediate_size: int,
    head_dim: int = 64,
    num_registers: int = 4,
    swiglu: bool = False,
    qkv_bias: bool = True,
    masked: bool = True,
    local_cls_norm: bool = False,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """A flat state dict, its values scaled so that activations keep their size through the layers."""
    generator = torch.Generator().manual_seed(hidden_size + num_layers) if device == "cpu" else None

    def weight(*shape, std=None, mean=0.0):
        fan_in = torch.Size(shape[1:]).numel()
        return torch.randn(shape, generator=generator, device=device).mul_(std or fan_in**-0.5).add_(mean)

    def linear(name, out_features, in_features, bias=True):
        tensors = {f"{name}.weight": weight(out_features, in_features)}
        return tensors | ({f"{name}.bias": weight(out_features, std=0.3)} if bias else {})

    def norm(name):
        return {f"{name}.weight": weight(hidden_size, std=0.1, mean=1.0), f"{name}.bias": weight(hidden_size, std=0.1)}

    def mlp(name):
        up = ("w1", "w2") if swiglu else ("fc1",)
        tensors = [linear(f"{name}.{each}", intermediate_size, hidden_size) for each in up]
        tensors.append(linear(f"{name}.{'w3' if swiglu else 'fc2'}", hidden_size, intermediate_size))
        return {key: tensor for part in tensors for key, tensor in part.items()}

    tensors = {
        "cls_token": weight(1, 1, hidden_size, std=0.5),
        "mask_token": weight(1, hidden_size, std=0.5),
        "patch_embed.proj.weight": weight(hidden_size, 3, 16, 16),
        "patch_embed.proj.bias": weight(hidden_size, std=0.1),
        # rounded as the published ones are
        "rope_embed.periods": (100 ** (torch.arange(head_dim // 4, device=device) * 4 / head_dim)).bfloat16().float(),
    }
    if num_registers:
        tensors["storage_tokens"] = weight(1, num_registers, hidden_size, std=0.5)
    for layer in range(num_layers):
        block = f"blocks.{layer}"
        tensors |= norm(f"{block}.norm1") | linear(f"{block}.attn.qkv", 3 * hidden_size, hidden_size, qkv_bias)
        if qkv_bias and masked:
            mask = torch.tensor([1.0, 0.0, 1.0], device=device).repeat_interleave(hidden_size)
            tensors[f"{block}.attn.qkv.bias_mask"] = mask
        tensors |= linear(f"{block}.attn.proj", hidden_size, hidden_size)
        tensors |= norm(f"{block}.norm2") | mlp(f"{block}.mlp")
        tensors |= {f"{block}.ls{number}.gamma": weight(hidden_size, std=0.1, mean=1.0) for number in (1, 2)}
    return tensors | norm("norm") | (norm("local_cls_norm") if local_cls_norm else {})


def published_checkpoint(name: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A checkpoint in the size of a published one."""
    arch = dinov3.ARCHITECTURES[dinov3.FAMILY.published[name].arch]
    is_7b = "7b" in name
    return original_checkpoint(
        hidden_size=arch.hidden_size,
        num_layers=arch.num_hidden_layers,
        intermediate_size=arch.intermediate_size,
        head_dim=128 if is_7b else 64,
        swiglu=arch.use_swiglu_ffn,
        qkv_bias=not is_7b,
        local_cls_norm=is_7b or name == "dinov3_vitl16_sat493m",
        device=device,
    )


def prepare(tmp_path, tensors, **options):
    # a new name every time: the file of a model that is still there must not change
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
    torch.save(tensors, path)
    return dinov3.prepare(str(path), **options)


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(app, ["dinov3", *map(str, arguments)])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


# Against the original code


@pytest.mark.parametrize(
    ("fixture", "output"),
    [("dinov3", "tokens"), ("dinov3_swiglu", "tokens"), ("dinov3_swiglu", "tokens_without_cls_norm")],
)
@torch.inference_mode()
def test_outputs_are_those_of_the_original_code(tmp_path, fixture, output):
    state, inputs, outputs = load(fixture)
    if output == "tokens_without_cls_norm":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("cls_norm.")}
    candidate = prepare(tmp_path, state)
    for size, pixel_values in inputs.items():
        expected = outputs[f"{output}/{size}"]
        assert relative_error(candidate.model(pixel_values).last_hidden_state, expected) < TOLERANCE, size
        assert relative_error(candidate.reference(pixel_values)["tokens"], expected) < TOLERANCE, size


@torch.inference_mode()
def test_other_periods_and_another_epsilon_would_show(tmp_path):
    """What the fixtures compare depends on both, so that they are not the same by chance."""
    state, inputs, outputs = load("dinov3")
    expected = outputs["tokens/16x28"]
    model = prepare(tmp_path, state).model
    model.encoder.rotary_embeddings.periods.copy_(model.encoder.rotary_embeddings.initial_periods())
    assert relative_error(model(inputs["16x28"]).last_hidden_state, expected) > 10 * TOLERANCE
    model = prepare(tmp_path, state, layer_norm_eps=1e-2).model
    assert model.config.layer_norm_eps == 1e-2
    assert relative_error(model(inputs["16x28"]).last_hidden_state, expected) > 10 * TOLERANCE


@torch.inference_mode()
def test_the_reference_reads_what_the_linear_head_reads(tmp_path):
    state, inputs, outputs = load("dinov3_swiglu")
    tokens = outputs["tokens/16x28"]
    head = linear_head(11, 2 * 64)
    torch.save(head, tmp_path / "head.pth")
    candidate = prepare(tmp_path, state, linear_head=str(tmp_path / "head.pth"))
    expected = torch.cat([tokens[:, 0], tokens[:, 4:].mean(dim=1)], dim=1) @ head["weight"].T + head["bias"]
    assert relative_error(candidate.reference(inputs["16x28"])["logits"], expected) < TOLERANCE
    assert relative_error(vitreg_outputs(candidate.model)(inputs["16x28"])["logits"], expected) < TOLERANCE


# What the model is made of


def test_the_config_is_what_the_shapes_say_and_as_published_where_they_say_nothing(tmp_path):
    candidate = prepare(tmp_path, original_checkpoint(**TINY))
    config = candidate.model.config
    assert candidate.arch == "custom"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 2, 2)
    assert (config.intermediate_size, config.num_register_tokens, config.patch_size) == (88, 3, 16)
    assert config.use_mask_token and config.qkv_bias and not config.key_bias and not config.use_swiglu_ffn
    assert (config.position_embedding_type, config.pos_embed_rescale, config.final_norm) == ("rope", 2.0, "tokens")
    assert (config.layer_norm_eps, config.layerscale_value, config.image_size) == (1e-5, 1e-5, 224)
    assert config.rope_theta == 100 and config.rope_normalize_coords == "separate"


def test_the_model_shares_the_memory_of_the_checkpoint(tmp_path):
    tensors = original_checkpoint(**TINY)
    candidate = prepare(tmp_path, tensors)
    state, theirs = candidate.model.state_dict(), candidate.reference.model.state_dict()
    assert torch.equal(state["encoder.layer.1.attention.k_proj.weight"], tensors["blocks.1.attn.qkv.weight"][64:128])
    pairs = [
        ("encoder.layer.1.attention.k_proj.weight", "model.layer.1.attention.k_proj.weight"),
        ("encoder.layer.1.attention.v_proj.bias", "model.layer.1.attention.v_proj.bias"),
        ("embeddings.register_tokens", "embeddings.register_tokens"),
        ("layernorm.weight", "norm.weight"),
    ]
    for ours, name in pairs:
        assert state[ours].data_ptr() == theirs[name].data_ptr(), ours
    # or save_pretrained would copy them, and need the memory for it
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    assert not any(parameter.is_meta for parameter in candidate.model.parameters())


def test_what_no_image_goes_through_is_left_aside_by_name(tmp_path):
    candidate = prepare(tmp_path, original_checkpoint(**TINY, local_cls_norm=True))
    assert candidate.left_aside == [
        "blocks.*.attn.qkv.bias of the keys (2 entries)",
        "blocks.*.attn.qkv.bias_mask (2 entries)",
        "local_cls_norm (2 entries)",
    ]
    assert "encoder.layer.0.attention.k_proj.bias" not in candidate.model.state_dict()


@torch.inference_mode()
def test_without_a_mask_the_keys_keep_their_bias(tmp_path):
    tensors = original_checkpoint(**TINY, masked=False)
    candidate = prepare(tmp_path, tensors)
    state = candidate.model.state_dict()
    assert candidate.model.config.key_bias and candidate.left_aside == []
    assert torch.equal(state["encoder.layer.1.attention.k_proj.bias"], tensors["blocks.1.attn.qkv.bias"][64:128])
    pixel_values = torch.randn(1, 3, 32, 48)
    assert relative_error(candidate.model(pixel_values)[0], candidate.reference(pixel_values)["tokens"]) < TOLERANCE


def test_periods_are_kept_bit_for_bit_whatever_the_dtype_of_the_weights(tmp_path):
    tensors = original_checkpoint(**TINY)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    odd = torch.tensor([1.0, 1.7782794, 3.1622777, 5.623413, 10.0, 17.782795, 31.622776, 56.23413])
    for periods in (odd, odd.bfloat16()):
        save_file(half | {"rope_embed.periods": periods}, tmp_path / "a.safetensors")
        run(tmp_path / "a.safetensors", tmp_path / "model", "--overwrite")
        model = AutoModel.from_pretrained(tmp_path / "model")
        assert model.dtype == torch.bfloat16
        assert torch.equal(model.embeddings.cls_token, half["cls_token"])
        assert model.encoder.rotary_embeddings.periods.dtype == torch.float32
        assert torch.equal(model.encoder.rotary_embeddings.periods, periods.float())


# Counted with dinov3/models/vision_transformer.py on the meta device, built as dinov3/hub/backbones.py does: tensors
# of the state dict, parameters.
PUBLISHED_COUNTS = {
    "dinov3_vits16": (188, 21_601_152),
    "dinov3_vits16plus": (212, 28_697_472),
    "dinov3_vitb16": (188, 85_669_632),
    "dinov3_vitl16": (368, 303_154_176),
    "dinov3_vitl16_sat493m": (370, 303_156_224),
    "dinov3_vitl16plus": (416, 403_915_776),
    "dinov3_vith16plus": (552, 840_633_600),
    "dinov3_vit7b16": (610, 6_716_043_264),
    "dinov3_vit7b16_sat493m": (610, 6_716_043_264),
}


@pytest.mark.parametrize("name", PUBLISHED_COUNTS)
def test_published_sizes_are_those_of_the_original_and_every_tensor_has_a_place(name):
    tensors = published_checkpoint(name, device="meta")
    buffers = [key for key in tensors if key.endswith(("periods", "bias_mask"))]
    num_parameters = sum(tensor.numel() for key, tensor in tensors.items() if key not in buffers)
    assert (len(tensors), num_parameters) == PUBLISHED_COUNTS[name]
    used, _ = dinov3._without_unused(tensors, key_bias=False, prefix="")
    config = dinov3.FAMILY.config(dinov3.ARCHITECTURES[dinov3.FAMILY.published[name].arch])
    with torch.device("meta"):
        model = ViTRegModel(config)
    targets = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert rename(used, dinov3.RULES, targets).keys() == targets.keys()
    key_biases = sum(tensor.numel() // 3 for key, tensor in tensors.items() if key.endswith("qkv.bias"))
    local_norm = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith("local_cls_norm."))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters - key_biases - local_norm


def test_every_published_checkpoint_is_listed(monkeypatch):
    monkeypatch.setattr(
        convert, "LISTS", [known for known in convert.LISTS if dinov3.FAMILY in getattr(known, "args", ())]
    )
    listed = CliRunner().invoke(app, ["--list"]).stdout
    lines = [line.split() for line in listed.splitlines() if line.startswith("dinov3 ")]
    assert [line[1] for line in lines] == list(PUBLISHED_COUNTS)
    assert {line[-1] for line in lines} == {"dinov3-license"}
    assert lines[7][4:7] == ["4", "16", "6,716,035,072"]
    assert lines[4][3].endswith("/dinov3_vitl16/dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")


# Training checkpoints


TENSORS = original_checkpoint(**TINY)
OTHER = {name: tensor + 1 for name, tensor in TENSORS.items()}


def test_of_a_training_checkpoint_the_teacher_is_converted(tmp_path):
    networks = [("teacher.", TENSORS), *((f"{name}.", OTHER) for name in ("student", "model_ema", "gram_teacher"))]
    model = {name: tensor for prefix, tensors in networks for name, tensor in training_part(tensors, prefix).items()}
    candidate = prepare(tmp_path, {"model": model | {"dino_loss.center": torch.ones(1, 7)}, "iteration": 3})
    alone = prepare(tmp_path, {"teacher": training_part(TENSORS)})
    for found in (candidate, alone):
        assert torch.equal(found.model.embeddings.cls_token, TENSORS["cls_token"])
    assert candidate.sources[0]["backbone"] == "model.teacher.backbone.*"
    for part in ("model.student (", "model.model_ema (", "model.gram_teacher (", "model.dino_loss", "iteration"):
        assert any(left.startswith(part) for left in candidate.left_aside), (part, candidate.left_aside)
    assert "model.teacher.backbone.blocks.*.attn.qkv.bias_mask (2 entries)" in candidate.left_aside
    assert candidate.heads.keys() == alone.heads.keys() and len(alone.heads) == 8


def test_a_sharded_checkpoint_names_the_command_that_joins_it(tmp_path):
    (tmp_path / "sharded_teacher_checkpoint").mkdir()
    (tmp_path / "sharded_teacher_checkpoint" / ".metadata").touch()
    with pytest.raises(ConversionError, match=r"dcp_to_torch .*sharded_teacher_checkpoint joined\.pth"):
        dinov3.prepare(str(tmp_path / "sharded_teacher_checkpoint"))


# Bad input


MASK = "blocks.1.attn.qkv.bias_mask"


def without(*names):
    return {name: tensor for name, tensor in TENSORS.items() if not name.startswith(names)}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (TENSORS | {MASK: torch.full([192], torch.nan)}, rf"{MASK} is not a number: .*\(init_weights\)"),
        (TENSORS | {MASK: torch.ones(192)}, f"{MASK} is another mask than DINOv3's"),
        (TENSORS | {MASK: torch.ones(7)}, f"{MASK} is another mask"),
        (without(MASK), f"of biases and their masks one is missing: {MASK}"),
        (without("blocks.1.attn.qkv.bias") | {MASK: TENSORS[MASK]}, f"one is missing: {MASK}"),
        (without("rope_embed"), "no DINOv3 checkpoint, or only a part of one: it has no rope_embed.periods"),
        (TENSORS | {"rope_embed.periods": torch.ones(8, 1)}, r"rope_embed.periods has shape \(8, 1\)"),
        (TENSORS | {"rope_embed.periods": torch.ones(7)}, "for heads of 28 channels, which its width of 64"),
        (TENSORS | {"rope_embed.periods": torch.ones(0)}, "for heads of 0 channels"),
        (TENSORS | {"rope_embed.periods": torch.arange(8)}, r"rope_embed.periods is torch.int64"),
        (TENSORS | {"pos_embed": torch.ones(1, 26, 64)}, "the model does not have: pos_embed"),
        (TENSORS | {"cls_norm.weight": torch.ones(64)}, "1 tensors that are missing: cls_norm.bias"),
        (without("norm."), "it has no norm.weight"),
        (without("blocks.0.ls"), "it has no blocks.0.ls1.gamma"),
        (without("blocks.0.mlp.fc1.bias"), "tensors that are missing: blocks.0.mlp.fc1.bias"),
        (TENSORS | {"blocks.1.mlp.fc1.weight": torch.ones(80, 64)}, r"blocks.1.mlp.fc1.weight gives \(80, 64\)"),
        (load("dinov2_reg4")[0], "no DINOv3 checkpoint, or only a part of one: it has no rope_embed.periods"),
        (load("deit3")[0], "no DINOv3 checkpoint, or only a part of one: it has no rope_embed.periods"),
        (load("open_clip")[0], "no DINOv3 checkpoint"),
        ({"stages.0.0.gamma": torch.ones(3), "downsample_layers.0.0.weight": torch.ones(3)}, "no DINOv3 checkpoint"),
    ],
)
def test_what_is_no_whole_checkpoint_of_this_family_is_refused(tmp_path, tensors, expected):
    with pytest.raises(ConversionError, match=expected):
        prepare(tmp_path, tensors)


def test_other_implementations_are_refused_with_a_hint(tmp_path):
    with torch.device("meta"):
        of_timm = timm.create_model("vit_small_plus_patch16_dinov3").state_dict()
        in_memory = DINOv3ViTModel(DINOv3ViTConfig(num_hidden_layers=1)).state_dict()
    in_files = {name.replace("model.layer.", "layer."): tensor for name, tensor in in_memory.items()}
    hints = (
        (of_timm, "of timm's, .*published in"),
        (in_memory, "convert.py transformers"),
        (in_files, "transformers"),
    )
    for tensors, expected in hints:
        with pytest.raises(ConversionError, match=f"is a DINOv3 .*{expected}"):
            prepare(tmp_path, {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()})


def test_arch_and_heads_must_fit(tmp_path):
    with pytest.raises(ConversionError, match=r"is not vitl16: hidden_size is 64, not 1024, num_hidden_layers"):
        prepare(tmp_path, TENSORS, arch="vitl16")
    with pytest.raises(ConversionError, match=r"--arch vith16 is not known. Did you mean vit\w+\?"):
        prepare(tmp_path, TENSORS, arch="vith16")
    wide = original_checkpoint(hidden_size=384, num_layers=12, intermediate_size=1536, head_dim=128)
    with pytest.raises(ConversionError, match=r"is not vits16: rope_embed\.periods are for 3 heads, not 6"):
        prepare(tmp_path, wide, arch="vits16")
    part = original_checkpoint(hidden_size=384, num_layers=3, intermediate_size=1536)
    with pytest.raises(ConversionError, match=r"the width of vits16 \(384\), but only 3 of its 12 layers"):
        prepare(tmp_path, part)


def test_heads_that_do_not_fit(tmp_path):
    torch.save(linear_head(7, 64), tmp_path / "head.pth")
    with pytest.raises(ConversionError, match=r"a head on 64 features, .* heads read 128 "):
        prepare(tmp_path, TENSORS, linear_head=str(tmp_path / "head.pth"))
    with pytest.raises(ConversionError, match=r"none\.pth does not exist"):
        prepare(tmp_path, TENSORS, linear_head=str(tmp_path / "none.pth"))


# Published files


def test_a_published_name_says_how_to_get_the_file(tmp_path):
    for name in ("dinov3_vits16", "dinov3_vits16_lvd1689m"):
        with pytest.raises(ConversionError, match=r"Ask for access at https://ai\.meta\.com/.*wget") as error:
            dinov3.prepare(name, cache_dir=tmp_path)
        assert f"{tmp_path}/dinov3_vits16_pretrain_lvd1689m-08c60483.pth" in str(error.value)
        assert "--base-url fetches dinov3_vits16/dinov3_vits16_pretrain_lvd1689m-08c60483.pth" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dinov3_vits14", r"Did you mean dinov3_vits16\?"),
        ("dinov3_vitl16_sat", r"Did you mean dinov3_vitl16_sat493m\?"),
        ("dinov3_convnext_tiny", "There are dinov3_vits16, "),
    ],
)
def test_near_misses_of_published_names(name, expected):
    with pytest.raises(ConversionError, match=expected):
        dinov3.prepare(name)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A mirror with a small model in the place of a published one, under the hash of its content."""
    small = dinov3.Architecture(64, 2, 88, num_register_tokens=3, patch_size=16)
    monkeypatch.setitem(dinov3.ARCHITECTURES, "vitl16", small)
    torch.save(original_checkpoint(**{**TINY, "head_dim": 64}, local_cls_norm=True), tmp_path / "a.pth")
    sha256 = hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    name = "dinov3_vitl16_sat493m"
    path = f"dinov3_vitl16/dinov3_vitl16_pretrain_sat493m-{sha256[:8]}.pth"
    monkeypatch.setitem(dinov3.FAMILY.published, name, replace(dinov3.FAMILY.published[name], path=path))
    (tmp_path / "mirror" / path).parent.mkdir(parents=True)
    (tmp_path / "a.pth").rename(tmp_path / "mirror" / path)
    return tmp_path / "mirror", tmp_path / "mirror" / path


def check_satellite_folder(folder):
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "dinov3-license")
    assert card.data.license_link == "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
    assert card.data.base_model == "facebook/dinov3-vitl16-pretrain-sat493m"
    record = json.loads((folder / "conversion.json").read_text())
    assert (record["arch"], record["license"]) == ("vitl16", "dinov3-license")
    assert record["reference"].startswith("transformers ")
    assert tuple(AutoImageProcessor.from_pretrained(folder).image_mean) == (0.430, 0.411, 0.296)


def test_published_files_come_from_a_mirror_and_bring_their_licence(published, tmp_path):
    addresses = ["--base-url", published[0].as_uri(), "--cache-dir", tmp_path / "cache"]
    result = run("dinov3_vitl16_sat493m", tmp_path / "model", *addresses)
    assert "Left aside: blocks.*.attn.qkv.bias of the keys (2 entries)" in result.stdout
    check_satellite_folder(tmp_path / "model")
    # from the cache it needs no address
    run("dinov3_vitl16_sat493m", tmp_path / "again", "--cache-dir", tmp_path / "cache")


def test_a_published_file_is_known_by_its_content_whatever_it_is_called(published, tmp_path):
    published[1].rename(tmp_path / "renamed.bin")
    run(tmp_path / "renamed.bin", tmp_path / "model")
    check_satellite_folder(tmp_path / "model")
    run(tmp_path / "renamed.bin", tmp_path / "own", "--license", "mit")
    assert ModelCard.load(tmp_path / "own" / "README.md").data.license == "mit"
    result = run(tmp_path / "renamed.bin", tmp_path / "other", "--pretrained-on", "lvd1689m", exit_code=1)
    assert "dinov3_vitl16_sat493m was pretrained on sat493m, not on lvd1689m" in result.stderr


def test_a_file_of_ones_own_says_what_it_was_trained_on(tmp_path):
    candidate = prepare(tmp_path, TENSORS, pretrained_on="sat493m")
    assert tuple(candidate.image_processor.image_std) == (0.213, 0.156, 0.143)
    assert str(candidate.license) == "unknown" and candidate.base_model is None
    assert tuple(prepare(tmp_path, TENSORS).image_processor.image_std) == (0.229, 0.224, 0.225)
    with pytest.raises(ConversionError, match=r"--pretrained-on imagenet is not known\. There are lvd1689m, sat493m"):
        prepare(tmp_path, TENSORS, pretrained_on="imagenet")


# The folder


def test_images_become_what_the_readme_makes_of_them(tmp_path):
    processor = prepare(tmp_path, TENSORS).image_processor
    pixels = np.random.default_rng(0).integers(0, 256, (301, 187, 3), dtype=np.uint8)
    resized = images.resize(torch.from_numpy(pixels).permute(2, 0, 1), [256, 256], antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (resized / 255 - mean[:, None, None]) / std[:, None, None]
    found = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(found, expected)


def test_a_classifier_from_the_command_line(tmp_path):
    torch.save(original_checkpoint(**TINY, swiglu=True), tmp_path / "a.pth")
    torch.save(linear_head(1000, 2 * 64), tmp_path / "head.pth")
    result = run(tmp_path / "a.pth", tmp_path / "model", "--linear-head", tmp_path / "head.pth")
    assert "Against transformers" in result.stdout
    record = json.loads((tmp_path / "model" / "conversion.json").read_text())
    assert [row["output"] for row in record["comparisons"]] == ["tokens", "logits"] * 5
    assert [source["file"] for source in record["sources"]] == ["a.pth", "head.pth"]
    assert all(row["relative"] < TOLERANCE for row in record["comparisons"])
    model, loading = AutoModelForImageClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values())
    assert model.config.classifier_layout == "cls_mean" and model.config.id2label[1] == "goldfish, Carassius auratus"
    assert model.config.use_swiglu_ffn and model(torch.randn(2, 3, 32, 48)).logits.shape == (2, 1000)


def test_bad_input_is_one_clear_message_and_nothing_is_written(tmp_path):
    given = tmp_path / "a.pth"
    torch.save(TENSORS, given)
    given.with_name("cut.pth").write_bytes(given.read_bytes()[:-100])
    torch.save({"weight": nn.Linear(3, 5)}, tmp_path / "code.pth")
    torch.save(TENSORS | {"norm.weight": torch.full([64], torch.nan)}, tmp_path / "nan.pth")
    cases = {
        "is cut short or damaged": [tmp_path / "cut.pth"],
        "Nothing was run": [tmp_path / "code.pth"],
        "the weights are not finite": [tmp_path / "nan.pth"],
        "none.pth does not exist": [tmp_path / "none.pth"],
        "is not vitb16: hidden_size is 64, not 768": [given, "--arch", "vitb16"],
        "Ask for access": ["dinov3_vitb16", "--cache-dir", tmp_path / "cache"],
        "could not be downloaded": [
            "dinov3_vitb16",
            "--base-url",
            "http://127.0.0.1:9",
            "--cache-dir",
            tmp_path / "c",
        ],
    }
    for message, (checkpoint, *options) in cases.items():
        result = run(checkpoint, tmp_path / "model", *options, exit_code=1)
        assert result.stderr.startswith("Error: ") and message in result.stderr, (message, result.stderr)
        assert "Traceback" not in result.output and isinstance(result.exception, SystemExit), message
        assert not list(tmp_path.glob("*model*")), message


# The reference


def test_a_filled_model_is_the_model_with_the_buffers_that_no_file_has():
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=56, num_hidden_layers=1, num_attention_heads=3, image_size=64
    )
    original = CLIPVisionModel(config).eval()
    state = original.state_dict()
    model = filled(CLIPVisionModel, config, state)
    assert [name for name, _ in original.named_buffers()] == [name for name, _ in model.named_buffers()] != []
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(pixel_values).last_hidden_state, original(pixel_values).last_hidden_state)
    assert all(parameter.data_ptr() == state[name].data_ptr() for name, parameter in model.named_parameters())
    with pytest.raises(RuntimeError, match="Missing key"):
        filled(CLIPVisionModel, config, dict(list(state.items())[1:]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("name", ["dinov3_vits16", "dinov3_vits16plus", "dinov3_vitl16_sat493m"])
def test_published_sizes_agree_and_stay_within_their_memory(tmp_path, name):
    torch.save(published_checkpoint(name), tmp_path / "a.pth")
    arch = dinov3.FAMILY.published[name].arch
    done = run_script(
        "-c", MEASURED, SCRIPT, "dinov3", tmp_path / "a.pth", tmp_path / "model", "--arch", arch, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    size, peak = (tmp_path / "a.pth").stat().st_size, int(done.stdout.rsplit("peak: ")[1])
    assert peak < 1.3 * size + 1e9, f"{peak / 1e9:.2f} GB for a checkpoint of {size / 1e9:.2f} GB"
    assert json.loads((tmp_path / "model" / "conversion.json").read_text())["arch"] == arch
    (tmp_path / "a.pth").unlink()
    (tmp_path / "model" / "model.safetensors").unlink()
