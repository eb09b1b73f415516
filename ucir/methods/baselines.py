"""The baselines of UCDIR's tables, on UCDIR's batches, views, head and evaluation.

Hu & Lee give one sentence on how they ran them. Losses and their constants are those of each method's own
paper and official code. The two domains of a batch pass through the network together, as in UCDIR; CDS and
PCS as released take them one after the other.
"""

from __future__ import annotations

from typing import Annotated, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ucir.clustering import Clusters, concentration, kmeans, raw_centroids
from ucir.config import Count, Positive, Share
from ucir.losses.assignment import self_entropy
from ucir.losses.instance import instance_contrast
from ucir.losses.prototype import bank_discrimination, neighbour_entropy, prototype_contrast
from ucir.memory import Features
from ucir.methods.base import (
    BankMethod,
    ClusteredParams,
    ClusteringMethod,
    DomainBatch,
    Epoch,
    KeyedParams,
    MethodParams,
    Term,
    Weight,
    cluster_figures,
)
from ucir.models.encoder import Encoder


class SingleEncoderParams(MethodParams):
    """Methods without a key encoder."""

    bank_momentum: Share = 0.5
    """v <- m v + (1 - m) f, normalised."""


S = TypeVar("S", bound=SingleEncoderParams)


class SingleEncoder(BankMethod[S]):
    """One encoder and no keys: the bank takes up the features themselves, once gradients are through."""

    def after_step(self, batch: tuple[DomainBatch, DomainBatch]) -> None:
        for bank, part in zip(self.banks, batch, strict=True):
            bank.blend(part.slot_B, part.k_BD, self.params.bank_momentum)


class IdParams(SingleEncoderParams):
    """``methods.id.<dataset>``; defaults of the official code (lemniscate)."""

    lr: Positive = 0.03
    temperature: Positive = 0.07


class Id(SingleEncoder[IdParams]):
    """ID: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018.

    The full softmax stands for NCE's 4,096 sampled negatives: the banks are not much larger.
    """

    params_type = IdParams

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        return {
            f"instance_{side}": Term(
                0.5,
                bank_discrimination(part.q_BD, part.slot_B, bank, self.params.temperature),
            )
            for side, bank, part in zip("ab", self.banks, batch, strict=True)
        }

    def lr_at(self, epoch: int, steps: int) -> float:
        """A tenth after 60 % and again after 80 % of the epochs: 120 and 160 of 200."""
        p = self.params
        return p.lr * 0.1 ** ((epoch >= 0.6 * p.epochs) + (epoch >= 0.8 * p.epochs))


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
        self.clusters = self.cluster(features)
        self.temperatures = [
            [self._temperatures(concentration(x, c.label_N, raw_centroids(x, c))) for c in own]
            for x, own in zip(features, self.clusters, strict=True)
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
        terms = {}
        for side, bank, part in zip("ab", self.banks, batch, strict=True):
            bank.write(part.slot_B, part.k_BD)
            value = instance_contrast(part.q_BD, part.k_BD, part.slot_B, bank, self.params.temperature)
            terms[f"instance_{side}"] = Term(0.5, value)
        if self.clusters is not None:
            for side, part, own, phis in zip("ab", batch, self.clusters, self.temperatures, strict=True):
                values = [
                    prototype_contrast(part.q_BD, c.label_N[part.slot_B], c.centroid_KD, phi_K)
                    for c, phi_K in zip(own, phis, strict=True)
                ]
                terms[f"prototype_{side}"] = Term(0.5, torch.stack(values).mean())
        return terms


class CdsParams(SingleEncoderParams):
    """``methods.cds.<dataset>``; defaults of the official code."""

    epochs: Count = 7
    """Few as released: the matching term has no floor, and in a long run it wins over the instance term."""
    lr: Positive = 0.003
    weight_decay: Weight = 5e-4
    temperature: Positive = 0.1
    matching_weight: Weight = 1.0
    nearest: Count = 700
    """Rows of the other domain's bank that an image is matched with."""


class Cds(SingleEncoder[CdsParams]):
    """CDS: Kim et al., Cross-Domain Self-Supervised Pre-Training, ICCV 2021."""

    params_type = CdsParams

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p = self.params
        terms = {}
        for side, bank, other, part in zip("ab", self.banks, self.banks[::-1], batch, strict=True):
            own = bank_discrimination(part.q_BD, part.slot_B, bank, p.temperature)
            terms[f"instance_{side}"] = Term(0.5, own)
            if p.matching_weight > 0:
                across = neighbour_entropy(part.q_BD, other, p.temperature, p.nearest)
                terms[f"matching_{side}"] = Term(p.matching_weight, across)  # summed, not halved, as released
        return terms

    def lr_at(self, epoch: int, steps: int) -> float:
        """Constant."""
        return self.params.lr


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
                kmeans(
                    bank,
                    min(times * k, len(bank)),
                    iterations=p.kmeans_iterations,
                    restarts=p.kmeans_restarts,
                    seed=self.seed + 1234 + number * (epoch + 1),
                    max_points=p.kmeans_max_points,
                    spherical=True,
                )
                for number in range(p.repeats)
                for k in own
                for times in (1, 2)
            ]
            for bank, own in zip(self.banks, self.choose(self.banks), strict=True)
        )
        self.clusters = (first, second)
        self.temperatures = [
            [concentration(bank, c.label_N, c.centroid_KD).clamp(min=p.least_concentration) for c in own]
            for bank, own in zip(self.banks, self.clusters, strict=True)
        ]
        return cluster_figures(self.clusters)

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p = self.params
        terms = {}
        sides = zip("ab", batch, self.clusters, self.clusters[::-1], self.temperatures, strict=True)
        for side, part, own, other, phis in sides:
            within = [
                prototype_contrast(part.q_BD, c.label_N[part.slot_B], c.centroid_KD, phi_K)
                for c, phi_K in zip(own, phis, strict=True)
            ]
            across = [self_entropy(part.q_BD, c.centroid_KD, p.cross_temperature) for c in other]
            terms[f"prototype_{side}"] = Term(p.prototype_weight, torch.stack(within).mean())
            terms[f"matching_{side}"] = Term(p.cross_weight, torch.stack(across).mean())
        return terms

    def optimizer(self, encoder: Encoder) -> torch.optim.Optimizer:
        """Nesterov SGD; the backbone at a tenth of the rate, no weight decay on batch normalisation."""
        p = self.params
        head = {id(parameter) for parameter in encoder.head.parameters()}
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for parameter in encoder.parameters():
            scale = 1.0 if id(parameter) in head else p.backbone_lr
            decay = 0.0 if parameter.ndim == 1 and id(parameter) not in head else p.weight_decay
            groups.setdefault((scale, decay), []).append(parameter)
        return torch.optim.SGD(
            [
                {"params": own, "lr_scale": scale, "weight_decay": decay}
                for (scale, decay), own in groups.items()
            ],
            p.lr,
            momentum=p.momentum,
            nesterov=True,
        )

    def lr_at(self, epoch: int, steps: int) -> float:
        """Inverse decay, lr (1 + 1e-4 t)^-0.75; t counts two for each step, as the release, which takes one
        step for each domain."""
        return float(self.params.lr * (1 + 1e-4 * 2 * steps) ** -0.75)
