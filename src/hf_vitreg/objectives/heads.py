# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""Heads that training needs and the published backbone does not."""

import itertools
import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


class DINOHead(nn.Module):
    """Maps tokens to a bottleneck, to be compared with prototypes (DINO, Caron et al., 2021, appendix C; DINOv2).

    A perceptron with GELU, L2 normalisation, and a last layer without bias whose rows are normalised too:

    ```
    features = normalize(mlp(tokens))                                # (..., bottleneck_size)
    prototypes = prototype_norms * normalize(directions)             # (num_prototypes, bottleneck_size)
    logits = features @ prototypes.T                                 # left to the loss, in chunks
    ```

    The parameters have torch's names for weight normalisation, `last_layer.parametrizations.weight.original0` the
    norms and `…original1` the directions, as DINOv2's heads have in a present torch.

    Args:
        hidden_size: Width of the backbone.
        num_prototypes: 65,536 in DINOv2's default, 131,072 for its L and g.
        mlp_size: Width of the perceptron.
        bottleneck_size: 256 in DINOv2's default; 384 for the DINO head of its L and g.
        num_layers: Linear layers of the perceptron.
        train_prototype_norms: Whether the norms, 1 at the start, are learned, as they are in DINOv2. In DINO they
            stay, as here by default, so that no prototype gets large.
    """

    def __init__(
        self,
        hidden_size: int,
        num_prototypes: int = 65536,
        mlp_size: int = 2048,
        bottleneck_size: int = 256,
        num_layers: int = 3,
        train_prototype_norms: bool = False,
    ):
        super().__init__()
        sizes = [hidden_size, *[mlp_size] * (num_layers - 1), bottleneck_size]
        layers = [module for pair in itertools.pairwise(sizes) for module in (nn.Linear(*pair), nn.GELU())]
        self.mlp = nn.Sequential(*layers[:-1])
        # torch's weight normalisation is one kernel, three times as fast as the division spelled out
        self.last_layer = weight_norm(nn.Linear(bottleneck_size, num_prototypes, bias=False))
        self.prototype_norms.requires_grad_(train_prototype_norms)
        self._initialize()

    def _initialize(self) -> None:
        """Linear layers of the perceptron: truncated normal 0.02, bias 0. Prototypes: torch's default, norm 1."""
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.ones_(self.prototype_norms)

    @property
    def prototype_norms(self) -> nn.Parameter:
        """`(num_prototypes, 1)`."""
        return self.last_layer.parametrizations.weight.original0

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and prototypes, for `losses.prototypes.Assignment`.

        Both come from here, so that DDP and FSDP see the last layer used.

        Args:
            tokens: `(..., hidden_size)`, CLS and masked patches together where they share a head.

        Returns:
            `(..., bottleneck_size)`, rows of norm 1, and `(num_prototypes, bottleneck_size)`.
        """
        return F.normalize(self.mlp(tokens), dim=-1), self.last_layer.weight


DIRECTIONS = "last_layer.parametrizations.weight.original1"
NORMS = "last_layer.parametrizations.weight.original0"
# torch spelled weight normalisation in another way before
ORIGINAL_NAMES = {"last_layer.weight_v": DIRECTIONS, "last_layer.weight": DIRECTIONS, "last_layer.weight_g": NORMS}


def from_original_head(state_dict: dict[str, torch.Tensor], train_prototype_norms: bool = False) -> DINOHead:
    """The head that a checkpoint of DINO, DINOv2 or DINOv3 holds, computing the same logits.

    | Original | Here |
    |---|---|
    | `mlp.<n>.weight`, `mlp.<n>.bias` | the same |
    | `mlp.weight`, `mlp.bias` of a single layer | `mlp.0.weight`, `mlp.0.bias` |
    | `last_layer.weight_v` | `last_layer.parametrizations.weight.original1` |
    | `last_layer.weight_g` | `last_layer.parametrizations.weight.original0` |
    | `last_layer.weight` alone (DINOv3, no weight normalisation) | `…original1`, and its rows' norms `…original0` |

    Args:
        state_dict: Of the head alone, without a prefix such as `dino_head.`.
        train_prototype_norms: As in `DINOHead`.

    Raises:
        ValueError: for other names, such as those of a head with batch normalisation.
    """
    renamed = {re.sub(r"^mlp\.(weight|bias)$", r"mlp.0.\1", name): tensor for name, tensor in state_dict.items()}
    renamed = {ORIGINAL_NAMES.get(name, name): tensor for name, tensor in renamed.items()}
    others = [name for name in renamed if not re.fullmatch(r"mlp\.\d*[02468]\.(weight|bias)", name)]
    if DIRECTIONS not in others or "mlp.0.weight" not in renamed or set(others) - {DIRECTIONS, NORMS}:
        raise ValueError(
            "This is not the state dict of a DINO head, `mlp.<n>.weight`, `mlp.<n>.bias` and `last_layer.…`: found "
            f"{', '.join(sorted(state_dict)) or 'nothing'}."
        )
    weights = [renamed[name] for name in renamed if re.fullmatch(r"mlp\.\d+\.weight", name)]
    num_prototypes, bottleneck_size = renamed[DIRECTIONS].shape
    renamed.setdefault(NORMS, torch.linalg.vector_norm(renamed[DIRECTIONS], dim=1, keepdim=True))
    head = DINOHead(
        hidden_size=weights[0].shape[1],
        num_prototypes=num_prototypes,
        mlp_size=weights[0].shape[0],
        bottleneck_size=bottleneck_size,
        num_layers=len(weights),
        train_prototype_norms=train_prototype_norms,
    )
    head.load_state_dict(renamed)
    return head
