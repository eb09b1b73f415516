"""Where things lie in a project's folder; relative to where the command runs."""

from __future__ import annotations

import os
from pathlib import Path

from ucir.errors import UserError

CODE = Path("data/code")
SOURCES = Path("data/sources")
PACKS = Path("data/packs")
WEIGHTS = Path("data/weights")
STARTS = Path("data/start")
FEATURES = Path("data/features")
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


def write_atomically(text: str, path: Path) -> None:
    """Write a file that is either there as a whole or not at all, whenever the process is killed."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
