"""Ranking metrics against a brute-force ranking."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from ucir.retrieval.metrics import (
    Decisions,
    average_precision,
    metric_values,
    metrics,
    percent,
    precision_at,
    precision_by_class,
)
from ucir.retrieval.ranking import Ranking, rank, ranked_relevance, top_ranked


def brute_force(similarity: np.ndarray, query: list[str], gallery: list[str], k: int) -> tuple[float, float]:
    """P@K and mAP@All from the definitions; ties rank irrelevant images first."""
    hits = shown = 0
    precisions = []
    for row, label in zip(similarity, query, strict=True):
        order = sorted(range(len(gallery)), key=lambda g: (-row[g], gallery[g] == label))
        relevant = [gallery[g] == label for g in order]
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
    ranking = rank(torch.from_numpy(similarity).float(), torch.eye(len(gallery)), queries, gallery)
    precision, mean_average_precision = brute_force(similarity, queries, gallery, k)
    expected = {f"P_at_{k}": precision, "mAP_at_All": mean_average_precision}
    assert metric_values(ranking, [k]) == pytest.approx(expected, nan_ok=True)


def test_scores_by_hand() -> None:
    """Class b has one image only: P@2 of its query is out of 1."""
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    gallery = normalize(torch.tensor([[1.0, 0.1], [1.0, 0.5], [1.0, 0.9], [0.1, 1.0]]), dim=1)
    ranking = rank(query, gallery, ["a", "b"], ["a", "c", "a", "b"])
    assert ranking.rank_R.tolist() == [1, 3, 1]
    assert metric_values(ranking, [1, 2]) == {
        "P_at_1": 100.0,
        "P_at_2": pytest.approx(100 * 2 / 3),
        "mAP_at_All": pytest.approx(100 * ((1 + 2 / 3) / 2 + 1) / 2),
    }


def test_many_queries_score_like_few() -> None:
    """More queries than one chunk."""
    x = normalize(torch.randn(600, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = [str(i % 3) for i in range(600)]
    whole = average_precision(rank(x, x[:50], labels, labels[:50]))
    parts = [rank(x[i : i + 100], x[:50], labels[i : i + 100], labels[:50]) for i in range(0, 600, 100)]
    assert np.allclose(whole, np.concatenate([average_precision(part) for part in parts]))


def test_equal_similarities_do_not_favour_the_order_of_files() -> None:
    relevant = np.array([[True, False, True]])
    assert ranked_relevance(np.zeros((1, 3), np.float32), relevant).tolist() == [[False, True, True]]


def test_top_ranked_are_the_nearest() -> None:
    gallery = normalize(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), dim=1)
    assert top_ranked(torch.tensor([[1.0, 0.0]]), gallery, 10).tolist() == [[1, 2, 0]]


def test_every_metric_has_its_own_identifier_and_name() -> None:
    table = metrics((5, 10))
    for field in ("identifier", "name"):
        assert len({getattr(metric, field) for metric in table}) == len(table)


RANKING = Ranking(
    # two queries of a, one of b, two without a counterpart
    np.array([1, 3, 4, 4]),
    np.array([1, 2, 1, 0, 0]),
    np.array(["a", "a", "b", "c", "d"]),
)
BEYOND = np.array([-1.0, 2.0, -3.0, 1.0, -2.0])


def queries(rows: slice) -> Ranking:
    kept = np.isin(RANKING.query_R, np.arange(5)[rows])
    return Ranking(RANKING.rank_R[kept], RANKING.relevant_Q[rows], RANKING.label_Q[rows])


def test_metrics_of_universal_retrieval_by_hand() -> None:
    second = (1 / 3 + 2 / 4) / 2
    values = metric_values(RANKING, (2,), Decisions(BEYOND))
    assert values == {
        "P_at_2": pytest.approx(100 * 1 / 4),
        "mAP_at_All": pytest.approx(100 * (1 + second + 1 / 4) / 3),
        "mAP_interpolated_at_All": pytest.approx(100 * (1 + 1 / 2 + 1 / 4) / 3),
        "mAP_macro_at_All": pytest.approx(100 * ((1 + second) / 2 + 1 / 4) / 2),
        "mAP_macro_interpolated_at_All": pytest.approx(100 * ((1 + 1 / 2) / 2 + 1 / 4) / 2),
        "mAP_gated_at_All": pytest.approx(100 * 1.25 / 3),
        "null_shared": pytest.approx(100 / 3),
        "null_private": pytest.approx(50),
        "null_accuracy": pytest.approx(60),
        # of the six pairs (shared, private) three have the private one farther out
        "null_AUROC": pytest.approx(50),
    }
    closed = metric_values(queries(slice(3)), (2,), Decisions(BEYOND[:3]))
    assert set(closed) == set(values) - {"null_private", "null_accuracy", "null_AUROC"}
    disjoint = metric_values(queries(slice(3, 5)), (2,), Decisions(BEYOND[3:]))
    assert set(disjoint) == {"P_at_2", "mAP_at_All", "null_private", "null_accuracy"}
    assert np.isnan(disjoint["mAP_at_All"])
    assert np.isnan(precision_at(queries(slice(3, 5)), k=2))
    assert np.isnan(percent(np.array([np.nan])))
    # of class a one hit among 1 + 2 shown, of b none; c and d have no counterpart
    assert precision_by_class(RANKING, 2) == {"a": pytest.approx(100 / 3), "b": 0.0}
    assert precision_by_class(RANKING, 4) == {"a": pytest.approx(100 / 3), "b": 0.0}
    assert precision_by_class(queries(slice(3, 5)), 2) == {}


def test_interpolated_precision_is_the_best_at_this_rank_or_later() -> None:
    query = normalize(torch.tensor([[1.0, 0.0]]), dim=1)
    angles = torch.linspace(0.1, 1.5, 6)
    gallery = torch.stack([angles.cos(), angles.sin()], dim=1)
    ranking = rank(query, gallery, ["a"], ["b", "a", "b", "a", "a", "b"])
    assert average_precision(ranking)[0] == pytest.approx((1 / 2 + 2 / 4 + 3 / 5) / 3)
    assert average_precision(ranking, interpolate=True)[0] == pytest.approx(3 / 5)
