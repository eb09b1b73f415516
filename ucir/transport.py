"""Entropic optimal transport between a bank of features and prototypes.

Of all plans Q (N x K) whose rows sum to 1/N and whose columns sum to the prototypes' marginal b, the one
that maximises <Q, S> + eps H(Q), S the similarity (ProtoOT, AAAI 2024, after SwAV's Sinkhorn). In log domain
Q_ik = softmax_k(S_ik / eps + g_k) / N: only the K potentials g depend on the bank, which is read in chunks,
so that memory is O(chunk x K). float32 throughout; POT in float64 is the oracle of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.losses import full_precision

CHUNK = 8192
"""Rows of the bank in work at a time."""
MATCH_REGULARISATION = 0.05


class TransportError(ArithmeticError):
    """A plan that is not one: not finite, or short of the tolerance asked for."""


@dataclass(frozen=True)
class Transport:
    """What is left of a plan between N features and K prototypes."""

    potential_K: Tensor
    """g; the plan's row of a feature is softmax_k(S_k / eps + g_k) / N."""
    column_K: Tensor
    """The plan's sums over the features; b, up to ``error``."""
    mean_KD: Tensor
    """Plan-weighted mean of the features for each prototype, L2-normalised."""
    error: Tensor
    """max_k |column_k - b_k|, a scalar on the device: 3 iterations leave up to some tenths of 1 / K."""


def similarity(feature_ND: Tensor, prototype_KD: Tensor, normalised: bool = True) -> Tensor:
    """S, (N, K): cosines, and as ProtoOT's code has them each row L2-normalised over the prototypes."""
    s_NK = full_precision(feature_ND) @ full_precision(prototype_KD).T
    return F.normalize(s_NK, dim=1) if normalised else s_NK


@torch.no_grad()
def transport(
    feature_ND: Tensor,
    prototype_KD: Tensor,
    marginal_K: Tensor,
    regularisation: float,
    iterations: int = 3,
    tolerance: float | None = None,
    normalised: bool = True,
) -> Transport:
    """Potentials of the entropic plan, and what it makes of the features.

    An iteration is a prototype step and a feature step, in this order, from uniform features: after any
    number of them the features' marginal is exact and the prototypes' approximate.

    Args:
        feature_ND: unit features, e.g. a bank.
        prototype_KD: unit prototypes.
        marginal_K: b > 0 or = 0 (a prototype that takes nothing), sum 1.
        regularisation: eps > 0.
        iterations: how many, 3 in ProtoOT's recipe; with a tolerance at most.
        tolerance: stop at this ``error``; looks at it after every iteration, which waits for the device.
        normalised: see :func:`similarity`.

    Raises:
        TransportError: the tolerance was not reached, or the potentials are not finite where b > 0.
    """
    log_b_K = full_precision(marginal_K).log()

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(feature_ND), CHUNK):
            part = feature_ND[first : first + CHUNK]
            yield part, similarity(part, prototype_KD, normalised) / regularisation

    def columns(g_K: Tensor) -> Tensor:
        total = torch.zeros_like(log_b_K)
        for _, s in chunks():
            total += torch.softmax(s + g_K, dim=1).sum(dim=0)
        return total / len(feature_ND)

    def step(g_K: Tensor, column_K: Tensor) -> Tensor:
        moved = g_K + log_b_K - column_K.clamp(min=torch.finfo(column_K.dtype).tiny).log()
        moved = torch.where(log_b_K.isinf(), log_b_K, moved)
        return moved - moved[~log_b_K.isinf()].max() if tolerance is not None else moved

    # the first prototype step: every feature counts alike
    running_K = torch.full_like(log_b_K, -math.inf)
    for _, s in chunks():
        running_K = torch.logaddexp(running_K, torch.logsumexp(s, dim=0))
    g_K = log_b_K - running_K
    for _ in range(iterations - 1):
        column_K = columns(g_K)
        if tolerance is not None and float((column_K - marginal_K).abs().max()) <= tolerance:
            break
        g_K = step(g_K, column_K)
    column_K = torch.zeros_like(log_b_K)
    sum_KD = column_K.new_zeros(len(log_b_K), feature_ND.shape[1])
    for part, s in chunks():
        row_NK = torch.softmax(s + g_K, dim=1)
        column_K += row_NK.sum(dim=0)
        sum_KD += row_NK.T @ full_precision(part)
    column_K = column_K / len(feature_ND)
    error = (column_K - marginal_K).abs().max()
    if tolerance is not None and not float(error) <= tolerance:
        raise TransportError(
            f"entropic transport: error {float(error):.2g} of the prototypes' marginal after {iterations} "
            f"iterations at regularisation {regularisation:g}, more than {tolerance:g}"
        )
    return Transport(g_K, column_K, F.normalize(sum_KD, dim=1), error)


@torch.no_grad()
def plan_rows(
    feature_BD: Tensor,
    prototype_KD: Tensor,
    potential_K: Tensor,
    regularisation: float,
    normalised: bool = True,
) -> Tensor:
    """Rows of the plan times N: the shares of each feature that go to the prototypes, (B, K)."""
    s_BK = similarity(feature_BD, prototype_KD, normalised) / regularisation
    return torch.softmax(s_BK + potential_K, dim=1)


@torch.no_grad()
def relaxed_plan(
    similarity_NK: Tensor, marginal_K: Tensor, regularisation: float, kind: str, strength: float
) -> Tensor:
    """A plan whose marginals need not hold, for ablations: POT's solvers in float64 on the whole matrix.

    Args:
        similarity_NK: S.
        marginal_K: b.
        regularisation: eps.
        kind: ``unbalanced`` (KL-relaxed marginals) or ``partial`` (a share of the mass alone is moved).
        strength: weight of the KL terms, or the share that is moved.

    Returns:
        (N, K) float32; its rows are not comparable in size.

    Raises:
        TransportError: the plan is not finite.
    """
    import ot

    cost = 1 - similarity_NK.double().cpu()
    rows = torch.full((len(cost),), 1 / len(cost), dtype=torch.float64)
    columns = marginal_K.double().cpu()
    if kind == "unbalanced":
        plan = ot.unbalanced.sinkhorn_unbalanced(
            rows, columns, cost, regularisation, strength, method="sinkhorn_stabilized"
        )
    else:
        mass = strength * min(float(rows.sum()), float(columns.sum()))
        plan = ot.partial.entropic_partial_wasserstein(rows, columns, cost, regularisation, m=mass)
    if not bool(plan.isfinite().all()):
        raise TransportError(f"{kind} transport at regularisation {regularisation:g} is not finite")
    found: Tensor = plan.float().to(similarity_NK.device)
    return found


@torch.no_grad()
def match_prototypes(own_KD: Tensor, other_LD: Tensor) -> Tensor:
    """For each prototype of one domain the one of the other that most of its mass is sent to.

    Entropic OT with uniform marginals and squared Euclidean cost, by POT in float64 and log domain.

    Args:
        own_KD, other_LD: unit prototypes.

    Returns:
        (K,) int64.
    """
    import ot  # seconds, which only those who match should wait

    own, other = own_KD.double().cpu(), other_LD.double().cpu()
    cost = torch.cdist(own, other).square()
    mass = [torch.full((len(x),), 1 / len(x), dtype=torch.float64) for x in (own, other)]
    # which row gets most is settled long before the marginals are exact
    plan = ot.bregman.sinkhorn_log(
        *mass, cost, MATCH_REGULARISATION, numItermax=200, stopThr=1e-6, warn=False
    )
    match: Tensor = plan.argmax(dim=1).to(own_KD.device)
    return match
