# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The model in other people's hands: torch.compile and torch.export, Trainer, peft, accelerate, quantizers."""

import copy

import accelerate
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import NUM_REGISTERS, ROPE, TINY, VARIANTS, images, randomize, relative_error, tiny_config
from torch._dynamo.testing import CompileCounter
from torch.export import Dim
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig, Trainer, TrainingArguments

from hf_vitreg import (
    ViTRegBackbone,
    ViTRegForDepthEstimation,
    ViTRegForImageClassification,
    ViTRegForSemanticSegmentation,
    ViTRegModel,
)


NUM_LAYERS = TINY["num_hidden_layers"]
DENSE_CLASSES = [ViTRegForSemanticSegmentation, ViTRegForDepthEstimation]
# of the dense heads the backbone is compiled and exported as one, and they themselves by the slow tests
MODEL_CLASSES = [
    *(ViTRegModel, ViTRegForImageClassification, ViTRegBackbone),
    *(pytest.param(model_class, marks=pytest.mark.slow) for model_class in DENSE_CLASSES),
]
WITH_REGISTERS = {"interpolate_offset": 0.0, "interpolate_antialias": True}
WITHOUT_REGISTERS = {"interpolate_offset": 0.1, "interpolate_antialias": False, "num_register_tokens": 0}
CONVENTIONS = [WITH_REGISTERS, WITHOUT_REGISTERS]
# the grid of the config first, then smaller, larger, and as wide as it is high
SIZES = [(21, 49), (14, 28), (63, 70), (49, 21), (35, 35)]


def make(model_class, **overrides):
    """A tiny model with every parameter drawn at random, in eval mode."""
    return randomize(model_class(tiny_config(**overrides)))


def first_tensor(output) -> torch.Tensor:
    return output[0][0] if isinstance(output[0], tuple) else output[0]


@pytest.fixture
def folder(tmp_path):
    make(ViTRegForImageClassification).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Compilation and export


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@torch.no_grad()
def test_compiled_whole_model_equals_eager_and_serves_many_sizes_with_few_programs(model_class, convention):
    torch.compiler.reset()
    model, counter = make(model_class, num_hidden_layers=2, **convention), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    # more than torch.compile is willing to compile one by one
    for size in [*SIZES, (14, 35), (28, 28), (42, 21), (56, 63), (63, 14)]:
        pixel_values = images(*size)
        assert relative_error(first_tensor(compiled(pixel_values)), first_tensor(model(pixel_values))) < 1e-5
    # one for the grid of the config, one for every other; torch may try one more before it generalizes
    assert counter.frame_count <= 3


@pytest.mark.parametrize("variant", ["rope_untied", "attended", "normed_queries"])
@torch.no_grad()
def test_compiled_variant_equals_eager(variant):
    torch.compiler.reset()
    model = make(ViTRegForImageClassification, num_hidden_layers=4, **VARIANTS[variant])
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for size in ((28, 42), (63, 70), (49, 21)):
        pixel_values = images(*size)
        assert relative_error(compiled(pixel_values).logits, model(pixel_values).logits) < 1e-5


@torch.no_grad()
def test_compiled_rotation_serves_many_sizes_with_one_program():
    torch.compiler.reset()
    model, counter = make(ViTRegModel, num_hidden_layers=2, **ROPE, rope_normalize_coords="max"), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for size in [*SIZES, (14, 35), (28, 28), (42, 21), (56, 63), (63, 14)]:
        pixel_values = images(*size)
        assert relative_error(compiled(pixel_values)[0], model(pixel_values)[0]) < 1e-5
    # the first, and the one that torch makes general when it sees another size
    assert counter.frame_count <= 2


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_compiled_whole_model_returns_hidden_states_and_attentions(model_class):
    torch.compiler.reset()
    model, pixel_values = make(model_class, num_hidden_layers=2), images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    kwargs = {"output_hidden_states": True, "output_attentions": True}
    actual, expected = compiled(pixel_values, **kwargs), model(pixel_values, **kwargs)
    assert len(actual.hidden_states) == 3 and len(actual.attentions) == 2
    for name in ("hidden_states", "attentions"):
        assert all(torch.equal(*pair) for pair in zip(actual[name], expected[name]))


@pytest.mark.parametrize(
    "values", [{"classifier_layout": "cls"}, {"classifier_layout": "last4_cls_mean"}, VARIANTS["rope"]]
)
@pytest.mark.slow
def test_compiled_training_step_has_the_gradients_of_an_eager_one(values):
    torch.compiler.reset()
    model = make(ViTRegForImageClassification, num_hidden_layers=4, use_mask_token=True, **values)
    pixel_values, labels = images(), torch.tensor([10, 3])
    steps = [model.train(), torch.compile(model, fullgraph=True, backend="aot_eager")]
    gradients = []
    for step in steps:
        model.zero_grad()
        torch.manual_seed(0)
        step(pixel_values, labels=labels).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("convention", CONVENTIONS)
@torch.no_grad()
def test_inductor_compiles_the_whole_model(convention):
    torch.compiler.reset()
    model = make(ViTRegModel, **convention)
    compiled = torch.compile(model, fullgraph=True)
    for size in SIZES[:2]:
        pixel_values = images(*size)
        assert relative_error(compiled(pixel_values)[0], model(pixel_values)[0]) < 1e-5


DYNAMIC = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
PIXELS = {0: Dim("batch_size"), 2: Dim("height", min=14), 3: Dim("width", min=14)}
PATCHES = {0: Dim("batch_size"), 2: 7 * Dim("rows", max=512), 3: 7 * Dim("cols", max=512)}


def export(model, dynamic_shapes, strict=False):
    # at a size that is no size of SIZES, nor the grid of the config
    return torch.export.export(model, (images(28, 42),), dynamic_shapes=(dynamic_shapes,), strict=strict)


def assert_serves_every_size(program, model):
    exported = program.module()
    for index, size in enumerate(SIZES):
        pixel_values = images(*size, batch_size=1 + index)
        with torch.no_grad():
            actual, expected = first_tensor(exported(pixel_values)), first_tensor(model(pixel_values))
        assert relative_error(actual, expected) < 1e-5, size


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("model_class", MODEL_CLASSES)
def test_exported_model_serves_every_size_and_batch(model_class, convention):
    model = make(model_class, num_hidden_layers=2, **convention)
    assert_serves_every_size(export(model, DYNAMIC), model)


@pytest.mark.parametrize(
    "values",
    [ROPE, {**ROPE, "rope_normalize_coords": "max"}, VARIANTS["attended"]],
    ids=["rope", "rope by the longer side", "attended"],
)
def test_exported_variant_serves_every_size_and_batch(values):
    model = make(ViTRegModel, num_hidden_layers=2, **values)
    assert_serves_every_size(export(model, DYNAMIC), model)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("named", [PIXELS, PATCHES])
def test_exported_model_serves_every_size_of_named_dimensions(named, convention):
    model = make(ViTRegModel, num_hidden_layers=2, **convention)
    assert_serves_every_size(export(model, named), model)


def test_exported_model_survives_a_file(tmp_path):
    model = make(ViTRegForImageClassification, num_hidden_layers=4, classifier_layout="last4_cls_mean")
    torch.export.save(export(model, DYNAMIC), tmp_path / "model.pt2")
    assert_serves_every_size(torch.export.load(tmp_path / "model.pt2"), model)


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")  # transformers'
def test_strict_export_serves_every_size():
    model = make(ViTRegModel, num_hidden_layers=2)
    assert_serves_every_size(export(model, DYNAMIC, strict=True), model)


def test_what_only_a_fixed_size_can_export_is_refused_elsewhere():
    """Antialiased scale factors: no published model has them, and none may be answered with other positions."""
    model = make(ViTRegModel, num_hidden_layers=2, interpolate_offset=0.1, interpolate_antialias=True)
    pixel_values = images(28, 42)
    exported = torch.export.export(model, (pixel_values,)).module()
    assert relative_error(exported(pixel_values)[0], model(pixel_values)[0]) < 1e-5
    with pytest.raises(AssertionError, match="Guard failed"):
        export(model, DYNAMIC).module()(images(14, 28))


# Training


@pytest.mark.parametrize("layout", ["cls_mean", "last4_cls_mean"])
def test_trainer_trains_evaluates_and_saves(tmp_path, layout):
    data = [{"pixel_values": torch.randn(3, 21, 49), "labels": label} for label in range(11)]
    model = ViTRegForImageClassification(tiny_config(classifier_layout=layout, use_mask_token=True))
    arguments = TrainingArguments(
        tmp_path,
        max_steps=15,
        per_device_train_batch_size=11,
        learning_rate=1e-2,
        activation_checkpointing=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    prediction = trainer.predict(data)
    assert prediction.metrics["test_loss"] < 0.5 * before
    assert prediction.predictions.shape == (11, 11)
    loaded = ViTRegForImageClassification.from_pretrained(tmp_path / "checkpoint-15")
    logits = loaded(torch.stack([example["pixel_values"] for example in data])).logits
    assert relative_error(logits.detach(), torch.tensor(prediction.predictions)) < 1e-5


# peft still asks transformers for the old name of activation checkpointing
OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@OLD_NAME
@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], "all-linear"])
def test_lora_trains_only_its_adapters_and_merges(folder, tmp_path, target_modules):
    pixel_values, labels = images(28, 35), torch.tensor([10, 3])
    base = ViTRegForImageClassification.from_pretrained(folder)
    before = copy.deepcopy(base.state_dict())
    config = LoraConfig(r=2, target_modules=target_modules, modules_to_save=["classifier"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    losses = []
    for _ in range(5):
        loss = model(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    expected, maps = model(pixel_values).logits, model.get_attention_maps(pixel_values, 2)
    loaded = PeftModel.from_pretrained(ViTRegForImageClassification.from_pretrained(folder), tmp_path / "adapter")
    assert relative_error(loaded(pixel_values).logits, expected) < 1e-5
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == before.keys()
    assert torch.equal(merged.vitreg.embeddings.register_tokens, before["vitreg.embeddings.register_tokens"])
    assert relative_error(merged(pixel_values).logits, expected) < 1e-5
    assert relative_error(merged.get_attention_maps(pixel_values, 2), maps) < 1e-5


# Placement and precision


def assert_equals_in_memory(model, folder):
    expected, pixel_values = ViTRegForImageClassification.from_pretrained(folder), images(28, 35)
    kwargs = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        actual, in_memory = model(pixel_values, **kwargs), expected(pixel_values, **kwargs)
    assert relative_error(actual.logits, in_memory.logits) < 1e-6
    assert relative_error(actual.attentions[-1], in_memory.attentions[-1]) < 1e-6
    for layer in (0, -1):
        maps = [each.get_attention_maps(pixel_values, layer, "registers") for each in (model, expected)]
        assert relative_error(*maps) < 1e-6


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map_places_the_model(folder, device_map):
    model = ViTRegForImageClassification.from_pretrained(folder, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert_equals_in_memory(model, folder)


def test_layers_on_disk_are_brought_in_when_they_are_needed(folder, tmp_path):
    on_disk = ["vitreg.encoder.layer.1", "vitreg.encoder.layer.4", "vitreg.layernorm"]
    device_map = {"vitreg.embeddings": "cpu", "classifier": "cpu"}
    device_map |= {f"vitreg.encoder.layer.{index}": "cpu" for index in range(NUM_LAYERS)}
    device_map |= dict.fromkeys(on_disk, "disk")
    model = ViTRegForImageClassification.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert {parameter.device.type for parameter in model.vitreg.encoder.layer[4].parameters()} == {"meta"}
    assert_equals_in_memory(model, folder)


@pytest.mark.parametrize("whole_layers", [False, True])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_model_equals_the_model_in_memory(folder, tmp_path, where, whole_layers):
    """Also where weights come in when a layer is called, and not when one of its modules is, as sharding has it."""
    model, device = ViTRegForImageClassification.from_pretrained(folder), torch.device("cpu")
    classes = model._no_split_modules if whole_layers else None
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=device, preload_module_classes=classes)
    else:
        accelerate.disk_offload(model, tmp_path / "offload", execution_device=device, preload_module_classes=classes)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_equals_in_memory(model, folder)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("whole_layers", [False, True])
def test_offloaded_variant_equals_the_variant_in_memory(tmp_path, variant, whole_layers):
    make(ViTRegForImageClassification, **VARIANTS[variant]).save_pretrained(tmp_path)
    model = ViTRegForImageClassification.from_pretrained(tmp_path)
    classes = model._no_split_modules if whole_layers else None
    accelerate.cpu_offload(
        model, execution_device=torch.device("cpu"), offload_buffers=True, preload_module_classes=classes
    )
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    assert_equals_in_memory(model, tmp_path)


@pytest.mark.parametrize("values", [{}, VARIANTS["attended"]])
def test_layers_are_never_split_between_devices(values):
    model, seen = make(ViTRegModel, **values), set()
    for memory in range(50_000, 900_000, 25_000):
        device_map = accelerate.infer_auto_device_map(
            model, max_memory={0: memory, "cpu": 10**9}, no_split_module_classes=model._no_split_modules
        )
        seen |= set(device_map.values())
        whole = all(name.count(".") <= (2 if name.startswith("encoder") else 0) for name in device_map)
        assert whole, device_map
    assert seen == {0, "cpu"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto"])
def test_dtype_is_that_of_every_parameter_and_output(folder, dtype):
    model = ViTRegForImageClassification.from_pretrained(folder, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    # images stay as the processor made them, and are converted inside; another size interpolates the positions
    pixel_values = images(28, 35)
    with torch.no_grad():
        logits = model(pixel_values).logits
        in_memory = ViTRegForImageClassification.from_pretrained(folder)(pixel_values).logits
    assert logits.dtype == model.get_attention_maps(pixel_values, 0).dtype == expected
    assert relative_error(logits.float(), in_memory) < 0.05


def test_autocast_runs_the_model_in_bfloat16_and_its_loss_in_float32():
    model, pixel_values = make(ViTRegForImageClassification), images(28, 35)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixel_values, labels=torch.tensor([10, 3]))
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    assert relative_error(output.logits.float(), model(pixel_values).logits) < 0.05


@pytest.mark.parametrize("scheme", [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig])
@torch.no_grad()
def test_quantized_model_is_close_and_can_be_saved(folder, tmp_path, scheme):
    config, pixel_values = TorchAoConfig(scheme()), images(28, 35)
    expected = ViTRegForImageClassification.from_pretrained(folder)(pixel_values).logits
    model = ViTRegForImageClassification.from_pretrained(folder, quantization_config=config)
    layer = model.vitreg.encoder.layer[2]
    linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 6
    assert all(type(linear.weight).__name__ == "Int8Tensor" for linear in linears)
    output = model(pixel_values, output_attentions=True)
    assert 0 < relative_error(output.logits, expected) < 0.1
    num_tokens = 1 + NUM_REGISTERS + 4 * 5
    assert output.attentions[0].shape == (2, 3, num_tokens, num_tokens)
    assert model.get_attention_maps(pixel_values, 0).shape == (2, 3, 1, num_tokens)
    model.save_pretrained(tmp_path / "quantized")
    loaded = ViTRegForImageClassification.from_pretrained(tmp_path / "quantized")
    assert relative_error(loaded(pixel_values).logits, output.logits) < 1e-6
