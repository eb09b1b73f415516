"""Optimal transport between prototypes."""

from __future__ import annotations

import torch
from torch import Tensor

REGULARISATION = 0.05


@torch.no_grad()
def match_prototypes(own_KD: Tensor, other_LD: Tensor) -> Tensor:
    """For each prototype of one domain the one of the other that most of its mass is sent to.

    Entropic OT with uniform marginals and squared Euclidean cost, by POT in float64 and log domain.

    Args:
        own_KD, other_LD: unit prototypes.

    Returns:
        (K,) int64.
    """
    import ot  # seconds, which only those who match should wait

    own, other = own_KD.double().cpu(), other_LD.double().cpu()
    cost = torch.cdist(own, other).square()
    mass = [torch.full((len(x),), 1 / len(x), dtype=torch.float64) for x in (own, other)]
    # which row gets most is settled long before the marginals are exact
    plan = ot.bregman.sinkhorn_log(*mass, cost, REGULARISATION, numItermax=200, stopThr=1e-6, warn=False)
    match: Tensor = plan.argmax(dim=1).to(own_KD.device)
    return match
