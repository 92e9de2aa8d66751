# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Pretrains a ViTReg: `accelerate launch pretrain.py [--config recipe.yaml] [--flag value ...]`.

The whole run, read top to bottom: config, data, model, optimizer, loop, export. One loop serves four objectives:
self-supervision (`--objective dino`), labels (`supervised`), text (`clip`) and registers for a model without
(`post_hoc`). Bare, it learns handwritten digits without their labels, and leaves a model repository in
`runs/pretrain-digits`.
"""

import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path


# Before torch: its threads otherwise spin while they wait, and one other busy process slows small steps tenfold.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, send_to_device, set_seed
from accelerate.utils import tqdm as main_process_tqdm
from torch.distributed.fsdp import MixedPrecisionPolicy

from hf_vitreg import ViTRegModel
from hf_vitreg.data.batches import TrainingBatches
from hf_vitreg.data.datasets import data_name
from hf_vitreg.data.orders import MappedOrder, Order, StreamOrder
from hf_vitreg.data.pretraining_data import KNNData, PretrainingData, load_knn_data, load_pretraining_data
from hf_vitreg.data.transforms import EvalTransform, input_size
from hf_vitreg.distributed import derived_seed, is_sharded, require_sharding_as_asked, share_cores, whole
from hf_vitreg.evaluation.monitoring import Measuring
from hf_vitreg.hub.card import CardFacts
from hf_vitreg.hub.export import check_can_publish, publish
from hf_vitreg.machine import describe_machine
from hf_vitreg.matmul import use_fast_float32_matmul
from hf_vitreg.modeling_vitreg import ViTRegLayer
from hf_vitreg.objectives.base import Objective
from hf_vitreg.pretrain_recipe import PretrainRecipe
from hf_vitreg.pretraining.methods import METHODS
from hf_vitreg.pretraining.models import image_processor, require_whole_patches
from hf_vitreg.recipe import parse_recipe, recipe_yaml
from hf_vitreg.training.checkpoint import Checkpoints, RunState
from hf_vitreg.training.collapse import CollapseWatch
from hf_vitreg.training.cost import training_cost
from hf_vitreg.training.metrics import MetricsLog, plot_pretraining_curves
from hf_vitreg.training.optim import Schedule, pretraining_optimizer
from hf_vitreg.training.run import (
    available_trackers,
    check_output_dir,
    console,
    default_output_dir,
    errors_for_people,
    mean_metrics,
    record,
    require_finite,
    tracked,
)
from hf_vitreg.training.throughput import Throughput, peak_flops


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """One run. Returns what was measured last of the model that it wrote."""

    # ------------------------------------------------------------------------------------------------------- config
    recipe = parse_recipe(PretrainRecipe, arguments, prog="pretrain.py")
    first_choice = Path("runs") / f"pretrain-{data_name(recipe)}"
    resumes = recipe.resume_from_checkpoint is not None
    output_dir = Path(recipe.output_dir) if recipe.output_dir else default_output_dir(first_choice, resumes)
    accelerator = Accelerator(
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        log_with=available_trackers(recipe.report_to) or None,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        # one process prepares the data of all, which may take longer than the usual ten minutes
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if accelerator.device.type == "cpu":
        share_cores()
        if use_fast_float32_matmul():
            accelerator.print("Products of float32 matrices by oneDNN, which is faster here and as exact.")
    require_sharding_as_asked(accelerator)
    if is_sharded(accelerator) and not accelerator.is_fsdp2:
        raise ValueError("pretrain.py shards by FSDP2 alone: set fsdp_version to 2 in the config of accelerate.")
    keep_sums_in_float32(accelerator)
    checkpoints = Checkpoints(output_dir / "checkpoints", accelerator, recipe.save_total_limit)
    check_output_dir(output_dir, recipe, checkpoints)
    CardFacts(name=output_dir.name, license=recipe.license)  # refuses now what no card could state at the end
    if recipe.push_to_hub and accelerator.is_main_process:
        check_can_publish(recipe.hub_model_id)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(recipe.seed)

    # --------------------------------------------------------------------------------------------------------- data
    method_class = METHODS[recipe.objective]
    with accelerator.main_process_first():
        data = load_pretraining_data(recipe, method_class.wants, recipe.seed)
        held_out = load_knn_data(recipe, data, recipe.seed)
    processor = image_processor(recipe)
    recipe = dataclasses.replace(recipe, image_size=input_size(processor)[0])
    method = method_class(recipe, data, processor, accelerator, output_dir)
    how = Measuring(
        transform=EvalTransform(processor), accelerator=accelerator, batch_size=recipe.per_device_eval_batch_size
    )
    global_batch_size = recipe.per_device_train_batch_size * accelerator.num_processes
    step_size = global_batch_size * recipe.gradient_accumulation_steps
    steps_per_epoch = (data.num_images or 0) // step_size
    total_steps = recipe.max_steps or recipe.num_train_epochs * steps_per_epoch
    if not total_steps:
        raise ValueError(
            f"{data.num_images} training images do not fill a step of {step_size}: lower "
            "--per_device_train_batch_size, or give --max_steps."
        )

    # -------------------------------------------------------------------------------------------------------- model
    objective = method.objective(total_steps)
    require_whole_patches(recipe, objective.features().config)
    cost = training_cost(recipe, objective, accelerator.num_processes)
    if recipe.gradient_checkpointing:
        for backbone in (module for module in objective.modules() if isinstance(module, ViTRegModel)):
            backbone.activation_checkpointing_enable()
    if recipe.torch_compile:
        for layer in (module for module in objective.modules() if isinstance(module, ViTRegLayer)):
            layer.compile()

    # ---------------------------------------------------------------------------------------------------- optimizer
    num_layers = objective.features().config.num_hidden_layers
    optimizer = pretraining_optimizer(objective, num_layers, recipe)
    schedule = Schedule(recipe, total_steps, step_size, **method.held_back())
    objective, optimizer = accelerator.prepare(objective, optimizer)
    bare_objective = accelerator.unwrap_model(objective)

    # --------------------------------------------------------------------------------------------------------- loop
    batches = TrainingBatches(
        training_order(data, recipe, accelerator),
        method.transform(),
        method.collate(),
        on_device(method.finish(bare_objective), accelerator.device),
        recipe.per_device_train_batch_size,
        recipe.seed,
        recipe.dataloader_num_workers,
        recipe.dataloader_prefetch_factor,
        recipe.on_bad_image,
        method.wants,
    )
    state = RunState(steps_per_epoch=steps_per_epoch)
    log = MetricsLog(output_dir / "metrics.jsonl")
    if resumes:
        state, data_state = checkpoints.load(checkpoints.find(recipe.resume_from_checkpoint), recipe)
        batches.load_state(data_state)
        if state.steps_per_epoch != steps_per_epoch:
            raise ValueError(
                f"The run had {state.steps_per_epoch} steps an epoch and would have {steps_per_epoch} now: resume it "
                "with the same data."
            )
        accelerator.print(f"Resumed at step {state.step} of {total_steps}.")
    if accelerator.is_main_process:
        log.rewind(state.step if resumes else -1)
        checkpoints.rewind(state.step)
    accelerator.init_trackers("pretrain", config=tracked(recipe))
    eval_steps = recipe.eval_steps or max(1, total_steps // 10)
    save_steps = recipe.save_steps or eval_steps
    watch = CollapseWatch(recipe)
    throughput = Throughput(
        cost.flops_per_image, run_peak_flops(recipe, accelerator), accelerator.num_processes, accelerator.device
    )
    measured = {}
    if state.step == 0:
        measured = method.measure(bare_objective, held_out, how)
        record(accelerator, log, 0, **measured)
    started = time.perf_counter() - state.seconds
    logged = []
    progress = main_process_tqdm(total=total_steps, initial=state.step, desc="pretraining", unit="step", leave=False)
    objective.train()

    while state.step < total_steps:
        batch = next(batches)
        # Stochastic depth of a batch depends on nothing but the batch: a resumed run repeats it.
        torch.manual_seed(derived_seed(recipe.seed, batches.num_batches, accelerator.process_index))
        schedule.apply(optimizer, state.step)
        with accelerator.accumulate(objective):
            loss, metrics = objective(batch, state.step)
            accelerator.backward(loss)
            if accelerator.sync_gradients and recipe.max_grad_norm:
                clip_gradients(accelerator, bare_objective, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        logged.append((state.step + 1, {"train_loss": loss.detach(), **metrics}))
        throughput.step(recipe.per_device_train_batch_size)
        if not accelerator.sync_gradients:
            continue

        bare_objective.after_step(state.step)
        state.step += 1
        state.seconds = time.perf_counter() - started
        progress.update()
        is_last = state.step == total_steps or out_of_time(recipe, state, accelerator)
        evaluates = state.step % eval_steps == 0 or is_last
        saves = state.step % save_steps == 0 or is_last
        if state.step % recipe.logging_steps == 0 or evaluates or saves:
            means = mean_metrics(accelerator, logged)
            logged.clear()
            require_finite(bare_objective, state.step)
            progress.set_postfix(loss=f"{means['train_loss']:.3f}", **shown(measured, method.best_metric))
            record(
                accelerator,
                log,
                state.step,
                **means,
                **throughput.read(),
                learning_rate=schedule.learning_rate(state.step - 1),
                bad_images=over_processes(accelerator, batches.num_bad),
            )
            warn(accelerator, watch.check(means, state.step))
        if evaluates or saves:
            with throughput.paused():
                if evaluates:
                    measured = method.measure(bare_objective, held_out, how)
                    record(accelerator, log, state.step, **measured)
                    warn(accelerator, watch.check(measured, state.step))
                    # where nothing can be classified the last is the best
                    metric = measured.get(method.best_metric, state.step)
                    if metric > state.best_metric:
                        state.best_metric, state.best_step = metric, state.step
                        saves = True
                if saves:
                    checkpoints.save(state, recipe, data_state=batches.state())
        if is_last:
            break
    progress.close()
    batches.close()

    # ------------------------------------------------------------------------------------------------------- export
    if not measured:  # resumed where all steps were done
        measured = method.measure(bare_objective, held_out, how)
    num_bad = over_processes(accelerator, batches.num_bad)
    exported = bare_objective.exportable()
    state_dict = exported_state_dict(accelerator, exported)
    if accelerator.is_main_process:
        plot_pretraining_curves(
            log.read(), output_dir / "curves.png", title=f"{data.display_name}: {recipe.objective}"
        )
        facts = card_facts(recipe, data, held_out, measured, state, arguments, accelerator)
        files = {"recipe.yaml": recipe_yaml(recipe)}
        method.write(output_dir, exported, facts, files, state_dict)
        console.print(f"[bold]{output_dir}[/bold]: {summary(measured)}")
        if num_bad:
            console.print(f"{num_bad} images could not be read; others took their place.")
        if recipe.push_to_hub:
            console.print("Published:", publish(output_dir, recipe.hub_model_id, private=recipe.hub_private))
    accelerator.end_training()
    return measured


# --------------------------------------------------------------------------------------------------------------- parts


def training_order(data: PretrainingData, recipe: PretrainRecipe, accelerator: Accelerator) -> Order:
    """Which images this process trains on, and when."""
    processes = accelerator.process_index, accelerator.num_processes
    if data.num_images is None:
        return StreamOrder(data.dataset, recipe.seed, recipe.shuffle_buffer_size, *processes)
    repetitions = recipe.num_repeated_augmentations if recipe.objective == "supervised" else 1
    return MappedOrder(data.dataset, recipe.seed, recipe.per_device_train_batch_size, *processes, repetitions)


def on_device(finish: Callable[[dict, int], dict], device: torch.device) -> Callable[[dict, int], dict]:
    """What is left to do to a batch is done where it is trained on."""

    def finished(batch: dict, number: int) -> dict:
        return send_to_device(finish(send_to_device(batch, device, non_blocking=True), number), device)

    return finished


def run_peak_flops(recipe: PretrainRecipe, accelerator: Accelerator) -> float | None:
    """Operations a second of one device at best: what the recipe says, or what is known or measured."""
    if recipe.peak_tflops is not None:
        return recipe.peak_tflops * 1e12
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    return peak_flops(accelerator.device, dtype)


def keep_sums_in_float32(accelerator: Accelerator) -> None:
    """Accelerate's FSDP2 would give losses, masks' weights and the sums of gradients over processes in bfloat16."""
    if is_sharded(accelerator) and accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


def clip_gradients(accelerator: Accelerator, objective: Objective, max_norm: float) -> None:
    """Each trained module's gradient on its own, as DINOv2 does."""
    accelerator.unscale_gradients()
    for module in objective.trained().values():
        torch.nn.utils.clip_grad_norm_(module.parameters(), max_norm)


def out_of_time(recipe: PretrainRecipe, state: RunState, accelerator: Accelerator) -> bool:
    """Whether the run has had its minutes. Collective, now and then."""
    if recipe.max_train_minutes is None or state.step % recipe.logging_steps:
        return False
    seconds = torch.tensor(state.seconds, device=accelerator.device)
    # all processes stop at the same step
    return accelerator.reduce(seconds, reduction="mean").item() >= 60 * recipe.max_train_minutes


def over_processes(accelerator: Accelerator, number: int) -> int:
    """The sum of what each process has. Collective."""
    return accelerator.reduce(torch.tensor(number, device=accelerator.device), reduction="sum").item()


def warn(accelerator: Accelerator, messages: Sequence[str]) -> None:
    """Once, whatever the number of processes."""
    for message in messages:
        accelerator.print(f"Warning: {message}")


def exported_state_dict(accelerator: Accelerator, exported: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """Whole weights of what is exported, where they are sharded; `None` where it has them itself. Collective."""
    if not is_sharded(accelerator):
        return None
    return {name: whole(tensor).cpu() for name, tensor in exported.state_dict().items()}


def shown(measured: dict[str, float], metric: str) -> dict[str, str]:
    """The metric for the progress bar, where it was measured."""
    return {metric: f"{measured[metric]:.3f}"} if metric in measured else {}


def summary(measured: dict[str, float]) -> str:
    """What was measured, in a line."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items())


def card_facts(
    recipe: PretrainRecipe,
    data: PretrainingData,
    held_out: KNNData,
    measured: dict[str, float],
    state: RunState,
    arguments: Sequence[str] | None,
    accelerator: Accelerator,
) -> CardFacts:
    """What this run measured and was told."""
    path = recipe.model_name_or_path
    flags = shlex.join(sys.argv[1:] if arguments is None else arguments)
    return CardFacts(
        name=recipe.hub_model_id or f"ViTReg pretrained on {data.display_name}",
        license=recipe.license,
        base_model=path if path and not Path(path).exists() else None,
        datasets=(data.hub_id,) if data.hub_id else (),
        dataset_name=data.display_name,
        dataset_type=data.builder,
        num_train_images=data.num_images,
        num_validation_images=len(held_out.validation),
        metrics={name: value for name, value in measured.items() if name.endswith("accuracy")},
        recipe=dataclasses.asdict(recipe),
        command=f"accelerate launch pretrain.py {flags}".strip(),
        machine=describe_machine(accelerator.device),
        seconds=state.seconds,
        curves="curves.png",
        notes=f"These are the weights of step {state.step}, the last of the run: the teacher's in self-supervision, "
        "those of the moving average where there is one. Measured of them, norms being those of patches at the output "
        f"of the last layer: {summary(measured)}.",
    )


if __name__ == "__main__":
    with errors_for_people():
        main()
