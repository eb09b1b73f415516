"""A pack: one uint8 array per domain plus an index table; made by :mod:`ucir.data.prepare`.

Layout, ``data/packs/<dataset>/``:

- ``<domain>.u8``   the pictures, uint8 of shape (N, side, side, 3)
- ``<domain>.csv``  one line a picture: slot, path, class, width, height, sha256 of the file
- ``check/``        ``counts.csv``: found, left out and expected pictures by domain and class;
  ``duplicates.csv``: files with the same content, within a domain or across domains;
  ``quarantine.csv``: files left out, with the reason
- ``pack.json``     side, fit, domains, counts, classes, fingerprints
- ``unfinished/``   what a killed attempt had decoded; gone when the pack is finished

The slots are sorted by content hash, so that neither the order of files nor the names of classes can
reach training: methods that look at slot numbers would otherwise see class after class.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ucir.errors import UserError, nearest

INDEX_COLUMNS = ("slot", "path", "class", "width", "height", "sha256")

Fit = Literal["squash", "crop", "letterbox"]


@dataclass(frozen=True)
class Picture:
    """One line of a domain's index."""

    slot: int
    path: str
    label: str
    """Class; empty when there are no class folders."""
    width: int
    height: int
    sha256: str


@dataclass(frozen=True)
class DomainImages:
    """What training may see of a domain: pixels and original sizes, no names and no classes."""

    name: str
    stored_MSS3: np.ndarray
    """All pictures of the domain's pack, uint8, memory-mapped."""
    row_N: np.ndarray
    """The pack's rows that take part, int64: all of them, or those of a setting."""
    size_N2: np.ndarray
    """Width and height of the stored region in the original picture."""

    def __len__(self) -> int:
        return len(self.row_N)

    def pixels(self, slots: np.ndarray | slice) -> np.ndarray:
        """The pictures in these slots (0 .. N - 1), uint8 (B, S, S, 3), a copy."""
        return np.ascontiguousarray(self.stored_MSS3[self.row_N[slots]])


@dataclass(frozen=True)
class PackInfo:
    """``pack.json``."""

    side: int
    fit: Fit
    decoder: str
    """Version of the code that made the pixels."""
    counts: dict[str, int]
    classes: list[str]
    """All classes of all domains, sorted; none without labels."""
    fingerprints: dict[str, str]


def split_pair(pair: str, domains: list[str]) -> tuple[str, str]:
    """``Art-Real`` or ``Art>Real`` to its two domains, which may themselves hold hyphens.

    Raises:
        UserError: not two different known domains joined by a hyphen.
    """
    for first in domains:
        second = pair.removeprefix(first)[1:]
        if pair in (f"{first}-{second}", f"{first}>{second}") and second in domains and second != first:
            return first, second
    cuts = [(pair[:i], pair[i + 1 :]) for i, c in enumerate(pair) if c in "->"]
    wrong = [name for cut in cuts if set(cut) & set(domains) for name in cut if name and name not in domains]
    if wrong:
        raise UserError(f"pair {pair!r}: no domain {wrong[0]!r}; {nearest(wrong[0], domains)}")
    raise UserError(
        f"pair {pair!r} is not two different domains joined by '-' or '>'; "
        f"the domains are {', '.join(domains)}"
    )


def read_info(pack: Path, name: str = "pack.json") -> PackInfo:
    """``pack.json`` of a finished pack.

    Raises:
        UserError: there is none, or a file of it is missing or cut off.
    """
    try:
        info = PackInfo(**json.loads((pack / name).read_text(encoding="utf-8")))
    except (FileNotFoundError, TypeError, ValueError):
        raise UserError(
            f"{pack}: no finished pack; run `uv run dvc repro prepare` first (in a study with this data set: "
            "`uv run ucir study`)"
        ) from None
    for domain, count in info.counts.items():
        pixels, index = pack / f"{domain}.u8", pack / f"{domain}.csv"
        if not index.exists() or not pixels.exists() or pixels.stat().st_size != count * info.side**2 * 3:
            raise UserError(
                f"{pack}: incomplete: the files of domain {domain} are missing or cut off; "
                "run `uv run dvc repro prepare`"
            )
    return info


def open_domain(pack: Path, domain: str, index: Sequence[Picture] | None = None) -> DomainImages:
    """Memory-map a domain's pictures for training: no class reaches the caller.

    Args:
        pack: folder of the pack.
        domain: name.
        index: those that take part in a setting; None = all pictures.
    """
    info = read_info(pack)
    index = read_index(pack, domain) if index is None else index
    row_N = np.array([picture.slot for picture in index], np.int64)
    sizes = [stored_size((picture.width, picture.height), info.fit) for picture in index]
    size_N2 = np.array(sizes, np.int64).reshape(-1, 2)
    return DomainImages(
        domain, map_rows(pack / f"{domain}.u8", info.counts[domain], info.side), row_N, size_N2
    )


def stored_size(size: tuple[int, int], fit: Fit) -> tuple[int, int]:
    """Width and height of the region of a picture that is stored: all of it, or a square."""
    if fit == "squash":
        return size
    side = min(size) if fit == "crop" else max(size)
    return side, side


def map_rows(path: Path, count: int, side: int) -> np.ndarray:
    """Stored pictures, uint8 (count, side, side, 3), read-only."""
    shape = (count, side, side, 3)
    return np.memmap(path, np.uint8, "r", shape=shape) if count else np.empty(shape, np.uint8)


def read_index(pack: Path, domain: str) -> list[Picture]:
    """A domain's index in slot order; for splits, evaluation and reports."""
    with (pack / f"{domain}.csv").open(newline="", encoding="utf-8") as file:
        return [
            Picture(
                int(row["slot"]),
                row["path"],
                row["class"],
                int(row["width"]),
                int(row["height"]),
                row["sha256"],
            )
            for row in csv.DictReader(file)
        ]
