# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""pretrain.py in process on its debug recipes: what a run leaves, how it goes on, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import safetensors.torch
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from loopback_hub import LoopbackHub, run_client
from sample_images import png, write_folder, write_tar
from script_runs import (
    ROOT,
    WITH_ARGUMENTS,
    assert_equal_weights,
    client_environment,
    killed_in_the_second_save,
    one_thread,
    weights,
)
from transformers import AutoModel, AutoModelForImageClassification

import pretrain
from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.data.transforms import new_image_processor
from hf_vitreg.evaluation.zero_shot import load_dual_encoder
from hf_vitreg.training.collapse import TrainingCollapsed
from hf_vitreg.training.run import TrainingDiverged


OBJECTIVES = ("dino", "supervised", "clip", "post_hoc")
CARD = {"README.md", "config.json", "curves.png", "model.safetensors", "preprocessor_config.json", "recipe.yaml"}
BESIDE_WEIGHTS = {
    "dino": {"configuration_vitreg.py", "modeling_vitreg.py"},
    "supervised": {"configuration_vitreg.py", "modeling_vitreg.py"},
    "clip": {"tokenizer.json", "tokenizer_config.json"},
    "post_hoc": {"configuration_vitreg.py", "modeling_vitreg.py"},
}
# of a resumed run these differ: they are of time and memory
MEASURED = {"images_per_second", "mfu", "memory_gib"}


@pytest.fixture(autouse=True)
def own_accelerator_and_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(pretrain, "share_cores", one_thread)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def recipe(objective: str) -> str:
    return str(ROOT / f"recipes/debug/pretrain_{objective}.yaml")


def starting_model(objective: str, folder: Path) -> list[str]:
    """The flags of what a run starts from: a model without registers, where it is to get some."""
    if objective != "post_hoc":
        return []
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 16}
    ViTRegModel(ViTRegConfig(**sizes, num_register_tokens=0)).save_pretrained(folder / "plain")
    new_image_processor(16).save_pretrained(folder / "plain")
    return ["--model_name_or_path", str(folder / "plain")]


def run(output_dir, objective="dino", *arguments, **flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    named = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    given = ["--config", recipe(objective), "--output_dir", str(output_dir), *map(str, arguments), *named]
    given += starting_model(objective, Path(output_dir).parent)
    return pretrain.main([*given, "--peak_tflops", "1"])


def metrics(output_dir):
    lines = (Path(output_dir) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in MEASURED} for line in lines]


@pytest.fixture(scope="module", params=OBJECTIVES)
def finished(request, tmp_path_factory):
    """One uninterrupted run, with accumulation: its objective, folder and result."""
    output_dir = tmp_path_factory.mktemp(request.param) / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(pretrain, "share_cores", one_thread)
        result = run(output_dir, request.param, gradient_accumulation_steps=2)
    return request.param, output_dir, result


def test_a_run_leaves_a_complete_repository_that_loads(finished):
    objective, output_dir, result = finished
    assert {path.name for path in output_dir.iterdir()} >= CARD | BESIDE_WEIGHTS[objective]
    if objective == "clip":
        assert load_dual_encoder(output_dir).model.config.vision_config.num_register_tokens == 2
        assert 0 <= result["zero_shot_accuracy"] <= 1
    else:
        auto = AutoModelForImageClassification if objective == "supervised" else AutoModel
        model = auto.from_pretrained(output_dir)
        assert model.config.num_register_tokens == 2
        assert not any("head" in name for name in weights(output_dir))
    assert yaml.safe_load((output_dir / "recipe.yaml").read_text())["objective"] == objective


def test_the_log_tells_losses_features_artifacts_and_speed(finished):
    _, output_dir, result = finished
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train_loss" in line]
    measured = [line for line in lines if "outlier_share" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in measured] == [0, 3, 6]
    assert {"knn_accuracy", "max_norm_ratio", "median_norm"} <= measured[0].keys()
    assert {*MEASURED, "learning_rate", "bad_images"} <= trained[0].keys()
    assert {name: measured[-1][name] for name in result} == result


@pytest.mark.parametrize("killed_at", [3, 5])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(finished, tmp_path, monkeypatch, killed_at):
    objective, output_dir, _ = finished
    original = pretrain.mean_metrics

    def killing(accelerator, logged):
        if logged[-1][0] == killed_at:
            raise KeyboardInterrupt
        return original(accelerator, logged)

    monkeypatch.setattr(pretrain, "mean_metrics", killing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", objective, gradient_accumulation_steps=2)
    monkeypatch.setattr(pretrain, "mean_metrics", original)
    # another number of workers changes nothing
    run(
        tmp_path / "run",
        objective,
        gradient_accumulation_steps=2,
        resume_from_checkpoint="latest",
        dataloader_num_workers=1,
    )
    assert_equal_weights(output_dir, tmp_path / "run")
    assert metrics(output_dir) == metrics(tmp_path / "run")


def test_measuring_leaves_no_trace(tmp_path):
    run(tmp_path / "often", eval_steps=1)
    run(tmp_path / "seldom", eval_steps=6)
    assert_equal_weights(tmp_path / "often", tmp_path / "seldom")


@pytest.mark.slow  # as in test_finetune.py
def test_kill_9_during_a_save_leaves_the_checkpoint_before(tmp_path):
    left = killed_in_the_second_save("pretrain", ["--config", recipe("dino"), "--peak_tflops", "1"], tmp_path)
    assert left == {"step-00000002", ".step-00000003.partial"}
    run(tmp_path / "run", resume_from_checkpoint="latest")
    run(tmp_path / "whole")
    assert_equal_weights(tmp_path / "whole", tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


TWO_PROCESSES = """
import json, sys
import pretrain, torch
from accelerate.state import AcceleratorState, GradientState

pretrain.share_cores = lambda: torch.set_num_threads(1)
pretrain.Accelerator.end_training = lambda self: None  # the processes stay together for the next objective
for arguments in json.loads(sys.argv[1]):
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    pretrain.main(arguments)
"""
# without randomness that belongs to a process, and neighbours of all of them
SAME_EVERYWHERE = {
    "dino": ["--drop_path_rate", "0", "--koleo_across_processes", "--teacher_momentum", "0.1"],
    "supervised": ["--mixup_alpha", "0", "--cutmix_alpha", "0", "--ema_decay", "0"],
    "clip": [],
    "post_hoc": [],
}


def test_two_processes_are_one_with_the_same_global_batch(tmp_path):
    """Through torchrun, since `accelerate launch --cpu --num_processes 2` starts one process."""

    def arguments(objective: str, name: str, batch_size: int) -> list[str]:
        # a second step has the first one's rounding in it, which Adam divides by itself
        folder = ["--output_dir", str(tmp_path / objective / name), "--max_steps", "2", "--learning_rate", "1e-3"]
        batch = ["--per_device_train_batch_size", str(batch_size), "--peak_tflops", "1", "--adam_epsilon", "1e-3"]
        same = [*starting_model(objective, tmp_path), *SAME_EVERYWHERE[objective]]
        return ["--config", recipe(objective), *folder, *batch, *same]

    (tmp_path / "both.py").write_text(TWO_PROCESSES)
    runs = json.dumps([arguments(objective, "two", 4) for objective in OBJECTIVES])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "both.py"), runs],
        env=client_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for objective in OBJECTIVES:
        AcceleratorState._reset_state(reset_partial_state=True)
        pretrain.main(arguments(objective, "one", 8))
        pretrain.main([*arguments(objective, "start", 8), "--learning_rate", "0"])
        one, two = weights(tmp_path / objective / "one"), weights(tmp_path / objective / "two")
        start = safetensors.torch.load_file(tmp_path / objective / "start" / "model.safetensors")
        moved = max((tensor - start[name]).abs().max().item() for name, tensor in one.items())
        assert moved > 1e-3, "weights that hardly moved are alike whatever moved them"
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5)
        losses = [
            [line["train_loss"] for line in metrics(tmp_path / objective / name) if "train_loss" in line]
            for name in ("one", "two")
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


SHARDED = """
import sys
import pretrain, torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType

def sharded(**settings):
    # Accelerate shards on GPUs alone, though torch can do so on CPUs: it has to be told twice
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, **settings)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator

pretrain.share_cores = lambda: torch.set_num_threads(1)
pretrain.Accelerator = sharded
pretrain.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sharded_weights_train_as_whole_ones_and_go_on(tmp_path, objective):
    """FSDP2 on two processes against one with the same global batch; then again from the middle."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    shared = ["--config", recipe(objective), "--max_steps", "3", "--save_steps", "1", "--save_total_limit", "5"]
    shared += ["--learning_rate", "1e-4", "--adam_epsilon", "1e-3", "--peak_tflops", "1", *SAME_EVERYWHERE[objective]]
    shared += starting_model(objective, tmp_path)
    folder = ["--output_dir", str(tmp_path / "sharded"), "--per_device_train_batch_size", "4"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for resuming in ([], ["--resume_from_checkpoint", str(tmp_path / "sharded" / "checkpoints" / "step-00000002")]):
        command = [*torchrun, str(tmp_path / "sharded.py"), *shared, *folder, *resuming]
        done = subprocess.run(command, env=client_environment(tmp_path), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        pretrain.main([*shared, "--output_dir", str(tmp_path / "whole"), "--overwrite_output_dir"])
        AcceleratorState._reset_state(reset_partial_state=True)
        whole, sharded = weights(tmp_path / "whole"), weights(tmp_path / "sharded")
        for name, tensor in whole.items():
            torch.testing.assert_close(sharded[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.fixture
def shards(tmp_path):
    """Three tar files of images with captions."""
    for shard in range(3):
        examples = {
            f"{shard}-{index}": {"png": png(index % 3, 10 * shard + index), "txt": b"a red image"}
            for index in range(7)
        }
        write_tar(tmp_path / f"{shard}.tar", examples)
    return str(tmp_path / "*.tar")


def test_a_stream_goes_on_where_it_was(tmp_path, shards, monkeypatch):
    streamed = {"train_shards": shards, "shuffle_buffer_size": 5, "per_device_train_batch_size": 2, "max_steps": 6}
    run(tmp_path / "whole", "clip", "--streaming", **streamed)
    original = pretrain.mean_metrics

    def killing(accelerator, logged):
        if logged[-1][0] == 5:
            raise KeyboardInterrupt
        return original(accelerator, logged)

    monkeypatch.setattr(pretrain, "mean_metrics", killing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", "clip", "--streaming", **streamed)
    monkeypatch.setattr(pretrain, "mean_metrics", original)
    run(tmp_path / "run", "clip", "--streaming", **streamed, resume_from_checkpoint="latest")
    assert_equal_weights(tmp_path / "whole", tmp_path / "run")


def test_images_without_labels_train_and_show_their_outliers(tmp_path, caplog):
    folder = write_folder(tmp_path / "images", {"a": 9, "b": 8})
    (folder / "a" / "broken.png").write_bytes(b"no image")
    measured = run(tmp_path / "run", train_dir=folder, max_steps=3, num_local_crops=1)
    assert "knn_accuracy" not in measured and "outlier_share" in measured
    assert metrics(tmp_path / "run")[-2]["bad_images"] == 1
    assert "broken.png" in caplog.text


def test_a_checkpoint_without_registers_gets_some(tmp_path):
    config = ViTRegConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4, num_register_tokens=0
    )
    ViTRegModel(config).save_pretrained(tmp_path / "plain")
    new_image_processor(16).save_pretrained(tmp_path / "plain")
    sizes = {"hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"}
    lines = Path(recipe("dino")).read_text().splitlines()
    (tmp_path / "recipe.yaml").write_text("\n".join(line for line in lines if line.split(":")[0] not in sizes))
    flags = ["--config", str(tmp_path / "recipe.yaml"), "--model_name_or_path", str(tmp_path / "plain")]
    flags += ["--num_register_tokens", "3", "--head_warmup_ratio", "0.5", "--max_steps", "2", "--peak_tflops", "1"]
    pretrain.main([*flags, "--output_dir", str(tmp_path / "run")])
    model = ViTRegModel.from_pretrained(tmp_path / "run")
    assert model.config.num_register_tokens == 3
    assert model.embeddings.register_tokens.shape == (1, 3, 24)
    with pytest.raises(ValueError, match="belong to a new model"):
        run(tmp_path / "refused", model_name_or_path=tmp_path / "plain")


def test_in_the_head_warmup_the_backbone_stays(tmp_path):
    run(tmp_path / "run", head_warmup_ratio=1.0, max_steps=3, save_steps=1, save_total_limit=5, eval_steps=3)
    saved = [
        safetensors.torch.load_file(tmp_path / "run" / "checkpoints" / f"step-0000000{step}" / "model.safetensors")
        for step in (1, 3)
    ]
    changed = {name for name in saved[0] if not torch.equal(saved[0][name], saved[1][name])}
    assert changed and not any("backbone" in name for name in changed)


def test_what_is_no_number_stops_before_anything_is_saved(tmp_path, monkeypatch):
    forward = pretrain.METHODS["dino"].objective

    def broken(self, total_steps):
        objective = forward(self, total_steps)
        original = objective._koleo
        objective._koleo = lambda cls: original(cls) * (float("nan") if calls.append(1) or len(calls) == 2 else 1)
        return objective

    calls = []
    monkeypatch.setattr(pretrain.METHODS["dino"], "objective", broken)
    with pytest.raises(TrainingDiverged, match="of step 2"):
        run(tmp_path / "run", save_steps=2)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


VARIANTS = {
    "Gram": ("dino", {"gram_weight": 1.0, "gram_start_ratio": 0.5, "gram_crop_size": "[32]"}),
    "sizes": ("dino", {"global_crop_size": "[16,24]", "local_crop_size": "[8,12]"}),
    "DINOv3": ("dino", {"position_embedding_type": "rope", "rope_rescale": 2.0, "separate_ibot_head": "true"}),
    "Sinkhorn": ("dino", {"centering": "sinkhorn_knopp", "pack_crops": "true", "legacy_blur_probability": "true"}),
    "no masks": ("dino", {"ibot_weight": 0.0, "num_register_tokens": 0, "weight_decay_end": 0.2}),
    "LAMB": ("supervised", {"optimizer": "lamb", "num_repeated_augmentations": 2, "train_crop": "simple_random_crop"}),
    "cross entropy": ("supervised", {"classification_loss": "ce", "label_smoothing": 0.1, "ema_decay": 0.0}),
    "SigLIP": ("clip", {"contrastive_loss": "siglip", "ema_decay": 0.9}),
    "no cosine": ("post_hoc", {"cosine_weight": 0.0, "num_views": 1, "view_fill": 0.0, "image_size": 24}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_flags_of_each_objective_train(tmp_path, variant):
    objective, flags = VARIANTS[variant]
    run(tmp_path / "run", objective, max_steps=2, eval_steps=2, **flags)
    trained = [line for line in metrics(tmp_path / "run") if "train_loss" in line]
    assert len(trained) == 2 and ("gram_loss" in trained[-1]) == (variant == "Gram")


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_classifier_is_distilled(tmp_path, kind):
    run(tmp_path / "teacher", "supervised", max_steps=1)
    flags = {"distillation_teacher": tmp_path / "teacher", "distillation": kind, "max_steps": 1}
    run(tmp_path / "run", "supervised", **flags)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.classifier_layout == "cls_distillation"
    assert "distillation_loss" in metrics(tmp_path / "run")[-2]


def test_a_collapse_stops_the_run_with_the_metrics_name(tmp_path):
    with pytest.raises(TrainingCollapsed, match="feature_rank"):
        run(tmp_path / "run", on_collapse="stop", min_feature_rank=1.0)


def test_a_run_that_is_done_is_written_again(tmp_path):
    measured = run(tmp_path / "run")
    assert run(tmp_path / "run", resume_from_checkpoint="latest") == measured


def test_a_run_that_has_had_its_time_ends_with_a_model(tmp_path):
    run(tmp_path / "run", max_train_minutes=0)
    assert metrics(tmp_path / "run")[-1]["step"] == 1
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_compiled_layers_train_the_same(tmp_path):
    run(tmp_path / "plain", max_steps=2, eval_steps=2, drop_path_rate=0.0)
    run(tmp_path / "compiled", "dino", "--torch_compile", max_steps=2, eval_steps=2, drop_path_rate=0.0)
    losses = [[line["train_loss"] for line in metrics(tmp_path / name)[1:3]] for name in ("plain", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    run(tmp_path / "plain", max_steps=2, eval_steps=2)
    run(tmp_path / "checkpointed", "dino", "--gradient_checkpointing", max_steps=2, eval_steps=2)
    plain, checkpointed = weights(tmp_path / "plain"), weights(tmp_path / "checkpointed")
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_mixed_precision_of_accelerate(tmp_path, monkeypatch, objective):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run(tmp_path / "run", objective, max_steps=2, eval_steps=2)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "run").values())


def test_fsdp_that_was_asked_for_and_is_not_active_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for"):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"global_crop_size": "[18]"}, "patch"),
        ({"objective": "clip", "caption_template": "no place"}, "caption_template"),
        ({"train_dir": "nowhere"}, "nowhere"),
        ({"per_device_train_batch_size": 500, "max_steps": ""}, "max_steps"),
        ({"num_prototypes": 0}, "num_prototypes"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_saved(tmp_path, flags, named):
    with pytest.raises(ValueError, match=named):
        run(tmp_path / "run", **flags)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("objective", ["dino", pytest.param("clip", marks=pytest.mark.slow)])
def test_push_to_hub_publishes_weights_card_and_recipe(tmp_path, objective):
    flags = ["--push_to_hub", "--hub_model_id", "org/digits", "--max_steps", "1", "--peak_tflops", "1"]
    arguments = ["--config", recipe(objective), "--output_dir", str(tmp_path / "run"), *flags]
    with LoopbackHub() as hub:
        environment = {**client_environment(tmp_path), "SCRIPT": "pretrain", "ARGUMENTS": json.dumps(arguments)}
        run_client(hub, WITH_ARGUMENTS, tmp_path / "home", **environment)
        files = set(hub.repos["org/digits"].files())
    assert files >= CARD | BESIDE_WEIGHTS[objective]
    assert not any(name.startswith("checkpoints") for name in files)
