# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import PATCH_SIZE, randomize, tiny_config
from torch.nn.functional import cross_entropy, interpolate

from hf_vitreg import ViTRegForSemanticSegmentation, ViTRegModel
from hf_vitreg.evaluation.patch_heads import PatchFeatures
from hf_vitreg.evaluation.segmentation import (
    build_segmentation_model,
    cross_entropy_backward,
    evaluate_segmentation,
    train_segmentation_head,
)
from hf_vitreg.features import VisionEncoder
from hf_vitreg.metrics.mean_iou import MeanIoU


ROWS, COLS = 4, 6
COLORS = torch.tensor([[1.5, -1.0, -1.0], [-1.0, 1.5, -1.0], [-1.0, -1.0, 1.5], [1.0, 1.0, -1.5]])


def colored_blocks(num_images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of blocks of 2x2 patches, each of a color and noise, and which color each pixel has."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, len(COLORS), (num_images, ROWS // 2, COLS // 2), generator=generator)
    masks = blocks.repeat_interleave(2 * PATCH_SIZE, dim=1).repeat_interleave(2 * PATCH_SIZE, dim=2)
    pixel_values = COLORS[masks].permute(0, 3, 1, 2)
    return pixel_values + 0.3 * torch.randn(pixel_values.shape, generator=generator), masks


def features_of(encoder: VisionEncoder, pixel_values: torch.Tensor) -> PatchFeatures:
    tokens = encoder.split(encoder.final(encoder.layers(pixel_values, [-1])[-1])).patches
    return PatchFeatures(tokens[:, None].half(), (ROWS, COLS))


@pytest.fixture(scope="module")
def encoder():
    return VisionEncoder.wrap(randomize(ViTRegModel(tiny_config(num_hidden_layers=2))), "tiny")


@pytest.fixture(scope="module")
def trained(encoder):
    """A head, and the features and masks that it has not seen."""
    pixel_values, masks = colored_blocks(48, seed=0)
    masks = [mask.numpy().astype(np.uint8) for mask in masks]
    losses = []
    head = train_segmentation_head(
        features_of(encoder, pixel_values),
        masks,
        num_classes=4,
        num_steps=120,
        learning_rate=0.02,
        on_step=lambda step, loss: losses.append(loss),
    )
    assert losses[-1] < losses[0] / 3
    pixel_values, masks = colored_blocks(9, seed=1)
    return head, features_of(encoder, pixel_values), masks.numpy(), pixel_values


def test_head_learns_the_blocks_of_an_image(trained):
    head, features, masks, _ = trained
    scores = evaluate_segmentation(head, features, masks, num_classes=4)
    assert scores["mean_iou"] > 0.9
    assert all(iou > 0.85 for iou in scores["per_category_iou"])


def test_scores_are_those_of_the_metric_at_the_size_of_each_target(trained):
    head, features, masks, _ = trained
    # every image at a size of its own, some pixels without a class
    targets = [np.asarray(mask)[: 20 + index, : 30 + 2 * index].astype(np.uint8) for index, mask in enumerate(masks)]
    for index, target in enumerate(targets):
        target[: index + 1] = 255
    metric, seen = MeanIoU(num_classes=4), {}
    scores = evaluate_segmentation(
        head, features, targets.__getitem__, 4, on_image=lambda index, prediction: seen.update({index: prediction})
    )
    for index, target in enumerate(targets):
        with torch.no_grad():
            logits = head(features.map(index)[None].float())
        prediction = interpolate(logits, size=target.shape, mode="bilinear")[0].argmax(dim=0)
        assert torch.equal(seen[index], prediction)
        metric.add(prediction=prediction.numpy(), reference=target)
    assert scores == metric.compute()


def test_built_model_has_the_predictions_and_the_loss_of_the_head(encoder, trained):
    head, _, masks, pixel_values = trained
    model = build_segmentation_model(encoder, [-1], head, ["red", "green", "blue", "yellow"])
    assert type(model) is ViTRegForSemanticSegmentation
    with torch.no_grad():
        output = model(pixel_values, labels=torch.from_numpy(masks))
    predicted = interpolate(output.logits, size=masks.shape[1:], mode="bilinear").argmax(dim=1)
    assert (predicted.numpy() == masks).mean() > 0.9
    logits = output.logits.requires_grad_()
    assert cross_entropy_backward(logits, list(torch.from_numpy(masks))) == pytest.approx(output.loss.item(), rel=1e-5)


def test_loss_of_one_image_after_another_has_the_gradients_of_the_batch():
    logits = torch.randn(3, 5, 4, 6, requires_grad=True)
    labels = torch.randint(0, 5, (3, 9, 13))
    labels[1, :7] = 17
    expected = cross_entropy(interpolate(logits, size=(9, 13), mode="bilinear"), labels, ignore_index=17)
    expected.backward()
    gradient, logits.grad = logits.grad, None
    assert cross_entropy_backward(logits, list(labels), ignore_index=17) == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(logits.grad, gradient)


def test_batch_without_a_class_has_no_loss():
    logits = torch.randn(2, 5, 4, 6, requires_grad=True)
    assert cross_entropy_backward(logits, [torch.full((7, 8), 255), torch.full((3, 2), 255)]) == 0
    assert logits.grad.abs().max() == 0


SMALL = PatchFeatures(torch.randn(5, 2, ROWS * COLS, 3, generator=torch.Generator().manual_seed(0)), (ROWS, COLS))
MASKS = list(torch.randint(0, 4, (5, 16, 18), generator=torch.Generator().manual_seed(0)).numpy())


def small_head(**values):
    return train_segmentation_head(SMALL, MASKS, **{"num_classes": 4, "num_steps": 5, "batch_size": 2, **values})


def test_training_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first = small_head(seed=3).state_dict()
    torch.manual_seed(2)
    second, other = small_head(seed=3).state_dict(), small_head(seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


def test_labels_can_be_brought_to_a_size_for_the_loss():
    nearest = [mask[1::2, 1::2] for mask in MASKS]
    smaller = train_segmentation_head(SMALL, nearest, num_classes=4, num_steps=5, batch_size=2).state_dict()
    asked = small_head(label_size=(8, 9)).state_dict()
    assert all(torch.equal(smaller[name], asked[name]) for name in asked)
    assert not torch.equal(asked["classifier.weight"], small_head().classifier.weight)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (MASKS[:4], "There are 4 targets for the features of 5 images"),
        ([*MASKS[:4], np.full((3, 4), 9)], "Target 4 must hold classes from 0 to 3, or 255 for none.*from 9 to 9"),
        ([*MASKS[:4], np.full((3, 4), -1)], "Target 4 must hold classes .* from -1 to -1"),
        ([*MASKS[:4], np.full((3, 4), 1.0)], r"Target 4 must hold .* as integers.*\(torch.float64\)"),
        ([*MASKS[:4], np.zeros((3, 4, 3), dtype=np.uint8)], r"Target 4 must have shape \(height, width\)"),
    ],
)
def test_targets_that_fit_nothing_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        train_segmentation_head(SMALL, targets, num_classes=4, num_steps=5)


def test_evaluation_names_the_target_that_it_cannot_use():
    head = small_head()
    with pytest.raises(ValueError, match="Target 4: The target has 9 among its values"):
        evaluate_segmentation(head, SMALL, [*MASKS[:4], np.full((3, 4), 9)], 4)
    with pytest.raises(ValueError, match="There are 3 targets for the features of 5 images"):
        evaluate_segmentation(head, SMALL, MASKS[:3], 4)
    with pytest.raises(ValueError, match="every one is ignored"):
        evaluate_segmentation(head, SMALL, [np.full((3, 4), 255)] * 5, 4)


def test_features_that_are_no_numbers_stop_the_training():
    spoiled = PatchFeatures(SMALL.patches.clone().fill_(float("inf")), SMALL.grid)
    with pytest.raises(ValueError, match=r"The loss of step 0 is nan\. Are the features finite"):
        train_segmentation_head(spoiled, MASKS, num_classes=4, num_steps=5)


SCRIPT = """
import sys
import torch
from accelerate import Accelerator
from test_evaluation_depth import DEPTHS, WITH_CLS, small_head as depth_head
from test_evaluation_segmentation import MASKS, SMALL, small_head
from hf_vitreg.evaluation.depth import evaluate_depth
from hf_vitreg.evaluation.segmentation import evaluate_segmentation

torch.set_num_threads(1)
accelerator = Accelerator()
predicted = []
if accelerator.process_index:
    torch.manual_seed(accelerator.process_index)
head = small_head(accelerator=accelerator)
scores = evaluate_segmentation(
    head, SMALL, MASKS, 4, accelerator=accelerator, on_image=lambda index, _: predicted.append(index)
)
depth = depth_head(accelerator=accelerator)
errors = evaluate_depth(depth, WITH_CLS, DEPTHS, accelerator=accelerator)
torch.save(
    {
        "processes": accelerator.num_processes,
        "predicted": predicted,
        "heads": {"segmentation": head.state_dict(), "depth": depth.state_dict()},
        "scores": scores,
        "errors": errors,
    },
    f"{sys.argv[1]}/{accelerator.process_index}.pt",
)
"""


@pytest.mark.slow  # test_evaluation_evaluate.py has two processes, too
def test_two_processes_train_and_evaluate_as_one(tmp_path):
    """Five images, so that one process has more of them than the other."""
    from test_evaluation_depth import DEPTHS, WITH_CLS
    from test_evaluation_depth import small_head as depth_head

    from hf_vitreg.evaluation.depth import evaluate_depth

    (tmp_path / "script.py").write_text(SCRIPT)
    tests = Path(__file__).parent
    python_path = os.pathsep.join([str(tests), str(tests.parent / "src")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "script.py"), str(tmp_path)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    heads = {"segmentation": small_head(), "depth": depth_head()}
    scores = evaluate_segmentation(heads["segmentation"], SMALL, MASKS, 4)
    errors = evaluate_depth(heads["depth"], WITH_CLS, DEPTHS)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [result["predicted"] for result in results] == [[0, 2, 4], [1, 3]]
    for result in results:
        assert result["processes"] == 2
        for task, head in heads.items():
            for name, tensor in head.state_dict().items():
                torch.testing.assert_close(result["heads"][task][name], tensor, rtol=1e-5, atol=1e-6)
        assert result["scores"] == scores
        assert result["errors"] == pytest.approx(errors, rel=1e-5)
