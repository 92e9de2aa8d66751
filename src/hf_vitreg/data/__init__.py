# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Images and labels: where they come from, how they are prepared, how they become batches."""
