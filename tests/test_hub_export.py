# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import json
import logging
import os
import re
import socket
from pathlib import Path

import dual_encoders
import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session
from loopback_hub import LoopbackHub
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    BitImageProcessor,
)

from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel
from hf_vitreg.hub import export
from hf_vitreg.hub.card import PIPELINE_TAGS, CardFacts
from hf_vitreg.hub.export import (
    check_can_publish,
    check_model_repository,
    publish,
    sort_files,
    write_model_repository,
)


# huggingface_hub sends large files in a way that its HTTP library is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TINY = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": [14, 21], "patch_size": 7}
FILES = [
    "README.md",
    "config.json",
    "configuration_vitreg.py",
    "model.safetensors",
    "modeling_vitreg.py",
    "preprocessor_config.json",
]


def write(folder, fill=None, name="digits", model_class=ViTRegForImageClassification, num_labels=5, **kwargs):
    """A repository of a tiny model; all its weights are `fill`, if given."""
    model = model_class(ViTRegConfig(num_labels=num_labels, **TINY)).eval()
    if fill is not None:
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, fill)
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 14, "width": 21}}
    write_model_repository(folder, model, BitImageProcessor(**size), CardFacts(name=name), **kwargs)
    return model


DUAL_FILES = [
    "README.md",
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def write_dual(folder, fill=None, tokenizer=True, **kwargs):
    """A repository of a tiny dual encoder; all its weights are `fill`, if given."""
    model = dual_encoders.objective().exportable()
    if fill is not None:
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, fill)
    tokenizer = dual_encoders.tokenizer() if tokenizer else None
    facts = CardFacts(name="walls")
    write_model_repository(folder, model, dual_encoders.PROCESSOR, facts, tokenizer=tokenizer, **kwargs)
    return model


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that huggingface_hub speaks to in this process, with the token of `tester`, who belongs to `org`."""
    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        yield hub
        close_session()


# Writing


def test_written_folder_is_complete_and_loads(tmp_path):
    model = write(tmp_path, files={"recipe.yaml": "seed: 1\n", "curves.png": b"\x89PNG"})
    assert names(tmp_path) == sorted([*FILES, "recipe.yaml", "curves.png"])
    check_model_repository(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["ViTRegForImageClassification"]
    assert config["auto_map"] == ViTRegConfig().auto_map
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "image-classification"
    num_parameters = f"| Parameters | {model.num_parameters():,} |"
    assert num_parameters in (tmp_path / "README.md").read_text()

    pixel_values = torch.randn(2, 3, 14, 21)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is ViTRegModel
    assert AutoImageProcessor.from_pretrained(tmp_path).crop_size == {"height": 14, "width": 21}


@pytest.mark.parametrize("name", export.MODEL_CLASSES)
def test_every_published_class_makes_a_whole_repository(name, tmp_path):
    assert set(export.MODEL_CLASSES) == set(PIPELINE_TAGS)
    model_class = export.MODEL_CLASSES[name]
    write(tmp_path, model_class=model_class)
    check_model_repository(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == PIPELINE_TAGS[name]
    assert model_class.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"] == set()


def test_dual_encoder_is_a_whole_repository(tmp_path):
    model = write_dual(tmp_path, files={"recipe.yaml": "seed: 1\n"})
    assert names(tmp_path) == sorted([*DUAL_FILES, "recipe.yaml"])
    check_model_repository(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["VisionTextDualEncoderModel"]
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "zero-shot-image-classification"
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    pairs = dual_encoders.batch()
    torch.testing.assert_close(loaded(**pairs).logits_per_image, model.eval()(**pairs).logits_per_image)
    texts = AutoTokenizer.from_pretrained(tmp_path)(dual_encoders.CAPTIONS[0]).input_ids
    assert texts == [token for token, kept in zip(pairs["input_ids"][0], pairs["attention_mask"][0]) if kept]


def test_dual_encoder_takes_the_place_of_another(tmp_path):
    write_dual(tmp_path, fill=1.0)
    (tmp_path / "tokenizer.json").write_text("{}")
    write_dual(tmp_path, fill=2.0)
    check_model_repository(tmp_path)
    assert names(tmp_path) == DUAL_FILES
    assert set(AutoModel.from_pretrained(tmp_path).text_projection.weight.flatten().tolist()) == {2.0}


def test_card_tells_what_was_saved_not_what_was_loaded_before(folder):
    backbone = AutoModel.from_pretrained(folder)
    assert backbone.config.architectures == ["ViTRegForImageClassification"]
    write_model_repository(folder, backbone, BitImageProcessor(), CardFacts(name="backbone"))
    assert ModelCard.load(folder / "README.md").data.pipeline_tag == "image-feature-extraction"
    check_model_repository(folder)


def test_other_files_stay_and_old_weights_go(tmp_path):
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    others = ["checkpoints/step_1/model.safetensors", "metrics.jsonl", "notes.md"]
    for name in others:
        (tmp_path / name).write_text(name)
    write(tmp_path, fill=1.0, max_shard_size="5KB")
    shards = [name for name in names(tmp_path) if "-of-" in name]
    assert len(shards) > 1 and "model.safetensors" not in names(tmp_path)
    check_model_repository(tmp_path)

    write(tmp_path, fill=2.0)
    assert names(tmp_path) == sorted(FILES + others)
    assert all((tmp_path / name).read_text() == name for name in others)
    write(tmp_path, fill=3.0, max_shard_size="5KB")
    assert set(AutoModel.from_pretrained(tmp_path).embeddings.cls_token.flatten().tolist()) == {3.0}


def test_weights_may_come_from_elsewhere(tmp_path):
    model = ViTRegModel(ViTRegConfig(**TINY))
    gathered = {name: torch.full_like(tensor, 7.0) for name, tensor in model.state_dict().items()}
    write_model_repository(tmp_path, model, BitImageProcessor(), None, state_dict=gathered)
    assert set(AutoModel.from_pretrained(tmp_path).embeddings.cls_token.flatten().tolist()) == {7.0}
    assert "README.md" not in names(tmp_path)


def test_failed_writing_leaves_the_folder_as_it_was(folder):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("no space left")

    before = {name: (folder / name).read_bytes() for name in names(folder)}
    with pytest.raises(OSError, match="no space left"):
        write_model_repository(folder, ViTRegModel(ViTRegConfig(**TINY)), Broken(), None)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    assert not (folder / ".incoming").exists()


@pytest.mark.parametrize(
    ("old", "new", "always_loads"),
    [
        ({}, {}, True),
        ({}, {"num_labels": 3}, False),
        ({}, {"max_shard_size": "5KB"}, False),
        ({"max_shard_size": "5KB"}, {"max_shard_size": "5KB"}, False),
        ({"max_shard_size": "5KB"}, {}, False),
        (None, {}, False),
    ],
    ids=["same config", "other config", "sharded now", "sharded", "sharded before", "nothing before"],
)
def test_killed_at_any_step_the_folder_holds_one_model_or_refuses_to_load(
    old, new, always_loads, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    def count_down(function):
        def counted(*args, **kwargs):
            if steps[0] == 0:
                raise Killed
            steps[0] -= 1
            return function(*args, **kwargs)

        return counted

    seen, steps, killed_after = set(), [-1], 0
    monkeypatch.setattr(export.os, "replace", count_down(os.replace))
    monkeypatch.setattr(Path, "unlink", count_down(Path.unlink))
    while True:
        folder = tmp_path / str(killed_after)
        steps[0] = -1
        if old is not None:
            write(folder, fill=1.0, name="one", **old)
        steps[0] = killed_after
        try:
            write(folder, fill=2.0, name="two", **new)
        except Killed:
            killed_after += 1
        else:
            break
        seen.add(held_by(folder))
    assert killed_after >= 6
    assert held_by(folder) == 2.0 and not (folder / ".incoming").exists()
    assert seen == {1.0, 2.0} if always_loads else {None} <= seen <= {None, 1.0}


def held_by(folder):
    """What the weights are filled with, None where there is no config; fails where two models are mixed."""
    if not (folder / "config.json").exists():
        return None
    model = AutoModelForImageClassification.from_pretrained(folder)
    (value,) = {value for parameter in model.parameters() for value in parameter.flatten().tolist()}
    if (folder / "README.md").exists():
        assert f"# {'one' if value == 1.0 else 'two'}\n" in (folder / "README.md").read_text()
    return value


# Checking


def test_folder_must_exist_and_be_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone does not exist\. Give the folder of a model"):
        check_model_repository(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="file is a file, not a folder"):
        check_model_repository(tmp_path / "file")


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no complete model repository: {re.escape(name)} missing"):
        check_model_repository(folder)


def test_everything_that_is_missing_is_named_at_once(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        check_model_repository(tmp_path)
    assert all(name in str(error.value) for name in FILES)


def test_missing_shard_and_picture_are_named(tmp_path):
    write(tmp_path, max_shard_size="5KB")
    shard = next(tmp_path.glob("*-00002-of-*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(shard.name)):
        check_model_repository(tmp_path)
    write(tmp_path)
    with open(tmp_path / "README.md", "a") as card:
        card.write('![Curves](curves.png) <img width="3" src="maps/a%20b.png"> ![Badge](https://example.org/b.svg)\n')
    with pytest.raises(FileNotFoundError, match=r": curves\.png, maps/a b\.png missing"):
        check_model_repository(tmp_path)


def spoil_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: os.truncate(f / "model.safetensors", 1000), r"\(1,000 bytes\) is truncated or no safetensors file"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"), "truncated or"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"\(0 bytes\) is truncated"),
        (
            lambda f: spoil_weights(f, lambda w: w.update(head=w.pop("classifier.bias"))),
            r"of a ViTRegForImageClassification with.*1 missing \(classifier\.bias\); 1 unknown \(head\)",
        ),
        (
            lambda f: spoil_weights(f, lambda w: w.update({"classifier.bias": torch.zeros(7)})),
            r"1 of another shape \(classifier\.bias\)",
        ),
        (lambda f: spoil_config(f, model_type="dinov2"), "model_type 'dinov2'"),
        (lambda f: spoil_config(f, auto_map={"AutoConfig": "configuration_vitreg.ViTRegConfig"}), "lacks AutoModel, "),
        (lambda f: spoil_config(f, architectures=["Dinov2Model"]), r"must name one of .*, got \['Dinov2Model'\]"),
        (lambda f: spoil_config(f, patch_size="seven"), "patch_size"),
        (lambda f: spoil_config(f, num_register_tokens=-1), "num_register_tokens must be 0 or more"),
        (lambda f: (f / "config.json").write_text('{"model_type": '), r"config\.json is no valid JSON"),
        (lambda f: (f / "preprocessor_config.json").write_text("[]"), "has no 'image_processor_type'"),
        (lambda f: (f / "README.md").write_text("# Model\n"), "license is missing; pipeline_tag is missing"),
        (lambda f: (f / "README.md").write_text("---\nlicense: [\n---\n"), r"README\.md.*cannot be read"),
    ],
)
def test_folder_that_would_not_load_is_refused(spoil, message, folder):
    check_model_repository(folder)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        check_model_repository(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: spoil_weights(f, lambda w: w.pop("text_projection.weight")),
            r"of a VisionTextDualEncoderModel with.*1 missing \(text_projection\.weight\)",
        ),
        (
            lambda f: spoil_config(f, vision_config={"model_type": "vit"}),
            "'vitreg' and 'vision-text-dual-encoder' around",
        ),
        (lambda f: spoil_config(f, architectures=["CLIPModel"]), r"must name one of .*, got \['CLIPModel'\]"),
    ],
    ids=["weights", "another vision tower", "another class"],
)
def test_dual_encoder_that_would_not_load_is_refused(spoil, message, tmp_path):
    write_dual(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_model_repository(tmp_path)


def test_dual_encoder_without_tokenizer_is_not_complete(tmp_path):
    write_dual(tmp_path, tokenizer=False)
    with pytest.raises(FileNotFoundError, match=r": tokenizer\.json, tokenizer_config\.json missing"):
        check_model_repository(tmp_path)
    assert "There is no tokenizer" in (tmp_path / "README.md").read_text()


def test_training_leftovers_are_not_published(folder):
    published = {
        "recipe.yaml": "seed: 1",
        "LICENSE": "Apache-2.0",
        "curves.png": "picture",
        "maps/last layer.png": "picture",
        "parity.json": "{}",
    }
    left_out = {
        ".hidden": "",
        ".cache/token": "",
        "checkpoints/step_10/model.safetensors": "",
        "checkpoints/linked.png": "",
        "maps/first.png": "",
        "maps/old/first.png": "",
        "metrics.jsonl": "",
        "model-00001-of-00002.safetensors": "",
        "optimizer.bin": "",
        "runs/events.out.tfevents": "",
    }
    for name, text in (published | left_out).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder.parent / "secret.txt").touch()
    with open(folder / "README.md", "a") as card:
        card.write(
            "![a](curves.png) <img src='x' src=\"maps/last%20layer.png\"> [how close](parity.json#table) "
            "[b](../secret.txt) [c](/etc/hosts) [d](.hidden) [e](checkpoints/linked.png) [f](gone.txt) [g](#top)"
        )
    assert sort_files(folder) == (
        sorted([*FILES, *published]),
        [
            ".cache/",
            ".hidden",
            "checkpoints/",
            "maps/first.png",
            "maps/old/",
            "metrics.jsonl",
            "model-00001-of-00002.safetensors",
            "optimizer.bin",
            "runs/",
        ],
    )


# Publishing


def asked(hub, method="", fragment=""):
    return [path for verb, path in hub.requests if method in verb and fragment in path]


def test_repository_goes_up_in_one_commit(hub, folder, caplog):
    (folder / "recipe.yaml").write_text("seed: 1\n")
    (folder / "metrics.jsonl").write_text("{}\n")
    with caplog.at_level(logging.INFO, logger="hf_vitreg"):
        url = publish(folder, "org/digits", commit_message="First")
    repo = hub.repos["org/digits"]
    commit, initial = repo.log()
    assert (commit.title, commit.paths) == ("First", sorted([*FILES, "recipe.yaml"]))
    assert (initial.title, repo.private) == ("initial commit", False)
    assert url == f"{hub.endpoint}/org/digits/commit/{commit.oid}"
    files = repo.files()
    assert all(files[name] == (folder / name).read_bytes() for name in commit.paths if name != "README.md")
    card = files["README.md"].decode()
    assert '"org/digits"' in card and "org/name" not in card
    assert '"org/name"' in (folder / "README.md").read_text()
    assert caplog.messages[0] == "Not uploaded: metrics.jsonl"


def test_dual_encoder_goes_up_with_its_tokenizer(hub, tmp_path):
    write_dual(tmp_path / "model")
    (tmp_path / "model" / "metrics.jsonl").write_text("{}\n")
    publish(tmp_path / "model", "org/walls")
    files = hub.repos["org/walls"].files()
    assert sorted(files) == sorted([".gitattributes", *DUAL_FILES])
    assert b'"org/walls"' in files["README.md"] and b"org/name" not in files["README.md"]


def test_name_alone_goes_to_the_own_namespace_and_private_is_private(hub, folder):
    publish(folder, "digits", private=True)
    assert hub.repos["tester/digits"].private
    assert b'"tester/digits"' in hub.repos["tester/digits"].files()["README.md"]
    publish(folder, "tester/digits", private=True)


def test_second_push_is_an_update(hub, folder):
    first = publish(folder, "org/digits")
    repo = hub.repos["org/digits"]
    assert publish(folder, "org/digits") == first, "nothing has changed"
    assert len(repo.log()) == 2

    (folder / "recipe.yaml").write_text("seed: 1\n")
    write(folder, fill=1.0, max_shard_size="5KB")
    publish(folder, "org/digits")
    changed = set(repo.log()[0].paths)
    assert {"model.safetensors", "model.safetensors.index.json", "recipe.yaml"} < changed
    assert "config.json" not in changed and "model.safetensors" not in repo.files()
    write(folder, fill=2.0)
    publish(folder, "org/digits")
    assert sorted(repo.files()) == sorted([".gitattributes", *FILES, "recipe.yaml"])
    assert len(repo.log()) == 4


def test_files_of_others_in_the_repository_stay(hub, folder):
    hub.create(
        "org/digits", files={"notebook.ipynb": b"{}", "adapter_model.safetensors": b"a", "onnx/model.onnx": b"o"}
    )
    publish(folder, "org/digits")
    assert {"notebook.ipynb", "adapter_model.safetensors", "onnx/model.onnx"} < set(hub.repos["org/digits"].files())


def test_branch_is_made_and_main_stays(hub, folder):
    publish(folder, "org/digits", revision="v2")
    repo = hub.repos["org/digits"]
    assert list(repo.files()) == [".gitattributes"]
    assert set(FILES) < set(repo.files("v2"))
    write(folder, fill=1.0)
    publish(folder, "org/digits", revision="v2")
    assert len(repo.log("v2")) == 3 and len(repo.log()) == 1


def test_one_commit_where_xet_is_installed_too(hub, folder, monkeypatch):
    def upload_xet_files(*, additions, repo_id, **_):
        for operation in additions:
            content = Path(operation.path_or_fileobj).read_bytes()
            hub.repos[repo_id].objects[operation.upload_info.sha256.hex()] = content

    monkeypatch.setattr(huggingface_hub._commit_api, "_upload_xet_files", upload_xet_files)
    for module in (huggingface_hub.hf_api, huggingface_hub._commit_api):
        monkeypatch.setattr(module, "is_xet_available", lambda: True)
    publish(folder, "org/digits")
    assert not asked(hub, "PUT") and len(asked(hub, "POST", "/commit/")) == 1
    assert hub.repos["org/digits"].log()[0].paths == FILES


@pytest.mark.parametrize(
    ("fault", "repeated"),
    [
        ({"method": "PUT", "status": 403}, 1),
        ({"method": "POST", "fragment": "/verify", "status": 422}, 1),
        ({"method": "POST", "fragment": "/commit/"}, 0),
        ({"method": "POST", "fragment": "/commit/", "status": 503}, 0),
    ],
    ids=["object refused", "object lost", "commit dropped", "commit failed"],
)
def test_interrupted_push_leaves_nothing_and_can_be_repeated(hub, folder, fault, repeated):
    hub.fail_next(**fault)
    with pytest.raises(OSError, match=r"Nothing is half published\. Run the same again"):
        publish(folder, "org/digits")
    repo = hub.repos["org/digits"]
    assert [commit.title for commit in repo.log()] == ["initial commit"]
    hub.requests.clear()
    publish(folder, "org/digits")
    assert repo.log()[0].paths == FILES and len(repo.log()) == 2
    assert repo.files()["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(asked(hub, "PUT")) == repeated, "what had arrived is not sent again"


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "org/", "/name", "org/na me", "org/-name", "a--b", "x..y", "m.git"])
def test_ill_formed_id_is_refused_before_anything_is_asked(repo_id, hub, folder):
    for refused in (lambda: publish(folder, repo_id), lambda: check_can_publish(repo_id)):
        with pytest.raises(ValueError, match=r"is no repository id\. Give `name` or `org/name`"):
            refused()
    assert not hub.requests


def test_broken_folder_is_refused_before_anything_is_asked(hub, folder):
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(ValueError, match="truncated"):
        publish(folder, "org/digits")
    assert not hub.requests


def test_no_token_is_an_error_before_anything_is_asked(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    for refused in (lambda: publish(folder, "org/digits"), lambda: check_can_publish("org/digits")):
        with pytest.raises(PermissionError, match=r"`hf auth login`.*HF_TOKEN"):
            refused()
    assert not hub.requests


@pytest.mark.parametrize(
    ("repo_id", "token", "message"),
    [
        ("org/digits", "hf_wrong", r"does not accept the token.*write access.*`hf auth login`"),
        ("stranger/digits", None, r"tester may not publish in the namespace 'stranger', only in: tester, org"),
    ],
)
def test_missing_rights_are_explained_before_anything_is_made(repo_id, token, message, hub, folder):
    for refused in (lambda: publish(folder, repo_id, token=token), lambda: check_can_publish(repo_id, token)):
        with pytest.raises(PermissionError, match=message):
            refused()
    assert not hub.repos


def test_rights_are_returned_as_the_full_id(hub):
    assert check_can_publish("digits") == "tester/digits"
    assert check_can_publish("Org/digits") == "org/digits"
    assert not hub.repos


@pytest.mark.parametrize(
    ("account", "message"),
    [
        ({"auth": {"accessToken": {"role": "read"}}}, "token of tester can only read. Make one with write access"),
        ({"orgs": [{"name": "org", "roleInOrg": "read"}]}, "'org', only in: tester"),
        ({"orgs": [{"name": "org", "roleInOrg": "contributor"}]}, None),
        ({"auth": {"accessToken": {"role": "fineGrained"}}}, None),
    ],
)
def test_account_may_write_or_not(account, message, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: {"name": "tester", **account})
    if message is None:
        assert check_can_publish("org/digits") == "org/digits"
    else:
        with pytest.raises(PermissionError, match=message):
            check_can_publish("org/digits")


def test_right_that_only_the_hub_knows_of_is_explained(hub, folder, monkeypatch):
    account = {"name": "tester", "auth": {"accessToken": {"role": "fineGrained"}}}
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", lambda self: account)
    with pytest.raises(PermissionError, match=r"may not write to stranger/digits \(.*rights.*Choose a namespace"):
        publish(folder, "stranger/digits")


def test_public_repository_does_not_become_private_silently(hub, folder):
    hub.create("org/digits")
    with pytest.raises(PermissionError, match=r"org/digits exists and is public.*/org/digits/settings"):
        publish(folder, "org/digits", private=True)
    assert len(hub.repos["org/digits"].log()) == 1


def test_tag_is_no_branch(hub, folder):
    publish(folder, "org/digits")
    hub.repos["org/digits"].add_ref("refs/tags/v1", "main")
    write(folder, fill=1.0)
    with pytest.raises(FileNotFoundError, match="An upload goes to a branch, not to a tag or a commit"):
        publish(folder, "org/digits", revision="refs/tags/v1")


def test_card_that_the_hub_refuses_makes_no_repository(hub, folder):
    hub.fail_next("POST", "/api/validate-yaml", status=400)
    with pytest.raises(ValueError, match="The Hub refuses the metadata of README"):
        publish(folder, "org/digits")
    assert not hub.repos


def test_hub_out_of_reach_is_explained(hub, folder, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    for refused in (lambda: publish(folder, "org/digits"), lambda: check_can_publish("org/digits")):
        with pytest.raises(ConnectionError, match=f"The Hub at {endpoint} cannot be reached.*HF_ENDPOINT"):
            refused()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    with pytest.raises(ConnectionError, match="cannot be published offline: unset HF_HUB_OFFLINE"):
        check_can_publish("org/digits")


def test_failing_hub_is_not_blamed_on_the_user(hub):
    hub.fail_next("GET", "/whoami", status=502)
    with pytest.raises(ConnectionError, match=r"failed with status 502.*Run the same again"):
        check_can_publish("org/digits")
