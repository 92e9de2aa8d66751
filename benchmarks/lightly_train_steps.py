# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""DINOv2 by lightly-train, in an environment of its own, for `pretraining_step.py`, which starts it.

Its method is a Lightning module, and Lightning's trainer runs it, as `lightly_train.pretrain` has it: schedules, the
step, backward, clipping, optimizer, the teacher's update, metrics. Left out are what reads images and what writes
checkpoints, logs and progress.
"""

import warnings

from lightly_train._methods.dinov2.dinov2 import DINOv2, DINOv2AdamWViTArgs, DINOv2Args
from lightly_train._models import package_helpers
from lightly_train._models.embedding_model import EmbeddingModel
from pytorch_lightning import Callback, Trainer
from step_turns import Turns
from torch.utils.data import DataLoader


NUM_STEPS = 125_000  # its default, that schedules are over


class TakesTurns(Callback):
    """All that Lightning does from one batch to the next is a turn."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def on_train_batch_start(self, trainer, method, batch, batch_idx):
        if batch_idx:
            losses = {name.split("/")[-1]: float(value) for name, value in trainer.callback_metrics.items()}
            self.turns.done({name: value for name, value in losses.items() if "loss" in name})
        self.turns.wait()


class Batches:
    """Crops, over and over."""

    def __init__(self, turns: Turns):
        self.views = [
            [*global_crops.unbind(1), *local_crops.unbind(1)] for global_crops, local_crops in turns.batches()
        ]

    def __len__(self) -> int:
        return NUM_STEPS

    def __getitem__(self, index: int) -> dict:
        return {"views": self.views[index % len(self.views)]}


def main():
    turns = Turns()
    setting = turns.setting
    model = package_helpers.get_wrapped_model(
        f"dinov2/{setting['peer_model']}",
        num_input_channels=3,
        model_args={"drop_path_rate": setting["drop_path_rate"], "img_size": setting["global_size"]},
    )
    optimizer_args = DINOv2AdamWViTArgs()
    method_args = DINOv2Args(
        hidden_dim=setting["head_mlp_size"],
        dino_bottleneck_dim=setting["head_bottleneck_size"],
        output_dim=setting["num_prototypes"],
        ibot_separate_head=setting["separate_ibot_head"],
        center_method=setting["centering"],
    )
    method_args.resolve_auto(scaling_info=None, optimizer_args=optimizer_args, wrapped_model=model)
    method = DINOv2(
        method_args=method_args,
        optimizer_args=optimizer_args,
        embedding_model=EmbeddingModel(wrapped_model=model),
        global_batch_size=setting["batch_size"],
        num_input_channels=3,
    )
    student = method.student_embedding_model.wrapped_model.get_model()
    turns.say(
        backbone_parameters=sum(parameter.numel() for parameter in student.parameters()),
        head_parameters=sum(parameter.numel() for parameter in method.student_head.parameters()),
    )
    trainer = Trainer(
        accelerator="gpu" if turns.device.type == "cuda" else "cpu",
        devices=1,
        precision={"float32": "32-true", "bfloat16": "bf16-mixed"}[setting["precision"]],
        max_epochs=1,
        callbacks=[TakesTurns(turns)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    warnings.simplefilter("ignore")
    trainer.fit(method, DataLoader(Batches(turns), batch_size=None))


if __name__ == "__main__":
    main()
