"""The nearest of many features by cosine: all compared, or those of a few cells of faiss's inverted file."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np

RECALL = 0.99
"""What an inverted file must reach to be used: else all pictures are compared."""
RECALL_DEPTHS = (10, 200)
POINTS_A_CELL = 64
"""Pictures that each cell of an inverted file is learnt from, faiss's own advice being 30 to 256."""


def exact_neighbours(
    queries_QD: np.ndarray, rows_ND: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Similarities and rows of the ``count`` most similar, best first, (Q, count); all rows are compared."""
    scores, places = faiss.knn(
        queries_QD, rows_ND, min(count, len(rows_ND)), metric=faiss.METRIC_INNER_PRODUCT
    )
    return scores, places


def learn_cells(rows: np.ndarray, ids: np.ndarray) -> Any:
    """faiss's inverted file of features (N, D) under their ids, int64; 4 sqrt(N) cells."""
    cells, dim = round(4 * len(rows) ** 0.5), rows.shape[1]
    inverted: Any = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
    inverted.cp.seed = 0
    inverted.cp.max_points_per_centroid = POINTS_A_CELL
    few = min(len(rows), POINTS_A_CELL * cells)
    chosen = np.sort(np.random.default_rng(0).choice(len(rows), few, replace=False))
    inverted.train(np.ascontiguousarray(rows[chosen]))
    add_rows(inverted, rows, ids, np.arange(len(rows)))
    return inverted


def add_rows(inverted: Any, rows: np.ndarray, ids: np.ndarray, new: np.ndarray) -> None:
    """Add some rows, by their numbers, to an inverted file."""
    for first in range(0, len(new), 65536):
        part = new[first : first + 65536]
        inverted.add_with_ids(np.ascontiguousarray(rows[part]), np.ascontiguousarray(ids[part]))


def held_ids(inverted: Any) -> np.ndarray:
    """The ids of all rows that an inverted file has, cell by cell."""
    lists = inverted.invlists
    parts = [
        faiss.rev_swig_ptr(lists.get_ids(cell), size).copy()
        for cell in range(inverted.nlist)
        if (size := lists.list_size(cell))
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def fewest_probes(inverted: Any, rows: np.ndarray, queries: np.ndarray) -> tuple[int, dict[str, float]]:
    """The fewest cells to look into that reach RECALL at every depth; 0 if half of them do not."""
    true, _ = exact_neighbours(queries, rows, max(RECALL_DEPTHS))
    probes = 1
    while probes <= inverted.nlist // 2:
        inverted.nprobe = probes
        scores, _ = inverted.search(queries, max(RECALL_DEPTHS))
        recall = {str(depth): recall_at(depth, scores, true) for depth in RECALL_DEPTHS}
        if min(recall.values()) >= RECALL:
            return probes, recall
        probes *= 2
    return 0, {}


def recall_at(depth: int, scores_QK: np.ndarray, true_QK: np.ndarray) -> float:
    """Share of hits that are at least as near as the true ``depth``-th: ties cost nothing.

    Args:
        depth: k of recall@k, at most K.
        scores_QK: similarities of what was returned, best first.
        true_QK: those of an exact search.
    """
    limit_Q1 = true_QK[:, depth - 1 : depth] - 1e-6
    return float((scores_QK[:, :depth] >= limit_Q1).mean())
