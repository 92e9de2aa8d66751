# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Metrics as `evaluate.Metric` classes that work without a network; each file also loads by `evaluate.load(path)`."""
