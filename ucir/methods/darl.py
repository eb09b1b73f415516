"""DARLING: Zhang et al., Towards Unsupervised Domain Generalization, CVPR 2022 (arXiv 2107.06219).

**Reconstructed**: a row of UEM's tables of which neither code nor full text was to be had. From its
descriptions: instance contrast of a momentum encoder with a queue for each domain, in which the probability
of a picture's key is a mixture over domains,

    p(n | x) = sum_d p(d | x) p(n | x, d),    p(n | x, d) = e(q k) / (e(q k) + sum_{a in d, a != n} e(q M_a)),

with p(d | x) from a domain classifier: a picture is told from those of the domains that it looks like. Ours:

- the classifier is linear, learns from features that it does not move, and weights the mixture as a constant
- banks of all pictures stand for the queues, as for ProtoNCE; they hold keys (negatives that are learnt
  against the encoder, AdCo, were mentioned and are left out)
- MoCo v2's constants
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ucir.config.base import Positive
from ucir.losses.instance import mixed_contrast
from ucir.methods.base import BankMethod, KeyedParams, Term
from ucir.methods.step import DomainBatch
from ucir.models.encoder import Encoder


class DarlParams(KeyedParams):
    """``methods.darl.<dataset>``."""

    lr: Positive = 0.03
    temperature: Positive = 0.2
    classifier_lr: Positive = 1.0
    """Of the domain classifier, times the rate."""


class Darl(BankMethod[DarlParams]):
    """0.5 instance contrast by domain in each domain, and the domain classifier's cross-entropy."""

    params_type = DarlParams
    classifier: nn.Linear

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        t, terms = self.params.temperature, {}
        for bank, part in zip(self.banks, batch, strict=True):
            bank.write(part.slot_B, part.k_BD)
        for number, (side, part) in enumerate(zip("ab", batch, strict=True)):
            logits_BM = self.classifier(part.q_BD.detach())
            others = [
                bank.log_total(part.q_BD, t, without_B=part.slot_B if domain == number else None)
                for domain, bank in enumerate(self.banks)
            ]
            posterior_BM = logits_BM.detach().softmax(dim=1)
            value = mixed_contrast(part.q_BD, part.k_BD, torch.stack(others, dim=1), posterior_BM, t)
            terms[f"instance_{side}"] = Term(0.5, value)
            domain_B = torch.full_like(part.slot_B, number)
            terms[f"classifier_{side}"] = Term(0.5, F.cross_entropy(logits_BM, domain_B))
        return terms

    def build(self, encoder: Encoder) -> nn.ModuleDict:
        """The domain classifier."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.classifier = nn.Linear(encoder.feature_dim, 2).to(encoder.device)
        return nn.ModuleDict({"classifier": self.classifier})

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.classifier.parameters()), "lr_scale": self.params.classifier_lr}]
