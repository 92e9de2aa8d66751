# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""finetune.py in process on its debug recipe: what a run leaves, how it goes on, what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import PIL.Image
import pytest
import safetensors.torch
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, run_client
from sample_images import write_folder, write_parquet
from script_runs import (
    ROOT,
    WITH_ARGUMENTS,
    assert_equal_weights,
    client_environment,
    killed_in_the_second_save,
    one_thread,
    weights,
)
from transformers import AutoModel, AutoModelForImageClassification, Dinov2Config, Dinov2Model, pipeline

import finetune
from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel
from hf_vitreg.data.transforms import new_image_processor
from hf_vitreg.training.run import TrainingDiverged


DEBUG = str(ROOT / "recipes/debug/finetune.yaml")
REPOSITORY = {
    "README.md",
    "config.json",
    "configuration_vitreg.py",
    "curves.png",
    "metrics.jsonl",
    "model.safetensors",
    "modeling_vitreg.py",
    "preprocessor_config.json",
    "recipe.yaml",
}


@pytest.fixture(autouse=True)
def own_accelerator_and_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(finetune, "share_cores", one_thread)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(output_dir, *arguments, **flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    named = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return finetune.main(["--config", DEBUG, "--output_dir", str(output_dir), *map(str, arguments), *named])


def metrics(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run of the debug recipe, which uses every part of the loop."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(finetune, "share_cores", one_thread)
        result = run(output_dir)
    return output_dir, result


def test_a_run_leaves_a_complete_model_repository(finished):
    output_dir, result = finished
    assert {path.name for path in output_dir.iterdir()} >= REPOSITORY
    config = json.loads((output_dir / "config.json").read_text())
    assert config["architectures"] == ["ViTRegForImageClassification"] and config["num_register_tokens"] == 3
    assert config["auto_map"] == ViTRegConfig().auto_map
    assert config["id2label"] == {str(digit): str(digit) for digit in range(10)}
    assert yaml.safe_load((output_dir / "recipe.yaml").read_text())["ema_decay"] == 0.9
    measured = {
        entry.metric_type: entry.metric_value for entry in ModelCard.load(output_dir / "README.md").data.eval_results
    }
    assert measured["accuracy"] == pytest.approx(result["validation_accuracy"], abs=1e-4)
    with PIL.Image.open(output_dir / "curves.png") as image:
        assert image.width > 500


def test_metrics_are_of_every_step_and_both_kinds(finished):
    output_dir, result = finished
    records = metrics(output_dir)
    assert [record["step"] for record in records if "train_loss" in record] == list(range(1, 9))
    validations = [record for record in records if "validation_accuracy" in record]
    assert [record["step"] for record in validations] == [4, 8]
    assert max(record["validation_accuracy"] for record in validations) == result["validation_accuracy"]


def test_what_was_written_loads_and_repeats_what_was_measured(finished):
    output_dir, result = finished
    assert AutoModel.from_pretrained(output_dir).config.num_register_tokens == 3
    images = finetune.load_labelled_images(finetune.parse_recipe(finetune.FinetuneRecipe, ["--config", DEBUG]), seed=0)
    classifier = pipeline("image-classification", model=str(output_dir), device="cpu")
    predicted = [classifier(finetune.read_image(row["image"]), top_k=1)[0]["label"] for row in images.validation]
    correct = [int(label) == row["label"] for label, row in zip(predicted, images.validation)]
    assert sum(correct) / len(correct) == pytest.approx(result["validation_accuracy"])


def test_the_last_and_the_best_checkpoints_are_kept(finished):
    output_dir, _ = finished
    names = {path.name for path in (output_dir / "checkpoints").iterdir()}
    best = max(metrics(output_dir), key=lambda record: record.get("validation_accuracy", -1))
    assert names == {"step-00000006", "step-00000008", f"step-{best['step']:08d}"}


def test_a_run_goes_on_from_an_earlier_checkpoint_too(finished, tmp_path):
    run(tmp_path / "run", save_total_limit=9)
    earlier = tmp_path / "run" / "checkpoints" / "step-00000002"
    run(tmp_path / "run", resume_from_checkpoint=earlier, save_total_limit=1)
    assert_equal_weights(finished[0], tmp_path / "run")
    assert metrics(finished[0]) == metrics(tmp_path / "run")
    assert len(list(earlier.parent.iterdir())) <= 2


class Killed(BaseException):
    """Stands for what no code can catch."""


@pytest.mark.parametrize("killed_at", [3, 6])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(finished, tmp_path, monkeypatch, killed_at):
    """Mid-epoch and past its end, with mixing, stochastic depth, accumulation, moving average and layer decay."""
    original = finetune.mean_metrics

    def killing(accelerator, losses):
        if losses[-1][0] == killed_at:
            raise Killed
        return original(accelerator, losses)

    monkeypatch.setattr(finetune, "mean_metrics", killing)
    with pytest.raises(Killed):
        run(tmp_path / "run")
    monkeypatch.setattr(finetune, "mean_metrics", original)
    run(tmp_path / "run", resume_from_checkpoint="latest")
    assert_equal_weights(finished[0], tmp_path / "run")
    assert metrics(finished[0]) == metrics(tmp_path / "run")


def test_kill_9_during_a_save_leaves_the_checkpoint_before(finished, tmp_path):
    left = killed_in_the_second_save("finetune", ["--config", DEBUG], tmp_path)
    assert left == {"step-00000002", ".step-00000004.partial"}
    run(tmp_path / "run", resume_from_checkpoint="latest")
    assert_equal_weights(finished[0], tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


WATCH_EPOCHS = """
import finetune

def watched(self, index, original=finetune.PreparedImages.__getitem__):
    if self.replace_bad:
        print(f"epoch-{self.epoch}", flush=True)
    return original(self, index)

finetune.PreparedImages.__getitem__ = watched
finetune.main()
"""


def test_two_processes_train_together(tmp_path):
    """Through torchrun, since `accelerate launch --cpu --num_processes 2` starts one process."""
    (tmp_path / "watch.py").write_text(WATCH_EPOCHS)
    script = [str(tmp_path / "watch.py"), "--config", DEBUG, "--output_dir", str(tmp_path / "run"), "--max_steps", "6"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, *script], env=client_environment(tmp_path), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model.safetensors").exists()
    # 30 validation images over two processes and batches of 11, each counted once
    accuracies = [
        record["validation_accuracy"] for record in metrics(tmp_path / "run") if "validation_accuracy" in record
    ]
    assert all(accuracy * 30 == pytest.approx(round(accuracy * 30)) for accuracy in accuracies)
    model = ViTRegForImageClassification.from_pretrained(tmp_path / "run")
    assert len(list((tmp_path / "run" / "checkpoints" / "step-00000006").glob("random_states_*"))) == 2
    # 60 training images are two steps of 2 x 2 batches of 7 and one of what is left: two epochs, each drawn anew
    assert set(done.stdout.split()) >= {"epoch-0", "epoch-1"}
    assert model.config.num_labels == 10


@pytest.mark.parametrize(
    ("save_steps", "named"), [(3, "loss of step 5 is nan"), (2, "weights after step 4 are not finite")]
)
def test_what_is_no_number_stops_before_anything_is_saved(tmp_path, monkeypatch, save_steps, named):
    steps = []
    original = finetune.set_learning_rate

    def exploding(optimizer, learning_rate):
        steps.append(learning_rate)
        original(optimizer, learning_rate if len(steps) <= 6 else float("inf"))  # two batches a step: breaks in step 4

    monkeypatch.setattr(finetune, "set_learning_rate", exploding)
    with pytest.raises(TrainingDiverged, match=named):
        run(tmp_path / "run", logging_steps=100, save_steps=save_steps, eval_steps=100, max_steps=9)
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-0000000{save_steps}"
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
    saved = safetensors.torch.load_file(checkpoint / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_a_run_is_not_mixed_with_one_that_is_there(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    with pytest.raises(ValueError, match="--overwrite_output_dir"):
        run(tmp_path / "run")
    with pytest.raises(ValueError, match="learning_rate was"):
        run(tmp_path / "run", resume_from_checkpoint="latest", learning_rate=0.5)
    with pytest.raises(ValueError, match="no checkpoint"):
        run(tmp_path / "new", resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="is no checkpoint of the run"):
        run(tmp_path / "run", resume_from_checkpoint=tmp_path)
    assert_equal_weights(finished[0], tmp_path / "run")
    run(tmp_path / "run", "--overwrite_output_dir", max_steps=2)
    assert max(record["step"] for record in metrics(tmp_path / "run")) == 2


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    with (newest / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=rf"{newest.name} cannot be loaded.*another one"):
        run(tmp_path / "run", resume_from_checkpoint="latest")


def test_frozen_backbone_trains_the_classifier_only(finished, tmp_path):
    run(tmp_path / "run", "--freeze_backbone", "--gradient_checkpointing", ema_decay=0, model_name_or_path=finished[0],
        hidden_size=96, num_hidden_layers=4, num_attention_heads=3, num_register_tokens=4, max_steps=2)  # fmt: skip
    before, after = weights(finished[0]), weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def from_checkpoint(tmp_path, checkpoint, *arguments, **flags):
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "num_register_tokens": 4}  # the defaults
    return run(
        tmp_path / "run", *arguments, model_name_or_path=checkpoint, max_steps=1, eval_steps=1, **sizes, **flags
    )


def test_a_folder_of_images_fine_tunes_a_checkpoint_of_other_classes(finished, tmp_path):
    folder = write_folder(tmp_path / "shades", {"red": 9, "green": 8, "blue": 7})
    with pytest.raises(
        ValueError, match=r"has 10 classes \(0, 1, 2, 3, 4, \.\.\), the data 3.*--ignore_mismatched_sizes"
    ):
        from_checkpoint(tmp_path, finished[0], train_dir=folder)
    from_checkpoint(tmp_path, finished[0], "--ignore_mismatched_sizes", train_dir=folder, image_size=40)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())["crop_size"]["height"] == 40
    assert "shades" in (tmp_path / "run" / "README.md").read_text()


def test_parquet_fine_tunes_a_backbone(finished, tmp_path):
    ViTRegModel.from_pretrained(finished[0]).save_pretrained(tmp_path / "backbone")
    new_image_processor(24).save_pretrained(tmp_path / "backbone")
    path = write_parquet(tmp_path / "train.parquet", ["a", "b", "c"] * 5, datasets.Value("string"))
    from_checkpoint(tmp_path, tmp_path / "backbone", train_file=path)
    assert ViTRegForImageClassification.from_pretrained(tmp_path / "run").config.num_labels == 3


def test_corrupt_images_are_named_or_skipped(tmp_path):
    folder = write_folder(tmp_path / "train", {"a": 9, "b": 9})
    (folder / "a" / "003.png").write_bytes(b"no picture")
    validation = shutil.copytree(folder, tmp_path / "validation")
    flags = {"train_dir": folder, "validation_dir": validation, "max_steps": 1, "eval_steps": 1}
    with pytest.raises(ValueError, match=r"003\.png cannot be read"):
        run(tmp_path / "run", **flags)
    result = run(tmp_path / "run", on_bad_image="skip", **flags)
    accuracy = result["validation_accuracy"] * 17  # of 18
    assert accuracy == pytest.approx(round(accuracy))


def truncated(folder):
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)


def without_a_layer(folder):
    state = {name: tensor for name, tensor in weights(folder).items() if ".layer.1." not in name}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (truncated, "cannot be loaded"),
        (without_a_layer, "incomplete or foreign.*encoder.layer.1"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "image processor"),
        (lambda folder: (folder / "config.json").unlink(), "no model folder|image processor"),
    ],
)
def test_a_damaged_model_is_refused(finished, tmp_path, damage, named):
    broken = tmp_path / "broken"
    shutil.copytree(finished[0], broken, ignore=shutil.ignore_patterns("checkpoints"))
    damage(broken)
    with pytest.raises(ValueError, match=named):
        from_checkpoint(tmp_path, broken)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_foreign_model_is_refused_with_the_way_to_convert_it(tmp_path):
    config = Dinov2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    new_image_processor(28).save_pretrained(tmp_path / "dinov2")
    with pytest.raises(ValueError, match=r"is a dinov2, not a vitreg.*conversion/convert\.py"):
        from_checkpoint(tmp_path, tmp_path / "dinov2")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"report_to": "wandbb"}, "wandbb is not known or not installed"),
        ({"train_dir": "nowhere"}, "no folder nowhere"),
        ({"model_name_or_path": "nowhere"}, "nowhere"),
        ({"learning_rat": 1}, "learning_rate"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(tmp_path, flags, named):
    with pytest.raises(ValueError, match=named):
        run(tmp_path / "run", **flags)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_sizes_belong_to_new_models(finished, tmp_path):
    with pytest.raises(ValueError, match=r"--hidden_size.*belong to a new model"):
        run(tmp_path / "run", model_name_or_path=finished[0])


def test_an_error_is_one_sentence_and_no_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "finetune.py"), "--train_dir", "nowhere", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, env=client_environment(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Error: There is no folder nowhere" in done.stderr and "Traceback" not in done.stderr


def test_tensorboard_gets_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path / "run", report_to="tensorboard", max_steps=1, eval_steps=1)
    assert list((tmp_path / "run" / "logs").rglob("events.*"))


def test_push_to_hub_publishes_the_run(tmp_path):
    flags = ["--push_to_hub", "--hub_model_id", "org/digits", "--hub_private", "--max_steps", "2"]
    arguments = ["--config", DEBUG, "--output_dir", str(tmp_path / "run"), *flags]
    environment = {**client_environment(tmp_path), "SCRIPT": "finetune", "ARGUMENTS": json.dumps(arguments)}
    with LoopbackHub() as hub:
        refused = run_client(hub, WITH_ARGUMENTS, tmp_path / "home", **{**environment, "HF_TOKEN": ""}, check=False)
        assert "hf auth login" in refused.stderr and not (tmp_path / "run" / "checkpoints").exists()
        run_client(hub, WITH_ARGUMENTS, tmp_path / "home", **environment)
        repository = hub.repos["org/digits"]
        assert repository.private
        assert {*REPOSITORY, ".gitattributes"} - {"metrics.jsonl"} <= set(repository.files())
        assert not any(name.startswith("checkpoints") for name in repository.files())
        assert sum("model.safetensors" in commit.paths for commit in repository.log()) == 1


def test_mixed_precision_of_accelerate(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(tmp_path / "run", max_steps=2, eval_steps=2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())
    assert all(record["train_loss"] > 0 for record in metrics(tmp_path / "run") if "train_loss" in record)


LOAD_FROM_HUB = """
from hf_vitreg.data.datasets import load_labelled_images
from hf_vitreg.recipe import DataOptions

images = load_labelled_images(DataOptions(dataset_name="org/shades", label_column="shade"), seed=0)
print(images.class_names, len(images.train), len(images.validation), images.hub_id, images.display_name)
try:
    load_labelled_images(DataOptions(dataset_name="org/shadows"), seed=0)
except ValueError as error:
    print("refused:", error)
"""


def test_a_dataset_of_the_hub(tmp_path):
    feature = datasets.ClassLabel(names=["light", "dark"])
    path = write_parquet(tmp_path / "a.parquet", ["light", "dark"] * 10, feature, label_column="shade")
    with LoopbackHub() as hub:
        hub.create("datasets/org/shades", files={"data/train-00000-of-00001.parquet": path.read_bytes()})
        done = run_client(hub, LOAD_FROM_HUB, tmp_path / "home", **client_environment(tmp_path))
    assert done.stdout.startswith("['light', 'dark'] 16 4 org/shades org/shades")
    assert "refused: The dataset 'org/shadows' could not be loaded" in done.stdout


def test_fsdp_that_was_asked_for_and_is_not_active_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for"):
        run(tmp_path / "run")


def test_a_folder_with_other_files_is_not_written_to(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        run(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_trained_classifier_follows_the_order_of_the_classes(finished, tmp_path):
    """The classes of the checkpoint under the names of folders, which sort otherwise."""
    names = ["nine", "eight", "seven", "six", "five", "four", "three", "two", "one", "zero"]
    source = shutil.copytree(finished[0], tmp_path / "named", ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((source / "config.json").read_text())
    config["id2label"] = {str(index): name for index, name in enumerate(names)}
    config["label2id"] = {name: index for index, name in enumerate(names)}
    (source / "config.json").write_text(json.dumps(config))
    folder = write_folder(tmp_path / "images", dict.fromkeys(names, 2))
    from_checkpoint(tmp_path, source, train_dir=folder, validation_fraction=0.5, learning_rate=0, ema_decay=0)
    before, after = weights(source), weights(tmp_path / "run")
    for index, name in enumerate(sorted(names)):
        assert torch.equal(after["classifier.bias"][index], before["classifier.bias"][names.index(name)])
        assert torch.equal(after["classifier.weight"][index], before["classifier.weight"][names.index(name)])


def test_both_classifiers_of_a_distilled_model_follow_the_order():
    config = ViTRegConfig(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        use_distillation_token=True,
        classifier_layout="cls_distillation",
        num_labels=3,
    )
    model = ViTRegForImageClassification(config)
    before = [classifier.weight.detach().clone() for classifier in finetune.classifiers(model)]
    finetune.reorder_classes(model, [2, 0, 1])
    assert len(before) == 2
    for classifier, weight in zip(finetune.classifiers(model), before):
        assert torch.equal(classifier.weight, weight[[2, 0, 1]])


def test_a_bad_image_in_a_worker_is_one_sentence(tmp_path, capsys):
    folder = write_folder(tmp_path / "train", {"a": 9, "b": 9})
    (folder / "a" / "003.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit), finetune.errors_for_people():
        run(tmp_path / "run", train_dir=folder, validation_dir=folder, dataloader_num_workers=1, max_steps=1)
    error = capsys.readouterr().err
    assert "003.png cannot be read as an image" in error and "Traceback" not in error
