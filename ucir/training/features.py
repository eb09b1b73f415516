"""Features of all images of a pair under the evaluation view."""

from __future__ import annotations

import torch
from torch import Tensor

from ucir.config import ViewParams
from ucir.data.augment import eval_views
from ucir.data.pack import DomainImages
from ucir.distributed import gather_uneven_rows, rank, world_size
from ucir.models.encoder import Encoder

CHUNK = 256


@torch.no_grad()
def extract_features(
    encoder: Encoder,
    images: tuple[DomainImages, ...],
    view: ViewParams,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Unit features (N, D) of each domain, float32, on ``device``; each worker computes its share."""
    was_training = encoder.training
    encoder.eval()
    features = tuple(_domain_features(encoder, domain, view, device) for domain in images)
    encoder.train(was_training)
    return features


def _domain_features(
    encoder: Encoder, domain: DomainImages, view: ViewParams, device: torch.device
) -> Tensor:
    workers = world_size()
    bounds = [len(domain) * worker // workers for worker in range(workers + 1)]
    parts = []
    for first in range(bounds[rank()], bounds[rank() + 1], CHUNK):
        rows = slice(first, min(first + CHUNK, bounds[rank() + 1]))
        pixels = torch.from_numpy(domain.pixels(rows)).to(device)
        size = torch.from_numpy(domain.size_N2[rows])
        parts.append(encoder(eval_views(pixels, size, view.side, view.eval_crop)))
    feature_dim = encoder.net.fc[-1].out_features  # type: ignore[index,union-attr]
    own = torch.cat(parts) if parts else torch.empty(0, feature_dim, device=device)
    return gather_uneven_rows(own, [bounds[w + 1] - bounds[w] for w in range(workers)])
