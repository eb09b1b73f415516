"""Instance-wise contrast."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.precision import full_precision


def instance_contrast(q_BD: Tensor, k_BD: Tensor, others_B: Tensor, temperature: float) -> Tensor:
    """InfoNCE of a view against its key and the bank of its own domain.

    UCDIR eq. 1: mean over i of -log( e(q_i k_i) / (e(q_i k_i) + sum_{a != i} e(q_i M_a)) ) with
    e(x) = exp(x / T).
    The positive is the fresh key; the image's own row of the bank is no negative (``builder.py``).

    Args:
        q_BD: unit features of the query encoder, with gradient.
        k_BD: unit features of the key encoder.
        others_B: log of the sum over the bank's rows of other images, :meth:`ucir.memory.Bank.log_total`.
        temperature: T > 0.

    Returns:
        Scalar, float32.
    """
    positive_B = (full_precision(q_BD) * k_BD).sum(dim=1) / temperature
    return (torch.logaddexp(others_B, positive_B) - positive_B).mean()


def mixed_contrast(
    q_BD: Tensor, k_BD: Tensor, others_BM: Tensor, share_BM: Tensor, temperature: float
) -> Tensor:
    """Instance contrast against one set of negatives or another: the mixture of ``ucir.methods.darl``.

    Mean over i of -log sum_d p_id e(q_i k_i) / (e(q_i k_i) + sum_{a in d} e(q_i M_a)) with e(x) = exp(x / T).

    Args:
        q_BD: unit features of the query encoder, with gradient.
        k_BD: unit features of the key encoder.
        others_BM: for each of M sets the log of the sum over its negatives, with gradient to q.
        share_BM: p, constant; rows sum to 1.
        temperature: T > 0.

    Returns:
        Scalar, float32.
    """
    positive_B1 = (full_precision(q_BD) * k_BD).sum(dim=1, keepdim=True) / temperature
    log_p_BM = positive_B1 - torch.logaddexp(others_BM, positive_B1)
    return -torch.logsumexp(log_p_BM + share_BM.log(), dim=1).mean()


def target_distance(q_BD: Tensor, target_BD: Tensor) -> Tensor:
    """Mean over i of 1 - q_i t_i: how far features are from where they are to go.

    Args:
        q_BD: unit features, with gradient.
        target_BD: unit targets, constant.
    """
    return 1 - (full_precision(q_BD) * target_BD).sum(dim=1).mean()


def view_contrast(first_BD: Tensor, second_BD: Tensor, domain_B: Tensor, temperature: float) -> Tensor:
    """In-batch contrast of two views, for the label-free start: NT-Xent (Chen et al., ICML 2020, eq. 1).

    Only images of the same domain are negatives: telling the domains apart is not rewarded.

    Args:
        first_BD, second_BD: unit features of two views of the same B images, with gradient.
        domain_B: number of each image's domain.
        temperature: > 0.

    Returns:
        Scalar: mean over the 2B views of the cross-entropy of the partner among the domain's others.
    """
    views = full_precision(torch.cat([first_BD, second_BD]))
    domain = torch.cat([domain_B, domain_B])
    barred = domain[:, None] != domain[None, :]
    barred.fill_diagonal_(True)
    logits = (views @ views.T / temperature).masked_fill(barred, float("-inf"))
    partner = torch.arange(len(views), device=views.device).roll(len(first_BD))
    return F.cross_entropy(logits, partner)
