"""Prototypes of two domains as one structure: UEM's translation and merging (NeurIPS 2024, eqs. 8 and 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ucir.memory import Features, features_of
from ucir.prototypes.clustering import Clusters, raw_centroids

MergingLimit = Literal["domain", "pair"]
"""What a pair of prototypes must be nearer than: any two of one domain (eq. 9), or, ours, each of the two to
any other of its own domain. One pair of clusters that lie close keeps all others from merging in eq. 9."""


@dataclass(frozen=True)
class Structure:
    """A domain's unified prototypes: its own K, then those of the other domain that found no partner."""

    prototype_CD: Tensor
    """Merged ones are the mean of both; not normalised."""
    other_L: Tensor
    """Row of each of the other domain's prototypes, int64."""
    merged_K: Tensor
    """Which of the domain's own have a partner, bool."""


torch.serialization.add_safe_globals([Structure])  # it stands in the states of trainings


def unify(
    own_KD: Tensor,
    other_LD: Tensor,
    own_mean_D: Tensor,
    other_mean_D: Tensor,
    merging: bool = True,
    limit: MergingLimit = "domain",
) -> Structure:
    """The other domain's prototypes moved by the difference of the means, and merged where they fit.

    Pairs come from the Hungarian assignment of least total distance. A pair merges if its distance is less
    than every distance between two prototypes of the same domain (eq. 9); a domain with one prototype sets
    no limit, and two that coincide let nothing merge.

    Args:
        own_KD, other_LD: cluster means of the two domains.
        own_mean_D, other_mean_D: means of their banks.
        merging: without, every prototype stays on its own (an ablation).
        limit: of the distance of a pair that merges.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    moved_LD = other_LD + (own_mean_D - other_mean_D)
    partner_L = torch.full((len(other_LD),), -1, dtype=torch.int64, device=own_KD.device)
    if merging:
        distance_KL = torch.cdist(own_KD, moved_LD)
        own_K, other_L = _least_distances(own_KD), _least_distances(other_LD)
        if limit == "domain":
            least = torch.minimum(own_K.min(), other_L.min())
            own_K, other_L = least.expand_as(own_K), least.expand_as(other_L)
        for k, j in zip(*linear_sum_assignment(distance_KL.double().cpu().numpy()), strict=True):
            if float(distance_KL[k, j]) < min(float(own_K[k]), float(other_L[j])):
                partner_L[j] = int(k)
    single_L = partner_L < 0
    prototype_KD = own_KD.clone()
    prototype_KD[partner_L[~single_L]] = (own_KD[partner_L[~single_L]] + moved_LD[~single_L]) / 2
    merged_K = torch.zeros(len(own_KD), dtype=torch.bool, device=own_KD.device)
    merged_K[partner_L[~single_L]] = True
    place_L = len(own_KD) + single_L.cumsum(dim=0) - 1
    return Structure(
        torch.cat([prototype_KD, moved_LD[single_L]]),
        torch.where(single_L, place_L, partner_L),
        merged_K,
    )


def unify_domains(
    features: tuple[Tensor | Features, Tensor | Features],
    clusters: tuple[Clusters, Clusters],
    merging: bool = True,
    limit: MergingLimit = "domain",
) -> tuple[Structure, Structure]:
    """Both domains' structures, of the centres that :func:`centres` finds."""
    one_KD, other_KD = (centres(x, c)[0] for x, c in zip(features, clusters, strict=True))
    first, second = (features_of(x).mean() for x in features)
    return (
        unify(one_KD, other_KD, first, second, merging, limit),
        unify(other_KD, one_KD, second, first, merging, limit),
    )


def centres(features: Tensor | Features, clusters: Clusters) -> tuple[Tensor, Tensor]:
    """Means of the clusters that have members, and the number of each feature's among them, int64."""
    there_K = clusters.size_K > 0
    number_K = there_K.cumsum(dim=0) - 1
    return raw_centroids(features, clusters)[there_K], number_K[clusters.label_N]


def _least_distances(x_KD: Tensor) -> Tensor:
    """Of each row to a different one, (K,); infinite for a single row."""
    distance_KK = torch.cdist(x_KD, x_KD, compute_mode="donot_use_mm_for_euclid_dist")
    distance_KK.fill_diagonal_(float("inf"))
    return distance_KK.amin(dim=1)
