# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Checkpoints of a small method with a frozen teacher and a running center: what comes back, and what is refused."""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch import nn

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.machine import package_versions
from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.training.checkpoint import FREE_TO_CHANGE, Checkpoints, RunState
from hf_vitreg.training.run import TrainingDiverged, require_finite


NUM_CLASSES, IMAGE_SIZE, BATCH_SIZE = 11, (21, 35), 4
SAVED_AT, END = 3, 6


class Method(nn.Module):
    """A student, its frozen teacher, and a center that all processes share."""

    _no_split_modules = ("ViTRegEmbeddings", "ViTRegLayer")

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 7}
        config = ViTRegConfig(**sizes, image_size=IMAGE_SIZE, num_register_tokens=2, drop_path_rate=0.3)
        self.student = nn.ModuleDict({"backbone": ViTRegModel(config), "head": nn.Linear(24, NUM_CLASSES)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.center = nn.Buffer(torch.zeros(NUM_CLASSES))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        logits = self._logits(self.student, pixel_values)
        with torch.no_grad():
            targets = self._logits(self.teacher, pixel_values)
            mean = targets.mean(dim=0)
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(mean)
            self.center.lerp_(mean, 0.1)
        return nn.functional.cross_entropy(logits, ((targets - self.center) / 0.1).softmax(dim=-1))

    def _logits(self, network: nn.ModuleDict, pixel_values: torch.Tensor) -> torch.Tensor:
        return network["head"](network["backbone"](pixel_values).last_hidden_state[:, 0])

    @torch.no_grad()
    def after_step(self) -> None:
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters()):
            teacher.lerp_(student, 0.1)


class Run:
    """A loop whose steps depend on nothing but their number and the process."""

    def __init__(self, folder: Path, accelerator: Accelerator, limit: int = 2):
        self.accelerator = accelerator
        torch.manual_seed(0)
        method = Method()
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self.model, self.optimizer = accelerator.prepare(method, torch.optim.AdamW(trained, lr=1e-2))
        self.method = accelerator.unwrap_model(self.model)
        self.checkpoints = Checkpoints(folder, accelerator, limit)

    def steps(self, start: int, end: int) -> None:
        for step in range(start, end):
            torch.manual_seed(100 * step + self.accelerator.process_index)
            self.accelerator.backward(self.model(torch.randn(BATCH_SIZE, 3, *IMAGE_SIZE)))
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.method.after_step()

    def everything(self) -> dict[str, torch.Tensor]:
        """Weights, buffers and moments, whole."""
        moments = self.optimizer.state_dict()["state"]
        tensors = {f"{index}/{name}": each for index, state in moments.items() for name, each in state.items()}
        whole = {**self.model.state_dict(), **tensors}
        return {name: getattr(each, "full_tensor", lambda each=each: each)().clone() for name, each in whole.items()}


def goes_on_to_the_last_bit(folder: Path, accelerator: Accelerator) -> bool:
    """Whether what is saved comes back, and the steps that follow are those of the run that went on."""
    run = Run(folder, accelerator)
    own = {"position": 17 + accelerator.process_index}
    run.steps(0, SAVED_AT)
    run.checkpoints.save(RunState(step=SAVED_AT), PretrainRecipe(), data_state=own)
    saved = run.everything()
    run.steps(SAVED_AT, END)
    uninterrupted = run.everything()
    state, data_state = run.checkpoints.load(run.checkpoints.find("latest"), PretrainRecipe())
    loaded = run.everything()
    run.steps(SAVED_AT, END)
    resumed = run.everything()
    assert state == RunState(step=SAVED_AT) and data_state == own
    assert saved.keys() == loaded.keys() and not torch.equal(saved["0/exp_avg"], uninterrupted["0/exp_avg"])
    return all(
        torch.equal(saved[name], loaded[name]) and torch.equal(uninterrupted[name], resumed[name]) for name in saved
    )


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "checkpoints", Accelerator(cpu=True))


def test_a_run_goes_on_to_the_last_bit(tmp_path):
    assert goes_on_to_the_last_bit(tmp_path / "checkpoints", Accelerator(cpu=True))


PROCESSES = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from test_training_checkpoint import *

torch.set_num_threads(1)
accelerator = {accelerator}
assert accelerator.num_processes == 2
assert goes_on_to_the_last_bit(Path(sys.argv[1]) / "checkpoints", accelerator)
{more}
accelerator.end_training()
"""


def in_two_processes(folder: Path, accelerator: str, more: str = "") -> None:
    tests = Path(__file__).parent
    (folder / "both.py").write_text(PROCESSES.format(accelerator=accelerator, more=more))
    environment = {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent / 'src'}", "ACCELERATE_USE_CPU": "true"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(folder / "both.py"), str(folder)],
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow  # test_pretrain.py has two processes, too
def test_two_processes_go_on_each_where_it_was(tmp_path, run):
    in_two_processes(tmp_path, "Accelerator(cpu=True)")
    (saved,) = run.checkpoints.all()
    positions = [json.loads((saved / f"data_state_{rank}.json").read_text())["position"] for rank in range(2)]
    assert positions == [17, 18]
    with pytest.raises(ValueError, match=r"saved by 2 processes.*there are 1 now\. Resume with --num_processes 2"):
        run.checkpoints.load(saved, PretrainRecipe())


def sharded_on_cpus(state_dict_type: str) -> Accelerator:
    """Accelerate shards on GPUs alone, though torch can do so on CPUs: it has to be told twice."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type=state_dict_type,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def measures_and_watches_what_is_sharded(folder: Path, accelerator: Accelerator) -> None:
    """A part of a sharded model cannot run alone; and no process sees all weights."""
    # seconds of imports, which other processes do not need
    from test_evaluation_monitoring import TRANSFORM, Measuring, coloured, measure_features

    run = Run(folder, accelerator)
    images, how = coloured([0, 1, 2]), Measuring(transform=TRANSFORM, accelerator=accelerator, batch_size=2)
    measured = measure_features(run.method.student["backbone"], images, coloured([2, 1, 0, 1]), how)
    torch.manual_seed(0)
    assert measured == measure_features(Method().student["backbone"], images, coloured([2, 1, 0, 1]), how)
    require_finite(run.model, step=1)
    with torch.no_grad():
        run.method.student["head"].bias.fill_(torch.nan)
    with pytest.raises(TrainingDiverged):
        require_finite(run.model, step=1)


@pytest.mark.slow
@pytest.mark.parametrize("state_dict_type", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_a_sharded_run_with_a_frozen_teacher_goes_on(tmp_path, state_dict_type):
    in_two_processes(
        tmp_path,
        f"sharded_on_cpus({state_dict_type!r})",
        more="measures_and_watches_what_is_sharded(Path(sys.argv[1]), accelerator)",
    )


def test_the_last_and_the_best_are_kept(run):
    state = RunState(best_metric=0.5, best_step=2)
    for state.step in (2, 3, 5, 7):
        run.checkpoints.save(state, PretrainRecipe())
    assert [path.name for path in run.checkpoints.all()] == ["step-00000002", "step-00000005", "step-00000007"]
    assert run.checkpoints.best(state) == run.checkpoints.all()[0]
    loaded, data_state = run.checkpoints.load(run.checkpoints.find("latest"), PretrainRecipe())
    assert loaded == state and data_state is None
    run.checkpoints.rewind(5)
    assert [path.name for path in run.checkpoints.all()] == ["step-00000002", "step-00000005"]


def test_a_checkpoint_says_what_wrote_it(run):
    run.checkpoints.save(RunState(step=1), PretrainRecipe())
    (saved,) = run.checkpoints.all()
    assert json.loads((saved / "versions.json").read_text()) == package_versions()
    assert not list(saved.parent.glob(".*"))


def test_another_recipe_is_refused_and_what_is_free_is_not(run):
    recipe = PretrainRecipe(max_steps=100)
    run.checkpoints.save(RunState(step=1), recipe)
    saved = run.checkpoints.find("latest")
    same = dataclasses.replace(
        recipe, max_train_minutes=5.0, on_collapse="stop", dataloader_prefetch_factor=4, peak_tflops=3.0, save_steps=7
    )
    run.checkpoints.load(saved, same)
    for changed in ({"max_steps": 200}, {"global_crop_size": [32, 48], "local_crop_size": [16, 24]}):
        with pytest.raises(ValueError, match=f"another recipe: .*{next(iter(changed))} was"):
            run.checkpoints.load(saved, dataclasses.replace(recipe, **changed))


def test_what_is_free_to_change_are_flags_that_there_are():
    assert not FREE_TO_CHANGE - {field.name for field in dataclasses.fields(PretrainRecipe)}


@pytest.mark.parametrize("name", ["model.safetensors", "run_state.json", "recipe.yaml", "data_state_0.json"])
def test_a_damaged_checkpoint_is_named(run, name):
    run.checkpoints.save(RunState(step=1), PretrainRecipe(), data_state={"position": 3})
    saved = run.checkpoints.find("latest")
    with (saved / name).open("r+b") as file:
        file.truncate(5)
    with pytest.raises(ValueError, match=rf"{saved.name} (cannot be loaded|belongs to a run with another recipe)"):
        run.checkpoints.load(saved, PretrainRecipe())


KILL = """
import shutil
import signal
from itertools import count
from test_training_checkpoint import *

torch.set_num_threads(1)
moments = [(os, "replace"), (shutil, "rmtree"), (Accelerator, "save_state"), (Path, "write_text")]
folder = Path(sys.argv[1])
run = Run(folder, Accelerator(cpu=True), limit=1)


def killed(number):
    # in a process of its own, at the start of the call of that number
    run.checkpoints.save(RunState(step=2), PretrainRecipe())
    if not (child := os.fork()):
        calls = count(1)
        for owner, name in moments:
            def killing(*arguments, function=getattr(owner, name), **options):
                if next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)
            setattr(owner, name, killing)
        run.checkpoints.save(RunState(step=3), PretrainRecipe())
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


number = 1
while killed(number):
    left = run.checkpoints.all()
    for path in left:
        state, _ = run.checkpoints.load(path, PretrainRecipe())
        assert path.name == f"step-{state.step:08d}"
    print(number, [path.name for path in left], flush=True)
    assert left
    run.checkpoints.save(RunState(step=5), PretrainRecipe())
    assert [path.name for path in folder.iterdir()] == ["step-00000005"]
    run.checkpoints.rewind(0)
    number += 1
"""


def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    tests = Path(__file__).parent
    environment = {"PYTHONPATH": f"{tests}{os.pathsep}{tests.parent / 'src'}", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", KILL, str(tmp_path / "checkpoints")]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    # once the new one is in place it is there beside the old one, which goes last
    last_lines = [line.split(" ", 1)[1] for line in done.stdout.splitlines()]
    assert last_lines[0] == "['step-00000002']" and last_lines[-1] == "['step-00000003']"
    assert "['step-00000002', 'step-00000003']" in last_lines


def test_what_is_not_whole_is_not_seen(tmp_path):
    (tmp_path / "step-00000004").mkdir()
    assert Checkpoints(tmp_path, accelerator=None, limit=2).all() == []
