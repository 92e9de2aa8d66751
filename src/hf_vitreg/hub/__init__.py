# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""The way to the Hub: `card` writes the model card, `export` the repository, and publishes it."""
