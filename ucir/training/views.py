"""What a worker renders of a step: views of its rows of the global batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ucir.config import ViewParams
from ucir.data.augment import ViewDraw, draw_view, render_views, whole_views
from ucir.data.batches import seeded
from ucir.data.pack import DomainImages
from ucir.data.spectrum import draw_spectrum, mixed_views, phase_views
from ucir.distributed import own_rows
from ucir.methods.base import Method


@dataclass(frozen=True)
class Views:
    """What this worker computes of a step, still on the CPU."""

    slots: tuple[Tensor, Tensor]
    query: Tensor  # views of its own rows of the batch [first domain; second domain]
    key: Tensor | None  # other views, of its own rows of the shuffled batch
    shuffle: Tensor


def render_step(
    images: tuple[DomainImages, DomainImages],
    view: ViewParams,
    method: Method[Any],
    epoch: int,
    with_key: bool,
    item: tuple[int, tuple[Tensor, Tensor]],
) -> Views:
    """Draw and render this worker's rows of a step; everything random comes from (seed, epoch, step)."""
    step, slots = item
    generator = seeded(method.seed, epoch, step)
    size_N2 = torch.cat([torch.from_numpy(d.size_N2[s.numpy()]) for d, s in zip(images, slots, strict=True)])
    query_draw = draw_view(view.augment, size_N2, generator)
    key_draw = draw_view(view.augment, size_N2, generator)
    images_seen = len(size_N2)
    count = 2 * images_seen if method.spectral else images_seen
    shuffle = torch.randperm(count, generator=generator)

    def rendered(draw: ViewDraw, rows: Tensor) -> Tensor:
        x = render_views(_pixels(images, slots, rows % images_seen), draw[rows % images_seen], view.side)
        return _spectral(x, images, method, generator, rows, images_seen) if method.spectral else x

    query = rendered(query_draw, torch.arange(count)[own_rows(count)])
    key = rendered(key_draw, shuffle[own_rows(count)]) if with_key else None
    return Views(slots, query, key, shuffle)


def _spectral(
    x: Tensor,
    images: tuple[DomainImages, DomainImages],
    method: Method[Any],
    generator: torch.Generator,
    rows: Tensor,
    images_seen: int,
) -> Tensor:
    """Rows below ``images_seen`` as phase views, the others mixed with any picture of either domain."""
    params = method.params
    draw = draw_spectrum(images_seen, params.most_amplitude, params.most_phase, generator)
    partner = torch.randint(len(images[0]) + len(images[1]), (images_seen,), generator=generator)
    mixed = rows >= images_seen
    out = x.clone()
    if not mixed.all():
        out[~mixed] = phase_views(x[~mixed])
    if mixed.any():
        own = rows[mixed] - images_seen
        stored = torch.empty(len(own), *images[0].stored_MSS3.shape[1:], dtype=torch.uint8)
        for domain, first in ((0, 0), (1, len(images[0]))):
            here = (partner[own] >= len(images[0])) == bool(domain)
            stored[here] = torch.from_numpy(images[domain].pixels((partner[own][here] - first).numpy()))
        out[mixed] = mixed_views(x[mixed], whole_views(stored, x.shape[-1]), draw[own])
    return out


def _pixels(images: tuple[DomainImages, DomainImages], slots: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """Stored pictures of the given rows of the batch [first domain; second domain], uint8."""
    half = len(slots[0])
    out = torch.empty(len(rows), *images[0].stored_MSS3.shape[1:], dtype=torch.uint8)
    for domain in (0, 1):
        mine = ((rows >= half) == bool(domain)).nonzero().flatten()
        slot = slots[domain][rows[mine] - domain * half]
        out[mine] = torch.from_numpy(images[domain].pixels(slot.numpy()))
    return out
