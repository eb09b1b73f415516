"""UCDIR's losses in the OT-matched form that a third-party review describes. Not the paper's method.

Soft assignments and soft-weighted centroids, cluster-wise contrast against prototypes, and a distance of
distance between the centroids of both domains, matched by Sinkhorn with uniform marginals. Batches,
schedules, instance-wise contrast and self-entropy are UCDIR's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ucir.config.base import Positive
from ucir.losses.assignment import self_entropy
from ucir.losses.matched import matched_distance, soft_assignment, soft_centroids
from ucir.losses.prototype import prototype_contrast
from ucir.methods.base import Term, Weight
from ucir.methods.step import DomainBatch
from ucir.methods.ucdir import UcdirFamily, UcdirFamilyParams
from ucir.prototypes.transport import match_prototypes


class UcdirOtParams(UcdirFamilyParams):
    """``methods.ucdir-ot.<dataset>``; defaults of the review."""

    assignment_temperature: Positive = 0.1
    """t of the soft assignments, and of the contrast against prototypes."""
    entropy_weight: Weight = 0.01
    distance_weight: Weight = 0.1


class UcdirOt(UcdirFamily[UcdirOtParams]):
    """IW + CW against prototypes + [cross-domain phase] (0.01 SE + 0.1 matched DD)."""

    params_type = UcdirOtParams

    def _cluster_contrasts(self, number: int, part: DomainBatch, others_B: Tensor) -> list[Tensor]:
        t, values = self.params.assignment_temperature, []
        assert self.clusters is not None
        for clusters in self.clusters[number]:
            nearest_B = soft_assignment(part.q_BD.detach(), clusters.centroid_KD, t).argmax(dim=1)
            values.append(prototype_contrast(part.q_BD, nearest_B, clusters.centroid_KD, t))
        return values

    def _cross_domain(self, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p = self.params
        assert self.clusters is not None
        entropy, distance = [], []
        for pair in zip(*self.clusters, strict=True):
            prototypes = [clusters.centroid_KD for clusters in pair]
            entropy += [
                self_entropy(part.q_BD, c, p.entropy_temperature) for part in batch for c in prototypes
            ]
            centroid_K, other_K = (
                soft_centroids(part.q_BD, soft_assignment(part.q_BD, c, p.assignment_temperature))
                for part, c in zip(batch, prototypes, strict=True)
            )
            distance.append(matched_distance(centroid_K, other_K, match_prototypes(centroid_K, other_K)))
        terms = {}
        if p.entropy_weight > 0:
            terms["self_entropy"] = Term(p.entropy_weight, torch.stack(entropy).mean())
        if p.distance_weight > 0:
            terms["distance"] = Term(p.distance_weight, torch.stack(distance).mean())
        return terms
