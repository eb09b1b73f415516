"""A feature pack: pooled features of a frozen trunk, of each picture of a pack; made by
:mod:`ucir.models.embedding`.

Layout, ``data/features/<dataset>/``:

- ``<domain>.plain.f16``  features of the evaluation view, float16 of shape (N, P)
- ``<domain>.views.f16``  those of V random views of each picture, float16 of shape (N, V, P)
- ``<domain>.sha256``     content hashes of the pictures, a line each, in the pack's order of slots
- ``features.json``       what they are of: key, P, V, counts

``<dataset>.unfinished/`` beside it holds the same, and in ``<domain>.done`` which rows are there already.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ucir.data.pack import Picture
from ucir.errors import UserError

FILE = "features.json"
KINDS = ("plain", "views")


@dataclass(frozen=True)
class FeaturePackInfo:
    """``features.json``."""

    key: str
    """Hash of all that the features depend on but the pictures: weights, views, code."""
    pooled_dim: int
    views: int
    """V; 0 where the trunk is trained and nothing is stored."""
    counts: dict[str, int]

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class DomainFeatures:
    """What training sees of a domain whose trunk is frozen."""

    name: str
    plain_MP: np.ndarray
    """Of all pictures of the domain's pack, float16, memory-mapped."""
    views_MVP: np.ndarray
    row_N: np.ndarray
    """The pack's rows that take part, int64."""

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def pooled_dim(self) -> int:
        return int(self.plain_MP.shape[1])


def read_feature_info(folder: Path) -> FeaturePackInfo:
    """``features.json`` of a finished feature pack.

    Raises:
        UserError: there is none.
    """
    try:
        return FeaturePackInfo(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, TypeError, ValueError):
        raise UserError(f"{folder}: no finished features; run `uv run dvc repro embed` first") from None


def open_features(folder: Path, domain: str, index: Sequence[Picture]) -> DomainFeatures:
    """Memory-map a domain's features for training.

    Args:
        folder: of the feature pack.
        domain: name.
        index: the pictures that take part.

    Raises:
        UserError: there are none, or not of all these pictures.
    """
    info = read_feature_info(folder)
    row_N = np.array([picture.slot for picture in index], np.int64)
    hashes = read_hashes(folder, domain) if info.counts.get(domain) else []
    if any(picture.slot >= len(hashes) or hashes[picture.slot] != picture.sha256 for picture in index):
        raise UserError(
            f"{folder}: the features of domain {domain} are of other pictures; run `uv run dvc repro embed`"
        )
    plain, views = (map_features(folder, domain, kind, info, "r") for kind in KINDS)
    return DomainFeatures(domain, plain, views, row_N)


def read_hashes(folder: Path, domain: str) -> list[str]:
    """``<domain>.sha256``: content hashes by slot; none where there is no such file."""
    file = folder / f"{domain}.sha256"
    return file.read_text().split() if file.exists() else []


def map_features(folder: Path, domain: str, kind: str, info: FeaturePackInfo, mode: str) -> np.ndarray:
    """``<domain>.<kind>.f16``, memory-mapped; ``mode`` as of ``np.memmap``."""
    count = info.counts[domain]
    shape = (count, info.pooled_dim) if kind == "plain" else (count, info.views, info.pooled_dim)
    return np.memmap(folder / f"{domain}.{kind}.f16", np.float16, mode, shape=shape)  # type: ignore[call-overload,no-any-return]
