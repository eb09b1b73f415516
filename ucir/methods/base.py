"""What a method is to the training loop.

A method keeps its own state (bank, prototypes), prepares an epoch from the features of all images, and
turns a batch of features into weighted loss terms. It sees neither labels nor workers: the batch is
always the global one. A new method is a file with a params class and a method class, and a line in
``ucir.methods.registry.METHODS``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor, nn

from ucir.config.base import Block, Count, Positive, Share
from ucir.data.batches import Batches, PairBatches
from ucir.memory import Bank, Features
from ucir.methods.step import DomainBatch, Step
from ucir.models.encoder import Encoder
from ucir.prototypes.clustering import Clusters, choose_clusters, cluster_means, kmeans

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


BY_EPOCHS = "by-epochs"
"""A momentum that is published for more epochs than a training has, see :func:`shorter`."""


def shorter(published: float, of_epochs: int, epochs: int) -> float:
    """The momentum with which a moving average goes in ``epochs`` as far as the published one in its own.

    What is kept of the beginning is m^(steps), and the steps go with the epochs.
    """
    return float(published ** (of_epochs / epochs))


def _by_epochs(cls: type[Block], given: Any, name: str) -> Any:
    """Put the number in place of :data:`BY_EPOCHS`, so that what a run is keyed by is a number."""
    if not isinstance(given, dict) or given.get(name) != BY_EPOCHS:
        return given
    fields = cls.model_fields
    of_epochs = fields["epochs"].default
    epochs = given.get("epochs", of_epochs)
    if not isinstance(epochs, int) or epochs < 1:  # refused by its own field
        epochs = of_epochs
    return {**given, name: shorter(fields[name].default, of_epochs, epochs)}


class KeyedParams(MethodParams):
    """Methods with a key encoder."""

    key_momentum: Annotated[float, Field(ge=0, le=1)] = 0.999
    """m of the key encoder's moving average, where a method has one; ``by-epochs``: as far as the published
    one in as many epochs as are published."""
    key_norm_groups: Count = 2
    """Parts of the shuffled batch in which the key encoder takes batch statistics: 2 in the official code
    (SplitBN), 1 in the paper, which does not mention it."""
    retrieve_with: Literal["key", "query"] = "key"
    """Whose features are ranked, where there are two encoders; the official code ranks the key encoder's."""

    @model_validator(mode="before")
    @classmethod
    def _key_momentum_by_epochs(cls, given: Any) -> Any:
        return _by_epochs(cls, given, "key_momentum")


def several(given: Any) -> Any:
    """One K as a list of one; what is neither numbers nor a way to choose is refused in one sentence."""
    if given in ("elbow", "silhouette"):
        return given
    numbers = given if isinstance(given, (list, tuple)) else [given]
    if not numbers or not all(isinstance(k, int) and not isinstance(k, bool) and k >= 2 for k in numbers):
        raise ValueError(f"{given!r} is not a number of at least 2, a list of them, 'elbow' or 'silhouette'")
    return tuple(numbers)


def never_warm(every: int) -> int:
    """Zero: for methods whose clusterings have no last epoch to go on from.

    Raises:
        ValueError: another number.
    """
    if every:
        raise ValueError(f"{every} is refused: this method starts each of its clusterings anew; leave it out")
    return every


NeverWarm = Annotated[Epoch, AfterValidator(never_warm)]


class ClusteredParams(MethodParams):
    """Methods that cluster each domain; the defaults are UCDIR's K-means."""

    clusters: Annotated[tuple[int, ...] | Literal["elbow", "silhouette"], BeforeValidator(several)]
    """K, the prototypes per domain: one number, or several whose terms are averaged (the papers give the
    number of classes), or how to choose it at the first clustering, for each domain by itself."""
    kmeans_iterations: Count = 20
    kmeans_restarts: Count = 5
    kmeans_max_points: Count = 2000
    kmeans_sample: Count | None = None
    """Restarts are tried on at most this many points a cluster, and the best goes on with all; None: each
    with all, as in the official code."""
    kmeans_warm: Epoch = 0
    """Epochs between restarts: in between K-means goes on from the last epoch's clusters; 0: restarts in
    every epoch, as in the official code."""

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
    step_type: ClassVar[type[Step]] = Step
    """How it renders and computes a step."""
    lasting: ClassVar[tuple[str, ...]] = ()
    """Attributes that must outlive a kill at an epoch's end."""
    within_epoch: ClassVar[tuple[str, ...]] = ()
    """Attributes that :meth:`start_epoch` sets anew: they must outlive a kill in the middle of an epoch."""

    def __init__(self, params: P, seed: int) -> None:
        self.params = params
        self.seed = seed

    @property
    def keyed(self) -> KeyedParams | None:
        """The params, if there is a moving average of the encoder and a second view for it."""
        return self.params if isinstance(self.params, KeyedParams) else None

    def batches(self, counts: Sequence[int]) -> Batches:
        """Which pictures meet in a step; as many of each domain, unless a method has it otherwise.

        Args:
            counts: pictures of the domains.
        """
        first, second = counts
        return PairBatches(first, second, self.params.batch_size, self.seed)

    def build(self, encoder: Encoder) -> nn.ModuleDict:
        """Once, before :meth:`optimizer`: what it trains beside the encoder, on the encoder's device.

        Its parameters are trained where :meth:`parameter_groups` names them.
        """
        return nn.ModuleDict()

    @abstractmethod
    def start(self, features: tuple[Features, Features]) -> None:
        """Once, before the first epoch: unit features of all images of both domains."""

    @abstractmethod
    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        """Before each epoch, with the current features. Returns figures worth logging."""

    @abstractmethod
    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        """The loss terms of a step; those whose weight is zero throughout are left out."""

    def after_step(self, batch: tuple[DomainBatch, DomainBatch]) -> None:
        """Once the encoder has moved: what may only change when gradients are through."""

    def state_dict(self, within_epoch: bool = False) -> dict[str, Any]:
        """What must outlive a kill, beside the networks; whole on the first worker alone.

        Args:
            within_epoch: it is not the end of an epoch.
        """
        names = (*self.lasting, *(self.within_epoch if within_epoch else ()))
        return {name: _stored(getattr(self, name, None)) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`'s value, on the device where it is to be."""
        for name, value in state.items():
            setattr(self, name, _taken_up(value))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Of what :meth:`build` made, which every worker trains alike, for :meth:`optimizer`."""
        return []

    def optimizer(self, encoder: Encoder) -> torch.optim.Optimizer:
        """SGD, as UCDIR trains. A group's ``lr_scale`` multiplies :meth:`lr_at`."""
        p = self.params
        groups = [*encoder.parameter_groups(), *self.parameter_groups()]
        return torch.optim.SGD(groups, p.lr, momentum=p.momentum, weight_decay=p.weight_decay)

    def set_rates(self, optimizer: torch.optim.Optimizer, epoch: int, steps: int) -> None:
        """Before each step. Arguments as of :meth:`lr_at`."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr_at(epoch, steps) * group.get("lr_scale", 1.0)

    def lr_at(self, epoch: int, steps: int) -> float:
        """Learning rate: half a cosine from ``lr`` to 0, by epoch, as UCDIR trains.

        Args:
            epoch: number of the epoch.
            steps: done before, in all epochs.
        """
        return self.params.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.params.epochs))


class BankMethod(Method[P]):
    """Methods with a bank for each domain, filled with the start's features."""

    lasting: ClassVar[tuple[str, ...]] = ("banks", "chosen")
    banks: tuple[Bank, Bank]

    def __init__(self, params: P, seed: int) -> None:
        super().__init__(params, seed)
        self.chosen: list[tuple[int, ...]] = []
        """K of each domain, where the method clusters."""

    def start(self, features: tuple[Features, Features]) -> None:
        self.banks = (Bank(features[0]), Bank(features[1]))

    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        return {}


class SingleEncoderParams(MethodParams):
    """Methods without a key encoder."""

    bank_momentum: Share = 0.5
    """v <- m v + (1 - m) f, normalised; ``by-epochs`` as for a key encoder."""

    @model_validator(mode="before")
    @classmethod
    def _bank_momentum_by_epochs(cls, given: Any) -> Any:
        return _by_epochs(cls, given, "bank_momentum")


S = TypeVar("S", bound=SingleEncoderParams)


class SingleEncoder(BankMethod[S]):
    """One encoder and no keys: the bank takes up the features themselves, once gradients are through."""

    def after_step(self, batch: tuple[DomainBatch, DomainBatch]) -> None:
        for bank, part in zip(self.banks, batch, strict=True):
            bank.blend(part.slot_B, part.k_BD, self.params.bank_momentum)


SETTLED = 1e-3
"""K-means by a shorter way ends where an iteration lowers the cost by a smaller share."""


class ClusteringMethod(BankMethod[CP]):
    """Methods that cluster both domains before an epoch."""

    lasting = (*BankMethod.lasting, "labels_before")

    def __init__(self, params: CP, seed: int) -> None:
        super().__init__(params, seed)
        self.labels_before: list[list[Tensor]] = []
        """Of each domain and K, where K-means goes on from them."""

    def choose(self, features: tuple[Features, Features]) -> list[tuple[int, ...]]:
        """K of each domain: as given, or chosen at the first call and then kept."""
        k = self.params.clusters
        if not self.chosen:
            self.chosen = [(choose_clusters(x, k, self.seed),) if isinstance(k, str) else k for x in features]
        return self.chosen

    def kmeans(
        self,
        features: Features,
        k: int,
        seed: int,
        *,
        spherical: bool = False,
        initial_KD: Tensor | None = None,
    ) -> Clusters:
        """K-means with the method's params; arguments as of :func:`ucir.prototypes.clustering.kmeans`."""
        p = self.params
        return kmeans(
            features,
            k,
            iterations=p.kmeans_iterations,
            restarts=p.kmeans_restarts,
            seed=seed,
            max_points=p.kmeans_max_points,
            spherical=spherical,
            initial_KD=initial_KD,
            sample=p.kmeans_sample,
            settled=SETTLED,
        )

    def cluster(
        self, epoch: int, features: tuple[Features, Features]
    ) -> tuple[list[Clusters], list[Clusters]]:
        """Clusterings of both domains, one for each K, each with its own seed as in the official code."""
        every = self.params.kmeans_warm
        warm = bool(self.labels_before) and epoch % every > 0
        first, second = (
            [
                self.kmeans(
                    x,
                    k,
                    self.seed + number,
                    initial_KD=cluster_means(x, self.labels_before[side][number], k) if warm else None,
                )
                for number, k in enumerate(counts)
            ]
            for side, (x, counts) in enumerate(zip(features, self.choose(features), strict=True))
        )
        if every:
            self.labels_before = [[c.label_N for c in clusterings] for clusterings in (first, second)]
        return first, second


def cluster_figures(clusters: tuple[list[Clusters], list[Clusters]]) -> dict[str, float]:
    """What is worth logging of an epoch's clusterings: the first K, the most extreme sizes of all K."""
    figures: dict[str, float] = {}
    for side, clusterings in zip("ab", clusters, strict=True):
        figures[f"cluster/count_{side}"] = float(len(clusterings[0].size_K))
        figures[f"cluster/empty_{side}"] = float(max(int((c.size_K == 0).sum()) for c in clusterings))
        figures[f"cluster/smallest_{side}"] = float(min(int(c.size_K.min()) for c in clusterings))
        figures[f"cluster/largest_{side}"] = float(max(int(c.size_K.max()) for c in clusterings))
    return figures


def _stored(value: Any) -> Any:
    """A part of a state as ``torch.save`` keeps it; a bank as its rows, whole on the first worker."""
    if isinstance(value, Bank):
        return {"bank": value.on_first().cpu()}
    return type(value)(_stored(part) for part in value) if type(value) in (list, tuple) else value


def _taken_up(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"bank"}:
        return Bank(value["bank"])
    return type(value)(_taken_up(part) for part in value) if type(value) in (list, tuple) else value
