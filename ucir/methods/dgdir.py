"""DGDIR: Hu, Zhang & Lee, Unsupervised Feature Representation Learning for Domain-generalized Cross-domain
Image Retrieval, ICCV 2023. Constants of the official code; UEM compares with it.

Every view is seen twice, as its phase alone and with its amplitude mixed with another picture's. Instances
are contrasted within and across the two, and pulled to centres of joint clusters of the phase features.
The banks of all images stand for the release's queues of 5,120 keys, as for ProtoNCE.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ucir.clustering import kmeans
from ucir.config import Positive, Share
from ucir.losses.instance import instance_contrast
from ucir.losses.prototype import prototype_contrast
from ucir.memory import Bank, Features, JointFeatures
from ucir.methods.base import (
    ClusteredParams,
    ClusteringMethod,
    DomainBatch,
    Epoch,
    KeyedParams,
    PhaseFeatures,
    Term,
    Weight,
)


class DgdirParams(KeyedParams, ClusteredParams):
    """``methods.dgdir.<dataset>``."""

    batch_size: Annotated[int, Field(ge=2)] = 32
    temperature: Positive = 0.2
    retrieve_with: Literal["key", "query"] = "query"
    """The release ranks the query encoder's, before the head: that is ``evaluate.features: pooled``."""
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


class Dgdir(ClusteringMethod[DgdirParams]):
    """0.5 (phase + mixed + phase to mixed + mixed to phase) + [after the warm-up] 0.1 cluster."""

    params_type = DgdirParams
    within_epoch = ("centroid_KD", "label_N")
    spectral = True
    phase: PhaseFeatures

    def see_phases(self, phase: PhaseFeatures) -> None:
        self.phase = phase

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
        found = kmeans(
            both,
            k,
            iterations=p.kmeans_iterations,
            restarts=p.kmeans_restarts,
            seed=self.seed,
            max_points=p.kmeans_max_points,
        )
        self.centroid_KD = found.centroid_KD
        count = len(self.phase.pooled[0])
        self.label_N = found.label_N[:count], found.label_N[count:]
        return {"cluster/count_a": float(k), "cluster/smallest_a": float(found.size_K.min())}

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p = self.params
        terms = {}
        for number, (side, part) in enumerate(zip("ab", batch, strict=True)):
            phase = part.phase
            assert phase is not None
            # the negatives of the query's own kind, also across; the image's own row is none
            for name, q_BD, k_BD, bank in (
                ("phase", phase.q_BD, phase.k_BD, self.phase_banks[number]),
                ("mixed", part.q_BD, part.k_BD, self.banks[number]),
                ("phase_to_mixed", phase.q_BD, part.k_BD, self.phase_banks[number]),
                ("mixed_to_phase", part.q_BD, phase.k_BD, self.banks[number]),
            ):
                value = instance_contrast(q_BD, k_BD, part.slot_B, bank, p.temperature)
                terms[f"{name}_{side}"] = Term(0.25, value)  # 0.5, of the mean over both domains
            if self.centroid_KD is not None:
                label_B = self.label_N[number][part.slot_B]
                values = [
                    prototype_contrast(q_BP, label_B, self.centroid_KD, 1.0)
                    for q_BP in (phase.pooled_BP, phase.mixed_pooled_BP)
                ]
                terms[f"cluster_{side}"] = Term(0.5 * p.cluster_weight, torch.stack(values).mean())
        return terms

    def after_step(self, batch: tuple[DomainBatch, DomainBatch]) -> None:
        """Keys join the banks after the losses, as they do the release's queues."""
        for bank, phase_bank, part in zip(self.banks, self.phase_banks, batch, strict=True):
            assert part.phase is not None
            bank.write(part.slot_B, part.k_BD)
            phase_bank.write(part.slot_B, part.phase.k_BD)

    def state_dict(self) -> dict[str, Any]:
        rows = [bank.on_first().cpu() for bank in self.phase_banks]
        return {**super().state_dict(), "phase_banks": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        first, second = state["phase_banks"]
        self.phase_banks = (Bank(first), Bank(second))
