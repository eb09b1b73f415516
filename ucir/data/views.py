"""Where a training's views come from: rendered from stored pictures, or looked up among stored features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ucir.config.data import ViewParams
from ucir.data.augment import InputFormat, ViewDraw, draw_view, eval_views, render_views
from ucir.data.feature_pack import DomainFeatures
from ucir.data.pack import DomainImages, stored_pictures


class Views(Protocol):
    """Views of the pictures of several domains, as the network takes them, on the CPU.

    A picture is named by the number of its domain and its slot there, int64 both.
    """

    @property
    def counts(self) -> tuple[int, ...]:
        """Pictures of the domains."""

    def draw(self, domain_B: Tensor, slot_B: Tensor, generator: torch.Generator) -> Any:
        """The random numbers of one view of each; indexing picks rows."""

    def random(self, domain_B: Tensor, slot_B: Tensor, draw: Any) -> Tensor:
        """The random views of a draw, float32."""

    def plain(self, domain: int, slots: slice) -> Tensor:
        """The evaluation views of a domain's pictures, float32."""


class PictureViews:
    """Rendered from stored pictures.

    Args:
        images: the domains.
        view: size and augmentation.
        form: of the network's input.
    """

    def __init__(self, images: Sequence[DomainImages], view: ViewParams, form: InputFormat) -> None:
        self.images, self.view, self.form = tuple(images), view, form
        self.first_row = torch.tensor(np.cumsum([0, *self.counts]))
        self.size_N2 = torch.from_numpy(np.concatenate([domain.size_N2 for domain in self.images]))

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(len(domain) for domain in self.images)

    def draw(self, domain_B: Tensor, slot_B: Tensor, generator: torch.Generator) -> ViewDraw:
        size_B2 = self.size_N2[self.first_row[domain_B] + slot_B]
        return draw_view(self.view.augment, size_B2, generator)

    def random(self, domain_B: Tensor, slot_B: Tensor, draw: ViewDraw) -> Tensor:
        return render_views(stored_pictures(self.images, domain_B, slot_B), draw, self.view, self.form)

    def plain(self, domain: int, slots: slice) -> Tensor:
        images = self.images[domain]
        size_B2 = torch.from_numpy(images.size_N2[slots])
        return eval_views(torch.from_numpy(images.pixels(slots)), size_B2, self.view, self.form)


class StoredViews:
    """A frozen trunk's pooled features, (B, P), of the plain picture and of V random views of it."""

    def __init__(self, features: Sequence[DomainFeatures]) -> None:
        self.features = tuple(features)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(len(domain) for domain in self.features)

    def draw(self, domain_B: Tensor, slot_B: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(self.features[0].views_MVP.shape[1], slot_B.shape, generator=generator)

    def random(self, domain_B: Tensor, slot_B: Tensor, draw: Tensor) -> Tensor:
        out = torch.empty(len(slot_B), self.features[0].pooled_dim)
        for number, domain in enumerate(self.features):
            here_B = domain_B == number
            rows = domain.row_N[slot_B[here_B].numpy()]
            out[here_B] = torch.from_numpy(domain.views_MVP[rows, draw[here_B].numpy()]).float()
        return out

    def plain(self, domain: int, slots: slice) -> Tensor:
        features = self.features[domain]
        return torch.from_numpy(features.plain_MP[features.row_N[slots]]).float()


def views_of(
    domains: Sequence[DomainImages] | Sequence[DomainFeatures], view: ViewParams, form: InputFormat
) -> PictureViews | StoredViews:
    """The views that belong to what is known of the domains. Arguments as of :class:`PictureViews`."""
    if isinstance(domains[0], DomainFeatures):
        return StoredViews(domains)  # type: ignore[arg-type]
    return PictureViews(domains, view, form)  # type: ignore[arg-type]
