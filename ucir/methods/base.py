"""What a method is to the training loop.

A method keeps its own state (bank, prototypes), prepares an epoch from the features of all images, and
turns a batch of features into weighted loss terms. It sees neither labels nor workers: the batch is
always the global one. A new method is a file with a params class and a method class, and a line in
``ucir.methods.METHODS``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from ucir.clustering import Clusters, choose_clusters, kmeans
from ucir.config import Block, Count, Positive
from ucir.memory import Bank, Features
from ucir.models.encoder import Encoder

Weight = Annotated[float, Field(ge=0)]
Epoch = Annotated[int, Field(ge=0)]


class MethodParams(Block):
    """What every method is trained with; the defaults are UCDIR's published run."""

    epochs: Count = 200
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Images of each domain in a step, over all workers together."""
    lr: Positive = 2e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Weight = 1e-4

    @property
    def most_clusters(self) -> int:
        """The largest number of clusters that is given; a domain must have as many images."""
        return 0


class KeyedParams(MethodParams):
    """Methods with a key encoder."""

    key_momentum: Annotated[float, Field(ge=0, le=1)] = 0.999
    """m of the key encoder's moving average, where a method has one."""
    key_norm_groups: Count = 2
    """Parts of the shuffled batch in which the key encoder takes batch statistics: 2 in the official code
    (SplitBN), 1 in the paper, which does not mention it."""
    retrieve_with: Literal["key", "query"] = "key"
    """Whose features are ranked, where there are two encoders; the official code ranks the key encoder's."""


def several(given: Any) -> Any:
    """One K as a list of one; what is neither numbers nor a way to choose is refused in one sentence."""
    if given in ("elbow", "silhouette"):
        return given
    numbers = given if isinstance(given, (list, tuple)) else [given]
    if not numbers or not all(isinstance(k, int) and not isinstance(k, bool) and k >= 2 for k in numbers):
        raise ValueError(f"{given!r} is not a number of at least 2, a list of them, 'elbow' or 'silhouette'")
    return tuple(numbers)


class ClusteredParams(MethodParams):
    """Methods that cluster each domain; the defaults are UCDIR's K-means."""

    clusters: Annotated[tuple[int, ...] | Literal["elbow", "silhouette"], BeforeValidator(several)]
    """K, the prototypes per domain: one number, or several whose terms are averaged (the papers give the
    number of classes), or how to choose it at the first clustering, for each domain by itself."""
    kmeans_iterations: Count = 20
    kmeans_restarts: Count = 5
    kmeans_max_points: Count = 2000

    @property
    def most_clusters(self) -> int:
        return 0 if isinstance(self.clusters, str) else max(self.clusters)

    def check_one_k(self, why: str) -> None:
        """Refuse several K, for methods that have no use for them.

        Raises:
            ValueError: there are several.
        """
        if not isinstance(self.clusters, str) and len(self.clusters) > 1:
            raise ValueError(f"clusters: {why}; give one number")


@dataclass(frozen=True)
class PhaseBatch:
    """What spectral views add to a domain's part of a step."""

    q_BD: Tensor  # as of DomainBatch, of the phase views
    k_BD: Tensor
    pooled_BP: Tensor  # unit features before the head, with gradient
    mixed_pooled_BP: Tensor


@dataclass(frozen=True)
class PhaseFeatures:
    """Unit features of all images' phase views, of each domain."""

    head: tuple[Features, Features]
    pooled: tuple[Features, Features]
    """Those before the head."""


@dataclass(frozen=True)
class DomainBatch:
    """One domain's part of a step."""

    slot_B: Tensor  # rows of the bank
    q_BD: Tensor  # query encoder's unit features, with gradient
    k_BD: Tensor  # key encoder's unit features of another view, constant; without one, q_BD's values
    frozen_BD: Tensor | None = None  # the frozen encoder's of the same view, once there is one
    phase: PhaseBatch | None = None  # of methods with spectral views: then the above are of mixed views


@dataclass(frozen=True)
class Term:
    """A loss term; the total is the sum of weight x value."""

    weight: float
    value: Tensor


P = TypeVar("P", bound=MethodParams)
CP = TypeVar("CP", bound=ClusteredParams)


class Method(ABC, Generic[P]):
    """Base of all methods.

    Args:
        params: the method's block of params.yaml.
        seed: the run's seed.
    """

    params_type: ClassVar[type[MethodParams]]
    also_runs: ClassVar[tuple[str, ...]] = ()
    """Modules of ``ucir`` that it runs through besides those that all trainings do; part of the run key."""

    spectral: ClassVar[bool] = False
    """Whether every view is seen twice, see :mod:`ucir.data.spectrum`."""
    within_epoch: ClassVar[tuple[str, ...]] = ()
    """Attributes that :meth:`start_epoch` sets: they go with a state from the middle of an epoch."""
    gate: ClassVar[Literal["spread", "merged"]] = "spread"
    """How queries without a counterpart are told, see :mod:`ucir.retrieval.gate`."""

    def __init__(self, params: P, seed: int) -> None:
        self.params = params
        self.seed = seed

    @property
    def frozen_from(self) -> int | None:
        """The epoch before which a frozen copy of the encoder is taken, if the method wants one."""
        return None

    @property
    def keyed(self) -> KeyedParams | None:
        """The params, if there is a moving average of the encoder and a second view for it."""
        return self.params if isinstance(self.params, KeyedParams) else None

    def see_phases(self, phase: PhaseFeatures) -> None:
        """Of a spectral method, before :meth:`start` and each :meth:`start_epoch`: current features."""

    @abstractmethod
    def start(self, features: tuple[Features, Features]) -> None:
        """Once, before the first epoch: unit features of all images of both domains."""

    @abstractmethod
    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        """Before each epoch, with the current features. Returns figures worth logging."""

    @abstractmethod
    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        """The loss terms of a step; terms of weight zero are left out."""

    def after_step(self, batch: tuple[DomainBatch, DomainBatch]) -> None:
        """Once the encoder has moved: what may only change when gradients are through."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What must outlive a kill, as of the end of an epoch; whole on the first worker alone."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`'s value."""

    def optimizer(self, encoder: Encoder) -> torch.optim.Optimizer:
        """SGD, as UCDIR trains. A group's ``lr_scale`` multiplies :meth:`lr_at`."""
        p = self.params
        return torch.optim.SGD(encoder.parameters(), p.lr, momentum=p.momentum, weight_decay=p.weight_decay)

    def lr_at(self, epoch: int, steps: int) -> float:
        """Learning rate: half a cosine from ``lr`` to 0, by epoch, as UCDIR trains.

        Args:
            epoch: number of the epoch.
            steps: done before, in all epochs.
        """
        return self.params.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.params.epochs))


class BankMethod(Method[P]):
    """Methods with a bank for each domain, filled with the start's features."""

    banks: tuple[Bank, Bank]

    def __init__(self, params: P, seed: int) -> None:
        super().__init__(params, seed)
        self.chosen: list[tuple[int, ...]] = []
        """K of each domain, where the method clusters."""

    def start(self, features: tuple[Features, Features]) -> None:
        self.banks = (Bank(features[0]), Bank(features[1]))

    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        banks = [bank.on_first().cpu() for bank in self.banks]
        return {"banks": banks, "chosen": [list(own) for own in self.chosen]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        first, second = state["banks"]
        self.banks = (Bank(first), Bank(second))
        self.chosen = [tuple(own) for own in state["chosen"]]


class ClusteringMethod(BankMethod[CP]):
    """Methods that cluster both domains before an epoch."""

    def choose(self, features: tuple[Features, Features]) -> list[tuple[int, ...]]:
        """K of each domain: as given, or chosen at the first call and then kept."""
        k = self.params.clusters
        if not self.chosen:
            self.chosen = [(choose_clusters(x, k, self.seed),) if isinstance(k, str) else k for x in features]
        return self.chosen

    def cluster(self, features: tuple[Features, Features]) -> tuple[list[Clusters], list[Clusters]]:
        """Clusterings of both domains, one for each K, each with its own seed as in the official code."""
        p = self.params
        first, second = (
            [
                kmeans(
                    x,
                    k,
                    iterations=p.kmeans_iterations,
                    restarts=p.kmeans_restarts,
                    seed=self.seed + number,
                    max_points=p.kmeans_max_points,
                )
                for number, k in enumerate(own)
            ]
            for x, own in zip(features, self.choose(features), strict=True)
        )
        return first, second


def cluster_figures(clusters: tuple[list[Clusters], list[Clusters]]) -> dict[str, float]:
    """What is worth logging of an epoch's clusterings; over several K the most extreme."""
    told: dict[str, float] = {}
    for side, own in zip("ab", clusters, strict=True):
        told[f"cluster/count_{side}"] = float(len(own[0].size_K))
        told[f"cluster/empty_{side}"] = float(max(int((c.size_K == 0).sum()) for c in own))
        told[f"cluster/smallest_{side}"] = float(min(int(c.size_K.min()) for c in own))
        told[f"cluster/largest_{side}"] = float(max(int(c.size_K.max()) for c in own))
    return told
