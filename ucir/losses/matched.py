"""The OT-matched variant of UCDIR's losses that a third-party review describes; not the paper's.

Source: the description in a public review of UCDIR. Nobody is known to have run it before.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.precision import full_precision


def soft_assignment(q_BD: Tensor, centroid_KD: Tensor, temperature: float) -> Tensor:
    """p_ij = softmax_j(q_i c_j / t), (B, K)."""
    return torch.softmax(full_precision(q_BD) @ centroid_KD.T / temperature, dim=1)


def soft_centroids(q_BD: Tensor, p_BK: Tensor) -> Tensor:
    """The batch's weighted mean for each cluster, sum_i p_ij q_i / sum_i p_ij, L2-normalised; (K, D)."""
    sum_KD = p_BK.T @ full_precision(q_BD)
    return F.normalize(sum_KD / p_BK.sum(dim=0).clamp(min=1e-12)[:, None], dim=1)


def matched_distance(own_KD: Tensor, other_LD: Tensor, match_K: Tensor) -> Tensor:
    """sum_ij | ||c_i - c_j|| - ||c'_m(i) - c'_m(j)|| | over the centroids of two domains.

    Args:
        own_KD: centroids of one domain, with gradient.
        other_LD: centroids of the other, with gradient.
        match_K: m, for each own centroid the row of the other's, int64.
    """
    return (_distances(own_KD) - _distances(other_LD[match_K])).abs().sum()


def _distances(x_KD: Tensor) -> Tensor:
    """Euclidean, (K, K); its gradient is 0 where two rows coincide, not NaN."""
    square = (x_KD[:, None] - x_KD[None, :]).square().sum(dim=2)
    apart = square > 0
    return torch.where(apart, square.masked_fill(~apart, 1.0).sqrt(), torch.zeros_like(square))
