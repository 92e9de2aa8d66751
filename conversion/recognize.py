# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Which family a checkpoint is of, by its names: a hint for those who asked for another."""

import re
from collections.abc import Iterable


# A name that a family's layout has and those below it have not.
SIGNS = {
    "vitreg": r"residual\d\.lambda1$",
    "open_clip": r"(?:^|\.)visual\.(?:class_embedding|conv1\.weight)$",
    "transformers": r"(?:^|\.)embeddings\.(?:cls_token|class_embedding|patch_embeddings?\..+)$",
    "dinov3": r"(?:^|\.)(?:storage_tokens|rope_embed\.periods)$",
    "timm": r"(?:^|\.)(?:reg_token|fc_norm\.\w+|attn_pool\.latent|norm_pre\.\w+)$",
    "deit": r"(?:^|\.)dist_token$",
    "deit3": r"(?:^|\.)blocks\.\d+\.gamma_1$",
    "dinov2": r"(?:^|\.)blocks\.(?:\d+\.)?\d+\.ls1\.gamma$",
    "dino": r"(?:^|\.)blocks\.\d+\.attn\.qkv\.weight$",
}


def recognize(names: Iterable[str]) -> str | None:
    """The command that converts a checkpoint with these names, "vitreg" where that was done; `None` for others."""
    names = list(names)
    return next((family for family, sign in SIGNS.items() if any(re.search(sign, name) for name in names)), None)


def hint(names: Iterable[str], asked: str) -> str:
    """A sentence for the end of an error message; empty where nothing better than what was asked for is known."""
    family = recognize(names)
    if family in (None, asked):
        return ""
    if family == "vitreg":
        return "It is a ViTReg checkpoint already: load its folder with from_pretrained."
    return f"By its names it could be converted by `convert.py {family}`."
