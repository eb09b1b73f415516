"""Features of all images of a pair under the evaluation view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ucir.config.data import ViewParams
from ucir.data.augment import eval_views
from ucir.data.pack import DomainImages
from ucir.data.prefetch import prefetch
from ucir.distributed import own_rows
from ucir.memory import Features
from ucir.models.encoder import Encoder

CHUNK = 256


@torch.no_grad()
def extract_features(
    encoder: Encoder,
    images: tuple[DomainImages, ...],
    view: ViewParams,
    device: torch.device,
    pooled: bool | Literal["both"] = False,
    change: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Features, ...]:
    """Unit features of each domain, float32, on ``device``; each worker computes its share.

    ``pooled`` is the encoder's; ``change`` is done to the views.
    """
    was_training = encoder.training
    encoder.eval()
    features = tuple(_domain_features(encoder, domain, view, device, pooled, change) for domain in images)
    encoder.train(was_training)
    return features


def _domain_features(
    encoder: Encoder,
    domain: DomainImages,
    view: ViewParams,
    device: torch.device,
    pooled: bool | Literal["both"],
    change: Callable[[Tensor], Tensor] | None,
) -> Features:
    rows_of_worker = own_rows(len(domain))

    def render(first: int) -> Tensor:
        rows = slice(first, min(first + CHUNK, rows_of_worker.stop))
        pixels = torch.from_numpy(domain.pixels(rows))
        views = eval_views(pixels, torch.from_numpy(domain.size_N2[rows]), view, encoder.form)
        return change(views) if change else views

    starts = range(rows_of_worker.start, rows_of_worker.stop, CHUNK)
    parts = [encoder(views.to(device), pooled) for views in prefetch(render, starts)]
    head, before = encoder.feature_dim, encoder.pooled_dim
    length = {False: head, True: before, "both": head + before}[pooled]
    own_ND = torch.cat(parts) if parts else torch.empty(0, length, device=device)
    return Features(own_ND, len(domain))
