"""The epoch loop. Knows no Ray, no MLflow, no labels.

Everything random is drawn from (seed, epoch, step), so that a run that was killed and resumed at an
epoch's end, and a run on any number of workers, take the same course.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ucir.config import EncoderParams, ViewParams
from ucir.data.augment import draw_view, render_views
from ucir.data.batches import PairBatches, seeded
from ucir.data.pack import DomainImages
from ucir.data.prefetch import prefetch
from ucir.distributed import gather_rows, own_rows, world_size
from ucir.errors import UserError
from ucir.methods.base import DomainBatch, Method, Term
from ucir.models.checkpoints import load_encoder
from ucir.models.encoder import Encoder, key_encoder_of, new_encoder, update_key_encoder
from ucir.training.features import extract_features


@dataclass(frozen=True)
class EpochReport:
    """What a finished epoch hands to the reporter."""

    epoch: int
    metrics: dict[str, float]
    features: tuple[Tensor, Tensor]
    encoder: Encoder
    """The retrieval encoder (the key encoder), as of this epoch's end."""
    state: dict[str, Any]
    """All that resuming needs."""


class Reporter(Protocol):
    """Where a run's progress goes; one adapter each for one process, Ray Train and tests."""

    def load_state(self) -> dict[str, Any] | None:
        """The state of the last finished epoch, or None."""

    def end_epoch(self, report: EpochReport) -> None:
        """Called on every worker after each epoch; may raise to stop the run."""


class PairTraining:
    """Everything that changes while one pair of domains is trained.

    Args:
        images: the two domains.
        view: size and augmentation.
        encoder_params: must fit the checkpoint.
        start_checkpoint: encoder in MoCo v2's layout.
        method: holds its params and the run's seed.
        device: where this worker computes.

    Raises:
        UserError: no full batch, an unreadable checkpoint, a batch that the workers cannot share.
    """

    def __init__(
        self,
        images: tuple[DomainImages, DomainImages],
        view: ViewParams,
        encoder_params: EncoderParams,
        start_checkpoint: Path,
        method: Method[Any],
        device: torch.device,
    ) -> None:
        params = method.params
        if 2 * params.batch_size % world_size():
            raise UserError(
                f"2 x batch_size = {2 * params.batch_size} images cannot be shared equally by "
                f"{world_size()} workers"
            )
        self.images, self.view, self.method, self.device = images, view, method, device
        self.batches = PairBatches(len(images[0]), len(images[1]), params.batch_size, method.seed)
        self.query = new_encoder(encoder_params, seed=0)
        load_encoder(self.query, start_checkpoint)
        self.query = self.query.to(device)
        self.key = key_encoder_of(self.query)
        self.optimizer = method.optimizer(self.query.parameters())
        self.model: nn.Module = self.query
        if world_size() > 1:
            # batch statistics are already global, so there are no buffers to keep in step
            self.model = nn.parallel.DistributedDataParallel(self.query, forward_sync_buffers=False)

    def features(self) -> tuple[Tensor, Tensor]:
        """The key encoder's features of all images: it is the retrieval encoder."""
        first, second = extract_features(self.key, self.images, self.view, self.device)
        return first, second

    def state_dict(self) -> dict[str, Any]:
        """All that resuming at an epoch's end needs."""
        return {
            "query": self.query.state_dict(),
            "key": self.key.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`'s value."""
        self.query.load_state_dict(state["query"])
        self.key.load_state_dict(state["key"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(_to(state["method"], self.device))

    def train_epoch(self, epoch: int, max_steps: int | None = None) -> dict[str, float]:
        """One pass over the pair; returns the mean of each loss term.

        Raises:
            FloatingPointError: a loss is not finite; names epoch, step and terms.
        """
        self.model.train()
        self.key.train()
        method = self.method
        for group in self.optimizer.param_groups:
            group["lr"] = method.lr_at(epoch)
        steps = islice(enumerate(self.batches.epoch(epoch)), max_steps)
        render = partial(_render, self.images, self.view, method.seed, epoch)
        sums: dict[str, float] = {}
        done = 0
        for step, views in enumerate(prefetch(render, steps)):
            update_key_encoder(self.key, self.query, method.params.key_momentum)
            terms = method.losses(epoch, self._forward(views))
            total = total_loss(terms)
            values = {name: float(term.value.detach()) for name, term in terms.items()}
            values["total"] = float(total.detach())
            if not math.isfinite(values["total"]):
                told = ", ".join(f"{name} = {value:g}" for name, value in values.items())
                raise FloatingPointError(f"epoch {epoch}, step {step}: a loss is not finite: {told}")
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            done += 1
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value
        return {f"train/loss_{name}": value / done for name, value in sums.items()}

    def _forward(self, views: _Views) -> tuple[DomainBatch, DomainBatch]:
        """Two views of each image through the two encoders; all rows, whoever computed them.

        Both domains pass through the network as one batch. The key encoder's rows are shuffled, so that
        its two halves of batch statistics mix the domains (MoCo's ShuffleBN).
        """
        q = gather_rows(self.model(views.query.to(self.device)))
        with torch.no_grad():
            shuffled = gather_rows(self.key(views.key.to(self.device)))
            k = torch.empty_like(shuffled)
            k[views.shuffle.to(self.device)] = shuffled
        half = len(q) // 2
        first, second = (slot.to(self.device) for slot in views.slots)
        return DomainBatch(first, q[:half], k[:half]), DomainBatch(second, q[half:], k[half:])


def train(training: PairTraining, reporter: Reporter) -> None:
    """Train to the last epoch, from the start or from the reporter's state."""
    state = reporter.load_state()
    if state is None:
        first_epoch = 0
        features = training.features()
        training.method.start(features)
    else:
        first_epoch = state["epoch"] + 1
        training.load_state_dict(state)
        features = training.features()
    for epoch in range(first_epoch, training.method.params.epochs):
        began = time.perf_counter()
        figures = training.method.start_epoch(epoch, features)
        losses = training.train_epoch(epoch)
        trained = time.perf_counter()
        features = training.features()
        images = 2 * training.batches.batch_size * len(training.batches)
        metrics = {
            **losses,
            **figures,
            "train/lr": training.method.lr_at(epoch),
            "time/epoch_seconds": time.perf_counter() - began,
            "time/images_per_second": images / (trained - began),
        }
        state = {"epoch": epoch, **training.state_dict()}
        reporter.end_epoch(EpochReport(epoch, metrics, features, training.key, state))


def total_loss(terms: dict[str, Term]) -> Tensor:
    """Weighted sum of the terms."""
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


@dataclass(frozen=True)
class _Views:
    """What this worker computes of a step, still on the CPU."""

    slots: tuple[Tensor, Tensor]
    query: Tensor  # views of its own rows of the batch [first domain; second domain]
    key: Tensor  # other views, of its own rows of the shuffled batch
    shuffle: Tensor


def _render(
    images: tuple[DomainImages, DomainImages],
    view: ViewParams,
    seed: int,
    epoch: int,
    item: tuple[int, tuple[Tensor, Tensor]],
) -> _Views:
    step, slots = item
    generator = seeded(seed, epoch, step)
    size_N2 = torch.cat([torch.from_numpy(d.size_N2[s.numpy()]) for d, s in zip(images, slots, strict=True)])
    query_draw = draw_view(view.augment, size_N2, generator)
    key_draw = draw_view(view.augment, size_N2, generator)
    count = len(size_N2)
    shuffle = torch.randperm(count, generator=generator)
    own = torch.arange(count)[own_rows(count)]
    own_shuffled = shuffle[own_rows(count)]
    return _Views(
        slots,
        render_views(_pixels(images, slots, own), query_draw[own], view.side),
        render_views(_pixels(images, slots, own_shuffled), key_draw[own_shuffled], view.side),
        shuffle,
    )


def _pixels(images: tuple[DomainImages, DomainImages], slots: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """Stored pictures of the given rows of the batch [first domain; second domain], uint8."""
    half = len(slots[0])
    out = torch.empty(len(rows), *images[0].stored_MSS3.shape[1:], dtype=torch.uint8)
    for domain in (0, 1):
        mine = ((rows >= half) == bool(domain)).nonzero().flatten()
        slot = slots[domain][rows[mine] - domain * half]
        out[mine] = torch.from_numpy(images[domain].pixels(slot.numpy()))
    return out


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    return [_to(part, device) for part in value] if isinstance(value, list) else value
