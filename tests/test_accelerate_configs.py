# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The configs of several GPUs and machines, as Accelerate reads them, and the job script of Slurm."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.objectives.dino import DINOObjective
from hf_vitreg.pretrain_recipe import PretrainRecipe


REPOSITORY = Path(__file__).parent.parent
FOLDER = REPOSITORY / "recipes" / "accelerate"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
SLURM = FOLDER / "slurm.sh"
# what the headers leave to their reader
PLACEHOLDERS = {"RANK": "1", "HOST_OF_RANK_0": "node-1", "STEPS": "10"}
# stand in for what only a cluster has; accelerate writes down what it was called with
STAND_INS = {
    "srun": 'shift; SLURM_NODEID=1 "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo node-1; echo node-2; else echo "$@" >> requeued; fi',
    "accelerate": 'printf "%s\\n" "$@" > called.partial; mv called.partial called; sleep ${SECONDS_OF_TRAINING:-0}',
}


def header_command(path: Path) -> list[str]:
    """The words of the first command in a file's header, after `accelerate launch`."""
    lines = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    start = next(number for number, line in enumerate(lines) if line.startswith("accelerate launch"))
    end = next(number for number in range(start, len(lines)) if not lines[number].endswith("\\"))
    words = shlex.split(" ".join(line.removesuffix("\\") for line in lines[start : end + 1]))
    return [PLACEHOLDERS.get(word, word) for word in words[2:]]


def launched(path: Path, monkeypatch):
    """What Accelerate makes of the header's command, on a machine with eight GPUs."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(header_command(path)))
    return arguments


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    assert config.num_processes == 8 * config.num_machines


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_of_the_header_is_one(path, monkeypatch):
    arguments = launched(path, monkeypatch)
    assert arguments.training_script == "pretrain.py"
    recipe = arguments.training_script_args[arguments.training_script_args.index("--config") + 1]
    assert (REPOSITORY / recipe).is_file()
    assert arguments.use_fsdp == path.stem.startswith("fsdp2")
    assert arguments.machine_rank == (1 if path.stem == "multi_node" else 0)


def test_fsdp2_shards_the_layers_of_student_and_teacher(monkeypatch):
    environment = prepare_multi_gpu_env(launched(FOLDER / "fsdp2_vitg.yaml", monkeypatch))
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing is False
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"

    config = ViTRegConfig(
        hidden_size=8, num_hidden_layers=3, num_attention_heads=2, patch_size=4, image_size=8, use_mask_token=True
    )
    objective = DINOObjective(ViTRegModel(config), PretrainRecipe(num_prototypes=7, head_mlp_size=5), total_steps=1)
    shards = fsdp2_prepare_auto_wrap_policy(plugin, objective)
    names = [name for name, module in objective.named_modules() if shards(module)]
    assert names == [
        f"{network}.backbone.encoder.layer.{index}" for network in ("student", "teacher") for index in range(3)
    ]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Runs the job script in a folder, with stand-ins for the programs of a cluster."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in STAND_INS.items():
        program = programs / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    monkeypatch.chdir(tmp_path)

    def start(**environment):
        job = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NNODES": "2", **environment}
        path = f"{programs}:{os.environ['PATH']}"
        command = [str(SLURM), "recipe.yaml", "out put", "--train_shards", "shards/*.tar"]
        return subprocess.Popen(command, env={**os.environ, "PATH": path, **job})

    return start


def calls() -> list[str]:
    return Path("called").read_text().splitlines()


def test_a_job_launches_on_its_machines(cluster):
    assert cluster().wait(timeout=20) == 0
    arguments = launch_command_parser().parse_args(calls()[1:])
    assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (2, 16, 1)
    assert (arguments.main_process_ip, arguments.main_process_port) == ("node-1", 20123)
    assert arguments.training_script_args == [
        *("--config", "recipe.yaml", "--output_dir", "out put", "--train_shards", "shards/*.tar")
    ]


def test_a_job_goes_on_from_its_last_checkpoint(cluster):
    Path("out put/checkpoints/step-00000005").mkdir(parents=True)
    assert cluster().wait(timeout=20) == 0
    assert calls()[-4:] == ["--resume_from_checkpoint", "latest", "--train_shards", "shards/*.tar"]


def test_a_job_is_queued_anew_before_its_time_is_over(cluster):
    job = cluster(SECONDS_OF_TRAINING="2")
    ends = time.monotonic() + 10
    while not Path("called").exists() and time.monotonic() < ends:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=20)
    assert Path("requeued").read_text() == "requeue 123\n"
