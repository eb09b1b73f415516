"""UEM: Wang, Du & Zhu, Semantic Feature Learning for Universal Unsupervised Cross-Domain Retrieval,
NeurIPS 2024.

Two phases: in-domain semantic-enhanced learning, then cross-domain semantic-matched learning with a frozen
copy of the first phase's network. There is no public code. What the paper leaves open, and our choice:

- features: the head's unit output; the bank's rows are normalised after each blend. Where distances count
  (eqs. 8, 9, 14 to 16) they may be what the head puts out before, with a bank of their own: ``distances``
- sums over a batch (eqs. 6, 7, 13, 17) beside means (eqs. 11, 14): ``reduction``, means throughout
- eq. 6's denominator, printed over the batch, in the text over all instances: ``instance_negatives``
- K-means: of the bank, before each epoch; K by the elbow once, at the start, or again: ``clusters_every``
- prototypes: cluster means where distances count (eqs. 8, 9, 15, 16), of unit length in the contrasts
  (eqs. 7, 11, 17), as all methods of the field have them
- the bank goes on being blended in the second phase; nearest instances are looked up in it
- learning rate: half a cosine in each phase, or one over both: ``schedule``
- beta is said for 150 epochs; with fewer each row moves less far: ``bank_momentum: by-epochs``
- adversary: gradient reversal; two layers of ``adversary_width``, at ``adversary_lr`` times the rate (DANN)
- the frozen network runs in evaluation mode, so that nothing in it changes
- without merging, every prototype of both domains stands by itself; without SN2M the nearest instance by
  cosine is the only counterpart (the paper's "search leveraged by UCDIR" does not exist)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from ucir.config.base import Count, Positive, Share
from ucir.losses.prototype import bank_discrimination, prototype_contrast
from ucir.losses.universal import (
    batch_contrast,
    domain_confusion,
    product_dissimilarity,
    reverse_gradient,
    semantic_pull,
    structure_change,
    switchable_match,
)
from ucir.memory import Bank, Features
from ucir.methods.base import (
    ClusteredParams,
    ClusteringMethod,
    Epoch,
    SingleEncoder,
    SingleEncoderParams,
    Term,
    Weight,
    cluster_figures,
    several,
)
from ucir.methods.step import DomainBatch, Rendered, Step
from ucir.models.encoder import Encoder
from ucir.models.features import extract_features
from ucir.prototypes.clustering import Clusters
from ucir.prototypes.merging import MergingLimit, Structure, centres, unify_domains


class UemParams(SingleEncoderParams, ClusteredParams):
    """``methods.uem.<dataset>``; the paper's run on Office-31 and Office-Home."""

    epochs: Count = 150
    """Of both phases together."""
    matching_epochs: Annotated[int, Field(ge=0)]
    """Of the second phase. A third of the epochs (50 of 150), at least one, unless given."""
    clusters: Annotated[tuple[int, ...] | Literal["elbow", "silhouette"], BeforeValidator(several)] = "elbow"
    """K, unknown to UEM: chosen for each domain by itself; or one number."""
    clusters_every: Epoch = 0
    """Epochs after which K is chosen anew, as the paper says that the elbow gets more accurate; 0: once."""
    schedule: Literal["phases", "whole"] = "phases"
    """Half a cosine of the learning rate in each phase, or one over both."""
    temperature: Positive = 0.07
    bank_momentum: Share = 0.99
    """beta of the bank."""
    instance_negatives: Literal["batch", "bank"] = "batch"
    reduction: Literal["mean", "sum"] = "mean"
    distances: Literal["unit", "raw"] = "unit"
    """Of which features eqs. 8, 9 and 14 to 16 are: the head's at unit length, as contrasts and the gate are
    in any case, or before that: a cosine beside a distance says little more of features of one length."""
    merging: bool = True
    merging_limit: MergingLimit = "domain"
    """What a pair that merges must be nearer than: any two prototypes of one domain (eq. 9), or each of the
    two to others of its own domain. Of the gate, too."""
    semantic_weight: Weight = 1.0
    """Of the semantic-enhanced loss."""
    structure_weight: Weight = 1.0
    """Of the semantic-preserving regulariser; 0 leaves plain DANN."""
    adversary_weight: Weight = 1.0
    """Strength of the reversed gradient."""
    adversary_width: Count = 256
    adversary_lr: Positive = 10.0
    matching: Literal["switchable", "nearest"] = "switchable"

    @model_validator(mode="before")
    @classmethod
    def _a_third(cls, given: Any) -> Any:
        epochs = given.get("epochs", cls.model_fields["epochs"].default) if isinstance(given, dict) else None
        return {"matching_epochs": max(1, epochs // 3), **given} if isinstance(epochs, int) else given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.matching_epochs >= self.epochs:
            raise ValueError(
                f"epochs {self.epochs}: the second phase takes {self.matching_epochs} of them "
                "(matching_epochs), which leaves none to the first: at least one more"
            )
        if self.clusters_every and not isinstance(self.clusters, str):
            raise ValueError("clusters_every: K is given, so that nothing is chosen; leave it out")
        self.check_one_k("UEM merges one set of prototypes with another")
        return self


@dataclass(frozen=True)
class FrozenBatch(DomainBatch):
    """A domain's part of a step, with the frozen encoder's features of the same views."""

    raw_BD: Tensor
    """What distances are of, with gradient: ``q_BD``, or it before it is brought to unit length."""
    frozen_BD: Tensor | None
    """None in the first phase."""
    raw_frozen_BD: Tensor | None


class FrozenStep(Step):
    """The standard step, and from the second phase on a frozen copy of the first phase's network."""

    method: Uem

    def begin_epoch(self, epoch: int) -> None:
        if self.method.params.distances == "raw" and not self.method.raw_banks:
            read = extract_features(self.networks.query, self.views, self.device, "raw")
            first, second = (Bank(Features(self._unit_and_raw(x.own_ND)[1], x.count)) for x in read)
            self.method.raw_banks = first, second
        if epoch >= self.method.border and self.networks.frozen is None:
            self.networks.freeze()

    def forward(self, views: Rendered) -> tuple[DomainBatch, DomainBatch]:
        wanted: Literal[False, "raw"] = "raw" if self.method.params.distances == "raw" else False
        read = self.queries(self.model, views, wanted).tensor_split(2)
        frozen: Sequence[tuple[Tensor | None, Tensor | None]] = [(None, None)] * 2
        if self.networks.frozen:
            with torch.no_grad():
                halves = self.queries(self.networks.frozen, views, wanted).tensor_split(2)
            frozen = [self._unit_and_raw(x) for x in halves]
        first, second = (
            FrozenBatch(slot.to(self.device), q, q.detach(), raw, *of_frozen)
            for slot, (q, raw), of_frozen in zip(
                views.slots, map(self._unit_and_raw, read), frozen, strict=True
            )
        )
        return first, second

    def _unit_and_raw(self, read_BX: Tensor) -> tuple[Tensor, Tensor]:
        """A domain's unit features, and what distances are of."""
        if self.method.params.distances == "unit":
            return read_BX, read_BX
        q_BD, raw_BD = read_BX.tensor_split(2, dim=1)
        return q_BD, raw_BD


class Uem(SingleEncoder[UemParams], ClusteringMethod[UemParams]):
    """First INCE + alpha (PNCE + SEL), then adversary + SPR + SN2M, all for both domains."""

    params_type = UemParams
    step_type = FrozenStep
    discriminator: nn.Sequential
    lasting = (*ClusteringMethod.lasting, "raw_banks")
    within_epoch = ("centres", "labels", "structures")

    def __init__(self, params: UemParams, seed: int) -> None:
        super().__init__(params, seed)
        self.border = params.epochs - params.matching_epochs
        self.centres: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.structures: tuple[Structure, Structure] | None = None
        self.raw_banks: tuple[Bank, Bank] | None = None
        """Of features before they are brought to unit length, where distances are of these."""

    @property
    def distance_banks(self) -> tuple[Bank, Bank]:
        """What distances are of."""
        return self.raw_banks or self.banks

    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        if self.params.clusters_every and epoch % self.params.clusters_every == 0:
            self.chosen, self.labels_before = [], []
        clusterings = self.cluster(epoch, self.banks)
        one: tuple[Clusters, Clusters] = (clusterings[0][0], clusterings[1][0])
        both = [centres(x, c) for x, c in zip(self.distance_banks, one, strict=True)]
        self.centres = [centre_KD for centre_KD, _ in both]
        self.labels = [label_N for _, label_N in both]
        merging, limit = self.params.merging, self.params.merging_limit
        self.structures = unify_domains(self.distance_banks, one, merging, limit)
        figures = cluster_figures(clusterings)
        figures["prototypes/merged"] = float(self.structures[0].merged_K.sum())
        if epoch < self.border:
            figures["train/alpha"] = self.alpha(epoch)
        return figures

    def alpha(self, epoch: int) -> float:
        """1 / (1 + exp(E / 2 - e)) with E the first phase's epochs: eq. 10."""
        away = self.border / 2 - epoch
        return 1 / (1 + math.exp(away)) if away < 700 else 0.0

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        if epoch < self.border:
            return self._semantic(epoch, batch)
        return self._matched(batch)

    def _semantic(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p = self.params
        assert self.structures is not None
        alpha, terms = self.alpha(epoch), {}
        for number, (side, bank, part) in enumerate(zip("ab", self.banks, batch, strict=True)):
            q_BD, prototype_CD = part.q_BD, F.normalize(self.structures[number].prototype_CD, dim=1)
            count = len(q_BD) if p.reduction == "sum" else 1
            if p.instance_negatives == "batch":
                instance = batch_contrast(q_BD, bank.rows(part.slot_B), p.temperature)
            else:
                instance = bank_discrimination(q_BD, part.slot_B, bank, p.temperature)
            terms[f"instance_{side}"] = Term(count, instance)
            label_B = self.labels[number][part.slot_B]
            contrast = prototype_contrast(q_BD, label_B, prototype_CD, p.temperature)
            terms[f"prototype_{side}"] = Term(count * alpha, contrast)
            if p.semantic_weight > 0:
                pull = semantic_pull(q_BD, prototype_CD, p.temperature)
                terms[f"semantic_{side}"] = Term(alpha * p.semantic_weight, pull)
        return terms

    def _matched(self, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p = self.params
        count = len(batch[0].q_BD) if p.reduction == "sum" else 1
        terms = {}
        if p.adversary_weight > 0:
            reversed_q = [reverse_gradient(part.q_BD, p.adversary_weight) for part in batch]
            first, second = (self.discriminator(q_BD)[:, 0] for q_BD in reversed_q)
            both = 2 * count if p.reduction == "sum" else 1
            terms["adversary"] = Term(both, domain_confusion(first, second))
        for number, (side, part) in enumerate(zip("ab", batch, strict=True)):
            if p.structure_weight > 0:
                assert isinstance(part, FrozenBatch)
                assert part.frozen_BD is not None
                assert part.raw_frozen_BD is not None
                kept = structure_change(part.q_BD, part.frozen_BD, part.raw_BD, part.raw_frozen_BD)
                terms[f"structure_{side}"] = Term(p.structure_weight, kept)
            terms[f"matching_{side}"] = Term(count, self._match(part, number))
        return terms

    def _match(self, part: DomainBatch, side: int) -> Tensor:
        """Eqs. 15 to 17 for a domain's batch."""
        p, q_BD = self.params, part.q_BD
        assert self.structures is not None
        assert isinstance(part, FrozenBatch)
        other, other_bank = self.structures[1 - side], self.banks[1 - side]
        raw_bank = self.distance_banks[1 - side]
        if p.matching == "nearest":
            near_B = other_bank.closest(q_BD.detach(), lambda x, row_ND: -(x @ row_ND.T))
            return bank_discrimination(q_BD, near_B, other_bank, p.temperature)
        fixed_BD = part.raw_BD.detach()
        target_B = other.other_L[product_dissimilarity(fixed_BD, self.centres[side]).argmin(dim=1)]
        near_B = raw_bank.closest(fixed_BD, product_dissimilarity)
        near_prototype_B = product_dissimilarity(raw_bank.rows(near_B), other.prototype_CD).argmin(dim=1)
        return switchable_match(
            q_BD,
            target_B,
            other_bank.rows(near_B),
            near_prototype_B == target_B,
            F.normalize(other.prototype_CD, dim=1),
            other_bank,
            p.temperature,
        )

    def after_step(self, batch: tuple[DomainBatch, DomainBatch]) -> None:
        super().after_step(batch)
        if self.raw_banks:
            for bank, part in zip(self.raw_banks, batch, strict=True):
                assert isinstance(part, FrozenBatch)
                row_BD = torch.lerp(part.raw_BD.detach(), bank.rows(part.slot_B), self.params.bank_momentum)
                bank.write(part.slot_B, row_BD)

    def build(self, encoder: Encoder) -> nn.ModuleDict:
        """The domain classifier."""
        p = self.params
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            width = p.adversary_width
            layers = nn.Linear(encoder.feature_dim, width), nn.ReLU(), nn.Linear(width, 1)
            self.discriminator = nn.Sequential(*layers).to(encoder.device)
        return nn.ModuleDict({"discriminator": self.discriminator})

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.discriminator.parameters()), "lr_scale": self.params.adversary_lr}]

    def lr_at(self, epoch: int, steps: int) -> float:
        """Half a cosine from ``lr`` to 0, in each phase or over both."""
        if self.params.schedule == "whole":
            return super().lr_at(epoch, steps)
        done = epoch / self.border
        if epoch >= self.border:
            done = (epoch - self.border) / self.params.matching_epochs
        return self.params.lr * 0.5 * (1 + math.cos(math.pi * done))
