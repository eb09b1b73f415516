"""The few collective operations that training needs; with one process they are the identity.

One global batch: every worker runs the network on its own rows, the features of all rows are gathered,
and every worker computes the loss of the whole batch. Gradients flow back through the gather, so that
DDP's average over workers is the gradient of that one loss. Methods never see how many workers there are.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def shares(count: int) -> list[slice]:
    """Each worker's rows of ``count``: consecutive, equally many or one more."""
    bounds = [count * worker // world_size() for worker in range(world_size() + 1)]
    return [slice(first, end) for first, end in pairwise(bounds)]


def own_rows(count: int) -> slice:
    """This worker's rows of ``count``."""
    return shares(count)[rank()]


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over workers; differentiable."""
    if world_size() == 1:
        return x
    return cast(Tensor, _AllReduceSum.apply(x))


def gather_rows(x: Tensor, count: int) -> Tensor:
    """All ``count`` rows, of which each worker brings its own; differentiable."""
    if world_size() == 1:
        return x
    return cast(Tensor, _GatherRows.apply(x, count))


def gather_to_first(x: Tensor, count: int) -> Tensor:
    """All ``count`` rows on the first worker, none on the others; no gradient."""
    if world_size() == 1:
        return x
    padded = _padded(x, count)
    parts = [torch.empty_like(padded) for _ in range(world_size())] if rank() == 0 else None
    dist.gather(padded, parts)
    return _joined(parts, count) if parts else x[:0]


def any_worker(asked: list[bool]) -> list[bool]:
    """Which of the questions some worker says yes to: the same answer everywhere."""
    if world_size() == 1:
        return asked
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    answers = torch.tensor(asked, dtype=torch.uint8, device=device)
    dist.all_reduce(answers, dist.ReduceOp.MAX)
    return [bool(answer) for answer in answers.tolist()]


def _padded(x: Tensor, count: int) -> Tensor:
    """This worker's share of ``count`` rows, as long as the longest: collectives want equally many of all."""
    missing = -(-count // world_size()) - len(x)
    return (torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x).contiguous()


def _joined(parts: list[Tensor], count: int) -> Tensor:
    return torch.cat([part[: s.stop - s.start] for part, s in zip(parts, shares(count), strict=True)])


def log_sum_over_workers(own_B: Tensor) -> Tensor:
    """log sum exp of what the workers have, (B,); differentiable."""
    if world_size() == 1:
        return own_B
    most_B = own_B.detach().clone()
    dist.all_reduce(most_B, dist.ReduceOp.MAX)
    return most_B + all_reduce_sum(torch.exp(own_B - most_B)).log()


def gather_largest(x_BN: Tensor, count: int, widths: list[int]) -> Tensor:
    """The ``count`` largest of each row, (B, count), where worker w has ``widths[w]`` of its columns.

    Fewer where there are not as many; differentiable.
    """
    most = min(count, max(widths))
    largest = x_BN.topk(min(most, x_BN.shape[1]), dim=1).values
    if world_size() == 1:
        return largest
    padded = torch.cat(
        [largest, largest.new_full((len(largest), most - largest.shape[1]), float("-inf"))], dim=1
    )
    return gather_rows(padded.T, most * world_size()).T.topk(min(count, sum(widths)), dim=1).values


class _AllReduceSum(torch.autograd.Function):
    """Backward: the same sum, because every worker's loss depends on the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class _GatherRows(torch.autograd.Function):
    """Backward: each worker gets the sum of the gradients of its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.rows = own_rows(count)
        padded = _padded(x, count)
        parts = [torch.empty_like(padded) for _ in range(world_size())]
        dist.all_gather(parts, padded)
        return _joined(parts, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.rows], None
