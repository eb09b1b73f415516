"""Consensus: our own method, of no paper, from parts that earned their place on real pictures.

Of a sound start, neighbours within a domain are right far more often than those across domains (on PACS 72 to
97 % of reciprocal neighbours against 33 to 76 %). So each picture is given a target that its domain agrees
on, and the two domains' targets are brought together cluster by cluster, not picture by picture:

1. the features of a domain are diffused over its graph of reciprocal neighbours, P^t X, and its mean is taken
   off (diffusion for retrieval: Iscen et al., CVPR 2017; first within, then across, as DUDE has it)
2. both domains are clustered; entropic transport between the clusters, weighted by their sizes, tells each
   cluster where the other domain has its like; every target moves with its cluster half of the way. It is
   unbalanced, as a class may be frequent in one domain and rare in the other, or not be there
3. the network learns the targets from random views, so that new pictures need no graph, and beside them
   tells every picture from the others of its domain (Wu et al., CVPR 2018), at so high a temperature that
   all others count, not the nearest ones alone: sum over domains of
   mean over i of 1 - cos(q_i, t_i) + w * -log( e(q_i m_i) / sum_j e(q_i m_j) ), m the domain's bank

The targets are made of the start's features, and once more half-way, of what the network has learnt by then.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from ucir.config.base import PARAMS_FILE, Count, Positive
from ucir.errors import UserError
from ucir.losses.instance import target_distance
from ucir.losses.prototype import bank_discrimination
from ucir.memory import Bank, Features, features_of
from ucir.methods.base import (
    ClusteredParams,
    ClusteringMethod,
    Epoch,
    NeverWarm,
    SingleEncoder,
    SingleEncoderParams,
    Term,
    Weight,
    cluster_figures,
    several,
)
from ucir.methods.step import DomainBatch
from ucir.prototypes.clustering import Clusters, raw_centroids
from ucir.prototypes.neighbours import diffused, reciprocal_graph
from ucir.prototypes.transport import prototype_plan, relaxed_plan


class ConsensusParams(ClusteredParams, SingleEncoderParams):
    """``methods.consensus.<dataset>``."""

    epochs: Count = 20
    lr: Positive = 0.05
    """A head on a frozen network takes some twenty times as much."""
    neighbours: Count | None = None
    """Nearest pictures of the graph; half the square root of the domain's pictures unless given."""
    diffusion: Annotated[int, Field(ge=0)] = 4
    """t: how often the mean over the neighbourhood is taken; 0 leaves out the graph."""
    clusters: Annotated[tuple[int, ...] | Literal["elbow", "silhouette"], BeforeValidator(several)] = "elbow"
    """Of each domain, which are brought together."""
    regularisation: Positive = 0.1
    """eps of the transport between clusters, whose cost is 1 - cosine."""
    relaxation: Positive | None = 0.1
    """rho of KL(marginal || sizes) of both domains; null: the marginals hold."""
    alignment: bool = True
    """Whether the domains are brought together."""
    renew: Epoch = 10
    """Epochs after which the targets, and K, are made anew of the features as they are then; 0: never."""
    instance_weight: Weight = 3.0
    """w, of the instance discrimination."""
    temperature: Positive = 1.5
    """T of the instance discrimination."""
    kmeans_warm: NeverWarm = 0

    @model_validator(mode="after")
    def _one_k(self) -> Self:
        self.check_one_k("targets move with one cluster")
        return self


class Consensus(SingleEncoder[ConsensusParams], ClusteringMethod[ConsensusParams]):
    """Pictures go to their neighbourhood, and clusters to where the other domain has their like."""

    params_type = ConsensusParams
    lasting = (*ClusteringMethod.lasting, "target_banks")
    target_banks: tuple[Bank, Bank]

    def __init__(self, params: ConsensusParams, seed: int) -> None:
        super().__init__(params, seed)
        self.figures: dict[str, float] = {}
        """Of the clusters, until the epoch after them has logged them."""

    def start(self, features: tuple[Features, Features]) -> None:
        super().start(features)
        self._renew(features)

    def _renew(self, features: tuple[Features, Features]) -> None:
        first, second = self.targets(features)
        self.target_banks = (Bank(first), Bank(second))

    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        every = self.params.renew
        if every and epoch and epoch % every == 0:
            self._renew(features)
        figures, self.figures = self.figures, {}
        for side, x, bank in zip("ab", map(features_of, features), self.target_banks, strict=True):
            away = x.total((1 - (x.own_ND * bank.own_ND).sum(dim=1)).sum()) / len(x)
            figures[f"targets/distance_{side}"] = float(away)
        return figures

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p, terms = self.params, {}
        for side, bank, targets, part in zip("ab", self.banks, self.target_banks, batch, strict=True):
            terms[f"target_{side}"] = Term(1.0, target_distance(part.q_BD, targets.rows(part.slot_B)))
            if p.instance_weight > 0:
                instance = bank_discrimination(part.q_BD, part.slot_B, bank, p.temperature)
                terms[f"instance_{side}"] = Term(p.instance_weight, instance)
        return terms

    @torch.no_grad()
    def targets(self, features: tuple[Features, Features]) -> tuple[Tensor, Tensor]:
        """Unit targets of both domains' pictures, (N, D), alike on every worker."""
        p = self.params
        first, second = (self._agreed(features_of(x).features_ND) for x in features)
        if not p.alignment:
            return first, second
        both = Features(first), Features(second)
        self.chosen = []  # K is of the features as they are now
        clusterings = self.cluster(0, both)
        self.figures = cluster_figures(clusterings)
        return self._aligned(both, (clusterings[0][0], clusterings[1][0]))

    def _agreed(self, x_ND: Tensor) -> Tensor:
        p = self.params
        if p.neighbours and p.neighbours >= len(x_ND):
            raise UserError(
                f"{PARAMS_FILE}: methods.consensus: neighbours = {p.neighbours} of a domain's {len(x_ND)} "
                "pictures: set fewer, or leave it out for half the square root of the pictures"
            )
        if p.diffusion:
            neighbours = p.neighbours or max(2, round(math.sqrt(len(x_ND)) / 2))
            x_ND = diffused(x_ND, reciprocal_graph(x_ND, neighbours), p.diffusion)
        return F.normalize(x_ND - x_ND.mean(dim=0), dim=1)

    def _aligned(
        self, both: tuple[Features, Features], clusters: tuple[Clusters, Clusters]
    ) -> tuple[Tensor, Tensor]:
        p, (first, second), (one, other) = self.params, both, clusters
        mean_KD, mean_LD = raw_centroids(first, one), raw_centroids(second, other)
        unit_KD, unit_LD = F.normalize(mean_KD, dim=1), F.normalize(mean_LD, dim=1)
        if p.relaxation is None:
            # its cost is twice 1 - cosine
            plan_KL = prototype_plan(unit_KD, unit_LD, one.size_K, other.size_K, 2 * p.regularisation)
        else:
            plan_KL = relaxed_plan(
                unit_KD @ unit_LD.T,
                other.size_K / other.size_K.sum(),
                p.regularisation,
                "unbalanced",
                p.relaxation,
                mass_N=one.size_K,
            )
        return (
            _moved(first, one, mean_KD, plan_KL, mean_LD),
            _moved(second, other, mean_LD, plan_KL.T, mean_KD),
        )


def _moved(
    features: Features, clusters: Clusters, mean_KD: Tensor, plan_KL: Tensor, other_LD: Tensor
) -> Tensor:
    """Features with their clusters' means half of the way to where the plan sends them, of unit length."""
    mass_K1 = plan_KL.sum(dim=1, keepdim=True)
    sent_KD = torch.where(mass_K1 > 0, plan_KL @ other_LD / mass_K1, mean_KD)
    return F.normalize(features.own_ND + ((sent_KD - mean_KD) / 2)[clusters.label_N], dim=1)
