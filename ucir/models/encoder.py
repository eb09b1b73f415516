"""The encoder: backbone, two-layer head as in MoCo v2, L2-normalised output; and its moving average.

The parameter names are torchvision's ResNet names with the head as ``fc.0`` and ``fc.2``, so that a
state dict is interchangeable with MoCo v2's published checkpoints.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ucir.config.model import EncoderParams
from ucir.models.norm import GroupedBatchNorm2d


class Encoder(nn.Module):
    """Images to unit features.

    Args:
        params: the ``encoder`` block.
        norm_groups: parts of the batch with their own batch statistics; 2 for a key encoder.
    """

    def __init__(self, params: EncoderParams, norm_groups: int = 1) -> None:
        super().__init__()
        norm = partial(GroupedBatchNorm2d, groups=norm_groups)
        if params.backbone == "convnet":
            self.net: nn.Module = ConvNet(params.width, norm)
        else:
            from torchvision.models import get_model

            self.net = get_model(params.backbone, norm_layer=norm)
        pooled_dim = cast(nn.Linear, self.net.fc).in_features
        self.net.fc = nn.Sequential(
            nn.Linear(pooled_dim, pooled_dim), nn.ReLU(), nn.Linear(pooled_dim, params.feature_dim)
        )

    def forward(self, x: Tensor, pooled: bool | Literal["both"] = False) -> Tensor:
        """Normalised images (B, 3, s, s) to unit features (B, D), float32; with ``pooled`` those before the
        head (2048 of a ResNet-50), with ``both`` the head's and these side by side."""
        if not pooled:
            return F.normalize(self.net(x).float(), dim=1)
        kept: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda head, given: kept.append(given[0]))
        try:
            out = self.net(x)
        finally:
            hook.remove()
        before = F.normalize(kept[0].float(), dim=1)
        return torch.cat([F.normalize(out.float(), dim=1), before], dim=1) if pooled == "both" else before

    @property
    def feature_dim(self) -> int:
        """Length of the head's output."""
        return cast(nn.Linear, self.head[-1]).out_features

    @property
    def pooled_dim(self) -> int:
        """Length of what goes into the head."""
        return cast(nn.Linear, self.head[0]).in_features

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def head(self) -> nn.Sequential:
        """The two-layer head."""
        return cast(nn.Sequential, self.net.fc)


class ConvNet(nn.Module):
    """Four 3 x 3 convolution blocks, each halving the side and doubling the channels, and mean pooling.

    For small pictures on a CPU; not from the papers.
    """

    def __init__(self, width: int, norm: partial[GroupedBatchNorm2d]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (width, 2 * width, 4 * width, 8 * width):
            layers += [
                nn.Conv2d(channels, out, 3, padding=1, bias=False),
                norm(out),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
            channels = out
        self.blocks = nn.Sequential(*layers[:-1])  # the last block is pooled as a whole
        self.fc: nn.Module = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc(self.blocks(x).mean(dim=(2, 3))))


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
