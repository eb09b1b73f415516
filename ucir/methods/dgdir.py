"""DGDIR: Hu, Zhang & Lee, Unsupervised Feature Representation Learning for Domain-generalized Cross-domain
Image Retrieval, ICCV 2023. Constants of the official code; UEM compares with it.

Every view is seen twice, as its phase alone and with its amplitude mixed with another picture's. Instances
are contrasted within and across the two, and pulled to centres of joint clusters of the phase features.
The banks of all images stand for the release's queues of 5,120 keys, as for ProtoNCE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ucir.config.base import Positive, Share
from ucir.data.augment import ViewDraw, whole_views
from ucir.data.spectrum import draw_spectrum, mixed_views, phase_views
from ucir.data.views import PictureViews
from ucir.losses.instance import instance_contrast
from ucir.losses.prototype import prototype_contrast
from ucir.memory import Bank, Features, JointFeatures
from ucir.methods.base import ClusteredParams, ClusteringMethod, Epoch, KeyedParams, NeverWarm, Term, Weight
from ucir.methods.step import DomainBatch, Rendered, Step
from ucir.models.encoder import Encoder
from ucir.models.features import extract_features


class DgdirParams(KeyedParams, ClusteredParams):
    """``methods.dgdir.<dataset>``."""

    batch_size: Annotated[int, Field(ge=2)] = 32
    temperature: Positive = 0.2
    retrieve_with: Literal["key", "query"] = "query"
    """The release ranks the query encoder's, before the head: that is ``evaluate.features: pooled``."""
    kmeans_warm: NeverWarm = 0
    cluster_weight: Weight = 0.1
    warmup: Epoch | None = None
    """Epochs without clusters; a tenth (20 of 200) unless given."""
    most_amplitude: Share = 1.0
    most_phase: Share = 0.4
    """Largest shares of a partner's amplitude, and of its phase at low frequencies, in a mixed view."""

    @model_validator(mode="after")
    def _one_k(self) -> Self:
        self.check_one_k("DGDIR clusters both domains together once")
        return self


@dataclass(frozen=True)
class PhaseFeatures:
    """Unit features of all images' phase views, of each domain."""

    head: tuple[Features, Features]
    pooled: tuple[Features, Features]
    """Those before the head."""


@dataclass(frozen=True)
class SpectralBatch(DomainBatch):
    """A domain's part of a step; what DomainBatch has is of mixed views."""

    pooled_BP: Tensor  # unit features before the head, with gradient
    phase_q_BD: Tensor  # the same of the phase views
    phase_k_BD: Tensor
    phase_pooled_BP: Tensor


class SpectralStep(Step):
    """Every view twice: a batch is the phase views of both domains, then their mixed views."""

    views_per_image = 2
    needs_pixels = "dgdir mixes the spectra of pictures"
    method: Dgdir
    views: PictureViews

    def features(self, encoder: Encoder | None = None) -> tuple[Features, ...]:
        """As of :class:`Step`; the method is shown those of the phase views, by the query encoder, too."""
        if encoder is None:
            query = self.networks.query
            both = extract_features(query, self.views, self.device, "both", self._phase)
            (head_a, pooled_a), (head_b, pooled_b) = (
                [Features(part, len(x)) for part in x.own_ND.tensor_split([query.feature_dim], 1)]
                for x in both
            )
            self.method.phase = PhaseFeatures((head_a, head_b), (pooled_a, pooled_b))
        return super().features(encoder)

    def rendered(
        self, domain_B: Tensor, slot_B: Tensor, draw: ViewDraw, rows: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The first half of the rows as phase views, the others mixed with any picture of either domain."""
        images, params = len(slot_B), self.method.params
        x = super().rendered(domain_B, slot_B, draw, rows % images, generator)
        spectrum = draw_spectrum(images, params.most_amplitude, params.most_phase, generator)
        form = self.views.form
        count, other = self.views.counts
        partner = torch.randint(count + other, (images,), generator=generator)
        mixed = rows >= images
        out = x.clone()
        if not mixed.all():
            out[~mixed] = self._phase(x[~mixed])
        if mixed.any():
            place = rows[mixed] - images
            domain = (partner[place] >= count).long()
            stored = self.views.stored(domain, partner[place] - count * domain)
            out[mixed] = mixed_views(x[mixed], whole_views(stored, x.shape[-1], form), spectrum[place], form)
        return out

    def _phase(self, view_B3SS: Tensor) -> Tensor:
        return phase_views(view_B3SS, self.views.form)

    def forward(self, views: Rendered) -> tuple[DomainBatch, DomainBatch]:
        self.follow()
        both, k = self.queries(self.model, views, "both"), self.keys(views)
        q, pooled = both[:, : k.shape[1]], both[:, k.shape[1] :]
        phase, mixed = slice(len(q) // 2), slice(len(q) // 2, None)
        quarter = len(q) // 4
        first, second = (
            SpectralBatch(
                slot.to(self.device),
                q[mixed][rows],
                k[mixed][rows],
                pooled[mixed][rows],
                q[phase][rows],
                k[phase][rows],
                pooled[phase][rows],
            )
            for slot, rows in zip(views.slots, (slice(quarter), slice(quarter, None)), strict=True)
        )
        return first, second


class Dgdir(ClusteringMethod[DgdirParams]):
    """0.5 (phase + mixed + phase to mixed + mixed to phase) + [after the warm-up] 0.1 cluster."""

    params_type = DgdirParams
    step_type = SpectralStep
    lasting = (*ClusteringMethod.lasting, "phase_banks")
    within_epoch = ("centroid_KD", "label_N")
    phase: PhaseFeatures
    """Current ones, which the step renews with the others."""

    def start(self, features: tuple[Features, Features]) -> None:
        super().start(features)
        first, second = self.phase.head
        self.phase_banks = (Bank(first), Bank(second))

    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        p = self.params
        self.centroid_KD: Tensor | None = None
        if epoch < (p.epochs // 10 if p.warmup is None else p.warmup) or p.cluster_weight == 0:
            return {}
        both = JointFeatures(*self.phase.pooled)
        (k,) = self.choose((both, both))[0]
        clusters = self.kmeans(both, k, self.seed)
        self.centroid_KD = clusters.centroid_KD
        count = len(self.phase.pooled[0])
        self.label_N = clusters.label_N[:count], clusters.label_N[count:]
        return {"cluster/count_a": float(k), "cluster/smallest_a": float(clusters.size_K.min())}

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p = self.params
        terms = {}
        for number, (side, part) in enumerate(zip("ab", batch, strict=True)):
            assert isinstance(part, SpectralBatch)
            # the negatives of the query's own kind, also across; the image's own row is none
            for name, q_BD, k_BD, bank in (
                ("phase", part.phase_q_BD, part.phase_k_BD, self.phase_banks[number]),
                ("mixed", part.q_BD, part.k_BD, self.banks[number]),
                ("phase_to_mixed", part.phase_q_BD, part.k_BD, self.phase_banks[number]),
                ("mixed_to_phase", part.q_BD, part.phase_k_BD, self.banks[number]),
            ):
                others_B = bank.log_total(q_BD, p.temperature, without_B=part.slot_B)
                value = instance_contrast(q_BD, k_BD, others_B, p.temperature)
                terms[f"{name}_{side}"] = Term(0.25, value)  # 0.5, of the mean over both domains
            if self.centroid_KD is not None:
                label_B = self.label_N[number][part.slot_B]
                values = [
                    prototype_contrast(q_BP, label_B, self.centroid_KD, 1.0)
                    for q_BP in (part.phase_pooled_BP, part.pooled_BP)
                ]
                terms[f"cluster_{side}"] = Term(0.5 * p.cluster_weight, torch.stack(values).mean())
        return terms

    def after_step(self, batch: tuple[DomainBatch, DomainBatch]) -> None:
        """Keys join the banks after the losses, as they do the release's queues."""
        for bank, phase_bank, part in zip(self.banks, self.phase_banks, batch, strict=True):
            assert isinstance(part, SpectralBatch)
            bank.write(part.slot_B, part.k_BD)
            phase_bank.write(part.slot_B, part.phase_k_BD)
