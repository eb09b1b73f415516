"""UEM's losses (Wang, Du & Zhu, NeurIPS 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.memory import Bank
from ucir.precision import full_precision


def lengths(x: Tensor) -> Tensor:
    """Euclidean length of the last axis; its gradient is 0 at length 0, not NaN."""
    square = x.square().sum(dim=-1)
    there = square > 0
    return torch.where(there, square.masked_fill(~there, 1.0).sqrt(), torch.zeros_like(square))


def product_dissimilarity(u_BD: Tensor, v_ND: Tensor) -> Tensor:
    """D(u, v) = (1 - cos(u, v)) ||u - v||_2 of all pairs, (B, N): UEM's measure in eqs. 15, 16 and 25."""
    u, v = full_precision(u_BD), full_precision(v_ND)
    length_B1, length_N = lengths(u)[:, None], lengths(v)
    # one product for both factors: the differences of torch.cdist take five times as long, or more
    product_BN = u @ v.T
    cosine_BN = product_BN / (length_B1 * length_N).clamp(min=torch.finfo(u.dtype).tiny)
    square_BN = length_B1.square() + length_N.square() - 2 * product_BN
    return (1 - cosine_BN).clamp(min=0) * square_BN.clamp(min=0).sqrt()


def batch_contrast(q_BD: Tensor, row_BD: Tensor, temperature: float) -> Tensor:
    """Mean of -log( e(q_i m_i) / sum_{j in batch} e(q_i m_j) ), m the images' rows of the bank: eq. 6.

    The printed denominator runs over the batch; the text says "all other instances", which is
    :func:`ucir.losses.prototype.bank_discrimination`.
    """
    logits_BB = full_precision(q_BD) @ row_BD.T / temperature
    return F.cross_entropy(logits_BB, torch.arange(len(q_BD), device=q_BD.device))


def semantic_pull(q_BD: Tensor, prototype_CD: Tensor, temperature: float) -> Tensor:
    """Mean over i of sum_c softmax_c(q_i p_c / T) ||q_i - p_c||_2: semantic-enhanced loss, eq. 11.

    Args:
        q_BD: unit features, with gradient.
        prototype_CD: the unified structure, constant.
        temperature: T > 0.
    """
    q = full_precision(q_BD)
    share_BC = torch.softmax(q @ prototype_CD.T / temperature, dim=1)
    return (share_BC * lengths(q[:, None] - prototype_CD[None])).sum(dim=1).mean()


def structure_change(q_BD: Tensor, frozen_BD: Tensor, raw_BD: Tensor, raw_frozen_BD: Tensor) -> Tensor:
    """(1 / B^2) sum_ij [cos(q_i, q_j) - cos(f_i, f_j)]^2 + [||q_i - q_j|| - ||f_i - f_j||]^2: SPR, eq. 14.

    Args:
        q_BD: unit features, with gradient.
        frozen_BD: unit features of the same views by the frozen encoder.
        raw_BD, raw_frozen_BD: what distances are of: the same, or both before they have unit length.
    """
    q, f = full_precision(q_BD), full_precision(frozen_BD)
    cosine = q @ q.T - f @ f.T
    raw, raw_f = full_precision(raw_BD), full_precision(raw_frozen_BD)
    distance = lengths(raw[:, None] - raw[None]) - lengths(raw_f[:, None] - raw_f[None])
    return (cosine.square() + distance.square()).mean()


def domain_confusion(first_logit_B: Tensor, second_logit_B: Tensor) -> Tensor:
    """Binary cross-entropy of telling the domains apart, 1 for the first: eq. 13, mean over both batches."""
    first = F.binary_cross_entropy_with_logits(first_logit_B, torch.ones_like(first_logit_B))
    second = F.binary_cross_entropy_with_logits(second_logit_B, torch.zeros_like(second_logit_B))
    return (first + second) / 2


def switchable_match(
    q_BD: Tensor,
    target_B: Tensor,
    neighbour_BD: Tensor,
    reliable_B: Tensor,
    prototype_CD: Tensor,
    bank: Bank,
    temperature: float,
) -> Tensor:
    """Contrast of an image's counterparts in the other domain: SN2M, eq. 17, mean over the batch.

    -log( (e(q p~) + [reliable] e(q m~)) / (sum_c e(q p_c) + sum_j e(q m_j)) ), p the other domain's unified
    structure, m its bank; p~ is the image's prototype there and m~ its nearest row.

    Args:
        q_BD: unit features, with gradient.
        target_B: p~, rows of ``prototype_CD``, int64.
        neighbour_BD: m~, rows of the bank.
        reliable_B: whether the nearest row belongs to p~, bool.
        prototype_CD, bank: constant.
        temperature: T > 0.
    """
    q = full_precision(q_BD)
    to_prototype_BC = q @ prototype_CD.T / temperature
    own_B = to_prototype_BC.gather(1, target_B[:, None])[:, 0]
    near_B = (q * neighbour_BD).sum(dim=1) / temperature
    wanted_B = torch.where(reliable_B, torch.logaddexp(own_B, near_B), own_B)
    total_B = torch.logaddexp(torch.logsumexp(to_prototype_BC, dim=1), bank.log_total(q, temperature))
    return (total_B - wanted_B).mean()


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None


def reverse_gradient(x: Tensor, strength: float = 1.0) -> Tensor:
    """The same values; the gradient that flows back is multiplied by ``-strength`` (Ganin & Lempitsky,
    ICML 2015)."""
    reversed_x: Tensor = _Reverse.apply(x, strength)
    return reversed_x
