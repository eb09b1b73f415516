"""ProtoNCE: Li et al., Prototypical Contrastive Learning of Unsupervised Representations, ICLR 2021.

A baseline of UCDIR's tables, on UCDIR's batches, views, head and evaluation. Hu & Lee give one sentence on
how they ran it: loss and constants are those of its own paper and official code.
"""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ucir.config.base import Positive
from ucir.losses.instance import instance_contrast
from ucir.losses.prototype import prototype_contrast
from ucir.memory import Features
from ucir.methods.base import ClusteredParams, ClusteringMethod, Epoch, KeyedParams, Term, cluster_figures
from ucir.methods.step import DomainBatch
from ucir.prototypes.clustering import Clusters, concentration, raw_centroids


class ProtoNceParams(KeyedParams, ClusteredParams):
    """``methods.protonce.<dataset>``; defaults of the official code (PCL)."""

    lr: Positive = 0.03
    temperature: Positive = 0.2
    warmup: Epoch | None = None
    """Epochs of instance contrast alone; a tenth (20 of 200) unless given."""
    kmeans_max_points: Annotated[int, Field(ge=1)] = 1000

    @model_validator(mode="after")
    def _prototypes_act(self) -> Self:
        if self.warmup is not None and self.warmup >= self.epochs:
            raise ValueError(f"warmup {self.warmup} leaves none of {self.epochs} epochs to the prototypes")
        return self


class ProtoNce(ClusteringMethod[ProtoNceParams]):
    """ProtoNCE: Li et al., Prototypical Contrastive Learning of Unsupervised Representations, ICLR 2021.

    The bank of all images stands for the queue of 16,384 keys, as in UCDIR.
    """

    params_type = ProtoNceParams
    within_epoch = ("clusters", "temperatures")

    def __init__(self, params: ProtoNceParams, seed: int) -> None:
        super().__init__(params, seed)
        self.clusters: tuple[list[Clusters], list[Clusters]] | None = None
        self.temperatures: list[list[Tensor]] = []

    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        p = self.params
        if epoch < (p.epochs // 10 if p.warmup is None else p.warmup):
            return {}
        self.clusters = self.cluster(epoch, features)
        self.temperatures = [
            [self._temperatures(concentration(x, c.label_N, raw_centroids(x, c))) for c in clusterings]
            for x, clusterings in zip(features, self.clusters, strict=True)
        ]
        return cluster_figures(self.clusters)

    def _temperatures(self, phi_K: Tensor) -> Tensor:
        """PCL's rule: clusters of one take the largest, all are clipped to their 10th and 90th percentile
        and scaled to a mean of T."""
        phi_K = torch.where(phi_K > 0, phi_K, phi_K.max().clamp(min=1e-6))
        low, high = torch.quantile(phi_K, torch.tensor([0.1, 0.9], device=phi_K.device))
        clipped_K = phi_K.clamp(float(low), float(high))
        return self.params.temperature * clipped_K / clipped_K.mean()

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        t, terms = self.params.temperature, {}
        for side, bank, part in zip("ab", self.banks, batch, strict=True):
            bank.write(part.slot_B, part.k_BD)
            others_B = bank.log_total(part.q_BD, t, without_B=part.slot_B)
            value = instance_contrast(part.q_BD, part.k_BD, others_B, t)
            terms[f"instance_{side}"] = Term(0.5, value)
        if self.clusters is not None:
            for side, part, clusterings, phis in zip(
                "ab", batch, self.clusters, self.temperatures, strict=True
            ):
                values = [
                    prototype_contrast(part.q_BD, c.label_N[part.slot_B], c.centroid_KD, phi_K)
                    for c, phi_K in zip(clusterings, phis, strict=True)
                ]
                terms[f"prototype_{side}"] = Term(0.5, torch.stack(values).mean())
        return terms
