# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a backbone is worth: the protocols of the papers, on features that are extracted once."""
