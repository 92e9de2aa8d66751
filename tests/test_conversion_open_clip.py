# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""OpenCLIP: both towers against the original's numbers, the folders that are written, and what is refused."""

import json
import sys
import zipfile
from dataclasses import replace

import huggingface_hub.constants
import numpy as np
import open_clip as original
import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from open_clip.transform import PreprocessCfg, image_transform_v2
from original_outputs import assert_close, load
from PIL import Image
from safetensors.torch import save_file
from test_convert import MEASURED, ROOT, SCRIPT, run_script
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    pipeline,
)
from typer.testing import CliRunner

from conversion import convert, open_clip, open_clip_published, open_clip_reference, parity
from conversion.convert import app
from conversion.family import ConversionError
from conversion.open_clip_layout import SHAPED, Towers, architecture_from_shapes, head_dim, read_towers
from conversion.open_clip_reference import clip_tokenizer
from hf_vitreg import ViTRegModel
from hf_vitreg.hub.card import check_card


STATE, INPUTS, OUTPUTS = load("open_clip")
IMAGES, TEXTS = INPUTS["20x20"], INPUTS["text"]
VISION = {name: tensor for name, tensor in STATE.items() if name.startswith("visual.")}
OPENAI = {"input_resolution": torch.tensor(20), "context_length": torch.tensor(9), "vocab_size": torch.tensor(97)}


def save(tmp_path, content):
    # a new name every time: the file of a model that is still there must not change
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
    torch.save(content, path)
    return path


def prepare(tmp_path, content, arch="custom", **options):
    return open_clip.prepare(str(save(tmp_path, content)), arch=arch, **options)


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(app, ["open_clip", *map(str, arguments)])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


@pytest.mark.parametrize("name", ["open_clip", "open_clip_quickgelu"])
@torch.inference_mode()
def test_both_towers_are_those_of_the_original(tmp_path, name):
    state, inputs, outputs = load(name)
    candidate = prepare(tmp_path, state, quick_gelu=name.endswith("quickgelu"))
    model, images = candidate.model, inputs["20x20"]
    result = model(input_ids=inputs["text"], pixel_values=images)
    assert_close(result.vision_model_output.last_hidden_state, outputs["tokens/20x20"])
    assert_close(result.logits_per_image, outputs["logits_per_image/20x20"])
    assert_close(model.get_image_features(images).pooler_output, outputs["image_embeds/20x20"])
    assert_close(model.get_text_features(inputs["text"]).pooler_output, outputs["text_embeds"])
    reference = candidate.reference
    reference.input_ids = inputs["text"]
    theirs = reference(images)
    for key in ("tokens", "image_embeds"):
        assert_close(theirs[key], outputs[f"{key}/20x20"])
    assert_close(theirs["text_embeds"], outputs["text_embeds"])
    assert_close(theirs["logits"], outputs["logits_per_image/20x20"])


@torch.inference_mode()
def test_the_vision_tower_alone_is_that_of_the_original(tmp_path):
    for content, options in ((STATE, {"vision_only": True}), (VISION, {})):
        candidate = prepare(tmp_path, content, **options)
        assert type(candidate.model) is ViTRegModel and candidate.model.config.projection_dim == 40
        assert candidate.sources[0]["backbone"] == "visual.*" and candidate.tokenizer is None
        for outputs in (candidate.implementation(IMAGES), candidate.reference(IMAGES)):
            assert_close(outputs["tokens"], OUTPUTS["tokens/20x20"])
            assert_close(outputs["image_embeds"], OUTPUTS["image_embeds/20x20"])
    assert "transformer (24 entries)" in prepare(tmp_path, STATE, vision_only=True).left_aside


def test_both_implementations_agree_at_every_size(tmp_path):
    candidate = prepare(tmp_path, STATE)
    sizes = [(8, 8), (8, 16), (20, 20), (32, 28)]
    assert set(sizes) < set(candidate.sizes)
    rows = parity.compare(candidate.implementation, candidate.reference, sizes)
    assert [row.output for row in rows] == ["tokens", "image_embeds", "text_embeds", "logits"] * 4
    assert all(row.passed for row in rows)


@torch.inference_mode()
def test_the_texts_that_are_compared_are_of_every_length(tmp_path):
    texts = prepare(tmp_path, STATE).reference.input_ids
    assert texts.shape == (3, 9) and texts.argmax(dim=1).tolist() == [8, 4, 1]
    assert (texts[:, 0] == 95).all() and texts[1, 5:].tolist() == [0, 0, 0, 0]


@torch.inference_mode()
def test_neither_padding_nor_its_mask_changes_a_text(tmp_path):
    model = prepare(tmp_path, STATE).model
    padded = TEXTS.clone()
    mask = torch.arange(9) <= TEXTS.argmax(dim=1)[:, None]
    padded[~mask] = model.config.text_config.pad_token_id
    assert not torch.equal(padded, TEXTS)
    features = model.get_text_features(padded, attention_mask=mask.long()).pooler_output
    assert_close(features, OUTPUTS["text_embeds"])


def test_the_config_is_what_the_shapes_say(tmp_path):
    config = prepare(tmp_path, STATE).model.config
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (128, 2, 2)
    assert (vision.intermediate_size, vision.image_size, vision.patch_size, vision.num_register_tokens) == (
        72,
        20,
        4,
        0,
    )
    assert (vision.hidden_act, vision.layer_norm_eps, vision.layerscale_value) == ("gelu", 1e-5, None)
    assert (vision.interpolate_antialias, vision.interpolate_offset) == (True, 0.0)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.intermediate_size) == (
        64,
        2,
        1,
        80,
    )
    assert (text.vocab_size, text.max_position_embeddings, text.eos_token_id, text.hidden_act) == (97, 9, 96, "gelu")
    assert config.projection_dim == 40


def test_the_model_shares_the_memory_of_the_checkpoint(tmp_path):
    candidate = prepare(tmp_path, STATE)
    state, tensors = candidate.model.state_dict(), candidate.reference.tensors
    fused = tensors["visual.transformer.resblocks.1.attn.in_proj_weight"]
    ours = state["vision_model.encoder.layer.1.attention.k_proj.weight"]
    assert torch.equal(ours, fused[128:256]) and ours.data_ptr() == fused[128:].data_ptr()
    embedding = state["text_model.embeddings.token_embedding.weight"]
    assert embedding.data_ptr() == tensors["token_embedding.weight"].data_ptr()
    # or save_pretrained would copy them, and need the memory for it
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    assert not any(tensor.is_meta for tensor in (*candidate.model.parameters(), *candidate.model.buffers()))
    assert not candidate.model.training


def under(prefix, tensors=STATE):
    return {prefix + name: tensor for name, tensor in tensors.items()}


IN_A_MODULE = {
    name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": tensor
    for name, tensor in STATE.items()
}
LAYOUTS = {
    "flat": (STATE, "*", []),
    "training": (
        {
            "epoch": 3,
            "name": "a run",
            "state_dict": under("module."),
            "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
            "scaler": {"scale": 65536.0},
        },
        "state_dict.module.*",
        ["epoch", "name", "optimizer (2 entries)", "scaler"],
    ),
    "text tower in a module": (IN_A_MODULE | {"logit_scale": STATE["logit_scale"][None]}, "*", []),
    "OpenAI": (STATE | OPENAI, "*", list(OPENAI)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model_and_names_what_is_left_aside(tmp_path, layout):
    content, backbone, left_aside = LAYOUTS[layout]
    candidate = prepare(tmp_path, content)
    assert candidate.sources[0]["backbone"] == backbone and candidate.left_aside == left_aside
    flat, state = prepare(tmp_path, STATE).model.state_dict(), candidate.model.state_dict()
    assert state.keys() == flat.keys() and all(torch.equal(state[name], flat[name]) for name in state)
    [row] = parity.compare(candidate.implementation, candidate.reference, [(12, 20)])[:1]
    assert row.passed


@pytest.mark.parametrize(
    "content, options, hidden_act, remark",
    [
        (STATE, {}, "gelu", "Activation: GELU, ASSUMED"),
        (STATE, {"quick_gelu": False}, "gelu", "Activation: GELU, by --no-quick-gelu"),
        (STATE, {"quick_gelu": True}, "quick_gelu", "Activation: QuickGELU, by --quick-gelu"),
        (STATE | OPENAI, {}, "quick_gelu", "Activation: QuickGELU, by entries that only OpenAI's state dicts have"),
        (VISION, {"quick_gelu": True}, "quick_gelu", "Activation: QuickGELU, by --quick-gelu"),
    ],
)
def test_the_activation_is_said_with_its_reason(tmp_path, content, options, hidden_act, remark):
    candidate = prepare(tmp_path, content, **options)
    config = candidate.model.config
    assert getattr(config, "vision_config", config).hidden_act == hidden_act
    assert getattr(config, "text_config", config).hidden_act == hidden_act
    assert candidate.remarks[0].startswith(remark) and "the comparison cannot" in candidate.remarks[0]


@pytest.mark.parametrize(
    "checkpoint, options, expected",
    [
        (STATE | OPENAI, {"quick_gelu": False}, "GELU by --no-quick-gelu, QuickGELU by entries that only OpenAI's"),
        (STATE | OPENAI, {"arch": "ViT-L-14"}, "GELU by --arch ViT-L-14, QuickGELU by entries that only OpenAI's"),
        (STATE, {"arch": "ViT-B-32-quickgelu", "quick_gelu": False}, "QuickGELU by --arch ViT-B-32-quickgelu, GELU"),
        ("ViT-B-32/openai", {"quick_gelu": False}, "QuickGELU by the name ViT-B-32/openai, GELU by --no-quick-gelu"),
        ("ViT-B-32/openai", {"arch": "ViT-B-32"}, "QuickGELU by the name ViT-B-32/openai, GELU by --arch ViT-B-32"),
    ],
)
def test_two_activations_at_once_are_an_error(tmp_path, checkpoint, options, expected):
    checkpoint = checkpoint if isinstance(checkpoint, str) else str(save(tmp_path, checkpoint))
    with pytest.raises(ConversionError, match=f"said to be both: {expected}"):
        open_clip.prepare(checkpoint, **options)


def without(*names):
    return {name: tensor for name, tensor in STATE.items() if not name.startswith(names)}


IN_PROJ = "visual.transformer.resblocks.1.attn.in_proj_weight"


@pytest.mark.parametrize(
    "content, expected",
    [
        (load("dinov2_reg4")[0], r"no OpenCLIP checkpoint.*visual.class_embedding.*`convert.py dinov2`"),
        (load("deit3")[0], r"no OpenCLIP checkpoint, or only a part of one.*`convert.py deit3`"),
        (without("visual."), r"no OpenCLIP checkpoint, or only a part of one: it has no visual.class_embedding"),
        (
            STATE | {"visual.trunk.norm.weight": torch.ones(3)},
            r"a vision tower of timm's \(visual.trunk.norm.weight\)",
        ),
        (without("visual.ln_pre"), "only a part of one: it has no visual.ln_pre.weight"),
        (without("visual.ln_post.bias"), "1 tensors that are missing: visual.ln_post.bias"),
        (without("visual.transformer.resblocks.0.ln_2"), "2 tensors that are missing: visual.transformer.resblocks.0"),
        (without("text_projection"), r"no whole text tower.*it has no text_projection.*--vision-only converts"),
        (without("transformer."), "it has no transformer.resblocks.0.attn.in_proj_weight"),
        (without("ln_final"), "2 tensors that are missing: ln_final.weight"),
        (VISION | {"logit_scale": torch.ones(())}, "no whole text tower"),
        (STATE | {"logit_bias": torch.ones(())}, "1 tensors that the model does not have: logit_bias"),
        (STATE | IN_A_MODULE, "tensors that claim the same place: text"),
        (STATE | {"visual.proj": torch.ones(128)}, r"visual.proj has shape \(128,\)"),
        (STATE | {"visual.class_embedding": torch.ones(1, 128)}, r"visual.class_embedding has shape \(1, 128\)"),
        (STATE | {"logit_scale": torch.ones(2)}, r"logit_scale gives \(2,\)"),
        (STATE | {"text_projection": torch.ones(64, 41)}, r"text_projection gives \(41, 64\)"),
        (STATE | {"visual.positional_embedding": torch.ones(28, 128)}, r"a square grid \(there are 28\)"),
        (STATE | {"visual.conv1.weight": torch.ones(128, 4, 4, 4)}, "for images of 4 channels"),
        (STATE | {"token_embedding.weight": torch.ones(97, 72)}, "must be a multiple of 64, and is 72"),
        (STATE | {IN_PROJ: torch.ones(380, 128)}, rf"{IN_PROJ} gives \(380, 128\)"),
        (STATE | {"visual.ln_post.bias": torch.ones(128, dtype=torch.int64)}, "visual.ln_post.bias is torch.int64"),
        ({"one": STATE, "two": STATE}, "holds several models, under 'one.', 'two.'"),
    ],
)
def test_other_families_and_parts_of_checkpoints(tmp_path, content, expected):
    with pytest.raises(ConversionError, match=expected):
        prepare(tmp_path, content)


def test_another_vocabulary_must_be_asked_for(tmp_path):
    with pytest.raises(
        ConversionError, match=r"a vocabulary of 97, and CLIP's has 49408.*--arch custom.*--vision-only"
    ):
        prepare(tmp_path, STATE, arch=None)
    assert prepare(tmp_path, STATE, arch=None, vision_only=True).arch == "custom"
    assert any("No tokenizer" in remark for remark in prepare(tmp_path, STATE).remarks)


def meta_checkpoint(name, **changes):
    """OpenCLIP's own state dict of an architecture, without values."""
    config = original.get_model_config(name)
    for part, own in changes.items():
        config[part] |= own
    with torch.device("meta"):
        return original.model.CLIP(**config).state_dict()


def test_published_widths_with_too_few_layers_are_taken_for_parts(monkeypatch, tmp_path):
    (tmp_path / "a.pth").touch()
    for changes, expected in (
        ({"vision_cfg": {"layers": 3}}, r"the width of ViT-B-32 \(768\), but only 3 of its 12 layers"),
        ({"text_cfg": {"layers": 3}}, r"a text tower of a published width \(512\), but only 3 of its 12 layers"),
    ):
        towers = Towers("", meta_checkpoint("ViT-B-32", **changes), [], False)
        monkeypatch.setattr(open_clip, "read_towers", lambda *arguments, towers=towers: towers)
        with pytest.raises(ConversionError, match=expected):
            open_clip.prepare(str(tmp_path / "a.pth"))


def test_arch_and_image_size_must_fit_the_shapes(tmp_path):
    with pytest.raises(ConversionError, match=r"is not ViT-L-14: hidden_size is 128.*text_hidden_size is 64, not 768"):
        prepare(tmp_path, STATE, arch="ViT-L-14")
    with pytest.raises(ConversionError, match=r"--arch ViT-L-15 is not known. Did you mean ViT-L-14\?"):
        prepare(tmp_path, STATE, arch="ViT-L-15")
    with pytest.raises(ConversionError, match="--image-size 224 does not fit"):
        prepare(tmp_path, STATE, image_size=224)
    assert prepare(tmp_path, STATE, image_size=20).arch == "custom"


def test_a_torchscript_archive_is_refused_with_a_way_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"ViT-B-32/{name}", b"\x80\x02}.")
    result = run(tmp_path / "ViT-B-32.pt", tmp_path / "model", exit_code=1)
    for part in ("is a TorchScript archive", "Nothing was run", "ViT-B-32/openai", "open_clip_model.safetensors"):
        assert part in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ViT-B-32.pt"]
    result = CliRunner().invoke(app, ["dinov2", str(tmp_path / "ViT-B-32.pt"), str(tmp_path / "model")])
    assert result.exit_code == 1 and "is a TorchScript archive" in result.stderr


PLAIN = {
    name: config
    for name, config in ((name, original.get_model_config(name)) for name in original.list_models())
    if open_clip_published.out_of_reach(name) is None
}


@pytest.mark.parametrize("name", open_clip.ARCHITECTURES)
def test_architectures_are_those_of_the_installed_package(name):
    config = original.get_model_config(name) or original.get_model_config(name.removesuffix("-quickgelu"))
    vision, text = config["vision_cfg"], config["text_cfg"]
    ours = open_clip.ARCHITECTURES[name]
    assert (ours.hidden_size, ours.num_hidden_layers) == (vision["width"], vision["layers"])
    assert ours.intermediate_size == int(vision["width"] * vision.get("mlp_ratio", 4))
    assert (ours.patch_size, ours.image_size) == (vision["patch_size"], vision["image_size"])
    assert (ours.text_hidden_size, ours.text_num_hidden_layers) == (text["width"], text["layers"])
    assert (ours.vocab_size, ours.context_length) == (text["vocab_size"], text["context_length"])
    assert ours.projection_dim == config["embed_dim"]
    assert (ours.hidden_act == "quick_gelu") == name.endswith("-quickgelu")


@pytest.mark.parametrize("name", PLAIN)
def test_heads_go_by_the_width(name):
    vision, text = PLAIN[name]["vision_cfg"], PLAIN[name]["text_cfg"]
    assert head_dim(vision["width"]) == vision.get("head_width", 64)
    assert text["heads"] * 64 == text["width"]


def test_every_published_model_is_listed_once_with_its_size():
    lines = {line.name: line for line in open_clip.known()}
    counts = {}
    for name, line in lines.items():
        model, tag = name.split("/")
        settings = original.get_pretrained_cfg(model, tag)
        assert line.source == f"https://huggingface.co/{settings['hf_hub'].rstrip('/')}"
        assert line.arch.endswith("-quickgelu") == settings.get("quick_gelu", False)
        if model not in counts:
            counts[model] = sum(tensor.numel() for tensor in meta_checkpoint(model).values())
        assert line.num_parameters == counts[model]
    assert len({line.source for line in lines.values()}) == len(lines) == 61
    assert {model for model, _ in original.list_pretrained() if model in PLAIN} >= counts.keys()
    assert lines["ViT-B-32/openai"].num_parameters == 151_277_313
    licenses = {"ViT-L-14/openai": "mit", "ViT-H-14/laion2b_s32b_b79k": "mit", "ViT-L-14/dfn2b": "Apple"}
    licenses |= {"ViT-B-16/metaclip_400m": "CC-BY-NC", "ViT-B-16/datacomp_xl_s13b_b90k": "unknown"}
    assert {name: lines[name].license for name in licenses} == licenses


def test_the_list_has_them(monkeypatch):
    monkeypatch.setattr(convert, "LISTS", [open_clip.known])
    result = CliRunner().invoke(app, ["--list"])
    [line] = [line for line in result.stdout.splitlines() if "ViT-H-14/laion2b_s32b_b79k" in line]
    assert line.split() == [
        "open_clip",
        "ViT-H-14/laion2b_s32b_b79k",
        "ViT-H-14",
        "https://huggingface.co/laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "0",
        "14",
        "986,109,441",
        "mit",
    ]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ViT-B-16-SigLIP/webli", "its vision tower is timm's vit_base_patch16_siglip_224"),
        ("ViT-SO400M-14-SigLIP2", "its vision tower is timm's"),
        ("EVA02-L-14/merged2b_s4b_b131k", "its vision tower is timm's"),
        ("convnext_base/laion400m_s13b_b51k", "its vision tower is timm's convnext_base"),
        ("coca_ViT-B-32/laion2b_s13b_b90k", "it is a CoCa, which has a text decoder"),
        ("RN50/openai", "its vision tower is a ResNet"),
        ("roberta-ViT-B-32/laion2b_s12b_b32k", "reads the tokens of roberta-base"),
        ("ViT-H-14-CLIPA:datacomp1b", "reads the tokens of bert-base-uncased"),
        ("ViT-H-14-worldwide/metaclip2_worldwide", "reads the tokens of facebook/xlm-v-base"),
        ("ViT-B-16-plus-240/laion400m_e32", r"is of another model. Give ViT-B-16-plus-240/laion400m_e31\."),
        ("ViT-B-32/opena", r"neither a file nor a published name. Did you mean ViT-B-32/openai\?"),
        ("ViT-B-32", r"Did you mean ViT-B-32/openai\?"),
        ("ViT-H14/laion2b_s32b_b79k", r"Did you mean ViT-H-14/laion2b_s32b_b79k\?"),
        ("ViT-H-14-quickgelu/laion2b_s32b_b79k", r"Did you mean ViT-H-14/laion2b_s32b_b79k\?"),
        ("resnet50", "neither a file nor a published name. convert.py --list has them all"),
        ("folder/missing.pth", r"folder/missing\.pth does not exist"),
    ],
)
def test_names_that_cannot_be_converted(name, expected):
    with pytest.raises(ConversionError, match=expected):
        open_clip.prepare(name)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with LoopbackHub() as hub:
        yield hub


@pytest.mark.parametrize(
    "name, file",
    [
        ("ViT-B-32/openai", "open_clip_model.safetensors"),
        ("ViT-B-32:openai", "open_clip_model.safetensors"),
        ("ViT-B-32-quickgelu/openai", "open_clip_pytorch_model.bin"),
    ],
)
def test_published_names_come_from_the_hub(hub, tmp_path, monkeypatch, name, file):
    """A model that is too small to be what it is called, in the place of one that is asked for."""
    small = open_clip.prepare(str(save(tmp_path, STATE)), arch="custom", quick_gelu=True)
    path = tmp_path / file
    (save_file if path.suffix == ".safetensors" else torch.save)(STATE, path)
    hub.create("timm/vit_base_patch32_clip_224.openai", files={file: path.read_bytes()})
    options = ["--base-url", hub.endpoint, "--cache-dir", tmp_path / "cache"]
    result = run(name, tmp_path / "model", *options, exit_code=1)
    assert "is not ViT-B-32-quickgelu: hidden_size is 128, not 768" in result.stderr
    found = architecture_from_shapes(path, read_towers(path, False))
    monkeypatch.setitem(open_clip.ARCHITECTURES, "ViT-B-32-quickgelu", replace(found, hidden_act="quick_gelu"))
    # from the cache, without the Hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = run(name, tmp_path / "model", *options)
    assert "Activation: QuickGELU, by the name" in result.output and "Images:" not in result.output
    card = ModelCard.load(tmp_path / "model" / "README.md").data
    assert (card.license, card.base_model) == ("mit", "timm/vit_base_patch32_clip_224.openai")
    model = VisionTextDualEncoderModel.from_pretrained(tmp_path / "model")
    assert all(torch.equal(tensor, small.model.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_what_the_hub_has_not_is_an_error(hub, tmp_path):
    hub.create("timm/vit_base_patch32_clip_224.openai", files={"README.md": b""})
    with pytest.raises(ConversionError, match=r"could not be downloaded from the Hub: .*fetch its open_clip_model"):
        open_clip.prepare("ViT-B-32/openai", base_url=hub.endpoint, cache_dir=tmp_path)


def test_without_open_clip_the_error_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(open_clip_reference, "open_clip", None)
    with pytest.raises(ConversionError, match=r"pip install hf-vitreg\[conversion\]"):
        prepare(tmp_path, STATE)
    monkeypatch.setattr(open_clip, "PUBLISHED", {})
    monkeypatch.setattr(open_clip, "FAMILY", replace(open_clip.FAMILY, published={}))
    assert open_clip.known() == []
    assert "pip install hf-vitreg[conversion]" in " ".join(capsys.readouterr().err.split())


def test_the_family_does_not_hide_the_package(tmp_path):
    """Not even in its own folder, where both are called open_clip."""
    assert hasattr(original, "create_model") and original.__file__ != open_clip.__file__
    options = ("--arch", "custom", "--vision-only")
    done = run_script(
        SCRIPT, "open_clip", save(tmp_path, STATE), tmp_path / "model", *options, cwd=ROOT / "conversion"
    )
    assert done.returncode == 0, done.stderr
    assert f"Against open_clip {original.__version__}" in done.stdout and "ViTRegModel, custom" in done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with the real vocabulary, written once and only read."""
    torch.manual_seed(0)
    towers = {
        "vision_cfg": {"image_size": 28, "layers": 2, "width": 128, "patch_size": 14},
        "text_cfg": {"width": 64, "heads": 1, "layers": 2},
    }
    folder = tmp_path_factory.mktemp("open_clip")
    torch.save(original.model.CLIP(40, **towers, quick_gelu=True).state_dict(), folder / "a.pth")
    run(folder / "a.pth", folder / "model", "--quick-gelu", "--license", "mit")
    run(folder / "a.pth", folder / "vision", "--quick-gelu", "--vision-only")
    return folder


def photo(height=263, width=301):
    pixels = np.add.outer(np.arange(height), np.arange(width))[..., None] * np.array([1, 2, 3]) % 256
    return Image.fromarray(pixels.astype("uint8"))


def test_the_folder_is_whole_and_says_what_was_converted(folder):
    files = {path.name for path in (folder / "model").iterdir()}
    assert files == {
        "README.md",
        "config.json",
        "conversion.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len({path.stat().st_mode for path in (folder / "model").iterdir()}) == 1
    record = json.loads((folder / "model" / "conversion.json").read_text())
    assert record["reference"].startswith("open_clip ") and record["remarks"][0].startswith("Activation: QuickGELU")
    assert {row["output"] for row in record["comparisons"]} == {"tokens", "image_embeds", "text_embeds", "logits"}
    assert all(row["relative"] < parity.TOLERANCE for row in record["comparisons"])


def test_the_card_can_be_published(folder):
    card = ModelCard.load(folder / "model" / "README.md")
    check_card(card)
    assert (card.data.license, card.data.library_name) == ("mit", "transformers")
    assert card.data.pipeline_tag == "zero-shot-image-classification" and "clip" in card.data.tags
    for part in ("a.pth", "open_clip", "Activation: QuickGELU", "2 layers of width 128, 2 heads", "1 head,"):
        assert part in card.text
    assert ModelCard.load(folder / "vision" / "README.md").data.pipeline_tag == "image-feature-extraction"


def test_the_code_of_the_card_runs(folder):
    blocks = ModelCard.load(folder / "model" / "README.md").text.split("```python\n")[1:]
    code = "\n".join(block.split("```")[0] for block in blocks).replace("org/name", str(folder / "model"))
    names = {}
    exec(code, names)
    assert names["image_embeds"].shape == (1, 40) and names["text_embeds"].shape == (2, 40)
    assert names["patch_tokens"].shape == (1, 4, 128)


def test_loads_and_saves_again(folder, tmp_path):
    model, loading = VisionTextDualEncoderModel.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(loading.values()) and type(model.vision_model) is ViTRegModel
    assert type(AutoModel.from_pretrained(folder / "model")) is VisionTextDualEncoderModel
    model.save_pretrained(tmp_path)
    again, loading = VisionTextDualEncoderModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    stored = torch.load(folder / "a.pth")
    assert torch.equal(again.logit_scale, stored["logit_scale"])
    assert torch.equal(again.visual_projection.weight, stored["visual.proj"].T)


@torch.inference_mode()
def test_the_vision_tower_loads_alone(folder):
    alone = AutoModel.from_pretrained(folder / "vision")
    both = VisionTextDualEncoderModel.from_pretrained(folder / "model")
    pixel_values = torch.randn(2, 3, 42, 28)
    assert type(alone) is ViTRegModel
    outputs = alone(pixel_values)
    torch.testing.assert_close(outputs.image_embeds, both.get_image_features(pixel_values).pooler_output)
    torch.testing.assert_close(outputs.patch_tokens, both.vision_model(pixel_values).patch_tokens)


@torch.inference_mode()
def test_the_pipeline_gives_the_probabilities_of_the_original(folder):
    labels = ["a cat", "two dogs!", "an empty room, in the evening"]
    classify = pipeline("zero-shot-image-classification", model=str(folder / "model"))
    scores = {entry["label"]: entry["score"] for entry in classify(photo(), candidate_labels=labels)}
    # the same small model, by OpenCLIP from file to probabilities
    towers = {"vision_cfg": {"image_size": 28, "layers": 2, "width": 128, "patch_size": 14}}
    theirs = original.model.CLIP(40, **towers, text_cfg={"width": 64, "heads": 1, "layers": 2}, quick_gelu=True)
    theirs.load_state_dict(torch.load(folder / "a.pth"))
    image = image_transform_v2(PreprocessCfg(size=28), is_train=False)(photo())
    texts = original.get_tokenizer("ViT-B-32")([f"This is a photo of {label}." for label in labels])
    logits, _ = theirs.eval().get_logits(image[None], texts)
    expected = logits.softmax(dim=-1)[0]
    # images are resized by another library, which rounds some pixels otherwise
    torch.testing.assert_close(torch.tensor([scores[label] for label in labels]), expected, atol=0.01, rtol=0)


def test_the_processors_load(folder):
    processor = AutoProcessor.from_pretrained(folder / "model")
    assert type(processor) is VisionTextDualEncoderProcessor
    batch = processor(text=["a cat", "a black cat"], images=photo(), padding=True, return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 28, 28) and batch["input_ids"].shape == (2, 5)


TEXTS_TO_READ = [
    "a photo of a cat",
    "Hello, World! It's 2024...  don't",
    "tabs\tand\nnew lines  ",
    "",
    "!",
    "!!! wow!!",
    "naïve café",
    "日本語のテキスト 🙂",
    "#tag @user http://x.y/z?q=1_2",
    "I've we'll they're I'd I'm",
    "³ ½ Ⅷ",
    "x" * 300 + " word" * 100,
]


def test_the_tokenizer_gives_the_ids_of_the_original(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    expected = original.get_tokenizer("ViT-B-32")(TEXTS_TO_READ)
    batch = tokenizer(TEXTS_TO_READ, padding="max_length", truncation=True, return_tensors="pt")
    assert batch.input_ids.shape == expected.shape == (len(TEXTS_TO_READ), 77)
    ends = expected.argmax(dim=1)
    read = torch.arange(77) <= ends[:, None]
    assert torch.equal(batch.attention_mask.bool(), read)
    # beyond the end of the text OpenCLIP has 0, and this tokenizer the end again, which is masked
    assert torch.equal(batch.input_ids[read], expected[read])
    assert (batch.input_ids[~read] == 49407).all() and (expected[~read] == 0).all()
    assert ends[-1] == 76 and expected[-1, -1] == 49407
    assert tokenizer.decode(batch.input_ids[0], skip_special_tokens=True) == "a photo of a cat"
    assert clip_tokenizer(49408, 32).model_max_length == 32 and clip_tokenizer(97, 9) is None


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_the_image_processor_is_that_of_the_original_evaluation(folder, resize_mode):
    processor = open_clip._image_processor(224, **open_clip.DEFAULT_SETTINGS | {"resize_mode": resize_mode})
    expected = image_transform_v2(PreprocessCfg(size=224, resize_mode=resize_mode), is_train=False)(photo())
    pixel_values = processor(photo(), return_tensors="pt").pixel_values[0]
    # two of 255 levels, since one resizes tensors and the other images
    torch.testing.assert_close(pixel_values, expected, atol=0.03, rtol=0)
    assert (pixel_values - expected).abs().mean() < 1e-3
    stored = AutoImageProcessor.from_pretrained(folder / "model")
    assert list(stored.image_mean) == [0.48145466, 0.4578275, 0.40821073] and stored.size["shortest_edge"] == 28


def test_published_settings_reach_the_image_processor():
    settings = open_clip_published.settings
    processor = open_clip._image_processor(224, **settings("ViT-L-14/laion2b_s32b_b82k"))
    assert tuple(processor.image_mean) == (0.5, 0.5, 0.5)
    processor = open_clip._image_processor(378, **settings("ViT-H-14-378/dfn5b"))
    assert (processor.size["height"], processor.size["width"]) == (378, 378)


def test_weights_in_half_precision_stay_as_they_are(tmp_path):
    save_file({name: tensor.half() for name, tensor in STATE.items()}, tmp_path / "a.safetensors")
    run(tmp_path / "a.safetensors", tmp_path / "model", "--arch", "custom")
    model = VisionTextDualEncoderModel.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float16
    assert torch.equal(
        model.vision_model.embeddings.position_embeddings[0], STATE["visual.positional_embedding"].half()
    )


def test_a_model_that_differs_from_the_original_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPED, "text_projection", lambda tensor: tensor.T.neg())
    result = run(save(tmp_path, STATE), tmp_path / "model", "--arch", "custom", exit_code=1)
    assert (
        "The converted model is not the same as open_clip" in result.stderr and "10 of 20 comparisons" in result.stderr
    )
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-quickgelu", "ViT-H-14"])
def test_published_sizes_agree_and_stay_within_their_memory(tmp_path, name):
    torch.save(original.model.CLIP(**original.get_model_config(name)).state_dict(), tmp_path / "a.pth")
    arguments = ("-c", MEASURED, SCRIPT, "open_clip", tmp_path / "a.pth", tmp_path / "model", "--arch", name)
    done = run_script(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size, peak = (tmp_path / "a.pth").stat().st_size, int(done.stdout.rsplit("peak: ")[1])
    assert peak < 1.3 * size + 1e9, f"{peak / 1e9:.2f} GB for a checkpoint of {size / 1e9:.2f} GB"
    assert json.loads((tmp_path / "model" / "conversion.json").read_text())["arch"] == name
    (tmp_path / "a.pth").unlink()
    (tmp_path / "model" / "model.safetensors").unlink()
