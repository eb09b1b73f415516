"""Consensus: its graph, its targets, its loss."""

from __future__ import annotations

import itertools

import numpy as np
import ot
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.losses.reference import agree, dot, mean, unit
from tests.steps import N, batch, features, make
from ucir.errors import UserError
from ucir.losses.instance import target_distance
from ucir.memory import Features
from ucir.methods.consensus import Consensus, ConsensusParams
from ucir.prototypes import neighbours
from ucir.prototypes.clustering import kmeans
from ucir.prototypes.neighbours import diffused, reciprocal_graph
from ucir.prototypes.transport import prototype_plan
from ucir.retrieval.metrics import metric_values
from ucir.retrieval.ranking import rank


@pytest.mark.parametrize("count", [1, 3, 50])
@pytest.mark.parametrize("at_once", [100, 2**24])
def test_the_graph_is_of_those_who_are_each_others_nearest(
    count: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "SIMILARITIES_AT_ONCE", at_once)
    x = features(0)
    similarity = (x.double() @ x.double().T).tolist()
    nearest = [
        set(sorted((j for j in range(N) if j != i), key=lambda j: -similarity[i][j])[:count])
        for i in range(N)
    ]
    expected = torch.zeros(N, N, dtype=torch.float64)
    for i, j in itertools.product(range(N), repeat=2):
        if i == j or (j in nearest[i] and i in nearest[j]):
            expected[i, j] = 1
    expected /= expected.sum(dim=1, keepdim=True)
    graph = reciprocal_graph(x, count)
    assert torch.allclose(graph.to_dense().double(), expected, atol=1e-7)
    thrice = expected @ expected @ expected @ x.double()
    assert torch.allclose(diffused(x, graph, 3).double(), thrice, atol=1e-6)
    assert diffused(x, graph, 0) is x


def test_one_picture_and_equal_pictures_have_a_graph() -> None:
    assert reciprocal_graph(features(0, 1), 5).to_dense().tolist() == [[1.0]]
    same = features(0, 1).expand(6, 8).contiguous()
    assert torch.allclose(diffused(same, reciprocal_graph(same, 2), 4), same, atol=1e-6)


def test_the_plan_between_prototypes_is_pots() -> None:
    one, other = features(3, 5), features(4, 7)
    sizes = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([2, 6, 5, 3, 5, 8, 1])
    plan = prototype_plan(one, other, *sizes, 0.2)
    shares = [(x.double() / x.sum()).numpy() for x in sizes]
    cost = 2 * (1 - one.double() @ other.double().T).numpy()
    expected = ot.sinkhorn(*shares, cost, 0.2, stopThr=1e-12, numItermax=100_000)
    assert np.allclose(plan.numpy(), expected, atol=1e-6)
    empty = prototype_plan(one, other, torch.tensor([3, 0, 4, 1, 5]), sizes[1], 0.2)
    assert float(empty[1].sum()) < 1e-8
    assert empty.isfinite().all()


def targets(**changes: object) -> tuple[Tensor, Tensor]:
    method = make("consensus", **changes)
    assert isinstance(method, Consensus)
    return method.target_banks[0].features_ND, method.target_banks[1].features_ND


def unbalanced(cost: Tensor, p: Tensor, q: Tensor, eps: float, rho: float) -> Tensor:
    """argmin <P, cost> + eps KL(P || p q) + rho KL(P 1 || p) + rho KL(P' 1 || q), by its fixed point."""
    kernel = p[:, None] * q * torch.exp(-cost / eps)
    u, v, power = torch.ones_like(p), torch.ones_like(q), rho / (rho + eps)
    for _ in range(1000):
        u = (p / (kernel @ v)) ** power
        v = (q / (kernel.T @ u)) ** power
    return u[:, None] * kernel * v


@pytest.mark.parametrize("relaxation", [None, 0.1])
def test_targets_are_neighbourhoods_moved_with_their_clusters(relaxation: float | None) -> None:
    """Step by step in float64, with POT's plan where the marginals hold."""
    agreed = []
    for x, count in ((features(0), 3), (features(1, N - 5), 3)):
        y = diffused(x, reciprocal_graph(x, count), 4).double()
        agreed.append(normalize(y - y.mean(dim=0), dim=1))
    alone = targets(alignment=False, clusters=4)
    for ours, expected in zip(alone, agreed, strict=True):
        assert torch.allclose(ours.double(), expected, atol=1e-5)
    options = {"iterations": 20, "restarts": 5, "seed": 0, "max_points": 2000}
    labels = [kmeans(x, 4, **options).label_N for x in alone]  # type: ignore[arg-type]
    means = [
        torch.stack([x[label == k].mean(dim=0) for k in range(4)])
        for x, label in zip(agreed, labels, strict=True)
    ]
    shares = [torch.bincount(label, minlength=4).double() / len(label) for label in labels]
    unit_means = [normalize(m, dim=1) for m in means]
    cost = 1 - unit_means[0] @ unit_means[1].T
    plan = (
        unbalanced(cost, shares[0], shares[1], 0.1, relaxation)
        if relaxation
        else torch.from_numpy(
            ot.sinkhorn(*(s.numpy() for s in shares), cost.numpy(), 0.1, numItermax=100_000)
        )
    )
    both = targets(clusters=4, relaxation=relaxation)
    sent = plan @ means[1] / plan.sum(dim=1, keepdim=True), plan.T @ means[0] / plan.T.sum(1, keepdim=True)
    for side in (0, 1):
        for i in range(0, len(agreed[side]), 7):
            k = int(labels[side][i])
            expected = normalize(agreed[side][i] + (sent[side][k] - means[side][k]) / 2, dim=0)
            assert torch.allclose(both[side][i].double(), expected, atol=1e-4)


def test_domains_that_are_shifted_and_blurred_come_together() -> None:
    """Classes that lie clearly within each domain, and are mistaken for others across."""
    generator = torch.Generator().manual_seed(0)
    centre = normalize(torch.randn(5, 16, generator=generator), dim=1)
    style = [torch.randn(16, generator=generator) * 0.6, torch.randn(16, generator=generator) * 0.6]
    turned = centre + 0.5 * normalize(torch.randn(5, 16, generator=generator), dim=1)
    label = torch.arange(300) % 5
    domains = [
        normalize(own[label] + style[i] + 0.2 * torch.randn(300, 16, generator=generator), dim=1)
        for i, own in enumerate((centre, turned))
    ]
    names = [str(i) for i in label.tolist()]

    def precision(first: Tensor, second: Tensor) -> float:
        return metric_values(rank(first, second, names, names), (50,))["P_at_50"]

    before = precision(*domains)
    shifted = [normalize(x - x.mean(dim=0), dim=1) for x in domains]
    values = {}
    for alignment in (False, True):
        method = Consensus(ConsensusParams(alignment=alignment), seed=0)
        values[alignment] = precision(*method.targets((Features(shifted[0]), Features(shifted[1]))))
    assert before < precision(*shifted) < values[False] < values[True]
    assert values[True] > 99


def test_target_distance() -> None:
    target = unit(5, 4, seed=1)
    agree(
        lambda q: target_distance(q, target),
        lambda q: mean([1 - dot(q[i], target[i]) for i in range(5)]),
    )


def test_losses() -> None:
    """Both terms beside float64 loops; the bank takes up what was seen, the targets stay."""
    method = make("consensus")
    assert isinstance(method, Consensus)
    x, parts = (features(0), features(1, N - 5)), (batch(2, False), batch(4, False))
    figures = method.start_epoch(0, (Features(x[0]), Features(x[1])))
    terms = method.losses(0, parts)
    assert {name: term.weight for name, term in terms.items()} == {
        "target_a": 1.0,
        "instance_a": 3.0,
        "target_b": 1.0,
        "instance_b": 3.0,
    }
    for side, domain, part, bank in zip("ab", x, parts, method.target_banks, strict=True):
        target = bank.features_ND.clone()
        away = [1 - dot(domain[i], target[i]) for i in range(len(domain))]
        assert figures[f"targets/distance_{side}"] == pytest.approx(float(mean(away)), abs=1e-6)
        q, slot = part.q_BD.detach().double(), part.slot_B.tolist()
        learnt = mean([1 - dot(q[i], target[s].double()) for i, s in enumerate(slot)])
        assert float(terms[f"target_{side}"].value.detach()) == pytest.approx(float(learnt), abs=1e-6)
        told = mean(
            [
                torch.logsumexp(domain.double() @ q[i] / 1.5, dim=0) - dot(q[i], domain[s].double()) / 1.5
                for i, s in enumerate(slot)
            ]
        )
        assert float(terms[f"instance_{side}"].value.detach()) == pytest.approx(float(told), abs=1e-5)
    before = [bank.features_ND.clone() for bank in method.target_banks]
    method.after_step(parts)
    for kept, bank in zip(before, method.target_banks, strict=True):
        assert torch.equal(bank.features_ND, kept)
    blended = normalize(x[0][parts[0].slot_B[-1]] + parts[0].k_BD[-1], dim=0)
    assert torch.allclose(method.banks[0].features_ND[parts[0].slot_B[-1]], blended, atol=1e-6)
    assert set(make("consensus-no-instance").losses(0, parts)) == {"target_a", "target_b"}


def test_targets_are_renewed_of_the_features_as_they_are_then() -> None:
    method = make("consensus", renew=2, clusters="elbow")
    assert isinstance(method, Consensus)
    later = Features(features(5, 3).repeat(14, 1)[:N]), Features(features(6, 3).repeat(12, 1)[: N - 5])
    first, count = method.target_banks[0].features_ND.clone(), method.chosen
    bank = method.banks[0].features_ND.clone()
    method.start_epoch(1, later)
    assert torch.equal(method.target_banks[0].features_ND, first)
    method.start_epoch(2, later)
    anew = make("consensus", clusters="elbow")
    assert isinstance(anew, Consensus)
    assert torch.equal(method.target_banks[0].features_ND, anew.targets(later)[0])
    assert torch.equal(method.banks[0].features_ND, bank)
    assert method.chosen == anew.chosen != count
    once = make("consensus-no-renewal", clusters="elbow")
    assert isinstance(once, Consensus)
    once.start_epoch(2, later)
    assert torch.equal(once.target_banks[0].features_ND, first)


def test_params() -> None:
    with pytest.raises(UserError, match="neighbours = 40 of a domain's 40 pictures: set fewer"):
        make("consensus", neighbours=N)
    with pytest.raises(ValueError, match="give one number"):
        ConsensusParams(clusters=(3, 4))
    assert (ConsensusParams().diffusion, ConsensusParams().clusters) == (4, "elbow")
    names = {
        "consensus-no-graph": ("diffusion", 0),
        "consensus-no-alignment": ("alignment", False),
        "consensus-balanced": ("relaxation", None),
    }
    for name, (key, value) in names.items():
        assert getattr(make(name).params, key) == value
