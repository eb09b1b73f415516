"""The encoder: trunk, head, L2-normalised output; and its moving average."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ucir.config.model import EncoderParams
from ucir.data.augment import InputFormat
from ucir.models.head import HEADS
from ucir.models.norm import GroupedBatchNorm2d
from ucir.models.trunk import Trunk, new_trunk

HEAD = "fc."
"""What the head's parameters are called in MoCo v2's checkpoints; the trunk's have torchvision's names."""


class Encoder(nn.Module):
    """Images to unit features.

    Args:
        params: the ``encoder`` block.
        norm_groups: parts of the batch with their own batch statistics; 2 for a key encoder.
        trunk: instead of a new one of ``params``.

    Raises:
        UserError: params that do not go together.
    """

    def __init__(self, params: EncoderParams, norm_groups: int = 1, trunk: Trunk | None = None) -> None:
        super().__init__()
        self.params = params
        self.trunk = trunk or new_trunk(params.trunk, partial(GroupedBatchNorm2d, groups=norm_groups))
        self.head = HEADS[params.head](self.trunk.pooled_dim, params.feature_dim)

    def forward(
        self, x: Tensor, pooled: bool | Literal["both", "grid", "raw"] = False, domain_B: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Normalised images (B, 3, s, s) to unit features (B, D), float32.

        Args:
            x: the images; pooled features (B, P) where the trunk is a :class:`StoredTrunk`.
            pooled: those before the head (2048 of a ResNet-50); ``both``: the head's and these side by side;
                ``grid``: the head's, these, and those at L positions that they are pooled from (B, L, P);
                ``raw``: the head's, and the same before they are brought to unit length, side by side.
            domain_B: 0 or 1, which of the training's domains each image is of, int64; None: not known.

        Raises:
            UserError: ``grid``, and the trunk has no features at positions.
        """
        half = self.params.precision == "bfloat16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            before, grid = self.trunk.grid(x) if pooled == "grid" else (self.trunk(x), None)
            out = None if pooled is True else self.head(before, domain_B)
        if out is None:
            return F.normalize(before.float(), dim=1)
        raw = out.float()
        out = F.normalize(raw, dim=1)
        if pooled == "raw":
            return torch.cat([out, raw], dim=1)
        if grid is not None:
            return out, F.normalize(before.float(), dim=1), F.normalize(grid.float(), dim=2)
        return torch.cat([out, F.normalize(before.float(), dim=1)], dim=1) if pooled else out

    @property
    def feature_dim(self) -> int:
        """Length of the head's output."""
        return self.params.feature_dim

    @property
    def pooled_dim(self) -> int:
        """Length of what goes into the head."""
        return self.trunk.pooled_dim

    @property
    def form(self) -> InputFormat:
        """Of the pictures that it takes."""
        return self.trunk.form

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def parameter_groups(self) -> list[dict[str, Any]]:
        """All that is trained, for an optimizer; ``lr_scale`` is a factor of the learning rate."""
        groups = self.trunk.parameter_groups()
        head = list(self.head.parameters())
        if len(groups) == 1 and groups[0]["lr_scale"] == 1:
            return [{"params": [*groups[0]["params"], *head], "lr_scale": 1.0}]
        return [*groups, {"params": head, "lr_scale": 1.0}]

    def moco_state(self) -> dict[str, Tensor]:
        """Its state by MoCo v2's names: torchvision's, and the head as ``fc.0`` and ``fc.2``."""
        head = {HEAD + name: value for name, value in self.head.state_dict().items()}
        return {**self.trunk.net.state_dict(), **head}

    def load_moco_state(self, state: dict[str, Tensor]) -> None:
        """Take up :meth:`moco_state`'s value."""
        head = {name.removeprefix(HEAD): x for name, x in state.items() if name.startswith(HEAD)}
        self.head.load_state_dict(head)
        self.trunk.net.load_state_dict({n: x for n, x in state.items() if not n.startswith(HEAD)})


def new_encoder(
    params: EncoderParams, seed: int, norm_groups: int = 1, trunk: Trunk | None = None
) -> Encoder:
    """A randomly initialised encoder that depends on ``params`` and ``seed`` alone, but for a trunk given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(params, norm_groups, trunk)
    return encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def key_encoder_of(encoder: Encoder, norm_groups: int = 2) -> Encoder:
    """A frozen copy for the moving average, normalising over so many equal parts of the batch."""
    key = copy.deepcopy(encoder)
    key.requires_grad_(False)
    for module in key.modules():
        if isinstance(module, GroupedBatchNorm2d):
            module.groups = norm_groups
    return key


COMPILER = "inductor"
"""What :func:`as_stepped` compiles with: torch's own."""


def as_stepped(encoder: Encoder) -> nn.Module:
    """The encoder as the steps of a training call it: compiled, where its params say so.

    All batches of a training have one shape, so that it is compiled once. The pass over all pictures, whose
    last batch is smaller, takes the encoder as it is.
    """
    if not encoder.params.compiled:
        return encoder
    return torch.compile(encoder, dynamic=False, backend=COMPILER)  # type: ignore[return-value]


@torch.no_grad()
def update_key_encoder(key: Encoder, query: Encoder, momentum: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q, trained parameters only: the key keeps its statistics."""
    pairs = zip(key.parameters(), query.parameters(), strict=True)
    k, q = zip(*((k, q) for k, q in pairs if q.requires_grad), strict=True)
    torch._foreach_lerp_(k, q, 1 - momentum)
