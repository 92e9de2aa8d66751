# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Segmentation and depth: the heads are DINOv2's, the rest is what the backbone says of the same images."""

import math

import original_outputs
import pytest
import torch
from reference import (
    BATCH_SIZE,
    COLS,
    HEIGHT,
    NUM_REGISTERS,
    ROPE,
    ROWS,
    VARIANTS,
    WIDTH,
    WITHOUT_CLS,
    images,
    randomize,
    relative_error,
    tiny_config,
)
from torch.nn.functional import cross_entropy, interpolate
from transformers import Trainer, TrainingArguments

from hf_vitreg import ViTRegBackbone, ViTRegForDepthEstimation, ViTRegForSemanticSegmentation, ViTRegModel
from hf_vitreg.modeling_vitreg import (
    ViTRegDepthHead,
    ViTRegSegmentationHead,
    layers_to_map,
    log_gradient_loss,
    scale_invariant_loss,
)


DENSE_CLASSES = [ViTRegForSemanticSegmentation, ViTRegForDepthEstimation]


def make(model_class, **overrides):
    """A tiny model with every parameter drawn at random, in eval mode."""
    model = randomize(model_class(tiny_config(**overrides)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def labels_of(model, height: int = 23, width: int = 31) -> torch.Tensor:
    if isinstance(model, ViTRegForDepthEstimation):
        return 12 * torch.rand(BATCH_SIZE, height, width)
    labels = torch.randint(0, 11, (BATCH_SIZE, height, width))
    labels[:, : height // 4] = 255
    return labels


# Heads


def test_patches_of_several_layers_become_one_map():
    patches, cls = torch.randn(2, 3, 5 * 7, 11), torch.randn(2, 3, 11)
    plain = layers_to_map(patches, (5, 7))
    assert plain.shape == (2, 3 * 11, 5, 7)
    assert torch.equal(plain[1, 11 : 2 * 11, 4, 2], patches[1, 1, 4 * 7 + 2])
    both = layers_to_map(patches, (5, 7), cls)
    assert both.shape == (2, 3 * 22, 5, 7)
    assert torch.equal(both[1, 22:33, 4, 2], patches[1, 1, 4 * 7 + 2])
    assert torch.equal(both[1, 33:44, 4, 2], cls[1, 1])


def test_segmentation_head_is_that_of_dinov2():
    state, inputs, outputs = original_outputs.load("dinov2_dense_heads")
    head = ViTRegSegmentationHead(10, 7).eval()
    names = {"bn": "batch_norm", "conv_seg": "classifier"}
    own = {name.split(".", 1)[1]: tensor for name, tensor in state.items() if name.startswith("segmentation")}
    head.load_state_dict({f"{names[name.split('.')[0]]}.{name.split('.')[1]}": own[name] for name in own})
    original_outputs.assert_close(head(layers_to_map(inputs["patches"], (3, 4))), outputs["logits"])


def test_depth_head_is_that_of_dinov2():
    state, inputs, outputs = original_outputs.load("dinov2_dense_heads")
    head = ViTRegDepthHead(20, 17, 0.001, 10.0)
    head.load_state_dict({f"classifier.{kind}": state[f"depth_head.conv_depth.{kind}"] for kind in ("weight", "bias")})
    depth = head(layers_to_map(inputs["patches"], (3, 4), inputs["cls"]))
    original_outputs.assert_close(depth, outputs["depth"][:, 0])


def test_depth_is_a_mean_of_depths_computed_by_hand():
    head = ViTRegDepthHead(1, 3, 1.0, 5.0)
    with torch.no_grad():
        head.classifier.weight.zero_()
        head.classifier.bias.copy_(torch.tensor([-7.0, 0.3, 0.9]))
    depth = head(torch.randn(2, 1, 2, 3))
    assert depth.shape == (2, 8, 12)
    torch.testing.assert_close(depth, torch.full((2, 8, 12), (0.1 * 1 + 0.4 * 3 + 1.0 * 5) / 1.5))


# Losses


def test_depth_losses_are_those_of_dinov2():
    _, inputs, outputs = original_outputs.load("dinov2_dense_heads")
    predicted, labels = inputs["predicted"], inputs["labels"]
    original_outputs.assert_close(scale_invariant_loss(predicted, labels, 10.0)[None], outputs["sigloss"])
    warm_up = scale_invariant_loss(predicted, labels, 10.0, warming_up=True)
    original_outputs.assert_close(warm_up[None], outputs["sigloss_warm_up"])
    losses = [log_gradient_loss(*pair, 10.0) for pair in zip(predicted[:, None], labels[:, None])]
    original_outputs.assert_close(torch.stack(losses), outputs["gradientloss"])


def test_scale_invariant_loss_computed_by_hand():
    predicted = torch.tensor([[2.0, 4.0, 5.0, 7.0]]) - 1e-3
    labels = torch.tensor([[1.0, 1.0, 0.0, 11.0]]) - 1e-3
    labels[0, 2] = 0
    logs = [math.log(2), math.log(4)]
    mean = sum(logs) / 2
    variance = sum((log - mean) ** 2 for log in logs)
    loss = scale_invariant_loss(predicted, labels, max_depth=10)
    assert loss.item() == pytest.approx(math.sqrt(variance + 0.15 * mean**2), rel=1e-5)
    warm_up = scale_invariant_loss(predicted, labels, max_depth=10, warming_up=True)
    assert warm_up.item() == pytest.approx(math.sqrt(0.15) * mean, rel=1e-5)


def test_gradient_loss_computed_by_hand():
    """One step in height, seen by both rows beside it; strides of 2 and more see too few rows."""
    labels = torch.ones(1, 4, 3)
    predicted = torch.ones(1, 4, 3)
    predicted[:, 2:] = 3.0
    step = math.log(3.001 / 1.001)
    assert log_gradient_loss(predicted, labels, 10.0).item() == pytest.approx(6 * step / 12, rel=1e-5)
    # one row without labels silences both of its differences
    labels[:, 1] = 0
    assert log_gradient_loss(predicted, labels, 10.0).item() == pytest.approx(3 * step / 9, rel=1e-5)


@pytest.mark.parametrize("nowhere", [0.0, 11.0, float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("loss", [scale_invariant_loss, log_gradient_loss])
def test_pixels_without_depth_leave_no_trace(loss, nowhere):
    predicted = (torch.rand(2, 9, 13) + 1).requires_grad_()
    labels = torch.rand(2, 9, 13) + 1
    labels[:, 3:6] = nowhere
    loss(predicted, labels, 10.0).backward()
    assert predicted.grad.isfinite().all() and predicted.grad[:, 3:6].abs().max() == 0 < predicted.grad.abs().max()
    predicted.grad = None
    value = loss(predicted, torch.full_like(labels, nowhere), 10.0)
    value.backward()
    assert value == 0 and predicted.grad.abs().max() == 0


@pytest.mark.parametrize("loss", [scale_invariant_loss, log_gradient_loss])
def test_perfect_depth_has_no_loss_and_a_finite_gradient(loss):
    labels = torch.rand(2, 9, 13) + 1
    predicted = labels.clone().requires_grad_()
    value = loss(predicted, labels, 10.0)
    value.backward()
    assert value < 1e-5 and predicted.grad.isfinite().all()


@pytest.mark.parametrize("size", [(23, 31), (ROWS, COLS)])
def test_segmentation_loss_is_the_cross_entropy_of_interpolated_logits(size):
    model, pixel_values = make(ViTRegForSemanticSegmentation), images()
    labels = labels_of(model, *size)
    output = model(pixel_values, labels=labels)
    logits = interpolate(output.logits, size=size, mode="bilinear").permute(0, 2, 3, 1)
    counted = labels != 255
    expected = -logits.log_softmax(dim=-1)[counted].gather(1, labels[counted][:, None]).mean()
    torch.testing.assert_close(output.loss, expected)


def test_batch_without_a_class_has_no_loss_and_a_finite_gradient():
    model = make(ViTRegForSemanticSegmentation)
    loss = model(images(), labels=torch.full((BATCH_SIZE, 8, 9), 255)).loss
    loss.backward()
    assert loss == 0 and all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_ignored_label_is_that_of_the_config():
    labels = torch.randint(0, 11, (BATCH_SIZE, 8, 9))
    labels[:, :4] = 10
    model, pixel_values = make(ViTRegForSemanticSegmentation, semantic_loss_ignore_index=10), images()
    output = model(pixel_values, labels=labels)
    logits = interpolate(output.logits, size=(8, 9), mode="bilinear")
    torch.testing.assert_close(output.loss, cross_entropy(logits, labels, ignore_index=10))


@pytest.mark.parametrize("size", [(23, 31), (HEIGHT, WIDTH)])
def test_depth_loss_is_at_the_size_of_the_labels(size):
    model, pixel_values = make(ViTRegForDepthEstimation, max_depth=8.0), images()
    labels = labels_of(model, *size)
    output = model(pixel_values, labels=labels)
    head = model.depth_head
    depth = head(model._read(pixel_values, with_cls=True)[0])[:, None]
    fitted = interpolate(depth, size=size, mode="bilinear")[:, 0]
    expected = scale_invariant_loss(fitted, labels, 8.0) + 0.5 * log_gradient_loss(fitted, labels, 8.0)
    torch.testing.assert_close(output.loss, expected)
    if size == (HEIGHT, WIDTH):
        torch.testing.assert_close(output.predicted_depth, fitted)


# Models


@pytest.mark.parametrize("size", [(28, 35), (63, 14)])
@pytest.mark.parametrize(
    ("out_indices", "apply_layernorm"), [(None, True), ([-4, -3, -2, -1], True), ([0, 2, 5], False)]
)
@pytest.mark.parametrize("values", [{}, ROPE, {**WITHOUT_CLS, "pooler_type": "mean"}, VARIANTS["distilled"]])
def test_heads_read_the_maps_of_the_backbone(values, out_indices, apply_layernorm, size):
    """Which no register is in."""
    values = {**values, "out_indices": out_indices, "apply_layernorm": apply_layernorm, "return_prefix_tokens": True}
    pixel_values = images(*size)
    backbone = make(ViTRegBackbone, **values)
    maps = backbone(pixel_values)
    rows, cols = (side // 7 for side in size)
    for model in (make(ViTRegForSemanticSegmentation, **values), make(ViTRegForDepthEstimation, **values)):
        for name, tensor in backbone.state_dict().items():
            model.vitreg.state_dict()[name].copy_(tensor)
        if isinstance(model, ViTRegForSemanticSegmentation):
            expected = model.segmentation_head(torch.cat(maps.feature_maps, dim=1))
            assert model(pixel_values).logits.shape == (BATCH_SIZE, 11, rows, cols)
            torch.testing.assert_close(model(pixel_values).logits, expected)
        else:
            channels = [list(maps.feature_maps)]
            if backbone.config.use_cls_token:
                channels.append([cls[:, :, None, None].expand(-1, -1, rows, cols) for cls in maps.cls_tokens])
            features = torch.cat([channel for layer in zip(*channels) for channel in layer], dim=1)
            expected = interpolate(model.depth_head(features)[:, None], size=size, mode="bilinear")[:, 0]
            assert expected.shape == (BATCH_SIZE, *size)
            torch.testing.assert_close(model(pixel_values).predicted_depth, expected)


@pytest.mark.parametrize("model_class", DENSE_CLASSES)
def test_depth_and_logits_do_not_depend_on_what_the_registers_hold_in_the_end(model_class):
    model, pixel_values = make(model_class), images()
    expected = model(pixel_values)[0]

    def shift(module, args, tokens):
        tokens = tokens.clone()
        tokens[:, 1 : 1 + NUM_REGISTERS] += 100
        return tokens

    with model.vitreg.encoder.layer[-1].register_forward_hook(shift, prepend=True):
        torch.testing.assert_close(model(pixel_values)[0], expected)


def test_depth_stays_between_its_bounds():
    model = make(ViTRegForDepthEstimation, min_depth=2.0, max_depth=3.0, num_depth_bins=5)
    depth = model(images()).predicted_depth
    assert 2 <= depth.min() < depth.max() <= 3


@pytest.mark.parametrize("model_class", DENSE_CLASSES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs_in_bfloat16_with_a_float32_loss(model_class, variant):
    model = make(model_class, **VARIANTS[variant])
    pixel_values, labels = images(), labels_of(model)
    expected = model(pixel_values, labels=labels)
    output = model.to(torch.bfloat16)(pixel_values, labels=labels)
    assert output.loss.dtype == torch.float32
    assert relative_error(output[1].float(), expected[1]) < 0.1
    output.loss.backward()


@pytest.mark.parametrize("model_class", DENSE_CLASSES)
@pytest.mark.parametrize("variant", ["default", *VARIANTS])
def test_every_parameter_gets_a_gradient(model_class, variant):
    """Pooling, which these models do without, has none."""
    model = make(model_class, **VARIANTS.get(variant, {}), use_mask_token=True, out_indices=[-2, -1]).train()
    model(images(), labels=labels_of(model)).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("model_class", DENSE_CLASSES)
@pytest.mark.parametrize("requested", [None, True, [0, -2], -1])
def test_hidden_states_are_those_that_were_asked_for(model_class, requested):
    model = make(model_class, out_indices=[1, 4])
    output = model(images(), output_hidden_states=requested, output_attentions=True)
    shown = {None: None, True: range(6), -1: [5]}.get(requested if not isinstance(requested, list) else "", [0, 4])
    if shown is None:
        assert output.hidden_states is None
    else:
        assert [index for index, states in enumerate(output.hidden_states) if states is not None] == list(shown)
    assert len(output.attentions) == 5


@pytest.mark.parametrize("model_class", DENSE_CLASSES)
def test_gradient_checkpointing_changes_nothing(model_class):
    pixel_values, gradients = images(), []
    labels = labels_of(make(model_class))
    for checkpointing in (False, True):
        model = make(model_class, out_indices=[2, 5]).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(pixel_values, labels=labels).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_model_without_pooling_layer_has_the_rest():
    model = make(ViTRegModel, **VARIANTS["attended"])
    bare = ViTRegModel(model.config, add_pooling_layer=False).eval()
    left_out = model.state_dict().keys() - bare.state_dict().keys()
    assert left_out and all(name.startswith("pooler.") for name in left_out)
    bare.load_state_dict({name: model.state_dict()[name] for name in bare.state_dict()})
    pixel_values = images()
    output = bare(pixel_values)
    assert output.pooler_output is None and output.image_embeds is None
    assert torch.equal(output.last_hidden_state, model(pixel_values).last_hidden_state)
    assert ViTRegModel(tiny_config(**VARIANTS["mean_normed"]), add_pooling_layer=False).layernorm is None


def test_names_of_the_heads_never_change():
    """Published checkpoints depend on them."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = [f"segmentation_head.batch_norm.{name}" for name in norm]
    expected += ["segmentation_head.classifier.weight", "segmentation_head.classifier.bias"]
    model = make(ViTRegForSemanticSegmentation)
    assert [name for name in model.state_dict() if not name.startswith("vitreg.")] == expected
    model = make(ViTRegForDepthEstimation)
    expected = ["depth_head.classifier.weight", "depth_head.classifier.bias"]
    assert [name for name in model.state_dict() if not name.startswith("vitreg.")] == expected


@pytest.mark.parametrize("model_class", DENSE_CLASSES)
def test_trainer_trains(tmp_path, model_class):
    model = model_class(tiny_config())
    data = [{"pixel_values": torch.randn(3, 21, 49), "labels": label} for label in labels_of(model)]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, gradient_accumulation_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    pixel_values = torch.stack([item["pixel_values"] for item in data])
    before = model.eval()(pixel_values, labels=torch.stack([item["labels"] for item in data])).loss
    logged = trainer.train().training_loss
    # the mean of what is accumulated, not its sum
    assert 0.5 * before < logged < 1.5 * before
