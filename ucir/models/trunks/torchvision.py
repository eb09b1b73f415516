"""torchvision's ResNets by their names there: ``trunk: {torchvision: resnet50}``."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ucir.data.augment import InputFormat
from ucir.errors import UserError, nearest
from ucir.models.norm import GroupedBatchNorm2d
from ucir.models.trunk import Trunk

NAMES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
)


def options(given: Any, where: str) -> str:
    """The network's name.

    Raises:
        UserError: no such network.
    """
    if given not in NAMES:
        raise UserError(f"{where} = {given!r}: {nearest(str(given), NAMES)}")
    return str(given)


def build(name: str, norm: partial[GroupedBatchNorm2d]) -> Trunk:
    """The network, randomly initialised, without its classifier."""
    from torchvision.models import get_model

    net = get_model(name, norm_layer=norm)
    pooled_dim = net.fc.in_features
    net.fc = nn.Identity()
    names = [name for name, _ in net.named_parameters()]
    stages = {name: int(name[5]) if name.startswith("layer") else 0 for name in names}
    return Trunk(net, pooled_dim, InputFormat(side=224), stages, at_positions=at_positions)


def at_positions(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features, and (B, P, h, w)."""
    children = dict(net.named_children())
    for name, part in children.items():
        if name == "avgpool":
            break
        x = part(x)
    return children["avgpool"](x).flatten(1), x
