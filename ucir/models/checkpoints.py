"""Encoder checkpoints in the layout of MoCo v2's published files; run states; atomic writing."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ucir.errors import UserError, nearest
from ucir.models.encoder import HEAD, Encoder
from ucir.models.trunk import StoredTrunk

PREFIXES = ("module.encoder_q.", "encoder_q.")


def save_encoder(encoder: Encoder, path: Path, **blocks: dict[str, Any]) -> None:
    """Write ``{"state_dict": {"module.encoder_q.<name>": tensor}}``.

    Args:
        encoder: whose weights; with a :class:`ucir.models.trunk.StoredTrunk` those of its head alone.
        path: of the file.
        blocks: what the file says beside them, see :mod:`ucir.models.model`.
    """
    state = {PREFIXES[0] + name: value for name, value in encoder.moco_state().items()}
    save_atomically({"state_dict": state, **blocks}, path)


def load_encoder(encoder: Encoder, path: Path) -> None:
    """Fill ``encoder`` (head and batch statistics too) from a checkpoint in MoCo v2's layout.

    Of an encoder with a :class:`ucir.models.trunk.StoredTrunk` it is the head that is filled.

    The prefix may be ``module.encoder_q.`` (DDP) or ``encoder_q.``. The checkpoint's key encoder and
    queue are not used, as in UCDIR and ProtoOT.

    Raises:
        UserError: no such file, not a checkpoint, a key missing, unknown or of another shape.
    """
    state = load_state(path)
    tensors = state.get("state_dict") if isinstance(state, dict) else None
    if not isinstance(tensors, dict):
        raise UserError(f"{path}: not a MoCo v2 checkpoint: it holds no 'state_dict'")
    prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in tensors)), None)
    if prefix is None:
        raise UserError(
            f"{path}: not a MoCo v2 checkpoint: no key begins with 'module.encoder_q.' or 'encoder_q.' "
            f"(the first key is {next(iter(tensors), None)!r})"
        )
    given = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if isinstance(encoder.trunk, StoredTrunk):
        given = {name: value for name, value in given.items() if name.startswith(HEAD)}
    wanted = encoder.moco_state()
    faults = [
        *(f"{key} is missing" for key in wanted if key not in given),
        *(f"{key} is unknown to this trunk" for key in given if key not in wanted),
        *(
            f"{key} has shape {tuple(given[key].shape)}, not {tuple(value.shape)}"
            for key, value in wanted.items()
            if key in given and given[key].shape != value.shape
        ),
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(f"{path}: does not fit the encoder: {'; '.join(faults[:5])}{more}")
    encoder.load_moco_state(given)


def load_torchvision(encoder: Encoder, name: str) -> None:
    """Fill the trunk from torchvision's weights ``name``; the head stays random, as there is none.

    The file comes from torchvision's own address, once, into torch's cache.

    Raises:
        UserError: the trunk has no weights of this name, or they cannot be fetched.
    """
    from torchvision.models import get_model_weights

    network = encoder.params.trunk.get("torchvision")
    known = get_model_weights(network).__members__ if network else {}
    if name not in known:
        raise UserError(
            f"start.torchvision: {encoder.params.trunk_name} has no weights {name!r}; {nearest(name, known)}"
        )
    weights = known[name]
    try:
        state = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(f"{weights.url}: {error}; or put the file into {folder} yourself") from None
    given = {key: value for key, value in state.items() if not key.startswith("fc.")}
    encoder.load_moco_state({**encoder.moco_state(), **given})


def save_atomically(state: Any, path: Path) -> None:
    """``torch.save`` that is either there as a whole or not at all, whenever the process is killed.

    Raises:
        UserError: the disk is full; what was there before still is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        if not _disk_full(error):
            raise
        raise UserError(
            f"{path}: the disk is full: make room, and the same command goes on from there"
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)


def _disk_full(error: BaseException | None) -> bool:
    """Whether it began with that; what torch's writer says afterwards is something else."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__context__
    return False


UNREADABLE = (
    pickle.UnpicklingError,
    OSError,
    RuntimeError,
    LookupError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
)
"""What torch raises for files of other kinds and for damaged ones."""


def load_state(path: Path) -> Any:
    """``torch.load`` of tensors and plain data only, on the CPU.

    Raises:
        UserError: no such file, or unreadable.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except UNREADABLE:
        raise UserError(
            f"{path}: unreadable as a checkpoint: damaged, or no file of torch's; if this program wrote "
            "it, delete it and give the same command again"
        ) from None
