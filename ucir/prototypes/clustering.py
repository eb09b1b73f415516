"""K-means per domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.errors import UserError
from ucir.losses.cluster import sizes
from ucir.memory import Features, features_of


@dataclass(frozen=True)
class Clusters:
    """A clustering of N features into K."""

    label_N: Tensor  # int64
    centroid_KD: Tensor  # L2-normalised prototypes, float32
    size_K: Tensor  # int64; an empty cluster keeps its place with 0


TIE = 1e-6
"""Restarts whose costs differ by a smaller share are equally good: rounding does not choose between them."""

torch.serialization.add_safe_globals([Clusters])  # it stands in the states of trainings


def kmeans(
    features: Tensor | Features,
    k: int,
    *,
    iterations: int,
    restarts: int,
    seed: int,
    max_points: int,
    spherical: bool = False,
    initial_KD: Tensor | None = None,
) -> Clusters:
    """K-means with Euclidean distance, as the official code runs it on faiss (UCDIR ``run_kmeans``).

    It is ``faiss.Clustering`` with its draws and its rules, for features that are shared out: each worker
    assigns its own, and an iteration hands (K + 1) x (D + 1) sums over.
    Each feature is assigned to the nearest final centroid, which is not normalised unless ``spherical``;
    the centroids are L2-normalised afterwards, for the losses.

    Args:
        features: unit features, float32; a tensor's by this process alone.
        k: number of clusters.
        iterations, restarts: faiss ``niter`` and ``nredo``; the best of the restarts is kept, of equally good
            ones the first.
        seed: of the initial centroids; equal seeds give equal clusters.
        max_points: iterate on a subsample of at most this many points per centroid.
        spherical: normalise the centroids in each iteration, as PCS does.
        initial_KD: where to begin, instead of at features drawn by ``seed``.

    Raises:
        UserError: more clusters than features.
        FloatingPointError: features are not finite.
    """
    features = features_of(features)
    if k > len(features):
        raise UserError(f"{k} clusters for {len(features)} images: clusters must not exceed them")
    device = features.own_ND.device
    taken_N = torch.arange(len(features))
    if len(features) > k * max_points:
        taken_N = _faiss_order(len(features), seed)[: k * max_points]
    taken_N = taken_N.to(device)
    if len(taken_N) == k:
        best_KD = _numpy(features.rows(taken_N))
    else:
        given = None if initial_KD is None else _numpy(initial_KD)
        mine_N, place_N = features.place(taken_N)
        own_ND = features.own_ND[place_N[mine_N]]
        points = _numpy(own_ND)
        # float64: whichever worker adds what, the mean is the same float32
        counted_ND = F.pad(own_ND.double(), (0, 1), value=1.0)
        best_KD, least = None, float("inf")
        for restart in range(restarts):
            order_N = _faiss_order(len(taken_N), seed + 1 + restart * 15486557).to(device)
            first = _numpy(features.rows(taken_N[order_N[:k]])) if given is None else given.copy()
            centroid, cost = _lloyd(
                features.total, points, counted_ND, first, len(taken_N), iterations, spherical
            )
            if cost < least * (1 - TIE):
                best_KD, least = centroid, cost
        if best_KD is None:
            raise FloatingPointError("features to be clustered are not finite")
    index = faiss.IndexFlatL2(features.own_ND.shape[1])
    index.add(best_KD)
    _, label = index.search(_numpy(features.own_ND), 1)
    label_N = features.gather(torch.from_numpy(label[:, 0].astype(np.int64)).to(device))
    centroid_KD = F.normalize(torch.from_numpy(best_KD).to(features.own_ND), dim=1)
    return Clusters(label_N, centroid_KD, torch.bincount(label_N, minlength=k))


def _lloyd(
    over_workers: Callable[[Tensor], Tensor],
    points: Any,
    counted_ND: Tensor,
    centroid_KD: Any,
    count: int,
    iterations: int,
    spherical: bool,
) -> tuple[Any, float]:
    """One restart: centroids, (K, D) float32 array, and the cost before they moved last; alike on every
    worker.

    Args:
        over_workers: sum of what each worker has.
        points: this worker's, (N, D) float32 array.
        counted_ND: the same, float64, with a column of ones.
        centroid_KD: the first centroids.
        count: points of all workers.
        iterations: at most; it ends where nothing moves any more.
        spherical: as of :func:`kmeans`.
    """
    k, dim = centroid_KD.shape
    device = counted_ND.device
    before, cost = None, 0.0
    if spherical:
        faiss.normalize_L2(centroid_KD)
    for _ in range(iterations):
        index = faiss.IndexFlatL2(dim)
        index.add(centroid_KD)
        distance, label = index.search(points, 1)
        sums = torch.zeros(k + 1, dim + 1, dtype=torch.float64, device=device)
        sums[:k].index_add_(0, torch.from_numpy(label[:, 0]).to(device), counted_ND)
        sums[k, 0] = float(distance.sum(dtype=np.float64))
        sums[k, 1] = float(before is None or (label != before).any())
        total = over_workers(sums).cpu().numpy()
        cost, moved, size_K = float(total[k, 0]), total[k, 1], total[:k, -1]
        if not moved and size_K.all():
            break
        before = label
        centroid_KD = np.ascontiguousarray(total[:k, :-1] / np.maximum(size_K, 1)[:, None], np.float32)
        _split_clusters(centroid_KD, size_K, count)
        if spherical:
            faiss.normalize_L2(centroid_KD)
    return centroid_KD, cost


def _split_clusters(centroid_KD: Any, member_K: Any, count: int) -> None:
    """Give each empty cluster a half of a large one, in place: faiss's ``split_clusters``."""
    k, dim = centroid_KD.shape
    random = faiss.RandomGenerator(1234)  # type: ignore[attr-defined]
    shift = np.where(np.arange(dim) % 2 == 0, 1 / 1024, -1 / 1024).astype(np.float32)
    for empty in np.flatnonzero(member_K == 0):
        large = 0
        while random.rand_float() >= (member_K[large] - 1) / (count - k):
            large = (large + 1) % k
        centroid_KD[empty] = centroid_KD[large] * (1 + shift)
        centroid_KD[large] *= 1 - shift
        member_K[empty] = member_K[large] // 2
        member_K[large] -= member_K[empty]


def _faiss_order(count: int, seed: int) -> Tensor:
    """The permutation that faiss draws with a seed, int64."""
    order = np.empty(count, np.int32)
    faiss.rand_perm(faiss.swig_ptr(order), count, seed)  # type: ignore[attr-defined]
    return torch.from_numpy(order.astype(np.int64))


def _numpy(x: Tensor) -> Any:
    return np.ascontiguousarray(x.cpu().numpy(), np.float32)


def concentration(
    features: Tensor | Features, label_N: Tensor, centre_KD: Tensor, smooth: float = 10.0
) -> Tensor:
    """How spread each cluster is: mean distance of its members to its centre over log(size + smooth).

    PCL (Li et al., ICLR 2021) section 3.3, likewise PCS; 0 for a cluster with fewer than two members.

    Args:
        features: unit features.
        label_N: their clusters.
        centre_KD: of the clusters.
        smooth: alpha.

    Returns:
        (K,) float32, >= 0.
    """
    features = features_of(features)
    own_N = label_N[features.own_slots]
    distance_N = (features.own_ND - centre_KD[own_N]).norm(dim=1)
    size_K = torch.bincount(label_N, minlength=len(centre_KD))
    sum_K = features.total(distance_N.new_zeros(len(centre_KD)).index_add_(0, own_N, distance_N))
    phi_K = sum_K / size_K.clamp(min=1) / torch.log(size_K + smooth)
    return torch.where(size_K > 1, phi_K, torch.zeros_like(phi_K))


def raw_centroids(features: Tensor | Features, clusters: Clusters) -> Tensor:
    """Means of the clusters' members, (K, D), before they are normalised to prototypes; 0 for an empty
    one."""
    count = len(clusters.size_K)
    return features_of(features).sums(clusters.label_N, count) / sizes(clusters.label_N, count)


def choose_clusters(features: Tensor | Features, how: str, seed: int, most: int = 100) -> int:
    """A number of clusters where nobody knows one.

    ``elbow``: the K whose inertia lies farthest below the chord from the first to the last candidate.
    ``silhouette``: the K with the best mean silhouette of a sample of at most 2,000 features.
    Candidates grow by a quarter from 2 to ``most`` or a quarter of the images.

    Args:
        features: unit features; a tensor's by this process alone.
        how: ``elbow`` or ``silhouette``.
        seed: of K-means and of the sample.
        most: the largest candidate.

    Raises:
        UserError: fewer than eight images.
    """
    features = features_of(features)
    if len(features) < 8:
        raise UserError(f"{len(features)} images are too few to choose a number of clusters from")
    candidates = [2]
    while (following := max(candidates[-1] + 1, candidates[-1] * 5 // 4)) <= min(most, len(features) // 4):
        candidates.append(following)
    clusterings = [
        kmeans(features, k, iterations=20, restarts=3, seed=seed, max_points=256) for k in candidates
    ]
    if how == "silhouette":
        from sklearn.metrics import silhouette_score

        drawn = np.random.default_rng(seed).permutation(len(features))[:2000]
        drawn_S = torch.from_numpy(drawn).to(features.own_ND.device)
        points = _numpy(features.rows(drawn_S))
        labels = [c.label_N[drawn_S].cpu().numpy() for c in clusterings]
        scores = [silhouette_score(points, label_S) if len(set(label_S)) > 1 else -1.0 for label_S in labels]
        return candidates[int(np.argmax(scores))]
    inertia = np.array([_inertia(features, c) for c in clusterings])
    across = (np.array(candidates) - candidates[0]) / max(1, candidates[-1] - candidates[0])
    down = (inertia - inertia[-1]) / max(1e-12, inertia[0] - inertia[-1])
    return candidates[int(np.argmax(1 - across - down))]


def _inertia(features: Features, clusters: Clusters) -> float:
    """Sum of squared distances to the clusters' means."""
    away = features.own_ND - raw_centroids(features, clusters)[clusters.label_N[features.own_slots]]
    return float(features.total(away.square().sum()))


def aligned_order(own_KD: Tensor, other_KD: Tensor) -> Tensor:
    """For each row of ``own`` the row of ``other`` that it is paired with, one to one, by most cosine."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    _, column = linear_sum_assignment(-(own_KD @ other_KD.T).double().cpu().numpy())
    return torch.from_numpy(column).to(own_KD.device)
