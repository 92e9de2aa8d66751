# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Published checkpoints into ViTReg folders: `python conversion/convert.py FAMILY CHECKPOINT OUTPUT_DIR`.

Reading order: `convert` (the command and the whole procedure), one file a family (`dinov2`), then what they use:
`reading` (files, safely), `published` (names and downloads), `renaming` (old names to new ones), `linear_heads`,
`parity` (is it the same model?) with `timm_reference` on the other side, `writing` (a whole folder or none).
"""
