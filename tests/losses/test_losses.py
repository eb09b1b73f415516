"""Each loss against a slow float64 loop written from the paper's equation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ucir.losses.assignment import distance_of_distance, self_entropy
from ucir.losses.cluster import cluster_contrast, confident, mean_of_kept
from ucir.losses.instance import instance_contrast, view_contrast
from ucir.memory import Bank

B, N, D, K = 6, 20, 5, 4
SLOTS = [3, 0, 19, 7, 7, 11]  # one image twice


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def dot(x: Tensor, y: Tensor) -> float:
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def instance_loop(q: Tensor, k: Tensor, slots: list[int], bank: Tensor, temperature: float) -> float:
    total = 0.0
    for i, slot in enumerate(slots):
        positive = math.exp(dot(q[i], k[i]) / temperature)
        negatives = sum(math.exp(dot(q[i], bank[a]) / temperature) for a in range(len(bank)) if a != slot)
        total += -math.log(positive / (positive + negatives))
    return total / len(slots)


def cluster_loop(
    q: Tensor, own: list[int], bank: Tensor, labels: list[int], temperature: float
) -> list[float]:
    values = []
    for i, label in enumerate(own):
        total = sum(math.exp(dot(q[i], row) / temperature) for row in bank)
        members = [a for a, other in enumerate(labels) if other == label]
        logs = [math.log(math.exp(dot(q[i], bank[p]) / temperature) / total) for p in members]
        values.append(-sum(logs) / len(logs))
    return values


def softmax_loop(x: Tensor, centroids: Tensor, temperature: float) -> list[float]:
    logits = [dot(x, c) / temperature for c in centroids]
    top = max(logits)
    weights = [math.exp(value - top) for value in logits]
    return [w / sum(weights) for w in weights]


def entropy_loop(q: Tensor, centroids: Tensor, temperature: float) -> float:
    total = 0.0
    for x in q:
        total += -sum(p * math.log(p) for p in softmax_loop(x, centroids, temperature) if p > 0)
    return total / len(q)


def distance_loop(q: Tensor, own: Tensor, other: Tensor, temperature: float) -> float:
    def distances(centroids: Tensor) -> list[list[float]]:
        p = [softmax_loop(x, centroids, temperature) for x in q]
        length = [math.sqrt(sum(v * v for v in row)) for row in p]
        return [
            [
                1 - sum(a * b for a, b in zip(p[i], p[j], strict=True)) / length[i] / length[j]
                for j in range(len(q))
            ]
            for i in range(len(q))
        ]

    first, second = distances(own), distances(other)
    rows = [
        sum((a - b + 1e-6) ** 2 for a, b in zip(x, y, strict=True))
        for x, y in zip(first, second, strict=True)
    ]
    return sum(rows) / len(rows)


@pytest.mark.parametrize("temperature", [0.2, 0.05])
def test_instance_contrast_equals_the_equation(temperature: float) -> None:
    q, k, bank = unit(B, D, seed=0), unit(B, D, seed=1), unit(N, D, seed=2)
    value = instance_contrast(q, k, torch.tensor(SLOTS), Bank(bank), temperature)
    assert float(value) == pytest.approx(instance_loop(q, k, SLOTS, bank, temperature), rel=1e-6)


def test_instance_contrast_takes_the_key_and_not_the_stale_bank_row() -> None:
    q, k, bank = unit(1, D, seed=0), unit(1, D, seed=1), unit(N, D, seed=2)
    stale = bank.clone()
    stale[3] = unit(1, D, seed=9)
    slot = torch.tensor([3])
    assert instance_contrast(q, k, slot, Bank(bank), 0.2) == instance_contrast(q, k, slot, Bank(stale), 0.2)
    assert instance_contrast(q, k, slot, Bank(bank), 0.2) != instance_contrast(
        q, k, slot + 1, Bank(stale), 0.2
    )


@pytest.mark.parametrize("labels", ["mixed", "one cluster", "one each"])
def test_cluster_contrast_equals_the_equation(labels: str) -> None:
    q, bank = unit(B, D, seed=0), unit(N, D, seed=2)
    label_N, clusters = {
        "mixed": ([i % K for i in range(N)], K),
        "one cluster": ([0] * N, 1),
        "one each": (list(range(N)), N),
    }[labels]
    own = [label_N[slot] for slot in SLOTS]
    value = cluster_contrast(q, torch.tensor(own), Bank(bank), torch.tensor(label_N), clusters, 0.2)
    assert value.tolist() == pytest.approx(cluster_loop(q, own, bank, label_N, 0.2), rel=1e-6)


def test_confidence_keeps_what_lies_clearly_in_its_cluster() -> None:
    k, centroids = unit(B, D, seed=1), unit(K, D, seed=3)
    labels = [0, 1, 2, 3, 0, 1]
    for threshold in (0.0, 0.2, 0.9):
        kept = confident(k, torch.tensor(labels), centroids, 0.2, threshold)
        slow = [softmax_loop(x, centroids, 0.2)[y] > threshold for x, y in zip(k, labels, strict=True)]
        assert kept.tolist() == slow


def test_mean_of_kept_is_over_the_kept_alone_and_zero_of_none() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    assert float(mean_of_kept(values, torch.tensor([True, False, True]))) == pytest.approx(3.5)
    assert float(mean_of_kept(values, torch.zeros(3, dtype=torch.bool))) == 0.0


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_self_entropy_equals_the_equation(temperature: float) -> None:
    q, centroids = unit(B, D, seed=0), unit(K, D, seed=3)
    value = float(self_entropy(q, centroids, temperature))
    assert value == pytest.approx(entropy_loop(q, centroids, temperature), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_distance_of_distance_equals_the_equation(temperature: float) -> None:
    q, own, other = unit(B, D, seed=0), unit(K, D, seed=3), unit(K + 2, D, seed=4)
    value = float(distance_of_distance(q, own, other, temperature))
    assert value == pytest.approx(distance_loop(q, own, other, temperature), rel=1e-5)


def test_distance_of_distance_ignores_the_order_of_prototypes() -> None:
    """Proposition 1."""
    q, own, other = unit(B, D, seed=0), unit(K, D, seed=3), unit(K, D, seed=4)
    for seed in range(5):
        order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
        assert float(distance_of_distance(q, own, other[order], 0.01)) == pytest.approx(
            float(distance_of_distance(q, own, other, 0.01)), rel=1e-6
        )


def test_distance_of_distance_vanishes_where_the_prototypes_coincide() -> None:
    q, own = unit(B, D, seed=0), unit(K, D, seed=3)
    assert float(distance_of_distance(q, own, own.flip(0), 0.01)) == pytest.approx(0, abs=1e-9)


def test_view_contrast_equals_the_equation_and_bars_other_domains() -> None:
    first, second = unit(B, D, seed=0), unit(B, D, seed=1)
    domain = [0, 0, 1, 1, 1, 0]
    views, domains = [*first, *second], domain * 2
    total = 0.0
    for i, view in enumerate(views):
        partner = (i + B) % (2 * B)
        scores = {
            j: math.exp(dot(view, other) / 0.1)
            for j, other in enumerate(views)
            if j != i and domains[j] == domains[i]
        }
        total += -math.log(scores[partner] / sum(scores.values()))
    value = view_contrast(first, second, torch.tensor(domain), 0.1)
    assert float(value) == pytest.approx(total / (2 * B), rel=1e-6)


def losses_of(q: Tensor) -> dict[str, Tensor]:
    """Every loss as a function of the query features; constants in the precision it computes in."""
    dtype = torch.float32 if q.dtype == torch.bfloat16 else q.dtype
    k, bank = unit(B, D, seed=1).to(dtype), unit(N, D, seed=2).to(dtype)
    own, other = unit(K, D, seed=3).to(dtype), unit(K, D, seed=4).to(dtype)
    slots, label_N = torch.tensor(SLOTS), torch.arange(N) % K
    return {
        "instance": instance_contrast(q, k, slots, Bank(bank), 0.2),
        "cluster": cluster_contrast(q, label_N[slots], Bank(bank), label_N, K, 0.2).mean(),
        "entropy": self_entropy(q, own, 0.1),
        "distance": distance_of_distance(q, own, other, 0.1),
        "views": view_contrast(q, k, torch.zeros(B, dtype=torch.long), 0.1),
    }


@pytest.mark.parametrize("name", list(losses_of(unit(B, D, seed=0))))
def test_gradients_are_those_of_the_function(name: str) -> None:
    q = unit(B, D, seed=0).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: losses_of(x)[name], q)


@pytest.mark.parametrize("name", list(losses_of(unit(B, D, seed=0))))
def test_half_precision_features_give_single_precision_losses(name: str) -> None:
    exact = losses_of(unit(B, D, seed=0).float())[name]
    coarse = losses_of(unit(B, D, seed=0).bfloat16())[name]
    assert coarse.dtype == torch.float32
    assert float(coarse) == pytest.approx(float(exact), rel=0.05)
