"""Where things lie in a project's folder; relative to where the command runs."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ucir.errors import UserError

CODE = Path("data/code")
SOURCES = Path("data/sources")
PACKS = Path("data/packs")
WEIGHTS = Path("data/weights")
STARTS = Path("data/start")
FEATURES = Path("data/features")
PACES = Path("data/paces.json")
RUNS = Path("runs")
RESULTS = Path("results")
REPORTS = Path("reports")
MODELS = Path("models")


def check_writable(folder: Path) -> None:
    """Fail now rather than after the first epoch.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror})") from None


def file_sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unshare(*places: Path) -> None:
    """Give files that DVC's cache has as well, by a link, a copy of their own, before they are written to.

    DVC does so itself before a stage; a stage by hand would write into the cache.

    Args:
        places: files, and folders with all that is in them; what is not there needs nothing.
    """
    for place in places:
        for file in [place] if place.is_file() else sorted(place.rglob("*")):
            if file.is_file() and (file.is_symlink() or file.stat().st_nlink > 1):
                copy = file.with_name(f"{file.name}.{os.getpid()}.unfinished")
                shutil.copyfile(file, copy)
                copy.replace(file)


def link_or_copy(file: Path, to: Path) -> None:
    """The same file in another place, which takes no space where the file system can do that."""
    to.unlink(missing_ok=True)
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


@contextmanager
def locked(file: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a file for this process, whose number it then has; a kill gives it back, too.

    Args:
        file: made if missing, in a folder that is there.
        busy: what to say where another process holds it; None: wait for it.

    Raises:
        UserError: another process holds it, and we do not wait.
    """
    import fcntl

    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            lock.seek(0)
            raise UserError(f"{busy} (process {lock.read() or 'unknown'}): wait for it, or stop it") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def write_atomically(text: str, path: Path) -> None:
    """Write a file that is either there as a whole or not at all, whenever the process is killed."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
