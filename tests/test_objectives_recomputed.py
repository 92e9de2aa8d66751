# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils.parametrizations import weight_norm
from transformers.activations import GELUActivation

from hf_vitreg import ViTRegConfig, ViTRegModel
from hf_vitreg.objectives.packing import forward_crops, prepare_for_crops
from hf_vitreg.objectives.recomputed import (
    activated_linear,
    add_to_rows,
    are_plain,
    can_recompute,
    can_scale,
    normed_linears,
)


BATCH, TOKENS, WIDTH, WIDE, OUT = 3, 5, 7, 11, 13
PLAIN_ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "swiglu": lambda gate, up: F.silu(gate) * up}


def normed_parts(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, nn.LayerNorm, list[nn.Linear]]:
    torch.manual_seed(0)
    norm = nn.LayerNorm(WIDTH, eps=1e-3).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    layers = [nn.Linear(WIDTH, size, bias=bias and size != WIDE).to(dtype) for size in (WIDE, OUT, WIDTH)]
    return torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype, requires_grad=True), norm, layers


def activated_parts(
    activation: str, bias: bool, scaled: bool, dtype: torch.dtype = torch.float64
) -> tuple[tuple[torch.Tensor, ...], nn.Linear, torch.Tensor | None]:
    torch.manual_seed(0)
    number = 2 if activation == "swiglu" else 1
    hidden = tuple(torch.randn(BATCH, TOKENS, WIDE, dtype=dtype, requires_grad=True) for _ in range(number))
    scale = torch.randn(OUT, dtype=dtype, requires_grad=True) if scaled else None
    return hidden, nn.Linear(WIDE, OUT, bias=bias).to(dtype), scale


def plain(activation: str, hidden: tuple, layer: nn.Linear, scale: torch.Tensor | None) -> torch.Tensor:
    result = layer(PLAIN_ACTIVATIONS[activation](*hidden))
    return result if scale is None else result * scale


def gradients(results, leaves) -> tuple[torch.Tensor, ...]:
    """Of a sum in which no two entries count alike."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(result.shape, generator=generator) for result in results]
    total = sum((result.double() * weight).sum() for result, weight in zip(results, weights))
    return torch.autograd.grad(total, list(leaves))


def leaves_of(parts) -> list[torch.Tensor]:
    tensors = []
    for part in parts:
        if isinstance(part, nn.Module):
            tensors += part.parameters()
        elif isinstance(part, torch.Tensor):
            tensors.append(part)
        elif part is not None:
            tensors += leaves_of(part)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_norm_and_linear_layers_are_torchs(bias, dtype):
    tokens, norm, layers = normed_parts(bias, dtype)
    found = normed_linears(tokens, norm, *layers)
    expected = [layer(norm(tokens)) for layer in layers]
    torch.testing.assert_close(list(found), expected)
    leaves = leaves_of((tokens, norm, layers))
    torch.testing.assert_close(gradients(found, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", PLAIN_ACTIVATIONS)
@pytest.mark.parametrize(("bias", "scaled"), [(True, True), (True, False), (False, True), (False, False)])
def test_activation_linear_layer_and_layerscale_are_torchs(activation, bias, scaled, dtype):
    hidden, layer, scale = activated_parts(activation, bias, scaled, dtype)
    found = activated_linear(activation, hidden, layer, scale)
    expected = plain(activation, hidden, layer, scale)
    torch.testing.assert_close(found, expected)
    leaves = leaves_of((hidden, layer, scale))
    torch.testing.assert_close(gradients([found], leaves), gradients([expected], leaves))


def test_gradients_are_those_of_finite_differences():
    tokens, norm, layers = normed_parts(bias=True)
    inputs = (tokens, *norm.parameters())
    torch.autograd.gradcheck(lambda *_: normed_linears(tokens, norm, *layers), inputs)
    hidden, layer, scale = activated_parts("swiglu", True, True)
    inputs = (*hidden, layer.weight, layer.bias, scale)
    torch.autograd.gradcheck(lambda *_: activated_linear("swiglu", hidden, layer, scale), inputs)


def test_rows_are_added_as_torch_adds_them_and_the_branch_is_not_kept():
    tokens = torch.randn(5, 3, 7, requires_grad=True)
    branch, rows = torch.randn(2, 3, 7, requires_grad=True), torch.tensor([4, 1])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = add_to_rows(tokens, rows, branch, 2.5)
    expected = tokens.index_add(0, rows, branch, alpha=2.5)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients([found], (tokens, branch)), gradients([expected], (tokens, branch)))
    assert kept == [rows]


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_kept_goes_in_and_parameters_are_themselves(frozen):
    """Under autocast too: of copies FSDP would not free the storage."""
    tokens, norm, layers = normed_parts(True, torch.float32)
    hidden, layer, scale = activated_parts("gelu", True, True, torch.float32)
    for part in (norm, *layers, layer):
        part.requires_grad_(not frozen)
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        normed_linears(tokens, norm, *layers)
        activated_linear("gelu", hidden, layer, scale)
    given = leaves_of((tokens, norm, layers, hidden, layer, scale))
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in given}


def test_half_precision_is_autocasts():
    tokens, norm, layers = normed_parts(True, torch.float32)
    hidden, layer, scale = activated_parts("gelu", True, True, torch.float32)
    leaves = leaves_of((tokens, norm, layers, hidden, layer, scale))
    with torch.autocast("cpu", torch.bfloat16):
        found = [*normed_linears(tokens, norm, *layers), activated_linear("gelu", hidden, layer, scale)]
        expected = [*(each(norm(tokens)) for each in layers), plain("gelu", hidden, layer, scale)]
    assert all(result.dtype == torch.bfloat16 for result in found)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.03, check_dtype=False)
    ours, theirs = gradients(found, leaves), gradients(expected, leaves)
    assert all(gradient.dtype == torch.float32 for gradient in ours)
    for gradient, other in zip(ours, theirs):
        assert (gradient - other).norm() < 0.02 * other.norm()


def test_a_weight_used_before_and_after_has_all_of_its_gradient():
    """Autocast's copies of weights made without a graph would serve those who need one."""
    _, layer, scale = activated_parts("none", True, True, torch.float32)
    rows = torch.randn(4, WIDE)
    with torch.autocast("cpu", torch.bfloat16):
        result = activated_linear("none", (rows,), layer, scale).sum() + layer(rows).sum()
    (found,) = torch.autograd.grad(result.float(), [layer.weight])
    expected = (1 + scale.detach())[:, None] * rows.sum(dim=0)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_frozen_parameters_have_no_gradient_and_change_no_other():
    tokens, norm, layers = normed_parts(True)
    hidden, layer, scale = activated_parts("gelu", True, True)

    def results() -> list[torch.Tensor]:
        return [*normed_linears(tokens, norm, *layers), activated_linear("gelu", hidden, layer, scale)]

    learned = [tokens, norm.bias, layers[1].bias, *hidden, scale]
    expected = gradients(results(), learned)
    for part in (norm.weight, layers[0].weight, layers[1].weight, layer.weight, layer.bias):
        part.requires_grad_(False)
    torch.testing.assert_close(gradients(results(), learned), expected)
    sum(result.sum() for result in results()).backward()
    assert layers[0].weight.grad is layer.bias.grad is None


class OtherLinear(nn.Linear):
    pass


def test_modules_that_somebody_changed_are_not_plain():
    linear, norm = nn.Linear(3, 5), nn.LayerNorm(3)
    assert are_plain(linear, norm, GELUActivation())
    assert not are_plain(linear, OtherLinear(3, 5))
    assert not are_plain(weight_norm(nn.Linear(3, 5)))
    for register in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        handle = getattr(linear, f"register_{register}")(lambda *_: None)
        assert not are_plain(linear), register
        handle.remove()
    handle = register_module_forward_pre_hook(lambda *_: None)
    assert not are_plain(linear)
    handle.remove()
    assert are_plain(linear)


def test_what_would_be_computed_otherwise_is_left_to_the_modules():
    norm, linear, scale = nn.LayerNorm(3), nn.Linear(3, 5), torch.full((5,), 1e-5)
    assert can_recompute(norm, torch.ones(2, 3)) and not can_recompute(norm, torch.ones(2, 3, dtype=torch.bfloat16))
    assert not can_recompute(nn.LayerNorm(3, elementwise_affine=False), torch.ones(2, 3))
    assert can_scale(linear, scale) and can_scale(linear.half(), None)
    assert not can_scale(linear, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert can_scale(linear.float(), scale)


# torch's compiler looks for the gradient of what enters a layer
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("use_swiglu_ffn", [False, True])
def test_layers_compile_as_one_graph(use_swiglu_ffn):
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 12, "patch_size": 4}
    backbone = ViTRegModel(ViTRegConfig(**sizes, layerscale_value=0.3, use_swiglu_ffn=use_swiglu_ffn))
    prepare_for_crops(backbone)
    crops, found = [torch.randn(5, 3, 20, 12), torch.randn(7, 3, 8, 16)], []
    for compiled in (False, True):
        if compiled:
            for layer in backbone.encoder.layer:
                layer.compile(backend="aot_eager", fullgraph=True)
        tokens = forward_crops(backbone, crops, [None, None], [torch.tensor([0, 19, 42]), None])
        found.append([*tokens, *gradients(tokens, backbone.encoder.parameters())])
    torch.testing.assert_close(found[1], found[0])


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from test_objectives_recomputed import sharded_gradients

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.save(sharded_gradients(2), f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


class Crops(nn.Module):
    """A module whose forward pass is that over crops: FSDP gathers what belongs to no layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 12}
        self.backbone = ViTRegModel(ViTRegConfig(**sizes, patch_size=4, layerscale_value=0.3, drop_path_rate=0.4))
        prepare_for_crops(self.backbone.train())

    def forward(self, crops: list[torch.Tensor]) -> list[torch.Tensor]:
        return forward_crops(self.backbone, crops, [None, None], [torch.tensor([0, 19, 42]), None])


def sharded_gradients(num_processes: int) -> dict[str, torch.Tensor]:
    """By FSDP2 where there are several processes; and what linear layers' weights take between the passes."""
    module, kept = Crops(), []
    if num_processes > 1:
        mesh = init_device_mesh("cpu", (num_processes,))
        for part in (*module.backbone.encoder.layer, module):
            fully_shard(part, mesh=mesh)
    torch.manual_seed(1)
    crops = [torch.randn(5, 3, 20, 12), torch.randn(7, 3, 8, 16)]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        tokens = module(crops)
    weights = [tensor for tensor in kept if tensor.shape in ((24, 24), (96, 24), (24, 96))]
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in {id(each): each for each in weights}.values())
    sum(each.square().mean() for each in tokens).backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    if num_processes > 1:
        found = {name: gradient.full_tensor() for name, gradient in found.items()}
    return found | {"num_weights": torch.tensor(len(weights)), "num_bytes": torch.tensor(num_bytes)}


@pytest.mark.slow  # a run of two processes
def test_sharded_weights_are_freed_between_the_passes(tmp_path):
    (tmp_path / "both.py").write_text(SCRIPT)
    tests = Path(__file__).parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "both.py"), str(tmp_path)],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = sharded_gradients(1), torch.load(tmp_path / "0.pt")
    assert found["num_weights"] == expected["num_weights"] == 36
    assert found.pop("num_bytes") == 0 < expected.pop("num_bytes")
    torch.testing.assert_close(found, expected)
