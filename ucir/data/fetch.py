"""Downloads that resume and are verified; and archives unpacked without trusting them."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import requests

from ucir.config.data import DatasetParams
from ucir.config.model import StartParams
from ucir.data.source import Source
from ucir.errors import UserError
from ucir.paths import WEIGHTS
from ucir.progress import by_bytes

PART = 2**16
"""Bytes written at a time; when a connection breaks, up to so many are lost."""
PATIENCE = 30
"""Seconds without a byte after which a connection is given up."""
TRIES = 3
MOCO = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar"


def is_address(text: str) -> bool:
    """An http or https address, not a path."""
    return urlsplit(text).scheme in ("http", "https")


def file_name(address: str) -> str:
    """The last part of an address's path.

    Raises:
        UserError: it has none.
    """
    name = Path(urlsplit(address).path).name
    if not name:
        raise UserError(f"{address}: the address names no file")
    return name


def download(
    address: str,
    target: Path,
    digest: str | None = None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> None:
    """Get a file, going on where an earlier attempt stopped; a file that is there and right is kept.

    Args:
        address: http or https.
        target: where it shall lie; until it is whole and verified it is ``<target>.part``.
        digest: ``md5:…`` or ``sha256:…``, whole or its beginning; None = length alone is checked.
        progress: called with bytes there and bytes in all (None = the server does not say).

    Raises:
        UserError: no answer, an error of the server, a file of another digest, a full disk. What has
            come stays for the next attempt, unless its digest is wrong.
    """
    if target.exists():
        verify(target, digest)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    failure = ""
    for _ in range(TRIES):
        try:
            if _get(address, part, progress):
                verify(part, digest, remove=True)
                part.replace(target)
                part.with_name(f"{part.name}.version").unlink(missing_ok=True)
                return
            failure = "the connection ended early"
        except requests.HTTPError as error:
            raise UserError(f"{address}: the server refuses: {error}") from None
        except requests.RequestException as error:
            failure = type(error).__name__
    kept = part.stat().st_size if part.exists() else 0
    kept_part = f"; {kept} bytes are kept in {part} and the same command goes on" if kept else ""
    raise UserError(f"{address}: {failure}{kept_part}; or put the file there yourself as {target}")


def _get(address: str, part: Path, progress: Callable[[int, int | None], None]) -> bool:
    """One attempt; True when the file is whole."""
    version = part.with_name(f"{part.name}.version")
    there = part.stat().st_size if part.exists() and version.exists() else 0
    headers = {"Accept-Encoding": "identity"}  # a packed transfer could not be resumed by bytes of the file
    if there:  # if the file has not changed since; otherwise all of it comes anew
        headers |= {"Range": f"bytes={there}-", "If-Range": version.read_text()}
    with requests.get(address, headers=headers, stream=True, timeout=PATIENCE) as answer:
        if answer.status_code == 416:  # nothing is left, or the file there is another
            whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if whole == str(there):
                return True
            part.unlink()
            return False
        answer.raise_for_status()
        if answer.status_code != 206:  # the server knows no ranges: from the beginning
            there = 0
        stamp = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if stamp:
            version.write_text(stamp)
        length = answer.headers.get("Content-Length")
        total = there + int(length) if length else None
        if total and total - there > (free := shutil.disk_usage(part.parent).free):
            raise UserError(f"{part}: {total - there} bytes are to come, {free} are free: make room")
        with part.open("ab" if there else "wb") as file:
            for data in answer.iter_content(PART):
                file.write(data)
                there += len(data)
                progress(there, total)
    return total is None or there == total


def verify(path: Path, digest: str | None, remove: bool = False) -> None:
    """Compare a file with its digest, whole or its beginning.

    Raises:
        UserError: they differ; with ``remove`` the file is deleted.
    """
    if digest is None:
        return
    kind, _, expected = digest.partition(":")
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, kind).hexdigest()
    if not actual.startswith(expected):
        if remove:
            path.unlink()
        remedy = "deleted; give the command again" if remove else "put the right one there"
        raise UserError(f"{path}: {kind} is {actual}, not {expected}…: damaged or another file: {remedy}")


def fetch(block: DatasetParams, progress: Callable[[str], Callable[[int, int | None], None]]) -> list[Path]:
    """Download a data set's files that are not there.

    Args:
        block: of params.yaml.
        progress: gives a file's callback for :func:`download`.

    Returns:
        What lies there now.

    Raises:
        UserError: as :func:`download`; there is no address to download from: says which file to put where.
    """
    entry, source = block.entry, Path(block.source)
    if source.is_file():
        return [source]
    there = []
    for file in entry.files:
        target = source / file.name
        if entry.address is not None:
            download(f"{entry.address}{file.path or file.name}", target, file.digest, progress(file.name))
        if target.exists():
            there.append(target)
    if not there and source.is_dir():  # under other names, or unpacked
        there = sorted(path for path in source.iterdir() if not path.name.startswith("."))
    if not there and entry.files:
        raise UserError(
            f"{entry.title}: {entry.ask}. Put it into {source.resolve()} as it is, or unpacked; or let "
            "'source' in params.yaml say where it lies"
        )
    return there


def check_checkpoint(start: StartParams) -> None:
    """Whether the start's checkpoint is there, if it is a file; an address is looked up when it is needed.

    Raises:
        UserError: there is no such file.
    """
    if start.checkpoint and not is_address(start.checkpoint) and not Path(start.checkpoint).exists():
        raise UserError(
            f"{start.checkpoint}: no such checkpoint; put it there, or let start.checkpoint be an address "
            f"(MoCo v2's, 800 epochs, ResNet-50: {MOCO}), or learn a start here: pretrain: {{steps: 2000}}"
        )


def local_start(start: StartParams) -> StartParams:
    """The same start with its checkpoint as a verified file on this machine.

    Raises:
        UserError: no such file, it cannot be fetched, or its digest is another.
    """
    if start.checkpoint is None:
        return start
    check_checkpoint(start)
    path = Path(start.checkpoint)
    if is_address(start.checkpoint):
        path = WEIGHTS / file_name(start.checkpoint)
        download(start.checkpoint, path, start.digest, by_bytes(path.name))
    else:
        verify(path, start.digest)
    return start.model_copy(update={"checkpoint": str(path)})


def unpack(source: Path, target: Path, progress: Callable[[int, int], None]) -> int:
    """Write an archive's files below ``target``; returns their number. What is there is left as it is.

    Raises:
        UserError: a broken or hostile archive (see :mod:`ucir.data.source`), or too little room.
    """
    opened = Source(source)
    names = opened.names
    for done, (name, read) in enumerate(opened.read(names), 1):
        path = target / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"{path.name}.part")
            try:
                unfinished.write_bytes(read())
            except OSError as error:
                raise UserError(f"{source}: {name}: {error}") from None
            unfinished.replace(path)
        progress(done, len(names))
    return len(names)
