"""K-means per domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.errors import UserError
from ucir.memory import Features, features_of


@dataclass(frozen=True)
class Clusters:
    """A clustering of N features into K."""

    label_N: Tensor  # int64
    centroid_KD: Tensor  # L2-normalised prototypes, float32
    size_K: Tensor  # int64; an empty cluster keeps its place with 0


AT_ONCE = 8192
"""Points whose sums or distances are computed at a time."""
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
    sample: int | None = None,
    settled: float = 0.0,
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
        initial_KD: where to begin, instead of at features drawn by ``seed``: then there is one restart.
        sample: not faiss's: try the restarts on at most this many points per centroid, and go on from the
            best with all.
        settled: not faiss's: from the sample's best or ``initial_KD`` on, end where an iteration lowers the
            cost by a smaller share.

    Raises:
        UserError: more clusters than features.
        FloatingPointError: features are not finite.
    """
    features = features_of(features)
    if k > len(features):
        raise UserError(f"{k} clusters for {len(features)} images: clusters must not exceed them")
    if not features.total(features.own_ND.sum()).isfinite():
        raise FloatingPointError("features to be clustered are not finite")
    device = features.own_ND.device
    drawn_N = _faiss_order(len(features), seed).to(device)
    points = _Points(features, drawn_N[: k * max_points] if len(features) > k * max_points else None)
    if points.count == k:
        best = _Found(points.rows(torch.arange(k, device=device)))
    elif initial_KD is not None:
        best = _lloyd(points, initial_KD.to(features.own_ND), iterations, spherical, settled)
    else:
        few = _Points(features, drawn_N[: k * sample]) if sample and points.count > k * sample else points
        best = _Found(few.rows(torch.arange(k, device=device)))
        for restart in range(restarts):
            order_N = _faiss_order(few.count, seed + 1 + restart * 15486557).to(device)
            found = _lloyd(few, few.rows(order_N[:k]), iterations, spherical)
            if found.cost < best.cost * (1 - TIE):
                best = found
        if few is not points:
            best = _lloyd(points, best.centroid_KD, iterations, spherical, settled)
    label_N = best.label_N
    if label_N is None or points.slot_N is not None:
        _, label_N = _nearest(features.own_ND, best.centroid_KD)
    label_N = features.gather(label_N)
    return Clusters(label_N, F.normalize(best.centroid_KD, dim=1), torch.bincount(label_N, minlength=k))


@dataclass(frozen=True)
class _Found:
    """What K-means ends with, alike on every worker but for the labels."""

    centroid_KD: Tensor
    cost: float = float("inf")
    """Of the centroids before they moved last."""
    label_N: Tensor | None = None
    """Of the worker's own points; None where the centroids have moved since."""


class _Points:
    """Features that are iterated on: all, or those of some slots.

    Args:
        features: of all workers.
        slot_N: which; None: all.
    """

    def __init__(self, features: Features, slot_N: Tensor | None) -> None:
        self.features, self.slot_N = features, slot_N
        self.own_ND, self.count = features.own_ND, len(features)
        if slot_N is not None:
            mine_N, place_N = features.place(slot_N)
            self.own_ND, self.count = features.own_ND[place_N[mine_N]], len(slot_N)

    def rows(self, number_K: Tensor) -> Tensor:
        """Those with these numbers, (K, D)."""
        return self.features.rows(number_K if self.slot_N is None else self.slot_N[number_K])


def _lloyd(
    points: _Points, centroid_KD: Tensor, iterations: int, spherical: bool, settled: float = 0.0
) -> _Found:
    """Iterate from some centroids.

    Sums are float64, so that whichever worker adds what, the mean is the same float32; after the first
    iteration they follow the points that change their cluster.

    Args:
        points: what is clustered.
        centroid_KD: the first centroids.
        iterations: at most; it ends where nothing moves any more.
        spherical, settled: as of :func:`kmeans`.
    """
    own_ND, (k, dim) = points.own_ND, centroid_KD.shape
    sum_KD = torch.zeros(k, dim, dtype=torch.float64, device=own_ND.device)
    before_N: Tensor | None = None
    cost = float("inf")
    if spherical:
        centroid_KD = _unit(centroid_KD)
    for _ in range(iterations):
        distance_N, label_N = _nearest(own_ND, centroid_KD)
        if before_N is None:
            moved = len(own_ND)
            for first in range(0, moved, AT_ONCE):
                rows = slice(first, first + AT_ONCE)
                x_BD = own_ND[rows].double()
                sum_KD.scatter_add_(0, label_N[rows, None].expand_as(x_BD), x_BD)
        else:
            changed = (label_N != before_N).nonzero().flatten()
            moved = len(changed)
            x_BD = own_ND[changed].double()
            sum_KD.index_add_(0, label_N[changed], x_BD).index_add_(0, before_N[changed], x_BD, alpha=-1)
        figures = sum_KD.new_tensor([moved, 0.0])
        figures[1] = distance_N.sum(dtype=torch.float64)
        size_K = torch.bincount(label_N, minlength=k).double()
        total = points.features.total(torch.cat([sum_KD.flatten(), size_K, figures]))
        previous, before_N = cost, label_N
        moved, cost = total[-2:].tolist()
        total_KD, size_K = total[: k * dim].view(k, dim), total[k * dim : -2]
        if size_K.all() and (not moved or previous - cost < settled * previous):
            return _Found(centroid_KD, cost, label_N)
        centroid_KD = (total_KD / size_K.clamp(min=1)[:, None]).float()
        if not size_K.all():
            centroid_KD = _split_clusters(centroid_KD, size_K, points.count)
        if spherical:
            centroid_KD = _unit(centroid_KD)
    return _Found(centroid_KD, cost)


def _nearest(x_ND: Tensor, centroid_KD: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest centroid, (N,) float32, and which it is, (N,) int64."""
    if x_ND.device.type == "cpu":
        index = faiss.IndexFlatL2(x_ND.shape[1])
        index.add(_numpy(centroid_KD))
        distance, label = index.search(_numpy(x_ND), 1)
        return torch.from_numpy(distance[:, 0]), torch.from_numpy(label[:, 0].astype(np.int64))
    return _nearest_on_device(x_ND, centroid_KD)


def _nearest_on_device(x_ND: Tensor, centroid_KD: Tensor) -> tuple[Tensor, Tensor]:
    half_K = centroid_KD.square().sum(dim=1) / 2
    parts = [torch.addmm(-half_K, x_BD, centroid_KD.T).max(dim=1) for x_BD in torch.split(x_ND, AT_ONCE)]
    near_N, label_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return (x_ND.square().sum(dim=1) - 2 * near_N).clamp(min=0), label_N


def _unit(centroid_KD: Tensor) -> Tensor:
    if centroid_KD.device.type != "cpu":
        return F.normalize(centroid_KD, dim=1)
    array = _numpy(centroid_KD).copy()
    faiss.normalize_L2(array)
    return torch.from_numpy(array)


def _split_clusters(centroid_KD: Tensor, member_K: Tensor, count: int) -> Tensor:
    """Give each empty cluster a half of a large one: faiss's ``split_clusters``."""
    centroid, member = centroid_KD.cpu().numpy().copy(), member_K.cpu().numpy().copy()
    k, dim = centroid.shape
    random = faiss.RandomGenerator(1234)  # type: ignore[attr-defined]
    shift = np.where(np.arange(dim) % 2 == 0, 1 / 1024, -1 / 1024).astype(np.float32)
    for empty in np.flatnonzero(member == 0):
        large = 0
        while random.rand_float() >= (member[large] - 1) / (count - k):
            large = (large + 1) % k
        centroid[empty] = centroid[large] * (1 + shift)
        centroid[large] *= 1 - shift
        member[empty] = member[large] // 2
        member[large] -= member[empty]
    return torch.from_numpy(centroid).to(centroid_KD.device)


def _faiss_order(count: int, seed: int) -> Tensor:
    """The permutation that faiss draws with a seed, int64."""
    order = np.empty(count, np.int32)
    faiss.rand_perm(faiss.swig_ptr(order), count, seed)  # type: ignore[attr-defined]
    return torch.from_numpy(order.astype(np.int64))


def _numpy(x: Tensor) -> Any:
    return np.ascontiguousarray(x.cpu().numpy(), np.float32)


def concentration(features: Tensor | Features, label_N: Tensor, centre_KD: Tensor) -> Tensor:
    """How spread each cluster is: mean distance of its members to its centre over log(size + 10).

    PCL (Li et al., ICLR 2021) section 3.3 with its alpha of 10, likewise PCS; 0 for a cluster with fewer than
    two members.

    Args:
        features: unit features.
        label_N: their clusters.
        centre_KD: of the clusters.

    Returns:
        (K,) float32, >= 0.
    """
    features = features_of(features)
    own_N = label_N[features.own_slots]
    distance_N = (features.own_ND - centre_KD[own_N]).norm(dim=1)
    size_K = torch.bincount(label_N, minlength=len(centre_KD))
    sum_K = features.total(distance_N.new_zeros(len(centre_KD)).index_add_(0, own_N, distance_N))
    phi_K = sum_K / size_K.clamp(min=1) / torch.log(size_K + 10.0)
    return torch.where(size_K > 1, phi_K, torch.zeros_like(phi_K))


def raw_centroids(features: Tensor | Features, clusters: Clusters) -> Tensor:
    """Means of the clusters' members, (K, D), before they are normalised to prototypes; 0 for an empty
    one."""
    return cluster_means(features, clusters.label_N, len(clusters.size_K))


def cluster_means(features: Tensor | Features, label_N: Tensor, count: int) -> Tensor:
    """Means of the features with each label, (K, D); 0 where there is none."""
    size_K1 = torch.bincount(label_N, minlength=count)[:, None]
    return features_of(features).sums(label_N, count) / size_K1.clamp(min=1)


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
