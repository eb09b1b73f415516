"""Contrast against prototypes, and the entropy of looking at the other domain's bank."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.memory import Bank
from ucir.precision import full_precision


def prototype_contrast(
    q_BD: Tensor, label_B: Tensor, centroid_KD: Tensor, temperature_K: Tensor | float
) -> Tensor:
    """Cross-entropy of each image's cluster over all prototypes, each with its own temperature.

    ProtoNCE (Li et al., ICLR 2021, eq. 11) and PCS (Yue et al., CVPR 2021, eq. 3), over all K prototypes:
    with K below the batch size, PCL's sampled negatives would run out or be the image's own prototype.

    Args:
        q_BD: unit features, with gradient.
        label_B: clusters of the images, int64.
        centroid_KD: prototypes, constant.
        temperature_K: > 0, one for each prototype or for all.

    Returns:
        Scalar: mean over the images.
    """
    return F.cross_entropy(full_precision(q_BD) @ centroid_KD.T / temperature_K, label_B)


def bank_discrimination(
    q_BD: Tensor, slot_B: Tensor, bank: Bank, temperature: float, counts_B: Tensor | None = None
) -> Tensor:
    """Which image of the bank is this? ID (Wu et al., CVPR 2018, eq. 2) with the full softmax.

    Mean over i of -log( exp(q_i v_i / T) / sum_a exp(q_i v_a / T) ), v the bank, i's own row the positive.

    Args:
        q_BD: unit features, with gradient.
        slot_B: the images' rows of the bank.
        bank: constant.
        temperature: T > 0.
        counts_B: images whose value counts, bool; the others' is 0 in the mean.
    """
    positive_B = (full_precision(q_BD) * bank.rows(slot_B)).sum(dim=1) / temperature
    value_B = bank.log_total(q_BD, temperature) - positive_B
    return value_B.mean() if counts_B is None else (value_B * counts_B).mean()


def self_matching(q_BD: Tensor, row_BD: Tensor, weight_KD: Tensor, sharpening: float) -> Tensor:
    """Cross-entropy of an image's outputs against the sharpened outputs of its bank row: CoDA's ISS.

    Mean over i of -sum_k softmax_k(w_k v_i / t) log softmax_k(w_k q_i), as the release's
    ``trainer_coda.py``; v, the target, is constant.

    Args:
        q_BD: unit features, with gradient.
        row_BD: v, the images' rows of the bank.
        weight_KD: of a linear classifier, with gradient.
        sharpening: t > 0.
    """
    with torch.no_grad():
        target_BK = torch.softmax(row_BD @ weight_KD.T / sharpening, dim=1)
    return F.cross_entropy(full_precision(q_BD) @ weight_KD.T, target_BK)


def classifier_gap(q_BD: Tensor, own_KD: Tensor, other_KD: Tensor) -> Tensor:
    """Mean over i of sum_k | w_k q_i - w'_k q_i |: CoDA's CCA, of raw outputs as released.

    Args:
        q_BD: unit features, with gradient.
        own_KD, other_KD: weights of the two domains' classifiers, with gradient.
    """
    q = full_precision(q_BD)
    return (q @ own_KD.T - q @ other_KD.T).abs().sum(dim=1).mean()


def neighbour_entropy(q_BD: Tensor, other: Bank, temperature: float, nearest: int) -> Tensor:
    """Entropy of softmax(q_i v / T) over the ``nearest`` most similar rows of the other domain's bank.

    CDS's cross-domain matching (Kim et al., ICCV 2021, eq. 4): each image should look like few of the
    other domain's. 1e-5 inside the logarithm as in the official code.

    Args:
        q_BD: unit features of one domain, with gradient.
        other: bank of the other domain, constant.
        temperature: T > 0.
        nearest: rows that count, 700 in the official code; all where there are fewer.

    Returns:
        Scalar: mean over the images.
    """
    p_BM = torch.softmax(other.largest(q_BD, nearest) / temperature, dim=1)
    return -(p_BM * torch.log(p_BM + 1e-5)).sum(dim=1).mean()
