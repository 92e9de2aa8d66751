# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Registers for models that were trained without.

`warm_start` adds new ones, to train on from. `register_neurons` finds the neurons that make artifacts; `test_time` has
them write into new tokens in place of patches, without any training, and `test_time_hooks` the same for models of
transformers and timm.
"""
