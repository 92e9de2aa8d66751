# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Registers for models that were trained without: `warm_start` adds new ones, to train on from."""
