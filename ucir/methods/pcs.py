"""PCS: Yue et al., Prototypical Cross-domain Self-supervised Learning, CVPR 2021, without labels.

A baseline of UCDIR's tables, on UCDIR's batches, views, head and evaluation. Hu & Lee give one sentence on
how they ran it: loss and constants are those of its own paper and official code. As released it takes the two
domains one after the other; here they pass through the network together, as in UCDIR.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ucir.config.base import Count, Positive
from ucir.losses.assignment import self_entropy
from ucir.losses.prototype import prototype_contrast
from ucir.memory import Features
from ucir.methods.base import (
    ClusteredParams,
    ClusteringMethod,
    NeverWarm,
    SingleEncoder,
    SingleEncoderParams,
    Term,
    Weight,
    cluster_figures,
)
from ucir.methods.step import DomainBatch
from ucir.models.encoder import Encoder
from ucir.prototypes.clustering import Clusters, concentration


class PcsParams(SingleEncoderParams, ClusteredParams):
    """``methods.pcs.<dataset>``; defaults of the official code."""

    lr: Positive = 0.01
    weight_decay: Weight = 5e-4
    cross_temperature: Positive = 0.1
    least_concentration: Positive = 0.05
    repeats: Count = 15
    """Clusterings with other seeds, of K and of 2 K clusters each."""
    backbone_lr: Positive = 0.1
    """The backbone's share of the learning rate; the head has all of it."""
    prototype_weight: Weight = 1.0
    cross_weight: Weight = 1.0
    kmeans_iterations: Annotated[int, Field(ge=1)] = 40
    kmeans_restarts: Annotated[int, Field(ge=1)] = 1
    kmeans_max_points: Annotated[int, Field(ge=1)] = 10_000
    kmeans_warm: NeverWarm = 0
    """Other clusterings in every epoch are the method."""


class Pcs(SingleEncoder[PcsParams], ClusteringMethod[PcsParams]):
    """PCS: Yue et al., Prototypical Cross-domain Self-supervised Learning, CVPR 2021, without labels.

    In-domain prototypes and cross-domain instance-to-prototype matching, both domains with weight 1 as in
    the release's Office-31 run. The third loss (MIM) and the classifier need labelled images, and so there
    is no first epoch without the others.
    """

    params_type = PcsParams
    within_epoch = ("clusters", "temperatures")

    def __init__(self, params: PcsParams, seed: int) -> None:
        super().__init__(params, seed)
        self.clusters: tuple[list[Clusters], list[Clusters]] = ([], [])
        self.temperatures: list[list[Tensor]] = []

    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        p = self.params
        first, second = (
            [
                self.kmeans(
                    bank,
                    min(times * k, len(bank)),
                    self.seed + 1234 + number * (epoch + 1),
                    spherical=True,
                )
                for number in range(p.repeats)
                for k in clusterings
                for times in (1, 2)
            ]
            for bank, clusterings in zip(self.banks, self.choose(self.banks), strict=True)
        )
        self.clusters = (first, second)
        self.temperatures = [
            [
                concentration(bank, c.label_N, c.centroid_KD).clamp(min=p.least_concentration)
                for c in clusterings
            ]
            for bank, clusterings in zip(self.banks, self.clusters, strict=True)
        ]
        return cluster_figures(self.clusters)

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p = self.params
        terms = {}
        sides = zip("ab", batch, self.clusters, self.clusters[::-1], self.temperatures, strict=True)
        for side, part, clusterings, other_clusterings, phis in sides:
            if p.prototype_weight > 0:
                within = [
                    prototype_contrast(part.q_BD, c.label_N[part.slot_B], c.centroid_KD, phi_K)
                    for c, phi_K in zip(clusterings, phis, strict=True)
                ]
                terms[f"prototype_{side}"] = Term(p.prototype_weight, torch.stack(within).mean())
            if p.cross_weight > 0:
                across = [
                    self_entropy(part.q_BD, c.centroid_KD, p.cross_temperature) for c in other_clusterings
                ]
                terms[f"matching_{side}"] = Term(p.cross_weight, torch.stack(across).mean())
        return terms

    def optimizer(self, encoder: Encoder) -> torch.optim.Optimizer:
        """Nesterov SGD; the backbone at a tenth of the rate, no weight decay on batch normalisation."""
        p = self.params
        head = {id(parameter) for parameter in encoder.head.projection()}
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for group in encoder.parameter_groups():
            for parameter in group["params"]:
                scale = group["lr_scale"] * (1.0 if id(parameter) in head else p.backbone_lr)
                decay = 0.0 if parameter.ndim == 1 and id(parameter) not in head else p.weight_decay
                groups.setdefault((scale, decay), []).append(parameter)
        return torch.optim.SGD(
            [
                {"params": parameters, "lr_scale": scale, "weight_decay": decay}
                for (scale, decay), parameters in groups.items()
            ],
            p.lr,
            momentum=p.momentum,
            nesterov=True,
        )

    def lr_at(self, epoch: int, steps: int) -> float:
        """Inverse decay, lr (1 + 1e-4 t)^-0.75; t counts two for each step, as the release, which takes one
        step for each domain."""
        return float(self.params.lr * (1 + 1e-4 * 2 * steps) ** -0.75)
