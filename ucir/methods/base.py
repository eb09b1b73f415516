"""What a method is to the training loop.

A method keeps its own state (bank, prototypes), prepares an epoch from the features of all images, and
turns a batch of features into weighted loss terms. It sees neither labels nor workers: the batch is
always the global one. A new method is a file with a params class and a method class, and a line in
``ucir.methods.METHODS``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ucir.config import Block, Count, Positive


class MethodParams(Block):
    """What every method is trained with; the defaults are UCDIR's published run."""

    epochs: Count = 200
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images of each domain in a step, over all workers together."""
    lr: Positive = 2e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    key_momentum: Annotated[float, Field(ge=0, le=1)] = 0.999
    clusters: Annotated[int, Field(ge=2)]
    """K, the prototypes per domain; the papers give the number of classes."""


@dataclass(frozen=True)
class DomainBatch:
    """One domain's part of a step."""

    slot_B: Tensor  # rows of the bank
    q_BD: Tensor  # query encoder's unit features, with gradient
    k_BD: Tensor  # key encoder's unit features of another view, constant


@dataclass(frozen=True)
class Term:
    """A loss term; the total is the sum of weight x value."""

    weight: float
    value: Tensor


P = TypeVar("P", bound=MethodParams)


class Method(ABC, Generic[P]):
    """Base of all methods.

    Args:
        params: the method's block of params.yaml.
        seed: the run's seed.
    """

    params_type: ClassVar[type[MethodParams]]

    def __init__(self, params: P, seed: int) -> None:
        self.params = params
        self.seed = seed

    @abstractmethod
    def start(self, features: tuple[Tensor, Tensor]) -> None:
        """Once, before the first epoch: unit features (N, D) of all images of both domains."""

    @abstractmethod
    def start_epoch(self, epoch: int, features: tuple[Tensor, Tensor]) -> dict[str, float]:
        """Before each epoch, with the current features. Returns figures worth logging."""

    @abstractmethod
    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        """The loss terms of a step; terms of weight zero are left out."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What must outlive a kill, as of the end of an epoch."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`'s value."""

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """SGD, as UCDIR trains."""
        p = self.params
        return torch.optim.SGD(parameters, p.lr, momentum=p.momentum, weight_decay=p.weight_decay)

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch: half a cosine from ``lr`` to 0, by epoch, as UCDIR trains."""
        return self.params.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.params.epochs))
