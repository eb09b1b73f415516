"""BrAD: Harary et al., Unsupervised Domain Generalization by Learning a Bridge Across Domains, CVPR 2022.

A method of the family of DARL and DN2A whose code is public. Each picture is contrasted with the edges of
another crop of it, and the edges with the picture: drawings of edges are the bridge between the domains. A
discriminator learns which domain edges are of, from pooled features and from those at each position, and
the encoder learns that it cannot. Constants of the official code, with a queue for each domain; ours:

- edges are Canny's, the release's ``edges_type: canny``; its default is a network for edges (HED) that begins
  with weights from elsewhere and learns on
- banks of all pictures and of their edges stand for a domain's queue, as for ProtoNCE
- the start is the data set's own (the release begins with ImageNet's labels)
- a step of encoder and discriminator is one backward pass with the gradient reversed between them; dropout
  draws once for both, where the release draws twice
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from ucir.config.base import Positive, Share
from ucir.data.batches import seeded
from ucir.data.edges import edge_views
from ucir.data.views import PictureViews
from ucir.distributed import gather_rows
from ucir.losses.instance import instance_contrast
from ucir.losses.universal import reverse_gradient
from ucir.memory import Bank, Features
from ucir.methods.base import BankMethod, KeyedParams, Term
from ucir.methods.step import DomainBatch, Rendered, Step
from ucir.models.encoder import Encoder
from ucir.models.features import extract_features

WIDTHS = (1024, 512, 256)
"""Of the discriminator's hidden layers."""
DROPOUT = 0.25


class BradParams(KeyedParams):
    """``methods.brad.<dataset>``."""

    epochs: Annotated[int, Field(ge=1)] = 300
    batch_size: Annotated[int, Field(ge=2)] = 144
    """The release's 288 pictures, over two domains."""
    lr: Positive = 0.03
    temperature: Positive = 0.2
    retrieve_with: Literal["key", "query"] = "query"
    edge_sigma: Positive = 1.0
    """Of Canny's Gaussian, in pixels of the view."""
    adversary_from: Share = 0.18
    """The discriminator's accuracy in a step from which on the encoder works against it."""


@dataclass(frozen=True)
class BridgeBatch(DomainBatch):
    """A domain's part of a step; what DomainBatch has is of the pictures."""

    edge_q_BD: Tensor  # unit features of edges: query encoder, with gradient
    edge_k_BD: Tensor  # key encoder, constant
    edge_pooled_BP: Tensor  # unit features before the head, with gradient
    edge_grid_BLP: Tensor  # the same at each of L positions


class BridgeStep(Step):
    """Two crops of a picture to each encoder: a batch is the first ones, then the second ones' edges."""

    views_per_image = 2
    needs_pixels = "brad draws the edges of pictures"
    method: Brad
    views: PictureViews

    def features(self, encoder: Encoder | None = None) -> tuple[Features, ...]:
        """As of :class:`Step`; before anything is trained the method is shown those of the edges, too."""
        if encoder is None and self.method.edge_banks is None:
            key = self.networks.key
            assert key is not None
            first, second = extract_features(key, self.views, self.device, change=self._edges)
            self.method.edge_banks = Bank(first), Bank(second)
        return super().features(encoder)

    def draw(self, domain_B: Tensor, slot_B: Tensor, generator: torch.Generator) -> Any:
        """Crops of the pictures, and as many for their edges."""
        return self.views.draw(domain_B.repeat(2), slot_B.repeat(2), generator)

    def rendered(
        self, domain_B: Tensor, slot_B: Tensor, draw: Any, rows: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The first half of the rows as they are, of the others the edges."""
        images = len(slot_B)
        x = self.views.random(domain_B[rows % images], slot_B[rows % images], draw[rows])
        edges = rows >= images
        if edges.any():
            x[edges] = self._edges(x[edges])
        return x

    def _edges(self, view_B3SS: Tensor) -> Tensor:
        return edge_views(view_B3SS, self.views.form, self.method.params.edge_sigma)

    def forward(self, views: Rendered) -> tuple[DomainBatch, DomainBatch]:
        self.follow()
        computed = self.model(views.query.to(self.device), "grid", views.query_domain.to(self.device))
        q, pooled, grid = (gather_rows(x, len(views.shuffle)) for x in computed)
        k = self.keys(views)
        quarter = len(q) // 4
        first, second = (
            BridgeBatch(slot.to(self.device), q[rows], k[rows], *(x[edges] for x in (q, k, pooled, grid)))
            for slot, rows, edges in zip(
                views.slots,
                (slice(quarter), slice(quarter, 2 * quarter)),
                (slice(2 * quarter, 3 * quarter), slice(3 * quarter, None)),
                strict=True,
            )
        )
        return first, second


class Brad(BankMethod[BradParams]):
    """Pictures to edges and edges to pictures in each domain, and the adversary over edges."""

    params_type = BradParams
    step_type = BridgeStep
    lasting = (*BankMethod.lasting, "edge_banks")
    within_epoch = ("step",)
    edge_banks: tuple[Bank, Bank] | None = None
    """Of the pictures' edges; the step makes them from the start's features."""
    discriminator: nn.Sequential

    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        self.step = 0
        return super().start_epoch(epoch, features)

    def losses(self, epoch: int, batch: tuple[DomainBatch, DomainBatch]) -> dict[str, Term]:
        terms = {}
        assert self.edge_banks is not None
        for side, bank, edge_bank, part in zip("ab", self.banks, self.edge_banks, batch, strict=True):
            assert isinstance(part, BridgeBatch)
            # the negatives are the domain's other pictures and their edges; a mean over all views
            for name, q_BD, k_BD in (
                ("picture_to_edges", part.q_BD, part.edge_k_BD),
                ("edges_to_picture", part.edge_q_BD, part.k_BD),
            ):
                totals = [x.log_total(q_BD, self.params.temperature, part.slot_B) for x in (bank, edge_bank)]
                others_B = torch.logaddexp(*totals)
                value = instance_contrast(q_BD, k_BD, others_B, self.params.temperature)
                terms[f"{name}_{side}"] = Term(0.25, value)
        first, second = batch
        assert isinstance(first, BridgeBatch)
        assert isinstance(second, BridgeBatch)
        for name, pair, positions in (
            ("pooled", (first.edge_pooled_BP, second.edge_pooled_BP), 1),
            ("grid", (first.edge_grid_BLP, second.edge_grid_BLP), first.edge_grid_BLP.shape[1]),
        ):
            x_NP = torch.cat(pair).flatten(0, -2)
            domain_N = torch.arange(2, device=x_NP.device).repeat_interleave(len(first.slot_B) * positions)
            terms[f"adversary_{name}"] = Term(1.0, self._adversary(epoch, x_NP, domain_N))
        self.step += 1
        return terms

    def _adversary(self, epoch: int, x_NP: Tensor, domain_N: Tensor) -> Tensor:
        """The discriminator's cross-entropy; its gradient goes on reversed where it is right often enough."""
        generator = seeded(self.seed, epoch, self.step)
        h_NH = given = reverse_gradient(x_NP)
        for layer in self.discriminator:
            if isinstance(layer, nn.Dropout):  # the same in every worker, and after a resume
                kept = torch.rand(h_NH.shape, generator=generator) >= layer.p
                h_NH = h_NH * kept.to(h_NH.device) / (1 - layer.p)
            else:
                h_NH = layer(h_NH)
        loss = F.cross_entropy(h_NH, domain_N)
        right = (h_NH.detach().argmax(dim=1) == domain_N).float().mean()
        against = (right >= self.params.adversary_from).float()
        given.register_hook(lambda gradient: gradient * against)  # type: ignore[no-untyped-call]
        return loss

    def after_step(self, batch: tuple[DomainBatch, DomainBatch]) -> None:
        """Keys join the banks after the losses, as they do the release's queues."""
        assert self.edge_banks is not None
        for bank, edge_bank, part in zip(self.banks, self.edge_banks, batch, strict=True):
            assert isinstance(part, BridgeBatch)
            bank.write(part.slot_B, part.k_BD)
            edge_bank.write(part.slot_B, part.edge_k_BD)

    def build(self, encoder: Encoder) -> nn.ModuleDict:
        """The discriminator."""
        layers: list[nn.Module] = []
        width = encoder.pooled_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for number, hidden in enumerate(WIDTHS):
                dropout = [nn.Dropout(DROPOUT)] if number else []
                layers += [*dropout, nn.Linear(width, hidden), nn.LeakyReLU()]
                width = hidden
            self.discriminator = nn.Sequential(*layers, nn.Linear(width, 2)).to(encoder.device)
        return nn.ModuleDict({"discriminator": self.discriminator})

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.discriminator.parameters()), "lr_scale": 1.0}]
