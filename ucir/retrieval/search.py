"""Search: pictures in, the most similar pictures of an index out, with a verdict on whether there is any.

>>> from ucir.retrieval.search import Searcher
>>> searcher = Searcher.load("photos.index")
>>> answers = searcher.search(["sketch.png"], k=10)
"""

from __future__ import annotations

import io
import re
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Self

import faiss
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ucir.data.decode import decode_image
from ucir.errors import UserError, nearest
from ucir.models.model import BATCH, Model, Stored, load_model, stored_picture
from ucir.retrieval.index import (
    DATABASE,
    INFO_FILE,
    MODEL_FILE,
    REMEDY,
    IndexInfo,
    default_folder,
    read_index_info,
)
from ucir.retrieval.knn import exact_neighbours

OUTLINE, COLOURS = 0.15, 14.0
"""What near duplicates may differ in: share of the outline's bits, mean of the colours' 255. On PACS (1,500
pictures a domain) 94 to 100 % of pictures that were scaled or compressed anew are known, and of a million
pairs of others 0 to 2 of photos, paintings or cartoons and 11 of sketches are taken for duplicates."""
LOOK = 80
"""Bytes of a look."""
FLAT = 8
"""Bits of an outline below which it says nothing."""

Query = str | Path | Image.Image | np.ndarray
"""A picture: its file, or its pixels, uint8 RGB (height, width, 3)."""


@dataclass(frozen=True)
class Hit:
    """A picture of the index."""

    rank: int
    """From 1."""
    score: float
    """Cosine."""
    path: str
    """Below the collection, with '/'."""
    id: str
    """Of its content, hexadecimal."""
    duplicates: tuple[str, ...] = ()
    """Paths of near duplicates that are hidden behind it."""


@dataclass(frozen=True)
class Answer:
    """What a query found."""

    hits: tuple[Hit, ...]
    accepted: bool | None
    """Whether anything is like it; None where no limit is known."""
    reason: str
    """In words."""


class Searcher:
    """An open index with its model; may be used from several threads.

    Args:
        folder: of the index.
        info: what stands in it.
        model: that it was made with.
    """

    def __init__(self, folder: Path, info: IndexInfo, model: Model) -> None:
        self.folder, self.info, self.model = folder, info, model
        try:
            self.rows_ND = np.load(folder / f"rows-{info.state}.npy", mmap_mode="r")
            self.id_N = np.load(folder / f"ids-{info.state}.npy")
            flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
            file = folder / f"ivf-{info.state}.faiss"
            self.inverted = faiss.read_index(str(file), flags) if info.kind == "ivf" else None
        except (FileNotFoundError, RuntimeError):
            raise UserError(f"{folder}: incomplete: `uv run ucir index {info.source}` mends it") from None
        except (ValueError, EOFError) as error:
            raise UserError(f"{folder}: damaged ({error}): {REMEDY}") from None
        self.by_thread = threading.local()
        self.rows_below = lru_cache(8)(self._rows_below)
        try:
            self.folders()  # reads all of the table
        except sqlite3.DatabaseError as error:
            raise UserError(f"{folder}: damaged ({error}): {REMEDY}") from None

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """Open an index.

        Args:
            path: its folder, or the collection beside which it lies.
            device: where queries pass through the model.

        Raises:
            UserError: no index there, or an unfinished one.
        """
        folder = index_folder(Path(path))
        info = read_index_info(folder)
        return cls(folder, info, load_model(folder / MODEL_FILE, device))

    def renewed(self) -> Self:
        """The index as it is now: this very object where nothing has changed.

        Raises:
            UserError: as :meth:`load`.
        """
        info = read_index_info(self.folder)
        if info == self.info:
            return self
        if info.model_digest != self.info.model_digest:
            return self.load(self.folder, self.model.encoder.device)
        return type(self)(self.folder, info, self.model)

    def search(
        self,
        images: Sequence[Query] | Query,
        k: int = 10,
        *,
        below: str | None = None,
        hide_duplicates: bool = False,
        domain: str | None = None,
        limit: float | None = None,
        expand: int = 0,
    ) -> list[Answer]:
        """The most similar pictures for each query.

        Args:
            images: one or more.
            k: hits of each, at least 1.
            below: only pictures in this folder of the collection.
            hide_duplicates: of near duplicates show the most similar.
            domain: of the queries, one of the model's; None: that whose centre is the nearest.
            limit: 1 - cosine beyond which nothing is like a query; None: those of the index, see
                :meth:`embed`.
            expand: take the mean of a query and so many of its nearest pictures, and search with that.

        Raises:
            UserError: a query that is no picture; an unknown folder or domain.
        """
        several: Sequence[Query] = images if isinstance(images, list | tuple) else [images]  # type: ignore[list-item]
        pack = self.model.pack
        seen, limits = self.embed(
            [stored_picture(open_query(query, pack.max_pixels), pack) for query in several], domain
        )
        if limit is not None:
            limits = [limit] * len(seen)
        return self.search_features(
            seen, limits, k, below=below, hide_duplicates=hide_duplicates, expand=expand
        )

    def embed(
        self, pictures: Sequence[Stored], domain: str | None = None
    ) -> tuple[np.ndarray, list[float | None]]:
        """Queries through the model: unit features (Q, D), float32, and the limit of each.

        It is that of the domain that a picture is taken for; the widest, where the index has none for it or
        the model cannot tell; None where there is none at all.

        Args:
            pictures: what :func:`ucir.models.model.stored_picture` returns, at least one.
            domain: as of :meth:`search`.
        """
        self.model.check_domain(domain)
        firsts = range(0, len(pictures), BATCH)
        parts = [self.model.embed_queries(pictures[i : i + BATCH], domain) for i in firsts]
        widest = max(self.info.limits.values(), default=None)
        limits = [self.info.limits.get(of or "", widest) for _, taken in parts for of in taken]
        return torch.cat([features for features, _ in parts]).numpy(), limits

    def search_features(
        self,
        queries_QD: np.ndarray,
        limits: Sequence[float | None],
        k: int = 10,
        *,
        below: str | None = None,
        hide_duplicates: bool = False,
        expand: int = 0,
    ) -> list[Answer]:
        """As :meth:`search`, of what :meth:`embed` returns."""
        return self._search(queries_QD, k, below, hide_duplicates, limits, expand)

    def _search(
        self,
        queries_QD: np.ndarray,
        k: int,
        below: str | None,
        hide_duplicates: bool,
        limits: Sequence[float | None],
        expand: int = 0,
        without: bytes | None = None,
    ) -> list[Answer]:
        """The same, ``without`` pictures of this hash."""
        if k < 1:
            raise UserError(f"k = {k}: at least 1")
        features = queries_QD
        if expand:
            near = self._neighbours(features, expand, below)[1]
            mean = features + sum(self.rows_ND[near[:, place]] for place in range(near.shape[1]))
            features = F.normalize(torch.from_numpy(mean), dim=1).numpy()
        depth = 2 * k + 8 if hide_duplicates or without else k
        while True:
            scores, rows = self._neighbours(features, depth, below)
            hits = [
                self._hits(*found, k, hide_duplicates, without) for found in zip(scores, rows, strict=True)
            ]
            if rows.shape[1] < depth or all(len(of_query) == k for of_query in hits):
                break
            depth *= 4
        nearest_Q = 1 - (self._neighbours(queries_QD, 1, below)[0] if expand else scores)[:, 0]
        return [
            Answer(of_query, *_verdict(max(0.0, float(distance)), limit))  # rounding may leave -1e-7
            for of_query, distance, limit in zip(hits, nearest_Q, limits, strict=True)
        ]

    def like(
        self, picture: str, k: int = 10, *, below: str | None = None, hide_duplicates: bool = False
    ) -> Answer:
        """Pictures like one of the index, but for itself and its copies; it needs not be looked at again.

        Args:
            picture: its path below the collection, or its id.
            k, below, hide_duplicates: as of :meth:`search`.

        Raises:
            UserError: no such picture in the index.
        """
        digest, stored = self._known(picture)
        feature = np.frombuffer(stored, np.float32)[None]
        (answer,) = self._search(feature, k, below, hide_duplicates, [None], without=digest)
        return Answer(answer.hits, None, f"like {picture}")

    def thumbnail(self, id: str) -> bytes:
        """A picture's small form, JPEG. Raises UserError: no such picture, or none was kept."""
        try:
            digest = bytes.fromhex(id)
        except ValueError:
            digest = b""
        row = self._database().execute("SELECT thumbnail FROM picture WHERE sha256 = ?", (digest,)).fetchone()
        if row is None or not row[0]:
            raise UserError(f"{id}: no thumbnail of such a picture")
        return bytes(row[0])

    def picture(self, picture: str) -> Image.Image:
        """A picture of the index by path or id, small. Raises UserError: as :meth:`thumbnail`."""
        digest, _ = self._known(picture)
        return Image.open(io.BytesIO(self.thumbnail(digest.hex())))

    def _known(self, picture: str) -> tuple[bytes, bytes]:
        """Hash and features of a picture of the index, by path or id."""
        is_id = re.fullmatch(r"[0-9a-f]{64}", picture) is not None
        row = (
            self._database()
            .execute(
                "SELECT sha256, feature FROM file JOIN picture USING (sha256) "
                f"WHERE {'sha256' if is_id else 'path'} = ?",
                (bytes.fromhex(picture) if is_id else picture,),
            )
            .fetchone()
        )
        if row is None:
            raise UserError(f"{picture}: no such picture in this index")
        return row  # type: ignore[no-any-return]

    def _neighbours(
        self, features: np.ndarray, count: int, below: str | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows, best first, (Q, at most count)."""
        chosen, rows = self.rows_below(below) if below else (None, self.rows_ND)
        count = min(count, len(rows))
        if self.inverted is not None and count <= 0.1 * len(rows):
            selector = None if chosen is None else faiss.IDSelectorBatch(self.id_N[chosen])
            search = faiss.SearchParametersIVF(nprobe=self.info.probes, sel=selector)  # type: ignore[call-arg]
            scores, ids = self.inverted.search(features, count, params=search)
            if (ids >= 0).all():  # else too few in the cells that were looked into
                order = self._by_id
                return scores, order[np.searchsorted(self.id_N, ids, sorter=order)]
        scores, places = exact_neighbours(features, rows, count)
        return scores, places if chosen is None else chosen[places]

    @cached_property
    def _by_id(self) -> np.ndarray:
        """Rows in the order of their files' ids."""
        return np.argsort(self.id_N)

    def _rows_below(self, folder: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the pictures in a folder, and their features."""
        plain = folder.strip("/")
        end = plain + chr(ord("/") + 1)
        ids = (
            self._database()
            .execute("SELECT id FROM file WHERE path > ? AND path < ? AND fault IS NULL", (plain + "/", end))
            .fetchall()
        )
        rows = np.flatnonzero(np.isin(self.id_N, np.array(ids, np.int64).ravel()))
        if not len(rows):
            known = self.folders()
            hint = nearest(plain, known) if known else "its pictures lie in no folders"
            raise UserError(f"{folder!r}: no folder of this index; {hint}")
        return rows, np.ascontiguousarray(self.rows_ND[rows])

    def folders(self) -> list[str]:
        """Folders directly below the collection that hold pictures."""
        found = self._database().execute(
            "SELECT DISTINCT substr(path, 1, instr(path, '/') - 1) FROM file WHERE fault IS NULL ORDER BY 1"
        )
        return [name for (name,) in found if name]

    def _hits(
        self, scores: np.ndarray, rows: np.ndarray, k: int, hide: bool, without: bytes | None
    ) -> tuple[Hit, ...]:
        hits: list[Hit] = []
        looks = np.empty((k, LOOK), np.uint8)
        for score, file in zip(scores, self._files(rows), strict=True):
            if file is None or file[1] == without:
                continue
            path, digest, look = file
            seen = np.frombuffer(look, np.uint8)
            if hide and (twin := _twin(seen, looks[: len(hits)])) is not None:
                hits[twin] = replace(hits[twin], duplicates=(*hits[twin].duplicates, path))
            elif len(hits) < k:
                looks[len(hits)] = seen
                hits.append(Hit(len(hits) + 1, float(score), path, digest.hex()))
        return tuple(hits)

    def _files(self, rows: np.ndarray) -> list[tuple[str, bytes, bytes] | None]:
        """Path, hash and look of rows; None of files that an update under way has taken out."""
        ids = [int(number) for number in self.id_N[rows]]
        known: dict[int, tuple[str, bytes, bytes]] = {}
        for first in range(0, len(ids), 10_000):  # SQLite takes some 32,000 values at once
            part = ids[first : first + 10_000]
            found = self._database().execute(
                "SELECT id, path, sha256, look FROM file JOIN picture USING (sha256) "
                f"WHERE id IN ({','.join('?' * len(part))})",
                part,
            )
            known.update({number: (path, digest, look) for number, path, digest, look in found})
        return [known.get(number) for number in ids]

    def _database(self) -> sqlite3.Connection:
        """This thread's connection."""
        if not hasattr(self.by_thread, "database"):
            address = (self.folder / DATABASE).resolve().as_uri() + "?mode=ro"
            self.by_thread.database = sqlite3.connect(address, uri=True, timeout=60)
        return self.by_thread.database  # type: ignore[no-any-return]


def _verdict(distance: float, limit: float | None) -> tuple[bool | None, str]:
    told = f"nearest at distance {distance:.2f}"
    if limit is None:
        return None, f"{told}; no limit is known to this index"
    if np.isnan(limit):
        raise UserError("limit nan: no number")
    if distance > limit:
        return False, f"nothing like it here: {told}, beyond the limit {limit:.2f}"
    return True, f"{told}, within the limit {limit:.2f}"


def _twin(look: np.ndarray, others: np.ndarray) -> int | None:
    """The first of other pictures that one is a near duplicate of, by :func:`ucir.retrieval.index.look`."""
    if not len(others):
        return None
    outlines, colours = others[:, :32], others[:, 32:].astype(np.int16)
    either = np.bitwise_count(outlines | look[:32]).sum(axis=1)
    differ = np.bitwise_count(outlines ^ look[:32]).sum(axis=1)
    alike = (differ <= OUTLINE * either) & (either >= FLAT)
    alike &= np.abs(colours - look[32:]).mean(axis=1) <= COLOURS
    twins = np.flatnonzero(alike | (others == look).all(axis=1))
    return int(twins[0]) if len(twins) else None


def index_folder(path: Path) -> Path:
    """The index that is meant by its own folder or by the collection beside which it lies."""
    beside = default_folder(path)
    return beside if not (path / INFO_FILE).exists() and beside.is_dir() else path


def only_index() -> Path:
    """The one index in this folder. Raises UserError: there is none, or several."""
    there = sorted(file.parent for file in Path().glob("*.index/index.json"))
    if len(there) == 1:
        return there[0]
    named = ", ".join(map(str, there)) or "none is here: `uv run ucir index <pictures>` makes one"
    raise UserError(f"--index: name one; {named}")


def open_query(query: Query, max_pixels: int) -> Image.Image:
    """A query's picture, upright RGB. Raises UserError: no such file, or no picture."""
    if isinstance(query, np.ndarray):
        return Image.fromarray(query).convert("RGB")
    if isinstance(query, Image.Image):
        return query.convert("RGB")
    try:
        return decode_image(Path(query).read_bytes(), max_pixels)
    except (OSError, ValueError) as error:
        raise UserError(f"{query}: {getattr(error, 'strerror', None) or error}") from None
