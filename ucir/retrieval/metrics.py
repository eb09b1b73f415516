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
    ap_Q: np.ndarray
    """Each query's average precision over the whole ranking, 0 to 1; ``nan`` without a counterpart."""
    interpolated_ap_Q: np.ndarray
    """The same with the best precision at each rank or any later one (VOC 2010), as CoDA's code has it."""

    @property
    def mean_average_precision(self) -> float:
        """mAP@All: over the queries with a counterpart, not interpolated."""
        return percent(self.ap_Q)

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
    average_precisions: list[np.ndarray] = [np.empty(0)]
    interpolated: list[np.ndarray] = [np.empty(0)]
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
        precision_QG = found_QG / place_G
        envelope_QG = np.maximum.accumulate(precision_QG[:, ::-1], axis=1)[:, ::-1]
        with np.errstate(invalid="ignore"):  # 0 / 0 is nan: no counterpart
            average_precisions.append((precision_QG * ranked_QG).sum(axis=1) / total_Q)
            interpolated.append((envelope_QG * ranked_QG).sum(axis=1) / total_Q)
    return RetrievalScores(
        {k: 100 * hits[k] / shown[k] if shown[k] else float("nan") for k in cutoffs},
        np.concatenate(average_precisions),
        np.concatenate(interpolated),
    )


def percent(value_Q: np.ndarray, label_Q: Sequence[str] | None = None) -> float:
    """100 times the mean of what is not ``nan``; ``nan`` if nothing is.

    Args:
        value_Q: one number a query.
        label_Q: for the mean over classes of the classes' means (macro).
    """
    there = ~np.isnan(value_Q)
    if not there.any():
        return float("nan")
    if label_Q is None:
        return float(100 * value_Q[there].mean())
    labels = np.asarray(label_Q)
    classes = dict.fromkeys(labels[there].tolist())
    return float(100 * np.mean([value_Q[there & (labels == label)].mean() for label in classes]))


def universal_scores(
    scores: RetrievalScores, label_Q: Sequence[str], gate_score_Q: np.ndarray
) -> dict[str, float]:
    """Scores of retrieval where some queries have no counterpart, in percent; UEM section 4.1.

    The paper does not say which mAP, nor over which queries accuracy is taken: each reading has a name.

    - ``mAP_interpolated_at_All``, ``mAP_macro_at_All``, ``mAP_macro_interpolated_at_All``: the last is CoDA's
      code, which UEM says it follows
    - ``mAP_gated_at_All``: a query with a counterpart that the gate rejects has an average precision of 0
    - ``null_shared``: rejected share of the queries with a counterpart, an error
    - ``null_private``: rejected share of those without: the accuracy of open-set detection, read as recall
    - ``null_accuracy``: right decisions over all queries
    - ``null_AUROC``: of the gate's score, which needs no threshold

    The last three are left out where every query has a counterpart, the mAPs where none has.

    Args:
        scores: what :func:`retrieval_scores` found.
        label_Q: class names of the queries.
        gate_score_Q: of a gate; above 0 is rejected.
    """
    from sklearn.metrics import roc_auc_score

    shared = ~np.isnan(scores.ap_Q)
    rejected = gate_score_Q > 0
    told: dict[str, float] = {}
    if shared.any():
        told["mAP_interpolated_at_All"] = percent(scores.interpolated_ap_Q)
        told["mAP_macro_at_All"] = percent(scores.ap_Q, label_Q)
        told["mAP_macro_interpolated_at_All"] = percent(scores.interpolated_ap_Q, label_Q)
        told["mAP_gated_at_All"] = percent(np.where(rejected, 0 * scores.ap_Q, scores.ap_Q))
        told["null_shared"] = float(100 * rejected[shared].mean())
    if not shared.all():
        told["null_private"] = float(100 * rejected[~shared].mean())
        told["null_accuracy"] = float(100 * (rejected == ~shared).mean())
        if shared.any():
            told["null_AUROC"] = float(100 * roc_auc_score(~shared, gate_score_Q))
    return told


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
