"""Gates: same classes are kept, private ones rejected; UEM's own limits; scores of universal retrieval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ucir.losses.universal import product_dissimilarity
from ucir.prototypes.clustering import kmeans
from ucir.prototypes.merging import MergingLimit, unify
from ucir.retrieval.gate import Gate, calibrated_limit, cluster_for_gate, fit_gate, nearest_distances
from ucir.retrieval.metrics import Decisions, metric_values
from ucir.retrieval.ranking import rank

CENTRES = normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=1)


def domain(classes: list[int], per_class: int, seed: int, spread: float = 0.05) -> tuple[Tensor, list[str]]:
    generator = torch.Generator().manual_seed(seed)
    number = torch.tensor(classes).repeat_interleave(per_class)
    noise = spread * torch.randn(len(number), 16, generator=generator)
    return normalize(CENTRES[number] + noise, dim=1), [str(i) for i in number.tolist()]


def fitted(
    kind: str, query: Tensor, gallery: Tensor, clusters: int | str, limit: MergingLimit = "domain"
) -> Gate:
    clusterings = cluster_for_gate(query, clusters), cluster_for_gate(gallery, clusters)
    return fit_gate(kind, query, gallery, clusterings, limit)


@pytest.mark.parametrize("kind", ["merged", "spread"])
def test_same_classes_are_kept_and_disjoint_ones_rejected(kind: str) -> None:
    query, _ = domain([0, 1, 2, 3], 40, seed=1)
    same, _ = domain([0, 1, 2, 3], 30, seed=2)
    other = normalize(same + 3 * CENTRES[4], dim=1)  # a narrow cone, elsewhere
    kept = fitted(kind, query, same, 4).scores(query, same)
    assert float((kept > 0).float().mean()) < 0.05
    gone = fitted(kind, query, other, 4).scores(query, other)
    assert float((gone > 0).float().mean()) > 0.95


def test_wide_features_get_the_clusters_that_they_have() -> None:
    """K is looked for in few dimensions, and the clusters are of all of them."""
    narrow, _ = domain([0, 1, 2, 3, 4, 5], 40, seed=1)
    basis, _ = torch.linalg.qr(torch.randn(300, 300, generator=torch.Generator().manual_seed(2)))
    noise = 0.01 * torch.randn(240, 300, generator=torch.Generator().manual_seed(3))
    wide = cluster_for_gate(normalize(narrow @ basis[:16] + noise, dim=1))
    assert wide.centroid_KD.shape == (6, 300)
    known = cluster_for_gate(narrow, 6)
    pairs = set(zip(wide.label_N.tolist(), known.label_N.tolist(), strict=True))
    assert len(pairs) == 6


def test_uems_rule_merges_disjoint_classes_that_lie_alike() -> None:
    """What eq. 9 cannot see: after the translation, classes equally far from each other fit any others."""
    eye = torch.eye(8)
    structure = unify(eye[:4], eye[4:], eye[:4].mean(dim=0), eye[4:].mean(dim=0))
    assert structure.merged_K.all()


def test_a_limit_of_a_pair_rejects_fewer_where_two_clusters_of_a_domain_lie_close() -> None:
    query, _ = domain([0, 1, 2], 30, seed=1, spread=0.01)
    gallery, _ = domain([0, 1, 2], 30, seed=2, spread=0.01)
    for x, class_number in ((query, 2), (gallery, 2)):  # one class lies in two clusters
        half = slice(30 * class_number, 30 * class_number + 15)
        x[half] = normalize(x[half] + 0.1 * CENTRES[7], dim=1)
    gallery[:30] = normalize(gallery[:30] + 0.3 * CENTRES[6], dim=1)  # another looks otherwise here
    rejected = [
        float((fitted("merged", query, gallery, 4, limit).scores(query, gallery) > 0).float().mean())
        for limit in ("domain", "pair")
    ]
    assert rejected[1] < rejected[0]


@pytest.mark.parametrize("kind", ["merged", "spread"])
def test_private_queries_alone_are_rejected(kind: str) -> None:
    query, labels = domain([0, 1, 2, 3, 4, 5], 40, seed=1)
    gallery, gallery_labels = domain([0, 1, 2], 40, seed=2)
    gate = fitted(kind, query, gallery, "elbow")
    ranking = rank(query, gallery, labels, gallery_labels)
    values = metric_values(ranking, (5,), Decisions(gate.scores(query, gallery).numpy()))
    assert values["null_private"] > 90
    assert values["null_shared"] < 10
    assert values["null_AUROC"] > 95
    assert values["mAP_gated_at_All"] <= values["mAP_at_All"]


def test_the_merged_gates_limit_is_the_widest_pair_of_members() -> None:
    """App. B.1, eqs. 25 and 26, by brute force."""
    query, _ = domain([0, 1], 12, seed=1)
    gallery, _ = domain([0, 1], 9, seed=2)
    gate = fitted("merged", query, gallery, 2)
    one, other = (
        kmeans(x, 2, iterations=20, restarts=5, seed=0, max_points=2000).label_N for x in (query, gallery)
    )
    for k in range(2):
        members = query[one == k]
        partner = max(range(2), key=lambda j: float((members.mean(0) * gallery[other == j].mean(0)).sum()))
        pairs = [(u, v) for u in members for v in gallery[other == partner]]
        widest = max(float(product_dissimilarity(u[None], v[None])) for u, v in pairs)
        assert float(gate.limit_K[k]) == pytest.approx(widest, abs=1e-6)
    score = gate.scores(query, gallery)
    nearest = product_dissimilarity(query, gallery).amin(dim=1)
    assert torch.allclose(score, nearest - gate.limit_K[one], atol=1e-6)


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_a_calibrated_gate_rejects_as_often_as_it_is_allowed_to(rate: float) -> None:
    """Of queries with a counterpart the share that one asks for; beside strangers less, never more."""
    gallery, gallery_labels = domain([0, 1, 2], 60, seed=2, spread=0.2)
    same, _ = domain([0, 1, 2], 200, seed=1, spread=0.2)
    nearest = nearest_distances(same, gallery)
    assert nearest.tolist() == pytest.approx([min(1 - float(q @ g) for g in gallery) for q in same], abs=1e-6)
    rejected = nearest > calibrated_limit(nearest, rate)
    assert float(rejected.float().mean()) == pytest.approx(rate, abs=0.01)
    both, both_labels = domain([0, 1, 2, 3], 200, seed=1, spread=0.2)
    nearest = nearest_distances(both, gallery)
    beyond = (nearest - calibrated_limit(nearest, rate)).numpy()
    ranking = rank(both, gallery, both_labels, gallery_labels)
    values = metric_values(ranking, (5,), Decisions(np.full(len(both), -1.0), beyond))
    assert values["calibrated_shared"] <= 100 * rate
    assert values["calibrated_private"] > 3 * 100 * rate
    assert values["calibrated_AUROC"] > 90
    assert values["null_private"] == 0  # the method's own gate is another
    assert "calibrated_shared" not in metric_values(ranking, (5,), Decisions(beyond))


def test_degenerate_features_give_a_defined_answer() -> None:
    point = CENTRES[:1].expand(10, 16).contiguous()
    query, _ = domain([0, 1], 10, seed=1)
    for kind in ("merged", "spread"):
        for a, b in ((point, point), (point, query), (query, point), (query, query)):
            for k in (1, 2):
                assert fitted(kind, a, b, k).scores(a, b).isfinite().all()
    assert float((fitted("merged", query, query, 2).scores(query, query) > 0).float().mean()) == 0
