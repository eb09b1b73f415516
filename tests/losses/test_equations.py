"""Value and gradient of every loss against a float64 loop over scalars, on random and on degenerate inputs.

The loops are written from the equations; autograd differentiates them step by step.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ucir.losses.assignment import distance_of_distance, self_entropy
from ucir.losses.cluster import cluster_contrast, confident, mean_of_kept
from ucir.losses.instance import instance_contrast
from ucir.losses.matched import matched_distance, soft_assignment, soft_centroids
from ucir.losses.prototype import (
    bank_discrimination,
    classifier_gap,
    neighbour_entropy,
    prototype_contrast,
    self_matching,
)
from ucir.losses.transported import against_unmatched
from ucir.memory import Bank

B, N, D = 5, 9, 4
SLOT = [3, 0, 8, 3, 5]  # one image twice


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(x, y, strict=True):
        total = total + a * b
    return total


def log_softmax(logits: list[Tensor]) -> list[Tensor]:
    top = max(float(x.detach()) for x in logits)
    total = sum(((x - top).exp() for x in logits), torch.zeros((), dtype=torch.float64))
    return [x - top - total.log() for x in logits]


def mean(values: list[Tensor]) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.float64)) / max(1, len(values))


CASES = {
    "random": ([i % 3 for i in range(N)], unit(3, D, seed=3), unit(3, D, seed=4), 0.2),
    "cold": ([i % 3 for i in range(N)], unit(3, D, seed=3), unit(3, D, seed=4), 0.01),
    "one cluster": ([0] * N, unit(1, D, seed=3), unit(1, D, seed=4), 0.2),
    "one sample each": (list(range(N)), unit(N, D, seed=3), unit(N, D, seed=4), 0.2),
    "identical centroids": (
        [i % 3 for i in range(N)],
        unit(1, D, seed=3).expand(3, D),
        unit(3, D, seed=4),
        0.2,
    ),
    "an empty cluster": ([2 * (i % 2) for i in range(N)], unit(3, D, seed=3), unit(2, D, seed=4), 0.2),
}


def agree(fast: Callable[[Tensor], Tensor], slow: Callable[[Tensor], Tensor]) -> None:
    results = []
    for loss in (fast, slow):
        q = unit(B, D, seed=0).requires_grad_(True)
        value = loss(q)
        (gradient,) = torch.autograd.grad(value, q)
        assert value.isfinite()
        assert gradient.isfinite().all()
        results.append((value.detach(), gradient))
    (value, gradient), (expected, slope) = results
    assert float(value) == pytest.approx(float(expected), rel=1e-6, abs=1e-9)
    assert torch.allclose(gradient, slope, rtol=1e-6, atol=1e-6 * float(slope.abs().max()) + 1e-9)


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[list[int], Tensor, Tensor, float]:
    return CASES[request.param]


Case = tuple[list[int], Tensor, Tensor, float]


def test_instance_contrast(case: Case) -> None:
    """UCDIR eq. 1."""
    *_, t = case
    k, bank = unit(B, D, seed=1), unit(N, D, seed=2)

    def slow(q: Tensor) -> Tensor:
        values = []
        for i, slot in enumerate(SLOT):
            others = [dot(q[i], bank[a]) / t for a in range(N) if a != slot]
            values.append(-log_softmax([dot(q[i], k[i]) / t, *others])[0])
        return mean(values)

    agree(lambda q: instance_contrast(q, k, torch.tensor(SLOT), Bank(bank), t), slow)


def test_cluster_contrast_with_its_filter(case: Case) -> None:
    """UCDIR eq. 2, over the images whose key lies in its cluster with more than a fifth."""
    label_N, centroid, _, t = case
    k, bank = unit(B, D, seed=1), unit(N, D, seed=2)
    own = torch.tensor([label_N[slot] for slot in SLOT])

    def slow(q: Tensor) -> Tensor:
        values = []
        for i, slot in enumerate(SLOT):
            probability = log_softmax([dot(k[i], c) / t for c in centroid])[label_N[slot]].exp()
            if float(probability) > 0.2:
                logs = log_softmax([dot(q[i], row) / t for row in bank])
                values.append(-mean([logs[a] for a in range(N) if label_N[a] == label_N[slot]]))
        return mean(values) + 0 * q.sum()

    def fast(q: Tensor) -> Tensor:
        value_B = cluster_contrast(q, own, Bank(bank), torch.tensor(label_N), len(centroid), t)
        return mean_of_kept(value_B, confident(k, own, centroid, t, 0.2)) * (1 + 1e-8 / B)

    agree(fast, slow)


def test_self_matching(case: Case) -> None:
    """CoDA's in-domain term."""
    _, centroid, _, t = case
    rows = unit(N, D, seed=2)[SLOT]

    def slow(q: Tensor) -> Tensor:
        values = []
        for i in range(B):
            target = [log.exp() for log in log_softmax([dot(rows[i], c) / t for c in centroid])]
            logs = log_softmax([dot(q[i], c) for c in centroid])
            values.append(-sum((p * log for p, log in zip(target, logs, strict=True)), torch.zeros(())))
        return mean(values)

    agree(lambda q: self_matching(q, rows, centroid, t), slow)


def test_classifier_gap() -> None:
    """CoDA's cross-domain term."""
    own, other = 3 * unit(4, D, seed=3), unit(4, D, seed=4)

    def slow(q: Tensor) -> Tensor:
        return mean(
            [
                sum((abs(dot(x, a) - dot(x, b)) for a, b in zip(own, other, strict=True)), torch.zeros(()))
                for x in q
            ]
        )

    agree(lambda q: classifier_gap(q, own, other), slow)


def test_self_entropy(case: Case) -> None:
    """UCDIR eq. 9."""
    _, centroid, _, t = case

    def slow(q: Tensor) -> Tensor:
        logs = [log_softmax([dot(x, c) / t for c in centroid]) for x in q]
        return mean([-sum((log.exp() * log for log in row), torch.zeros(())) for row in logs])

    agree(lambda q: self_entropy(q, centroid, t), slow)


def test_distance_of_distance(case: Case) -> None:
    """UCDIR eq. 8, with the official code's 1e-6."""
    _, own, other, t = case

    def slow(q: Tensor) -> Tensor:
        distance = []
        for centroid in (own, other):
            p = [[log.exp() for log in log_softmax([dot(x, c) / t for c in centroid])] for x in q]
            rows = [torch.stack(row) for row in p]
            length = [dot(row, row).sqrt() for row in rows]
            distance.append(
                [[1 - dot(rows[i], rows[j]) / length[i] / length[j] for j in range(B)] for i in range(B)]
            )
        return mean(
            [
                sum(((distance[0][i][j] - distance[1][i][j] + 1e-6) ** 2 for j in range(B)), torch.zeros(()))
                for i in range(B)
            ]
        )

    agree(lambda q: distance_of_distance(q, own, other, t), slow)


def test_prototype_contrast_with_a_temperature_for_each(case: Case) -> None:
    """ProtoNCE eq. 11 and PCS eq. 3."""
    label_N, centroid, _, t = case
    own = [label_N[slot] for slot in SLOT]
    phi = t * torch.linspace(0.5, 1.5, len(centroid), dtype=torch.float64)

    def slow(q: Tensor) -> Tensor:
        logs = [log_softmax([dot(x, c) / p for c, p in zip(centroid, phi, strict=True)]) for x in q]
        return mean([-row[label] for row, label in zip(logs, own, strict=True)])

    agree(lambda q: prototype_contrast(q, torch.tensor(own), centroid, phi), slow)


def test_bank_discrimination(case: Case) -> None:
    """ID eq. 2 with the full softmax."""
    *_, t = case
    bank = unit(N, D, seed=2)

    def slow(q: Tensor) -> Tensor:
        return mean(
            [-log_softmax([dot(x, row) / t for row in bank])[slot] for x, slot in zip(q, SLOT, strict=True)]
        )

    agree(lambda q: bank_discrimination(q, torch.tensor(SLOT), Bank(bank), t), slow)


@pytest.mark.parametrize("nearest", [4, 700])
def test_neighbour_entropy(case: Case, nearest: int) -> None:
    """CDS eq. 4 over the nearest rows, with the official code's 1e-5."""
    *_, t = case
    bank = unit(N, D, seed=2)

    def slow(q: Tensor) -> Tensor:
        values = []
        for x in q:
            logits = sorted((dot(x, row) / t for row in bank), key=lambda v: -float(v.detach()))[:nearest]
            p = [log.exp() for log in log_softmax(logits)]
            values.append(-sum((a * (a + 1e-5).log() for a in p), torch.zeros(())))
        return mean(values)

    agree(lambda q: neighbour_entropy(q, Bank(bank), t, nearest), slow)


def test_matched_distance_of_soft_centroids(case: Case) -> None:
    """The review's variant: soft centroids of both domains, distances compared along a matching."""
    _, own, other, t = case
    k = unit(B, D, seed=1)
    match = torch.arange(len(own)) * 2 % len(other)

    def centroids(x: Tensor, prototypes: Tensor) -> list[Tensor]:
        p = [[log.exp() for log in log_softmax([dot(row, c) / t for c in prototypes])] for row in x]
        found = []
        for j in range(len(prototypes)):
            weighted = [x[i] * p[i][j] for i in range(B)]
            total = sum(weighted, torch.zeros(D, dtype=torch.float64))
            found.append(total / dot(total, total).sqrt())
        return found

    def slow(q: Tensor) -> Tensor:
        first, second = centroids(q, own), centroids(k, other)
        total = torch.zeros((), dtype=torch.float64) + 0 * q.sum()
        for i in range(len(own)):
            for j in range(len(own)):
                if i != j:
                    a, b = first[i] - first[j], second[match[i]] - second[match[j]]
                    near = [dot(v, v) for v in (a, b)]
                    far = [v.sqrt() if float(v.detach()) > 0 else 0 * v for v in near]
                    total = total + (far[0] - far[1]).abs()
        return total

    def fast(q: Tensor) -> Tensor:
        first, second = (soft_centroids(x, soft_assignment(x, c, t)) for x, c in ((q, own), (k, other)))
        return matched_distance(first, second, match) + 0 * q.sum()

    agree(fast, slow)


@pytest.mark.parametrize("push", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_contrast_against_unmatched_prototypes(case: Case, push: bool, normalised: bool) -> None:
    """ProtoOT's three in-domain terms and its cross-domain term."""
    label_N, centroid, _, t = case
    own = [label_N[slot] for slot in SLOT]
    target = unit(B, D, seed=1)

    def slow(q: Tensor) -> Tensor:
        values = []
        for i, label in enumerate(own):
            positive = dot(q[i], target[i]) / t
            if not push:
                values.append(-positive)
                continue
            similar = [dot(q[i], c) for c in centroid]
            length = sum((s * s for s in similar), torch.zeros(())).sqrt() if normalised else 1.0
            others = [s / length / t for k, s in enumerate(similar) if k != label]
            values.append(-log_softmax([positive, *others])[0])
        return mean(values)

    def fast(q: Tensor) -> Tensor:
        labels = torch.tensor(own)
        return against_unmatched(q, target, centroid, labels, t, push=push, normalised=normalised)

    agree(fast, slow)
