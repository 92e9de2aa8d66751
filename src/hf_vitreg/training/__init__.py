# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Parts of a training run: optimizer groups, schedules, checkpoints, and the record of what was measured."""
