"""CoDA: Wang et al., Correspondence-free Domain Alignment for Unsupervised Cross-domain Image Retrieval,
AAAI 2023. Constants of the official code; UEM compares with it.

Linear classifiers of several sizes for each domain, which begin as cluster centres: in-domain self-matching
makes an image's output that of its bank row, cross-domain classifier alignment makes the two domains'
classifiers say the same of it.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from ucir.config.base import Positive, Share
from ucir.losses.prototype import classifier_gap, self_matching
from ucir.memory import Features, JointFeatures
from ucir.methods.base import SingleEncoder, SingleEncoderParams, Term, Weight, several
from ucir.methods.step import DomainBatch
from ucir.models.encoder import Encoder
from ucir.prototypes.clustering import kmeans


class CodaParams(SingleEncoderParams):
    """``methods.coda.<dataset>``."""

    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=2)] = 16
    lr: Positive = 0.003
    weight_decay: Weight = 1e-5
    bank_momentum: Share = 0.95
    clusters: Annotated[tuple[int, ...], BeforeValidator(several)] = (100, 200, 300, 400)
    """Outputs of each domain's classifiers, whose terms are averaged."""
    classifier_lr: Positive = 1e-4
    sharpening: Positive = 0.01
    """Temperature of the bank rows' outputs, the targets of self-matching."""
    alignment_weight: Weight = 0.01
    """Of the gap between the two domains' classifiers."""

    @property
    def most_clusters(self) -> int:
        return max(self.clusters)


class Coda(SingleEncoder[CodaParams]):
    """L = sum over domains of mean over sizes of (self-matching + 0.01 gap)."""

    params_type = CodaParams
    classifiers: nn.ModuleList
    """First the one domain's weights, then the other's; each a ParameterList of (K, D)."""

    def start(self, features: tuple[Features, Features]) -> None:
        """The classifiers begin at centres that K-means of a domain finds from those of both."""
        super().start(features)
        both = JointFeatures(*features)
        for number, k in enumerate(self.params.clusters):
            common_KD = self._centres(both, k, None)
            for classifiers, x in zip(self.classifiers, features, strict=True):
                assert isinstance(classifiers, nn.ParameterList)
                classifiers[number].data.copy_(self._centres(x, k, common_KD))

    def _centres(self, features: Features, k: int, initial_KD: Tensor | None) -> Tensor:
        clusters = kmeans(
            features, k, iterations=20, restarts=1, seed=self.seed, max_points=2000, initial_KD=initial_KD
        )
        return clusters.centroid_KD

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p = self.params
        first, second = self.classifiers
        assert isinstance(first, nn.ParameterList)
        assert isinstance(second, nn.ParameterList)
        terms = {}
        sides = zip("ab", self.banks, batch, ((first, second), (second, first)), strict=True)
        for side, bank, part, (weights, other_weights) in sides:
            row_BD = bank.rows(part.slot_B)
            matched = [self_matching(part.q_BD, row_BD, w_KD, p.sharpening) for w_KD in weights]
            terms[f"self_matching_{side}"] = Term(1.0, torch.stack(matched).mean())
            if p.alignment_weight > 0:
                gaps = [classifier_gap(part.q_BD, *pair) for pair in zip(weights, other_weights, strict=True)]
                terms[f"alignment_{side}"] = Term(p.alignment_weight, torch.stack(gaps).mean())
        return terms

    def build(self, encoder: Encoder) -> nn.ModuleDict:
        """The classifiers, still empty."""
        sizes, device = self.params.clusters, encoder.device
        self.classifiers = nn.ModuleList(
            nn.ParameterList(torch.zeros(k, encoder.feature_dim, device=device) for k in sizes) for _ in "ab"
        )
        return nn.ModuleDict({"classifiers": self.classifiers})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Without weight decay."""
        scale = self.params.classifier_lr / self.params.lr
        return [{"params": list(self.classifiers.parameters()), "lr_scale": scale, "weight_decay": 0.0}]

    def lr_at(self, epoch: int, steps: int) -> float:
        """Constant."""
        return self.params.lr
