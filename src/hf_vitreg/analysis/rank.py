# Copyright 2026 The ViTReg team. All rights reserved.
# Licensed under the Apache License, Version 2.0.
"""How many directions features really use."""

import torch


@torch.no_grad()
def effective_rank(features: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """exp of the entropy of the singular values (RankMe, Garrido et al., 2023, equation 2).

    ```
    sigma = singular values of features
    p = sigma / sum(sigma)
    rank = exp(-sum(p * log(p)))                     # 1 to min(batch, hidden_size)
    ```

    Args:
        features: `(batch, hidden_size)`.
        eps: Singular values below this share of the largest count as 0.

    Returns:
        Scalar in float32; NaN where a feature is not finite.
    """
    features = features.float()
    # the smaller of the two products has the squares of the singular values, in a tenth of the time
    product = features @ features.mT if len(features) <= features.shape[1] else features.mT @ features
    product = product.double().cpu()  # small, and not every accelerator has float64
    if not product.isfinite().all():
        return features.new_tensor(float("nan"))
    sigma = torch.linalg.eigvalsh(product).clamp(min=0).sqrt()
    sigma = torch.where(sigma > eps * sigma[-1], sigma, 0)
    return torch.special.entr(sigma / sigma.sum()).sum().exp().to(features)
