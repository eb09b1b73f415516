"""Batch normalisation over groups of the global batch.

UCDIR and ProtoOT normalise the query encoder over the whole mixed batch (both domains) and the key
encoder over two halves of the shuffled batch (``SplitBatchNorm``, MoCo's single-GPU stand-in for
ShuffleBN). The statistics here are those of the *global* batch, whatever the number of workers.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ucir.distributed import all_reduce_sum, rank, world_size


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm2d`` with separate training statistics for each of ``groups`` parts of the batch.

    The global batch is cut into ``groups`` equal runs of rows (rank 0's rows first); with 1 group this
    is plain (synchronised) batch normalisation. Running statistics are the mean over the groups;
    evaluation mode is that of ``BatchNorm2d``. Source: UCDIR ``builder.py`` SplitBatchNorm, which cuts
    into interleaved rows instead: the same thing, as the batch is shuffled.
    """

    def __init__(self, num_features: int, groups: int = 1) -> None:
        super().__init__(num_features)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same; B is this worker's share of the global batch."""
        if not self.training or (self.groups == 1 and world_size() == 1):
            return nn.BatchNorm2d.forward(self, x)
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum or 0.0
        if world_size() == 1:
            parts, means, variances = [], [], []
            for part in x.chunk(self.groups):
                mean, variance = self.running_mean.clone(), self.running_var.clone()
                parts.append(
                    F.batch_norm(part, mean, variance, self.weight, self.bias, True, momentum, self.eps)
                )
                means.append(mean)
                variances.append(variance)
            self.running_mean.copy_(torch.stack(means).mean(dim=0))
            self.running_var.copy_(torch.stack(variances).mean(dim=0))
            return torch.cat(parts)
        group_B = self._group_of_rows(len(x), x.device)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision is too narrow for sums
        member_GB = F.one_hot(group_B, self.groups).T.to(wide.dtype)
        pixels = x.shape[2] * x.shape[3]
        # two passes: the one-pass variance cancels catastrophically in fp32
        count_G1 = all_reduce_sum(member_GB.sum(dim=1, keepdim=True)) * pixels
        mean_GC = all_reduce_sum(member_GB @ wide.sum(dim=(2, 3))) / count_G1
        centred = wide - mean_GC[group_B][:, :, None, None]
        variance_GC = all_reduce_sum(member_GB @ centred.square().sum(dim=(2, 3))) / count_G1
        with torch.no_grad():
            unbiased = variance_GC * (count_G1 / (count_G1 - 1))
            self.running_mean.lerp_(mean_GC.mean(dim=0), momentum)
            self.running_var.lerp_(unbiased.mean(dim=0), momentum)
        scale_GC = self.weight * torch.rsqrt(variance_GC + self.eps)
        out = centred * scale_GC[group_B][:, :, None, None] + self.bias[None, :, None, None]
        return out.to(x.dtype)

    def _group_of_rows(self, rows: int, device: torch.device) -> Tensor:
        total = all_reduce_sum(torch.tensor(rows, device=device))
        place = torch.arange(rows, device=device) + total * rank() // world_size()
        return (place * self.groups) // total


class GroupedBatchNormAct2d(GroupedBatchNorm2d):
    """The same, with the activation that timm's normalisation layers bring along."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.drop(super().forward(x))))


def group_batch_norms(net: nn.Module, groups: int) -> None:
    """Turn a network's batch normalisations into grouped ones, where they are; names and weights stay."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and not isinstance(module, GroupedBatchNorm2d):
            module.__class__ = GroupedBatchNormAct2d if hasattr(module, "act") else GroupedBatchNorm2d
            cast(GroupedBatchNorm2d, module).groups = groups
