"""The encoder: trunk, two-layer head as in MoCo v2, L2-normalised output; and its moving average."""

from __future__ import annotations

import copy
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ucir.config.model import EncoderParams
from ucir.data.augment import InputFormat
from ucir.models.norm import GroupedBatchNorm2d
from ucir.models.trunk import new_trunk

HEAD = "fc."
"""What the head's parameters are called in MoCo v2's checkpoints; the trunk's have torchvision's names."""


class Encoder(nn.Module):
    """Images to unit features.

    Args:
        params: the ``encoder`` block.
        norm_groups: parts of the batch with their own batch statistics; 2 for a key encoder.
    """

    def __init__(self, params: EncoderParams, norm_groups: int = 1) -> None:
        super().__init__()
        self.params = params
        self.trunk = new_trunk(params.trunk, partial(GroupedBatchNorm2d, groups=norm_groups))
        pooled_dim = self.trunk.pooled_dim
        self.head = nn.Sequential(
            nn.Linear(pooled_dim, pooled_dim), nn.ReLU(), nn.Linear(pooled_dim, params.feature_dim)
        )

    def forward(self, x: Tensor, pooled: bool | Literal["both"] = False) -> Tensor:
        """Normalised images (B, 3, s, s) to unit features (B, D), float32; with ``pooled`` those before the
        head (2048 of a ResNet-50), with ``both`` the head's and these side by side."""
        before = self.trunk(x)
        if pooled is True:
            return F.normalize(before.float(), dim=1)
        out = F.normalize(self.head(before).float(), dim=1)
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

    def moco_state(self) -> dict[str, Tensor]:
        """Its state by MoCo v2's names: torchvision's, and the head as ``fc.0`` and ``fc.2``."""
        head = {HEAD + name: value for name, value in self.head.state_dict().items()}
        return {**self.trunk.net.state_dict(), **head}

    def load_moco_state(self, state: dict[str, Tensor]) -> None:
        """Take up :meth:`moco_state`'s value."""
        head = {name.removeprefix(HEAD): x for name, x in state.items() if name.startswith(HEAD)}
        self.head.load_state_dict(head)
        self.trunk.net.load_state_dict({n: x for n, x in state.items() if not n.startswith(HEAD)})


def new_encoder(params: EncoderParams, seed: int, norm_groups: int = 1) -> Encoder:
    """A randomly initialised encoder that depends on ``params`` and ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(params, norm_groups)
    return encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def key_encoder_of(encoder: Encoder, norm_groups: int = 2) -> Encoder:
    """A frozen copy for the moving average, normalising over so many equal parts of the batch."""
    key = copy.deepcopy(encoder)
    key.requires_grad_(False)
    for module in key.modules():
        if isinstance(module, GroupedBatchNorm2d):
            module.groups = norm_groups
    return key


@torch.no_grad()
def update_key_encoder(key: Encoder, query: Encoder, momentum: float) -> None:
    """theta_k <- m theta_k + (1 - m) theta_q, parameters only: running statistics stay the key's own."""
    torch._foreach_lerp_(list(key.parameters()), list(query.parameters()), 1 - momentum)
