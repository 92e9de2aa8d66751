# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Losses as pure functions; each docstring gives the formula as pseudo-code with shapes, and the paper.

| Module | Losses |
|---|---|
| `prototypes` | DINO on CLS and iBOT on masked patches, over many prototypes, in chunks |
| `targets` | what the teacher's predictions are sharpened with: running center, Sinkhorn-Knopp |
| `regularizers` | KoLeo, which spreads features; Gram, which keeps the likeness of patches |
| `classification` | binary and soft cross entropy, distillation |
| `contrastive` | CLIP and SigLIP |
| `features` | distances of features by direction and by value, which registers are distilled with |
| `collectives` | what they need of other processes: the identity on one |

Half precision is raised to float32 and autocast is off inside: a sum of exponentials over 65,536 prototypes is no
place to save bits. float64 stays as it is.
"""
