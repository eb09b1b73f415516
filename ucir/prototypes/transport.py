"""Entropic optimal transport between a bank of features and prototypes.

Of all plans Q (N x K) whose rows sum to 1/N and whose columns sum to the prototypes' marginal b, the one
that maximises <Q, S> + eps H(Q), S the similarity (ProtoOT, AAAI 2024, after SwAV's Sinkhorn). In log domain
Q_ik = softmax_k(S_ik / eps + g_k) / N: only the K potentials g depend on the bank, which is read in chunks,
so that memory does not grow with N. float32 throughout; POT in float64 is the oracle of the tests.
"""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.distributed import all_reduce_sum, log_sum_over_workers
from ucir.precision import full_precision

CHUNK = 4096
"""Rows of the bank in work at a time."""
KEPT = 64 * 1024**2
"""Bytes that are kept of the bank's exponentials between iterations."""
SCALED_FROM = 1 / 30
"""Regularisation from which exp(S / eps) and its products are far from the limits of float32."""
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
    count: int | None = None,
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
        count: of all features, where ``feature_ND`` is this worker's share: then K x D sums and K
            potentials travel.

    Raises:
        ValueError: sizes do not fit, no features, or a number out of its range.
        TransportError: the tolerance was not reached; the marginal is none, or the potentials are not
            finite where b > 0, which on a GPU is seen by ``error`` alone, so as not to wait for the device.
    """
    kernel = _kernel(feature_ND, prototype_KD, regularisation, normalised, count)
    g_K = _potential(kernel, marginal_K, iterations, tolerance)
    column_K, sum_KD = kernel.means(g_K)
    error = (column_K - marginal_K).abs().max()
    if tolerance is not None and not float(error) <= tolerance:
        raise TransportError(
            f"entropic transport: error {float(error):.2g} of the prototypes' marginal within {iterations} "
            f"iterations at regularisation {regularisation:g}, more than {tolerance:g}: allow more "
            "iterations, a larger tolerance or a larger regularisation"
        )
    return Transport(g_K, column_K, F.normalize(sum_KD, dim=1), error)


@torch.no_grad()
def potential(
    feature_ND: Tensor,
    prototype_KD: Tensor,
    marginal_K: Tensor,
    regularisation: float,
    iterations: int = 3,
    normalised: bool = True,
    count: int | None = None,
) -> Tensor:
    """:func:`transport`'s potentials alone, (K,): for half its work."""
    kernel = _kernel(feature_ND, prototype_KD, regularisation, normalised, count)
    return _potential(kernel, marginal_K, iterations, None)


def _potential(kernel: _Kernel, marginal_K: Tensor, iterations: int, tolerance: float | None) -> Tensor:
    if len(marginal_K) != len(kernel.prototype_KD) or not kernel.count:
        raise ValueError(
            f"transport of {kernel.count} features to {len(kernel.prototype_KD)} prototypes with "
            f"{len(marginal_K)} shares"
        )
    if not (0 < kernel.regularisation < math.inf and iterations >= 1):
        raise ValueError(f"regularisation {kernel.regularisation:g}, {iterations} iterations: not above 0")
    log_b_K = marginal_K.to(full_precision(kernel.feature_ND).dtype).log()
    g_K = log_b_K - kernel.first()
    for _ in range(iterations - 1):
        column_K = kernel.columns(g_K)
        # a little less, as means() adds up in another order
        if tolerance is not None and float((column_K - marginal_K).abs().max()) <= 0.9 * tolerance:
            break
        moved_K = g_K + log_b_K - column_K.clamp(min=torch.finfo(column_K.dtype).tiny).log()
        g_K = torch.where(log_b_K.isinf(), log_b_K, moved_K)
        g_K = g_K - g_K.max()  # rows do not feel a constant, and floats are fine near 0
    if not g_K.is_cuda:
        whole = bool((g_K.isfinite() | log_b_K.isneginf()).all())
        if not whole or abs(float(marginal_K.sum()) - 1) > 1e-3:
            raise TransportError(
                f"entropic transport at regularisation {kernel.regularisation:g}: potentials "
                f"{g_K.tolist()[:8]} of shares {marginal_K.tolist()[:8]}: features, prototypes and shares "
                "must be finite, shares not negative and of sum 1"
            )
    return g_K


class _Kernel(ABC):
    """What an iteration needs of the features: sums over the plan's rows softmax_k(S_ik / eps + g_k)."""

    def __init__(
        self,
        feature_ND: Tensor,
        prototype_KD: Tensor,
        regularisation: float,
        normalised: bool,
        count: int | None,
    ) -> None:
        self.feature_ND, self.prototype_KD = feature_ND, prototype_KD
        self.regularisation, self.normalised = regularisation, normalised
        self.shared = count is not None
        self.count = len(feature_ND) if count is None else count

    def total(self, x: Tensor) -> Tensor:
        """Over the workers, where each has a share of the features."""
        return all_reduce_sum(x) if self.shared else x

    @abstractmethod
    def first(self) -> Tensor:
        """log sum_i exp(S_ik / eps), (K,): the first prototype step, every feature counting alike."""

    @abstractmethod
    def columns(self, g_K: Tensor) -> Tensor:
        """The plan's sums over the features, (K,)."""

    @abstractmethod
    def means(self, g_K: Tensor) -> tuple[Tensor, Tensor]:
        """These, and the features' sums weighted by the plan, (K, D), times N."""


class _Logarithmic(_Kernel):
    """Right at any regularisation; exponentiates every chunk anew in every iteration."""

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and S / eps, chunk by chunk."""
        for first in range(0, len(self.feature_ND), CHUNK):
            part_BD = self.feature_ND[first : first + CHUNK]
            yield part_BD, similarity(part_BD, self.prototype_KD, self.normalised) / self.regularisation

    def first(self) -> Tensor:
        parts = torch.stack([torch.logsumexp(s_BK, dim=0) for _, s_BK in self.chunks()], dim=1)
        return log_sum_over_workers(parts) if self.shared else torch.logsumexp(parts, dim=1)

    def columns(self, g_K: Tensor) -> Tensor:
        parts = [torch.softmax(s_BK + g_K, dim=1).sum(dim=0) for _, s_BK in self.chunks()]
        return self.total(torch.stack(parts).sum(dim=0)) / self.count

    def means(self, g_K: Tensor) -> tuple[Tensor, Tensor]:
        column_K = torch.zeros_like(g_K)
        sum_KD = g_K.new_zeros(len(g_K), self.feature_ND.shape[1])
        for part_BD, s_BK in self.chunks():
            row_BK = torch.softmax(s_BK + g_K, dim=1)
            column_K += row_BK.sum(dim=0)
            sum_KD += row_BK.T @ full_precision(part_BD)
        return self.total(column_K) / self.count, self.total(sum_KD)


class _Scaled(_Kernel):
    """Exponentiates once and iterates by products with vectors, which exp(1 / eps) must leave room for.

    What fits into ``KEPT`` bytes is kept between iterations and the rest computed anew, so that memory stays
    bounded whatever N is. Prototypes are rows here, the faster way round for so few of them.
    """

    kept: list[Tensor]

    def exponentials(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and exp(S / eps)^T, (K, B), chunk by chunk."""
        prototype_KD = full_precision(self.prototype_KD)
        ones_K = prototype_KD.new_ones(len(prototype_KD))
        scratch_KB = prototype_KD.new_empty(len(prototype_KD), min(CHUNK, len(self.feature_ND)))
        room = KEPT // (CHUNK * prototype_KD.element_size() * len(prototype_KD))
        for number, first in enumerate(range(0, len(self.feature_ND), CHUNK)):
            part_BD = full_precision(self.feature_ND[first : first + CHUNK])
            if number < len(self.kept):
                yield part_BD, self.kept[number]
                continue
            e_KB = prototype_KD @ part_BD.T
            if self.normalised:
                square_KB = torch.mul(e_KB, e_KB, out=scratch_KB[:, : len(part_BD)])
                e_KB *= (ones_K @ square_KB).clamp_(min=1e-24).rsqrt_().div_(self.regularisation)
            else:
                e_KB /= self.regularisation
            e_KB.exp_()
            if number < room:
                self.kept.append(e_KB)
            yield part_BD, e_KB

    def first(self) -> Tensor:
        self.kept = []
        return self.total(torch.stack([e_KB.sum(dim=1) for _, e_KB in self.exponentials()]).sum(dim=0)).log()

    def columns(self, g_K: Tensor) -> Tensor:
        v_K = g_K.exp()
        rows = (e_KB @ (v_K @ e_KB).reciprocal_() for _, e_KB in self.exponentials())
        return v_K * self.total(torch.stack(list(rows)).sum(dim=0)) / self.count

    def means(self, g_K: Tensor) -> tuple[Tensor, Tensor]:
        v_K = g_K.exp()
        column_K = torch.zeros_like(g_K)
        sum_KD = g_K.new_zeros(len(g_K), self.feature_ND.shape[1])
        for part_BD, e_KB in self.exponentials():
            e_KB *= (v_K @ e_KB).reciprocal_()  # their last use
            column_K += e_KB.sum(dim=1)
            sum_KD += e_KB @ part_BD
        return v_K * self.total(column_K) / self.count, v_K[:, None] * self.total(sum_KD)


def _kernel(
    feature_ND: Tensor, prototype_KD: Tensor, regularisation: float, normalised: bool, count: int | None
) -> _Kernel:
    kind = _Scaled if regularisation >= SCALED_FROM else _Logarithmic
    return kind(feature_ND, prototype_KD, regularisation, normalised, count)


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
    similarity_NK: Tensor,
    marginal_K: Tensor,
    regularisation: float,
    kind: str,
    strength: float,
    mass_N: Tensor | None = None,
) -> Tensor:
    """A plan whose marginals need not hold: POT's solvers in float64 on the whole matrix.

    Args:
        similarity_NK: S.
        marginal_K: b.
        regularisation: eps.
        kind: ``unbalanced`` (KL-relaxed marginals) or ``partial`` (a share of the mass alone is moved).
        strength: weight of the KL terms, or the share that is moved.
        mass_N: of the rows; it is made to sum to 1. None: all alike.

    Returns:
        (N, K) float32; its rows are not comparable in size, and one that nothing is moved from is 0.

    Raises:
        ValueError: an unknown kind.
        TransportError: POT's solver did not settle, or its plan is none: not finite, empty, of more than the
            whole mass, or not of the share that was to be moved.
    """
    ot = _pot()
    cost = 1 - similarity_NK.double().cpu()
    rows = _shares(torch.ones(len(cost)) if mass_N is None else mass_N)
    takes = marginal_K.cpu() > 0  # the solvers divide by the shares
    columns = marginal_K.double().cpu()[takes]
    wanted = 1.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if kind == "unbalanced":
            part = ot.unbalanced.sinkhorn_unbalanced(
                rows, columns, cost[:, takes], regularisation, strength, method="sinkhorn_stabilized"
            )
        elif kind == "partial":
            wanted = strength * min(1.0, float(columns.sum()))
            part = ot.partial.entropic_partial_wasserstein(
                rows, columns, cost[:, takes], regularisation, m=wanted
            )
        else:
            raise ValueError(f"{kind!r} is neither 'unbalanced' nor 'partial'")
    moved = float(part.sum())
    sound = abs(moved - wanted) <= 0.01 * wanted if kind == "partial" else 0 < moved < 1.5
    unsettled = [
        str(w.message) for w in caught if "umerical" in str(w.message) or "onverge" in str(w.message)
    ]
    if not bool(part.isfinite().all()) or not sound or unsettled:
        raise TransportError(
            f"{kind} transport at regularisation {regularisation:g} and relaxation {strength:g} moved a mass "
            f"of {moved:.3g}{'; ' + unsettled[0] if unsettled else ''}: a larger regularisation may help"
        )
    plan = torch.zeros_like(cost)
    plan[:, takes] = part
    return plan.float().to(similarity_NK.device)


@torch.no_grad()
def match_prototypes(given_KD: Tensor, other_LD: Tensor) -> Tensor:
    """For each prototype of one domain the one of the other that most of its mass is sent to.

    Entropic OT with uniform marginals and squared Euclidean cost, by POT in float64 and log domain.

    Args:
        given_KD, other_LD: unit prototypes.

    Returns:
        (K,) int64.
    """
    mass_K, mass_L = (torch.ones(len(x)) for x in (given_KD, other_LD))
    # which row gets most is settled long before the marginals are exact
    plan_KL = prototype_plan(given_KD, other_LD, mass_K, mass_L, MATCH_REGULARISATION, iterations=200)
    return plan_KL.argmax(dim=1)


@torch.no_grad()
def prototype_plan(
    given_KD: Tensor,
    other_LD: Tensor,
    mass_K: Tensor,
    mass_L: Tensor,
    regularisation: float,
    iterations: int = 2000,
) -> Tensor:
    """Entropic plan between two domains' prototypes, by POT in float64 and log domain.

    Args:
        given_KD, other_LD: unit prototypes; the cost is squared Euclid, 2 (1 - cosine).
        mass_K, mass_L: of the prototypes, such as sizes of clusters; they are made to sum to 1, and one of 0
            gets next to nothing.
        regularisation: eps > 0.
        iterations: at most; it ends where the marginals hold to 1e-6.

    Returns:
        (K, L) float32 on the prototypes' device, sum 1.

    Raises:
        TransportError: the plan is not finite.
    """
    given, other = given_KD.double().cpu(), other_LD.double().cpu()
    plan_KL: Tensor = _pot().bregman.sinkhorn_log(
        *(_shares(mass) for mass in (mass_K, mass_L)),
        torch.cdist(given, other).square(),
        regularisation,
        numItermax=iterations,
        stopThr=1e-6,
        warn=False,
    )
    if not plan_KL.isfinite().all():
        raise TransportError(f"plan between prototypes at regularisation {regularisation:g}: not finite")
    return plan_KL.float().to(given_KD.device)


def _shares(mass_K: Tensor) -> Tensor:
    """Marginal of a plan, float64 on the CPU; the solvers take the logarithm of none."""
    share_K = mass_K.double().cpu().clamp(min=1e-9)
    return share_K / share_K.sum()


def _pot() -> Any:
    """POT, imported when it is needed: that takes seconds.

    It also imports what other array libraries are installed; JAX then takes three quarters of a GPU's memory.
    """
    for library in ("JAX", "TENSORFLOW", "CUPY"):
        os.environ.setdefault(f"POT_BACKEND_DISABLE_{library}", "1")
    import ot

    return ot
