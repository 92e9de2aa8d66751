# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import http.server
import threading

import pytest
import torch
from original_outputs import assert_close, load
from safetensors.torch import load_file
from test_conversion_checkpoints import TINY, in_chunks, linear_head, original_checkpoint, training_part
from test_conversion_dino import ProjectionHead, head_state
from typer.testing import CliRunner

from conversion import dinov2, timm_reference
from conversion.convert import app
from conversion.family import ConversionError
from conversion.published import download, nearest


def prepare(tmp_path, tensors, **options):
    # a new name every time: the file of a model that is still there must not change
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pth"
    torch.save(tensors, path)
    return dinov2.prepare(str(path), **options)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_reg4"])
@torch.inference_mode()
def test_tokens_are_those_of_the_original_at_every_size(tmp_path, name):
    state, images, outputs = load(name)
    candidate = prepare(tmp_path, state)
    for size, pixel_values in images.items():
        original = outputs[f"tokens/{size}"]
        assert_close(candidate.model(pixel_values).last_hidden_state, original)
        assert_close(candidate.reference(pixel_values)["tokens"], original)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_reg4"])
@pytest.mark.parametrize("features, layout", [("linear_1", "cls_mean"), ("linear_4", "last4_cls_mean")])
@torch.inference_mode()
def test_linear_heads_read_what_the_original_gives_them(tmp_path, name, features, layout):
    state, images, outputs = load(name)
    original = outputs[f"{features}/20x20"]
    # every feature in a logit of its own, and one that mixes them
    width = original.shape[1]
    head = {"weight": torch.cat([torch.eye(width), torch.randn(1, width)]), "bias": torch.randn(width + 1)}
    torch.save(head, tmp_path / "head.pth")
    candidate = prepare(tmp_path, state, linear_head=str(tmp_path / "head.pth"))
    assert candidate.model.config.classifier_layout == layout
    logits = original @ head["weight"].mT + head["bias"]
    assert_close(candidate.model(images["20x20"]).logits, logits)
    assert_close(candidate.reference(images["20x20"])["logits"], logits)


def test_the_config_is_what_the_shapes_say(tmp_path):
    candidate = prepare(tmp_path, original_checkpoint(**TINY))
    config = candidate.model.config
    assert candidate.arch == "custom"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 4, 1)
    assert (config.intermediate_size, config.num_register_tokens) == (88, 3)
    assert (config.image_size, config.patch_size, config.grid_size) == (70, 14, (5, 5))
    assert config.use_mask_token and config.qkv_bias and not config.use_swiglu_ffn
    assert (config.interpolate_antialias, config.interpolate_offset) == (True, 0.0)


def test_the_config_without_registers_mask_token_and_qkv_bias(tmp_path):
    tensors = original_checkpoint(**{**TINY, "hidden_size": 128, "patch_size": 16, "num_registers": 0, "swiglu": True})
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(("mask_token", "qkv.bias"))}
    candidate = prepare(tmp_path, tensors)
    config = candidate.model.config
    assert (config.num_attention_heads, config.num_register_tokens, config.image_size) == (2, 0, 80)
    assert (config.interpolate_antialias, config.interpolate_offset) == (False, 0.1)
    assert config.use_swiglu_ffn and not config.use_mask_token and not config.qkv_bias
    # 16-pixel patches divide the crop too
    assert candidate.image_processor.crop_size["height"] == 224


def test_the_model_shares_the_memory_of_the_checkpoint(tmp_path):
    tensors = original_checkpoint(**TINY)
    candidate = prepare(tmp_path, tensors)
    state = candidate.model.state_dict()
    assert torch.equal(state["embeddings.mask_token"], tensors["mask_token"])
    key = candidate.reference.tensors["blocks.3.attn.qkv.weight"]
    assert torch.equal(state["encoder.layer.3.attention.k_proj.weight"], key[64:128])
    assert state["encoder.layer.3.attention.k_proj.weight"].data_ptr() == key[64:].data_ptr()
    # or save_pretrained would copy them, and need the memory for it
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    assert not any(parameter.is_meta for parameter in candidate.model.parameters())
    assert not candidate.model.training


TENSORS = original_checkpoint(**TINY)
OTHER = {name: tensor + 1 for name, tensor in TENSORS.items()}
LAYOUTS = {
    "flat": (TENSORS, []),
    "chunked": (in_chunks(TENSORS, 2), []),
    "teacher alone": (training_part(TENSORS, "teacher."), []),
    "nested teacher": ({"teacher": training_part(in_chunks(TENSORS, 2))}, []),
    "nested model": (
        {
            "model": training_part(OTHER, "student.")
            | training_part(TENSORS, "teacher.")
            | {"dino_loss.center": torch.ones(1, 7), "ibot_patch_loss.center": torch.ones(1, 1, 7)},
            "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
            "iteration": 11,
        },
        [
            "model.student (",
            "model.student.dino_head (4",
            "model.student.ibot_head (4",
            "model.dino_loss",
            "model.ibot_patch_loss",
            "optimizer (2",
            "iteration",
        ],
    ),
    "student alone": (training_part(TENSORS, "student."), []),
    "without heads": ({f"backbone.{name}": tensor for name, tensor in TENSORS.items()}, []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_model_and_names_what_is_left_aside(tmp_path, layout):
    content, left_aside = LAYOUTS[layout]
    candidate = prepare(tmp_path, content)
    assert len(candidate.left_aside) == len(left_aside), candidate.left_aside
    for part in left_aside:
        assert any(found.startswith(part) for found in candidate.left_aside), (part, candidate.left_aside)
    flat = prepare(tmp_path, TENSORS).model.state_dict()
    state = candidate.model.state_dict()
    assert state.keys() == flat.keys()
    assert all(torch.equal(state[name], flat[name]) for name in state)


@pytest.mark.parametrize("spelling", ["old", "present"])
@pytest.mark.parametrize("layout", ["nested teacher", "sharded model", "student alone"])
def test_projection_heads_are_kept_and_go_on_where_they_were(tmp_path, spelling, layout):
    kinds = {"dino_head": ProjectionHead(), "ibot_head": ProjectionHead()}
    network = {f"backbone.{name}": tensor for name, tensor in TENSORS.items()}
    for kind, head in kinds.items():
        network |= {f"{kind}.{name}": tensor for name, tensor in head_state(head, spelling).items()}
    other = {name: tensor + 1 for name, tensor in network.items()}
    content = {
        "nested teacher": {"teacher": network},
        "sharded model": {
            "model": {f"student.{name}": tensor for name, tensor in other.items()}
            | {f"teacher.{name}": tensor for name, tensor in network.items()}
        },
        "student alone": {f"student.{name}": tensor for name, tensor in network.items()},
    }[layout]
    torch.save(content, tmp_path / "a.pth")
    result = CliRunner().invoke(app, ["dinov2", str(tmp_path / "a.pth"), str(tmp_path / "model")])
    assert "Kept beside the model: 16 tensors of projection heads" in result.stdout, result.output
    kept = load_file(tmp_path / "model" / "pretraining_heads.safetensors")
    features = torch.randn(2, 128)
    for kind, head in kinds.items():
        resumed = ProjectionHead()
        own = {name: tensor for name, tensor in kept.items() if name.startswith(f"{kind}.")}
        resumed.load_state_dict({name.removeprefix(f"{kind}."): tensor for name, tensor in own.items()})
        torch.testing.assert_close(resumed(features), head(features))


def test_a_tensor_beside_the_backbone_that_nobody_knows_is_an_error(tmp_path):
    content = {"teacher": training_part(TENSORS) | {"depth_head.weight": torch.ones(3)}}
    with pytest.raises(ConversionError, match=r"1 tensors that the model does not have: teacher\.depth_head\.weight"):
        prepare(tmp_path, content)


def test_two_backbones_are_an_error(tmp_path):
    content = {"ema": TENSORS, "raw": OTHER}
    with pytest.raises(ConversionError, match=r"several backbones, under 'ema\.', 'raw\.'"):
        prepare(tmp_path, content)


def test_layers_numbered_anew_in_every_chunk_are_an_error(tmp_path):
    anew = {}
    for name, tensor in in_chunks(TENSORS, 2).items():
        start, *rest = name.split(".")
        if start == "blocks":
            rest[1] = str(int(rest[1]) % 2)
        anew[".".join([start, *rest])] = tensor
    with pytest.raises(ConversionError, match=r"claim the same place: blocks\.1\.0\.norm1\.weight and blocks\.0\.0"):
        prepare(tmp_path, anew)


def without(*names):
    return {name: tensor for name, tensor in TENSORS.items() if not name.startswith(names)}


DINOV3 = without("pos_embed") | {"storage_tokens": torch.ones(1, 4, 64), "rope_embed.periods": torch.ones(16)}
TRANSFORMERS = {"embeddings.cls_token": torch.ones(1, 1, 64), "encoder.layer.0.norm1.weight": torch.ones(64)}
OPEN_CLIP = {"visual.class_embedding": torch.ones(64), "visual.conv1.weight": torch.ones(64, 3, 14, 14)}


@pytest.mark.parametrize(
    "tensors, expected",
    [
        (DINOV3, "no DINOv2 checkpoint, or only a part of one: it has no pos_embed"),
        (TRANSFORMERS, "no DINOv2 checkpoint.*it has no patch_embed.proj.weight"),
        (OPEN_CLIP, "no DINOv2 checkpoint.*It has visual.class_embedding"),
        (without("blocks.0.ls", "blocks.1.ls", "blocks.2.ls", "blocks.3.ls"), "it has no blocks.0.ls1.gamma"),
        (without("register") | {"reg_token": torch.ones(1, 4, 64)}, "the model does not have: reg_token"),
        (without("norm."), "only a part of one: it has no norm.weight"),
        (without("norm.bias"), "1 tensors that are missing: norm.bias"),
        (without("blocks.2."), "14 tensors that are missing: blocks.2.norm1.weight"),
        (TENSORS | {"cls_token": torch.ones(64)}, r"cls_token has shape \(64,\)"),
        (TENSORS | {"pos_embed": torch.ones(1, 28, 64)}, r"a square grid \(there are 28\)"),
        (TENSORS | {"pos_embed": torch.ones(1, 0, 64)}, r"a square grid \(there are 0\)"),
        (TENSORS | {"cls_token": torch.ones(1, 1, 72)}, r"a multiple of 64 \(it is 72\)"),
        (TENSORS | {"blocks.1.mlp.fc1.weight": torch.ones(80, 64)}, r"blocks.1.mlp.fc1.weight gives \(80, 64\)"),
        (without("blocks.0.mlp"), "not whole: blocks.0.mlp.fc2.weight is missing"),
        (TENSORS | {"norm.bias": torch.ones(64, dtype=torch.int64)}, r"norm\.bias is torch\.int64"),
    ],
)
def test_other_families_and_parts_of_checkpoints(tmp_path, tensors, expected):
    with pytest.raises(ConversionError, match=expected):
        prepare(tmp_path, tensors)


def test_arch_must_fit_the_shapes(tmp_path):
    with pytest.raises(ConversionError, match=r"is not vitl14_reg4: hidden_size is 64, not 1024, num_hidden_layers"):
        prepare(tmp_path, TENSORS, arch="vitl14_reg4")
    with pytest.raises(ConversionError, match=r"--arch vits14_reg3 is not known. Did you mean vits14_reg4\?"):
        prepare(tmp_path, TENSORS, arch="vits14_reg3")
    assert prepare(tmp_path, TENSORS, arch="custom").arch == "custom"


def test_a_published_width_with_too_few_layers_is_taken_for_a_part(tmp_path):
    tensors = original_checkpoint(hidden_size=384, num_layers=3, intermediate_size=1536, side=5)
    with pytest.raises(ConversionError, match=r"the width of vits14 \(384\), but only 3 of its 12 layers"):
        prepare(tmp_path, tensors)
    assert prepare(tmp_path, tensors, arch="custom").model.config.num_hidden_layers == 3


def test_image_size_states_what_the_position_embeddings_are_for(tmp_path):
    assert prepare(tmp_path, TENSORS, image_size=70).model.config.image_size == 70
    with pytest.raises(
        ConversionError, match=r"--image-size 518 does not fit.*5x5 grid of 14-pixel patches, 70 pixels"
    ):
        prepare(tmp_path, TENSORS, image_size=518)


@pytest.mark.parametrize(
    "head, expected",
    [
        (
            linear_head(7, 3 * 64),
            "a head on 192 features, and this backbone has 4 layers, each 64 wide: .* 128 .* 320",
        ),
        (linear_head(7, 2 * 128), "a head on 256 features"),
        (linear_head(7, 64), "a head on 64 features"),
        ({"weight": torch.ones(7, 128)}, "is no linear head: it must hold weight"),
        ({"weight": torch.ones(7, 128), "bias": torch.ones(5)}, "is no linear head"),
        ({"weight": torch.ones(128), "bias": torch.ones(128)}, "is no linear head"),
        ({"linear.weight": torch.ones(7, 128), "linear.bias": torch.ones(7)}, "is no linear head"),
        ({"weight": torch.ones(7, 128), "bias": "none"}, "is no linear head"),
    ],
)
def test_heads_that_do_not_fit(tmp_path, head, expected):
    torch.save(head, tmp_path / "head.pth")
    with pytest.raises(ConversionError, match=expected):
        prepare(tmp_path, TENSORS, linear_head=str(tmp_path / "head.pth"))


def test_a_4_layer_head_needs_four_layers(tmp_path):
    torch.save(linear_head(7, 5 * 64), tmp_path / "head.pth")
    with pytest.raises(ConversionError, match="a head on 320 features, and this backbone has 3 layers"):
        prepare(tmp_path, original_checkpoint(**{**TINY, "num_layers": 3}), linear_head=str(tmp_path / "head.pth"))


def test_heads_that_are_not_there(tmp_path):
    with pytest.raises(ConversionError, match=r"--linear-head 2 is no file\. Give one, or 1 or 4"):
        prepare(tmp_path, TENSORS, linear_head="2")
    with pytest.raises(ConversionError, match="--linear-head 4 asks for a published head"):
        prepare(tmp_path, TENSORS, linear_head="4")


def test_imagenet_has_a_thousand_distinct_labels_in_their_order():
    labels = timm_reference.imagenet_labels()
    assert len(set(labels)) == 1000
    assert (labels[0], labels[1]) == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    assert (labels[134], labels[517]) == ("crane (n02012849)", "crane (n03126707)")


def test_without_timm_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_reference, "timm", None)
    with pytest.raises(ConversionError, match=r"pip install hf-vitreg\[conversion\]"):
        prepare(tmp_path, TENSORS)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("dinov2_vits14_reg5", r"neither a file nor a published name. Did you mean dinov2_vits14_reg4\?"),
        ("dinov2-vitb14", r"Did you mean dinov2_vitb14\?"),
        ("dinov2_vits14.pth", r"Did you mean dinov2_vits14\?"),
        ("resnet50", r"There are dinov2_vits14, .*dinov2_vitg14_reg4\."),
    ],
)
def test_near_misses_of_published_names(name, expected):
    with pytest.raises(ConversionError, match=expected):
        dinov2.prepare(name)
    assert nearest("vitg", ["vitg14", "vits14"]) == "Did you mean vitg14?"


def test_a_published_name_and_another_arch(tmp_path):
    with pytest.raises(ConversionError, match="dinov2_vits14 is vits14, not vitb14"):
        dinov2.prepare("dinov2_vits14", arch="vitb14", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "checkpoint, layers, folder, files",
    [
        ("dinov2_vits14", None, "dinov2_vits14", ["dinov2_vits14_pretrain"]),
        (
            "dinov2_vitl14_reg4",
            "1",
            "dinov2_vitl14",
            ["dinov2_vitl14_reg4_linear_head", "dinov2_vitl14_reg4_pretrain"],
        ),
        (
            "dinov2_vitg14_reg",
            "4",
            "dinov2_vitg14",
            ["dinov2_vitg14_reg4_linear4_head", "dinov2_vitg14_reg4_pretrain"],
        ),
    ],
)
def test_addresses_of_published_files(tmp_path, checkpoint, layers, folder, files):
    """From a mirror whose files are too small to be what they are called: the error comes once all are fetched."""
    mirror, cache = tmp_path / "mirror", tmp_path / "cache"
    (mirror / folder).mkdir(parents=True)
    for file in files:
        torch.save(TENSORS, mirror / folder / f"{file}.pth")
    with pytest.raises(ConversionError, match="hidden_size is 64"):
        dinov2.prepare(checkpoint, linear_head=layers, base_url=mirror.as_uri(), cache_dir=cache)
    assert sorted(path.stem for path in cache.iterdir()) == files


class Answers(http.server.BaseHTTPRequestHandler):
    """/whole answers with all that it announces, /cut with half of it, /page with a page, everything else with 404."""

    def do_GET(self):
        body = b"<html>Sign in</html>" if self.path == "/page" else bytes(100)
        self.send_response(200 if self.path in ("/whole", "/cut", "/page") else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:50] if self.path == "/cut" else body)

    def log_message(self, *args):
        """Nothing on stderr."""


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_downloads_are_whole_or_absent(tmp_path, server):
    path = download(f"{server}/whole", tmp_path)
    assert path.read_bytes() == bytes(100)
    path.write_bytes(b"kept")
    assert download(f"{server}/whole", tmp_path).read_bytes() == b"kept"
    for name, expected in [("cut", "ended after 50 of 100 bytes"), ("page", "web page"), ("none", "Not Found")]:
        with pytest.raises(ConversionError, match=expected):
            download(f"{server}/{name}", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["whole"]


def test_no_network(tmp_path):
    # the discard port of this machine: nobody listens
    url = "http://127.0.0.1:9/dinov2"
    with pytest.raises(ConversionError, match=r"could not be downloaded: .*Check the network, or fetch .* put it at"):
        dinov2.prepare("dinov2_vits14", base_url=url, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_downloads_go_to_the_folder_of_torch_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "file.pth").write_bytes(b"abc")
    assert download((tmp_path / "file.pth").as_uri()) == tmp_path / "hub" / "checkpoints" / "file.pth"
