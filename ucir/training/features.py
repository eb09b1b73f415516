"""Features of all images of a pair under the evaluation view."""

from __future__ import annotations

from typing import Literal

import torch

from ucir.config import ViewParams
from ucir.data.augment import eval_views
from ucir.data.pack import DomainImages
from ucir.data.prefetch import prefetch
from ucir.data.spectrum import phase_views
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
    phase: bool = False,
) -> tuple[Features, ...]:
    """Unit features of each domain, float32, on ``device``; each worker computes its share.

    ``pooled`` is the encoder's; with ``phase`` they are of the pictures' phase alone.
    """
    was_training = encoder.training
    encoder.eval()
    features = tuple(_domain_features(encoder, domain, view, device, pooled, phase) for domain in images)
    encoder.train(was_training)
    return features


def _domain_features(
    encoder: Encoder,
    domain: DomainImages,
    view: ViewParams,
    device: torch.device,
    pooled: bool | Literal["both"],
    phase: bool,
) -> Features:
    own = own_rows(len(domain))

    def render(first: int) -> torch.Tensor:
        rows = slice(first, min(first + CHUNK, own.stop))
        pixels = torch.from_numpy(domain.pixels(rows))
        views = eval_views(pixels, torch.from_numpy(domain.size_N2[rows]), view.side, view.eval_crop)
        return phase_views(views) if phase else views

    starts = range(own.start, own.stop, CHUNK)
    parts = [encoder(views.to(device), pooled) for views in prefetch(render, starts)]
    head, before = encoder.feature_dim, encoder.pooled_dim
    length = {False: head, True: before, "both": head + before}[pooled]
    own_ND = torch.cat(parts) if parts else torch.empty(0, length, device=device)
    return Features(own_ND, len(domain))
