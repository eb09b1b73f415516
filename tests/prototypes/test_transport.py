"""Entropic transport against POT in float64; matching prototypes."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from ucir.prototypes import transport as module
from ucir.prototypes.transport import (
    TransportError,
    match_prototypes,
    plan_rows,
    potential,
    relaxed_plan,
    similarity,
    transport,
)


def unit(*shape: int, seed: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def marginal(k: int, seed: int) -> Tensor:
    weights = torch.rand(k, generator=torch.Generator().manual_seed(seed)) + 0.05
    return weights / weights.sum()


def whole_plan(x: Tensor, p: Tensor, b: Tensor, eps: float, **options: object) -> Tensor:
    plan = transport(x, p, b, eps, **options)  # type: ignore[arg-type]
    return plan_rows(x, p, plan.potential_K, eps) / len(x)


def reference(s: Tensor, b: Tensor, eps: float, iterations: int) -> np.ndarray:
    """ProtoOT's loop step by step in float64: prototypes first, then features."""
    q = np.exp(s.double().numpy() / eps)
    q /= q.sum()
    for _ in range(iterations):
        q *= b.double().numpy() / q.sum(axis=0)
        q *= 1 / len(q) / q.sum(axis=1, keepdims=True)
    return q


@pytest.mark.parametrize("k", [1, 7, 65])
@pytest.mark.parametrize(("eps", "kept"), [(0.05, 0), (0.05, 33 * 4 * 65 * 2), (0.05, 10**6), (0.02, 0)])
def test_three_iterations_are_the_recipes_three(
    k: int, eps: float, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 33)  # chunks change nothing,
    monkeypatch.setattr(module, "KEPT", kept)  # nor does how many are kept
    x, p, b = unit(200, 16, seed=0), unit(k, 16, seed=1), marginal(k, 2)
    plan = whole_plan(x, p, b, eps, iterations=3)
    assert np.allclose(plan.numpy(), reference(similarity(x, p), b, eps, 3), rtol=1e-4, atol=1e-9)
    ours = transport(x, p, b, eps)
    assert torch.equal(potential(x, p, b, eps), ours.potential_K)
    assert torch.allclose(ours.column_K, plan.sum(dim=0), atol=1e-6)
    assert float(ours.error) == pytest.approx(float((plan.sum(dim=0) - b).abs().max()), abs=1e-6)
    assert torch.allclose(ours.mean_KD, normalize(plan.T @ x, dim=1), atol=1e-5)


@pytest.mark.parametrize("eps", [0.05, 0.01])
def test_the_converged_plan_is_pots(eps: float) -> None:
    x, p, b = unit(120, 16, seed=0), unit(7, 16, seed=1), marginal(7, 2)
    plan = whole_plan(x, p, b, eps, iterations=20_000, tolerance=1e-6)
    assert torch.allclose(plan.sum(dim=1), torch.full((120,), 1 / 120), atol=1e-6)
    assert torch.allclose(plan.sum(dim=0), b, atol=1e-6)
    s = similarity(x, p).double()
    rows = torch.full((120,), 1 / 120, dtype=torch.float64)
    b64 = b.double() / b.double().sum()
    exact = ot.bregman.sinkhorn_log(rows, b64, -s, eps, numItermax=100_000, stopThr=1e-10)
    assert torch.allclose(plan.double(), exact, atol=2e-6)
    # between the best plan and the one that pays no attention
    cost = -s.numpy()
    ours = float((plan.double().numpy() * cost).sum())
    best = ot.emd2(rows.numpy(), b64.numpy(), cost)
    blind = float((np.outer(rows.numpy(), b64.numpy()) * cost).sum())
    assert best - 1e-6 <= ours <= blind + 1e-6


@pytest.mark.parametrize("eps", [0.05, 0.01, 0.002])
@pytest.mark.parametrize("shape", ["far", "tight", "both"])
def test_far_and_tight_prototypes_give_a_right_plan_or_an_error(eps: float, shape: str) -> None:
    x = unit(300, 16, seed=0)
    p = unit(5, 16, seed=1)
    x[:, 0] += 3
    x = normalize(x, dim=1)
    if shape in ("far", "both"):
        p[0] = -normalize(x.mean(dim=0), dim=0)
    if shape in ("tight", "both"):
        p[1:] = normalize(normalize(x.mean(dim=0), dim=0) + 1e-3 * unit(4, 16, seed=3), dim=1)
    b = marginal(5, 4)
    ours = transport(x, p, b, eps)
    for part in (ours.potential_K, ours.column_K, ours.mean_KD, ours.error):
        assert part.isfinite().all()
    plan = plan_rows(x, p, ours.potential_K, eps).numpy() / 300
    assert np.allclose(plan, log_reference(similarity(x, p), b, eps), atol=1e-6)
    message = ""
    try:
        converged = whole_plan(x, p, b, eps, iterations=500, tolerance=1e-5)
    except TransportError as error:
        message = str(error)
    if message:
        assert "more than 1e-05" in message
    else:
        assert torch.allclose(converged.sum(dim=0), b, atol=1e-5)


def log_reference(s: Tensor, b: Tensor, eps: float, iterations: int = 3) -> np.ndarray:
    """The same loop in log domain, where eps is too small for exponentials."""
    from scipy.special import logsumexp

    z = s.double().numpy() / eps
    f = np.zeros((len(z), 1))
    g = np.zeros((1, z.shape[1]))
    for _ in range(iterations):
        g = np.log(b.double().numpy())[None] - logsumexp(z + f, axis=0, keepdims=True)
        f = -np.log(len(z)) - logsumexp(z + g, axis=1, keepdims=True)
    return np.exp(z + f + g)


@given(
    n=st.integers(2, 60),
    k=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    eps=st.sampled_from([0.02, 0.05, 0.5]),
)
def test_rows_are_whole_and_columns_what_the_error_says(n: int, k: int, seed: int, eps: float) -> None:
    x, p, b = unit(n, 8, seed=seed), unit(k, 8, seed=seed + 1), marginal(k, seed)
    plan = transport(x, p, b, eps)
    rows = plan_rows(x, p, plan.potential_K, eps)
    assert torch.allclose(rows.sum(dim=1), torch.ones(n), atol=1e-5)
    assert (rows >= 0).all()
    assert float((rows.mean(dim=0) - b).abs().max()) == pytest.approx(float(plan.error), abs=1e-5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    other = transport(x[order], p, b, eps)
    assert torch.allclose(other.potential_K, plan.potential_K, atol=1e-4), "no order of files helps"


def test_a_prototype_of_no_mass_takes_nothing() -> None:
    x, p = unit(50, 8, seed=0), unit(4, 8, seed=1)
    b = torch.tensor([0.5, 0.0, 0.25, 0.25])
    plan = transport(x, p, b, 0.05)
    assert float(plan.column_K[1]) == 0
    assert plan.mean_KD.isfinite().all()
    assert (plan_rows(x, p, plan.potential_K, 0.05)[:, 1] == 0).all()


@pytest.mark.parametrize(("kind", "strength"), [("unbalanced", 1.0), ("partial", 0.6)])
def test_relaxed_plans_move_less_where_it_is_dear(kind: str, strength: float) -> None:
    s = similarity(unit(40, 8, seed=0), unit(5, 8, seed=1))
    plan = relaxed_plan(s, marginal(5, 2), 0.05, kind, strength)
    assert plan.isfinite().all()
    assert (plan >= 0).all()
    if kind == "partial":
        assert float(plan.sum()) == pytest.approx(0.6, abs=0.02)


def test_what_is_no_transport_problem_is_refused() -> None:
    x, p, b = unit(40, 8, seed=0), unit(5, 8, seed=1), marginal(5, 2)
    spoilt = x.clone()
    spoilt[3, 1] = float("nan")
    for features, shares in ((spoilt, b), (x, 2 * b), (x, torch.zeros(5)), (x, b - 2 * b[0])):
        for solve in (transport, potential):
            with pytest.raises(TransportError, match="must be finite, shares not negative and of sum 1"):
                solve(features, p, shares, 0.05)
    for eps, iterations in ((0.0, 3), (0.05, 0)):
        with pytest.raises(ValueError, match="not above 0"):
            transport(x, p, b, eps, iterations)
    with pytest.raises(ValueError, match="5 prototypes with 1 shares"):
        transport(x, p, b[:1], 0.05)
    with pytest.raises(ValueError, match="transport of 0 features"):
        transport(x[:0], p, b, 0.05)
    with pytest.raises(ValueError, match="neither 'unbalanced' nor 'partial'"):
        relaxed_plan(similarity(x, p), b, 0.05, "balanced", 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_a_tolerance_that_is_met_is_not_refused(seed: int) -> None:
    x, p, b = unit(60, 8, seed=seed), unit(4, 8, seed=seed + 1), marginal(4, seed)
    assert float(transport(x, p, b, 0.05, 5000, tolerance=1e-6).error) <= 1e-6


@pytest.mark.parametrize("kind", ["unbalanced", "partial"])
def test_relaxed_plans_leave_empty_prototypes_empty_and_never_fail_silently(kind: str) -> None:
    s = similarity(unit(40, 8, seed=0), unit(5, 8, seed=1))
    b = torch.tensor([0, 0.25, 0.25, 0.25, 0.25])
    plan = relaxed_plan(s, b, 0.05, kind, 0.5)
    assert float(plan[:, 0].abs().max()) == 0
    assert 0 < float(plan.sum()) < 1.5
    with pytest.raises(TransportError, match="a larger regularisation may help"):
        relaxed_plan(s, b, 1e-4, kind, 0.5)


@pytest.mark.parametrize("count", [1, 2, 10, 65])
def test_permuted_prototypes_find_their_own(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    one = normalize(torch.randn(count, 32, generator=generator), dim=1)
    order = torch.randperm(count, generator=generator)
    noisy = normalize(one[order] + 0.05 * torch.randn(count, 32, generator=generator), dim=1)
    assert torch.equal(order[match_prototypes(one, noisy)], torch.arange(count))


def test_other_numbers_and_coinciding_prototypes_are_matched_to_something() -> None:
    one = normalize(torch.ones(3, 4), dim=1)
    match = match_prototypes(one, torch.eye(4)[:2])
    assert match.shape == (3,)
    assert set(match.tolist()) <= {0, 1}
