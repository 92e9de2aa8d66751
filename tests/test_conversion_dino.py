# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import argparse
import json

import pytest
import timm
import torch
from conversion_cases import assert_bad_files_are_refused
from huggingface_hub import ModelCard
from original_outputs import assert_close, load
from safetensors.torch import load_file
from test_conversion_checkpoints import linear_head, original_checkpoint
from test_convert import MEASURED, SCRIPT, run_script
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from typer.testing import CliRunner

from conversion import dino
from conversion.convert import app
from conversion.family import ConversionError
from conversion.published import known_checkpoints
from hf_vitreg import ViTRegForImageClassification, ViTRegModel


STATE, IMAGES, OUTPUTS = load("dino")
TIMM_NAMES = {
    "vits16": "vit_small_patch16_224.dino",
    "vits8": "vit_small_patch8_224.dino",
    "vitb16": "vit_base_patch16_224.dino",
    "vitb8": "vit_base_patch8_224.dino",
}


def save(tmp_path, content):
    # a new name every time: the file of a model that is still there must not change
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
    torch.save(content, path)
    return path


def prepare(tmp_path, content, **options):
    return dino.prepare(str(save(tmp_path, content)), **options)


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(app, ["dino", *map(str, arguments)])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


@torch.inference_mode()
def test_tokens_are_those_of_the_original_at_every_size(tmp_path):
    candidate = prepare(tmp_path, STATE)
    for size, pixel_values in IMAGES.items():
        original = OUTPUTS[f"tokens/{size}"]
        assert_close(candidate.model(pixel_values).last_hidden_state, original)
        assert_close(candidate.reference(pixel_values)["tokens"], original)


def saved_linear_head(num_labels, width):
    """As eval_linear.py saves it."""
    head = {f"module.linear.{name}": tensor for name, tensor in linear_head(num_labels, width).items()}
    return {
        "epoch": 100,
        "state_dict": head,
        "optimizer": {"state": {}},
        "scheduler": {"eta_min": 0},
        "best_acc": 76.9,
    }


FEATURES = {
    "last4_cls": OUTPUTS["linear_4_blocks/20x20"],
    "cls_mean": OUTPUTS["linear_1_block_avgpool/20x20"],  # CLS and mean channel by channel in turn
    "cls": OUTPUTS["tokens/20x20"][:, 0],
}


@pytest.mark.parametrize("layout", FEATURES)
@torch.inference_mode()
def test_linear_heads_read_what_the_original_gives_them(tmp_path, layout):
    features = FEATURES[layout]
    head = linear_head(11, features.shape[1])
    head_file = save(tmp_path, saved_linear_head(11, features.shape[1]))
    candidate = prepare(tmp_path, STATE, linear_head=str(head_file))
    assert type(candidate.model) is ViTRegForImageClassification
    assert (candidate.model.config.classifier_layout, candidate.model.config.num_labels) == (layout, 11)
    original = nn.functional.linear(features, head["weight"], head["bias"])
    assert_close(candidate.model(IMAGES["20x20"]).logits, original)
    assert_close(candidate.reference(IMAGES["20x20"])["logits"], original)


@pytest.mark.parametrize(
    "head, expected",
    [
        (saved_linear_head(7, 3 * 128), r"a head on 384 features, .* read 128 \(CLS\), 256 \(CLS and the mean"),
        (linear_head(7, 4 * 128), "it must hold state_dict.module.linear.weight"),
        ({"state_dict": {"module.linear.weight": torch.ones(7, 512)}}, "is no linear head"),
    ],
)
def test_heads_that_do_not_fit(tmp_path, head, expected):
    with pytest.raises(ConversionError, match=expected):
        prepare(tmp_path, STATE, linear_head=str(save(tmp_path, head)))


def test_heads_that_are_not_there(tmp_path):
    with pytest.raises(ConversionError, match=r"--linear-head 4 is no file\. Give one, or imagenet for a published"):
        prepare(tmp_path, STATE, linear_head="4")
    with pytest.raises(ConversionError, match="--linear-head imagenet asks for a published head"):
        prepare(tmp_path, STATE, linear_head="imagenet")


def test_the_config_is_what_the_shapes_and_the_family_say(tmp_path):
    candidate = prepare(tmp_path, STATE)
    config = candidate.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 4, 2)
    assert (config.intermediate_size, config.num_register_tokens, config.layerscale_value) == (60, 0, None)
    assert (config.image_size, config.patch_size) == (20, 4)
    assert (config.interpolate_antialias, config.interpolate_offset) == (False, 0.1)
    assert not config.use_mask_token
    # eval_linear.py, for validation
    assert candidate.image_processor.size["shortest_edge"] == 256
    assert candidate.image_processor.crop_size["height"] == candidate.image_processor.crop_size["width"] == 224


class ProjectionHead(nn.Module):
    """Of self-supervised training, weight-normalized as torch does at present."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(128, 13), nn.GELU(), nn.Linear(13, 17), nn.GELU(), nn.Linear(17, 7)]
        self.mlp = nn.Sequential(*layers)
        self.last_layer = weight_norm(nn.Linear(7, 19, bias=False))
        nn.init.uniform_(self.last_layer.parametrizations.weight.original0, 0.5, 2)

    def forward(self, features):
        return self.last_layer(nn.functional.normalize(self.mlp(features), dim=-1))


OLD_SPELLING = {
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}


def head_state(head, spelling):
    """A head's tensors as torch names them at present, or as it did when DINO and DINOv2 were published."""
    names = OLD_SPELLING if spelling == "old" else {}
    return {names.get(name, name): tensor.clone() for name, tensor in head.state_dict().items()}


def training_checkpoint(head, spelling="old"):
    """As main_dino.py saves it: the student under DistributedDataParallel, the teacher not."""
    teacher = {f"backbone.{name}": tensor for name, tensor in STATE.items()}
    teacher |= {f"head.{name}": tensor for name, tensor in head_state(head, spelling).items()}
    return {
        "student": {f"module.{name}": tensor + 1 for name, tensor in teacher.items()},
        "teacher": teacher,
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 7,
        "args": argparse.Namespace(arch="vit_small", patch_size=4),
        "dino_loss": {"center": torch.ones(1, 19)},
        "fp16_scaler": {"scale": 65536.0},
    }


@pytest.mark.parametrize("spelling", ["old", "present"])
def test_a_training_checkpoint_gives_the_teacher_and_keeps_its_projection_head(tmp_path, spelling):
    head = ProjectionHead()
    result = run(save(tmp_path, training_checkpoint(head, spelling)), tmp_path / "model")
    assert "Converted: teacher.backbone.* of" in result.output
    assert "8 tensors of projection heads, in pretraining_heads.safetensors" in result.output
    record = json.loads((tmp_path / "model" / "conversion.json").read_text())
    aside = " ".join(record["left_aside"])
    for part in (
        "student",
        "student.module.head (8 entries)",
        "optimizer",
        "epoch",
        "args",
        "dino_loss",
        "fp16_scaler",
    ):
        assert part in aside, (part, aside)
    model = AutoModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(model.embeddings.cls_token, STATE["cls_token"])
    kept = load_file(tmp_path / "model" / "pretraining_heads.safetensors")
    assert sorted(kept) == record["heads"] == sorted(f"dino_head.{name}" for name in head.state_dict())


@pytest.mark.parametrize("spelling", ["old", "present"])
def test_the_kept_head_goes_on_where_it_was(tmp_path, spelling):
    head, resumed = ProjectionHead(), ProjectionHead()
    kept = prepare(tmp_path, training_checkpoint(head, spelling)).heads
    resumed.load_state_dict({name.removeprefix("dino_head."): tensor for name, tensor in kept.items()})
    magnitude, direction = (head_state(head, "old")[f"last_layer.weight_{part}"] for part in "gv")
    torch.testing.assert_close(resumed.last_layer.weight, magnitude * direction / direction.norm(dim=1, keepdim=True))
    features = torch.randn(2, 128)
    torch.testing.assert_close(resumed(features), head(features))


def test_a_teacher_with_batch_norms_in_its_head_is_wrapped_as_the_student_is(tmp_path):
    content = training_checkpoint(ProjectionHead())
    content["teacher"] = {f"module.{name}": tensor for name, tensor in content["teacher"].items()}
    candidate = prepare(tmp_path, content)
    assert candidate.sources[0]["backbone"] == "teacher.module.backbone.*"
    assert len(candidate.heads) == 8
    torch.testing.assert_close(candidate.model.embeddings.cls_token, STATE["cls_token"])


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.", "module.backbone.", "teacher.backbone."])
def test_a_backbone_alone_may_have_any_prefix(tmp_path, prefix):
    candidate = prepare(tmp_path, {f"{prefix}{name}": tensor for name, tensor in STATE.items()})
    assert type(candidate.model) is ViTRegModel
    assert (candidate.left_aside, candidate.heads) == ([], {})
    torch.testing.assert_close(candidate.model.embeddings.position_embeddings, STATE["pos_embed"])


def without(*names):
    return {name: tensor for name, tensor in STATE.items() if not name.startswith(names)}


@pytest.mark.parametrize(
    "tensors, expected",
    [
        (load("dinov2")[0], "the model does not have: .*blocks.0.ls1.gamma"),
        (load("dinov2_reg4")[0], "the model does not have: .*blocks.0.mlp.w12.weight"),
        (load("dinov3")[0], "is no DINO checkpoint, or only a part of one: it has no pos_embed"),
        (load("deit_distilled")[0], "is no DINO checkpoint: .*one for CLS and those of a square grid"),
        (load("deit3")[0], "is no DINO checkpoint: .*one for CLS and those of a square grid"),
        (load("open_clip")[0], "is no DINO checkpoint.*It has "),
        # a plain DeiT has all that a DINO has, and a classifier
        (STATE | {"head.weight": torch.ones(5, 128), "head.bias": torch.ones(5)}, "does not have: head.weight, head"),
        (without("norm."), "it has no norm.weight"),
        (without("blocks.2."), "12 tensors that are missing: blocks.2.norm1.weight"),
        (STATE | {"blocks.1.mlp.fc1.weight": torch.ones(80, 128)}, r"blocks.1.mlp.fc1.weight gives \(80, 128\)"),
        (STATE | {"norm.bias": torch.ones(128, dtype=torch.int64)}, r"norm\.bias is torch\.int64"),
    ],
)
def test_other_families_and_parts_of_checkpoints(tmp_path, tensors, expected):
    with pytest.raises(ConversionError, match=expected):
        prepare(tmp_path, tensors)


def test_arch_and_image_size_must_fit_the_shapes(tmp_path):
    with pytest.raises(ConversionError, match="is not vitb8: hidden_size is 128, not 768, num_hidden_layers is 4"):
        prepare(tmp_path, STATE, arch="vitb8")
    with pytest.raises(ConversionError, match=r"--arch vits14 is not known. Did you mean vits16\?"):
        prepare(tmp_path, STATE, arch="vits14")
    with pytest.raises(ConversionError, match="--image-size 224 does not fit"):
        prepare(tmp_path, STATE, image_size=224)
    assert prepare(tmp_path, STATE, arch="custom", image_size=20).arch == "custom"


@pytest.mark.parametrize("arch", dino.ARCHITECTURES)
def test_published_models_are_those_of_timm(arch):
    known = {one.name: one for one in known_checkpoints(dino.FAMILY)}
    with torch.device("meta"):
        model = timm.create_model(TIMM_NAMES[arch], num_classes=0)
    config = dino.FAMILY.config(dino.ARCHITECTURES[arch])
    assert known[f"dino_{arch}"].source == timm.get_pretrained_cfg(TIMM_NAMES[arch]).url
    assert known[f"dino_{arch}"].num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert config.num_attention_heads == model.blocks[0].attn.num_heads
    assert known[f"dino_{arch}_full"].source.endswith(f"dino_{dino.FILES[arch]}_pretrain_full_checkpoint.pth")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("dino_vits14", r"neither a file nor a published name. Did you mean dino_vits16\?"),
        ("dino-vitb8", r"Did you mean dino_vitb8\?"),
        ("resnet50", r"There are dino_vits16, .*dino_vitb8_full\."),
    ],
)
def test_near_misses_of_published_names(name, expected):
    with pytest.raises(ConversionError, match=expected):
        dino.prepare(name)


@pytest.mark.parametrize(
    "checkpoint, head, files",
    [
        ("dino_vits8", None, ["dino_deitsmall8_pretrain"]),
        ("dino_vitb16_full", None, ["dino_vitbase16_pretrain_full_checkpoint"]),
        ("dino_vits16", "imagenet", ["dino_deitsmall16_linearweights", "dino_deitsmall16_pretrain"]),
        (
            "dino_vitb8_full",
            "imagenet",
            ["dino_vitbase8_linearweights", "dino_vitbase8_pretrain_full_checkpoint"],
        ),
    ],
)
def test_addresses_of_published_files(tmp_path, checkpoint, head, files):
    """From a mirror whose files are too small to be what they are called: the error comes once all are fetched."""
    mirror, cache = tmp_path / "mirror", tmp_path / "cache"
    folder = mirror / f"{'_'.join(files[-1].split('_')[:2])}_pretrain"
    folder.mkdir(parents=True)
    for file in files:
        torch.save(STATE, folder / f"{file}.pth")
    with pytest.raises(ConversionError, match="hidden_size is 128"):
        dino.prepare(checkpoint, linear_head=head, base_url=mirror.as_uri(), cache_dir=cache)
    assert sorted(path.stem for path in cache.iterdir()) == files


def test_published_names_and_heads_come_from_a_mirror(tmp_path, monkeypatch):
    """The whole way, with a small model in the place of a published one."""
    monkeypatch.setitem(dino.ARCHITECTURES, "vitb16", dino.Architecture(128, 4, 60, patch_size=4))
    folder = tmp_path / "mirror" / "dino_vitbase16_pretrain"
    folder.mkdir(parents=True)
    torch.save(STATE, folder / "dino_vitbase16_pretrain.pth")
    torch.save(saved_linear_head(1000, 2 * 128), folder / "dino_vitbase16_linearweights.pth")
    addresses = ["--base-url", (tmp_path / "mirror").as_uri(), "--cache-dir", tmp_path / "cache"]
    run("dino_vitb16", tmp_path / "model", "--linear-head", "imagenet", *addresses)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.classifier_layout == "cls_mean"
    assert model.config.id2label[1] == "goldfish, Carassius auratus"
    head = linear_head(1000, 2 * 128)
    original = nn.functional.linear(FEATURES["cls_mean"], head["weight"], head["bias"])
    assert_close(model(IMAGES["20x20"]).logits.detach(), original)
    card = ModelCard.load(tmp_path / "model" / "README.md").data
    assert (card.license, card.base_model) == ("apache-2.0", "facebook/dino-vitb16")
    assert AutoImageProcessor.from_pretrained(tmp_path / "model").size["shortest_edge"] == 256


def test_bad_input_is_one_clear_message_and_nothing_is_written(tmp_path):
    assert_bad_files_are_refused(tmp_path, run, STATE, spoiled="norm.weight")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vits16", "vits8"])
def test_published_sizes_agree_and_stay_within_their_memory(tmp_path, arch):
    sizes = dino.ARCHITECTURES[arch]
    tensors = original_checkpoint(384, 12, 1536, side=224 // sizes.patch_size, patch_size=sizes.patch_size)
    tensors = {name: tensor for name, tensor in tensors.items() if ".ls" not in name and name != "mask_token"}
    torch.save(tensors, tmp_path / "a.pth")
    arguments = ["dino", tmp_path / "a.pth", tmp_path / "model", "--arch", arch]
    done = run_script("-c", MEASURED, SCRIPT, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size, peak = (tmp_path / "a.pth").stat().st_size, int(done.stdout.rsplit("peak: ")[1])
    assert peak < 1.3 * size + 1e9, f"{peak / 1e9:.2f} GB for a checkpoint of {size / 1e9:.2f} GB"
