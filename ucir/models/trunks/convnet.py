"""Our small network for small pictures on a CPU, not from the papers: ``trunk: {convnet: {width: 16}}``."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any, cast

from pydantic import Field
from torch import Tensor, nn

from ucir.config.base import PARAMS_FILE, Block, checked
from ucir.data.augment import InputFormat
from ucir.models.norm import GroupedBatchNorm2d
from ucir.models.trunk import Trunk


class Options(Block):
    """``trunk.convnet``."""

    width: Annotated[int, Field(ge=4, le=512)] = 64
    """Channels of the first block."""


def options(given: Any, where: str) -> Options:
    """The checked block. Raises UserError: an unknown key, a value out of range."""
    return checked(Options, given, PARAMS_FILE, where)


def build(options: Options, norm: partial[GroupedBatchNorm2d]) -> Trunk:
    """The network, randomly initialised, without its classifier."""
    net = ConvNet(options.width, norm)
    net.fc = nn.Identity()
    # "blocks.<n>.…": four modules a block
    stages = {name: int(name.split(".")[1]) // 4 for name, _ in net.named_parameters()}
    return Trunk(net, 8 * options.width, InputFormat(side=64), stages, at_positions=at_positions)


def at_positions(net: ConvNet, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features, and (B, P, h, w)."""
    grid = net.blocks(x)
    return grid.mean(dim=(2, 3)), grid


class ConvNet(nn.Module):
    """Four 3 x 3 convolution blocks, each halving the side and doubling the channels, and mean pooling.

    Built with a classifier, as torchvision's are, so that both kinds draw their weights alike.
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
