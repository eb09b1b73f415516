"""UCDIR: Hu & Lee, Feature Representation Learning for Unsupervised Cross-domain Image Retrieval, ECCV 2022.

Instance-wise and cluster-wise contrast within each domain, then self-entropy and distance of distance
across them. Defaults are the official Office-Home run (``scripts/*.sh``); where paper and code differ,
the code, which made the published tables.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Self, TypeVar

import torch
from pydantic import model_validator
from torch import Tensor

from ucir.config.base import Positive, Share
from ucir.losses.assignment import distance_of_distance, self_entropy
from ucir.losses.cluster import cluster_contrast, confident, mean_of_kept
from ucir.losses.instance import instance_contrast
from ucir.memory import Features
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
from ucir.prototypes.clustering import Clusters


class UcdirFamilyParams(KeyedParams, ClusteredParams):
    """What UCDIR and its variant share: weights and phases."""

    temperature: Positive = 0.2
    """T of both contrastive terms."""
    cluster_weight: Weight = 0.5
    """alpha, reached at ``ramp_end``."""
    ramp_start: Epoch
    """T1: the last epoch without cluster-wise contrast; K-means begins with it. A tenth of the epochs."""
    ramp_end: Epoch
    """T2: the first epoch with full weight (eq. 4). Half of the epochs."""
    entropy_weight: Weight = 1.0
    """gamma."""
    entropy_temperature: Positive = 0.01
    """phi."""
    distance_weight: Weight = 0.5
    """beta."""
    cross_domain_start: Epoch
    """First epoch with self-entropy and distance of distance. Half of the epochs."""

    @model_validator(mode="before")
    @classmethod
    def _schedule_fits_the_epochs(cls, given: Any) -> Any:
        """The published 20, 100 and 100 of 200 epochs, in proportion, where nothing else is given."""
        epochs = given.get("epochs", cls.model_fields["epochs"].default) if isinstance(given, dict) else None
        if not isinstance(epochs, int):
            return given
        start = given.get("ramp_start", epochs // 10)
        if not isinstance(start, int):
            return given
        schedule = {
            "ramp_start": start,
            "ramp_end": max(start + 1, epochs // 2),
            "cross_domain_start": max(start, epochs // 2),
        }
        return {**schedule, **given}

    @model_validator(mode="after")
    def _phases_follow_each_other(self) -> Self:
        if self.ramp_end <= self.ramp_start:
            raise ValueError(f"ramp_end {self.ramp_end} must come after ramp_start {self.ramp_start}")
        if self.cross_domain_start < self.ramp_start:
            raise ValueError(
                f"cross_domain_start {self.cross_domain_start} must not come before ramp_start "
                f"{self.ramp_start}: the cross-domain terms need the clusters that begin there"
            )
        for name in ("ramp_end", "cross_domain_start"):
            if getattr(self, name) > self.epochs:
                raise ValueError(
                    f"{name} {getattr(self, name)} lies beyond the last of {self.epochs} epochs; "
                    "leave it out and it follows them (to drop a term, set its weight to 0)"
                )
        return self


U = TypeVar("U", bound=UcdirFamilyParams)


class UcdirFamily(ClusteringMethod[U]):
    """L = mean over domains of (IW + w_cw CW) + [cross-domain phase] (gamma SE + beta DD)."""

    within_epoch: ClassVar[tuple[str, ...]] = ("clusters",)

    def __init__(self, params: U, seed: int) -> None:
        super().__init__(params, seed)
        self.clusters: tuple[list[Clusters], list[Clusters]] | None = None

    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        p = self.params
        if epoch < p.ramp_start or not (p.cluster_weight or p.entropy_weight or p.distance_weight):
            return {}
        self.clusters = self.cluster(epoch, features)
        return cluster_figures(self.clusters)

    def cluster_weight_at(self, epoch: int) -> float:
        """w_cw of eq. 4: 0 up to T1, linear to alpha at T2."""
        p = self.params
        share = (epoch - p.ramp_start) / (p.ramp_end - p.ramp_start)
        return p.cluster_weight * min(1.0, max(0.0, share))

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p = self.params
        terms, weight = {}, self.cluster_weight_at(epoch)
        for number, (side, bank, part) in enumerate(zip("ab", self.banks, batch, strict=True)):
            self._write(number, part)  # before the losses, as in builder.py
            others_B = bank.log_total(part.q_BD, p.temperature, without_B=part.slot_B)
            value = instance_contrast(part.q_BD, part.k_BD, others_B, p.temperature)
            terms[f"instance_{side}"] = Term(0.5, value)
            if weight > 0:
                values = self._cluster_contrasts(number, part, others_B)
                terms[f"cluster_{side}"] = Term(0.5 * weight, torch.stack(values).mean())
        if epoch >= p.cross_domain_start and (p.entropy_weight or p.distance_weight):
            terms |= self._cross_domain(batch)
        return terms

    def _write(self, number: int, part: DomainBatch) -> None:
        """Keys into a domain's bank."""
        self.banks[number].write(part.slot_B, part.k_BD)

    @abstractmethod
    def _cluster_contrasts(self, number: int, part: DomainBatch, others_B: Tensor) -> list[Tensor]:
        """CW of a domain, of each K. ``others_B`` is the log of the sum over the bank's other rows."""

    @abstractmethod
    def _cross_domain(self, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        """SE and DD."""


class UcdirParams(UcdirFamilyParams):
    """``methods.ucdir.<dataset>``."""

    confidence: Share = 0.2
    """Images whose key's probability of its cluster is no higher take no part in cluster-wise contrast."""
    distance_temperature: Positive = 0.01


class Ucdir(UcdirFamily[UcdirParams]):
    """UCDIR as published."""

    params_type = UcdirParams
    within_epoch = ("clusters", "sums")

    def __init__(self, params: UcdirParams, seed: int) -> None:
        super().__init__(params, seed)
        self.sums: tuple[list[Tensor], ...] = ([], [])
        """Of each domain and clustering the sums of the bank's rows in each cluster, (K, D); they follow
        what is written."""

    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        figures = super().start_epoch(epoch, features)
        if self.clusters and self.params.cluster_weight:
            self.sums = tuple(
                [bank.sums(c.label_N, len(c.size_K)) for c in clusterings]
                for bank, clusterings in zip(self.banks, self.clusters, strict=True)
            )
        return figures

    def _write(self, number: int, part: DomainBatch) -> None:
        if self.clusters and self.sums[number]:
            change_BD = self.banks[number].change(part.slot_B, part.k_BD)
            for sum_KD, clusters in zip(self.sums[number], self.clusters[number], strict=True):
                sum_KD.index_add_(0, clusters.label_N[part.slot_B], change_BD)
        super()._write(number, part)

    def _cluster_contrasts(self, number: int, part: DomainBatch, others_B: Tensor) -> list[Tensor]:
        p, values = self.params, []
        assert self.clusters is not None
        row_BD = self.banks[number].rows(part.slot_B)
        for clusters, sum_KD in zip(self.clusters[number], self.sums[number], strict=True):
            label_B = clusters.label_N[part.slot_B]
            mean_BD = sum_KD[label_B] / clusters.size_K[label_B, None]
            value_B = cluster_contrast(part.q_BD, row_BD, mean_BD, others_B, p.temperature)
            keep_B = confident(part.k_BD, label_B, clusters.centroid_KD, p.temperature, p.confidence)
            values.append(mean_of_kept(value_B, keep_B))
        return values

    def _cross_domain(self, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p = self.params
        assert self.clusters is not None
        pairs = [(a.centroid_KD, b.centroid_KD) for a, b in zip(*self.clusters, strict=True)]
        terms = {}
        if p.entropy_weight > 0:
            entropy = [
                self_entropy(part.q_BD, centroid, p.entropy_temperature)
                for part in batch
                for pair in pairs
                for centroid in pair
            ]
            terms["self_entropy"] = Term(p.entropy_weight, torch.stack(entropy).mean())
        if p.distance_weight > 0:
            distance = [
                distance_of_distance(part.q_BD, *pair, p.distance_temperature)
                for part in batch
                for pair in pairs
            ]
            terms["distance"] = Term(p.distance_weight, torch.stack(distance).mean())
        return terms
