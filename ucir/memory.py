"""Features of all images of a domain, shared out over the workers: current ones, and the bank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.distributed import (
    all_reduce_sum,
    gather_largest,
    gather_rows,
    gather_to_first,
    log_sum_over_workers,
    own_rows,
    shares,
    world_size,
)
from ucir.precision import full_precision


class Features:
    """Unit features of N images, row number = slot of the image.

    Each of W workers holds N / W consecutive rows; what is asked of all of them is a sum over workers.

    Args:
        own_ND: this worker's rows.
        count: N, of all workers together. None = these are all, and this process asks alone.
    """

    def __init__(self, own_ND: Tensor, count: int | None = None) -> None:
        self.own_ND = own_ND
        self.count = len(own_ND) if count is None else count
        self.workers = 1 if count is None else world_size()
        self.own_slots: slice | Tensor = own_rows(self.count) if self.workers > 1 else slice(0, self.count)
        """Slots of this worker's rows."""

    def __len__(self) -> int:
        """N."""
        return self.count

    def place(self, slot_B: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the slots are this worker's, and their rows in ``own_ND`` (0 for the others)."""
        assert isinstance(self.own_slots, slice)
        mine_B = (slot_B >= self.own_slots.start) & (slot_B < self.own_slots.stop)
        return mine_B, torch.where(mine_B, slot_B - self.own_slots.start, torch.zeros_like(slot_B))

    def total(self, x: Tensor) -> Tensor:
        """Sum of every worker's ``x``."""
        return all_reduce_sum(x) if self.workers > 1 else x

    def gather(self, own_N: Tensor) -> Tensor:
        """Of what each worker has for its rows, that of all rows; differentiable."""
        return gather_rows(own_N, self.count) if self.workers > 1 else own_N

    @property
    def features_ND(self) -> Tensor:
        """All rows, gathered on every worker: N x D numbers travel."""
        return self.gather(self.own_ND)

    def on_first(self) -> Tensor:
        """All rows on the first worker, none on the others."""
        return gather_to_first(self.own_ND, self.count) if self.workers > 1 else self.own_ND

    @torch.no_grad()
    def rows(self, slot_B: Tensor) -> Tensor:
        """The rows of the slots, (B, D), constant."""
        if self.workers == 1:
            return self.own_ND[slot_B]
        mine_B, place_B = self.place(slot_B)
        row_BD = self.own_ND.new_zeros(len(slot_B), self.own_ND.shape[1])
        row_BD[mine_B] = self.own_ND[place_B[mine_B]]
        return self.total(row_BD)

    @torch.no_grad()
    def sums(self, label_N: Tensor, clusters: int) -> Tensor:
        """Sum of the rows of each cluster, (K, D), where ``label_N`` says which is whose."""
        sum_KD = self.own_ND.new_zeros(clusters, self.own_ND.shape[1])
        return self.total(sum_KD.index_add_(0, label_N[self.own_slots], self.own_ND))

    @torch.no_grad()
    def mean(self) -> Tensor:
        """Mean row, (D,)."""
        return self.total(self.own_ND.sum(dim=0)) / self.count


class JointFeatures(Features):
    """Features of two domains as one: the first's slots, then the second's."""

    def __init__(self, *parts: Tensor | Features) -> None:
        first, second = self.parts = features_of(parts[0]), features_of(parts[1])
        super().__init__(torch.cat([first.own_ND, second.own_ND]))
        self.count, self.workers = first.count + second.count, first.workers
        slot_N = torch.arange(self.count, device=self.own_ND.device)
        self.own_slots = torch.cat([slot_N[first.own_slots], slot_N[first.count :][second.own_slots]])

    def place(self, slot_B: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.parts
        in_first_B, first_B = first.place(slot_B)
        in_second_B, second_B = second.place(slot_B - first.count)
        place_B = torch.where(in_second_B, len(first.own_ND) + second_B, first_B)
        return in_first_B | in_second_B, place_B

    def gather(self, own_N: Tensor) -> Tensor:
        first, second = self.parts
        border = len(first.own_ND)
        return torch.cat([first.gather(own_N[:border]), second.gather(own_N[border:])])


def features_of(x: Tensor | Features) -> Features:
    """A tensor as features that this process has, and asks, alone."""
    return x if isinstance(x, Features) else Features(x)


class Bank(Features):
    """Features that training writes to (not a queue).

    Batches are the global ones, so a row that is written needs no journey: its owner has it already.

    Source: UCDIR ``builder.py`` ("queue"), ProtoOT likewise.

    Args:
        features: what it begins with; a tensor has all rows, on every worker.
    """

    own_slots: slice

    def __init__(self, features: Tensor | Features) -> None:
        count = len(features)
        own_ND = features.own_ND if isinstance(features, Features) else features[own_rows(count)]
        super().__init__(own_ND.clone(), count)
        self._widths = [share.stop - share.start for share in shares(count)]

    def log_total(self, q_BD: Tensor, temperature: float, without_B: Tensor | None = None) -> Tensor:
        """log sum_a exp(q_i M_a / T) over all rows, (B,), with gradient to q.

        The logits are never held together, see :class:`_LogTotal`.

        Args:
            q_BD: unit features.
            temperature: T > 0.
            without_B: a slot for each feature whose row does not count.
        """
        q = full_precision(q_BD)
        place_B = None
        if without_B is not None:
            mine_B, place_B = self.place(without_B)
            place_B = torch.where(mine_B, place_B, -1)
        own_B = cast(Tensor, _LogTotal.apply(q, self.own_ND, temperature, place_B))
        return log_sum_over_workers(own_B)

    def largest(self, q_BD: Tensor, count: int) -> Tensor:
        """The ``count`` largest similarities to rows, (B, count), with gradient to q; all where there are
        fewer."""
        return gather_largest(full_precision(q_BD) @ self.own_ND.T, count, self._widths)

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
            mine_B, place_B = self.place(without_B)
            distance_BN[mine_B, place_B[mine_B]] = float("inf")
        if world_size() == 1:
            return distance_BN.argmin(dim=1)
        least_B = distance_BN.new_full((len(x_BD),), float("inf"))
        slot_B = torch.full((len(x_BD),), self.own_slots.start, device=x_BD.device)
        if distance_BN.shape[1]:
            least_B, place_B = distance_BN.min(dim=1)
            slot_B = self.own_slots.start + place_B
        least_WB, slot_WB = (
            gather_rows(own_B, len(x_BD) * world_size()).view(world_size(), -1) for own_B in (least_B, slot_B)
        )
        return slot_WB.gather(0, least_WB.argmin(dim=0, keepdim=True))[0]

    def nearest(self, feature_BD: Tensor, slot_B: Tensor) -> Tensor:
        """For each image the row most similar to its feature among those of other images, (B, D)."""
        return self.rows(self.closest(feature_BD, lambda x, row_ND: -(x @ row_ND.T), slot_B))

    @torch.no_grad()
    def change(self, slot_B: Tensor, feature_BD: Tensor) -> Tensor:
        """What :meth:`write` would add to the rows, (B, D); nothing where the slot comes again later."""
        change_BD = feature_BD.detach() - self.rows(slot_B)
        place = torch.arange(len(slot_B), device=slot_B.device)
        return torch.where((_last(slot_B) == place)[:, None], change_BD, torch.zeros_like(change_BD))

    @torch.no_grad()
    def blend(self, slot_B: Tensor, feature_BD: Tensor, momentum: float) -> None:
        """v <- m v + (1 - m) f, normalised: the bank of ID, CDS and PCS, which have no key encoder."""
        row_BD = momentum * self.rows(slot_B) + (1 - momentum) * feature_BD.detach()
        self.write(slot_B, F.normalize(row_BD, dim=1))

    @torch.no_grad()
    def write(self, slot_B: Tensor, feature_BD: Tensor) -> None:
        """Overwrite rows. Where a slot comes twice in a batch, its last feature stays: on any device."""
        mine_B, own_B = self.place(slot_B)
        self.own_ND[own_B[mine_B]] = feature_BD.detach()[_last(slot_B)][mine_B]


def _last(slot_B: Tensor) -> Tensor:
    """For each place of a batch the last one with the same slot, int64 (B,)."""
    place = torch.arange(len(slot_B), device=slot_B.device)
    return ((slot_B[:, None] == slot_B[None, :]) * (place[None, :] + 1)).amax(dim=1) - 1


LOGITS_AT_ONCE = 2**18
"""On the CPU, as many as its cache holds; another device takes 32 times as many, 32 MiB."""


class _LogTotal(torch.autograd.Function):
    """log sum_n exp(q_i M_n / T) over rows M, without all logits at a time.

    The rows pass in chunks, and what the gradient needs is summed on the way: it is sum_n softmax_n M_n / T.
    As in cut cross-entropy (Wijmans et al., ICLR 2025), with a running maximum.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BD: Tensor, row_ND: Tensor, temperature: float, barred_B: Tensor | None
    ) -> Tensor:
        """Totals, (B,). ``barred_B``: a row for each i that does not count; -1 for none."""
        chunk = LOGITS_AT_ONCE * (1 if q_BD.device.type == "cpu" else 32) // max(1, len(q_BD))
        chunk = max(256, chunk)
        most_B1 = q_BD.new_full((len(q_BD), 1), torch.finfo(q_BD.dtype).min)
        sum_B1, mean_BD = torch.zeros_like(most_B1), torch.zeros_like(q_BD)
        scaled_BD = q_BD / temperature
        for first in range(0, len(row_ND), chunk):
            rows = row_ND[first : first + chunk]
            logits = scaled_BD @ rows.T
            if barred_B is not None:
                place_B = barred_B - first
                column_B1 = place_B.clamp(0, len(rows) - 1)[:, None]
                here_B1 = (place_B == column_B1[:, 0])[:, None]
                kept_B1 = torch.where(here_B1, float("-inf"), logits.gather(1, column_B1))
                logits.scatter_(1, column_B1, kept_B1)
            now_B1 = torch.maximum(most_B1, logits.amax(dim=1, keepdim=True))
            shrunk_B1 = (most_B1 - now_B1).exp_()
            weights = logits.sub_(now_B1).exp_()
            sum_B1 = sum_B1 * shrunk_B1 + weights.sum(dim=1, keepdim=True)
            mean_BD = torch.addmm(mean_BD * shrunk_B1, weights, rows)
            most_B1 = now_B1
        tiny = torch.finfo(q_BD.dtype).tiny
        ctx.save_for_backward(mean_BD / (sum_B1.clamp(min=tiny) * temperature))
        return (most_B1 + sum_B1.log())[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_BD,) = ctx.saved_tensors
        return grads[0][:, None] * gradient_BD, None, None, None
