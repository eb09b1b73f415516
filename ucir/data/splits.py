"""Label spaces of the settings, and which trainings and directions they make (UEM, NeurIPS 2024, section 4).

``closed``   query and gallery have the same classes; one training of a pair serves both directions.
``partial``  the query's label space is half of the gallery's.
``open``     the gallery's label space is half of the query's: the other queries have no counterpart.

Half is C // 2 of the data set's C classes. The drawn classes are those whose SHA-256 of ``<seed>/<class>``
comes first, the same for all pairs, methods and seeds, so that they can be compared. UEM does not publish
its draw. In ``partial`` and ``open`` the two directions of a pair are two trainings: other pictures are left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ucir.config import SplitParams
from ucir.data.pack import split_pair
from ucir.errors import UserError, nearest


@dataclass(frozen=True)
class LabelSpaces:
    """Classes of query and gallery, sorted; None = all there are, also none at all (``closed``)."""

    query: tuple[str, ...] | None
    gallery: tuple[str, ...] | None

    def of(self, role: int) -> tuple[str, ...] | None:
        """0: the query's; 1: the gallery's."""
        return (self.query, self.gallery)[role]


def label_spaces(setting: str, classes: Sequence[str], split: SplitParams) -> LabelSpaces:
    """Who has which classes in a setting.

    Raises:
        UserError: a setting other than ``closed`` without at least two classes; an unknown class in
            ``split.shared``, or all of them.
    """
    if setting == "closed":
        return LabelSpaces(None, None)
    if len(classes) < 2:
        raise UserError(
            f"setting {setting!r} needs class folders to draw label spaces from; this data set has "
            f"{len(classes)}: only 'closed' can be run"
        )
    shared = split.shared or sorted(classes, key=lambda label: _drawn(split.seed, label))[: len(classes) // 2]
    for label in shared:
        if label not in classes:
            raise UserError(f"split.shared: class {label!r} is unknown; {nearest(label, classes)}")
    every, half = tuple(sorted(classes)), tuple(sorted(set(shared)))
    if every == half:
        raise UserError("split.shared: all classes are shared, which is the setting 'closed'")
    return LabelSpaces(half, every) if setting == "partial" else LabelSpaces(every, half)


def trainings(setting: str, pairs: Iterable[str], domains: list[str]) -> list[tuple[str, str]]:
    """The domain pairs to train, query first: each pair once in ``closed``, else each of its directions.

    Raises:
        UserError: not two different known domains.
    """
    found: list[tuple[str, str]] = []
    for pair in pairs:
        first, second = split_pair(pair, domains)
        both = pair != f"{first}>{second}"
        if setting == "closed":
            if (second, first) not in found:
                found.append((first, second))
        else:
            found += [(first, second), (second, first)] if both else [(first, second)]
    return list(dict.fromkeys(found))


def directions(setting: str, pair: tuple[str, str]) -> list[tuple[str, str]]:
    """(query, gallery) that a training of this pair is scored in."""
    return [pair, pair[::-1]] if setting == "closed" else [pair]


def _drawn(seed: int, label: str) -> str:
    return hashlib.sha256(f"{seed}/{label}".encode()).hexdigest()
