# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A model gets registers in one call: it stays what it is, says whether it worked, and is whole or not there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import dual_encoders
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from planted import MEAN, NEURON, PATCH_SIZE, PLANTED_LAYER, STD, patchy_image, planted_encoder
from reference import images, randomize, tiny_config
from script_runs import ROOT, client_environment, one_thread
from transformers import AutoModel, AutoModelForImageClassification, BertConfig, BitImageProcessor

import finetune
import pretrain
from hf_vitreg import ViTRegBackbone, ViTRegForImageClassification, ViTRegModel
from hf_vitreg.analysis import figures
from hf_vitreg.evaluation.zero_shot import load_dual_encoder
from hf_vitreg.hub.card import load_card
from hf_vitreg.hub.export import check_model_repository, sort_files, write_model_repository
from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.pretraining.models import build_backbone
from hf_vitreg.recipe import FinetuneRecipe
from hf_vitreg.registers import distill, give
from hf_vitreg.registers.give import give_registers
from hf_vitreg.registers.options import RegisterOptions
from hf_vitreg.registers.source import load_source


ROWS = COLS = 6
SIDE, NUM_IMAGES = ROWS * PATCH_SIZE, 14
DEBUG_RECIPE = ROOT / "recipes/debug/pretrain_post_hoc.yaml"
README = """---
license: other
license_name: house-licence
license_link: https://example.org/licence
base_model: org/original
library_name: transformers
pipeline_tag: image-feature-extraction
---
"""


def processor(side: int = SIDE) -> BitImageProcessor:
    size = {"height": side, "width": side}
    return BitImageProcessor(size=size, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD))


def saved(model, folder: Path, side: int = SIDE) -> Path:
    model.save_pretrained(folder)
    processor(side).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def quick_figures_and_one_thread():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(figures, "DPI", 40)
        yield


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A model with artifacts, its image processor and a card."""
    encoder = planted_encoder(500.0, num_registers=0, image_size=(SIDE, SIDE))
    folder = saved(encoder.model, tmp_path_factory.mktemp("models") / "planted")
    (folder / "README.md").write_text(README)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for index in range(NUM_IMAGES):
        patchy_image(index, ROWS, COLS)[0].save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def at_test_time(planted, photographs, tmp_path_factory):
    output = tmp_path_factory.mktemp("given") / "with-registers"
    return give_registers(planted, output, "test-time", [photographs], device="cpu")


def test_at_test_time_the_planted_neuron_is_shifted_and_said_to_work(at_test_time, planted):
    effect = at_test_time.effect
    before, after = effect.outlier_shares
    assert effect.succeeded and before > 0.03 and after <= 0.05 * before
    sentences = at_test_time.sentences()
    assert sentences[0].startswith(
        f"1 test-time register, which 1 register neuron of layer {PLANTED_LAYER - 1}, counted from 0, writes into"
    )
    assert sentences[1].startswith("Success: outliers fell from 4.17 % to 0 % of the patches")
    model = AutoModel.from_pretrained(at_test_time.folder)
    assert model.config.num_test_time_registers == model.config.num_register_tokens == 1
    assert model.config.register_neurons == {PLANTED_LAYER - 1: [NEURON]}
    source = AutoModel.from_pretrained(planted)
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_folder_is_a_repository_whose_card_has_the_numbers(at_test_time):
    folder, effect = at_test_time.folder, at_test_time.effect
    check_model_repository(folder)
    card = load_card(folder / "README.md")
    assert effect.markdown() in card.text and at_test_time.about in card.text and "--method test-time" in card.text
    assert "Registers are tokens that belong" in card.text and "The last is a test-time register" in card.text
    assert (card.data.license_name, card.data.base_model) == ("house-licence", "org/original")
    published, left_out = sort_files(folder)
    assert {"register_neurons.json", "register_neurons.png"} <= set(published)
    assert left_out == ["inspection/"], "it shows photographs"


def test_the_comparison_is_that_of_inspect(at_test_time, planted):
    page = at_test_time.comparison.read_text()
    assert str(planted) in page and str(at_test_time.folder) in page
    metrics = json.loads((at_test_time.comparison.parent / "metrics.json").read_text())
    assert metrics["verdict"]["threshold"] == metrics["compare"]["settings"]["threshold"]
    assert metrics["compare"]["model"]["num_registers"] == 1


def test_neurons_are_kept_with_their_scores(at_test_time):
    record = json.loads((at_test_time.folder / "register_neurons.json").read_text())
    [neuron] = record["neurons"]
    assert (neuron["layer"], neuron["neuron"]) == (PLANTED_LAYER - 1, NEURON) and neuron["score"] > 1
    assert record["num_images"] == NUM_IMAGES and record["share_by_number"]["1"] == 0
    assert (at_test_time.folder / "register_neurons.png").read_bytes().startswith(b"\x89PNG")


def test_options_reach_the_search_and_the_comparison(planted, photographs, tmp_path):
    options = RegisterOptions(
        preset="openclip-base",
        threshold=20.0,
        count=3,
        highest_layer=3,
        detect_layer=-2,
        reduce="layer",
        max_images=9,
    )
    done = give_registers(planted, tmp_path / "out", "test-time", [photographs], options, device="cpu")
    record = json.loads((done.folder / "register_neurons.json").read_text())
    assert (record["threshold"], record["detect_layer"], record["highest_layer"]) == (20, 3, 3)
    assert len(record["neurons"]) == 3 and record["num_images"] == 9
    verdict = done.effect.before.metrics["verdict"]
    assert (verdict["threshold"], verdict["layer"]) == (20, 4)
    assert AutoModel.from_pretrained(done.folder).config.register_neuron_reduce == "layer"
    command = (done.folder / "README.md").read_text().split("```sh\n")[1].split("\n```")[0]
    for flag in ("--preset openclip-base", "--count 3", "--detect-layer -2", "--max-images 9", "--threshold 20.0"):
        assert flag in command


@pytest.mark.slow  # test_registers_warm_start.py has its parts
def test_a_warm_start_says_that_nothing_fell_yet(planted, photographs, tmp_path):
    done = give_registers(planted, tmp_path / "out", "warm-start", [photographs], device="cpu")
    assert not done.effect.succeeded and done.effect.outlier_shares[1] > 0
    sentences = done.sentences()
    assert sentences[1].startswith("No success: outliers went from 4.17 % to 4.17 % of the patches")
    assert "standard deviation of 1e-06 and not trained yet" in sentences[0]
    assert f"pretrain.py --config RECIPE --model_name_or_path {done.folder}" in sentences[-2]
    assert f"hf-vitreg inspect {planted} --compare TRAINED" in sentences[-1]
    assert "**No success**" in load_card(done.folder / "README.md").text
    # what a training starts from
    assert build_backbone(PretrainRecipe(model_name_or_path=str(done.folder))).config.num_register_tokens == 4
    tuned = finetune.build_model(FinetuneRecipe(model_name_or_path=str(done.folder)), ["a", "b"], processor())
    registers = tuned.vitreg.embeddings.register_tokens
    assert registers.shape[1] == 4 and 5e-7 < registers.std() < 2e-6


def test_a_classifier_stays_a_classifier(tmp_path):
    model = randomize(ViTRegForImageClassification(tiny_config(num_register_tokens=0, register_init_std=0.3)))
    folder = saved(model, tmp_path / "classifier", 21)
    done = give_registers(folder, tmp_path / "out", "warm-start", options=RegisterOptions(num_registers=2))
    assert done.effect is None and "no images were given" in done.sentences()[1]
    check_model_repository(done.folder)
    assert "not compared" in (done.folder / "README.md").read_text() and not done.comparison.exists()
    more = AutoModelForImageClassification.from_pretrained(done.folder)
    assert more.config.num_register_tokens == 2 and torch.equal(more.classifier.weight, model.classifier.weight)
    assert more.vitreg.embeddings.register_tokens.std() > 0.2, "as the config says"
    again = give_registers(folder, tmp_path / "again", "warm-start", options=RegisterOptions(num_registers=2))
    same = AutoModelForImageClassification.from_pretrained(again.folder).vitreg.embeddings.register_tokens
    assert torch.equal(same, more.vitreg.embeddings.register_tokens), "the seed's"


def test_a_dual_encoder_keeps_its_texts(tmp_path):
    dual, tokenizer = (
        dual_encoders.objective(vision={"num_register_tokens": 0}).exportable(),
        dual_encoders.tokenizer(),
    )
    write_model_repository(tmp_path / "dual", dual, dual_encoders.PROCESSOR, None, tokenizer=tokenizer)
    done = give_registers(tmp_path / "dual", tmp_path / "out", "warm-start")
    check_model_repository(done.folder)
    before, after = (load_dual_encoder(folder) for folder in (tmp_path / "dual", done.folder))
    assert after.model.config.vision_config.num_register_tokens == 4
    names = [name for name in before.model.state_dict() if not name.startswith("vision_model.")]
    states = before.model.state_dict(), after.model.state_dict()
    assert all(torch.equal(*(state[name] for state in states)) for name in names) and len(names) > 10
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()


def test_a_backbone_is_looked_at_as_a_model(tmp_path):
    model = randomize(ViTRegBackbone(tiny_config(num_register_tokens=0)))
    source = load_source(saved(model, tmp_path / "backbone", 21))
    assert isinstance(source.vision, ViTRegBackbone)
    pixel_values = images()
    encoder = source.encoder()
    with torch.no_grad():
        expected = model(pixel_values, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(encoder.layers(pixel_values, [-1])[-1], expected)


# Distillation


@pytest.fixture
def in_this_process(tmp_path, monkeypatch):
    """pretrain.py, by the flags of the command."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(pretrain, "share_cores", one_thread)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def train(command):
        assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
        script = command.index(str(ROOT / "pretrain.py"))
        assert command[3:script] == ["--cpu"]
        pretrain.main(command[script + 1 :])

    monkeypatch.setattr(give, "train", train)
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_distilled_registers_are_put_into_the_model_with_its_head(photographs, tmp_path, in_this_process):
    model = ViTRegForImageClassification(tiny_config(num_register_tokens=0, image_size=SIDE, drop_path_rate=0.2))
    folder = saved(randomize(model), tmp_path / "classifier")
    options = RegisterOptions(
        recipe=DEBUG_RECIPE, num_registers=3, arguments=("--peak_tflops", "1", "--learning_rate", "0.01")
    )
    done = give_registers(folder, tmp_path / "out", "distill", [photographs], options, device="cpu")
    check_model_repository(done.folder)
    after = AutoModelForImageClassification.from_pretrained(done.folder)
    assert torch.equal(after.classifier.weight, model.classifier.weight) and after.config.num_register_tokens == 3
    assert after.config.drop_path_rate == 0.2, "its config, not the recipe's"
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])
    }
    starts = ("vitreg.encoder.layer.4.", "vitreg.embeddings.p")
    assert changed and all(name.startswith(starts) for name in changed)
    card = load_card(done.folder / "README.md")
    assert done.effect.markdown() in card.text and card.data.pipeline_tag == "image-classification"
    assert "objective: post_hoc" in card.text and "num_register_tokens: 3" in card.text and "curves.png" in card.text
    assert done.about.startswith("3 registers distilled") and done.comparison.is_file()
    assert "checkpoints/" in sort_files(done.folder)[1]
    with pytest.raises(ValueError, match="not empty"):
        give_registers(folder, done.folder, "distill", [photographs], options, device="cpu")


@pytest.mark.slow
def test_distillation_is_launched(planted, photographs, tmp_path):
    arguments = [planted, tmp_path / "out", "--method", "distill", "--images", photographs, "--device", "cpu"]
    arguments += ["--recipe", DEBUG_RECIPE, "--", "--peak_tflops", "1"]
    command = [sys.executable, "-m", "hf_vitreg", "registers", *map(str, arguments)]
    done = subprocess.run(command, env=client_environment(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "2 registers distilled" in done.stdout
        and AutoModel.from_pretrained(tmp_path / "out").config.num_register_tokens
    )


def command_of(planted, images, tmp_path, **changes) -> list[str]:
    options = RegisterOptions(**changes)
    return distill.training_command(load_source(planted), tmp_path, images, options, torch.device("cpu"), True)


def test_the_command_trains_on_the_images_at_the_size_of_the_model(planted, photographs, tmp_path):
    command = command_of(planted, [photographs], tmp_path, num_registers=5, arguments=("--max_steps", "7"))
    text = " ".join(command)
    assert f"--config {ROOT / 'recipes/pretrain/post_hoc_registers.yaml'} " in text and f"--image_size {SIDE} " in text
    assert f"--train_dir {photographs} --num_register_tokens 5 --overwrite_output_dir --max_steps 7" in text
    given = command_of(planted, ["a/*.png", "b"], tmp_path, recipe=DEBUG_RECIPE, arguments=("--train_file=c.parquet",))
    assert "--train_dir" not in given and "--image_size" not in given and "--num_register_tokens" not in given
    with pytest.raises(ValueError, match="the images of one folder"):
        command_of(planted, [photographs, photographs], tmp_path)


def test_outside_of_a_clone_it_says_what_to_run(planted, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CHECKOUT", tmp_path)
    with pytest.raises(
        ValueError, match=r"Clone .* accelerate launch pretrain\.py --config \./recipes/pretrain/post_hoc"
    ):
        command_of(planted, [photographs], tmp_path / "out")


def test_a_training_that_fails_says_how_to_go_on():
    with pytest.raises(ValueError, match=r"stopped with status 3; .*--resume_from_checkpoint latest"):
        distill.train([sys.executable, "-c", "raise SystemExit(3)"])


# Refusals


@pytest.mark.parametrize("broken", ["write_report", "write_model_repository", "measure_effect"])
def test_what_fails_half_way_leaves_nothing(planted, photographs, at_test_time, tmp_path, monkeypatch, broken):
    monkeypatch.setattr(give, "measure_effect", lambda *_, **__: at_test_time.effect)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(give, broken, fail)
    for output, overwrite in ((tmp_path / "new", False), (tmp_path / "old", True)):
        with pytest.raises(OSError, match="disk full"):
            give_registers(planted, output, "warm-start", [photographs], device="cpu", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["config.json"]


def test_only_models_are_replaced(planted, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    give_registers(planted, output, "warm-start")
    with pytest.raises(ValueError, match=r"There is a model in .* --overwrite"):
        give_registers(planted, output, "warm-start")
    give_registers(planted, output, "warm-start", overwrite=True, options=RegisterOptions(num_registers=2))
    assert AutoModel.from_pretrained(output).config.num_register_tokens == 2
    (output / "config.json").unlink()
    with pytest.raises(ValueError, match="holds other things than a model"):
        give_registers(planted, output, "warm-start", overwrite=True)
    for place in (planted, planted.parent):
        with pytest.raises(ValueError, match="would be replaced"):
            give_registers(planted, place, "warm-start", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        give_registers(planted, tmp_path / "file", "warm-start")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("sideways", {}, "There is no method 'sideways', only test-time, distill, warm-start"),
        ("warm-start", {"count": 3}, "does not read --count; test-time does"),
        ("test-time", {"register_init_std": 0.1}, "--register-init-std; distill, warm-start does"),
        ("test-time", {"arguments": ("--max_steps", "3")}, "does not read Arguments behind `--`; distill does"),
        ("test-time", {"preset": "large"}, "There is no preset 'large', only auto, dinov2-large"),
        ("test-time", {"target_share": 0.1, "count": 3}, "Leave one of them out"),
        ("test-time", {"reduce": "mean"}, "--reduce must be neuron or layer"),
        ("test-time", {"num_registers": 0}, "--num-registers must be 1 or more"),
        ("distill", {"size": (43, 42)}, "no multiple of the patch size"),
        ("distill", {"detect_layer": 5}, "layer 5 does not exist"),
        ("warm-start", {"min_fall": 2.0}, "fall of the outliers"),
        ("warm-start", {"license": "other"}, "needs license_name"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(planted, photographs, tmp_path, method, options, message):
    with pytest.raises(ValueError, match=message):
        give_registers(planted, tmp_path / "out", method, [photographs], RegisterOptions(**options), device="cpu")
    assert not (tmp_path / "out").exists()


def test_images_are_needed_where_they_are(planted, tmp_path):
    for method in ("test-time", "distill"):
        with pytest.raises(ValueError, match=f"The method {method} needs images"):
            give_registers(planted, tmp_path / "out", method)


def test_other_models_are_to_be_converted_first(planted, photographs, tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "bert", r"a bert, not a vitreg. Convert it first: python conversion/convert.py"),
        ("timm:vit_small_patch14_dinov2", "it is timm's, not a vitreg. Convert"),
        (tmp_path / "gone", "there is no such folder"),
        (tmp_path / "bert" / "config.json", "it is a file"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            give_registers(model, tmp_path / "out", "test-time", [photographs], device="cpu")
    incomplete = shutil.copytree(planted, tmp_path / "incomplete")
    (incomplete / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="Cannot load"):
        give_registers(incomplete, tmp_path / "out", "warm-start")


def test_a_model_with_registers_gets_no_others(tmp_path):
    folder = saved(randomize(ViTRegModel(tiny_config(image_size=SIDE))), tmp_path / "with")
    with pytest.raises(ValueError, match="has 5 registers already"):
        give_registers(folder, tmp_path / "out", "warm-start")
