"""The bank: one feature row per training image of a domain, shared out over the workers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.distributed import (
    all_reduce_sum,
    gather_largest,
    gather_uneven_rows,
    log_sum_over_workers,
    rank,
    world_size,
)
from ucir.losses import full_precision


class Bank:
    """Unit features of a domain's N images, row number = slot of the image (not a queue).

    Each of W workers holds N / W consecutive rows. Batches are the global ones, so a row that is written
    needs no journey: its owner has it already. What a loss needs of the whole bank is a sum over workers.

    Source: UCDIR ``builder.py`` ("queue"), ProtoOT likewise.

    Args:
        features_ND: all rows, on every worker.
    """

    def __init__(self, features_ND: Tensor) -> None:
        self.count = len(features_ND)
        bounds = [self.count * worker // world_size() for worker in range(world_size() + 1)]
        self._widths = [end - first for first, end in pairwise(bounds)]
        self.own = slice(bounds[rank()], bounds[rank() + 1])
        self.own_ND = features_ND[self.own].clone()
        """This worker's rows."""

    @property
    def features_ND(self) -> Tensor:
        """All rows, gathered; for the start of an epoch, not for its steps."""
        return gather_uneven_rows(self.own_ND, self._widths)

    def _mine(self, slot_B: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the slots are this worker's, and their rows in ``own_ND`` (0 for the others)."""
        mine_B = (slot_B >= self.own.start) & (slot_B < self.own.stop)
        return mine_B, torch.where(mine_B, slot_B - self.own.start, torch.zeros_like(slot_B))

    @torch.no_grad()
    def rows(self, slot_B: Tensor) -> Tensor:
        """The rows of the slots, (B, D), constant."""
        if world_size() == 1:
            return self.own_ND[slot_B]
        mine_B, place_B = self._mine(slot_B)
        found = self.own_ND.new_zeros(len(slot_B), self.own_ND.shape[1])
        found[mine_B] = self.own_ND[place_B[mine_B]]
        return all_reduce_sum(found)

    def log_total(
        self, q_BD: Tensor, temperature: float, slot_B: Tensor | None = None, instead_B: Tensor | None = None
    ) -> Tensor:
        """log sum_a exp(q_i M_a / T) over all rows, (B,), with gradient to q.

        Args:
            q_BD: unit features.
            temperature: T > 0.
            slot_B, instead_B: logits that stand in for those of the slots' rows, with gradient.
        """
        logits_BN = full_precision(q_BD) @ self.own_ND.T / temperature
        if slot_B is not None and instead_B is not None:
            mine_B, place_B = self._mine(slot_B)
            there = torch.zeros_like(logits_BN, dtype=torch.bool)
            there[mine_B, place_B[mine_B]] = True
            logits_BN = torch.where(there, instead_B[:, None], logits_BN)
        return log_sum_over_workers(logits_BN)

    def largest(self, q_BD: Tensor, count: int) -> Tensor:
        """The ``count`` largest similarities to rows, (B, count), with gradient to q; all where there are
        fewer."""
        return gather_largest(full_precision(q_BD) @ self.own_ND.T, count, self._widths)

    @torch.no_grad()
    def sums(self, label_N: Tensor, clusters: int) -> Tensor:
        """Sum of the rows of each cluster, (K, D), where ``label_N`` says which is whose."""
        sum_KD = self.own_ND.new_zeros(clusters, self.own_ND.shape[1])
        return all_reduce_sum(sum_KD.index_add_(0, label_N[self.own], self.own_ND))

    @torch.no_grad()
    def closest(
        self, x_BD: Tensor, distance: Callable[[Tensor, Tensor], Tensor], without_B: Tensor | None = None
    ) -> Tensor:
        """Slot of the row at the least distance, (B,), the first of several.

        Args:
            x_BD: features.
            distance: of features (B, D) and rows (N, D), (B, N).
            without_B: a slot for each feature that does not count.
        """
        distance_BN = distance(x_BD, self.own_ND)
        if without_B is not None:
            mine_B, place_B = self._mine(without_B)
            distance_BN[mine_B, place_B[mine_B]] = float("inf")
        if world_size() == 1:
            return distance_BN.argmin(dim=1)
        least_B = distance_BN.new_full((len(x_BD),), float("inf"))
        slot_B = torch.full((len(x_BD),), self.own.start, device=x_BD.device)
        if distance_BN.shape[1]:
            least_B, place_B = distance_BN.min(dim=1)
            slot_B = self.own.start + place_B
        counts = [len(x_BD)] * world_size()
        least_WB = gather_uneven_rows(least_B, counts).view(world_size(), -1)
        slot_WB = gather_uneven_rows(slot_B, counts).view(world_size(), -1)
        return slot_WB.gather(0, least_WB.argmin(dim=0, keepdim=True))[0]

    def nearest(self, feature_BD: Tensor, slot_B: Tensor) -> Tensor:
        """For each image the row most similar to its feature among those of other images, (B, D)."""
        return self.rows(self.closest(feature_BD, lambda x, row_ND: -(x @ row_ND.T), slot_B))

    @torch.no_grad()
    def blend(self, slot_B: Tensor, feature_BD: Tensor, momentum: float) -> None:
        """v <- m v + (1 - m) f, normalised: the bank of ID, CDS and PCS, which have no key encoder."""
        row_BD = momentum * self.rows(slot_B) + (1 - momentum) * feature_BD.detach()
        self.write(slot_B, F.normalize(row_BD, dim=1))

    @torch.no_grad()
    def write(self, slot_B: Tensor, feature_BD: Tensor) -> None:
        """Overwrite rows. Where a slot comes twice in a batch, its last feature stays: on any device."""
        place = torch.arange(len(slot_B), device=slot_B.device)
        last_B = ((slot_B[:, None] == slot_B[None, :]) * (place[None, :] + 1)).amax(dim=1) - 1
        mine_B, own_B = self._mine(slot_B)
        self.own_ND[own_B[mine_B]] = feature_BD.detach()[last_B][mine_B]
