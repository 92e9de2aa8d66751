# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Fine-tunes a ViTReg classifier: `accelerate launch finetune.py [--config recipe.yaml] [--flag value ...]`.

The whole run, read top to bottom: config, data, model, optimizer, loop. Bare, it trains a small model with registers
on the handwritten digits that scikit-learn ships, and leaves a model repository in `runs/digits`.
"""

import contextlib
import dataclasses
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path


# Before torch: its threads otherwise spin while they wait, and one other busy process slows small steps tenfold.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration, set_seed
from accelerate.utils import tqdm as main_process_tqdm
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoConfig, AutoImageProcessor, pipeline

from hf_vitreg import ViTRegConfig, ViTRegForImageClassification, ViTRegModel
from hf_vitreg.analysis.norms import token_norms
from hf_vitreg.data.collate import collate, mixing
from hf_vitreg.data.datasets import (
    IGNORED_LABEL,
    LabelledImages,
    PreparedImages,
    data_name,
    load_labelled_images,
    read_image,
)
from hf_vitreg.data.transforms import (
    EvalTransform,
    input_size,
    new_image_processor,
    resized_image_processor,
    train_transform,
)
from hf_vitreg.distributed import derived_seed, is_sharded, require_sharding_as_asked, share_cores
from hf_vitreg.evaluation.monitoring import patch_outliers
from hf_vitreg.hub.card import CardFacts
from hf_vitreg.hub.export import check_can_publish, publish, write_model_repository
from hf_vitreg.machine import describe_machine
from hf_vitreg.matmul import use_fast_float32_matmul
from hf_vitreg.metrics.accuracy import Accuracy
from hf_vitreg.objectives.packing import prepare_for_images
from hf_vitreg.recipe import FinetuneRecipe, ModelOptions, parse_recipe, recipe_yaml
from hf_vitreg.training.checkpoint import Checkpoints, RunState
from hf_vitreg.training.metrics import MetricsLog, plot_curves
from hf_vitreg.training.optim import adamw, set_learning_rate
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
from hf_vitreg.training.schedules import warmup_cosine


NEW_MODEL_IMAGE_SIZE = 32
NEW_MODEL_ONLY = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "patch_size",
    "num_register_tokens",
    "register_init_std",
)
PREDICTIONS_SHOWN = 10


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """One run. Returns the validation metrics of the model that it wrote."""

    # ------------------------------------------------------------------------------------------------------- config
    recipe = parse_recipe(FinetuneRecipe, arguments, prog="finetune.py")
    resumes = recipe.resume_from_checkpoint is not None
    output_dir = Path(recipe.output_dir or default_output_dir(Path("runs") / data_name(recipe), resumes))
    accelerator = Accelerator(
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=recipe.seed),
        log_with=available_trackers(recipe.report_to) or None,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    if accelerator.device.type == "cpu":
        share_cores()
        if use_fast_float32_matmul():
            accelerator.print("Products of float32 matrices by oneDNN, which is faster here and as exact.")
    require_sharding_as_asked(accelerator)
    if recipe.ema_decay and is_sharded(accelerator):
        raise ValueError("--ema_decay averages whole models: use it without FSDP and DeepSpeed, or set it to 0.")
    checkpoints = Checkpoints(output_dir / "checkpoints", accelerator, recipe.save_total_limit)
    check_output_dir(output_dir, recipe, checkpoints)
    CardFacts(name=output_dir.name, license=recipe.license)  # refuses now what no card could state at the end
    if recipe.push_to_hub and accelerator.is_main_process:
        check_can_publish(recipe.hub_model_id)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(recipe.seed)

    # --------------------------------------------------------------------------------------------------------- data
    with accelerator.main_process_first():
        images = load_labelled_images(recipe, recipe.seed)
    processor = build_processor(recipe)
    train_images = PreparedImages(
        images.train, train_transform(processor, recipe), recipe.seed, recipe.on_bad_image, replace_bad=True
    )
    validation_images = PreparedImages(
        images.validation, EvalTransform(processor), recipe.seed, recipe.on_bad_image, replace_bad=False
    )
    workers = {"num_workers": recipe.dataloader_num_workers, "collate_fn": collate}
    train_loader = torch.utils.data.DataLoader(
        train_images, batch_size=recipe.per_device_train_batch_size, shuffle=True, **workers
    )
    validation_loader = torch.utils.data.DataLoader(
        validation_images, batch_size=recipe.per_device_eval_batch_size, **workers
    )
    mix = mixing(recipe, len(images.class_names))

    # -------------------------------------------------------------------------------------------------------- model
    model = build_model(recipe, images.class_names, processor)
    if recipe.freeze_backbone:
        model.vitreg.requires_grad_(False)
    if recipe.gradient_checkpointing:
        model.activation_checkpointing_enable()
    # Accelerate finds by the name of the layers' class where FSDP is to cut
    if not is_sharded(accelerator):
        prepare_for_images(model)

    # ---------------------------------------------------------------------------------------------------- optimizer
    optimizer = adamw(model, model.config.num_hidden_layers, recipe)
    model, optimizer, train_loader, validation_loader = accelerator.prepare(
        model, optimizer, train_loader, validation_loader
    )
    bare_model = accelerator.unwrap_model(model)
    ema = None
    if recipe.ema_decay:
        ema = AveragedModel(bare_model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay))
    steps_per_epoch = math.ceil(len(train_loader) / recipe.gradient_accumulation_steps)
    total_steps = recipe.max_steps or recipe.num_train_epochs * steps_per_epoch
    warmup_steps = round(recipe.warmup_ratio * total_steps)
    eval_steps, save_steps = recipe.eval_steps or steps_per_epoch, recipe.save_steps or steps_per_epoch

    # --------------------------------------------------------------------------------------------------------- loop
    state = RunState(steps_per_epoch=steps_per_epoch)
    log = MetricsLog(output_dir / "metrics.jsonl")
    if recipe.resume_from_checkpoint:
        state, _ = checkpoints.load(checkpoints.find(recipe.resume_from_checkpoint), recipe, ema)
        if state.steps_per_epoch != steps_per_epoch:
            raise ValueError(
                f"The run had {state.steps_per_epoch} steps an epoch and would have {steps_per_epoch} now: resume it "
                "with the same data and the same number of processes."
            )
        accelerator.print(f"Resumed at step {state.step} of {total_steps}.")
    if accelerator.is_main_process:
        log.rewind(state.step)
        checkpoints.rewind(state.step)
    accelerator.init_trackers("finetune", config=tracked(recipe))
    started = time.perf_counter() - state.seconds
    losses = []
    progress = main_process_tqdm(total=total_steps, initial=state.step, desc="fine-tuning", unit="step", leave=False)

    while state.step < total_steps:
        epoch = state.step // steps_per_epoch
        train_loader.set_epoch(epoch)
        train_images.set_epoch(epoch)  # with several processes the loader forgets to
        batches_done = state.step % steps_per_epoch * recipe.gradient_accumulation_steps
        train_mode(model, recipe)
        for batch_index, batch in enumerate(
            accelerator.skip_first_batches(train_loader, batches_done), start=batches_done
        ):
            # Mixing, dropout and stochastic depth of a step depend on nothing but the step: a resumed run repeats it.
            torch.manual_seed(derived_seed(recipe.seed, epoch, batch_index, accelerator.process_index))
            pixel_values, targets = mix(batch["pixel_values"], batch["labels"])
            set_learning_rate(
                optimizer,
                warmup_cosine(
                    state.step + 1,
                    total_steps,
                    warmup_steps,
                    start=0.0,
                    peak=recipe.learning_rate,
                    end=recipe.learning_rate * recipe.min_learning_rate_ratio,
                ),
            )
            with accelerator.accumulate(model):
                logits = model(pixel_values=pixel_values).logits
                loss = functional.cross_entropy(logits.float(), targets, label_smoothing=recipe.label_smoothing_factor)
                accelerator.backward(loss)
                if accelerator.sync_gradients and recipe.max_grad_norm:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            losses.append((state.step + 1, {"loss": loss.detach()}))
            if not accelerator.sync_gradients:
                continue

            state.step += 1
            state.seconds = time.perf_counter() - started
            if ema is not None:
                ema.update_parameters(bare_model)
            progress.update()
            is_last = state.step == total_steps
            evaluates = state.step % eval_steps == 0 or is_last
            saves = state.step % save_steps == 0 or is_last
            if state.step % recipe.logging_steps == 0 or evaluates or saves:
                train_loss = mean_metrics(accelerator, losses)["loss"]
                losses.clear()
                require_finite(bare_model, state.step)
                learning_rate = max(group["lr"] for group in optimizer.param_groups)
                progress.set_postfix(loss=f"{train_loss:.3f}", accuracy=f"{max(state.best_metric, 0):.3f}")
                record(accelerator, log, state.step, train_loss=train_loss, learning_rate=learning_rate)
            if evaluates:
                evaluated = model if ema is None else ema.module
                metrics = evaluate(evaluated, validation_loader, accelerator)
                train_mode(model, recipe)
                record(accelerator, log, state.step, **metrics)
                if metrics["validation_accuracy"] > state.best_metric:
                    state.best_metric, state.best_step = metrics["validation_accuracy"], state.step
                    saves = True
            if saves:
                checkpoints.save(state, recipe, ema)
            if is_last:
                break
    progress.close()

    # ------------------------------------------------------------------------------------------------------- export
    checkpoints.load(checkpoints.best(state), recipe, ema)
    best_model = model if ema is None else ema.module
    metrics = evaluate(best_model, validation_loader, accelerator)
    state_dict = accelerator.get_state_dict(model) if ema is None else ema.module.state_dict()
    if accelerator.is_main_process:
        plot_curves(log.read(), output_dir / "curves.png", title=f"{images.display_name}: fine-tuning")
        facts = card_facts(recipe, images, metrics, state, arguments, accelerator)
        num_left_out = len(images.validation) - facts.num_validation_images
        if num_left_out:
            console.print(f"{num_left_out} validation images could not be read and are in no number.")
        files = {"recipe.yaml": recipe_yaml(recipe)}
        write_model_repository(output_dir, bare_model, processor, facts, files, state_dict)
        console.print(f"[bold]{output_dir}[/bold]: validation accuracy {metrics['validation_accuracy']:.4f}")
        show_predictions(output_dir, images)
        if recipe.push_to_hub:
            console.print("Published:", publish(output_dir, recipe.hub_model_id, private=recipe.hub_private))
    accelerator.end_training()
    return metrics


# --------------------------------------------------------------------------------------------------------------- parts


def build_processor(recipe: FinetuneRecipe):
    """The checkpoint's image processor, for another size where one is asked for, or a new one."""
    if recipe.model_name_or_path is None:
        return new_image_processor(recipe.image_size or NEW_MODEL_IMAGE_SIZE)
    try:
        processor = AutoImageProcessor.from_pretrained(recipe.model_name_or_path, revision=recipe.revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"{recipe.model_name_or_path} has no image processor that loads: {error}") from error
    return resized_image_processor(processor, recipe.image_size) if recipe.image_size else processor


def build_model(recipe: FinetuneRecipe, class_names: list[str], processor) -> ViTRegForImageClassification:
    """A new model of the recipe's sizes, or its checkpoint with a head for these classes.

    Raises:
        ValueError: for a checkpoint that is no ViTReg, damaged or incomplete, or has another number of classes.
    """
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: label for label, name in enumerate(class_names)},
    }
    options = {"drop_path_rate": recipe.drop_path_rate, "attn_implementation": recipe.attn_implementation, **labels}
    if recipe.classifier_layout:
        options["classifier_layout"] = recipe.classifier_layout
    if recipe.model_name_or_path is None:
        sizes = {name: getattr(recipe, name) for name in NEW_MODEL_ONLY}
        config = ViTRegConfig(image_size=input_size(processor)[0], **sizes, **options)
        return ViTRegForImageClassification(config)
    return load_checkpoint(recipe, options)


def load_checkpoint(recipe: FinetuneRecipe, options: dict) -> ViTRegForImageClassification:
    """The checkpoint of the recipe; only its classifier may be new."""
    path = recipe.model_name_or_path
    defaults = {field.name: field.default for field in dataclasses.fields(ModelOptions)}
    changed = [name for name in NEW_MODEL_ONLY if getattr(recipe, name) != defaults[name]]
    if changed:
        raise ValueError(f"--{', --'.join(changed)} belong to a new model, but --model_name_or_path {path} was given.")
    try:
        config = AutoConfig.from_pretrained(path, revision=recipe.revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model_name_or_path {path} is no model folder and no repository that loads: {error}"
        ) from error
    if not isinstance(config, ViTRegConfig):
        raise ValueError(
            f"{path} is a {config.model_type}, not a vitreg: convert it with conversion/convert.py first."
        )
    num_labels = len(options["id2label"])
    has_classifier = any("ForImageClassification" in name for name in config.architectures or ())
    named = any(name != f"LABEL_{label}" for label, name in config.id2label.items())
    same_classes = set(config.label2id) == set(options["label2id"]) if named else config.num_labels == num_labels
    if has_classifier and not same_classes and not recipe.ignore_mismatched_sizes:
        raise ValueError(
            f"{path} has {config.num_labels} classes ({shortened(config.label2id)}), the data {num_labels} "
            f"({shortened(options['label2id'])}). Give --ignore_mismatched_sizes to train a new classifier."
        )
    try:
        model, report = ViTRegForImageClassification.from_pretrained(
            path,
            revision=recipe.revision,
            ignore_mismatched_sizes=recipe.ignore_mismatched_sizes,
            output_loading_info=True,
            dtype=torch.float32,
            **options,
        )
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    heads = ("classifier.", "distillation_classifier.")
    missing = sorted(key for key in report["missing_keys"] if has_classifier or not key.startswith(heads))
    if missing or report["unexpected_keys"]:
        raise ValueError(
            f"{path} is incomplete or foreign. Missing: {missing}; unexpected: {report['unexpected_keys']}."
        )
    if has_classifier and same_classes and named:
        reorder_classes(model, [config.label2id[name] for name in options["label2id"]])
    elif has_classifier and not same_classes:
        for classifier in classifiers(model):
            classifier.reset_parameters()
    return model


def classifiers(model: ViTRegForImageClassification) -> list[torch.nn.Linear]:
    """One, or with a distillation token two."""
    return [head for head in (model.classifier, model.distillation_classifier) if head is not None]


@torch.no_grad()
def reorder_classes(model: ViTRegForImageClassification, order: list[int]) -> None:
    """Puts the rows of trained classifiers in the order that the data give their classes."""
    for classifier in classifiers(model):
        for parameter in classifier.parameters():
            parameter.copy_(parameter[order].clone())


def shortened(names: Iterable[str]) -> str:
    """The first few of many names."""
    names = list(names)
    return ", ".join(names[:5]) + (", .." if len(names) > 5 else "")


def train_mode(model: torch.nn.Module, recipe: FinetuneRecipe) -> None:
    """Training mode, but no stochastic depth in features that nobody adapts."""
    model.train()
    if recipe.freeze_backbone:
        for module in model.modules():
            if isinstance(module, ViTRegModel):
                module.eval()


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader, accelerator: Accelerator) -> dict[str, float]:
    """Accuracy and cross-entropy over the validation images, each counted once whatever the number of processes.

    And outliers among the norms of patches, which show whether new registers take over.
    """
    model.eval()
    num_prefix_tokens = accelerator.unwrap_model(model).config.num_prefix_tokens
    accuracy = Accuracy(keep_in_memory=True)
    patch_norms = []
    total_loss = 0.0
    num_images = 0
    for batch in main_process_tqdm(loader, desc="validating", unit="batch", leave=False):
        with accelerator.autocast():
            outputs = model(pixel_values=batch["pixel_values"], output_hidden_states=[-1])
        logits = outputs.logits.float()
        norms = token_norms(outputs.hidden_states[-1][:, num_prefix_tokens:])
        losses = functional.cross_entropy(logits, batch["labels"], reduction="none", ignore_index=IGNORED_LABEL)
        predictions, labels, losses, norms = accelerator.gather_for_metrics(
            (logits.argmax(dim=-1), batch["labels"], losses, norms)
        )
        patch_norms.append(norms.cpu())
        accuracy.add_batch(predictions=predictions.cpu(), references=labels.cpu())
        total_loss += losses.sum().item()
        num_images += (labels != IGNORED_LABEL).sum().item()
    return {
        "validation_accuracy": accuracy.compute()["accuracy"],
        "validation_loss": total_loss / num_images,
        "validation_images": num_images,
        **patch_outliers(torch.cat(patch_norms)),
    }


def card_facts(
    recipe: FinetuneRecipe,
    images: LabelledImages,
    metrics: dict[str, float],
    state: RunState,
    arguments: Sequence[str] | None,
    accelerator: Accelerator,
) -> CardFacts:
    """What this run measured and was told."""
    path = recipe.model_name_or_path
    flags = shlex.join(sys.argv[1:] if arguments is None else arguments)
    return CardFacts(
        name=recipe.hub_model_id or f"ViTReg fine-tuned on {images.display_name}",
        license=recipe.license,
        base_model=path if path and not Path(path).exists() else None,
        datasets=(images.hub_id,) if images.hub_id else (),
        dataset_name=images.display_name,
        dataset_type=images.builder,
        dataset_split=images.validation_split,
        num_train_images=len(images.train),
        num_validation_images=metrics["validation_images"],
        metrics={"accuracy": metrics["validation_accuracy"], "loss": metrics["validation_loss"]},
        recipe=dataclasses.asdict(recipe),
        command=f"accelerate launch finetune.py {flags}".strip(),
        machine=describe_machine(accelerator.device),
        seconds=state.seconds,
        curves="curves.png",
        notes=f"These are the weights of step {state.best_step}, chosen because they were the best on the same "
        "validation images that are measured above.",
    )


def show_predictions(folder: Path, images: LabelledImages) -> None:
    """Reloads what was written as a user would, and prints predictions beside the true labels."""
    classifier = pipeline("image-classification", model=str(folder), device="cpu")
    table = Table(
        "image", "true label", "predicted", "probability", title=f'pipeline("image-classification", "{folder}")'
    )
    num_images = len(images.validation)
    for index in range(0, num_images, math.ceil(num_images / PREDICTIONS_SHOWN)):
        row = images.validation[index]
        with contextlib.suppress(Exception):  # an image that cannot be read was named before
            best = classifier(read_image(row["image"]), top_k=1)[0]
            true_name = images.class_names[row["label"]]
            mark = "" if best["label"] == true_name else " [red]x[/red]"
            table.add_row(str(index), true_name, best["label"] + mark, f"{best['score']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    with errors_for_people():
        main()
