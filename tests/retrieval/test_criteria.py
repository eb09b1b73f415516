"""Label-free criteria."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ucir.retrieval.criteria import CRITERIA, NEIGHBOURS, criteria


def cloud(count: int, seed: int, centres: Tensor | None = None, noise: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    base = torch.zeros(1, 16) if centres is None else centres
    spread = torch.randn(count, base.shape[1], generator=generator)
    return F.normalize(base[torch.arange(count) % len(base)] + noise * spread, dim=1)


CENTRES = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(7)), dim=1)


def slow_neighbours(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """mutual_neighbours and mixing, image by image."""
    there = [int(np.argmax([x @ y for y in b])) for x in a]
    back = [int(np.argmax([y @ x for x in a])) for y in b]
    mutual = sum(back[there[i]] == i for i in range(len(a))) / min(len(a), len(b))
    both, domain = np.concatenate([a, b]), [0] * len(a) + [1] * len(b)
    shares = []
    for i, x in enumerate(both):
        others = sorted((j for j in range(len(both)) if j != i), key=lambda j: -(x @ both[j]))[:NEIGHBOURS]
        share = np.mean([domain[j] != domain[i] for j in others])
        shares.append(share / (domain.count(1 - domain[i]) / len(domain)))
    return mutual, float(np.mean(shares))


def test_neighbours_against_loops() -> None:
    a, b = cloud(30, 0, CENTRES), cloud(40, 1, CENTRES)
    ours = criteria(a, b)
    assert set(ours) == set(CRITERIA)
    mutual, mixing = slow_neighbours(a.double().numpy(), b.double().numpy())
    assert ours["mutual_neighbours"] == pytest.approx(mutual)
    assert ours["mixing"] == pytest.approx(mixing, rel=1e-5)


def test_transport_against_pot() -> None:
    import ot

    a, b = cloud(30, 0, CENTRES), cloud(40, 1, CENTRES)
    cost = 1 - (a @ b.T).double().numpy()
    plan = ot.bregman.sinkhorn_log(np.full(30, 1 / 30), np.full(40, 1 / 40), cost, 0.05, numItermax=30)
    assert criteria(a, b)["transport"] == pytest.approx(1 - (plan * cost).sum() / cost.mean(), abs=2e-3)


def test_density_and_rank_against_their_equations() -> None:
    a, b = cloud(12, 0, CENTRES), cloud(9, 1, CENTRES)
    both = torch.cat([a, b]).double().numpy()
    entropies = []
    for i, x in enumerate(both):
        p = np.exp([x @ y / 0.05 for j, y in enumerate(both) if j != i])
        entropies.append(-sum(v * math.log(v) for v in p / p.sum()))
    ours = criteria(a, b)
    assert ours["density"] == pytest.approx(np.mean(entropies) / math.log(20), rel=1e-4)
    share = np.linalg.svd(both, compute_uv=False)
    share = share / share.sum()
    assert ours["rank"] == pytest.approx(math.exp(-(share * np.log(share)).sum()) / 16, rel=1e-3)


def test_domains_that_match_score_above_domains_that_do_not() -> None:
    other = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(8)), dim=1)
    matched = criteria(cloud(200, 0, CENTRES, 0.1), cloud(200, 1, CENTRES, 0.1))
    apart = criteria(cloud(200, 0, CENTRES, 0.1), cloud(200, 1, other, 0.1))
    for name in ("mutual_neighbours", "cluster_cycle", "transport", "mixing"):
        assert matched[name] > apart[name], name
    tight = criteria(cloud(200, 0, CENTRES, 0.02), cloud(200, 1, CENTRES, 0.02))
    loose = criteria(cloud(200, 0), cloud(200, 1))
    for name in ("silhouette", "stability", "density"):
        assert tight[name] > loose[name], name
    assert tight["rank"] < loose["rank"]


@given(st.integers(2, 40), st.integers(2, 40), st.booleans())
def test_always_a_number(first: int, second: int, collapsed: bool) -> None:
    a, b = cloud(first, 0), cloud(second, 1)
    if collapsed:
        a, b = a[:1].expand(first, -1), a[:1].expand(second, -1)
    assert all(math.isfinite(value) for value in criteria(a, b).values())
