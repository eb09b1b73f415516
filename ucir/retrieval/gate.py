"""Gates: is there anything in the gallery like this query? Fitted without labels, apart from any ranking.

``spread``  of methods without an answer of their own, as UEM compares them (NeurIPS 2024, App. B.2): a query
            is rejected if its nearest gallery image is farther than its own cluster is wide. Distances are
            1 - cosine; the paper leaves the exact rule open.
``merged``  of UEM (App. B.1): a query is rejected if its nearest prototype found no partner in the gallery's
            domain, or if its nearest gallery image is farther than two members of the merged pair can be.
            Distances are (1 - cosine) x Euclid.
``calibrated``  of any method and of :mod:`ucir.retrieval.search`: a query is rejected if its nearest gallery
            image is farther than those of all but a share of the queries, see :func:`calibrated_limit`. The
            share of rejections among such queries is then known beforehand, which it is with neither of the
            others; strangers among them are as rarely rejected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ucir.losses.universal import product_dissimilarity
from ucir.prototypes.clustering import Clusters, choose_clusters, kmeans
from ucir.prototypes.merging import MergingLimit, centres, unify_domains

CHUNK = 1024
OPPOSITE = 2.0
"""1 - cosine of opposite features, the largest that there is."""
FALSE_REJECTIONS = 0.05
"""Share of queries with a counterpart that a calibrated limit may reject."""
WIDEST = 128
"""Dimensions in which K is looked for: a head has as many. In all of a wide network's it takes longer."""
FARTHEST = 4.0
"""No two unit features are farther apart: 2 x 2."""


GATES = {"uem": "merged"}
"""A method's block to its gate; ``spread`` where none is named."""


@dataclass(frozen=True)
class GateChoice:
    """How a method tells queries without a counterpart."""

    kind: str
    clusters: int | str
    merging_limit: MergingLimit = "domain"
    false_rejections: float = FALSE_REJECTIONS
    """What the calibrated gate beside it may reject, a share."""

    @classmethod
    def of(
        cls,
        block: str | None,
        clusters: int | str | tuple[int, ...],
        merging_limit: MergingLimit = "domain",
        false_rejections: float = FALSE_REJECTIONS,
    ) -> GateChoice:
        """That of a method's block (None: of the start), with its K, or the first of several."""
        k = clusters[0] if isinstance(clusters, tuple) else clusters
        return cls(GATES.get(block or "", "spread"), k, merging_limit, false_rejections)


@dataclass(frozen=True)
class Gate:
    """What is kept of the query's domain: where its clusters are, and how far their counterparts may be."""

    kind: str
    centre_KD: Tensor
    limit_K: Tensor
    """Distance up to which a query of the cluster is accepted; -4 where none is, so that scores rank last."""

    def scores(self, query_QD: Tensor, gallery_GD: Tensor) -> Tensor:
        """How far a query lies beyond its limit, (Q,): rejected above 0.

        Args:
            query_QD, gallery_GD: unit features.
        """
        cluster_Q = torch.cdist(query_QD, self.centre_KD).argmin(dim=1)
        return nearest_distances(query_QD, gallery_GD, self.kind) - self.limit_K[cluster_Q]


def cluster_for_gate(features_ND: Tensor, clusters: int | str = "elbow", seed: int = 0) -> Clusters:
    """The clusters of a domain that a gate is fitted to; those of both directions are the same.

    Args:
        features_ND: unit features.
        clusters: how many, at most as many as images; or how to choose them, see
            :func:`ucir.prototypes.clustering.choose_clusters`: of wide features by their first principal
            components, as what is left out adds about the same to the inertia of any K.
        seed: of K-means.
    """
    if isinstance(clusters, str):
        k = choose_clusters(_first_components(features_ND), clusters, seed)
    else:
        k = min(clusters, len(features_ND))
    return kmeans(features_ND, k, iterations=20, restarts=5, seed=seed, max_points=2000)


def _first_components(features_ND: Tensor) -> Tensor:
    if features_ND.shape[1] <= WIDEST:
        return features_ND
    centred_ND = features_ND - features_ND.mean(dim=0)
    _, vector_DD = torch.linalg.eigh(centred_ND.T.double() @ centred_ND.double())  # the largest come last
    turned_ND: Tensor = centred_ND @ vector_DD[:, -WIDEST:].float()
    return turned_ND


def fit_gate(
    kind: str,
    query_QD: Tensor,
    gallery_GD: Tensor,
    clusterings: tuple[Clusters, Clusters],
    merging_limit: MergingLimit = "domain",
) -> Gate:
    """Learn a gate from the features of both domains.

    Args:
        kind: ``spread`` or ``merged``.
        query_QD, gallery_GD: unit features of the query's domain and of the gallery.
        clusterings: of both, by :func:`cluster_for_gate`.
        merging_limit: of ``merged``.
    """
    centre_KD, label_Q = centres(query_QD, clusterings[0])
    limits = query_QD.new_full((len(centre_KD),), -FARTHEST)
    if kind == "spread":
        for k in range(len(centre_KD)):
            members = query_QD[label_Q == k]
            limits[k] = _largest(kind, members, members)
        return Gate(kind, centre_KD, limits)
    own_structure, other_structure = unify_domains((query_QD, gallery_GD), clusterings, limit=merging_limit)
    _, label_G = centres(gallery_GD, clusterings[1])
    # a merged prototype of the gallery's structure is that of the query's cluster which it merged with
    for k in own_structure.merged_K.nonzero().flatten().tolist():
        partner = int(other_structure.other_L[k])
        limits[k] = _largest(kind, query_QD[label_Q == k], gallery_GD[label_G == partner])
    return Gate(kind, centre_KD, limits)


def _distances(kind: str, x_BD: Tensor, y_ND: Tensor) -> Tensor:
    return product_dissimilarity(x_BD, y_ND) if kind == "merged" else 1 - x_BD @ y_ND.T


def _largest(kind: str, x_BD: Tensor, y_ND: Tensor) -> float:
    return max(float(_distances(kind, part, y_ND).max()) for part in torch.split(x_BD, CHUNK))


def nearest_distances(query_QD: Tensor, gallery_GD: Tensor, kind: str = "calibrated") -> Tensor:
    """Distance of each query's nearest picture of the gallery, (Q,), as a gate measures it."""
    parts = torch.split(query_QD, CHUNK)
    return torch.cat([_distances(kind, part_BD, gallery_GD).amin(dim=1) for part_BD in parts])


def fewest_queries(false_rejections: float) -> int:
    """Of how many queries on a limit can be learnt that rejects no more than this share of them."""
    return math.ceil(1 / false_rejections) - 1


def calibrated_limit(nearest_Q: Tensor, false_rejections: float = FALSE_REJECTIONS) -> float:
    """A limit from the features alone: the distance beyond which nothing is taken to be like a query.

    The quantile of split conformal prediction (Vovk et al. 2005; Lei et al. 2018): a new query of the same
    kind as those given lies beyond it with a probability of at most ``false_rejections``, whatever the
    features are. Queries without a counterpart among those given make the limit wider, never narrower.

    Args:
        nearest_Q: 1 - cosine of each query's nearest picture of the gallery.
        false_rejections: between 0 and 1.

    Returns:
        The limit; :data:`OPPOSITE` where there are too few queries to tell.
    """
    rank = math.ceil((len(nearest_Q) + 1) * (1 - false_rejections))
    return OPPOSITE if rank > len(nearest_Q) else float(nearest_Q.sort().values[rank - 1])
