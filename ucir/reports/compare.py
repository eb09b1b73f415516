"""Methods side by side: what each retrieves for the same queries, which a method helps, and by class.

All of the first seed and the last epoch, from the features that evaluation stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ucir.data.pack import DomainImages
from ucir.reports.table import Cell, Table, best_rows, row_name
from ucir.reports.thumbnails import Thumbnail, Thumbnails
from ucir.retrieval.metrics import average_precision, precision_by_class
from ucir.retrieval.ranking import Ranking, rank, top_ranked

SHOWN = 8
"""Hits of a query."""
EXTREMES = 3
"""Queries that gained most, lost most, or have the worst hits."""
MOST_CLASSES = 80
"""Of a heat map; of more classes the strongest confusions alone are told."""
STRONGEST = 10


@dataclass(frozen=True)
class Hits:
    """What a method retrieves for a query."""

    method: str
    thumbnails: list[Thumbnail]
    kinds: list[str]
    """``hit``, ``miss``, or empty where a class is not known."""
    precision: float | None = None
    """Average precision of the query, percent."""

    @property
    def words(self) -> str:
        """For those who cannot see it."""
        right = self.kinds.count("hit")
        known = right + self.kinds.count("miss")
        return f"{right} of {known} of the same class" if known else f"{len(self.kinds)} pictures"


@dataclass(frozen=True)
class ComparedQuery:
    """A query with what several methods retrieve for it."""

    label: str
    thumbnail: Thumbnail
    hits: list[Hits]


@dataclass(frozen=True)
class ComparedDirection:
    """The queries that are shown of a direction."""

    title: str
    same: list[ComparedQuery]
    """The same for every method."""
    extremes: list[tuple[str, list[ComparedQuery]]]
    """Title and queries of those that stand out."""


@dataclass(frozen=True)
class Confusion:
    """Which classes are retrieved for which, of one method."""

    method: str
    classes: list[str]
    share_CC: np.ndarray
    """Percent of the first hits of a class's queries (rows) that are of each class (columns)."""

    @property
    def is_drawn(self) -> bool:
        return len(self.classes) <= MOST_CLASSES

    @property
    def strongest(self) -> list[tuple[str, str, float]]:
        """Query class, class that is taken for it, percent; the largest first."""
        wrong = self.share_CC * (1 - np.eye(len(self.classes)))
        order = np.argsort(-wrong, axis=None, kind="stable")[:STRONGEST]
        places = [divmod(int(place), len(self.classes)) for place in order]
        return [(self.classes[q], self.classes[g], float(wrong[q, g])) for q, g in places if wrong[q, g] > 0]


@dataclass(frozen=True)
class Direction:
    """What is compared in one direction; all by domain, in the same order."""

    query: str
    gallery: str
    features: Mapping[str, Mapping[str, Tensor]]
    """Unit features by method."""
    images: Mapping[str, DomainImages]
    labels: Mapping[str, Sequence[str]]

    def top(self, method: str, slots: Sequence[int] | slice, count: int) -> np.ndarray:
        """Slots of the first hits of these queries, int64 (Q, count)."""
        x = self.features[method]
        return top_ranked(x[self.query][slots], x[self.gallery], count)

    def ranking(self, method: str) -> Ranking:
        x, labels = self.features[method], self.labels
        return rank(x[self.query], x[self.gallery], labels[self.query], labels[self.gallery])


@dataclass
class Comparison:
    """A data set and setting's methods; directions are added one after the other.

    Args:
        dataset: its name.
        cutoff: the K of P@K by class, and of the hits that confusions are counted in.
        start, best: methods that queries are compared between; ``best`` is None where nothing has scores.
        thumbnails: of the page.
    """

    dataset: str
    cutoff: int
    start: str
    best: str | None
    thumbnails: Thumbnails
    directions: list[ComparedDirection] = field(default_factory=list)
    by_class: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Method to class to P@K of each direction."""
    confused: dict[str, dict[str, list[dict[str, float]]]] = field(default_factory=dict)
    """Method to query class to percent of each retrieved class, direction by direction."""

    def add(self, direction: Direction, queries: int) -> None:
        """Compare a direction, and show so many queries of it."""
        labels = direction.labels[direction.query]
        same = self._compared(direction, query_slots(labels, queries), list(direction.features), {})
        extremes = []
        if any(labels) and any(direction.labels[direction.gallery]):
            rankings = {method: direction.ranking(method) for method in direction.features}
            for method, ranking in rankings.items():
                for label, value in precision_by_class(ranking, self.cutoff).items():
                    self.by_class.setdefault(method, {}).setdefault(label, []).append(value)
            both = [method for method in (self.start, self.best) if method in rankings]
            for method in both:
                self._count_confusions(method, direction)
            if len(both) == 2:
                precision = {method: 100 * average_precision(rankings[method]) for method in both}
                for title, slots in _extremes(rankings[both[0]], *precision.values()):
                    extremes.append((title, self._compared(direction, slots, both, precision)))
        title = f"{direction.query} → {direction.gallery}"
        self.directions.append(ComparedDirection(title, same, extremes))

    def _compared(
        self,
        direction: Direction,
        slots: Sequence[int],
        methods: Sequence[str],
        precision: Mapping[str, np.ndarray],
    ) -> list[ComparedQuery]:
        ranked = {method: direction.top(method, slots, SHOWN) for method in methods}
        hit_labels, hit_images = direction.labels[direction.gallery], direction.images[direction.gallery]
        compared = []
        for row, slot in enumerate(slots):
            label = direction.labels[direction.query][slot]
            hits = [
                Hits(
                    method,
                    [self.thumbnails.of(self.dataset, hit_images, hit) for hit in ranked[method][row]],
                    [_kind(label, hit_labels[hit]) for hit in ranked[method][row]],
                    float(precision[method][slot]) if method in precision else None,
                )
                for method in methods
            ]
            thumbnail = self.thumbnails.of(self.dataset, direction.images[direction.query], slot)
            compared.append(ComparedQuery(label, thumbnail, hits))
        return compared

    def _count_confusions(self, method: str, direction: Direction) -> None:
        query_Q, gallery_G = (np.asarray(direction.labels[d]) for d in (direction.query, direction.gallery))
        hit_QK = gallery_G[direction.top(method, slice(None), self.cutoff)]
        shares = self.confused.setdefault(method, {})
        for label in sorted(set(query_Q.tolist())):
            names, counts = np.unique(hit_QK[query_Q == label], return_counts=True)
            percent = (100 * counts / counts.sum()).tolist()
            shares.setdefault(label, []).append(dict(zip(names.tolist(), percent, strict=True)))

    def class_table(self) -> Table | None:
        """P@K of each method and class of the query, mean over directions; None without labels."""
        classes = sorted({label for by_class in self.by_class.values() for label in by_class})
        if not classes:
            return None
        rows = [
            [
                Cell(float(np.mean(by_class[label])), None, 1) if label in by_class else None
                for label in classes
            ]
            for by_class in self.by_class.values()
        ]
        return Table(
            f"P@{self.cutoff} in percent by class of the query, mean over directions, last epoch, one seed",
            classes,
            [
                (row_name(method), ["" if c is None else str(c) for c in cells])
                for method, cells in zip(self.by_class, rows, strict=True)
            ],
            best_rows(rows),
        )

    def confusions(self) -> list[Confusion]:
        """Of the start and the best method, mean over directions."""
        found = []
        for method, shares in self.confused.items():
            classes = sorted(
                {*shares, *(name for parts in shares.values() for part in parts for name in part)}
            )
            number = {label: i for i, label in enumerate(classes)}
            share_CC = np.zeros((len(classes), len(classes)))
            for label, parts in shares.items():
                for part in parts:
                    for name, percent in part.items():
                        share_CC[number[label], number[name]] += percent / len(parts)
            found.append(Confusion(method, classes, share_CC))
        return found


def query_slots(labels: Sequence[str], count: int) -> list[int]:
    """Queries to show: the first image of each class, class after class, the same for every method."""
    by_class = {
        label: [i for i, other in enumerate(labels) if other == label] for label in sorted(set(labels))
    }
    turns = zip(
        *([*slots, *[-1] * (count - len(slots))][:count] for slots in by_class.values()),
        strict=True,
    )
    return [slot for turn in turns for slot in turn if slot >= 0][:count]


def _extremes(ranking: Ranking, before_Q: np.ndarray, after_Q: np.ndarray) -> list[tuple[str, list[int]]]:
    """Queries with a counterpart that gained most, lost most, and are worst, by average precision."""
    slots = np.flatnonzero(ranking.shared_Q)
    gain = (after_Q - before_Q)[slots]
    by_gain = slots[np.argsort(-gain, kind="stable")]
    by_value = slots[np.argsort(after_Q[slots], kind="stable")]
    gained = [int(s) for s in by_gain[:EXTREMES] if after_Q[s] > before_Q[s]]
    lost = [int(s) for s in by_gain[::-1][:EXTREMES] if after_Q[s] < before_Q[s]]
    worst = [int(s) for s in by_value[:EXTREMES]]
    titles = ("most improved", "lost most", "worst")
    return [(title, chosen) for title, chosen in zip(titles, (gained, lost, worst), strict=True) if chosen]


def _kind(query: str, hit: str) -> str:
    if not query or not hit:
        return ""
    return "hit" if query == hit else "miss"
