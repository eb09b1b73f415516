"""A model: an encoder with all that using it needs, which its file holds beside the weights.

The file is a checkpoint in MoCo v2's layout, see :mod:`ucir.models.checkpoints`, with a block ``model``: how
to build the encoder, how pictures are stored and seen, and the facts of its training. No params.yaml is
needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from ucir.errors import UserError
from ucir.models.checkpoints import load_encoder, load_state, save_encoder
from ucir.models.encoder import Encoder, new_encoder

FORMAT = 1
BATCH = 64


@dataclass(frozen=True)
class Model:
    """An encoder, and how pictures come to it."""

    encoder: Encoder
    view: ViewParams
    pack: PackParams
    facts: dict[str, Any]
    """Of its training: data set, setting, method, pair, seed, run key, epoch."""

    @torch.no_grad()
    def features(
        self, pictures: Iterable[np.ndarray], features: Literal["head", "pooled"] = "head"
    ) -> Iterator[Tensor]:
        """Unit features, (B, D) float32 on the CPU, a batch at a time: those that a pack's pictures get.

        Args:
            pictures: uint8 (height, width, 3), RGB, of any size, one after the other.
            features: the head's output, or what goes into it.
        """
        self.encoder.eval()
        stored: list[np.ndarray] = []
        sizes: list[tuple[int, int]] = []
        for picture in pictures:
            image = Image.fromarray(picture)
            stored.append(fitted(image, self.pack))
            sizes.append(stored_size(image.size, self.pack.fit))
            if len(stored) == BATCH:
                yield self._embed(stored, sizes, features == "pooled")
                stored, sizes = [], []
        if stored:
            yield self._embed(stored, sizes, features == "pooled")

    def _embed(self, stored: list[np.ndarray], sizes: list[tuple[int, int]], pooled: bool) -> Tensor:
        pixels = torch.from_numpy(np.stack(stored))
        views = eval_views(pixels, torch.tensor(sizes), self.view, self.encoder.form)
        features: Tensor = self.encoder(views.to(self.encoder.device), pooled)
        return features.cpu()


def save_model(model: Model, path: Path) -> None:
    """Write the file. Raises UserError: the disk is full."""
    block = {
        "format": FORMAT,
        "encoder": model.encoder.params.model_dump(mode="json"),
        "view": model.view.model_dump(mode="json"),
        "pack": model.pack.model_dump(mode="json"),
        "input": model.encoder.form.described(),
        "facts": model.facts,
    }
    save_encoder(model.encoder, path, block)


def load_model(path: Path | str, device: torch.device | str = "cpu") -> Model:
    """Read a file that :func:`save_model` wrote.

    Raises:
        UserError: no such file; a checkpoint that does not say how it is used; of a later format.
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
    load_encoder(encoder, path)
    view, pack = ViewParams(**block["view"]), PackParams(**block["pack"])
    return Model(encoder.to(device).eval(), view, pack, block["facts"])
