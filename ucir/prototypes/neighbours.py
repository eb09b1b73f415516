"""Which pictures are each other's neighbours, and the mean over such a neighbourhood."""

from __future__ import annotations

import torch
from torch import Tensor

from ucir.precision import full_precision

SIMILARITIES_AT_ONCE = 2**24
"""64 MiB."""


def reciprocal_graph(feature_ND: Tensor, neighbours: int) -> Tensor:
    """The graph of pictures that are among each other's nearest (k-reciprocal: Zhong et al., CVPR 2017).

    All pictures are compared with all.

    Args:
        feature_ND: unit features of one domain.
        neighbours: how many nearest ones of a picture count; all others where there are fewer.

    Returns:
        Sparse (N, N) float32, rows sum to 1: equal shares of a picture itself and its reciprocal neighbours.
    """
    x_ND = full_precision(feature_ND)
    count = len(x_ND)
    near_Nk = torch.cat(
        [
            _nearest_others(x_ND, rows, min(neighbours, count - 1))
            for rows in torch.split(
                torch.arange(count, device=x_ND.device), max(1, SIMILARITIES_AT_ONCE // count)
            )
        ]
    )
    own_Nk = torch.arange(count, device=x_ND.device)[:, None].expand_as(near_Nk)
    there, back = (a * count + b for a, b in ((own_Nk, near_Nk), (near_Nk, own_Nk)))
    mutual = there[torch.isin(there, back)]
    edges = torch.cat([mutual, torch.arange(count, device=x_ND.device) * (count + 1)])
    row, column = edges // count, edges % count
    share = 1 / torch.bincount(row, minlength=count)[row]
    return torch.sparse_coo_tensor(
        torch.stack([row, column]), share, (count, count), check_invariants=True
    ).coalesce()


def _nearest_others(x_ND: Tensor, row_B: Tensor, count: int) -> Tensor:
    similarity_BN = x_ND[row_B] @ x_ND.T
    similarity_BN.scatter_(1, row_B[:, None], -torch.inf)
    return similarity_BN.topk(count, dim=1).indices


def diffused(feature_ND: Tensor, graph_NN: Tensor, steps: int) -> Tensor:
    """P^steps X: features after so many times taking the mean over each one's neighbourhood, (N, D)."""
    for _ in range(steps):
        feature_ND = torch.sparse.mm(graph_NN, feature_ND)
    return feature_ND
