"""Settings: label spaces and class sizes, and which trainings and directions they make.

``closed``   query and gallery have the same classes; one training of a pair serves both directions.
``partial``  the query's label space is half of the gallery's.
``open``     the gallery's label space is half of the query's: the other queries have no counterpart.
``tailed-R`` as closed, but class sizes in training fall from R to 1, evenly on a logarithmic scale; scored
             on all pictures, so that the ratios can be compared. ``tailed-1`` has equal sizes.

The first three are UEM's (NeurIPS 2024, section 4), the last is for ProtoOT's claim of robustness.

Half is C // 2 of the data set's C classes, or all that every domain has pictures of, if these are fewer. The
drawn classes are those of them whose SHA-256 of ``<seed>/<class>`` comes first, the same for all pairs,
methods and seeds, so that they can be compared; UEM does not publish its draw. The same order is that of the
class sizes, largest first. In ``partial`` and ``open`` the two directions of a pair are two trainings: other
pictures are left. One of ``partial`` is one of ``open`` with query and gallery exchanged.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ucir.config.base import PARAMS_FILE, known_setting
from ucir.config.data import SplitParams
from ucir.data.pack import Picture, read_index, read_info, split_pair
from ucir.errors import UserError, nearest

SHARED = f"{PARAMS_FILE}: split.shared of the data set"


@dataclass(frozen=True)
class LabelSpaces:
    """Classes of query and gallery, sorted; None = all there are, also none at all (``closed``)."""

    query: tuple[str, ...] | None
    gallery: tuple[str, ...] | None
    tail: tuple[str, ...] | None = None
    """Classes by their size in training, largest first; None = all pictures are trained on."""
    ratio: int = 1
    """Size of the first of these to that of the last."""

    def of(self, role: int) -> tuple[str, ...] | None:
        """0: the query's; 1: the gallery's."""
        return (self.query, self.gallery)[role]

    def scored(self, index: Sequence[Picture], role: int) -> list[Picture]:
        """Those pictures of a domain that are query or gallery."""
        space = self.of(role)
        return [picture for picture in index if space is None or picture.label in space]

    def trained(self, index: Sequence[Picture], role: int) -> list[Picture]:
        """Those pictures of a domain that are trained on.

        With a tail, class j of C keeps its first n R^(-j / (C - 1)) pictures by content hash, at least
        one, with the largest n that all classes can give; pictures without a class are left out.
        """
        if self.tail is None:
            return self.scored(index, role)
        there = Counter(picture.label for picture in index if picture.label)
        if not there:
            raise UserError(
                f"setting 'tailed-{self.ratio}' needs class folders in both domains; one has none: "
                "only 'closed' can be run"
            )
        order = [label for label in self.tail if there[label]]
        share = {label: self._size(j, len(order)) for j, label in enumerate(order)}
        most = min(there[label] / share[label] for label in order)
        left = {label: max(1, int(most * share[label] + 1e-9)) for label in order}
        kept = []
        for picture in index:
            if left.get(picture.label, 0):
                left[picture.label] -= 1
                kept.append(picture)
        return kept

    def share(self, role: int, classes: int) -> float:
        """About which share of a domain's pictures is trained on, were all classes equally large."""
        if self.tail is not None:
            return sum(self._size(j, classes) for j in range(classes)) / classes
        space = self.of(role)
        return 1.0 if space is None else len(space) / classes

    def _size(self, j: int, classes: int) -> float:
        return float(self.ratio ** (-j / max(1, classes - 1)))


def check_setting(setting: str) -> None:
    """Raises UserError: it is not one of this module's."""
    try:
        known_setting(setting)
    except ValueError as error:
        raise UserError(str(error)) from None


def label_spaces(setting: str, classes: Sequence[Collection[str]], split: SplitParams) -> LabelSpaces:
    """Who has which classes in a setting.

    Args:
        setting: its name.
        classes: those of each domain; an empty name is no class.
        split: the data set's.

    Raises:
        UserError: an unknown setting; one other than ``closed`` without at least two classes; no class that
            every domain has; in ``split.shared`` all classes, or one that is unknown or not in every domain.
    """
    check_setting(setting)
    if setting == "closed":
        return LabelSpaces(None, None)
    every = sorted(set().union(*classes) - {""})
    if len(every) < 2:
        raise UserError(
            f"setting {setting!r} needs class folders to draw label spaces from; this data set has "
            f"{len(every)}: only 'closed' can be run"
        )
    order = sorted(every, key=lambda label: _drawn(split.seed, label))
    if ratio := tail_ratio(setting):
        return LabelSpaces(None, None, tuple(order), ratio)
    common = set(every).intersection(*classes)
    if not common:
        raise UserError(f"setting {setting!r} needs classes that every domain has: this data set has none")
    shared = split.shared or [label for label in order if label in common][: len(every) // 2]
    for label in shared:
        if label not in every:
            raise UserError(f"{SHARED}: class {label!r} is unknown; {nearest(label, every)}")
        if label not in common:
            raise UserError(
                f"{SHARED}: class {label!r} is not in every domain; these are: {', '.join(sorted(common))}"
            )
    half = tuple(sorted(set(shared)))
    if tuple(every) == half:
        raise UserError(f"{SHARED}: all classes are shared, which is the setting 'closed'")
    return LabelSpaces(half, tuple(every)) if setting == "partial" else LabelSpaces(tuple(every), half)


def pack_spaces(setting: str, pack: Path, split: SplitParams) -> LabelSpaces:
    """Who has which classes of a pack in a setting. Raises UserError: as :func:`label_spaces`."""
    info = read_info(pack)
    if both_ways(setting):
        return label_spaces(setting, [info.classes], split)
    indices = [read_index(pack, domain) for domain in info.counts]
    return label_spaces(setting, [{picture.label for picture in index} for index in indices], split)


def tail_ratio(setting: str) -> int | None:
    """R of ``tailed-R``; None in other settings."""
    name, _, ratio = setting.partition("-")
    return int(ratio) if name == "tailed" else None


def both_ways(setting: str) -> bool:
    """Whether one training serves both directions: query and gallery have the same classes."""
    return setting not in ("partial", "open")


def trainings(setting: str, pairs: Iterable[str], domains: list[str]) -> list[tuple[str, str]]:
    """The domain pairs to train, query first: each pair once, or each of its directions.

    Raises:
        UserError: not two different known domains.
    """
    pairs_in_order: list[tuple[str, str]] = []
    for pair in pairs:
        first, second = split_pair(pair, domains)
        both = pair != f"{first}>{second}"
        if both_ways(setting):
            if (second, first) not in pairs_in_order:
                pairs_in_order.append((first, second))
        else:
            pairs_in_order += [(first, second), (second, first)] if both else [(first, second)]
    return list(dict.fromkeys(pairs_in_order))


def directions(setting: str, pair: tuple[str, str]) -> list[tuple[str, str]]:
    """(query, gallery) that a training of this pair is scored in."""
    return [pair, pair[::-1]] if both_ways(setting) else [pair]


def training_order(setting: str) -> int:
    """1: query and gallery enter training in this order; -1: the other way round.

    So ``partial`` from A to B and ``open`` from B to A, whose pictures are the same, are one training.
    """
    return -1 if setting == "partial" else 1


def _drawn(seed: int, label: str) -> str:
    return hashlib.sha256(f"{seed}/{label}".encode()).hexdigest()
