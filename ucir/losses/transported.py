"""Contrast of an image's own target against the prototypes that it is not matched with: ProtoOT's losses."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ucir.precision import full_precision


def against_unmatched(
    q_BD: Tensor,
    target_BD: Tensor,
    prototype_KD: Tensor,
    label_B: Tensor,
    temperature: float,
    *,
    push: bool = True,
    normalised: bool = False,
) -> Tensor:
    """Mean of -log( e(q_i t_i) / (e(q_i t_i) + sum_{k != m(i)} e(n_ik)) ) with e(x) = exp(x / T).

    ProtoOT ``builder.py``: targets are the image's key, its nearest neighbour's bank row, or its matched
    prototype; the negatives are prototypes alone, never images.

    Args:
        q_BD: unit features, with gradient.
        target_BD: unit targets, constant.
        prototype_KD: unit prototypes, constant.
        label_B: m(i), the matched prototype, int64.
        temperature: T > 0.
        push: without, there are no negatives and the loss is mean -q_i t_i / T.
        normalised: n_ik is q_i p_k, each row divided by its length over all K, as the released
            cross-domain loss has it, rather than q_i p_k itself.

    Returns:
        Scalar, float32.
    """
    q = full_precision(q_BD)
    positive_B1 = (q * target_BD).sum(dim=1, keepdim=True)
    if not push:
        return -positive_B1.mean() / temperature
    logits_BK = q @ prototype_KD.T
    if normalised:
        logits_BK = F.normalize(logits_BK, dim=1)
    logits_BK = logits_BK.scatter(1, label_B[:, None], positive_B1)
    return F.cross_entropy(logits_BK / temperature, label_B)
