"""UEM's losses in value and gradient against float64 loops over scalars, written from its equations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.losses.reference import SLOT, B, D, N, agree, dot, log_softmax, mean, unit
from ucir.losses.universal import (
    batch_contrast,
    domain_confusion,
    lengths,
    product_dissimilarity,
    reverse_gradient,
    semantic_pull,
    structure_change,
    switchable_match,
)
from ucir.memory import Bank

PROTOTYPES = {
    "random": 0.7 * unit(4, D, seed=3),
    "one": 0.7 * unit(1, D, seed=3),
    "identical": (0.7 * unit(1, D, seed=3)).expand(4, D),
    "an image's own feature": torch.cat([unit(B, D, seed=0)[:1], 0.7 * unit(2, D, seed=4)]),
}
TEMPERATURES = [0.07, 0.01]


def norm(x: Tensor) -> Tensor:
    """Length; 0 with gradient 0 at 0, as subgradients go."""
    square = dot(x, x)
    return square.sqrt() if float(square.detach()) > 0 else 0 * square


@pytest.mark.parametrize("t", TEMPERATURES)
def test_batch_contrast(t: float) -> None:
    """Eq. 6 as printed."""
    rows = unit(N, D, seed=2)[SLOT]

    def slow(q: Tensor) -> Tensor:
        return mean([-log_softmax([dot(q[i], m) / t for m in rows])[i] for i in range(B)])

    agree(lambda q: batch_contrast(q, rows, t), slow)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("kind", PROTOTYPES)
def test_semantic_pull(kind: str, t: float) -> None:
    """Eq. 11."""
    prototypes = PROTOTYPES[kind]

    def slow(q: Tensor) -> Tensor:
        values = []
        for x in q:
            shares = [log.exp() for log in log_softmax([dot(x, p) / t for p in prototypes])]
            values.append(
                sum((s * norm(x - p) for s, p in zip(shares, prototypes, strict=True)), torch.zeros(()))
            )
        return mean(values)

    agree(lambda q: semantic_pull(q, prototypes, t), slow)


@pytest.mark.parametrize("frozen", [unit(B, D, seed=5), unit(1, D, seed=5).expand(B, D), unit(B, D, seed=0)])
def test_structure_change(frozen: Tensor) -> None:
    """Eq. 14; other features, one point, the same features; distances of these, and of longer ones."""
    far = 3 * frozen.roll(1, dims=1)

    def slow(q: Tensor, longer: float = 1, far: Tensor = frozen) -> Tensor:
        values = []
        for i in range(B):
            for j in range(B):
                cosine = dot(q[i], q[j]) - dot(frozen[i], frozen[j])
                distance = norm(longer * (q[i] - q[j])) - norm(far[i] - far[j])
                values.append(cosine * cosine + distance * distance)
        return mean(values)

    agree(lambda q: structure_change(q, frozen, q, frozen), slow)
    agree(lambda q: structure_change(q, frozen, 2 * q, far), lambda q: slow(q, 2, far))


def test_structure_change_is_nothing_for_the_same_features_and_for_turned_ones() -> None:
    q = unit(B, D, seed=0)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)).double())[0]
    assert float(structure_change(q, q, q, q)) == 0
    assert float(structure_change(q @ turn, q, q @ turn, q)) == pytest.approx(0, abs=1e-20)


def test_domain_confusion() -> None:
    """Eq. 13 with g linear."""
    weight = unit(1, D, seed=6)[0]

    def slow(q: Tensor) -> Tensor:
        values = []
        for i, x in enumerate(q):
            p = 1 / (1 + (-3 * dot(x, weight)).exp())
            values.append(-(p if i < 2 else 1 - p).log())
        # both halves count alike, whatever their size
        return (mean(values[:2]) + mean(values[2:])) / 2

    agree(lambda q: domain_confusion(3 * q[:2] @ weight, 3 * q[2:] @ weight), slow)


@pytest.mark.parametrize("t", TEMPERATURES)
@pytest.mark.parametrize("kind", PROTOTYPES)
def test_switchable_match(kind: str, t: float) -> None:
    """Eq. 17."""
    prototypes, bank = PROTOTYPES[kind], unit(N, D, seed=2)
    target = [i % len(prototypes) for i in range(B)]
    near = [3, 0, 8, 3, 5]
    reliable = [True, False, True, False, False]

    def slow(q: Tensor) -> Tensor:
        values = []
        for i, x in enumerate(q):
            logs = log_softmax([dot(x, v) / t for v in (*prototypes, *bank)])
            wanted = logs[target[i]].exp()
            if reliable[i]:
                wanted = wanted + logs[len(prototypes) + near[i]].exp()
            values.append(-wanted.log())
        return mean(values)

    agree(
        lambda q: switchable_match(
            q, torch.tensor(target), bank[near], torch.tensor(reliable), prototypes, Bank(bank), t
        ),
        slow,
    )


def test_product_dissimilarity() -> None:
    """Eq. 15's measure: lengths count, and a vector is at 0 from itself alone."""
    u, v = 0.5 * unit(3, D, seed=1), unit(4, D, seed=2)
    ours = product_dissimilarity(u, v)
    for i in range(3):
        for j in range(4):
            cosine = dot(u[i], v[j]) / norm(u[i]) / norm(v[j])
            assert float(ours[i, j]) == pytest.approx(float((1 - cosine) * norm(u[i] - v[j])))
    assert float(product_dissimilarity(v, v).diagonal().max()) == pytest.approx(0, abs=1e-9)


@given(strength=st.floats(0, 5))
def test_the_gradient_really_reverses(strength: float) -> None:
    x = unit(B, D, seed=0).requires_grad_(True)
    weight = unit(1, D, seed=6)[0]
    (plain,) = torch.autograd.grad((x @ weight).square().sum(), x)
    passed = reverse_gradient(x, strength)
    assert torch.equal(passed, x)
    (turned,) = torch.autograd.grad((passed @ weight).square().sum(), x)
    assert torch.allclose(turned, -strength * plain)


def test_gradcheck() -> None:
    q = unit(B, D, seed=0).requires_grad_(True)
    frozen, bank, prototypes = unit(B, D, seed=5), unit(N, D, seed=2), PROTOTYPES["random"]
    index = torch.tensor([0, 1, 2, 3, 0])
    reliable = torch.tensor([True, False, True, False, True])
    assert torch.autograd.gradcheck(lambda x: structure_change(x, frozen, x, frozen), (q,))
    assert torch.autograd.gradcheck(lambda x: semantic_pull(x, prototypes, 0.07), (q,))
    assert torch.autograd.gradcheck(
        lambda x: switchable_match(x, index, bank[index], reliable, prototypes, Bank(bank), 0.07), (q,)
    )
    assert torch.autograd.gradcheck(lengths, (q,))
