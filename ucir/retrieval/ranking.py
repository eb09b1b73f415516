"""A ranking of the gallery for each query: what metrics are functions of.

It reads labels: nothing under ``ucir.training`` or ``ucir.methods`` may import this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHUNK = 32
"""Queries at once: their similarities to 70,000 pictures fit a processor's cache."""


@dataclass(frozen=True)
class Ranking:
    """Where the relevant gallery images stand, query after query."""

    rank_R: np.ndarray
    """Ranks from 1, ascending within a query, int64."""
    relevant_Q: np.ndarray
    """How many are relevant to each query, int64."""
    label_Q: np.ndarray
    """Classes of the queries."""

    @property
    def shared_Q(self) -> np.ndarray:
        """Which queries have a counterpart in the gallery, bool."""
        return self.relevant_Q > 0

    @property
    def query_R(self) -> np.ndarray:
        """The query of each rank, int64."""
        return np.repeat(np.arange(len(self.relevant_Q)), self.relevant_Q)

    @property
    def place_R(self) -> np.ndarray:
        """The number of each rank among its query's, from 1, int64."""
        first_Q = np.cumsum(self.relevant_Q) - self.relevant_Q
        place_R: np.ndarray = np.arange(1, len(self.rank_R) + 1) - np.repeat(first_Q, self.relevant_Q)
        return place_R


def rank(
    query_QD: Tensor, gallery_GD: Tensor, query_label_Q: Sequence[str], gallery_label_G: Sequence[str]
) -> Ranking:
    """Rank the gallery by cosine similarity.

    Equal similarities rank irrelevant images first, so that no order of files helps.

    Args:
        query_QD, gallery_GD: unit features.
        query_label_Q, gallery_label_G: class names.
    """
    query_labels, size = np.asarray(query_label_Q), len(gallery_GD)
    # numbers, which compare faster than names
    names, number = np.unique([*gallery_label_G, *query_label_Q], return_inverse=True)
    number = number.astype(np.int32)
    gallery_G, query_Q = number[:size], number[size:]
    ranks = [np.empty(0, np.int64)]
    for first in range(0, len(query_Q), CHUNK):
        rows = slice(first, first + CHUNK)
        similarity_QG = (query_QD[rows] @ gallery_GD.T).float().cpu().numpy()
        ranked_QG = ranked_relevance(similarity_QG, gallery_G[None, :] == query_Q[rows, None])
        ranks.append(np.flatnonzero(ranked_QG) % size + 1)
    relevant_Q = np.bincount(gallery_G, minlength=len(names))[query_Q]
    return Ranking(np.concatenate(ranks), relevant_Q, query_labels)


def ranked_relevance(similarity_QG: np.ndarray, relevant_QG: np.ndarray) -> np.ndarray:
    """Relevance in ranked order, bool (Q, G); among equal similarities irrelevant images come first.

    Overwrites the similarities, float32.

    The relevance rides in the lowest bit of the similarity, so that values alone are sorted, several
    times faster than sorting indices; similarities closer than 5e-7 count as equal.
    """
    similarity_QG -= np.float32(2)  # below 0: a larger bit pattern is less
    bits = similarity_QG.view(np.uint32)
    bits &= np.uint32(0xFFFFFFFE)
    bits |= relevant_QG
    bits.sort(axis=1)
    bits &= np.uint32(1)
    relevant: np.ndarray = bits != 0
    return relevant


def top_ranked(query_QD: Tensor, gallery_GD: Tensor, count: int) -> np.ndarray:
    """Slots of the ``count`` most similar gallery images for each query, best first, int64."""
    count = min(count, len(gallery_GD))
    return torch.topk(query_QD @ gallery_GD.T, count, dim=1).indices.cpu().numpy()
