"""ProtoOT: Li et al., Prototypical OT for Unsupervised Cross-domain Image Retrieval, AAAI 2024.

Contrast of an image's key, nearest neighbour and OT-matched prototype against the other prototypes, in its
own domain and later across domains. The reference is the later official release: the first one looked up
the wrong neighbour, which leaked the file order. Where the release has quirks, the correction is the default
and ``as-released`` the other choice.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from ucir.config.base import Count, Positive
from ucir.losses.transported import against_unmatched
from ucir.memory import Bank, Features
from ucir.methods.base import (
    ClusteredParams,
    ClusteringMethod,
    Epoch,
    KeyedParams,
    Term,
    Weight,
    cluster_figures,
)
from ucir.methods.step import DomainBatch
from ucir.models.encoder import Encoder
from ucir.prototypes.clustering import aligned_order
from ucir.prototypes.transport import plan_rows, potential, relaxed_plan, similarity, transport


class ProtoOtParams(KeyedParams, ClusteredParams):
    """``methods.protoot.<dataset>``; defaults of the official code."""

    lr: Positive = 2.5e-4
    weight_decay: Weight = 5e-4
    temperature: Positive = 0.2
    regularisation: Positive = 0.05
    """eps of the transport."""
    iterations: Count = 3
    assignment: Literal["transport", "kmeans", "unbalanced", "partial"] = "transport"
    """Who is matched with whom: by balanced transport, the nearest prototype, or POT's relaxed plans."""
    relaxation: Positive = 1.0
    """Of ``unbalanced``: weight of the KL terms; of ``partial``: the share of mass that is moved."""
    marginals: Literal["kmeans", "uniform"] = "kmeans"
    """The prototypes' shares: sizes of the K-means clusters, or equal."""
    marginal_order: Literal["aligned", "as-released"] = "aligned"
    """The clusters' sizes in the order of the running prototypes, or as K-means happens to have them."""
    neighbour_weight: Weight = 0.5
    prototype_weight: Weight = 0.1
    push: bool = True
    """Whether unmatched prototypes are negatives."""
    cross_weight: Weight = 0.01
    cross_domain_start: Epoch | None = None
    """First epoch with the cross-domain term; half of the epochs (100 of 200) unless given."""
    cross_marginal: Literal["other", "as-released"] = "other"
    """Shares of the other domain's prototypes: their own, or those of the domain that is transported."""
    cross_negatives: Literal["as-released", "plain"] = "as-released"
    """Similarities to unmatched prototypes across domains, divided by their length over K, or as they are."""
    kmeans_iterations: Annotated[int, Field(ge=1)] = 50
    kmeans_restarts: Annotated[int, Field(ge=1)] = 20

    @model_validator(mode="after")
    def _one_k(self) -> Self:
        self.check_one_k("ProtoOT has one set of prototypes")
        if isinstance(self.clusters, str) and self.cross_marginal == "as-released":
            raise ValueError(
                f"clusters {self.clusters!r} may differ between the domains, so that cross_marginal "
                "'as-released', which gives one domain's shares to the other's prototypes, needs a number"
            )
        if self.cross_domain_start is not None and self.cross_domain_start > self.epochs:
            raise ValueError(
                f"cross_domain_start {self.cross_domain_start} lies beyond the last of {self.epochs} epochs; "
                "to drop the term, set cross_weight to 0"
            )
        if self.assignment == "partial" and self.relaxation > 1:
            raise ValueError(f"relaxation {self.relaxation:g}: partial transport moves a share of at most 1")
        return self


class ProtoOt(ClusteringMethod[ProtoOtParams]):
    """L = sum over domains of (key + 0.5 neighbour + 0.1 prototype) + [later] 0.01 cross."""

    params_type = ProtoOtParams
    lasting = (*ClusteringMethod.lasting, "prototypes")
    within_epoch = ("marginals",)

    def __init__(self, params: ProtoOtParams, seed: int) -> None:
        super().__init__(params, seed)
        self.prototypes: list[Tensor] = []
        self.marginals: list[Tensor] = []

    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        clusters = self.cluster(epoch, self.banks)
        first = [clusterings[0] for clusterings in clusters]
        if not self.prototypes:
            self.prototypes = [c.centroid_KD for c in first]
        self.marginals = [
            self._marginal(c.size_K, prototype, c.centroid_KD)
            for c, prototype in zip(first, self.prototypes, strict=True)
        ]
        figures = cluster_figures(clusters)
        p = self.params
        if p.assignment == "transport":
            for side, bank, prototype, b in zip(
                "ab", self.banks, self.prototypes, self.marginals, strict=True
            ):
                plan = transport(bank.own_ND, prototype, b, p.regularisation, p.iterations, count=bank.count)
                figures[f"transport/error_{side}"] = float(plan.error)
        return figures

    def _marginal(self, size_K: Tensor, prototype_KD: Tensor, centroid_KD: Tensor) -> Tensor:
        if self.params.marginals == "uniform":
            return torch.full_like(size_K, 1 / len(size_K), dtype=torch.float32)
        if self.params.marginal_order == "aligned":
            size_K = size_K[aligned_order(prototype_KD, centroid_KD)]
        return size_K.float() / size_K.sum()

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p = self.params
        for bank, part in zip(self.banks, batch, strict=True):
            bank.write(part.slot_B, part.k_BD)
        terms: dict[str, Term] = {}
        renewed = []
        for number, (side, bank, part) in enumerate(zip("ab", self.banks, batch, strict=True)):
            prototype = self.prototypes[number]
            label_B, renewed_KD = self._match(bank, prototype, self.marginals[number], part.slot_B, True)
            targets = {
                "key": (1.0, part.k_BD),
                "neighbour": (p.neighbour_weight, bank.nearest(part.k_BD, part.slot_B)),
                "prototype": (p.prototype_weight, prototype[label_B]),
            }
            for name, (weight, target_BD) in targets.items():
                if weight > 0:
                    value = against_unmatched(
                        part.q_BD, target_BD, prototype, label_B, p.temperature, push=p.push
                    )
                    terms[f"{name}_{side}"] = Term(weight, value)
            renewed.append(renewed_KD)
        self.prototypes = renewed
        start = p.epochs // 2 if p.cross_domain_start is None else p.cross_domain_start
        if p.cross_weight > 0 and epoch >= start:
            for number, (side, bank, part) in enumerate(zip("ab", self.banks, batch, strict=True)):
                other = self.prototypes[1 - number]
                marginal = self.marginals[1 - number if p.cross_marginal == "other" else number]
                label_B, _ = self._match(bank, other, marginal, part.slot_B, False)
                value = against_unmatched(
                    part.q_BD,
                    other[label_B],
                    other,
                    label_B,
                    p.temperature,
                    push=p.push,
                    normalised=p.cross_negatives == "as-released",
                )
                terms[f"cross_{side}"] = Term(p.cross_weight, value)
        return terms

    def _match(
        self, bank: Bank, prototype_KD: Tensor, marginal_K: Tensor, slot_B: Tensor, renew: bool
    ) -> tuple[Tensor, Tensor]:
        """The matched prototype of each image of the batch, and the prototypes, renewed if that is wanted.

        A renewed prototype is its matched mean of the whole bank, or stays where it is if nothing matches.
        """
        p = self.params
        if p.assignment == "transport":
            given = (bank.own_ND, prototype_KD, marginal_K, p.regularisation, p.iterations)
            mean_KD = prototype_KD
            if renew:
                plan = transport(*given, count=bank.count)
                potential_K, mean_KD = plan.potential_K, plan.mean_KD
            else:
                potential_K = potential(*given, count=bank.count)
            row_BD = bank.rows(slot_B)
            label_B = plan_rows(row_BD, prototype_KD, potential_K, p.regularisation).argmax(dim=1)
        else:
            x_ND = bank.features_ND
            s_NK = similarity(x_ND, prototype_KD)
            if p.assignment == "kmeans":
                weight_NK = F.one_hot(s_NK.argmax(dim=1), len(prototype_KD)).to(x_ND.dtype)
            else:
                weight_NK = relaxed_plan(s_NK, marginal_K, p.regularisation, p.assignment, p.relaxation)
            weight_BK, mean_KD = weight_NK[slot_B], F.normalize(weight_NK.T @ x_ND, dim=1)
            # an image that no mass is moved from belongs to the nearest
            unmoved_B1 = weight_BK.sum(dim=1, keepdim=True) == 0
            label_B = torch.where(unmoved_B1, s_NK[slot_B], weight_BK).argmax(dim=1)
        there_K1 = mean_KD.norm(dim=1, keepdim=True) > 0
        return label_B, torch.where(there_K1 & renew, mean_KD, prototype_KD)

    def optimizer(self, encoder: Encoder) -> torch.optim.Optimizer:
        """Adam with amsgrad; ``momentum`` is its first moment's 0.9."""
        p = self.params
        return torch.optim.Adam(
            encoder.parameter_groups(),
            p.lr,
            betas=(p.momentum, 0.999),
            weight_decay=p.weight_decay,
            amsgrad=True,
        )

    def lr_at(self, epoch: int, steps: int) -> float:
        """Constant, as released."""
        return self.params.lr
