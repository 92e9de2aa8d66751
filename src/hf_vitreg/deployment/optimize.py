# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The same model, as fast as the machine allows."""

import functools
import logging
import types
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch._inductor import config as inductor_config
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from ..machine import processor_features
from ..matmul import fast_float32_matmul
from ..modeling_vitreg import ViTRegAttention, ViTRegEncoder, ViTRegPreTrainedModel
from . import cpu_attention
from .folding import fold


logger = logging.getLogger(__name__)


def optimize(
    model: PreTrainedModel,
    dtype: torch.dtype | Literal["auto"] | None = None,
    example: torch.Tensor | None = None,
) -> PreTrainedModel:
    """A copy of a ViTReg, of any head, with the same interface and outputs, for fast inference where the model is.

    It is folded (`fold`), attends by the kernel that suits the device, and its layers are compiled as one, with their
    weights packed for the processor. One compilation serves all sizes and batch sizes; a single image, and another
    choice of hidden states, take another one. Nothing global is changed.

    Outputs are those of the model in the same dtype up to rounding: a relative error of 1e-5 in float32. The copy
    gives no gradients. What else is asked of it, hidden states and attentions, it gives as the model does.

    Args:
        model: A ViTReg, or a model that contains one, on the device where it is to run. It is left as it is.
        dtype: Of weights and activations, by default the model's. With `"auto"` bfloat16 where the processor
            multiplies it faster than float32, else float32.
        example: `(batch_size, num_channels, height, width)`, images to compile for now rather than at the first call.

    Raises:
        ValueError: where there is no ViTReg in the model, or the dtype is no floating point.
    """
    dtype = fastest_dtype(model.device) if dtype == "auto" else dtype or model.dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f'dtype must be a floating point type of torch, "auto" or None, got {dtype!r}.')
    return compiled(fold(model, dtype), example)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    native = {"avx512_bf16", "amx_bf16"} & set(processor_features())
    return torch.bfloat16 if device.type == "cpu" and native else torch.float32


def compiled(folded: PreTrainedModel, example: torch.Tensor | None = None) -> PreTrainedModel:
    """A folded model, itself, with its encoders compiled; see `optimize`."""
    attention = _attention(folded.device, folded.dtype)
    for module in folded.modules():
        # not that of other models in it: texts have masks, which our kernel has not
        if isinstance(module, ViTRegAttention):
            module.config._attn_implementation = attention
        if isinstance(module, ViTRegEncoder):
            # torch.compile cannot trace the installation
            maybe_install_capturing_hooks(module)
            module.forward = CompiledForward(module)
    folded.train = types.MethodType(_evaluate, folded)
    for name in ("save_pretrained", "push_to_hub", "load_state_dict"):
        setattr(folded, name, functools.partial(_refuse, name))
    if example is not None:
        vitreg = next(module for module in folded.modules() if isinstance(module, ViTRegPreTrainedModel))
        vitreg(example.to(folded.device, folded.dtype))
    return folded


def _attention(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the attention implementation that is fastest."""
    features = processor_features()
    # matrix units, which torch's kernel uses for bfloat16 and ours does not
    has_matrix_units = dtype == torch.bfloat16 and "amx_bf16" in features
    ours = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and "avx2" in features
    if ours and not has_matrix_units and cpu_attention.load_kernel() is not None:
        return cpu_attention.NAME
    return "sdpa"


class CompiledForward:
    """The forward of an encoder, compiled with its weights as constants.

    Without a C++ compiler, which torch.compile needs on a CPU, it is run as it is, and a warning says so.
    """

    def __init__(self, encoder: ViTRegEncoder):
        self.encoder = encoder

    @functools.cached_property
    def _run(self) -> Callable:
        # that of the class: the encoder's own is this object
        forward = types.MethodType(type(self.encoder).forward, self.encoder)
        if self._can_compile:
            # with sizes as variables float32 weights are packed for oneDNN too, else for MKL, which may be slow
            return torch.compile(forward, dynamic=True, isolate_recompiles=True)
        logger.warning("There is no C++ compiler, so the model is not compiled. Install g++.")
        return forward

    @functools.cached_property
    def _can_compile(self) -> bool:
        return self.encoder.device.type != "cpu" or cpu_attention.compiler() is not None

    @torch.no_grad()
    def __call__(self, *args, **kwargs) -> BaseModelOutput:
        # freezing is read when layers are traced, which may be at any call
        setting = inductor_config.patch(freezing=True) if self._can_compile else fast_float32_matmul()
        with setting:
            return self._run(*args, **kwargs)

    def __getstate__(self) -> dict[str, ViTRegEncoder]:
        """A copy of the model compiles its own weights."""
        return {"encoder": self.encoder}


def _evaluate(model: nn.Module, mode: bool = True) -> nn.Module:
    """In the place of `train`, which `eval` calls."""
    if mode:
        _refuse("train")
    return model


def _refuse(name: str, *args: object, **kwargs: object) -> None:
    raise ValueError(f"An optimized model is for inference and has weights of its own: call {name} of the original.")
