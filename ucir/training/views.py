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
        seen = rows % images_seen
        stored = _pixels(images, seen >= len(slots[0]), torch.cat(slots)[seen])
        x = render_views(stored, draw[seen], view.side)
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
        second = partner[own] >= len(images[0])
        stored = _pixels(images, second, partner[own] - len(images[0]) * second)
        out[mixed] = mixed_views(x[mixed], whole_views(stored, x.shape[-1]), draw[own])
    return out


def _pixels(images: tuple[DomainImages, DomainImages], second_B: Tensor, slot_B: Tensor) -> Tensor:
    """Stored pictures, uint8: of the second domain where ``second_B``, else of the first."""
    out = torch.empty(len(slot_B), *images[0].stored_MSS3.shape[1:], dtype=torch.uint8)
    for domain, here_B in zip(images, (~second_B, second_B), strict=True):
        out[here_B] = torch.from_numpy(domain.pixels(slot_B[here_B].numpy()))
    return out
