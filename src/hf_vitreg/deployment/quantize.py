# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The same model with int8 or fp8 in the products of its layers."""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

from ..machine import processor_features
from ..modeling_vitreg import ViTRegLayer
from .folding import fold
from .optimize import compiled, fastest_dtype


Scheme = Literal["int8", "fp8"]

# what multiplies on a GPU takes no other numbers of channels
GPU_MULTIPLE = 16
# compute capability of the first GPUs that multiply it
GPU_CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}
MAX_WEIGHT = 127  # symmetric: -128 is not used
TINY = torch.finfo(torch.float32).tiny  # a scale that divides zeros


def quantize(
    model: PreTrainedModel,
    dtype: torch.dtype | None = None,
    example: torch.Tensor | None = None,
    scheme: Scheme | None = None,
) -> PreTrainedModel:
    """A copy of a ViTReg, of any head, whose layers multiply in 8 bits, for fast inference where the model is.

    It is folded, attends and is compiled as by `optimize`, with the same interface. The projections of every layer
    (queries, keys and values, output, and those of the MLP) have weights and activations in 8 bits; patch embedding,
    norms, attention itself and heads stay in `dtype`. Weights have a scale for every output channel, which takes in
    LayerScale. Activations get theirs for every token while the model runs, so that nothing is calibrated, and a token
    of high norm costs the others no precision (dynamic quantization; Dettmers et al., 2022, section 2.1).

    On a CPU it is int8 by oneDNN: activations take all 256 values between the least and the largest of a token. GELU
    is computed within 6e-5. On a GPU it is torchao's, int8 or fp8 (e4m3). CLS and patches are to keep a cosine above
    0.999 with those of the model in float32; `agreement.agreement` measures it for a model and images.

    Args:
        model: A ViTReg, or a model that contains one, on the device where it is to run. It is left as it is.
        dtype: Of all that has no 8 bits; by default the device's fastest, `optimize.fastest_dtype`.
        example: `(batch_size, num_channels, height, width)`, images to compile for now rather than at the first call.
        scheme: `"int8"`, the default, or on a GPU `"fp8"`.

    Raises:
        ValueError: where there is no ViTReg in the model, the device has no such products, or what computes them is
            not installed or does not take the model's sizes.
    """
    device, scheme = model.device, scheme or "int8"
    dtype = dtype or fastest_dtype(device)
    _check(device, dtype, scheme)
    folded = fold(model, dtype)
    layers = [module for module in folded.modules() if isinstance(module, ViTRegLayer)]
    if device.type == "cuda":
        quantize_by_torchao(layers, scheme)
    else:
        for layer in layers:
            _quantize_layer(layer)
    return compiled(folded, example)


def _check(device: torch.device, dtype: torch.dtype, scheme: str) -> None:
    """Raises `ValueError` for what cannot be done on the device."""
    if scheme not in get_args(Scheme):
        raise ValueError(f"scheme must be among {', '.join(get_args(Scheme))}, got {scheme!r}.")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}.")
    if device.type == "cuda":
        check_gpu(torch.cuda.get_device_capability(device), dtype, scheme)
    elif device.type != "cpu":
        raise ValueError(f"Models are quantized for CPUs and CUDA GPUs, this one is on {device}: move it there first.")
    elif scheme != "int8":
        raise ValueError('A CPU multiplies no fp8: choose scheme="int8", or move the model to a GPU.')
    elif not torch.backends.mkldnn.is_available():
        raise ValueError("int8 on a CPU needs a torch that was built with oneDNN (mkldnn); this one was not.")


def check_gpu(capability: tuple[int, int], dtype: torch.dtype, scheme: str) -> None:
    """Raises `ValueError` for what a GPU of this compute capability cannot do."""
    if capability < GPU_CAPABILITY[scheme]:
        raise ValueError(
            f"{scheme} needs a GPU of compute capability {'.'.join(map(str, GPU_CAPABILITY[scheme]))} or later, this "
            f"one has {'.'.join(map(str, capability))}: use optimize(), or another GPU."
        )
    if scheme == "fp8" and dtype != torch.bfloat16:
        raise ValueError(f"fp8 with a scale for every token goes with dtype=torch.bfloat16, got {dtype}.")


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear))


# On a GPU


def quantize_by_torchao(layers: list[nn.Module], scheme: Scheme) -> None:
    """Gives the linear modules of layers 8 bits in place, with a scale for every output channel and every token.

    Raises:
        ValueError: where torchao is not installed, or a module has other numbers of channels than multiples of 16.
    """
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            PerRow,
            quantize_,
        )
    except ImportError as error:
        raise ValueError(
            "Quantizing on a GPU needs torchao: pip install torchao, or hf-vitreg[quantization]."
        ) from error
    for layer in layers:
        for name, linear in _linears(layer):
            if linear.in_features % GPU_MULTIPLE or linear.out_features % GPU_MULTIPLE:
                raise ValueError(
                    f"{name} has {linear.in_features} input and {linear.out_features} output channels; a GPU "
                    f"multiplies multiples of {GPU_MULTIPLE} in 8 bits. Use optimize() for this model."
                )
    if scheme == "fp8":
        config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    else:
        config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    for layer in layers:
        quantize_(layer, config)


# On a CPU


def _quantize_layer(layer: ViTRegLayer) -> None:
    for name, linear in list(_linears(layer)):
        layer.set_submodule(name, Int8Linear(linear))
    if type(getattr(layer.mlp, "activation_fn", None)) is GELUActivation:
        layer.mlp.activation_fn = PolynomialGELU()


def num_steps(features: Sequence[str]) -> int:
    """From the least activation of a token to its largest: 255 by 8 bits, or 127.

    An x86 CPU whose features have no VNNI adds pairs of products in 16 bits, which `2 * 255 * 127` overflows.
    """
    adds_in_16_bits = "avx2" in features and not any("vnni" in feature for feature in features)
    return 127 if adds_in_16_bits else 255


class Int8Linear(nn.Module):
    """A linear map with int8 weights, and activations that are rounded to 8 bits for every token.

    With `x = step * q + low` of a token, where `q` is from 0 to 255, and `w = scale * v` of an output channel, where
    `v` is from -127 to 127, it is `x w = step * scale * (q v) + low * sum(w) + bias`. oneDNN sums `q v` in int32 and
    multiplies by `scale`, torch.compile fuses the rest with what comes before and after.

    `(..., in_features) -> (..., out_features)`
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.num_steps = num_steps(processor_features())
        weight = linear.weight.float()
        scale = (weight.abs().amax(dim=1) / MAX_WEIGHT).clamp(min=TINY)
        rounded = (weight / scale[:, None]).round()
        self.weight = nn.Buffer(rounded.to(torch.int8))
        self.weight_scale = nn.Buffer(scale)
        self.weight_zero_point = nn.Buffer(torch.zeros(self.out_features, dtype=torch.int32))
        self.weight_sum = nn.Buffer(rounded.sum(dim=1) * scale)
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.float())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2).float()
        low, high = tokens.amin(dim=-1, keepdim=True), tokens.amax(dim=-1, keepdim=True)
        # a global number would be a variable for the compiler, and no constant
        step = ((high - low) / self.num_steps).clamp(min=torch.finfo(torch.float32).tiny)
        rounded = ((tokens - low) / step).round().to(torch.uint8)
        # What is added to the product may be much larger than their sum, so it is float32.
        product = torch.ops.onednn.qlinear_pointwise(
            rounded,
            1.0,
            0,
            # a compiled model has it packed
            torch.ops.onednn.qlinear_prepack(self.weight, None),
            self.weight_scale,
            self.weight_zero_point,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        output = step * product + low * self.weight_sum
        if self.bias is not None:
            output = output + self.bias
        return output.to(hidden_states.dtype).unflatten(0, hidden_states.shape[:-1])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PolynomialGELU(nn.Module):
    """GELU within 6e-5 and, beyond 4.5, 3e-6 of its input; its products and sums take less time than erf.

    The distribution function of the normal distribution is `1 / 2 + x P(x^2)` from -4.5 to 4.5. P is the polynomial of
    degree 8 with the least largest error of GELU among those for which it ends in 0 and 1, by linear programming.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        values = hidden_states.float()
        inside = values.clamp(-4.5, 4.5)
        square = (inside * (1 / 4.5)).square()
        # here, since global numbers would be variables for the compiler
        factor = 0.8481910824775696
        for coefficient in (
            -4.585048198699951,
            10.895852088928223,
            -15.0897855758667,
            13.655329704284668,
            -8.60476016998291,
            3.928663492202759,
            -1.3360401391983032,
            0.39870861172676086,
        ):
            factor = factor * square + coefficient
        return (values * (inside * factor + 0.5)).to(hidden_states.dtype)
