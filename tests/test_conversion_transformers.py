# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Models that transformers' own classes saved, in both spellings of their names."""

import json
import shutil

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, run_client
from original_outputs import assert_close, load
from reference import randomize, relative_error
from safetensors.torch import load_file, save_file
from test_conversion_checkpoints import PUBLISHED_COUNTS
from test_convert import MEASURED, ROOT, SCRIPT, run_script
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessor,
    CLIPConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTImageProcessor,
)
from typer.testing import CliRunner

from conversion import parity, transformers_hub, transformers_models
from conversion.convert import app
from conversion.family import ConversionError
from conversion.renaming import rename
from conversion.transformers_hub import Source
from conversion.transformers_reference import dinov3_rules
from hf_vitreg import ViTRegForImageClassification


LABELS = ["egret", "heron", "ibis", "stork", "crane", "rail", "coot"]
# distinct, so that no axis can stand for another: 24 wide, 5x5 patches of 4 pixels, 2 heads, 3 layers, 40 in the MLP
TINY = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 20,
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: index for index, label in enumerate(LABELS)},
}
MLP = {**TINY, "intermediate_size": 40}
RATIO = {**TINY, "mlp_ratio": 2}
QUICK = {**MLP, "hidden_act": "quick_gelu"}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 50,
    "projection_dim": 13,
}
NOT_SQUARE = {**MLP, "image_size": [12, 28]}
KINDS = {
    "vit": ("ViTModel", ViTConfig(**MLP)),
    "vit_classifier": ("ViTForImageClassification", ViTConfig(**MLP, qkv_bias=False, hidden_act="gelu_new")),
    "vit_masked": ("ViTForMaskedImageModeling", ViTConfig(**MLP, encoder_stride=4)),
    "vit_not_square": ("ViTForImageClassification", ViTConfig(**NOT_SQUARE)),
    "deit": ("DeiTModel", DeiTConfig(**MLP)),
    "deit_classifier": ("DeiTForImageClassification", DeiTConfig(**MLP)),
    "deit_two_classifiers": ("DeiTForImageClassificationWithTeacher", DeiTConfig(**MLP)),
    "dinov2": ("Dinov2Model", Dinov2Config(**RATIO)),
    "dinov2_classifier": ("Dinov2ForImageClassification", Dinov2Config(**RATIO, use_swiglu_ffn=True)),
    "dinov2_without_mask_token": ("Dinov2Backbone", Dinov2Config(**RATIO, use_mask_token=False, out_indices=[1, 3])),
    "registers": ("Dinov2WithRegistersModel", Dinov2WithRegistersConfig(**RATIO, qkv_bias=False)),
    "registers_classifier": (
        "Dinov2WithRegistersForImageClassification",
        Dinov2WithRegistersConfig(**RATIO, num_register_tokens=6, use_swiglu_ffn=True, drop_path_rate=0.2),
    ),
    "dinov3": ("DINOv3ViTModel", DINOv3ViTConfig(**MLP, num_register_tokens=6, pos_embed_jitter=1.5)),
    "dinov3_gated": (
        "DINOv3ViTModel",
        DINOv3ViTConfig(**MLP, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False),
    ),
    "dinov3_key_bias": (
        "DINOv3ViTBackbone",
        # heads of 20 channels
        DINOv3ViTConfig(**{**NOT_SQUARE, "hidden_size": 40}, key_bias=True, proj_bias=False, mlp_bias=False),
    ),
    "clip_vision": ("CLIPVisionModel", CLIPVisionConfig(**QUICK)),
    "clip_projection": ("CLIPVisionModelWithProjection", CLIPVisionConfig(**QUICK, projection_dim=13)),
    "clip": ("CLIPModel", CLIPConfig(vision_config=QUICK, text_config=TEXT, projection_dim=13)),
    "clip_classifier": (
        "CLIPForImageClassification",
        CLIPConfig(vision_config=QUICK, text_config=TEXT, **{name: TINY[name] for name in ("id2label", "label2id")}),
    ),
}


def tiny_model(kind, **changes):
    name, config = KINDS[kind]
    config = config if not changes else type(config).from_dict({**config.to_dict(), **changes})
    return randomize(getattr(transformers, name)(config))


def save(folder, kind, original_names=True, **changes):
    model = tiny_model(kind, **changes)
    model.save_pretrained(folder, save_original_format=original_names)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of every kind, with the names that files have, and only read."""
    root = tmp_path_factory.mktemp("folders")
    for kind in KINDS:
        save(root / kind, kind)
    return root


def ours(prepared):
    return prepared.implementation or parity.vitreg_outputs(prepared.model)


def theirs(model, pixel_values):
    """What transformers computes, without a way through any file."""
    base_model = getattr(model, "vision_model", model if model.base_model_prefix == "model" else model.base_model)
    is_interpolating = not hasattr(model.config, "image_size") or model.config.image_size == 20
    asked = {"interpolate_pos_encoding": is_interpolating} if model.config.model_type in ("vit", "deit") else {}
    asked = {"interpolate_pos_encoding": True} if "clip" in model.config.model_type else asked
    if "Backbone" in type(model).__name__:
        tokens = model(pixel_values, output_hidden_states=True).hidden_states[-1]
        return {"tokens": (model.norm if hasattr(model, "norm") else model.layernorm)(tokens)}
    outputs = {"tokens": base_model(pixel_values, **asked).last_hidden_state}
    is_classifier = "Classification" in type(model).__name__
    if "clip" in model.config.model_type and not is_classifier:
        outputs["tokens"] = base_model.post_layernorm(outputs["tokens"])
        if hasattr(model, "visual_projection"):
            outputs["image_embeds"] = model.visual_projection(outputs["tokens"][:, 0])
    if is_classifier:
        outputs["logits"] = model(pixel_values, **asked).logits
    return outputs


@pytest.mark.parametrize("original_names", [True, False], ids=["file", "memory"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_outputs_are_those_of_transformers_in_both_spellings(tmp_path, kind, original_names):
    model = save(tmp_path, kind, original_names)
    prepared = transformers_models.prepare(str(tmp_path))
    sizes = {(12, 28)} if kind == "vit_not_square" else {(20, 20), (12, 28)}
    for size in sizes:
        pixel_values = torch.randn(2, 3, *size)
        expected = theirs(model, pixel_values)
        for outputs in (ours(prepared)(pixel_values), prepared.reference(pixel_values)):
            assert outputs.keys() == expected.keys()
            for name in expected:
                assert relative_error(outputs[name], expected[name]) < 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_views_of_the_file_and_the_same_in_both_models(folders, kind):
    prepared = transformers_models.prepare(str(folders / kind))
    state = prepared.model.state_dict()
    own = [name for name in state if "periods" not in name]
    shared = {tensor.data_ptr() for tensor in prepared.reference.model.state_dict().values()}
    # of DeiT and ViT transformers' models without a head have no mask token
    apart = [name for name in own if state[name].data_ptr() not in shared]
    assert apart == (["embeddings.mask_token"] if kind == "vit_masked" else [])
    # or save_pretrained would copy them, and need the memory for it
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)
    assert not any(tensor.is_meta for tensor in state.values()) and not prepared.model.training


def test_the_config_is_carried_over(folders):
    config = transformers_models.prepare(str(folders / "registers_classifier")).model.config
    assert config.id2label == dict(enumerate(LABELS)) and config.label2id["coot"] == 6
    assert (config.num_register_tokens, config.drop_path_rate, config.use_swiglu_ffn) == (6, 0.2, True)
    assert (config.interpolate_antialias, config.interpolate_offset) == (True, 0.0)
    assert config.classifier_layout == "cls_mean" and config.use_mask_token
    config = transformers_models.prepare(str(folders / "dinov2_without_mask_token")).model.config
    assert config.out_indices == [1, 3] and not config.use_mask_token
    assert (config.interpolate_antialias, config.interpolate_offset) == (False, 0.0)
    config = transformers_models.prepare(str(folders / "dinov3")).model.config
    assert (config.pos_embed_jitter, config.pos_embed_rescale, config.rope_theta) == (1.5, 2.0, 100.0)
    assert (config.layer_norm_eps, config.qkv_bias, config.key_bias) == (1e-5, True, False)
    config = transformers_models.prepare(str(folders / "deit_two_classifiers")).model.config
    assert (config.classifier_layout, config.layer_norm_eps) == ("cls_distillation", 1e-12)
    config = transformers_models.prepare(str(folders / "vit_not_square")).model.config
    assert tuple(config.image_size) == (12, 28) and config.grid_size == (3, 7)
    assert transformers_models.prepare(str(folders / "vit_not_square")).sizes == [(12, 28)]


def test_periods_are_the_inverse_of_what_transformers_computes(folders):
    for kind in ("dinov3", "dinov3_key_bias"):
        prepared = transformers_models.prepare(str(folders / kind))
        frequencies = 1 / prepared.model.encoder.rotary_embeddings.periods
        assert torch.equal(frequencies, prepared.reference.model.rope_embeddings.inv_freq)


LEFT_ASIDE = {
    "vit": ["pooler (2 entries)"],
    "deit": ["pooler (2 entries)"],
    "vit_masked": ["decoder (2 entries)"],
    "clip": ["logit_scale", "text_model (20 entries)", "text_projection"],
    "clip_classifier": ["vision_model.post_layernorm (2 entries)"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_vitreg_has_is_named(folders, kind):
    assert sorted(transformers_models.prepare(str(folders / kind)).left_aside) == LEFT_ASIDE.get(kind, [])


def test_remarks_say_where_transformers_is_not_the_original_and_what_was_not_compared(folders):
    def remarks(kind, **options):
        return " ".join(transformers_models.prepare(str(folders / kind), **options).remarks)

    assert "other outputs at every size but 20x20" in remarks("dinov2")
    assert "compared at 20x20 pixels only" in remarks("dinov2", interpolate_offset=0.1)
    assert "compared at 12x28 pixels only" in remarks("vit_not_square")
    assert "vision tower alone" in remarks("clip")
    assert "periods" in remarks("dinov3") and "`convert.py dinov3`" in remarks("dinov3")
    assert remarks("registers") == remarks("vit") == ""
    known = {name: model.config.interpolate_offset for name, model in transformers_hub.hub_models().items()}
    assert known["facebook/dino-vitb8"] == known["facebook/dinov2-small-imagenet1k-1-layer"] == 0.1
    assert known["google/vit-base-patch16-224"] == known["facebook/dinov2-with-registers-base"] == 0
    with pytest.raises(
        ConversionError, match="--interpolate-offset does not fit: the model has no position embeddings"
    ):
        transformers_models.prepare(str(folders / "dinov3"), interpolate_offset=0.1)
    # what transformers does anyway is no wish
    assert remarks("registers", interpolate_offset=0.0, interpolate_antialias=True) == ""


def in_transformers_vit(state, prefix=""):
    """The names of transformers' ViT and DeiT for tensors in the layout of DINO and DeiT."""
    names = {
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "norm": "layernorm",
        "head": "cls_classifier",
        "head_dist": "distillation_classifier",
    }
    renamed = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        place, inside = "", module
        if module.startswith("blocks."):
            _, layer, inside = module.split(".", 2)
            place = f"encoder.layer.{layer}."
        parts = {names.get(inside): tensor}
        if inside == "attn.qkv":
            keys = (f"attention.attention.{part}" for part in ("query", "key", "value"))
            parts = dict(zip(keys, tensor.chunk(3)))
        for new, part in parts.items():
            full = new if new.endswith("classifier") else prefix + place + new
            renamed[f"{full}.{parameter}".rstrip(".")] = part.contiguous()
    return renamed


@torch.inference_mode()
def test_dino_through_transformers_is_the_original_where_it_is_asked_to_be(tmp_path):
    """Numbers of the original code: the offset is DINO's too."""
    state, images, outputs = load("dino")
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=60,
        patch_size=4,
        image_size=20,
        layer_norm_eps=1e-6,
    )
    config.save_pretrained(tmp_path)
    save_file(in_transformers_vit(state), tmp_path / "model.safetensors", metadata={"format": "pt"})
    prepared = transformers_models.prepare(str(tmp_path), interpolate_offset=0.1)
    assert prepared.sizes == [(20, 20)]
    for size, pixel_values in images.items():
        assert_close(prepared.model(pixel_values).last_hidden_state, outputs[f"tokens/{size}"])
    assert_close(prepared.reference(images["20x20"])["tokens"], outputs["tokens/20x20"])


@torch.inference_mode()
def test_distilled_deit_is_the_original(tmp_path):
    state, images, outputs = load("deit_distilled")
    config = DeiTConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=80,
        patch_size=4,
        image_size=20,
        layer_norm_eps=1e-6,
        num_labels=11,
    )
    config.save_pretrained(tmp_path)
    save_file(in_transformers_vit(state, "deit."), tmp_path / "model.safetensors", metadata={"format": "pt"})
    prepared = transformers_models.prepare(str(tmp_path))
    for result in (ours(prepared)(images["20x20"]), prepared.reference(images["20x20"])):
        assert_close(result["tokens"], outputs["tokens/20x20"])
        assert_close(result["logits"], outputs["logits/20x20"])


@torch.inference_mode()
def test_dinov3_is_the_original_but_for_the_rounding_of_its_periods(tmp_path):
    """The original stores them in bfloat16, and transformers computes them: with the stored ones all is the same."""
    state, images, outputs = load("dinov3")
    periods = state.pop("rope_embed.periods")
    config = DINOv3ViTConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=80,
        patch_size=4,
        image_size=20,
        num_register_tokens=3,
    )
    state["mask_token"] = state["mask_token"][None]
    state = {name: tensor for name, tensor in state.items() if "bias_mask" not in name}
    targets = {name: tensor.shape for name, tensor in DINOv3ViTModel(config).state_dict().items()}
    own = {name: tensor.clone() for name, tensor in rename(state, dinov3_rules(False), targets).items()}
    config.save_pretrained(tmp_path)
    save_file(own, tmp_path / "model.safetensors", metadata={"format": "pt"})
    prepared = transformers_models.prepare(str(tmp_path))
    for size, pixel_values in images.items():
        assert relative_error(prepared.model(pixel_values).last_hidden_state, outputs[f"tokens/{size}"]) < 1e-2
    prepared.model.encoder.rotary_embeddings.periods.copy_(periods)
    for size, pixel_values in images.items():
        assert_close(prepared.model(pixel_values).last_hidden_state, outputs[f"tokens/{size}"])


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(app, ["transformers", *map(str, arguments)])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


CARD = "---\nlicense: other\nlicense_name: house-license\nlicense_link: LICENSE.md\n---\n# A model\n"


def test_the_command_writes_a_classifier_with_processor_labels_and_licence(folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders / "registers_classifier", source)
    BitImageProcessor(size={"shortest_edge": 24}, crop_size=20, image_mean=[0.1, 0.2, 0.3]).save_pretrained(source)
    (source / "README.md").write_text(CARD.replace("LICENSE.md", "https://example.org/license"))
    result = run(source, tmp_path / "model")
    assert "Against transformers" in result.output and "Left aside: nothing." in result.output
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert type(model) is ViTRegForImageClassification and model.config.id2label[2] == "ibis"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert processor.crop_size["height"] == 20 and list(processor.image_mean) == [0.1, 0.2, 0.3]
    card = ModelCard.load(tmp_path / "model" / "README.md").data
    assert (card.license, card.license_name, card.license_link) == (
        "other",
        "house-license",
        "https://example.org/license",
    )
    # a folder is no repository of the Hub
    assert card.base_model is None
    record = json.loads((tmp_path / "model" / "conversion.json").read_text())
    assert [row["output"] for row in record["comparisons"]] == ["tokens", "logits"] * 5
    assert record["sources"][0]["backbone"] == "dinov2_with_registers.*"


def test_the_command_writes_a_vision_tower_with_its_projection(folders, tmp_path):
    result = run(folders / "clip", tmp_path / "model")
    assert "Left aside: logit_scale, text_model (20 entries), text_projection." in result.output
    assert "`convert.py open_clip`" in result.output
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert model(torch.randn(2, 3, 12, 28)).image_embeds.shape == (2, 13)


@pytest.mark.parametrize("kind", ["deit_two_classifiers", "clip_classifier", "vit_not_square"])
def test_the_command_writes_classifiers_of_every_layout(folders, kind, tmp_path):
    run(folders / kind, tmp_path / "model")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    pixel_values = torch.randn(2, 3, 12, 28)
    expected = theirs(tiny_model(kind), pixel_values)["logits"]
    assert relative_error(model(pixel_values).logits, expected) < 1e-6


def test_the_licence_is_that_of_the_card_or_what_is_known_of_the_repository(tmp_path):
    def license(card, repository=None):
        (tmp_path / "README.md").write_text(card)
        return Source(tmp_path, repository).license()

    assert license("---\nlicense: mit\n---\n", "google/vit-base-patch16-224").id == "mit"
    assert license("# No metadata\n", "google/vit-base-patch16-224").id == "apache-2.0"
    assert license("---\nlicense: [\n---\n", "facebook/dinov3-vitb16-pretrain-lvd1689m").name == "dinov3-license"
    assert license("# No metadata\n").id == "unknown"
    assert license(CARD, "org/model").link == "https://huggingface.co/org/model/blob/main/LICENSE.md"
    # the file that the link leads to stays behind
    assert license(CARD).id == "unknown"
    assert license("---\nlicense: other\n---\n", "org/model").id == "unknown"


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2", "dinov3", "clip"])
def test_default_processors_bring_images_to_what_the_model_was_trained_on(folders, kind, tmp_path):
    run(folders / kind, tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    pixel_values = processor(torch.rand(3, 33, 41), return_tensors="pt", do_rescale=False).pixel_values
    assert pixel_values.shape[2:] == ((224, 224) if kind == "dinov2" else (20, 20))
    assert AutoModel.from_pretrained(tmp_path / "model")(pixel_values).last_hidden_state.shape[2] == 24


def test_the_processor_of_a_dual_encoder_is_found_inside_its_processor(folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders / "clip", source)
    inside = ViTImageProcessor(size={"height": 20, "width": 20}).to_dict()
    (source / "processor_config.json").write_text(json.dumps({"image_processor": inside}))
    assert transformers_models.prepare(str(source)).image_processor.size["height"] == 20
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchImageProcessor"}')
    (source / "processor_config.json").unlink()
    with pytest.raises(ConversionError, match=r"has an image processor that cannot be read: .*Remove its file"):
        transformers_models.prepare(str(source))


def test_shards_and_pytorch_files_are_read(folders, tmp_path):
    whole = transformers_models.prepare(str(folders / "registers")).model.state_dict()
    model = tiny_model("registers")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    shutil.copytree(tmp_path / "shards", tmp_path / "pytorch", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save(load_file(folders / "registers" / "model.safetensors"), tmp_path / "pytorch" / "pytorch_model.bin")
    for name in ("shards", "pytorch"):
        prepared = transformers_models.prepare(str(tmp_path / name))
        state = prepared.model.state_dict()
        assert all(torch.equal(state[each], whole[each]) for each in whole)
        assert len(prepared.sources) == len(
            [*(tmp_path / name).glob("*.safetensors"), *tmp_path.glob(f"{name}/*.bin")]
        )
    next((tmp_path / "shards").glob("model-00001*")).unlink()
    with pytest.raises(ConversionError, match=r"lacks model-00001-of-.* files of its weights"):
        transformers_models.prepare(str(tmp_path / "shards"))


def test_old_names_and_any_prefix_are_read(folders, tmp_path):
    """Position ids that old versions stored, names of another model around it, three dimensions of a mask token."""
    tensors = load_file(folders / "clip_vision" / "model.safetensors")
    # named as models that have a vision tower somewhere inside name it
    tensors = {f"model.tower.{name.removeprefix('vision_model.')}": tensor for name, tensor in tensors.items()}
    tensors["model.tower.embeddings.position_ids"] = torch.arange(26)[None]
    shutil.copytree(folders / "clip_vision", tmp_path / "source")
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    prepared = transformers_models.prepare(str(tmp_path / "source"))
    assert prepared.left_aside == ["model.tower.embeddings.position_ids"]
    assert prepared.sources[0]["backbone"] == "model.tower.*"
    expected = transformers_models.prepare(str(folders / "clip_vision")).model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in prepared.model.state_dict().items())


def test_weights_in_half_precision_stay_as_they_are(tmp_path):
    tiny_model("dinov3").to(torch.bfloat16).save_pretrained(tmp_path / "source")
    run(tmp_path / "source", tmp_path / "model")
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    # in less they would be other periods
    assert model.encoder.rotary_embeddings.periods.dtype == torch.float32


def changed(source, target, **changes):
    """A copy with another config.json."""
    shutil.copytree(source, target)
    content = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(content))
    return target


@pytest.mark.parametrize(
    "kind, changes, expected",
    [
        (
            "vit",
            {"model_type": "swin"},
            "a model of type 'swin'. There are vit, deit, dinov2, dinov2_with_registers, ",
        ),
        ("vit", {"model_type": "vitreg"}, "It is a ViTReg model already"),
        ("vit", {"model_type": None}, "a model of type None"),
        ("vit", {"num_hidden_layers": 4}, "16 tensors that are missing: encoder.layer.3.layernorm_before.weight"),
        ("vit", {"num_hidden_layers": 2}, "tensors that the model does not have: encoder.layer.2."),
        ("vit", {"hidden_size": 30}, r"embeddings.cls_token gives \(1, 1, 24\)"),
        ("vit", {"hidden_size": "wide"}, "config.json: .*hidden_size"),
        ("vit", {"hidden_act": "none"}, "config.json: hidden_act 'none' is not known"),
        ("vit", {"patch_size": [4, 5]}, r"patch_size \[4, 5\].*two that are equal"),
        ("dinov2", {"model_type": "dinov2_with_registers"}, "missing: embeddings.register_tokens"),
        ("registers", {"model_type": "dinov2"}, "does not have: embeddings.register_tokens"),
        ("dinov2", {"image_size": [20, 28]}, r"image_size \[20, 28\] in its config.json. ViTReg reads one number"),
        ("clip_vision", {"image_size": None}, "image_size None in its config.json"),
        ("dinov3", {"query_bias": False}, "query_bias=False, key_bias=False and value_bias=True"),
        ("dinov3_gated", {"hidden_act": "gelu"}, "a gated MLP with hidden_act='gelu'"),
        ("deit", {"model_type": "vit"}, "does not have: embeddings.distillation_token"),
        ("deit_classifier", {"id2label": {0: "one"}}, r"classifier.weight gives \(7, 24\) to classifier.weight"),
    ],
)
def test_configs_that_do_not_fit(folders, tmp_path, kind, changes, expected):
    folder = changed(folders / kind, tmp_path / "source", **changes)
    with pytest.raises(ConversionError, match=expected):
        transformers_models.prepare(str(folder))


def with_tensors(folders, tmp_path, kind, change):
    """A copy of a folder, its weights changed."""
    shutil.copytree(folders / kind, tmp_path / "source")
    tensors = change(load_file(folders / kind / "model.safetensors"))
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    return str(tmp_path / "source")


def without(name):
    return lambda tensors: {each: tensor for each, tensor in tensors.items() if each != name}


def added(**more):
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in more.items()}


@pytest.mark.parametrize(
    "kind, change, expected",
    [
        ("vit", without("layernorm.bias"), "1 tensors that are missing: layernorm.bias"),
        ("vit", without("embeddings.cls_token"), "is no ViT checkpoint of transformers.* it has embeddings.patch"),
        ("vit", added(adapter=torch.ones(3)), "1 tensors that the model does not have: adapter"),
        ("dinov3", added(classifier__weight=torch.ones(7, 24)), "does not have: classifier.weight"),
        ("vit", added(other__embeddings__cls_token=torch.ones(3)), "it has backbones under '', 'other.'"),
        ("vit", added(layernorm__bias=torch.ones(24, dtype=torch.int8)), "layernorm.bias is torch.int8, no weight"),
        ("vit", lambda tensors: {"blocks.0.ls1.gamma": torch.ones(3)}, "could be converted by `convert.py dinov2`"),
        (
            "registers",
            added(encoder__layer__0__attention__q_proj__weight=torch.ones(24, 24)),
            "claim the same place: .*q_proj.weight and .*query.weight|claim the same place: .*query.weight and",
        ),
    ],
)
def test_weights_that_do_not_fit(folders, tmp_path, kind, change, expected):
    with pytest.raises(ConversionError, match=expected):
        transformers_models.prepare(with_tensors(folders, tmp_path, kind, change))


def test_bad_input_is_one_clear_message_and_nothing_is_written(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "config.json").write_text("<html>Sign in</html>")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    shutil.copytree(folders / "vit", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    nan = with_tensors(folders, tmp_path, "vit", added(layernorm__bias=torch.full([24], torch.nan)))
    cases = {
        tmp_path / "empty": "has no config.json",
        tmp_path / "page": "is no valid JSON",
        tmp_path / "list": "holds a list, not a JSON object",
        tmp_path / "bare": "has no weights",
        folders / "vit" / "model.safetensors": "is a file. Give the folder that it is in",
        "facebook/dinov2_small": "cannot be had from the Hub: ",
        "dinov2 small": "is neither a folder nor the name of a repository.",
        nan: "the weights are not finite",
    }
    for given, message in cases.items():
        result = run(given, tmp_path / "model", exit_code=1)
        assert result.stderr.startswith("Error: ") and message in result.stderr, (given, result.stderr)
        assert "Traceback" not in result.output and isinstance(result.exception, SystemExit), given
        assert not list(tmp_path.glob("*model*")), given
    assert "Did you mean facebook/dinov2-small?" in run("facebook/dinov2_small", tmp_path / "m", exit_code=1).stderr


ON_THE_HUB = """
from huggingface_hub import HfApi
from conversion import transformers_models
from conversion.family import ConversionError
from conversion.renaming import rename
from conversion.transformers_hub import Source
from conversion.transformers_reference import dinov3_rules

for name in ("classifier", "old"):
    HfApi().create_repo(f"org/{name}")
    HfApi().upload_folder(repo_id=f"org/{name}", folder_path=f"MODELS/{name}")
    prepared = transformers_models.prepare(f"org/{name}")
    source = prepared.sources[0]
    print(prepared.base_model, prepared.license.id, prepared.license.link, source["file"], source["repository"])
    assert len(source["revision"]) == 40
try:
    transformers_models.prepare("org/none")
except ConversionError as error:
    print(error)
"""


def test_repositories_of_the_hub_give_their_name_and_licence(folders, tmp_path):
    """Of one with two formats only one is downloaded; of one with the old format that one."""
    models = tmp_path / "models"
    shutil.copytree(folders / "vit_classifier", models / "classifier")
    (models / "classifier" / "README.md").write_text(CARD)
    shutil.copytree(folders / "vit", models / "old", ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    for name in ("classifier", "old"):
        torch.save(load_file(folders / "vit" / "model.safetensors"), models / name / "pytorch_model.bin")
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    with LoopbackHub() as hub:
        code = ON_THE_HUB.replace("MODELS", str(models))
        lines = run_client(hub, code, tmp_path / "home", **environment).stdout.splitlines()
    link = "https://huggingface.co/org/classifier/blob/main/LICENSE.md"
    assert lines[0] == f"org/classifier other {link} model.safetensors org/classifier"
    assert lines[1] == "org/old unknown None pytorch_model.bin org/old"
    assert lines[2].startswith("org/none is no folder, and cannot be had from the Hub: ")
    downloads = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert any("old" in path and "pytorch_model.bin" in path for path in downloads)
    assert not any("classifier" in path and "pytorch_model.bin" in path for path in downloads)


def test_the_list_has_every_type_with_counts_and_licences():
    known = {one.name: one for one in transformers_hub.known_checkpoints()}
    assert all(
        one.family == "transformers" and one.source == f"https://huggingface.co/{name}" for name, one in known.items()
    )
    counts = {arch: count for arch, (_, count) in PUBLISHED_COUNTS.items()}
    for arch, name in (("vits14", "small"), ("vitl14_reg4", "with-registers-large"), ("vitg14", "giant")):
        assert known[f"facebook/dinov2-{name}"].num_parameters == counts[arch]
        assert known[f"facebook/dinov2-{name}"].arch == arch
    heads = known["facebook/dinov2-base-imagenet1k-1-layer"].num_parameters - counts["vitb14"]
    assert heads == 2 * 768 * 1000 + 1000
    # google-research/vision_transformer, and the vision tower of OpenAI's ViT-B/32
    assert known["google/vit-base-patch16-224"].num_parameters == 86_567_656
    assert known["openai/clip-vit-base-patch32"].num_parameters == 87_849_216
    licenses = {name.split("/")[0]: set() for name in known}
    for name, one in known.items():
        licenses[name.split("/")[0]].add(one.license)
    assert licenses == {
        "facebook": {"apache-2.0", "dinov3-license"},
        "google": {"apache-2.0"},
        "openai": {"unknown"},
        "laion": {"mit"},
    }


def test_well_known_architectures_are_called_by_their_names():
    models = transformers_hub.hub_models()
    assert transformers_hub.architecture_name("facebook/dinov3-vitb16-pretrain-lvd1689m", None) == "vitb16"
    for name in ("facebook/dinov2-with-registers-base", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        assert transformers_hub.architecture_name(None, models[name].config) == models[name].arch


SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
SMALL_MLP = {**SMALL, "intermediate_size": 1536, "image_size": 224, "patch_size": 16}
FULL_SIZE = {
    "vit": ("ViTForImageClassification", ViTConfig(**SMALL_MLP, num_labels=1000)),
    "deit": ("DeiTForImageClassificationWithTeacher", DeiTConfig(**SMALL_MLP, num_labels=1000)),
    "dinov2": ("Dinov2ForImageClassification", Dinov2Config(**SMALL, image_size=518, num_labels=1000)),
    "registers": ("Dinov2WithRegistersModel", Dinov2WithRegistersConfig(**SMALL, image_size=518, patch_size=14)),
    "dinov3": ("DINOv3ViTModel", DINOv3ViTConfig(**SMALL_MLP, num_register_tokens=4)),
    "clip": ("CLIPVisionModelWithProjection", CLIPVisionConfig(**{**SMALL_MLP, "patch_size": 32})),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL_SIZE)
def test_full_sizes_agree_and_stay_within_their_memory(tmp_path, kind):
    name, config = FULL_SIZE[kind]
    randomize(getattr(transformers, name)(config)).save_pretrained(tmp_path / "source")
    done = run_script("-c", MEASURED, SCRIPT, "transformers", tmp_path / "source", tmp_path / "model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "source" / "model.safetensors").stat().st_size
    peak = int(done.stdout.rsplit("peak: ")[1])
    assert peak < 1.3 * size + 1e9, f"{peak / 1e9:.2f} GB for a checkpoint of {size / 1e9:.2f} GB"
