"""K-means per domain."""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.distributed import broadcast_from_first, rank
from ucir.errors import UserError


@dataclass(frozen=True)
class Clusters:
    """A clustering of N features into K."""

    label_N: Tensor  # int64
    centroid_KD: Tensor  # L2-normalised prototypes, float32
    size_K: Tensor  # int64; an empty cluster keeps its place with 0


def kmeans(
    features_ND: Tensor, k: int, *, iterations: int, restarts: int, seed: int, max_points: int
) -> Clusters:
    """K-means with Euclidean distance on faiss, as the official code runs it (UCDIR ``run_kmeans``).

    Centroids are not spherical during the iterations; each feature is assigned to the nearest
    un-normalised final centroid; the centroids are L2-normalised afterwards, for the losses.

    Args:
        features_ND: unit features, float32.
        k: number of clusters.
        iterations, restarts: faiss ``niter`` and ``nredo``; the best of the restarts is kept.
        seed: of the initial centroids; equal seeds give equal clusters.
        max_points: iterate on a subsample of at most this many points per centroid.

    Raises:
        UserError: more clusters than features.
    """
    if k > len(features_ND):
        raise UserError(f"{k} clusters for {len(features_ND)} images: clusters must not exceed them")
    found = None
    if rank() == 0:
        points = np.ascontiguousarray(features_ND.float().cpu().numpy())
        clustering = faiss.Clustering(points.shape[1], k)
        clustering.niter = iterations
        clustering.nredo = restarts
        clustering.seed = seed
        clustering.max_points_per_centroid = max_points
        clustering.min_points_per_centroid = 1
        index = faiss.IndexFlatL2(points.shape[1])
        clustering.train(points, index)
        _, label = index.search(points, 1)
        centroid = faiss.vector_float_to_array(clustering.centroids).reshape(k, -1)
        found = label[:, 0].astype(np.int64), centroid.copy()
    label, centroid = broadcast_from_first(found)
    label_N = torch.from_numpy(label).to(features_ND.device)
    centroid_KD = F.normalize(torch.from_numpy(centroid).to(features_ND.device), dim=1)
    return Clusters(label_N, centroid_KD, torch.bincount(label_N, minlength=k))
