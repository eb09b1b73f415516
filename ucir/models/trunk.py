"""A trunk: a network without its classifier, which knows what pictures it takes."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, cast

from torch import Tensor, nn

from ucir.data.augment import InputFormat
from ucir.errors import UserError, nearest
from ucir.models import trunks
from ucir.models.norm import GroupedBatchNorm2d


class Trunk(nn.Module):
    """Pictures to pooled features.

    Args:
        net: (B, 3, s, s) to (B, P).
        pooled_dim: P.
        form: of the pictures that it takes.
    """

    def __init__(self, net: nn.Module, pooled_dim: int, form: InputFormat) -> None:
        super().__init__()
        self.net = net
        self.pooled_dim = pooled_dim
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


def trunk_module(block: dict[str, Any]) -> str:
    """The module of a block ``{<kind>: <options>}``: what a run's code depends on."""
    (kind,) = block
    return f"{trunks.__name__}.{kind}"


def check_trunk(block: dict[str, Any], where: str) -> tuple[Any, Any]:
    """The kind's module and its checked options.

    Args:
        block: ``{<kind>: <options>}``.
        where: its place in params.yaml, for messages.

    Raises:
        UserError: an unknown kind; options that it refuses.
    """
    ((kind, given),) = block.items()
    kinds = [module.name for module in iter_modules(trunks.__path__)]
    if kind not in kinds:
        raise UserError(f"{where}: no trunk of kind {kind!r}; {nearest(kind, kinds)}")
    module = import_module(trunk_module(block))
    return module, module.options(given, f"{where}.{kind}")


def new_trunk(block: dict[str, Any], norm: partial[GroupedBatchNorm2d]) -> Trunk:
    """A trunk with random weights. Raises as :func:`check_trunk`."""
    module, options = check_trunk(block, "trunk")
    return cast(Trunk, module.build(options, norm))
