"""CDS: Kim et al., Cross-Domain Self-Supervised Pre-Training, ICCV 2021.

A baseline of UCDIR's tables, on UCDIR's batches, views, head and evaluation. Hu & Lee give one sentence on
how they ran it: loss and constants are those of its own paper and official code. As released it takes the two
domains one after the other; here they pass through the network together, as in UCDIR.
"""

from __future__ import annotations

from ucir.config.base import Count, Positive
from ucir.losses.prototype import bank_discrimination, neighbour_entropy
from ucir.methods.base import SingleEncoder, SingleEncoderParams, Term, Weight
from ucir.methods.step import DomainBatch


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
            within = bank_discrimination(part.q_BD, part.slot_B, bank, p.temperature)
            terms[f"instance_{side}"] = Term(0.5, within)
            if p.matching_weight > 0:
                across = neighbour_entropy(part.q_BD, other, p.temperature, p.nearest)
                terms[f"matching_{side}"] = Term(p.matching_weight, across)  # summed, not halved, as released
        return terms

    def lr_at(self, epoch: int, steps: int) -> float:
        """Constant."""
        return self.params.lr
