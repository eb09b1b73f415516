"""Features of all images of a pair under the evaluation view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ucir.data.prefetch import prefetch
from ucir.data.views import Views
from ucir.distributed import own_rows
from ucir.memory import Features
from ucir.models.encoder import Encoder

CHUNK = 256


@torch.no_grad()
def extract_features(
    encoder: Encoder,
    views: Views,
    device: torch.device,
    pooled: bool | Literal["both", "raw"] = False,
    change: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Features, ...]:
    """Unit features of each domain, float32, on ``device``; each worker computes its share.

    Args:
        encoder: on ``device``.
        views: of the domains' pictures.
        device: where this worker computes.
        pooled: as of the encoder.
        change: done to the views.
    """
    was_training = encoder.training
    encoder.eval()
    features = tuple(
        _domain_features(encoder, views, domain, device, pooled, change)
        for domain in range(len(views.counts))
    )
    encoder.train(was_training)
    return features


def _domain_features(
    encoder: Encoder,
    views: Views,
    domain: int,
    device: torch.device,
    pooled: bool | Literal["both", "raw"],
    change: Callable[[Tensor], Tensor] | None,
) -> Features:
    count = views.counts[domain]
    rows_of_worker = own_rows(count)

    def render(first: int) -> Tensor:
        plain = views.plain(domain, slice(first, min(first + CHUNK, rows_of_worker.stop)))
        return change(plain) if change else plain

    def embed(x: Tensor) -> Tensor:
        domain_B = torch.full((len(x),), domain, device=device)
        return encoder(x.to(device), pooled, domain_B)  # type: ignore[no-any-return]

    starts = range(rows_of_worker.start, rows_of_worker.stop, CHUNK)
    parts = [embed(x) for x in prefetch(render, starts)]
    head, before = encoder.feature_dim, encoder.pooled_dim
    length = {False: head, True: before, "both": head + before, "raw": 2 * head}[pooled]
    own_ND = torch.cat(parts) if parts else torch.empty(0, length, device=device)
    return Features(own_ND, count)
