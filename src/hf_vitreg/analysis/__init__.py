# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What the registers paper measured, on plain tensors: norms, neighbours, probes, attention, cost."""
