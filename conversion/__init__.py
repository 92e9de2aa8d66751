# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Weights of other layouts into ViTReg folders, and back: `python conversion/convert.py FAMILY CHECKPOINT OUTPUT_DIR`.

Reading order: `convert` (the commands and the whole procedure), one family (`dino` is a short one), then what they
use: `family` (what each hands over), `reading` (files, safely), `published` (names and downloads), `recognize` (which
family is it?), `vit_layout` (the layout that most share), `renaming` (old names to new ones, and back),
`linear_heads`, `parity` (is it the same model?) with `timm_reference`, `transformers_reference` or
`open_clip_reference` on the other side, `writing` (a whole folder or none). Out again: `to_dinov2`, `to_transformers`
and `to_timm`, which read a model by `vitreg_folder` and refuse by `exporting`.
"""
