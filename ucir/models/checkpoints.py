"""Encoder checkpoints in the layout of MoCo v2's published files; run states; atomic writing."""

from __future__ import annotations

import errno
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ucir.errors import UserError, listed, nearest
from ucir.models.encoder import HEAD, Encoder
from ucir.models.trunk import StoredTrunk

PREFIX = "module.encoder_q."
"""Of the query encoder's names, as DDP writes them."""
QUERY = re.compile(r"(?:\w+\.)*?encoder_q\.(?:module\.|_orig_mod\.)*(.+)")
"""Its names, whatever wrapped it."""
BLOCKS = ("state_dict", "model", "teacher", "model_state_dict")
"""Under what checkpoints keep their tensors."""


def save_encoder(encoder: Encoder, path: Path, **blocks: dict[str, Any]) -> None:
    """Write ``{"state_dict": {"module.encoder_q.<name>": tensor}}``.

    Args:
        encoder: whose weights; with a :class:`ucir.models.trunk.StoredTrunk` those of its head alone.
        path: of the file.
        blocks: what the file says beside them, see :mod:`ucir.models.model`.
    """
    state = {PREFIX + name: value for name, value in encoder.moco_state().items()}
    save_atomically({"state_dict": state, **blocks}, path)


def load_encoder(encoder: Encoder, path: Path, head_optional: bool = False) -> bool:
    """Fill ``encoder`` (head and batch statistics too) from a checkpoint in MoCo v2's layout.

    Of an encoder with a :class:`ucir.models.trunk.StoredTrunk` it is the head that is filled.

    Before ``encoder_q.`` there may be what wrappers write. The checkpoint's key encoder and queue are not
    used, as in UCDIR and ProtoOT; counters of batches may be missing.

    Args:
        encoder: to be filled.
        path: of the checkpoint, torch's or safetensors.
        head_optional: whether the head stays as it is where the checkpoint has none.

    Returns:
        Whether the head was filled, too.

    Raises:
        UserError: no such file, not a checkpoint, a key missing, unknown, of another shape or not finite.
    """
    tensors = load_tensors(path)
    given = {match[1]: value for key, value in tensors.items() if (match := QUERY.fullmatch(key))}
    if not given:
        raise UserError(
            f"{path}: not a MoCo v2 checkpoint: no key begins with 'module.encoder_q.' or 'encoder_q.' "
            f"(the first key is {next(iter(tensors))!r}); another network's weights go with a timm trunk: "
            "`start.weights`, see ucir/data/README.md"
        )
    wanted = encoder.moco_state()
    has_head = any(name.startswith(HEAD) for name in given)
    if isinstance(encoder.trunk, StoredTrunk):
        given = {name: value for name, value in given.items() if name.startswith(HEAD)}
    elif head_optional and not has_head:
        given |= {name: value for name, value in wanted.items() if name.startswith(HEAD)}
    counters = {name: value for name, value in wanted.items() if name.endswith("num_batches_tracked")}
    given = {**counters, **given}
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
        raise UserError(f"{path}: does not fit the encoder: {listed(faults, 5, '; ')}")
    if infinite := [name for name, value in given.items() if not torch.isfinite(value).all()]:
        raise UserError(f"{path}: damaged: {infinite[0]} holds values that are not finite")
    encoder.load_moco_state(given)
    return has_head


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, of torch or safetensors.

    Raises:
        UserError: no such file, unreadable, or no tensors by name in it.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            state: Any = load_file(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such checkpoint") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: unreadable as safetensors: {error}") from None
    else:
        state = load_state(path)
    for block in BLOCKS:
        if isinstance(state, dict) and isinstance(state.get(block), dict):
            state = state[block]
            break
    named = state.items() if isinstance(state, dict) else ()
    tensors = {k: v for k, v in named if isinstance(k, str) and isinstance(v, Tensor) and _is_plain(v)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors by name")
    return tensors


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


def _is_plain(value: Tensor) -> bool:
    """Whether it holds its numbers one by one: neither sparse nor quantised nor without any."""
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta


class _Inert:
    """Stands for an object of a class that a checkpoint names: none of its code is run."""

    def __init__(self, *given: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


FOREIGN = re.compile(r"GLOBAL (\S+) was not an allowed global")
"""How torch names a class that it would have to import."""


def load_state(path: Path) -> Any:
    """``torch.load`` of tensors and plain data only, on the CPU.

    Objects of other classes, such as the ``argparse.Namespace`` of a training script, are passed over: their
    code is neither imported nor called.

    Raises:
        UserError: no such file, or unreadable.
    """
    inert: list[tuple[type, str]] = []
    while True:
        try:
            with torch.serialization.safe_globals(inert):  # type: ignore[arg-type]
                return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{path}: no such checkpoint") from None
        except UNREADABLE as error:
            text = str(error)
            foreign = FOREIGN.search(text)
            if foreign and all(foreign[1] != name for _, name in inert):
                inert.append((_Inert, foreign[1]))
                continue
            if inert or "is blocked" in text:
                names = ", ".join(name for _, name in inert) or text.split("GLOBAL ")[1].split(" ")[0]
                raise UserError(
                    f"{path}: holds more than weights ({names}), which is not read as it could run any code; "
                    'where you trust it, keep the weights alone: python -c "import torch; c = torch.load('
                    "'old.pth', weights_only=False); torch.save({'state_dict': c['state_dict']}, 'new.pth')\""
                ) from None
            raise UserError(
                f"{path}: unreadable as a checkpoint: damaged, or no file of torch's; if this program wrote "
                "it, delete it and give the same command again"
            ) from None
