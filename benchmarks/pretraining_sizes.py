# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Sizes of the ViTs that `pretraining_step.py` trains, and what lightly-train calls them."""

SIZES = {
    name: {
        "name": letter,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 64,
        "patch_size": 14,
        "peer_model": f"vit{letter.lower()}14-notpretrained",
    }
    for name, letter, hidden_size, num_layers in (
        ("small", "S", 384, 12),
        ("base", "B", 768, 12),
        ("large", "L", 1024, 24),
    )
}
