"""Cluster-wise contrast."""

from __future__ import annotations

import torch
from torch import Tensor

from ucir.precision import full_precision


def cluster_contrast(
    q_BD: Tensor, row_BD: Tensor, mean_BD: Tensor, others_B: Tensor, temperature: float
) -> Tensor:
    """Mean log-probability of the bank rows in one's own cluster, per image, negated.

    UCDIR eq. 2:  -1/|P(i)| sum_{p in P(i)} log( exp(q_i M_p / T) / sum_a exp(q_i M_a / T) ) with
    P(i) all bank rows of i's cluster, its own row included. The mean over P(i) needs only the mean
    bank row of each cluster: it is  log sum_a exp(q_i M_a / T) - q_i mean_{P(i)}(M) / T.

    Args:
        q_BD: unit features, with gradient.
        row_BD: the images' own rows of the bank.
        mean_BD: mean of the rows of each image's cluster.
        others_B: log of the sum over all rows but the own, :meth:`ucir.memory.Bank.log_total`.
        temperature: T > 0.

    Returns:
        (B,) one value per image; see :func:`confident` for which of them count.
    """
    q = full_precision(q_BD)
    total_B = torch.logaddexp(others_B, (q * row_BD).sum(dim=1) / temperature)
    return total_B - (q * mean_BD).sum(dim=1) / temperature


def confident(
    k_BD: Tensor, label_B: Tensor, centroid_KD: Tensor, temperature: float, threshold: float
) -> Tensor:
    """Images whose key lies clearly in its cluster: softmax_c(k_i c / T)[label_i] > threshold, bool (B,).

    In the official code (``cwcon-filterthresh``), absent from the paper; threshold 0 keeps all.
    """
    probability_BK = torch.softmax(full_precision(k_BD) @ centroid_KD.T / temperature, dim=1)
    return probability_BK.gather(1, label_B[:, None])[:, 0] > threshold


def mean_of_kept(value_B: Tensor, keep_B: Tensor) -> Tensor:
    """Mean over the kept images; 0 when none is kept (UCDIR ``builder.py``: sum / (count + 1e-8))."""
    keep = keep_B.to(value_B.dtype)
    return (keep * value_B).sum() / (keep.sum() + 1e-8)
