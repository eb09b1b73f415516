"""Ranking metrics against a brute-force ranking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from ucir.retrieval.metrics import ranked_relevance, retrieval_scores, top_ranked


def brute_force(similarity: np.ndarray, query: list[str], gallery: list[str], k: int) -> tuple[float, float]:
    """P@K and mAP@All from the definitions; ties rank irrelevant images first."""
    hits = shown = 0
    precisions = []
    for row, own in zip(similarity, query, strict=True):
        order = sorted(range(len(gallery)), key=lambda g: (-row[g], gallery[g] == own))
        relevant = [gallery[g] == own for g in order]
        top = min(k, sum(relevant))
        hits += sum(relevant[:top])
        shown += top
        if any(relevant):
            ranks = [rank for rank, hit in enumerate(relevant, 1) if hit]
            precisions.append(sum(i / rank for i, rank in enumerate(ranks, 1)) / len(ranks))
    nan = float("nan")
    return (
        100 * hits / shown if shown else nan,
        100 * sum(precisions) / len(precisions) if precisions else nan,
    )


@given(
    queries=st.lists(st.sampled_from("abcd"), min_size=1, max_size=12),
    gallery=st.lists(st.sampled_from("abc"), min_size=1, max_size=12),
    k=st.integers(1, 15),
    levels=st.integers(1, 50),
    seed=st.integers(0, 10**6),
)
def test_scores_equal_a_brute_force_ranking(
    queries: list[str], gallery: list[str], k: int, levels: int, seed: int
) -> None:
    """Few similarity levels make ties; class d is missing from every gallery."""
    rng = np.random.default_rng(seed)
    similarity = rng.integers(-levels, levels + 1, (len(queries), len(gallery))) / levels
    # features whose dot products are these similarities: the gallery is the identity
    found = retrieval_scores(
        torch.from_numpy(similarity).float(), torch.eye(len(gallery)), queries, gallery, [k]
    )
    precision, mean_average_precision = brute_force(similarity, queries, gallery, k)
    assert found.precision[k] == pytest.approx(precision, nan_ok=True)
    assert found.mean_average_precision == pytest.approx(mean_average_precision, nan_ok=True)


def test_scores_by_hand() -> None:
    """Class b has one image only: P@2 of its query is out of 1."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    gallery = normalize(torch.tensor([[1.0, 0.1], [1.0, 0.5], [1.0, 0.9], [0.1, 1.0]]), dim=1)
    found = retrieval_scores(query, gallery, ["a", "b"], ["a", "c", "a", "b"], [1, 2])
    assert found.precision == {1: 100.0, 2: pytest.approx(100 * 2 / 3)}
    assert found.mean_average_precision == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1) / 2)
    assert found.named().keys() == {"P_at_1", "P_at_2", "mAP_at_All"}


def test_many_queries_score_like_few() -> None:
    """More queries than one chunk."""
    x = normalize(torch.randn(600, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = [str(i % 3) for i in range(600)]
    whole = retrieval_scores(x, x[:50], labels, labels[:50], [5]).mean_average_precision
    parts = [
        retrieval_scores(x[i : i + 100], x[:50], labels[i : i + 100], labels[:50], [5])
        for i in range(0, 600, 100)
    ]
    assert whole == pytest.approx(np.mean([p.mean_average_precision for p in parts]))


def test_equal_similarities_do_not_favour_the_order_of_files() -> None:
    relevant = np.array([[True, False, True]])
    assert ranked_relevance(np.zeros((1, 3), np.float32), relevant).tolist() == [[False, True, True]]


def test_top_ranked_are_the_nearest() -> None:
    gallery = normalize(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), dim=1)
    assert top_ranked(torch.tensor([[1.0, 0.0]]), gallery, 10).tolist() == [[1, 2, 0]]
