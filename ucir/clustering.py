"""K-means per domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.distributed import broadcast_from_first, rank
from ucir.errors import UserError
from ucir.losses.cluster import cluster_means


@dataclass(frozen=True)
class Clusters:
    """A clustering of N features into K."""

    label_N: Tensor  # int64
    centroid_KD: Tensor  # L2-normalised prototypes, float32
    size_K: Tensor  # int64; an empty cluster keeps its place with 0


def kmeans(
    features_ND: Tensor,
    k: int,
    *,
    iterations: int,
    restarts: int,
    seed: int,
    max_points: int,
    spherical: bool = False,
    initial_KD: Tensor | None = None,
    together: bool = True,
) -> Clusters:
    """K-means with Euclidean distance on faiss, as the official code runs it (UCDIR ``run_kmeans``).

    Each feature is assigned to the nearest final centroid, which is not normalised unless ``spherical``;
    the centroids are L2-normalised afterwards, for the losses.

    Args:
        features_ND: unit features, float32.
        k: number of clusters.
        iterations, restarts: faiss ``niter`` and ``nredo``; the best of the restarts is kept.
        seed: of the initial centroids; equal seeds give equal clusters.
        max_points: iterate on a subsample of at most this many points per centroid.
        spherical: normalise the centroids in each iteration, as PCS does.
        initial_KD: where to begin, instead of at features drawn by ``seed``.
        together: all workers ask for it and get the first one's; else this process asks alone.

    Raises:
        UserError: more clusters than features.
    """
    if k > len(features_ND):
        raise UserError(f"{k} clusters for {len(features_ND)} images: clusters must not exceed them")
    found = None
    if rank() == 0 or not together:
        points = np.ascontiguousarray(features_ND.float().cpu().numpy())
        clustering = faiss.Clustering(points.shape[1], k)
        clustering.niter = iterations
        clustering.nredo = restarts
        clustering.seed = seed
        clustering.spherical = spherical
        clustering.max_points_per_centroid = max_points
        clustering.min_points_per_centroid = 1
        if initial_KD is not None:
            given = np.ascontiguousarray(initial_KD.float().cpu().numpy())
            faiss.copy_array_to_vector(given.ravel(), clustering.centroids)
        index = faiss.IndexFlatL2(points.shape[1])
        clustering.train(points, index)
        _, label = index.search(points, 1)
        centroid = faiss.vector_float_to_array(clustering.centroids).reshape(k, -1)
        found = label[:, 0].astype(np.int64), centroid.copy()
    label, centroid = broadcast_from_first(found) if together else cast(tuple[Any, Any], found)
    label_N = torch.from_numpy(label).to(features_ND.device)
    centroid_KD = F.normalize(torch.from_numpy(centroid).to(features_ND.device), dim=1)
    return Clusters(label_N, centroid_KD, torch.bincount(label_N, minlength=k))


def concentration(features_ND: Tensor, label_N: Tensor, centre_KD: Tensor, smooth: float = 10.0) -> Tensor:
    """How spread each cluster is: mean distance of its members to its centre over log(size + smooth).

    PCL (Li et al., ICLR 2021) section 3.3, likewise PCS; 0 for a cluster with fewer than two members.

    Args:
        features_ND: unit features.
        label_N: their clusters.
        centre_KD: of the clusters.
        smooth: alpha.

    Returns:
        (K,) float32, >= 0.
    """
    distance_N = (features_ND - centre_KD[label_N]).norm(dim=1)
    size_K = torch.bincount(label_N, minlength=len(centre_KD))
    sum_K = distance_N.new_zeros(len(centre_KD)).index_add_(0, label_N, distance_N)
    phi_K = sum_K / size_K.clamp(min=1) / torch.log(size_K + smooth)
    return torch.where(size_K > 1, phi_K, torch.zeros_like(phi_K))


def raw_centroids(features_ND: Tensor, clusters: Clusters) -> Tensor:
    """Means of the clusters' members, (K, D), before they are normalised to prototypes."""
    return cluster_means(features_ND, clusters.label_N, len(clusters.size_K))


def choose_clusters(features_ND: Tensor, how: str, seed: int, most: int = 100) -> int:
    """A number of clusters where nobody knows one.

    ``elbow``: the K whose inertia lies farthest below the chord from the first to the last candidate.
    ``silhouette``: the K with the best mean silhouette of a sample of at most 2,000 features.
    Candidates grow by a quarter from 2 to ``most`` or a quarter of the images.

    Args:
        features_ND: unit features.
        how: ``elbow`` or ``silhouette``.
        seed: of K-means and of the sample.
        most: the largest candidate.

    Raises:
        UserError: fewer than eight images.
    """
    if len(features_ND) < 8:
        raise UserError(f"{len(features_ND)} images are too few to choose a number of clusters from")
    candidates = [2]
    while (following := max(candidates[-1] + 1, candidates[-1] * 5 // 4)) <= min(most, len(features_ND) // 4):
        candidates.append(following)
    found = [kmeans(features_ND, k, iterations=20, restarts=3, seed=seed, max_points=256) for k in candidates]
    if how == "silhouette":
        from sklearn.metrics import silhouette_score

        points = features_ND.cpu().numpy()
        scores = [
            silhouette_score(points, label, sample_size=min(2000, len(points)), random_state=seed)
            if len(set(label)) > 1
            else -1.0
            for label in (c.label_N.cpu().numpy() for c in found)
        ]
        return candidates[int(np.argmax(scores))]
    distances = [features_ND - raw_centroids(features_ND, c)[c.label_N] for c in found]
    inertia = np.array([float(distance.square().sum()) for distance in distances])
    across = (np.array(candidates) - candidates[0]) / max(1, candidates[-1] - candidates[0])
    down = (inertia - inertia[-1]) / max(1e-12, inertia[0] - inertia[-1])
    return candidates[int(np.argmax(1 - across - down))]


def aligned_order(own_KD: Tensor, other_KD: Tensor) -> Tensor:
    """For each row of ``own`` the row of ``other`` that it is paired with, one to one, by most cosine."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    _, column = linear_sum_assignment(-(own_KD @ other_KD.T).double().cpu().numpy())
    return torch.from_numpy(column).to(own_KD.device)
