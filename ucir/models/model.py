"""A model: an encoder with all that using it needs, which its file holds beside the weights.

The file is a checkpoint in MoCo v2's layout, see :mod:`ucir.models.checkpoints`, with a block ``model``: how
to build the encoder, how pictures are stored and seen, and the facts of its training. No params.yaml is
needed. Where the trunk was frozen the file of a run holds the head and names the trunk's file; ``ucir adapt``
writes both into one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ucir.config.data import PackParams, ViewParams
from ucir.config.model import EncoderParams
from ucir.data.augment import eval_views
from ucir.data.decode import fitted
from ucir.data.pack import stored_size
from ucir.errors import UserError, nearest
from ucir.models.checkpoints import load_encoder, load_state, save_encoder
from ucir.models.encoder import Encoder, new_encoder
from ucir.models.head import ResidualHead
from ucir.models.pretrained import EMBEDDED, EMBEDDED_SIDE, EMBEDDED_TRUNK, load_weights
from ucir.models.trunk import StoredTrunk
from ucir.paths import MODELS, file_sha256

FORMAT = 1
BATCH = 64


Stored = tuple[np.ndarray, tuple[int, int]]
"""A picture as a model's pack stores it, uint8 (side, side, 3), and the size of what it shows."""


def stored_picture(image: Image.Image, pack: PackParams, size: tuple[int, int] | None = None) -> Stored:
    """A picture as it comes to a model.

    Args:
        image: RGB.
        pack: the model's.
        size: of the original, where the image is its square from a pack.
    """
    return fitted(image, pack), stored_size(size or image.size, pack.fit)


@dataclass(frozen=True)
class Model:
    """An encoder, and how pictures come to it."""

    encoder: Encoder
    view: ViewParams
    pack: PackParams
    facts: dict[str, Any]
    """Of its training: data set, setting, method, pair, seed, run key, epoch; where its weights come from."""
    domains: tuple[str, ...] = ()
    """Names of its training's two domains, in its order."""
    trunk_file: dict[str, str] = field(default_factory=dict)
    """Where the frozen trunk's weights lie, as ``path`` and ``sha256``, if the file holds the head alone."""
    used: Literal["head", "pooled"] = "head"
    """What stands for a picture: the head's output, or what goes into it."""
    samples: dict[str, Tensor] = field(default_factory=dict)
    """Unit features of some of its training's pictures by domain, float16 (n, D): what a limit is learnt from
    beyond which nothing is like a query."""

    @property
    def name(self) -> str:
        """For people."""
        facts = self.facts
        if "method" not in facts:
            return self.encoder.params.trunk_name
        pictures = f"{facts['dataset']} {facts.get('pair', '')}"  # a label-free start is of no pair
        return f"{facts['method']} on {pictures.rstrip()}"

    @property
    def dim(self) -> int:
        """Length of what stands for a picture."""
        return self.encoder.pooled_dim if self.used == "pooled" else self.encoder.feature_dim

    def digest(self) -> str:
        """sha256 of all that a picture's features depend on."""
        digest = hashlib.sha256()
        how = (self.encoder.params, self.view, self.pack)
        for text in (*(block.model_dump_json() for block in how), self.used):
            digest.update(text.encode())
        for name, value in self.encoder.state_dict().items():
            digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def on(self, device: torch.device | str) -> Model:
        """The same, on a device."""
        self.encoder.to(device)
        return self

    def whole(self) -> Model:
        """The same, to be written as a file that holds the trunk, too."""
        return replace(self, trunk_file={})

    @torch.no_grad()
    def features(
        self,
        pictures: Iterable[np.ndarray],
        features: Literal["head", "pooled"] | None = None,
        domain: str | None = None,
    ) -> Iterator[Tensor]:
        """Unit features, (B, D) float32 on the CPU, a batch at a time: those that a pack's pictures get.

        Args:
            pictures: uint8 (height, width, 3), RGB, of any size, one after the other.
            features: the head's output, or what goes into it; None: what the model is used with.
            domain: of the pictures, one of ``domains``; None: that whose centre is the nearest, a picture
                at a time.

        Raises:
            UserError: the model knows no such domain.
        """
        self.check_domain(domain)
        stored = (stored_picture(Image.fromarray(picture), self.pack) for picture in pictures)
        while batch := list(islice(stored, BATCH)):
            yield self.embed(batch, domain, features)

    def check_domain(self, domain: str | None) -> None:
        """Raises UserError: the model knows no such domain."""
        if domain is not None and domain not in self.domains:
            raise UserError(f"domain {domain!r} is unknown to this model; {nearest(domain, self.domains)}")

    @torch.no_grad()
    def embed(
        self,
        pictures: Sequence[Stored],
        domain: str | None = None,
        features: Literal["head", "pooled"] | None = None,
    ) -> Tensor:
        """Unit features of one batch, (B, D) float32 on the CPU; may run in any thread.

        Args:
            pictures: as :func:`stored_picture` makes them, at least one.
            domain, features: as of :meth:`features`.
        """
        return self._encoded(pictures, domain, (features or self.used) == "pooled")

    @torch.no_grad()
    def embed_queries(
        self, pictures: Sequence[Stored], domain: str | None = None
    ) -> tuple[Tensor, list[str | None]]:
        """As :meth:`embed`, and which of ``domains`` each picture is taken for: the given one, or that whose
        centre is the nearest; None of a head without centres."""
        head = self.encoder.head
        if domain is not None or not self.domains or not isinstance(head, ResidualHead):
            return self.embed(pictures, domain), [domain] * len(pictures)
        both = self._encoded(pictures, None, "both")
        of_head, pooled = both[:, : self.encoder.feature_dim], both[:, self.encoder.feature_dim :]
        numbers = head.nearest_domain(pooled.to(self.encoder.device)).tolist()
        return pooled if self.used == "pooled" else of_head, [self.domains[number] for number in numbers]

    def _encoded(
        self, pictures: Sequence[Stored], domain: str | None, pooled: bool | Literal["both"]
    ) -> Tensor:
        """What the encoder makes of one batch, on the CPU."""
        stored, sizes = zip(*pictures, strict=True)
        pixels = torch.from_numpy(np.stack(stored))
        device = self.encoder.device
        views = eval_views(pixels.to(device), torch.tensor(sizes), self.view, self.encoder.form)
        number = None if domain is None else self.domains.index(domain)
        domain_B = None if number is None else torch.full((len(views),), number, device=device)
        out: Tensor = self.encoder(views, pooled, domain_B)
        return out.cpu()


def embedded_model() -> Model:
    """The network that came with the installation: learnt with ImageNet's labels, adapted to nothing."""
    encoder = new_encoder(EncoderParams(trunk={"timm": EMBEDDED_TRUNK}), 0)
    origin = load_weights(encoder.trunk, EMBEDDED_TRUNK, EMBEDDED)
    view, pack = ViewParams(side=EMBEDDED_SIDE, eval_crop=1.0), PackParams(side=EMBEDDED_SIDE)
    return Model(encoder.eval(), view, pack, {"weights": asdict(origin)}, used="pooled")


def model_file(name: str) -> Path:
    """Where this project keeps a model.

    Raises:
        UserError: a name that cannot be a folder's, or stands for the network of the installation.
    """
    if name == EMBEDDED:
        raise UserError(
            f"model {name!r}: the name of the network that came with the installation: give another"
        )
    if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-]", name):
        raise UserError(f"model {name!r}: letters, digits, '_', '-' and '.' alone")
    return MODELS / name / "model.pt"


def find_model(name: str, device: torch.device | str = "cpu") -> Model:
    """A model by its file, by its name under ``models/``, or ``embedded``.

    Raises:
        UserError: there is none; as :func:`load_model`.
    """
    if name == EMBEDDED:
        return embedded_model().on(device)
    path, by_name = Path(name), MODELS / name / "model.pt"
    if not path.is_file() and not by_name.exists():
        known = [EMBEDDED, *(file.parent.name for file in MODELS.glob("*/model.pt"))]
        raise UserError(
            f"model {name!r}: neither a file nor one of this project's models; {nearest(name, known)}; "
            "of a training give the file: results/<dataset>/<setting>/<method>/train/<run>/last.pt"
        )
    return load_model(path if path.is_file() else by_name, device)


def save_model(model: Model, path: Path) -> None:
    """Write the file. Raises UserError: the disk is full."""
    block = {
        "format": FORMAT,
        "encoder": model.encoder.params.model_dump(mode="json"),
        "view": model.view.model_dump(mode="json"),
        "pack": model.pack.model_dump(mode="json"),
        "facts": model.facts,
        "domains": list(model.domains),
        "trunk_file": model.trunk_file,
        "used": model.used,
        "samples": model.samples,
    }
    save_encoder(model.encoder, path, model=block)


def load_model(path: Path | str, device: torch.device | str = "cpu") -> Model:
    """Read a file that :func:`save_model` wrote.

    Raises:
        UserError: no such file; a checkpoint that does not say how it is used; of a later format; the frozen
            trunk's file that it names is not there, or is another.
    """
    path = Path(path)
    state = load_state(path)
    block = state.get("model") if isinstance(state, dict) else None
    if not isinstance(block, dict):
        raise UserError(
            f"{path}: a checkpoint without a description of its encoder and pictures: name it as "
            "start.checkpoint of a data set in params.yaml; what `uv run ucir train` writes is loaded alone"
        )
    if block["format"] != FORMAT:
        raise UserError(
            f"{path}: a model of format {block['format']}, this version reads {FORMAT}: update ucir"
        )
    encoder = new_encoder(EncoderParams(**block["encoder"]), 0)
    trunk_file: dict[str, str] = block.get("trunk_file", {})
    if trunk_file:
        load_encoder(encoder, _trunk_path(path, trunk_file))
        head = new_encoder(encoder.params, 0, trunk=StoredTrunk(encoder.pooled_dim))
        load_encoder(head, path)
        encoder.head.load_state_dict(head.head.state_dict())
    else:
        load_encoder(encoder, path)
    view, pack = ViewParams(**block["view"]), PackParams(**block["pack"])
    domains = tuple(block.get("domains", ()))
    used, samples = block.get("used", "head"), block.get("samples", {})
    return Model(encoder.to(device).eval(), view, pack, block["facts"], domains, {}, used, samples)


def _trunk_path(path: Path, trunk_file: dict[str, str]) -> Path:
    """The file of the frozen trunk that a head was trained on."""
    file = Path(trunk_file["path"])
    remedy = "load it in its project's folder, where `uv run dvc repro pretrain` makes that file"
    if not file.exists():
        raise UserError(f"{path}: holds a head for the trunk in {file}, which is not there: {remedy}")
    if file_sha256(file) != trunk_file["sha256"]:
        raise UserError(f"{path}: was trained on other weights than {file} holds now: {remedy}")
    return file
