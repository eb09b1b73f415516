"""Start weights given by address: fetched once, verified, kept beside the data."""

from __future__ import annotations

from pathlib import Path

from ucir.config import StartParams
from ucir.data.fetch import download, file_name, is_address, verify
from ucir.errors import UserError
from ucir.paths import WEIGHTS
from ucir.progress import by_bytes


def local_start(start: StartParams) -> StartParams:
    """The same start with its checkpoint as a verified file on this machine.

    Raises:
        UserError: no such file, it cannot be fetched, or its digest is another.
    """
    if start.checkpoint is None:
        return start
    path = Path(start.checkpoint)
    if is_address(start.checkpoint):
        path = WEIGHTS / file_name(start.checkpoint)
        download(start.checkpoint, path, start.digest, by_bytes(path.name))
    elif not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    else:
        verify(path, start.digest)
    return start.model_copy(update={"checkpoint": str(path)})
