# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""A model at work: faster, in int8, as an ONNX file, as a program of torch, and on very many images."""

from .optimize import optimize
from .quantize import quantize


__all__ = ["optimize", "quantize"]
