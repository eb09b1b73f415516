"""The label-free start where no checkpoint is given: in-batch contrast on the union of the domains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ucir.config import StartParams, ViewParams
from ucir.data.augment import draw_view, render_views
from ucir.data.batches import seeded
from ucir.data.pack import DomainImages
from ucir.data.prefetch import prefetch
from ucir.errors import UserError
from ucir.losses.instance import view_contrast
from ucir.models.checkpoints import load_encoder, load_torchvision, save_encoder
from ucir.models.encoder import Encoder, new_encoder


def make_start(
    domains: list[DomainImages],
    view: ViewParams,
    start: StartParams,
    out: Path,
    device: torch.device,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> None:
    """Write ``out/untrained.pt`` (the random network) and ``out/start.pt`` (where training begins).

    Raises:
        UserError: the given weights are unreadable or do not fit; fewer images than a batch.
    """
    seed = start.pretrain.seed if start.pretrain else 0
    encoder = new_encoder(start.encoder, seed)
    save_encoder(encoder, out / "untrained.pt")
    if start.checkpoint is not None:
        load_encoder(encoder, Path(start.checkpoint))
    elif start.torchvision is not None:
        load_torchvision(encoder, start.encoder.backbone, start.torchvision)
    else:
        encoder = encoder.to(device)
        _contrast_views(encoder, domains, view, start, progress)
    save_encoder(encoder, out / "start.pt")


def _contrast_views(
    encoder: Encoder,
    domains: list[DomainImages],
    view: ViewParams,
    start: StartParams,
    progress: Callable[[int, int, float], None],
) -> None:
    params = start.pretrain
    assert params is not None
    sizes = torch.from_numpy(np.concatenate([domain.size_N2 for domain in domains]))
    if len(sizes) < params.batch_size:
        raise UserError(
            f"pretrain batch_size {params.batch_size} exceeds all {len(sizes)} images: set a smaller one"
        )
    first_row = np.cumsum([0, *(len(domain) for domain in domains)])
    device = next(encoder.parameters()).device
    optimizer = torch.optim.AdamW(encoder.parameters(), params.lr, weight_decay=params.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, params.lr, total_steps=params.steps, pct_start=0.1
    )
    encoder.train()

    def render(step: int) -> tuple[Tensor, Tensor]:
        generator = seeded(params.seed, step)
        row = torch.randperm(len(sizes), generator=generator)[: params.batch_size].numpy()
        domain = np.searchsorted(first_row, row, side="right") - 1
        pixels = torch.empty(len(row), *domains[0].stored_MSS3.shape[1:], dtype=torch.uint8)
        for number, images in enumerate(domains):
            mine = domain == number
            pixels[torch.from_numpy(mine)] = torch.from_numpy(images.pixels(row[mine] - first_row[number]))
        draws = [draw_view(view.augment, sizes[row], generator) for _ in range(2)]
        views = torch.cat([render_views(pixels, draw, view.side) for draw in draws])
        return views, torch.from_numpy(domain)

    for step, (views, domain) in enumerate(prefetch(render, range(params.steps))):
        first, second = encoder(views.to(device)).chunk(2)
        loss = view_contrast(first, second, domain.to(device), params.temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(step + 1, params.steps, float(loss.detach()))
    encoder.eval()
