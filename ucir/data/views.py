"""Where a training's views come from: rendered from stored pictures, or looked up among stored features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ucir.config.data import AugmentParams, ViewParams
from ucir.data.augment import InputFormat, ViewDraw, draw_view, eval_views, render_views
from ucir.data.feature_pack import DomainFeatures
from ucir.data.pack import DomainImages

SHARE_OF_GPU = 0.3
"""Of its free memory that stored pictures may take."""


class Views(Protocol):
    """Views of the pictures of several domains, as the network takes them.

    A picture is named by the number of its domain and its slot there, int64 both, on the CPU.
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
    """Rendered from stored pictures, on the device of the network.

    On a GPU that has room for them the stored pictures lie there as a whole; else those of a batch are sent.

    Args:
        images: the domains.
        view: size and augmentation.
        form: of the network's input.
        device: where views are rendered and wanted.
    """

    def __init__(
        self, images: Sequence[DomainImages], view: ViewParams, form: InputFormat, device: torch.device
    ) -> None:
        self.images, self.view, self.form, self.device = tuple(images), view, form, device
        self.resident: list[Tensor] | None = None
        if device.type == "cuda":
            needed = sum(len(domain) * domain.stored_MSS3[0].nbytes for domain in self.images if len(domain))
            if needed < SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0]:
                self.resident = [
                    torch.from_numpy(domain.pixels(slice(None))).to(device) for domain in self.images
                ]
        self.first_row = torch.tensor(np.cumsum([0, *self.counts]))
        self.size_N2 = torch.from_numpy(np.concatenate([domain.size_N2 for domain in self.images]))

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(len(domain) for domain in self.images)

    def draw(
        self,
        domain_B: Tensor,
        slot_B: Tensor,
        generator: torch.Generator,
        augment: AugmentParams | None = None,
    ) -> ViewDraw:
        """As of :class:`Views`; with another augmentation than the data set's, where one is given."""
        size_B2 = self.size_N2[self.first_row[domain_B] + slot_B]
        return draw_view(augment or self.view.augment, size_B2, generator)

    def random(self, domain_B: Tensor, slot_B: Tensor, draw: ViewDraw) -> Tensor:
        return render_views(self.stored(domain_B, slot_B), draw, self.view, self.form)

    def plain(self, domain: int, slots: slice) -> Tensor:
        size_B2 = torch.from_numpy(self.images[domain].size_N2[slots])
        return eval_views(self._sent(self._held(domain, slots)), size_B2, self.view, self.form)

    def stored(self, domain_B: Tensor, slot_B: Tensor) -> Tensor:
        """Stored pictures, uint8 (B, S, S, 3), on the device."""
        shape = (len(slot_B), *self.images[0].stored_MSS3.shape[1:])
        out = torch.empty(shape, dtype=torch.uint8, device=self.device if self.resident else None)
        for number in range(len(self.images)):
            here = (domain_B == number).nonzero().flatten()  # of the CPU: nothing waits for the GPU
            out[here.to(out.device)] = self._held(number, slot_B[here])
        return self._sent(out)

    def _held(self, domain: int, slots: Tensor | slice) -> Tensor:
        """A domain's stored pictures, where they are kept."""
        if self.resident:
            return self.resident[domain][slots if isinstance(slots, slice) else slots.to(self.device)]
        chosen = slots if isinstance(slots, slice) else slots.numpy()
        return torch.from_numpy(self.images[domain].pixels(chosen))

    def _sent(self, stored_BSS3: Tensor) -> Tensor:
        if stored_BSS3.device == self.device or self.resident:
            return stored_BSS3
        return stored_BSS3.pin_memory().to(self.device, non_blocking=True)


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
    domains: Sequence[DomainImages] | Sequence[DomainFeatures],
    view: ViewParams,
    form: InputFormat,
    device: torch.device,
) -> PictureViews | StoredViews:
    """The views that belong to what is known of the domains. Arguments as of :class:`PictureViews`."""
    if isinstance(domains[0], DomainFeatures):
        return StoredViews(domains)  # type: ignore[arg-type]
    return PictureViews(domains, view, form, device)  # type: ignore[arg-type]
