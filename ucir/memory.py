"""The bank: one feature row per training image of a domain."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class Bank:
    """Unit features of a domain's N images, row number = slot of the image (not a queue).

    Source: UCDIR ``builder.py`` ("queue"), ProtoOT likewise.
    """

    def __init__(self, features_ND: Tensor) -> None:
        self.features_ND = features_ND.clone()

    @torch.no_grad()
    def nearest(self, feature_BD: Tensor, slot_B: Tensor) -> Tensor:
        """For each image the row most similar to its feature among those of other images, (B, D)."""
        similarity_BN = feature_BD @ self.features_ND.T
        similarity_BN.scatter_(1, slot_B[:, None], float("-inf"))
        return self.features_ND[similarity_BN.argmax(dim=1)]

    @torch.no_grad()
    def blend(self, slot_B: Tensor, feature_BD: Tensor, momentum: float) -> None:
        """v <- m v + (1 - m) f, normalised: the bank of ID, CDS and PCS, which have no key encoder."""
        row_BD = momentum * self.features_ND[slot_B] + (1 - momentum) * feature_BD.detach()
        self.write(slot_B, F.normalize(row_BD, dim=1))

    @torch.no_grad()
    def write(self, slot_B: Tensor, feature_BD: Tensor) -> None:
        """Overwrite rows. Where a slot comes twice in a batch, its last feature stays: on any device."""
        place = torch.arange(len(slot_B), device=slot_B.device)
        last_B = ((slot_B[:, None] == slot_B[None, :]) * (place[None, :] + 1)).amax(dim=1) - 1
        self.features_ND[slot_B] = feature_BD.detach()[last_B]
