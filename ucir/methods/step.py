"""The standard step of a training: two random views of each picture, a query and a key encoder.

A step renders views on the CPU, passes them through the networks, and takes features of all pictures between
epochs. A method that needs more brings its own beside itself, see :class:`ucir.methods.dgdir.SpectralStep`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ucir.config.data import ViewParams
from ucir.data.augment import ViewDraw, draw_view, render_views
from ucir.data.batches import seeded
from ucir.data.pack import DomainImages, stored_pictures
from ucir.distributed import gather_rows, own_rows, world_size
from ucir.memory import Features
from ucir.models.encoder import Encoder, key_encoder_of, update_key_encoder
from ucir.models.features import extract_features

if TYPE_CHECKING:
    from ucir.methods.base import Method


@dataclass(frozen=True)
class Views:
    """What this worker computes of a step, still on the CPU."""

    slots: tuple[Tensor, ...]
    query: Tensor  # views of its own rows of the batch [first domain; second domain]
    key: Tensor | None  # other views, of its own rows of the shuffled batch
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
        images: the domains.
        view: size and augmentation.
        query: the encoder that is trained, on ``device``.
        device: where this worker computes.
    """

    views_per_image = 1
    """Views that the query encoder sees of each picture of a batch."""

    def __init__(
        self,
        method: Method[Any],
        images: tuple[DomainImages, ...],
        view: ViewParams,
        query: Encoder,
        device: torch.device,
    ) -> None:
        self.method, self.images, self.view, self.device = method, images, view, device
        keyed = method.keyed
        key = key_encoder_of(query, keyed.key_norm_groups) if keyed else None
        self.networks = Networks(query, key, method.build(query))
        self.model: nn.Module = query
        if world_size() > 1:
            # batch statistics are already global, so there are no buffers to keep in step
            self.model = nn.parallel.DistributedDataParallel(query, forward_sync_buffers=False)

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
        return extract_features(encoder, self.images, self.view, self.device)

    def render(self, epoch: int, item: tuple[int, Any]) -> Views:
        """Draw and render this worker's rows of a step; everything random comes from (seed, epoch, step).

        Args:
            epoch: its number.
            item: the step's number, and what the batches give for it: slots of each domain.
        """
        step, slots = item
        generator = seeded(self.method.seed, epoch, step)
        size_N2 = torch.cat(
            [torch.from_numpy(d.size_N2[s.numpy()]) for d, s in zip(self.images, slots, strict=True)]
        )
        query_draw = draw_view(self.view.augment, size_N2, generator)
        key_draw = draw_view(self.view.augment, size_N2, generator)
        count = self.views_per_image * len(size_N2)
        shuffle = torch.randperm(count, generator=generator)
        query = self.rendered(slots, query_draw, torch.arange(count)[own_rows(count)], generator)
        key = None
        if self.networks.key:
            key = self.rendered(slots, key_draw, shuffle[own_rows(count)], generator)
        return Views(slots, query, key, shuffle)

    def rendered(
        self, slots: tuple[Tensor, Tensor], draw: ViewDraw, rows: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Views of these rows of the batch [first domain; second domain]."""
        stored = stored_pictures(self.images, (rows >= len(slots[0])).long(), torch.cat(slots)[rows])
        return render_views(stored, draw[rows], self.view, self.networks.query.form)

    def forward(self, views: Views) -> Any:
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

    def query_and_key(self, views: Views) -> tuple[Tensor, Tensor]:
        """Features of all rows of the batch, whoever computed them: with gradient, and constant."""
        self.follow()
        q = gather_rows(self.model(views.query.to(self.device)), len(views.shuffle))
        return q, q.detach() if views.key is None else self.keys(views)

    def follow(self) -> None:
        """The key encoder's moving average."""
        if self.networks.key and self.method.keyed:
            update_key_encoder(self.networks.key, self.networks.query, self.method.keyed.key_momentum)

    @torch.no_grad()
    def keys(self, views: Views) -> Tensor:
        """The key encoder's features, in the batch's order."""
        assert self.networks.key is not None
        assert views.key is not None
        shuffled = gather_rows(self.networks.key(views.key.to(self.device)), len(views.shuffle))
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
