"""Value and gradient of every loss against a float64 loop over scalars, on random and on degenerate inputs.

The loops are written from the equations; autograd differentiates them step by step.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.losses.reference import (
    SLOT,
    B,
    D,
    N,
    agree,
    cluster_values,
    dot,
    instance_value,
    log_softmax,
    mean,
    unit,
)
from ucir.losses.assignment import distance_of_distance, self_entropy
from ucir.losses.cluster import confident, mean_of_kept
from ucir.losses.instance import mixed_contrast, view_contrast
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

    agree(lambda q: instance_value(q, k, torch.tensor(SLOT), bank, t), slow)


def test_mixed_contrast(case: Case) -> None:
    """A picture's key among its own domain's, or among the other's, as a classifier weighs them."""
    *_, t = case
    k, banks = unit(B, D, seed=1), (unit(N, D, seed=2), unit(N - 2, D, seed=5))
    share = torch.tensor([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0], [0.2, 0.8], [0.0, 1.0]], dtype=torch.float64)
    slots = torch.tensor(SLOT)

    def slow(q: Tensor) -> Tensor:
        values = []
        for i, slot in enumerate(SLOT):
            p = torch.zeros((), dtype=torch.float64)
            for d, bank in enumerate(banks):
                others = [dot(q[i], row) / t for a, row in enumerate(bank) if d == 1 or a != slot]
                p = p + share[i, d] * log_softmax([dot(q[i], k[i]) / t, *others])[0].exp()
            values.append(-p.log())
        return mean(values)

    def fast(q: Tensor) -> Tensor:
        own = Bank(banks[0]).log_total(q, t, without_B=slots)
        return mixed_contrast(q, k, torch.stack([own, Bank(banks[1]).log_total(q, t)], 1), share, t)

    agree(fast, slow)


def test_cluster_contrast_with_its_filter(case: Case) -> None:
    """UCDIR eq. 2, over the images whose key lies in its cluster with more than a fifth."""
    label_N, centroid, _, t = case
    k, bank = unit(B, D, seed=1), unit(N, D, seed=2)
    label_B = torch.tensor([label_N[slot] for slot in SLOT])

    def slow(q: Tensor) -> Tensor:
        values = []
        for i, slot in enumerate(SLOT):
            probability = log_softmax([dot(k[i], c) / t for c in centroid])[label_N[slot]].exp()
            if float(probability) > 0.2:
                logs = log_softmax([dot(q[i], row) / t for row in bank])
                values.append(-mean([logs[a] for a in range(N) if label_N[a] == label_N[slot]]))
        return mean(values) + 0 * q.sum()

    def fast(q: Tensor) -> Tensor:
        value_B = cluster_values(q, torch.tensor(SLOT), bank, torch.tensor(label_N), t)
        return mean_of_kept(value_B, confident(k, label_B, centroid, t, 0.2)) * (1 + 1e-8 / B)

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
    one, other = 3 * unit(4, D, seed=3), unit(4, D, seed=4)

    def slow(q: Tensor) -> Tensor:
        return mean(
            [
                sum((abs(dot(x, a) - dot(x, b)) for a, b in zip(one, other, strict=True)), torch.zeros(()))
                for x in q
            ]
        )

    agree(lambda q: classifier_gap(q, one, other), slow)


def test_self_entropy(case: Case) -> None:
    """UCDIR eq. 9."""
    _, centroid, _, t = case

    def slow(q: Tensor) -> Tensor:
        logs = [log_softmax([dot(x, c) / t for c in centroid]) for x in q]
        return mean([-sum((log.exp() * log for log in row), torch.zeros(())) for row in logs])

    agree(lambda q: self_entropy(q, centroid, t), slow)


def test_distance_of_distance(case: Case) -> None:
    """UCDIR eq. 8, with the official code's 1e-6."""
    _, one, other, t = case

    def slow(q: Tensor) -> Tensor:
        distance = []
        for centroid in (one, other):
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

    agree(lambda q: distance_of_distance(q, one, other, t), slow)


def test_prototype_contrast_with_a_temperature_for_each(case: Case) -> None:
    """ProtoNCE eq. 11 and PCS eq. 3."""
    label_N, centroid, _, t = case
    label_B = [label_N[slot] for slot in SLOT]
    phi = t * torch.linspace(0.5, 1.5, len(centroid), dtype=torch.float64)

    def slow(q: Tensor) -> Tensor:
        logs = [log_softmax([dot(x, c) / p for c, p in zip(centroid, phi, strict=True)]) for x in q]
        return mean([-row[label] for row, label in zip(logs, label_B, strict=True)])

    agree(lambda q: prototype_contrast(q, torch.tensor(label_B), centroid, phi), slow)


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
    _, one, other, t = case
    k = unit(B, D, seed=1)
    match = torch.arange(len(one)) * 2 % len(other)

    def centroids(x: Tensor, prototypes: Tensor) -> list[Tensor]:
        p = [[log.exp() for log in log_softmax([dot(row, c) / t for c in prototypes])] for row in x]
        sums = []
        for j in range(len(prototypes)):
            weighted = [x[i] * p[i][j] for i in range(B)]
            total = sum(weighted, torch.zeros(D, dtype=torch.float64))
            sums.append(total / dot(total, total).sqrt())
        return sums

    def slow(q: Tensor) -> Tensor:
        first, second = centroids(q, one), centroids(k, other)
        total = torch.zeros((), dtype=torch.float64) + 0 * q.sum()
        for i in range(len(one)):
            for j in range(len(one)):
                if i != j:
                    a, b = first[i] - first[j], second[match[i]] - second[match[j]]
                    near = [dot(v, v) for v in (a, b)]
                    far = [v.sqrt() if float(v.detach()) > 0 else 0 * v for v in near]
                    total = total + (far[0] - far[1]).abs()
        return total

    def fast(q: Tensor) -> Tensor:
        first, second = (soft_centroids(x, soft_assignment(x, c, t)) for x, c in ((q, one), (k, other)))
        return matched_distance(first, second, match) + 0 * q.sum()

    agree(fast, slow)


@pytest.mark.parametrize("push", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_contrast_against_unmatched_prototypes(case: Case, push: bool, normalised: bool) -> None:
    """ProtoOT's three in-domain terms and its cross-domain term."""
    label_N, centroid, _, t = case
    label_B = [label_N[slot] for slot in SLOT]
    target = unit(B, D, seed=1)

    def slow(q: Tensor) -> Tensor:
        values = []
        for i, label in enumerate(label_B):
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
        labels = torch.tensor(label_B)
        return against_unmatched(q, target, centroid, labels, t, push=push, normalised=normalised)

    agree(fast, slow)


def test_instance_contrast_takes_the_key_and_not_the_stale_bank_row() -> None:
    q, k, bank = unit(1, D, seed=0), unit(1, D, seed=1), unit(N, D, seed=2)
    stale = bank.clone()
    stale[3] = unit(1, D, seed=9)
    slot = torch.tensor([3])
    assert instance_value(q, k, slot, bank, 0.2) == instance_value(q, k, slot, stale, 0.2)
    assert instance_value(q, k, slot, bank, 0.2) != instance_value(q, k, slot + 1, stale, 0.2)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.9])
def test_confidence_keeps_what_lies_clearly_in_its_cluster(threshold: float) -> None:
    k, centroids, labels = unit(B, D, seed=1), unit(4, D, seed=3), [0, 1, 2, 3, 0]
    kept = confident(k, torch.tensor(labels), centroids, 0.2, threshold)
    for x, label, is_kept in zip(k, labels, kept.tolist(), strict=True):
        probability = log_softmax([dot(x, c) / 0.2 for c in centroids])[label].exp()
        assert is_kept == (float(probability) > threshold)


def test_mean_of_kept_is_over_the_kept_alone_and_zero_of_none() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    assert float(mean_of_kept(values, torch.tensor([True, False, True]))) == pytest.approx(3.5)
    assert float(mean_of_kept(values, torch.zeros(3, dtype=torch.bool))) == 0.0


def test_distance_of_distance_ignores_the_order_of_prototypes() -> None:
    """UCDIR, Proposition 1."""
    q, one, other = unit(B, D, seed=0), unit(4, D, seed=3), unit(4, D, seed=4)
    expected = float(distance_of_distance(q, one, other, 0.01))
    for seed in range(5):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
        assert float(distance_of_distance(q, one, other[order], 0.01)) == pytest.approx(expected, rel=1e-6)


def test_distance_of_distance_vanishes_where_the_prototypes_coincide() -> None:
    q, one = unit(B, D, seed=0), unit(4, D, seed=3)
    assert float(distance_of_distance(q, one, one.flip(0), 0.01)) == pytest.approx(0, abs=1e-9)


def test_view_contrast_bars_other_domains() -> None:
    second, domain = unit(B, D, seed=1), [0, 0, 1, 1, 0]

    def slow(q: Tensor) -> Tensor:
        views, domains = [*q, *second], domain * 2
        values = []
        for i, view in enumerate(views):
            partner = (i + B) % (2 * B)
            negatives = [
                dot(view, views[j]) / 0.1
                for j in range(2 * B)
                if j not in (i, partner) and domains[j] == domains[i]
            ]
            values.append(-log_softmax([dot(view, views[partner]) / 0.1, *negatives])[0])
        return mean(values)

    agree(lambda q: view_contrast(q, second, torch.tensor(domain), 0.1), slow)


def losses_of(q: Tensor) -> dict[str, Tensor]:
    """Losses of the query features, everything else in single precision."""
    k, bank = unit(B, D, seed=1).float(), unit(N, D, seed=2).float()
    one, other = unit(4, D, seed=3).float(), unit(4, D, seed=4).float()
    slots, label_N = torch.tensor(SLOT), torch.arange(N) % 4
    return {
        "instance": instance_value(q, k, slots, bank, 0.2),
        "cluster": cluster_values(q, slots, bank, label_N, 0.2).mean(),
        "entropy": self_entropy(q, one, 0.1),
        "distance": distance_of_distance(q, one, other, 0.1),
        "views": view_contrast(q, k, torch.zeros(B, dtype=torch.long), 0.1),
    }


def test_half_precision_features_give_single_precision_losses() -> None:
    exact = losses_of(unit(B, D, seed=0).float())
    for name, coarse in losses_of(unit(B, D, seed=0).bfloat16()).items():
        assert coarse.dtype == torch.float32, name
        assert float(coarse) == pytest.approx(float(exact[name]), rel=0.05), name
