"""Label-free criteria: how good two domains' features are for retrieval, told from the features alone.

All are between 0 and 1 or close to it, and meant so that more is better. How well each of them finds the
settings that P@K would choose is measured by `ucir tune`; none of them is a retrieval score. They are taken
over at most ``MOST`` images of each domain.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ucir.prototypes.clustering import kmeans
from ucir.prototypes.transport import plan_rows, potential

MOST = 1000
NEIGHBOURS = 10
DENSITY_TEMPERATURE = 0.05
EPSILON = 0.05
ITERATIONS = 30
IMPOSSIBLE = -1e4
"""A logit whose weight is 0; times 0 it is no NaN, as that of minus infinity is."""

CRITERIA = {
    "mutual_neighbours": "images that are their nearest cross-domain neighbour's nearest neighbour, share",
    "cluster_cycle": "images whose nearest neighbour's nearest neighbour is of their own cluster, share",
    "transport": "1 - cost of the entropic plan between the domains / mean cost",
    "mixing": f"images of the other domain among the {NEIGHBOURS} nearest of both, share of a fair mixture's",
    "silhouette": "silhouette of K-means over both domains",
    "stability": "adjusted Rand index of two such K-means with different seeds",
    "density": "soft neighbourhood density (Saito et al., ICCV 2021, section 3.2), share of its maximum",
    "rank": "effective rank (RankMe: Garrido et al., ICML 2023, eq. 1), share of the dimensions",
}
"""Name and meaning of each; MLflow and reports show them as ``quality/<name>``."""


def criteria(first_ND: Tensor, second_ND: Tensor) -> dict[str, float]:
    """Every criterion of :data:`CRITERIA`.

    The clusterings use K = sqrt(images / 2) (Mardia 1979), whatever K a method trains with, so that
    trainings with different K can be compared.

    Args:
        first_ND, second_ND: unit features of the two domains, float32; at least 2 images each.
    """
    from sklearn.metrics import adjusted_rand_score  # not at the top: seconds, for those who only train

    rows = (x[spread_rows(len(x), MOST)] for x in (first_ND, second_ND))
    first, second = (x.detach().float().cpu() for x in rows)
    both = torch.cat([first, second])
    of_first = torch.arange(len(both)) < len(first)
    k = max(2, round(math.sqrt(len(both) / 2)))
    labels = [
        kmeans(both, k, iterations=20, restarts=1, seed=seed, max_points=MOST).label_N.numpy()
        for seed in (0, 1)
    ]
    similarity = first @ second.T
    there, back = similarity.argmax(dim=1), similarity.argmax(dim=0)
    label_a, label_b = np.split(labels[0], [len(first)])
    cycle = np.concatenate([label_a == label_a[back[there]], label_b == label_b[there[back]]])
    mutual = float((back[there] == torch.arange(len(first))).sum())
    within = both @ both.T
    within.fill_diagonal_(-math.inf)
    return {
        "mutual_neighbours": mutual / min(len(first), len(second)),
        "cluster_cycle": float(cycle.mean()),
        "transport": _transport(first, second),
        "mixing": _mixing(within, of_first),
        "silhouette": _silhouette(within, labels[0]),
        "stability": float(adjusted_rand_score(*labels)),
        "density": _density(within),
        "rank": _rank(both),
    }


def spread_rows(count: int, most: int) -> Tensor:
    """At most so many of ``count`` rows, evenly spread, int64: slots are in the order of content hashes,
    which is no order."""
    return torch.linspace(0, count - 1, min(count, most)).long()


def _transport(first_ND: Tensor, second_MD: Tensor) -> float:
    """Of the plan with equal shares; 0 where all costs are 0."""
    cost_NM = 1 - first_ND @ second_MD.T
    if not cost_NM.mean() > 0:
        return 0.0
    shares_M = torch.full((len(second_MD),), 1 / len(second_MD))
    g_M = potential(first_ND, second_MD, shares_M, EPSILON, ITERATIONS, normalised=False)
    plan_NM = plan_rows(first_ND, second_MD, g_M, EPSILON, normalised=False) / len(first_ND)
    return float(1 - (plan_NM * cost_NM).sum() / cost_NM.mean())


def _mixing(within_NN: Tensor, own_N: Tensor) -> float:
    """1 where neighbours are of the other domain as often as chance has it."""
    nearest = within_NN.topk(min(NEIGHBOURS, len(own_N) - 1), dim=1).indices
    other = (own_N[nearest] != own_N[:, None]).float().mean(dim=1)
    share_N = torch.where(own_N, (~own_N).float().mean(), own_N.float().mean())
    return float((other / share_N).mean())


def _silhouette(within_NN: Tensor, label_N: np.ndarray) -> float:
    """0 where it is not defined: one cluster, or one image in each."""
    from sklearn.metrics import silhouette_score

    if not 1 < len(np.unique(label_N)) < len(label_N):
        return 0.0
    distance_NN = (2 - 2 * within_NN).clamp_(min=0).sqrt_().fill_diagonal_(0)  # of unit features
    return float(silhouette_score(distance_NN.numpy(), label_N, metric="precomputed"))


def _density(within_NN: Tensor) -> float:
    """Mean entropy of the softmax over an image's similarities to all others, as log-sum-exp less the
    mean logit, which takes no logarithm of each probability."""
    logit_NN = (within_NN / DENSITY_TEMPERATURE).fill_diagonal_(IMPOSSIBLE)
    logit_NN -= logit_NN.amax(dim=1, keepdim=True)
    weight_NN = logit_NN.exp()
    sum_N = weight_NN.sum(dim=1)
    entropy_N = sum_N.log() - torch.linalg.vecdot(weight_NN, logit_NN) / sum_N
    return float(entropy_N.mean()) / math.log(len(within_NN) - 1)


def _rank(x_ND: Tensor) -> float:
    singular = torch.linalg.svdvals(x_ND)
    share = singular / singular.sum() + 1e-7
    return float(torch.exp(torch.special.entr(share).sum())) / x_ND.shape[1]
