# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""From a folder to the Hub and back, in processes of their own: with this package, and where it is absent."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, run_client
from test_hub_export import FILES, write

from hf_vitreg import ViTRegModel


# One process pushes, and repeats what failed: the first commit to org/classifier does not arrive.
PUSH = """
from pathlib import Path
from hf_vitreg.cli import app

def push(*arguments):
    try:
        app(["push", *arguments])
    except SystemExit as stopped:
        print(f"exit {stopped.code}")

root = Path(ROOT)
push(str(root / "classifier"), "org/classifier")
push(str(root / "classifier"), "org/classifier")
push(str(root / "update"), "org/classifier", "--message", "Better")
push(str(root / "update"), "org/classifier", "--revision", "v2")
push(str(root / "backbone"), "backbone", "--private")
push(str(root / "gone"), "org/gone")
"""

# In the way of any copy that is installed
ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_vitreg":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
trust = dict(trust_remote_code=True)
"""
PRESENT = """
import hf_vitreg
trust = {}
"""

PULL = """
import contextlib, io, json, sys
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
)

facts = {}
pixel_values = torch.linspace(-2, 2, 2 * 3 * 14 * 21).reshape(2, 3, 14, 21)
image = Image.new("RGB", (64, 48), "teal")

@torch.no_grad()
def logits(**kwargs):
    model = AutoModelForImageClassification.from_pretrained("org/classifier", **trust, **kwargs)
    return model(pixel_values).logits.tolist()

with contextlib.redirect_stdout(io.StringIO()):
    facts["main"] = logits()
    facts["first"] = logits(revision=FIRST)
    facts["v2"] = logits(revision="v2")
    facts["registers"] = AutoConfig.from_pretrained("org/classifier", **trust).num_register_tokens
    facts["crop"] = dict(AutoImageProcessor.from_pretrained("org/classifier").crop_size)
    model = AutoModel.from_pretrained("tester/backbone", **trust)
    with torch.no_grad():
        facts["patches"] = model(pixel_values).patch_tokens.tolist()
        facts["maps"] = AutoBackbone.from_pretrained("tester/backbone", **trust)(pixel_values).feature_maps[0].tolist()
    facts["class"] = type(model).__module__.partition(".")[0]
    facts["config"] = type(model.config) is model.config_class
    classify = pipeline("image-classification", model="org/classifier", **trust)
    facts["labels"] = sorted(result["label"] for result in classify(image))
    extract = pipeline("image-feature-extraction", model="tester/backbone", **trust, pool=True)
    facts["features"] = list(extract(image, return_tensors=True).shape)
    for refused in (dict(trust_remote_code=False), dict(token=False)):
        repo = "tester/backbone" if "token" in refused else "org/classifier"
        try:
            AutoModel.from_pretrained(repo, **{**trust, **refused})
        except (OSError, ValueError) as error:
            facts.setdefault("refused", []).append(type(error).__name__)
"""

# The code of the published card, as it stands there
READ_CARD = """
import re
with contextlib.redirect_stdout(io.StringIO()):
    for repo in ("org/classifier", "tester/backbone"):
        for block in re.findall(r"```python\\n(.*?)```", ModelCard.load(repo).text, re.DOTALL):
            if "import hf_vitreg" not in block:
                exec(block, {})
                facts["blocks"] = facts.get("blocks", 0) + 1
facts["imported"] = "hf_vitreg" in sys.modules
"""
TELL = "print(json.dumps(facts))"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The Hub after six pushes, the models that were pushed, and what the pushing process did."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    models = {
        "classifier": write(root / "classifier", files={"recipe.yaml": "seed: 1\n"}),
        "update": write(root / "update", files={"recipe.yaml": "seed: 2\n"}),
        "backbone": write(root / "backbone", model_class=ViTRegModel, max_shard_size="5KB"),
    }
    (root / "classifier" / "checkpoints").mkdir()
    with LoopbackHub() as hub:
        hub.fail_next("POST", "/api/models/org/classifier/commit/")
        done = run_client(hub, PUSH.replace("ROOT", repr(str(root))), root / "home")
        yield hub, models, done


@pytest.fixture(scope="module", params=["absent", "present"])
def pulled(request, pushed, tmp_path_factory):
    """What a process loads from the Hub, where the package is absent, and where it is imported."""
    hub, _, _ = pushed
    first = hub.repos["org/classifier"].log()[1].oid
    prologue, epilogue = (ABSENT, READ_CARD) if request.param == "absent" else (PRESENT, "")
    code = prologue + PULL.replace("FIRST", repr(first)) + epilogue + TELL
    facts = json.loads(run_client(hub, code, tmp_path_factory.mktemp(request.param)).stdout.splitlines()[-1])
    return request.param == "absent", facts


def test_push_reports_each_end(pushed):
    hub, _, done = pushed
    outcomes = re.findall(r"exit (\d)|(http\S+)", done.stdout)
    commits = [f"{hub.endpoint}/{name}/commit/" for name in ("org/classifier", "org/classifier", "org/classifier")]
    codes = [code for code, _ in outcomes if code]
    urls = [url for _, url in outcomes if url]
    assert codes == ["1", "0", "0", "0", "0", "1"]
    assert all(url.startswith(start) for url, start in zip(urls, [*commits, f"{hub.endpoint}/tester/backbone/"]))
    first, last = (line for line in done.stderr.splitlines() if line.startswith("Error: "))
    assert "cannot be reached" in first and "Run the same again" in first
    assert "gone does not exist" in last
    assert "no part of a model repository: checkpoints/" in done.stderr
    assert "Traceback" not in done.stderr


def test_repositories_hold_one_commit_a_push(pushed):
    hub, _, _ = pushed
    classifier, backbone = hub.repos["org/classifier"], hub.repos["tester/backbone"]
    assert set(hub.repos) == {"org/classifier", "tester/backbone"}
    assert [commit.title for commit in classifier.log()] == ["Better", "Upload the model", "initial commit"]
    assert classifier.log()[1].paths == sorted([*FILES, "recipe.yaml"])
    assert classifier.log()[0].paths == ["model.safetensors", "recipe.yaml"], "what has changed"
    assert classifier.log("v2")[0].files == classifier.log()[0].files, "the branch started from main"
    assert (classifier.private, backbone.private) == (False, True)
    assert len(backbone.log()) == 2 and "model.safetensors.index.json" in backbone.files()


def test_hub_reads_the_card(pushed):
    hub, _, _ = pushed
    for name, tag in (("org/classifier", "image-classification"), ("tester/backbone", "image-feature-extraction")):
        data = ModelCard(hub.repos[name].files()["README.md"].decode()).data
        assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", tag, "apache-2.0")


def test_models_come_back_as_they_went(pushed, pulled):
    _, models, _ = pushed
    is_absent, facts = pulled
    pixel_values = torch.linspace(-2, 2, 2 * 3 * 14 * 21).reshape(2, 3, 14, 21)
    with torch.no_grad():
        expected = {
            "main": models["update"](pixel_values).logits,
            "v2": models["update"](pixel_values).logits,
            "first": models["classifier"](pixel_values).logits,
            "patches": models["backbone"](pixel_values).patch_tokens,
        }
    assert not torch.allclose(expected["main"], expected["first"])
    expected["maps"] = expected["patches"].unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(facts[name]), value)
    assert facts["registers"] == 4
    assert facts["crop"] == {"height": 14, "width": 21}
    assert facts["labels"] == [f"LABEL_{index}" for index in range(5)]
    assert facts["features"] == [1, 12]
    assert facts["config"], "model and config are one module's"
    assert facts["class"] == ("transformers_modules" if is_absent else "hf_vitreg")
    assert facts["refused"] == (["ValueError", "OSError"] if is_absent else ["OSError"]), "no trust; no token"


def test_published_card_runs_where_the_package_is_absent(pulled):
    is_absent, facts = pulled
    if is_absent:
        assert facts["blocks"] == 5
        assert not facts["imported"]
