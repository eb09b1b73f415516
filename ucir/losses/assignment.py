"""Losses on soft assignments to prototypes: self-entropy and distance of distance."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.precision import full_precision


def self_entropy(q_BD: Tensor, centroid_KD: Tensor, temperature: float) -> Tensor:
    """Mean entropy of softmax_c(q_i c / phi): UCDIR eq. 9 for one feature and one centroid domain.

    Args:
        q_BD: unit features, with gradient.
        centroid_KD: prototypes of either domain, constant.
        temperature: phi > 0.

    Returns:
        Scalar in 0..log K.
    """
    log_BK = torch.log_softmax(full_precision(q_BD) @ centroid_KD.T / temperature, dim=1)
    return -(log_BK.exp() * log_BK).sum(dim=1).mean()


def distance_of_distance(q_BD: Tensor, own_KD: Tensor, other_KD: Tensor, temperature: float) -> Tensor:
    """Difference of pairwise distances as seen from the prototypes of either domain: UCDIR eq. 8.

    With P^g_i = softmax_c(q_i c / t) over the prototypes of domain g and d^g_ij = 1 - cos(P^g_i, P^g_j),
    the loss is mean_i || d^A_i. - d^B_i. ||^2 over pairs within one domain. Since only distances are
    compared, the order of the prototypes does not matter (Proposition 1), nor need the numbers of
    prototypes be equal.

    Args:
        q_BD: unit features of one domain, with gradient.
        own_KD, other_KD: prototypes of the two domains, constant.
        temperature: t > 0, 0.01 in the official code (not phi).

    Returns:
        Scalar >= 0; sum over j, mean over i, as ``F.pairwise_distance(...).pow(2).mean()`` gives it.
    """
    distances = []
    for centroid_KD in (own_KD, other_KD):
        p_BK = torch.softmax(full_precision(q_BD) @ centroid_KD.T / temperature, dim=1)
        unit_BK = F.normalize(p_BK, dim=1)
        distances.append(1 - unit_BK @ unit_BK.T)
    # the official code adds 1e-6 to each difference before squaring
    return (distances[0] - distances[1] + 1e-6).square().sum(dim=1).mean()
