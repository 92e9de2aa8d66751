# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import pytest
import yaml
from huggingface_hub import ModelCard

from hf_vitreg.hub.card_results import add_results, require_card


HEADER = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
model-index:
- name: tiny
  results:
  - task:
      type: image-classification
    dataset:
      name: birds
      type: birds
      split: validation
    metrics:
    - type: accuracy
      value: 0.25
      name: accuracy
    source:
      name: A paper
      url: https://example.org/paper
---
"""
TEXT = "\n# tiny\n\n| a | b |\r\n"


def card(folder, content=HEADER + TEXT):
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_bytes(content.encode())
    return folder


def results(task="knn", name="birds", split="validation", **metrics):
    return {"task": task, "data": {"name": name, "split": split}, "metrics": metrics or {"accuracy": 0.5}}


def index_of(folder):
    content = (folder / "README.md").read_text(encoding="utf-8")
    return yaml.safe_load(content.split("---\n")[1])["model-index"]


def test_results_are_an_entry_beside_those_that_are_there(tmp_path):
    before = index_of(card(tmp_path))
    add_results(tmp_path, results(accuracy=0.5, top1_k10=1 / 3))
    index = index_of(tmp_path)
    assert len(index) == 1 and index[0]["results"][0] == before[0]["results"][0]
    assert index[0]["results"][1:] == [
        {
            "task": {"type": "image-classification", "name": "knn"},
            "dataset": {"name": "birds", "type": "birds", "split": "validation"},
            "metrics": [
                {"type": "accuracy", "value": 0.5, "name": "knn: accuracy"},
                {"type": "top1_k10", "value": 0.333333, "name": "knn: top1 k10"},
            ],
        }
    ]


def test_the_rest_of_the_card_stays_as_it_is(tmp_path):
    card(tmp_path)
    add_results(tmp_path, results())
    content = (tmp_path / "README.md").read_bytes().decode()
    assert content.endswith("---\n" + TEXT) and content.startswith("---\nlicense: apache-2.0\n")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_results_take_the_place_of_those_of_their_task_and_data_alone(tmp_path):
    card(tmp_path)
    add_results(tmp_path, results(accuracy=0.5, top1_k20=0.5))
    others = [
        results("linear", accuracy=0.6),
        results(name="fish"),
        results(split="test"),
        results("object_discovery", split=None, corloc=0.7),
    ]
    for other in others:
        add_results(tmp_path, other)
    before = index_of(tmp_path)[0]["results"]
    assert len(before) == 6
    for other in (results(accuracy=0.5, top1_k20=0.5), *others):
        add_results(tmp_path, other)
    assert index_of(tmp_path)[0]["results"] == before
    add_results(tmp_path, results(accuracy=0.9))
    after = index_of(tmp_path)[0]["results"]
    assert after[:-1] == [before[0], *before[2:]]
    assert [metric["value"] for metric in after[-1]["metrics"]] == [0.9]


def test_results_are_told_apart_where_the_hub_library_has_put_them_together(tmp_path):
    card(tmp_path, HEADER.partition("    source:")[0] + "---\n")
    for task in ("knn", "linear"):
        add_results(tmp_path, results(task))
    ModelCard.load(tmp_path / "README.md").save(tmp_path / "README.md")
    assert len(index_of(tmp_path)[0]["results"]) == 1
    add_results(tmp_path, results("linear", accuracy=0.75))
    metrics = [metric for entry in index_of(tmp_path)[0]["results"] for metric in entry["metrics"]]
    values = {metric["name"]: metric["value"] for metric in metrics}
    assert values == {"accuracy": 0.25, "knn: accuracy": 0.5, "linear: accuracy": 0.75}


def test_a_card_without_results_gets_them_under_the_name_of_its_folder(tmp_path):
    folder = card(tmp_path / "vitreg-tiny", HEADER.partition("model-index")[0] + "---\n")
    add_results(folder, results("depth", rmse=0.5))
    index = index_of(folder)
    assert index[0]["name"] == "vitreg-tiny" and index[0]["results"][0]["task"]["type"] == "depth-estimation"
    assert ModelCard.load(folder / "README.md").data.eval_results[0].metric_value == 0.5


def test_what_is_no_card_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no card timm:vit/README\.md to put results into"):
        require_card("timm:vit")
    with pytest.raises(ValueError, match=r"metadata of .*README\.md .* cannot be read"):
        require_card(card(tmp_path, "---\nlicense: [\n---\n"))
    with pytest.raises(ValueError, match="license is missing"):
        require_card(card(tmp_path, "# no header\n"))


def test_a_card_that_could_not_be_published_stays_as_it_was(tmp_path):
    before = (card(tmp_path) / "README.md").read_bytes()
    with pytest.raises(ValueError, match="accuracy is nan"):
        add_results(tmp_path, results(accuracy=float("nan")))
    assert (tmp_path / "README.md").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
