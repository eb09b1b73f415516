"""An index: a collection's features, ready for search, kept up to date with its pictures.

A folder, ``photos.index/`` beside ``photos/`` unless told otherwise:

- ``index.json``         what stands in it; written last: a reader finds a whole index, or the one before
- ``pictures.sqlite``    by content hash: sizes, features, a thumbnail; by path: the content; files left out.
  What a killed attempt has done is kept here
- ``rows-<state>.npy``   the features, float32 (N, D), in the order of paths, memory-mapped
- ``ids-<state>.npy``    of each row the file's number in ``pictures.sqlite``, int64
- ``ivf-<state>.faiss``  of a large collection: faiss's inverted file, ids as above
- ``model.pt``           the model that made the features, which queries pass through as well

A picture's features depend on its content and the model alone, so that an index that was brought up to date
is equal to one built anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sqlite3
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import torch
from PIL import Image

from ucir.config.load import parse_yaml
from ucir.data.decode import decode_image
from ucir.data.pack import map_rows, read_index, read_info
from ucir.data.source import NO_PICTURES, Source
from ucir.errors import UserError
from ucir.models.embedding import one_thread_a_core
from ucir.models.model import Model, save_model, stored_picture
from ucir.paths import check_writable, locked, write_atomically
from ucir.progress import counted
from ucir.retrieval.gate import FALSE_REJECTIONS, OPPOSITE, calibrated_limit, fewest_queries
from ucir.retrieval.knn import RECALL_DEPTHS, add_rows, exact_neighbours, fewest_probes, held_ids, learn_cells

FORMAT = 1
BATCH = 32
"""Pictures that pass through the network at once. Batches are filled up to it: the same picture then gets the
same features to the last bit, whatever stands beside it."""
THUMBNAIL = 192
"""Pixels of a thumbnail's longer side."""
EXACT_UP_TO = 200_000
"""Pictures up to which all of them are compared with a query: milliseconds."""
RECALL_QUERIES = 256
SAME = 1e-4
"""1 - cosine of a picture and itself, whose features were kept in float16."""
LISTED = 10
"""Files left out that are named at the end; all are in the database."""
SAMPLES = 1000
"""Pictures that a limit is learnt from: enough for a quantile to a percent."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS picture (
    sha256 BLOB PRIMARY KEY, width INTEGER, height INTEGER, feature BLOB, thumbnail BLOB, look BLOB
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS file (
    id INTEGER PRIMARY KEY, path TEXT UNIQUE, stamp TEXT, sha256 BLOB, fault TEXT
);
CREATE TABLE IF NOT EXISTS made_by (model TEXT, domain TEXT);
CREATE TABLE IF NOT EXISTS query (domain TEXT, feature BLOB);
"""


@dataclass(frozen=True)
class IndexInfo:
    """``index.json``."""

    format: int
    source: str
    """Where the pictures lay, absolute."""
    model: str
    """Its name, for people."""
    model_digest: str
    """sha256 of the weights and of how pictures come to them."""
    domain: str | None
    """As pictures of which of the model's domains the collection was seen; None: each of the nearest."""
    state: str
    """Changes with any picture; part of the files' names."""
    count: int
    """Pictures, without those left out."""
    bad: int
    """Files left out."""
    dim: int
    kind: str
    """``exact``: all pictures are compared; ``ivf``: those of the nearest cells of an inverted file."""
    cells: int = 0
    probes: int = 0
    """Cells that a query looks into."""
    learnt_from: int = 0
    """Pictures that there were when the cells were learnt."""
    recall: dict[str, float] = field(default_factory=dict)
    """By depth: share of hits at least as near as the true k-th, measured on ``recall_queries``."""
    recall_queries: str = ""
    limits: dict[str, float] = field(default_factory=dict)
    """By the query's domain: 1 - cosine of the nearest picture beyond which nothing is like a query."""
    false_rejections: float = FALSE_REJECTIONS
    """Share of pictures like those that the limits are learnt from which they reject."""
    notes: list[str] = field(default_factory=list)
    """What of the collection could not be seen, or is doubtful, one line each."""


@dataclass(frozen=True)
class Embedded:
    """A picture as the index keeps it."""

    sha256: bytes
    width: int
    height: int
    feature: bytes
    """float32."""
    thumbnail: bytes
    """JPEG."""
    look: bytes
    """See :func:`look`."""


@dataclass(frozen=True)
class StoredPicture:
    """A picture of a pack."""

    sha256: bytes
    """Of the file that it was decoded from."""
    square: np.ndarray
    width: int
    height: int


File = tuple[str, Callable[[], bytes | StoredPicture]]
"""A path within the collection, and what reads it, in any thread."""
Outcome = Embedded | bytes | str
"""A picture; the hash of one that is known already; or why the file is left out."""


class Compute(Protocol):
    """Where files are read and embedded, in any order; see :func:`embed_files`."""

    def __call__(
        self, files: Iterator[File], known: Collection[bytes]
    ) -> Iterator[list[tuple[str, Outcome]]]: ...


@dataclass(frozen=True)
class FileEmbedder:
    """Reads files and embeds them, a batch at a time; picklable."""

    model: Model
    domain: str | None
    thumbnails: bool = True

    def __call__(self, batch: Sequence[File], known: Collection[bytes]) -> list[tuple[str, Outcome]]:
        """Up to BATCH files, by path and how to read them."""
        outcomes: list[tuple[str, Outcome]] = []
        waiting: list[tuple[int, bytes, Image.Image, tuple[int, int]]] = []
        for path, read in batch:
            try:
                data = read()
                if isinstance(data, StoredPicture):
                    digest, size = data.sha256, (data.width, data.height)
                    image = None if digest in known else Image.fromarray(data.square)
                else:
                    digest = hashlib.sha256(data).digest()
                    image = None if digest in known else decode_image(data, self.model.pack.max_pixels)
                    size = image.size if image else (0, 0)
                if image:
                    waiting.append((len(outcomes), digest, image, size))
                outcomes.append((path, digest))
            except (OSError, ValueError) as error:
                outcomes.append((path, str(error)))
        if waiting:
            features = self._features([(image, size) for _, _, image, size in waiting])
            for (place, digest, image, size), feature in zip(waiting, features, strict=True):
                path = outcomes[place][0]
                outcomes[place] = (path, self._embedded(digest, image, size, feature))
        return outcomes

    def _features(self, images: list[tuple[Image.Image, tuple[int, int]]]) -> np.ndarray:
        pictures = [stored_picture(image, self.model.pack, size) for image, size in images]
        square, size = pictures[0]
        spare = [(np.zeros_like(square), size)] * (BATCH - len(images))
        return self.model.embed([*pictures, *spare], self.domain)[: len(images)].numpy()

    def _embedded(
        self, digest: bytes, image: Image.Image, size: tuple[int, int], feature: np.ndarray
    ) -> Embedded | str:
        if not np.isfinite(feature).all():
            return "the network's features of it are not finite"
        thumbnail = image.copy()
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC, reducing_gap=2)
        jpeg = io.BytesIO()
        if self.thumbnails:
            thumbnail.save(jpeg, "jpeg", quality=82)
        return Embedded(digest, *size, feature.tobytes(), jpeg.getvalue(), look(thumbnail))


def look(image: Image.Image) -> bytes:
    """What near duplicates are known by, 80 bytes: hardly changed by scaling or compression.

    First where it becomes brighter to the right, 16 x 16 bits: the difference hash of N. Krawetz, with a
    margin, so that a flat ground is 0 whatever its noise. Then its colours, 4 x 4 x 3 bytes.
    """
    grey = np.asarray(image.convert("L").resize((17, 16), Image.Resampling.BOX), np.int16)
    colours = np.asarray(image.resize((4, 4), Image.Resampling.BOX), np.uint8)
    return np.packbits(grey[:, 1:] > grey[:, :-1] + 4).tobytes() + colours.tobytes()


def embed_files(embedder: FileEmbedder) -> Compute:
    """In this process, one batch on each core; beside a GPU, too, as that is where files are decoded."""

    def compute(files: Iterator[File], known: Collection[bytes]) -> Iterator[list[tuple[str, Outcome]]]:
        pool, threads = one_thread_a_core("cpu")
        ahead: deque[Future[list[tuple[str, Outcome]]]] = deque()
        try:
            while batch := list(islice(files, BATCH)):
                ahead.append(pool.submit(embedder, batch, known))
                if len(ahead) > 2 * threads:  # bounds what waits in memory
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    return compute


def check_collection(source: Path) -> None:
    """Raises UserError: there is none."""
    if not source.exists():
        raise UserError(f"{source}: no such folder or archive")


def default_folder(source: Path) -> Path:
    """Beside the collection: ``photos.index``."""
    source = source.resolve()
    return source.with_name(f"{source.name}.index")


def check_folder(folder: Path) -> None:
    """Refuse what `dvc repro` would remove: it leaves in a stage's output what the stage made alone.

    Raises:
        UserError: the folder lies in an output that the `dvc.lock` above it names.
    """
    folder = folder.resolve()
    for project in folder.parents:
        if (lock := project / "dvc.lock").exists():
            stages = parse_yaml(lock).get("stages", {}).values()
            made = [project / out["path"] for stage in stages for out in stage.get("outs", ())]
            if within := next((path for path in made if folder.is_relative_to(path)), None):
                raise UserError(
                    f"{folder}: `uv run dvc repro` makes {within} and removes what else lies there: "
                    "name another folder with --out"
                )
            return


def update_index(
    source: Path,
    out: Path,
    model: Model,
    domain: str | None = None,
    compute: Callable[[FileEmbedder], Compute] = embed_files,
    progress: Callable[[int, int], None] = lambda done, total: None,
    thumbnails: bool = True,
    query_features: Mapping[str, torch.Tensor] | None = None,
    false_rejections: float | None = None,
    rebuild: bool = False,
) -> IndexInfo:
    """Make an index, or bring it up to date: what its files show to be the same is not read again.

    Args:
        source: a folder, an archive, or a pack.
        out: folder of the index.
        model: an index has one for good.
        domain: as pictures of which of the model's domains the collection is seen; None: each of the nearest.
        compute: where files are embedded.
        progress: called with files done, and files in all.
        thumbnails: whether they are kept; a page of hits needs them.
        query_features: unit features (Q, D) of pictures like those that will be asked with, by domain: what
            the limits are learnt from, now and later; those given before, or that the model brings, if None.
        false_rejections: share of such pictures that the limits reject, now and later; between 0 and 1. What
            was given before, or :data:`FALSE_REJECTIONS`, if None.
        rebuild: make it anew, in ``<out>.new`` until it takes the other's place; a killed attempt goes on.

    Raises:
        UserError: no such collection, or no picture in it; ``out`` is something else; the index is of another
            model or of another version; another process writes it; the disk is full. What was done is kept.
    """
    if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {out}: lies in the collection, whose pictures it is not: put it beside")
    _index_files(out)
    if rebuild:
        queries, share = _choices(out, model)
        anew = _folder_anew(out, model, domain)
        given = (query_features or queries, false_rejections or share)
        info = update_index(source, anew, model, domain, compute, progress, thumbnails, *given)
        _take_place(anew, out)
        return info
    files, reads, notes = _collection(source, model)
    if not files:
        raise UserError(f"{source}: no picture in it: give a folder of picture files")
    check_writable(out)
    digest = model.digest()
    alone = locked(out / "lock", f"{out}: another process is writing this index")
    with alone, _database(out) as database:
        _check_maker(out, database, digest, domain)
        if not (out / MODEL_FILE).exists():
            save_model(model.whole(), out / MODEL_FILE)
        _take_up(database, files, reads, compute(FileEmbedder(model, domain, thumbnails)), progress)
        bad = database.execute("SELECT count(*) FROM file WHERE fault IS NOT NULL").fetchone()[0]
        count = database.execute("SELECT count(*) FROM file WHERE fault IS NULL").fetchone()[0]
        if not count:
            raise UserError(f"{source}: no picture in it{_first_fault(database)}")
        state = _state(database, digest)
        before = read_index_info(out) if (out / INFO_FILE).exists() else None
        samples = _query_features(database, query_features, model)
        rows, ids = _write_rows(out, database, state, count, model.dim)
        info = IndexInfo(
            FORMAT,
            str(source.resolve()),
            model.name,
            digest,
            domain,
            state,
            count,
            bad,
            model.dim,
            "exact",
            recall={str(depth): 1.0 for depth in RECALL_DEPTHS},
            recall_queries="all are compared",
            notes=notes,
        )
        info = _with_cells(out, info, before, rows, ids, samples)
        if false_rejections is None:
            false_rejections = before.false_rejections if before else FALSE_REJECTIONS
        learnt = (state, false_rejections)
        if before and query_features is None and (before.state, before.false_rejections) == learnt:
            limits = before.limits
        else:
            limits = _limits(rows, samples, false_rejections)
        info = replace(info, limits=limits, false_rejections=false_rejections)
        write_atomically(json.dumps(asdict(info), indent=1) + "\n", out / INFO_FILE)
    for old in (*out.glob("rows-*"), *out.glob("ids-*"), *out.glob("ivf-*")):
        if state not in old.name:
            old.unlink()
    return info


def sample_features(model: Model, source: Path, count: int = SAMPLES) -> torch.Tensor:
    """Unit features (n, D) of some pictures of a collection, for limits.

    Raises:
        UserError: no such collection, or no picture in it.
    """
    files, read, _ = _collection(source, model)
    chosen = sorted(files, key=lambda path: hashlib.sha256(path.encode()).digest())[:count]
    outcomes = [
        one for part in embed_files(FileEmbedder(model, None, False))(read(chosen), ()) for one in part
    ]
    rows = [np.frombuffer(o.feature, np.float32) for _, o in outcomes if isinstance(o, Embedded)]
    if not rows:
        raise UserError(f"{source}: no picture in it: give a folder of picture files")
    return torch.from_numpy(np.stack(rows))


REMEDY = "make it anew with `uv run ucir index <pictures> --rebuild`"
INFO_FILE, MODEL_FILE, DATABASE = "index.json", "model.pt", "pictures.sqlite"


def read_index_info(folder: Path) -> IndexInfo:
    """``index.json``.

    Raises:
        UserError: no index, an unfinished one, or of another version.
    """
    file = folder / INFO_FILE
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        what = "an unfinished index" if (folder / DATABASE).exists() else "no index"
        raise UserError(f"{folder}: {what}: `uv run ucir index <pictures>` makes it") from None
    except ValueError:
        raise UserError(f"{file}: damaged: {REMEDY}") from None
    if content.get("format") != FORMAT:
        raise UserError(
            f"{file}: format {content.get('format')}, this version reads {FORMAT}: make the index anew "
            "with `uv run ucir index --rebuild`"
        )
    return IndexInfo(**content)


def _index_files(folder: Path) -> list[Path]:
    """Files of an index; none where there is no such folder. Raises UserError: it is something else."""
    files = sorted(folder.iterdir()) if folder.exists() else []
    ours = (INFO_FILE, MODEL_FILE, DATABASE, f"{DATABASE}-journal", "lock")
    for name in (file.name for file in files):
        if name not in ours and not re.match(r"(rows|ids|ivf)-|model\.pt\.", name):
            raise UserError(f"{folder}: no index: it holds {name}: give another --out")
    return files


def _folder_anew(folder: Path, model: Model, domain: str | None) -> Path:
    """Beside an index, with what a killed attempt left there if that was for the same model and domain."""
    anew = folder.resolve().with_name(f"{folder.resolve().name}.new")
    if (anew / DATABASE).exists():
        try:
            with _database(anew) as database:
                made = _made_by(database)
        except UserError:  # damaged
            made = None
        if made != (model.digest(), domain):
            shutil.rmtree(anew)
    return anew


def _choices(folder: Path, model: Model) -> tuple[dict[str, torch.Tensor] | None, float | None]:
    """Features of queries and share that an index was given: such features are of its own model alone."""
    try:
        info = read_index_info(folder)
        with _database(folder) as database:
            features = _given_queries(database) if info.model_digest == model.digest() else None
    except UserError:  # damaged, which is why it is made anew
        return None, None
    return features or None, info.false_rejections


def _take_place(anew: Path, folder: Path) -> None:
    """Put an index in the place of another one.

    After a kill in between the same command goes on: a model is there throughout, and what was embedded stays
    in the new folder until last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    order = {MODEL_FILE: 0, DATABASE: 2, INFO_FILE: 3}
    with locked(folder / "lock", f"{folder}: another process is writing this index"):
        (folder / INFO_FILE).unlink(missing_ok=True)  # readers are told that it is unfinished
        (anew / "lock").unlink()
        files = sorted(anew.iterdir(), key=lambda file: order.get(file.name, 1))
        kept = {"lock", *(file.name for file in files)}
        for file in _index_files(folder):
            if file.name not in kept:
                file.unlink()
        for file in files:
            file.replace(folder / file.name)
    anew.rmdir()


def describe_index(folder: Path, info: IndexInfo) -> str:
    """What was made, for people."""
    lines = [f"{folder}: {counted(info.count, 'picture')} of {info.source}, by {info.model}"]
    if info.domain:
        lines.append(f"seen as pictures of {info.domain}")
    faults = [f"left out: {path}: {fault}" for path, fault in left_out(folder)]
    for told in (info.notes, faults):
        lines += told[:LISTED]
        if len(told) > LISTED:
            lines.append(f"and {len(told) - LISTED} more like these")
    if info.kind == "exact":
        lines.append("search: each query is compared with all pictures")
    else:
        recall = ", ".join(f"recall@{depth} {value:.3f}" for depth, value in info.recall.items())
        lines.append(
            f"search: {info.probes} of {info.cells} cells a query; {recall} against all "
            f"({info.recall_queries})"
        )
    if info.limits:
        limits = ", ".join(f"{value:.2f} ({domain})" for domain, value in info.limits.items())
        lines.append(
            f"limit: nothing is like a query farther than {limits}; rejects about "
            f"{100 * info.false_rejections:g} % of pictures like these"
        )
    else:
        least = fewest_queries(info.false_rejections)
        lines.append(
            f"limit: not known, so every query finds something: give {least} pictures or more like those you "
            f"will ask with (--queries) to learn one that rejects {100 * info.false_rejections:g} % of them"
        )
    return "\n".join(lines)


def left_out(folder: Path) -> list[tuple[str, str]]:
    """Files that are no pictures or broken ones, by path, and why."""
    with _database(folder) as database:
        return database.execute(
            "SELECT path, fault FROM file WHERE fault IS NOT NULL ORDER BY path"
        ).fetchall()


def _query_features(
    database: sqlite3.Connection, given: Mapping[str, torch.Tensor] | None, model: Model
) -> dict[str, torch.Tensor]:
    """What limits are learnt from: given now, given before, or of the model."""
    if given is not None:
        rows = [(domain, x.float().numpy().tobytes()) for domain, features in given.items() for x in features]
        with database:
            database.execute("DELETE FROM query")
            database.executemany("INSERT INTO query VALUES (?, ?)", rows)
    return _given_queries(database) or dict(model.samples)


def _given_queries(database: sqlite3.Connection) -> dict[str, torch.Tensor]:
    given: dict[str, list[np.ndarray]] = {}
    for domain, feature in database.execute("SELECT domain, feature FROM query ORDER BY rowid"):
        given.setdefault(domain, []).append(np.frombuffer(feature, np.float32))
    return {domain: torch.from_numpy(np.stack(x)) for domain, x in given.items()}


@contextmanager
def _database(folder: Path) -> Iterator[sqlite3.Connection]:
    database = sqlite3.connect(folder / DATABASE, timeout=60)
    try:
        database.executescript(SCHEMA)
        yield database
    except (sqlite3.DatabaseError, OSError, RuntimeError) as error:  # of SQLite, of rows, of faiss
        if re.search("malformed|not a database", str(error)):
            raise UserError(f"{folder}: damaged ({error}): {REMEDY}") from None
        if not re.search("disk is full|No space left|quota exceeded", str(error)):
            raise
        raise UserError(
            f"{folder}: the disk is full: make room, and the same command goes on from there"
        ) from None
    finally:
        database.close()


def _check_maker(out: Path, database: sqlite3.Connection, digest: str, domain: str | None) -> None:
    """An index is of one model: features of two have nothing to do with each other."""
    made = _made_by(database)
    wanted = (digest, domain)
    if made is None:
        with database:
            database.execute("INSERT INTO made_by VALUES (?, ?)", wanted)
    elif made != wanted:
        what = (
            "by another model" if made[0] != wanted[0] else f"of pictures seen as {made[1] or 'any domain'}"
        )
        raise UserError(f"{out}: an index {what}: give another --out, or --rebuild to make it anew")


def _made_by(database: sqlite3.Connection) -> tuple[str, str | None] | None:
    """Model and domain."""
    return database.execute("SELECT model, domain FROM made_by").fetchone()  # type: ignore[no-any-return]


def _collection(
    source: Path, model: Model
) -> tuple[dict[str, str], Callable[[Collection[str]], Iterator[File]], list[str]]:
    """Files of a collection by path, each with a stamp that changes with it; what reads them; notes."""
    check_collection(source)
    if (source / "pack.json").exists():
        return *_pack_files(source, model), []
    opened = Source(source)
    if opened.closed:  # else its pictures would leave the index
        raise UserError(f"{source / opened.closed[0]}: may not be read: change its permissions")
    notes = [*opened.notes, *(f"left out: {name}: a link that leads nowhere" for name in opened.dangling)]
    names = [name for name in opened.names if not name.lower().endswith(NO_PICTURES)]
    in_tree = set(opened.tree)
    stamps = {archive: _stamp(archive) for archive in opened.archives}
    of_archive = {name: stamps[archive] for archive, members in opened.members.items() for name in members}
    files = {name: _stamp(opened.root / name) if name in in_tree else of_archive[name] for name in names}
    return files, opened.read, notes


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _pack_files(
    pack: Path, model: Model
) -> tuple[dict[str, str], Callable[[Collection[str]], Iterator[File]]]:
    info = read_info(pack)
    if (info.side, info.fit) != (model.pack.side, model.pack.fit):
        raise UserError(
            f"{pack}: stored at {info.side} px ({info.fit}), the model takes {model.pack.side} px "
            f"({model.pack.fit}): index the pictures themselves"
        )
    pictures = {p.path: (domain, p) for domain in info.counts for p in read_index(pack, domain)}
    rows = {
        domain: map_rows(pack / f"{domain}.u8", count, info.side) for domain, count in info.counts.items()
    }

    def read(wanted: Collection[str]) -> Iterator[File]:
        for path in wanted:
            domain, picture = pictures[path]
            digest = bytes.fromhex(picture.sha256)
            stored = StoredPicture(digest, rows[domain][picture.slot], picture.width, picture.height)
            yield path, lambda stored=stored: stored  # type: ignore[misc]

    return {path: picture.sha256 for path, (_, picture) in pictures.items()}, read


def _take_up(
    database: sqlite3.Connection,
    files: dict[str, str],
    read: Callable[[Collection[str]], Iterator[File]],
    compute: Compute,
    progress: Callable[[int, int], None],
) -> None:
    """Bring the database to the files that there are; each batch is kept as it is done."""
    # a file that was left out is looked at again: its disk or its permissions may be better now
    there = dict(database.execute("SELECT path, CASE WHEN fault IS NULL THEN stamp END FROM file"))
    with database:
        database.executemany(
            "DELETE FROM file WHERE path = ?", [(path,) for path in there.keys() - files.keys()]
        )
    new = {path for path, stamp in files.items() if there.get(path) != stamp}
    known = {digest for (digest,) in database.execute("SELECT sha256 FROM picture")}
    done = len(files) - len(new)
    progress(done, len(files))
    for outcomes in compute(read(new), known):
        with database:
            for path, outcome in outcomes:
                digest: bytes | None = None
                fault: str | None = None
                if isinstance(outcome, Embedded):
                    digest = outcome.sha256
                    database.execute(
                        "INSERT OR IGNORE INTO picture VALUES "
                        "(:sha256, :width, :height, :feature, :thumbnail, :look)",
                        asdict(outcome),
                    )
                elif isinstance(outcome, bytes):
                    digest = outcome
                else:
                    fault = outcome
                database.execute(
                    "INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?)",
                    (_file_id(path, digest), path, files[path], digest, fault),
                )
        done += len(outcomes)
        progress(done, len(files))
    with database:
        database.execute(
            "DELETE FROM picture WHERE sha256 NOT IN (SELECT sha256 FROM file WHERE sha256 NOT NULL)"
        )


def _file_id(path: str, digest: bytes | None) -> int:
    """Of path and content, 63 bits: rows and cells of an earlier state name the same file by it."""
    whole = hashlib.sha256(path.encode() + b"\0" + (digest or b"")).digest()
    return int.from_bytes(whole[:8], "big") >> 1


def _first_fault(database: sqlite3.Connection) -> str:
    fault = database.execute("SELECT path, fault FROM file WHERE fault IS NOT NULL ORDER BY path").fetchone()
    return f"; {fault[0]}: {fault[1]}" if fault else ""


def _state(database: sqlite3.Connection, model_digest: str) -> str:
    """Of pictures and model, in few letters."""
    state = hashlib.sha256(model_digest.encode())
    for path, digest in database.execute("SELECT path, sha256 FROM file WHERE fault IS NULL ORDER BY path"):
        state.update(path.encode() + b"\0" + digest)
    return state.hexdigest()[:12]


def _write_rows(
    out: Path, database: sqlite3.Connection, state: str, count: int, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Features in the order of paths (N, D), and the files' ids."""
    targets = out / f"rows-{state}.npy", out / f"ids-{state}.npy"
    if not all(map(_is_whole, targets)):
        unfinished = [target.with_suffix(".unfinished") for target in targets]
        chosen = database.execute(
            "SELECT id, feature FROM file JOIN picture USING (sha256) WHERE fault IS NULL ORDER BY path"
        )
        # written in order, not through a memory map: on a full disk that would end the process without a word
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
        numbers = []
        try:
            with unfinished[0].open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for number, feature in chosen:
                    numbers.append(number)
                    file.write(feature)
            with unfinished[1].open("wb") as file:
                np.save(file, np.array(numbers, np.int64))
            for path, target in zip(unfinished, targets, strict=True):
                path.replace(target)
        finally:
            for path in unfinished:
                path.unlink(missing_ok=True)
    return np.load(targets[0], mmap_mode="r"), np.load(targets[1], mmap_mode="r")


def _is_whole(array: Path) -> bool:
    """Whether a file is there with all that it should hold."""
    try:
        np.load(array, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return True


def _with_cells(
    out: Path,
    info: IndexInfo,
    before: IndexInfo | None,
    rows: np.ndarray,
    ids: np.ndarray,
    samples: Mapping[str, torch.Tensor],
) -> IndexInfo:
    """With an inverted file where a collection is large, and what it recalls of the true neighbours."""
    if info.count <= EXACT_UP_TO:
        return info
    if before and before.state == info.state:
        return replace(before, source=info.source)
    target = out / f"ivf-{info.state}.faiss"
    known = out / f"ivf-{before.state}.faiss" if before else target
    if before and known.exists() and before.learnt_from / 2 < info.count < 2 * before.learnt_from:
        inverted: Any = faiss.read_index(str(known))
        held = held_ids(inverted)
        inverted.remove_ids(np.setdiff1d(held, ids))
        add_rows(inverted, rows, ids, np.flatnonzero(~np.isin(ids, held)))
        learnt_from = before.learnt_from
    else:
        inverted, learnt_from = learn_cells(rows, ids), info.count
    queries, named = _recall_queries(rows, samples)
    probes, recall = fewest_probes(inverted, rows, queries)
    if not probes:
        return info
    faiss.write_index(inverted, str(target.with_suffix(".unfinished")))
    target.with_suffix(".unfinished").replace(target)
    return replace(
        info,
        kind="ivf",
        cells=inverted.nlist,
        probes=probes,
        learnt_from=learnt_from,
        recall=recall,
        recall_queries=named,
    )


def _recall_queries(rows: np.ndarray, samples: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, str]:
    """What recall is measured with: pictures like those of queries if there are any, else rows themselves."""
    if samples:
        share = -(-RECALL_QUERIES // len(samples))
        queries = torch.cat([features[:share] for features in samples.values()]).float().numpy()
        return queries, f"{len(queries)} pictures of {' and '.join(samples)}"
    chosen = np.random.default_rng(1).choice(len(rows), min(RECALL_QUERIES, len(rows)), replace=False)
    return np.ascontiguousarray(rows[np.sort(chosen)]), f"{len(chosen)} pictures of the index"


def _limits(
    rows: np.ndarray, samples: Mapping[str, torch.Tensor], false_rejections: float
) -> dict[str, float]:
    """Learnt from samples that are not in the collection themselves: these would be nearest to themselves."""
    limits = {}
    for domain, features in samples.items():
        scores, _ = exact_neighbours(features.float().numpy(), rows, 2)
        itself = scores[:, 0] > 1 - SAME
        nearest = np.where(itself, scores[:, -1], scores[:, 0])
        limit = calibrated_limit(torch.from_numpy(1 - nearest), false_rejections)
        if limit < OPPOSITE:  # else there are too few to tell
            limits[domain] = limit
    return limits
