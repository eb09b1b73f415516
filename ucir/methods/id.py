"""ID: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018.

A baseline of UCDIR's tables, on UCDIR's batches, views, head and evaluation. Hu & Lee give one sentence on
how they ran it: loss and constants are those of its own paper and official code.
"""

from __future__ import annotations

from ucir.config.base import Positive
from ucir.losses.prototype import bank_discrimination
from ucir.methods.base import SingleEncoder, SingleEncoderParams, Term
from ucir.methods.step import DomainBatch


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
