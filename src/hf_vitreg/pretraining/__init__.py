# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What is put together for a pretraining run: the model that a recipe asks for, and what each objective needs."""
