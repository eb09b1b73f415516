"""The standard step of a training: two random views of each picture, a query and a key encoder.

A step renders views on the CPU, passes them through the networks, and takes features of all pictures between
epochs. A method that needs more brings its own beside itself, see :class:`ucir.methods.dgdir.SpectralStep`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from ucir.data.batches import seeded
from ucir.data.views import Views
from ucir.distributed import gather_rows, own_rows, world_size
from ucir.memory import Features
from ucir.models.encoder import Encoder, as_stepped, key_encoder_of, update_key_encoder
from ucir.models.features import extract_features
from ucir.models.head import ResidualHead

if TYPE_CHECKING:
    from ucir.methods.base import Method


@dataclass(frozen=True)
class Rendered:
    """What this worker computes of a step, still on the CPU."""

    slots: tuple[Tensor, ...]
    query: Tensor  # views of its own rows of the batch [first domain; second domain]
    query_domain: Tensor  # the number of their domains, int64
    key: Tensor | None  # other views, of its own rows of the shuffled batch
    key_domain: Tensor
    shuffle: Tensor


@dataclass(frozen=True)
class DomainBatch:
    """One domain's part of a step."""

    slot_B: Tensor  # rows of the bank
    q_BD: Tensor  # query encoder's unit features, with gradient
    k_BD: Tensor  # key encoder's unit features of another view, constant; without one, q_BD's values


PairBatch = tuple[DomainBatch, DomainBatch]


class Networks(nn.Module):
    """All networks of a training, with one state.

    Args:
        query: the encoder that is trained.
        key: its moving average, if the method has one.
        of_method: what else the method trains, see :meth:`ucir.methods.base.Method.build`.
    """

    def __init__(self, query: Encoder, key: Encoder | None, of_method: nn.ModuleDict) -> None:
        super().__init__()
        self.query = query
        self.key = key
        self.frozen: Encoder | None = None
        self.of_method = of_method

    def freeze(self) -> Encoder:
        """Take a copy of the query encoder that nothing changes any more."""
        self.frozen = copy.deepcopy(self.query).requires_grad_(False).eval()
        return self.frozen

    def take_up(self, state: dict[str, Tensor]) -> None:
        """Load ``state_dict()``'s value; a frozen copy is made where it has one."""
        if self.frozen is None and any(name.startswith("frozen.") for name in state):
            self.freeze()
        self.load_state_dict(state)


class Step:
    """How a training renders and computes a step.

    Args:
        method: holds params and seed.
        views: of the domains' pictures.
        query: the encoder that is trained, on ``device``.
        device: where this worker computes.
    """

    views_per_image = 1
    """Views that the query encoder sees of each picture of a batch."""
    needs_pixels = ""
    """Which method does what with pictures, where stored features will not do."""

    def __init__(
        self,
        method: Method[Any],
        views: Views,
        query: Encoder,
        device: torch.device,
    ) -> None:
        self.method, self.views, self.device = method, views, device
        keyed = method.keyed
        key = key_encoder_of(query, keyed.key_norm_groups) if keyed else None
        self.networks = Networks(query, key, method.build(query))
        self.model = as_stepped(query)
        self.key_model = as_stepped(key) if key else None
        if world_size() > 1:
            # batch statistics are already global, so there are no buffers to keep in step
            self.model = nn.parallel.DistributedDataParallel(
                self.model, forward_sync_buffers=False, gradient_as_bucket_view=True
            )

    @property
    def retrieval_encoder(self) -> Encoder:
        """The one whose features are ranked and whose weights are kept."""
        keyed, key = self.method.keyed, self.networks.key
        return key if key and keyed and keyed.retrieve_with == "key" else self.networks.query

    def train_mode(self) -> None:
        """Batch statistics of the batch; a frozen copy keeps its own."""
        self.model.train()
        if self.networks.key:
            self.networks.key.train()

    def begin_epoch(self, epoch: int) -> None:
        """Before the method's own preparation of an epoch."""

    def features(self, encoder: Encoder | None = None) -> tuple[Features, ...]:
        """Features of all images by the key encoder, if there is one: what methods cluster.

        Args:
            encoder: another one to ask.
        """
        encoder = encoder or self.networks.key or self.networks.query
        return extract_features(encoder, self.views, self.device)

    def fit_head(self) -> None:
        """Once, before anything is trained: a head that begins with the pictures' features takes them."""
        query, key = self.networks.query, self.networks.key
        if isinstance(query.head, ResidualHead):
            pooled = extract_features(query, self.views, self.device, pooled=True)
            for network in (query, key) if key else (query,):
                cast(ResidualHead, network.head).fit(pooled)

    def render(self, epoch: int, item: tuple[int, Any]) -> Rendered:
        """Draw and render this worker's rows of a step; everything random comes from (seed, epoch, step).

        Args:
            epoch: its number.
            item: the step's number, and what the batches give for it: slots of each domain.
        """
        step, slots = item
        generator = seeded(self.method.seed, epoch, step)
        domain_B = torch.cat([torch.full_like(slot, number) for number, slot in enumerate(slots)])
        slot_B = torch.cat(slots)
        query_draw = self.draw_query(domain_B, slot_B, generator)
        key_draw = self.draw(domain_B, slot_B, generator)
        count = self.views_per_image * len(slot_B)
        shuffle = torch.randperm(count, generator=generator)
        rows = torch.arange(count)[own_rows(count)]
        query = self.rendered(domain_B, slot_B, query_draw, rows, generator)
        key, key_rows = None, shuffle[own_rows(count)]
        if self.networks.key:
            key = self.rendered(domain_B, slot_B, key_draw, key_rows, generator)
        images = len(slot_B)
        return Rendered(slots, query, domain_B[rows % images], key, domain_B[key_rows % images], shuffle)

    def draw(self, domain_B: Tensor, slot_B: Tensor, generator: torch.Generator) -> Any:
        """The random numbers of an encoder's views."""
        return self.views.draw(domain_B, slot_B, generator)

    def draw_query(self, domain_B: Tensor, slot_B: Tensor, generator: torch.Generator) -> Any:
        """The same, of the query encoder's."""
        return self.draw(domain_B, slot_B, generator)

    def rendered(
        self, domain_B: Tensor, slot_B: Tensor, draw: Any, rows: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Views of these rows of the batch [first domain; second domain]."""
        return self.views.random(domain_B[rows], slot_B[rows], draw[rows])

    def forward(self, views: Rendered) -> Any:
        """What the method's losses are given: both domains' part of the global batch.

        The key encoder follows first. Both domains pass through a network as one batch. The key encoder's
        rows are shuffled, so that its two halves of batch statistics mix the domains (MoCo's ShuffleBN).
        """
        q, k = self.query_and_key(views)
        half = len(q) // 2
        first, second = (
            DomainBatch(slot.to(self.device), q[rows], k[rows])
            for slot, rows in zip(views.slots, (slice(half), slice(half, None)), strict=True)
        )
        return first, second

    def query_and_key(self, views: Rendered) -> tuple[Tensor, Tensor]:
        """Features of all rows of the batch, whoever computed them: with gradient, and constant."""
        self.follow()
        q = self.queries(self.model, views)
        return q, q.detach() if views.key is None else self.keys(views)

    def queries(
        self, model: nn.Module, views: Rendered, pooled: bool | Literal["both", "raw"] = False
    ) -> Tensor:
        """A network's features of the query views of all rows of the batch."""
        x = model(views.query.to(self.device), pooled, views.query_domain.to(self.device))
        return gather_rows(x, len(views.shuffle))

    def follow(self) -> None:
        """The key encoder's moving average."""
        if self.networks.key and self.method.keyed:
            update_key_encoder(self.networks.key, self.networks.query, self.method.keyed.key_momentum)

    @torch.no_grad()
    def keys(self, views: Rendered) -> Tensor:
        """The key encoder's features, in the batch's order."""
        assert self.key_model is not None
        assert views.key is not None
        x = self.key_model(views.key.to(self.device), domain_B=views.key_domain.to(self.device))
        shuffled = gather_rows(x, len(views.shuffle))
        k = torch.empty_like(shuffled)
        k[views.shuffle.to(self.device)] = shuffled
        return k

    def inputs(self, batch: Any) -> dict[str, Tensor]:
        """A batch's features by name, for whoever looks for the cause of a fault."""
        return {
            f"{name}_{side}": x
            for side, part in zip("ab", batch, strict=True)
            for name, x in (("query", part.q_BD), ("key", part.k_BD))
        }
