# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import contextlib
import io
import re

import dual_encoders
import PIL.Image
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import BitImageProcessor, DPTImageProcessor

from hf_vitreg import (
    ViTRegConfig,
    ViTRegForDepthEstimation,
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)
from hf_vitreg.hub import card as card_module
from hf_vitreg.hub.card import MODEL_ID, CardFacts, check_card, load_card, render_card
from hf_vitreg.hub.export import write_model_repository


TINY = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": [14, 21], "patch_size": 7}
LABELS = ["one", "two", "a|b"]
DIGITS = CardFacts(
    name="digits",
    dataset_name="scikit-learn digits",
    dataset_type="imagefolder",
    dataset_split="validation",
    num_train_images=1437,
    num_validation_images=360,
    metrics={"accuracy": 0.97213, "loss": 0.125},
    recipe={"learning_rate": 0.001, "model": {"num_register_tokens": 4}, "betas": (0.9, 0.95)},
    command="accelerate launch finetune.py",
    machine="2 CPU cores",
    seconds=75.2,
    curves="curves.png",
)


def classifier_config(**changes):
    names = dict(enumerate(LABELS))
    settings = {**TINY, "id2label": names, "label2id": {name: index for index, name in names.items()}, **changes}
    return ViTRegConfig(architectures=["ViTRegForImageClassification"], **settings)


def backbone_config(**changes):
    return ViTRegConfig(architectures=["ViTRegModel"], **{**TINY, **changes})


def header(card):
    """The metadata as the Hub reads it: the YAML between the first two lines of dashes."""
    return yaml.safe_load(str(card).split("---\n")[1])


def code_blocks(card):
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def test_metadata_of_a_classifier_is_complete():
    facts = CardFacts(
        name="digits",
        base_model="facebook/dinov2-with-registers-small",
        datasets=("org/digits", "beans"),
        metrics={"accuracy": 0.97213},
    )
    assert header(render_card(classifier_config(), facts, 1)) == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "base_model": "facebook/dinov2-with-registers-small",
        "datasets": ["org/digits", "beans"],
        "metrics": ["accuracy"],
        "tags": ["vitreg", "vision-transformer", "register-tokens"],
        "model-index": [
            {
                "name": "digits",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"type": "org/digits", "name": "org/digits"},
                        "metrics": [{"type": "accuracy", "value": 0.97213}],
                    }
                ],
            }
        ],
    }


def test_metadata_of_a_backbone_without_results_has_no_model_index():
    facts = CardFacts(name="s", license="other", license_name="dinov3", license_link="https://example.org/license")
    assert header(render_card(backbone_config(), facts, 1)) == {
        "license": "other",
        "license_name": "dinov3",
        "license_link": "https://example.org/license",
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["vitreg", "vision-transformer", "register-tokens"],
    }


def test_page_tells_the_model_and_every_fact():
    text = render_card(classifier_config(), DIGITS, 12345).text
    for line in (
        "# digits",
        "A vision transformer with 4 register tokens that sorts images into 3 classes.",
        "| Size | 2 layers of width 12, 3 heads, MLP (`gelu`) of width 48 |",
        "| Parameters | 12,345 |",
        "| Image size | height 14, width 21 pixels |",
        "| Patch size | 7 x 7 pixels: 2 rows and 3 columns of patches |",
        r"| Classes | 3: `one`, `two`, `a\|b` |",
        "It was trained on scikit-learn digits, 1,437 images.",
        "Training took 1 min 15 s on 2 CPU cores.",
        "```sh\naccelerate launch finetune.py\n```",
        "![Loss and metrics over the run](curves.png)",
        "Measured on the split `validation` of scikit-learn digits, 360 images, by the command above, on 2 CPU cores:",
        "| Metric | Value |\n| --- | ---: |\n| accuracy | 0.9721 |\n| loss | 0.125 |\n",
        "```yaml\nlearning_rate: 0.001\nmodel:\n  num_register_tokens: 4\nbetas:\n- 0.9\n- 0.95\n```",
    ):
        assert f"{line}\n" in text
    assert "\n\n\n" not in text
    assert not re.search(r"\{\{|\{%|None|Undefined", text)


def test_page_says_nothing_that_was_not_given():
    text = render_card(backbone_config(), CardFacts(name="small"), 12345).text
    assert re.findall("^## .*", text, re.MULTILINE) == ["## The model", "## How to use it", "## Citation"]
    outside_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    numbers = set(re.findall(r"\d+(?:[.,]\d+)*", outside_code))
    of_the_model = {"4", "2", "3", "7", "12", "48", "14", "21", "12,345"}
    assert numbers - of_the_model == {"2024", "2309.16588"}, "the paper's"


@pytest.mark.parametrize(
    ("num_register_tokens", "phrases"),
    [
        (0, ("without register tokens", "CLS and the patches row by row", 'queries="cls"')),
        (1, ("with 1 register token that", "CLS, 1 register, and", 'queries="registers"')),
        (8, ("with 8 register tokens that", "CLS, 8 registers, and", "register_tokens  # (1, 8, 12)")),
    ],
)
def test_page_speaks_of_as_many_registers_as_there_are(num_register_tokens, phrases):
    text = render_card(backbone_config(num_register_tokens=num_register_tokens), CardFacts(name="small"), 1).text
    assert all(phrase in text for phrase in phrases)
    assert ("outputs.register_tokens" in text) == (num_register_tokens > 0)
    tags = header(render_card(backbone_config(num_register_tokens=num_register_tokens), CardFacts(name="small"), 1))
    assert ("register-tokens" in tags["tags"]) == (num_register_tokens > 0)


WITHOUT_CLS = {
    "use_cls_token": False,
    "position_embedding_type": "patches",
    "pooler_type": "map",
    "classifier_layout": "pooled",
}


@pytest.mark.parametrize(
    ("changes", "phrases"),
    [
        ({}, ("in this order, CLS, 4 registers, and the patches", "| CLS and the mean of the patches |")),
        ({"position_embedding_type": "rope", "num_attention_heads": 1}, ("relative to the image (RoPE)",)),
        (
            {"use_distillation_token": True, "classifier_layout": "cls_distillation"},
            ("CLS, the distillation token, 4 registers, and", "| CLS and the distillation token, each"),
        ),
        (
            {**WITHOUT_CLS, "num_register_tokens": 0},
            ("in this order, the patches row by row", 'queries="all"', "as a learned query attends"),
        ),
        ({**WITHOUT_CLS, "pooler_type": "mean"}, ("4 registers and the patches", "which is the mean of the patches")),
        ({"classifier_layout": "last4_cls", "num_hidden_layers": 4}, ("| CLS of the last four layers |",)),
    ],
    ids=["default", "rope", "distillation", "no CLS", "mean", "last4_cls"],
)
def test_page_describes_every_kind_of_model(changes, phrases):
    text = render_card(classifier_config(**changes), CardFacts(name="small"), 1).text
    assert all(phrase in text for phrase in phrases), text


def test_what_the_model_starts_from_is_cited():
    def cited(base_model):
        return re.findall(
            r"@\w+\{(\w+)", render_card(backbone_config(), CardFacts(name="s", base_model=base_model), 1).text
        )

    assert cited("facebook/dinov2-base") == ["darcet2024registers", "oquab2024dinov2"]
    assert cited("timm/vit_small_patch16_224") == ["darcet2024registers"]


def test_local_path_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "dinov2").mkdir(parents=True)
    for path in ("runs/dinov2", str(tmp_path / "gone"), "./runs", "runs/dinov2/checkpoints/step_10"):
        card = render_card(backbone_config(), CardFacts(name="s", base_model=path, datasets=(path,)), 1)
        assert not {"base_model", "datasets"} & set(header(card))
        assert path not in str(card) and "oquab" not in str(card)


def test_metric_that_diverged_is_shown_but_no_result():
    card = render_card(classifier_config(), CardFacts(name="s", datasets=("d",), metrics={"loss": float("nan")}), 1)
    assert "| loss | nan |" in card.text
    assert not {"model-index", "metrics"} & set(header(card))


def test_metrics_may_be_scalars_of_any_library():
    metrics = CardFacts(name="s", datasets=("d",), metrics={"accuracy": torch.tensor(0.5), "loss": 1}).metrics
    assert metrics == {"accuracy": 0.5, "loss": 1.0} and all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"license": "other"}, "license_name and license_link"),
        ({"metrics": {"accuracy": 0.5}}, "give dataset_name or datasets"),
        ({"metrics": {"accuracy": "high"}, "dataset_name": "d"}, "names to numbers, got {'accuracy': 'high'}"),
    ],
)
def test_facts_that_no_card_can_hold_are_refused(facts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        CardFacts(name="s", **facts)


@pytest.mark.parametrize("architectures", [None, ["Dinov2Model"]])
def test_config_must_say_what_was_saved(architectures):
    with pytest.raises(
        ValueError, match=r"must name one of ViTRegForImageClassification, .*ViTRegModel, ViTRegBackbone"
    ):
        render_card(ViTRegConfig(architectures=architectures, **TINY), CardFacts(name="s"), 1)


VALID = {"license": "mit", "library_name": "transformers", "pipeline_tag": "image-classification"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"license": None}, "license is missing"),
        ({"pipeline_tag": None}, "pipeline_tag is missing"),
        ({"library_name": "timm"}, "library_name must be transformers, got timm"),
        ({"license": "other"}, "needs license_name and license_link"),
        ({"base_model": "/data/model"}, "base_model must be ids on the Hub, like org/name, got /data/model"),
        ({"base_model": 3}, "base_model must be ids on the Hub, like org/name, got 3"),
        ({"datasets": ["beans", "my photos"]}, "datasets must be ids on the Hub, like org/name, got my photos"),
        (
            {
                "model-index": [
                    {
                        "name": "s",
                        "results": [
                            {
                                "task": {"type": "t"},
                                "dataset": {"type": "d", "name": "d"},
                                "metrics": [{"type": "loss", "value": float("inf")}],
                            }
                        ],
                    }
                ]
            },
            "model-index: loss is inf",
        ),
    ],
)
def test_card_that_the_hub_would_refuse_is_named(change, message):
    metadata = {name: value for name, value in {**VALID, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        check_card(ModelCard(f"---\n{yaml.safe_dump(metadata)}---\n# Model\n"))
    check_card(ModelCard(f"---\n{yaml.safe_dump(VALID)}---\n# Model\n"))


@pytest.mark.parametrize(
    "text", ["---\nlicense: [\n---\n", "---\n- a\n- b\n---\n", "---\nmodel-index: 3\n---\n", "---\n1: 2\n---\n"]
)
def test_header_that_cannot_be_read_is_an_error(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"The metadata of .*README\.md"):
        load_card(tmp_path / "README.md")


def test_template_of_an_installed_package_lies_beside_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(card_module, "__file__", str(tmp_path / "card.py"))
    (tmp_path / "template.md").write_text("---\n{{ card_data }}\n---\n# {{ facts.name }}, installed\n")
    assert "# small, installed" in render_card(backbone_config(), CardFacts(name="small"), 1).text


@pytest.mark.parametrize(
    ("model_class", "changes"),
    [
        (ViTRegForImageClassification, {}),
        (ViTRegModel, {}),
        (ViTRegModel, {"num_register_tokens": 0}),
        (ViTRegForImageClassification, {"num_channels": 1}),
        (ViTRegModel, {**WITHOUT_CLS, "num_register_tokens": 0}),
        (ViTRegForSemanticSegmentation, {}),
        (ViTRegForDepthEstimation, {"out_indices": [0, 2]}),
        (ViTRegForSemanticSegmentation, {**WITHOUT_CLS, "pooler_type": "map"}),
    ],
    ids=["classifier", "backbone", "no registers", "gray", "no CLS", "segmentation", "depth", "segmentation, no CLS"],
)
def test_code_of_the_card_runs_as_written(model_class, changes, tmp_path):
    has_head = model_class is not ViTRegModel
    config = classifier_config(**changes) if has_head else backbone_config(**changes)
    gray = {"image_mean": [0.5], "image_std": [0.25], "do_convert_rgb": False} if "num_channels" in changes else {}
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 14, "width": 21}}
    processor = BitImageProcessor(**size, **gray)
    if model_class in (ViTRegForSemanticSegmentation, ViTRegForDepthEstimation):
        processor = DPTImageProcessor(size={"height": 14, "width": 21})
    write_model_repository(tmp_path, model_class(config), processor, CardFacts(name="s"))

    blocks = code_blocks(load_card(tmp_path / "README.md"))
    assert len(blocks) == 2 + has_head + (config.num_channels == 3), "pipelines know RGB alone"
    for block in blocks:
        assert f'"{MODEL_ID}"' in block
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(block.replace(MODEL_ID, str(tmp_path)).replace("depth.png", str(tmp_path / "depth.png")), names := {})
        if "maps" in names:
            num_registers = config.num_register_tokens
            num_queries = num_registers or (1 if config.use_cls_token else 6)
            assert names["maps"].shape == (1, 3, num_queries, 2, 3)
            if config.pooler_type != "map":
                assert names["image_features"].shape == (1, 12)
            assert names["patch_tokens"].shape == (1, 6, 12)
            assert names.get("register_tokens") is None or names["register_tokens"].shape == (1, num_registers, 12)
        elif "logits" in names:
            assert printed.getvalue().strip() in LABELS
        elif "classify" in names:
            assert all(label in printed.getvalue() for label in LABELS)
        elif "classes" in names or "depth" in names:
            assert names.get("classes", names.get("depth")).shape == (480, 640)
        elif "segment" in names:
            assert any(label in printed.getvalue() for label in LABELS)
        elif "estimate" in names:
            with PIL.Image.open(tmp_path / "depth.png") as depth:
                assert depth.size == (640, 480)
        elif "extract" in names:
            assert names["features"].shape == (1, 12)
        else:
            assert type(names["model"]) is model_class


@pytest.mark.parametrize("contrastive_loss", ["clip", "siglip"])
def test_card_of_a_dual_encoder_tells_both_towers_and_its_code_runs(contrastive_loss, tmp_path, capsys):
    # pipelines cut no text, and this one's has 26 tokens
    length = {"text_max_length": 41}
    model = dual_encoders.objective(contrastive_loss=contrastive_loss, **length).exportable()
    facts = CardFacts(
        name="walls",
        dataset_name="painted walls",
        dataset_type="imagefolder",
        metrics={"zero_shot_accuracy": 0.875},
        command="accelerate launch pretrain.py",
        recipe={"contrastive_loss": contrastive_loss},
    )
    write_model_repository(
        tmp_path, model, dual_encoders.PROCESSOR, facts, tokenizer=dual_encoders.tokenizer(**length)
    )
    card = load_card(tmp_path / "README.md")
    for part in (
        "| Vision tower | `ViTRegModel`: 2 layers of width 24, 3 heads,",
        "| Text tower | `clip_text_model`: 2 layers of width 20, 2 heads, MLP (`gelu`) of width 80 |",
        "| Common space | 29 dimensions |",
        "| Texts | up to 41 tokens out of 293 |",
        "| Register tokens | 3 |",
        f"| Parameters | {model.num_parameters():,} |",
        "It was trained on painted walls",
        "| zero_shot_accuracy | 0.875 |",
        "accelerate launch pretrain.py",
        f"contrastive_loss: {contrastive_loss}",
    ):
        assert part in card.text
    assert "trust_remote_code" not in card.text
    assert card.data.tags == ["vitreg", "vision-transformer", "clip", "register-tokens"]
    assert header(card)["model-index"][0]["results"][0]["task"]["type"] == "zero-shot-image-classification"
    cited = re.findall(r"@\w+\{(\w+)", card.text)
    assert cited[:3] == ["darcet2024registers", "radford2021clip", "cherti2023openclip"]
    assert ("zhai2023siglip" in cited) == (contrastive_loss == "siglip")
    names = {}
    for block in code_blocks(card):
        exec(block.replace(MODEL_ID, str(tmp_path)), names)
    assert names["image_embeds"].shape == (1, 29) and names["text_embeds"].shape == (2, 29)
    assert names["patch_tokens"].shape == (1, 6, 24)
    assert "'label': 'a cat'" in capsys.readouterr().out
    if contrastive_loss == "siglip":
        expected = names["logits"] - model.config.logit_bias
        images, texts = (torch.nn.functional.normalize(names[name]) for name in ("image_embeds", "text_embeds"))
        torch.testing.assert_close(expected, 10 * images @ texts.T)
