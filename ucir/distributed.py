"""The few collective operations that training needs; with one process they are the identity.

One global batch: every worker runs the network on its own rows, the features of all rows are gathered,
and every worker computes the loss of the whole batch. Gradients flow back through the gather, so that
DDP's average over workers is the gradient of that one loss. Methods never see how many workers there are.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def own_rows(count: int) -> slice:
    """This worker's rows of a global batch of ``count`` (a multiple of the world size)."""
    share = count // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over workers; differentiable."""
    if world_size() == 1:
        return x
    return cast(Tensor, _AllReduceSum.apply(x))


def gather_rows(x: Tensor) -> Tensor:
    """Rows of all workers, rank 0's first; differentiable. Every worker brings equally many."""
    if world_size() == 1:
        return x
    return cast(Tensor, _GatherRows.apply(x))


def gather_uneven_rows(x: Tensor, counts: list[int]) -> Tensor:
    """Rows of all workers where worker r brings ``counts[r]``; no gradient."""
    if world_size() == 1:
        return x
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def log_sum_over_workers(logits_BN: Tensor) -> Tensor:
    """log sum exp of each row, (B,), where every worker has some of its columns; differentiable."""
    own_B = torch.logsumexp(logits_BN, dim=1)
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
    own = x_BN.topk(min(most, x_BN.shape[1]), dim=1).values
    if world_size() == 1:
        return own
    padded = torch.cat([own, own.new_full((len(own), most - own.shape[1]), float("-inf"))], dim=1)
    return gather_rows(padded.T).T.topk(min(count, sum(widths)), dim=1).values


def broadcast_from_first(value: Any) -> Any:
    """Rank 0's picklable value on all workers: one K-means, the same clusters everywhere."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


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
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = own_rows(len(x) * world_size())
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.rows]
