# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""What a backbone is trained for: objectives that one loop serves, and the losses and heads that they are made of."""
