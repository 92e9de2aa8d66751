# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""`python -m hf_vitreg` and `accelerate launch -m hf_vitreg`: the command line, on one process or several."""

from .cli import app


app(prog_name="hf-vitreg")
