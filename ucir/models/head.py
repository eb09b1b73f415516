"""Heads: what makes an encoder's output of a trunk's pooled features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ucir.errors import UserError
from ucir.memory import Features

HIDDEN = 512
"""Width of a residual head's trained part."""


class Head(Protocol):
    """What the encoder asks of a head."""

    def __call__(self, pooled_BP: Tensor, domain_B: Tensor | None = None) -> Tensor: ...

    def projection(self) -> Iterator[nn.Parameter]:
        """Those parameters that a method which trains backbone and head apart takes for the head."""


class MocoHead(nn.Sequential):
    """Two layers, randomly initialised, as MoCo v2 has them; every domain alike."""

    def __init__(self, pooled_dim: int, feature_dim: int) -> None:
        super().__init__(nn.Linear(pooled_dim, pooled_dim), nn.ReLU(), nn.Linear(pooled_dim, feature_dim))

    def forward(self, pooled_BP: Tensor, domain_B: Tensor | None = None) -> Tensor:
        return cast(Tensor, super().forward(pooled_BP))  # type: ignore[no-untyped-call]

    def projection(self) -> Iterator[nn.Parameter]:
        return self.parameters()


class ResidualHead(nn.Module):
    """A linear map of centred features, which begins as their PCA, and a trained part, which begins at zero.

    Pooled features are brought to unit length, the mean feature of their domain is taken off, and the rest
    scaled so that the variances of the PCA's dimensions sum to one. So the start is the best linear one that
    needs no labels, and training departs from it as far as it has reasons to.
    """

    centre_2P: Tensor
    scale: Tensor

    def __init__(self, pooled_dim: int, feature_dim: int) -> None:
        super().__init__()
        if feature_dim > pooled_dim:
            raise UserError(
                f"params.yaml: start.encoder.feature_dim = {feature_dim} exceeds the {pooled_dim} pooled "
                "features of the trunk, whose PCA a residual head begins with"
            )
        self.register_buffer("centre_2P", torch.zeros(2, pooled_dim))
        self.register_buffer("scale", torch.ones(()))
        self.linear = nn.Linear(pooled_dim, feature_dim, bias=False)
        self.more = nn.Sequential(nn.Linear(pooled_dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, feature_dim))
        last = cast(nn.Linear, self.more[2])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, pooled_BP: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Pooled features to the output before its normalisation.

        Args:
            pooled_BP: of any scale.
            domain_B: 0 or 1, int64; None = not known: the nearest centre's.
        """
        x = F.normalize(pooled_BP.float(), dim=1)
        if domain_B is None:
            domain_B = self.nearest_domain(x)
        x = (x - self.centre_2P[domain_B]) * self.scale
        return cast(Tensor, self.linear(x) + self.more(x))

    def nearest_domain(self, unit_BP: Tensor) -> Tensor:
        """Whose centre is the nearest to unit pooled features, 0 or 1, int64."""
        return torch.cdist(unit_BP, self.centre_2P).argmin(dim=1)

    def projection(self) -> Iterator[nn.Parameter]:
        """The linear map: the trained part counts as backbone."""
        return self.linear.parameters()

    @torch.no_grad()
    def fit(self, pooled: Sequence[Features]) -> None:
        """Take centres, PCA and scale from two domains' pictures.

        Args:
            pooled: unit pooled features of all pictures of each domain; every worker brings its share.
        """
        centres = [x.mean() for x in pooled]
        both = zip(pooled, centres, strict=True)
        centred = [(x, x.own_ND.double() - centre.double()) for x, centre in both]
        count = sum(x.count for x in pooled)
        covariance = sum(x.total(away.T @ away) for x, away in centred) / count
        values, vectors = (x.flip(-1) for x in torch.linalg.eigh(covariance))
        kept = self.linear.out_features
        vectors = vectors[:, :kept] * vectors[:, :kept].sum(dim=0).sign()  # an eigenvector points either way
        self.centre_2P.copy_(torch.stack(centres))
        self.scale.copy_(values[:kept].sum().rsqrt())
        self.linear.weight.copy_(vectors.T)


HEADS: dict[str, type[MocoHead] | type[ResidualHead]] = {"moco": MocoHead, "residual": ResidualHead}
