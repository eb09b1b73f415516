"""DN2A: Liu et al., Promoting Semantic Connectivity: Dual Nearest Neighbors Contrastive Learning for
Unsupervised Domain Generalization, CVPR 2023.

**Reconstructed**: a row of UEM's tables of which neither code nor full text was to be had. From its abstract
and descriptions: strong augmentation, so that pictures of one domain do not agree on their style; and as
positives, beside a picture's other view, trustworthy neighbours in its own and in the other domain. Ours:

- a momentum encoder with a bank for each domain; every positive is contrasted with the bank that it lies in
- the neighbour across domains must lead back ("double lock"): z is the nearest picture of the other domain to
  x, and x is among the ``neighbours`` nearest of z's in x's domain
- so must the neighbour in the domain ("cycle"): y is the nearest other picture to x, and x among y's
- a picture without such a neighbour has no such term
- strong augmentation: the query's view with the jitter doubled (SimCLR's full strength), half of them grey, a
  fifth inverted. Stored features (``start.trained: head``) are of the data set's own views
- MoCo v2's constants
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ucir.config.base import Count, Positive
from ucir.config.data import AugmentParams
from ucir.data.views import PictureViews
from ucir.losses.instance import instance_contrast
from ucir.losses.prototype import bank_discrimination
from ucir.memory import Bank
from ucir.methods.base import BankMethod, Epoch, KeyedParams, Term, Weight
from ucir.methods.step import DomainBatch, Step


class Dn2aParams(KeyedParams):
    """``methods.dn2a.<dataset>``."""

    lr: Positive = 0.03
    temperature: Positive = 0.2
    neighbours: Count = 5
    """Among how many nearest ones a picture must be of its neighbour's."""
    in_domain_weight: Weight = 1.0
    cross_domain_weight: Weight = 1.0
    neighbour_start: Epoch = 0
    """First epoch with neighbours."""


ROUNDING = 1e-6
"""Similarities this close are equal."""


def stronger(augment: AugmentParams) -> AugmentParams:
    """A data set's augmentation made strong."""
    brightness, contrast, saturation, hue = (min(2 * x, 1.0) for x in augment.jitter)
    return augment.model_copy(
        update={
            "jitter": (brightness, contrast, saturation, min(hue, 0.5)),
            "grey_share": max(augment.grey_share, 0.5),
            "invert_share": max(augment.invert_share, 0.2),
        }
    )


class StrongStep(Step):
    """The standard step, whose query sees strongly augmented views."""

    def draw_query(self, domain_B: Tensor, slot_B: Tensor, generator: torch.Generator) -> Any:
        if not isinstance(self.views, PictureViews):
            return super().draw_query(domain_B, slot_B, generator)
        return self.views.draw(domain_B, slot_B, generator, stronger(self.views.view.augment))


def locked_neighbours(slot_B: Tensor, own: Bank, bank: Bank, among: int) -> tuple[Tensor, Tensor]:
    """The nearest picture of each in a bank, and whether the way leads back.

    Args:
        slot_B: pictures of ``own``.
        own: their domain's bank.
        bank: where neighbours are looked for; of ``own`` itself other pictures.
        among: of how many nearest ones of the neighbour the picture must be.

    Returns:
        Slots of ``bank``, int64 (B,); bool (B,).
    """
    inside = bank is own
    row_BD = own.rows(slot_B)
    near_B = bank.closest(row_BD, lambda x, row_ND: -(x @ row_ND.T), slot_B if inside else None)
    near_BD = bank.rows(near_B)
    # in its own domain a neighbour's first is itself
    least_B = own.largest(near_BD, among + inside)[:, -1]
    return near_B, (near_BD * row_BD).sum(dim=1) >= least_B - ROUNDING


class Dn2a(BankMethod[Dn2aParams]):
    """Instance contrast + neighbours in the domain + neighbours across."""

    params_type = Dn2aParams
    step_type = StrongStep

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        p, terms = self.params, {}
        for bank, part in zip(self.banks, batch, strict=True):
            bank.write(part.slot_B, part.k_BD)
        for number, (side, part) in enumerate(zip("ab", batch, strict=True)):
            own, other = self.banks[number], self.banks[1 - number]
            others_B = own.log_total(part.q_BD, p.temperature, without_B=part.slot_B)
            instance = instance_contrast(part.q_BD, part.k_BD, others_B, p.temperature)
            terms[f"instance_{side}"] = Term(0.5, instance)
            for name, bank, weight in (
                ("in_domain", own, p.in_domain_weight),
                ("cross_domain", other, p.cross_domain_weight),
            ):
                if weight > 0 and epoch >= p.neighbour_start:
                    near_B, trusted_B = locked_neighbours(part.slot_B, own, bank, p.neighbours)
                    value = bank_discrimination(part.q_BD, near_B, bank, p.temperature, trusted_B)
                    terms[f"{name}_{side}"] = Term(0.5 * weight, value)
        return terms
