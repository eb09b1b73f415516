"""Ranking metrics, as the papers define them.

Q queries, G gallery images, R relevant ones. All functions are pure and read labels: nothing under
``ucir.training`` or ``ucir.methods`` may import this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 256


@dataclass(frozen=True)
class RetrievalScores:
    """One direction's scores, in percent; ``nan`` where no query has a counterpart in the gallery."""

    precision: dict[int, float]  # K to P@K
    mean_average_precision: float

    def named(self) -> dict[str, float]:
        """Metric identifiers that MLflow accepts: ``P_at_50``, ``mAP_at_All``."""
        scores = {f"P_at_{k}": value for k, value in self.precision.items()}
        return {**scores, "mAP_at_All": self.mean_average_precision}


def retrieval_scores(
    query_QD: Tensor,
    gallery_GD: Tensor,
    query_label_Q: Sequence[str],
    gallery_label_G: Sequence[str],
    cutoffs: Sequence[int],
) -> RetrievalScores:
    """P@K and mAP@All of ranking the gallery by cosine similarity.

    P@K = 100 * sum_q hits_q(t_q) / sum_q t_q with t_q = min(K, R_q): the micro average of UCDIR's and
    ProtoOT's ``retrieval_precision_cal``; a query without a counterpart counts on neither side.
    mAP@All = 100 * mean over queries with R_q > 0 of (1 / R_q) sum_i i / rank_i over the whole ranking,
    not interpolated. Equal similarities rank irrelevant images first, so that no order of files helps.

    Args:
        query_QD, gallery_GD: unit features.
        query_label_Q, gallery_label_G: class names.
        cutoffs: the K.
    """
    gallery_labels = np.asarray(gallery_label_G)
    query_labels = np.asarray(query_label_Q)
    hits = dict.fromkeys(cutoffs, 0)
    shown = dict.fromkeys(cutoffs, 0)
    average_precisions: list[np.ndarray] = []
    for first in range(0, len(query_labels), CHUNK):
        rows = slice(first, first + CHUNK)
        relevant_QG = gallery_labels[None, :] == query_labels[rows, None]
        ranked_QG = ranked_relevance((query_QD[rows] @ gallery_GD.T).cpu().numpy(), relevant_QG)
        found_QG = ranked_QG.cumsum(axis=1)
        total_Q = found_QG[:, -1]
        for k in cutoffs:
            top_Q = np.minimum(k, total_Q)
            has = top_Q > 0
            hits[k] += int(found_QG[has, top_Q[has] - 1].sum())
            shown[k] += int(top_Q.sum())
        place_G = np.arange(1, len(gallery_labels) + 1)
        has = total_Q > 0
        precision_QG = found_QG[has] / place_G
        average_precisions.append((precision_QG * ranked_QG[has]).sum(axis=1) / total_Q[has])
    ap = np.concatenate(average_precisions) if average_precisions else np.empty(0)
    return RetrievalScores(
        {k: 100 * hits[k] / shown[k] if shown[k] else float("nan") for k in cutoffs},
        float(100 * ap.mean()) if len(ap) else float("nan"),
    )


def ranked_relevance(similarity_QG: np.ndarray, relevant_QG: np.ndarray) -> np.ndarray:
    """Relevance in ranked order, bool (Q, G); among equal similarities irrelevant images come first.

    The relevance rides in the lowest bit of the similarity, so that values alone are sorted, several
    times faster than sorting indices; similarities closer than 5e-7 count as equal.
    """
    negative = similarity_QG.astype(np.float32) - np.float32(2)  # below 0: a larger bit pattern is less
    bits = negative.view(np.uint32)
    bits = (bits & np.uint32(0xFFFFFFFE)) | relevant_QG
    bits.sort(axis=1)
    relevant: np.ndarray = (bits & np.uint32(1)).astype(bool)
    return relevant


def top_ranked(query_QD: Tensor, gallery_GD: Tensor, count: int) -> np.ndarray:
    """Slots of the ``count`` most similar gallery images for each query, best first, int64."""
    count = min(count, len(gallery_GD))
    return torch.topk(query_QD @ gallery_GD.T, count, dim=1).indices.cpu().numpy()
