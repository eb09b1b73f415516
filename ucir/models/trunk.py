"""A trunk: a network without its classifier, which knows what pictures it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Literal, Self, cast

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
        stages: name of each of the network's parameters to the number of its stage, from the input on.
        layer_decay: factor of the learning rate from one stage to the one before; transformers want it.
        at_positions: ``net`` and pictures to what ``net`` gives of them and the features at each position
            that this is pooled from, (B, P, h, w) or (B, L, P); None: it has none.
    """

    def __init__(
        self,
        net: nn.Module,
        pooled_dim: int,
        form: InputFormat,
        stages: dict[str, int] | None = None,
        layer_decay: float = 1.0,
        at_positions: Callable[[Any, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.pooled_dim = pooled_dim
        self.form = form
        self.stages = stages or {}
        self.layer_decay = layer_decay
        self.at_positions = at_positions
        self.trained = "all"

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features (B, P), and those at L positions that they are pooled from (B, L, P).

        Raises:
            UserError: the network has none, or of another length.
        """
        if self.at_positions is None:
            raise UserError(f"{type(self.net).__name__} has no features at positions; take another trunk")
        pooled_BP, grid = self.at_positions(self.net, x)
        grid_BLP = grid.flatten(2).transpose(1, 2) if grid.ndim == 4 else grid
        if grid_BLP.shape[2] != self.pooled_dim:
            raise UserError(
                f"{type(self.net).__name__} has {grid_BLP.shape[2]} features at a position and "
                f"{self.pooled_dim} pooled ones; take a trunk that has equally many"
            )
        return pooled_BP, grid_BLP

    def train_only(self, part: Literal["all", "last", "head"]) -> None:
        """Freeze what is not trained, with its batch statistics.

        Args:
            part: all stages, the last one, or none.
        """
        self.trained = part
        border = {"all": 0, "last": self._last_stage(), "head": sys.maxsize}[part]
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(self.stages[name] >= border)
        self.train(self.training)

    def _last_stage(self) -> int:
        """The last one with a weight matrix: a normalisation alone is no stage."""
        return max(self.stages[n] for n, p in self.net.named_parameters() if p.ndim > 1)

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for the batch statistics of frozen stages."""
        super().train(mode)
        if mode and self.trained != "all":
            for module in self.net.modules():
                parameters = list(module.parameters(recurse=False))
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trained parameters for an optimizer; ``lr_scale`` is a factor of the learning rate."""
        by_scale: dict[float, list[nn.Parameter]] = {}
        last = max(self.stages.values(), default=0)
        for name, parameter in self.net.named_parameters():
            if parameter.requires_grad:
                scale = self.layer_decay ** (last - self.stages[name]) if self.layer_decay != 1 else 1.0
                by_scale.setdefault(scale, []).append(parameter)
        return [{"params": parameters, "lr_scale": scale} for scale, parameters in by_scale.items()]


class StoredTrunk(Trunk):
    """Stands where a frozen trunk's pooled features come from a feature pack: it passes them on."""

    def __init__(self, pooled_dim: int) -> None:
        super().__init__(nn.Identity(), pooled_dim, InputFormat(side=0))

    def forward(self, x: Tensor) -> Tensor:
        return x.float()


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
