"""The epoch loop. Knows no Ray, no MLflow, no labels.

Everything random is drawn from (seed, epoch, step), so that a run that was killed and resumed, and a run
on any number of workers, take the same course.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ucir.config import EncoderParams, ViewParams
from ucir.data.batches import PairBatches
from ucir.data.pack import DomainImages
from ucir.data.prefetch import prefetch
from ucir.devices import set_threads
from ucir.distributed import gather_rows, world_size
from ucir.errors import UserError
from ucir.memory import Features
from ucir.methods.base import DomainBatch, Method, PhaseBatch, PhaseFeatures, Term
from ucir.models.checkpoints import load_encoder
from ucir.models.encoder import Encoder, key_encoder_of, new_encoder, update_key_encoder
from ucir.training.features import extract_features
from ucir.training.views import Views, render_step


@dataclass(frozen=True)
class EpochReport:
    """What a finished epoch hands to the reporter."""

    epoch: int
    metrics: dict[str, float]
    features: tuple[Features, Features]
    """Of the retrieval encoder."""
    encoder: Encoder
    """The retrieval encoder, as of this epoch's end."""
    state: dict[str, Any]
    """All that resuming needs; whole on the first worker alone."""


class Reporter(Protocol):
    """Where a run's progress goes; one adapter each for one process, Ray Train and tests."""

    def load_state(self) -> dict[str, Any] | None:
        """The state that was kept last, or None."""

    def wants_state(self) -> bool:
        """Asked on every worker after each step but an epoch's last; all give the same answer."""

    def keep(self, state: dict[str, Any]) -> None:
        """What :meth:`wants_state` asked for; called on every worker; may raise to stop the run."""

    def end_epoch(self, report: EpochReport) -> None:
        """Called on every worker after each epoch; may raise to stop the run."""

    def fault(self, details: dict[str, Any]) -> None:
        """Called before a run ends for a loss that is not finite, with all there is to say about it."""


class NotFiniteError(FloatingPointError):
    """A loss became infinite or NaN. Nothing is patched: ``details`` describe the step's inputs instead."""

    def __init__(self, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)  # alone, so that Ray can carry the error from a worker
        self.details = details or {}


def _not_finite(
    epoch: int,
    step: int,
    terms: dict[str, float],
    batch: tuple[DomainBatch, DomainBatch],
    encoder: Encoder,
) -> NotFiniteError:
    told = ", ".join(f"{name} = {value:g}" for name, value in terms.items())
    inputs = {
        f"{name}_{side}": _statistics(value)
        for side, part in zip("ab", batch, strict=True)
        for name, value in (("query", part.q_BD), ("key", part.k_BD))
    }
    details = {
        "epoch": epoch,
        "step": step,
        "terms": terms,
        "inputs": inputs,
        "slots": [part.slot_B.tolist() for part in batch],
        "weights": {name: _statistics(value) for name, value in encoder.named_parameters()},
    }
    remedy = "a smaller lr or a higher temperature may help"
    return NotFiniteError(f"epoch {epoch}, step {step}: a loss is not finite: {told}; {remedy}", details)


def _statistics(x: Tensor) -> dict[str, float]:
    """Of the finite values, and how many are not."""
    finite = x.detach()[x.detach().isfinite()].float()
    found = {"not_finite": float(x.numel() - finite.numel())}
    if len(finite):
        found |= {"min": float(finite.min()), "max": float(finite.max()), "mean": float(finite.mean())}
    return found


@dataclass
class EpochStart:
    """How far an epoch is: what its steps begin from, beside the state of the training."""

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Of the loss terms, over the steps done."""


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
        UserError: no full batch, an unreadable checkpoint, more workers than images in a batch.
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
        set_threads()
        params = method.params
        if 2 * params.batch_size < world_size():
            raise UserError(
                f"2 x batch_size = {2 * params.batch_size} images are fewer than {world_size()} workers: set "
                "cluster.num_workers to less"
            )
        keyed = method.keyed
        if keyed and 2 * params.batch_size % keyed.key_norm_groups:
            raise UserError(
                f"2 x batch_size = {2 * params.batch_size} images cannot be divided into key_norm_groups = "
                f"{keyed.key_norm_groups} equal parts"
            )
        self.images, self.view, self.method, self.device = images, view, method, device
        self.batches = PairBatches(len(images[0]), len(images[1]), params.batch_size, method.seed)
        self.query = new_encoder(encoder_params, seed=0)
        load_encoder(self.query, start_checkpoint)
        self.query = self.query.to(device)
        self.key = key_encoder_of(self.query, keyed.key_norm_groups) if keyed else None
        self.frozen: Encoder | None = None
        self.optimizer = method.optimizer(self.query)
        self.model: nn.Module = self.query
        if world_size() > 1:
            # batch statistics are already global, so there are no buffers to keep in step
            self.model = nn.parallel.DistributedDataParallel(self.query, forward_sync_buffers=False)

    @property
    def retrieval_encoder(self) -> Encoder:
        """The one whose features are ranked and whose weights are kept."""
        keyed = self.method.keyed
        return self.key if self.key and keyed and keyed.retrieve_with == "key" else self.query

    def features(self, encoder: Encoder | None = None) -> tuple[Features, Features]:
        """Features of all images by the key encoder, if there is one: what methods cluster.

        A spectral method is shown those of their phase, by the query encoder, as well.
        """
        if encoder is None and self.method.spectral:
            found = extract_features(self.query, self.images, self.view, self.device, "both", phase=True)
            (head_a, pooled_a), (head_b, pooled_b) = (
                [Features(part, len(x)) for part in x.own_ND.tensor_split([self.query.feature_dim], 1)]
                for x in found
            )
            self.method.see_phases(PhaseFeatures((head_a, head_b), (pooled_a, pooled_b)))
        encoder = encoder or self.key or self.query
        first, second = extract_features(encoder, self.images, self.view, self.device)
        return first, second

    def freeze(self) -> None:
        """Take a copy of the encoder that nothing changes any more."""
        self.frozen = copy.deepcopy(self.query).requires_grad_(False).eval()

    def start_epoch(self, epoch: int, features: tuple[Features, Features]) -> dict[str, float]:
        """What comes before an epoch's first step; returns the method's figures."""
        frozen_from = self.method.frozen_from
        if self.frozen is None and frozen_from is not None and epoch >= frozen_from:
            self.freeze()
        return self.method.start_epoch(epoch, features)

    def check_finite(self, epoch: int, features: tuple[Features, Features]) -> None:
        """An epoch's last step may have spoilt the weights without a loss to show it.

        Raises:
            NotFiniteError: a feature is not finite, whichever worker's.
        """
        if any(bool(x.total((~x.own_ND.isfinite()).sum())) for x in features):
            inputs = {
                f"features_{side}": _statistics(x.own_ND) for side, x in zip("ab", features, strict=True)
            }
            weights = {name: _statistics(value) for name, value in self.query.named_parameters()}
            details = {"epoch": epoch, "inputs": inputs, "weights": weights}
            raise NotFiniteError(f"epoch {epoch}: features are not finite after its last step", details)

    def within_epoch(self) -> dict[str, Any]:
        """What :meth:`state_dict` lacks in the middle of an epoch."""
        return {name: getattr(self.method, name, None) for name in self.method.within_epoch}

    def enter_epoch(self, state: dict[str, Any]) -> None:
        """Take up :meth:`within_epoch`'s value, instead of :meth:`start_epoch`."""
        for name, value in state.items():
            setattr(self.method, name, _to(value, self.device))

    def state_dict(self) -> dict[str, Any]:
        """All that resuming at an epoch's end needs; whole on the first worker alone."""
        return {
            "query": self.query.state_dict(),
            "key": self.key.state_dict() if self.key else None,
            "frozen": self.frozen.state_dict() if self.frozen else None,
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`'s value."""
        self.query.load_state_dict(state["query"])
        if self.key:
            self.key.load_state_dict(state["key"])
        if state["frozen"]:
            self.freeze()
            assert self.frozen is not None
            self.frozen.load_state_dict(state["frozen"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(_to(state["method"], self.device))

    def train_epoch(
        self,
        epoch: int,
        max_steps: int | None = None,
        begin: EpochStart | None = None,
        after_step: Callable[[EpochStart], None] | None = None,
    ) -> dict[str, float]:
        """One pass over the pair; returns the mean of each loss term.

        Args:
            epoch: its number.
            max_steps: stop after so many.
            begin: go on from here.
            after_step: told after each step but the last how far the epoch is.

        Raises:
            NotFiniteError: a loss is not finite.
        """
        self.model.train()
        if self.key:
            self.key.train()
        method = self.method
        now = begin or EpochStart()
        steps = islice(enumerate(self.batches.epoch(epoch)), now.step, max_steps)
        render = partial(render_step, self.images, self.view, method, epoch, self.key is not None)
        for step, views in enumerate(prefetch(render, steps), now.step):
            if self.key and method.keyed:
                update_key_encoder(self.key, self.query, method.keyed.key_momentum)
            for group in self.optimizer.param_groups:
                lr = method.lr_at(epoch, epoch * len(self.batches) + step)
                group["lr"] = lr * group.get("lr_scale", 1.0)
            batch = self._forward(views)
            terms = method.losses(epoch, batch)
            total = total_loss(terms)
            values = {name: float(term.value.detach()) for name, term in terms.items()}
            values["total"] = float(total.detach())
            if not math.isfinite(values["total"]):
                raise _not_finite(epoch, step, values, batch, self.query)
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            method.after_step(batch)
            now.step = step + 1
            for name, value in values.items():
                now.sums[name] = now.sums.get(name, 0.0) + value
            if after_step and now.step < len(self.batches):
                after_step(now)
        return {f"train/loss_{name}": value / now.step for name, value in now.sums.items()}

    def _forward(self, views: Views) -> tuple[DomainBatch, DomainBatch]:
        """Two views of each image through the two encoders; all rows, whoever computed them.

        Both domains pass through the network as one batch. The key encoder's rows are shuffled, so that
        its two halves of batch statistics mix the domains (MoCo's ShuffleBN).
        """
        if self.method.spectral:
            return self._forward_spectral(views)
        count = len(views.shuffle)
        q = gather_rows(self.model(views.query.to(self.device)), count)
        k = q.detach()
        if self.key and views.key is not None:
            k = self._keys(views)
        frozen: Tensor | None = None
        if self.frozen:
            with torch.no_grad():
                frozen = gather_rows(self.frozen(views.query.to(self.device)), count)
        first, second = (
            DomainBatch(slot.to(self.device), q[rows], k[rows], None if frozen is None else frozen[rows])
            for slot, rows in zip(views.slots, (slice(len(q) // 2), slice(len(q) // 2, None)), strict=True)
        )
        return first, second

    def _keys(self, views: Views) -> Tensor:
        assert self.key is not None
        assert views.key is not None
        with torch.no_grad():
            shuffled = gather_rows(self.key(views.key.to(self.device)), len(views.shuffle))
            k = torch.empty_like(shuffled)
            k[views.shuffle.to(self.device)] = shuffled
        return k

    def _forward_spectral(self, views: Views) -> tuple[DomainBatch, DomainBatch]:
        """Phase views and mixed views of both domains as one batch, phases first."""
        both = gather_rows(self.model(views.query.to(self.device), pooled="both"), len(views.shuffle))
        k = self._keys(views)
        q, pooled = both[:, : k.shape[1]], both[:, k.shape[1] :]
        phase, mixed = slice(len(q) // 2), slice(len(q) // 2, None)
        parts = []
        for slot, rows in zip(views.slots, (slice(len(q) // 4), slice(len(q) // 4, None)), strict=True):
            seen = PhaseBatch(q[phase][rows], k[phase][rows], pooled[phase][rows], pooled[mixed][rows])
            parts.append(DomainBatch(slot.to(self.device), q[mixed][rows], k[mixed][rows], phase=seen))
        return parts[0], parts[1]


def train(training: PairTraining, reporter: Reporter) -> None:
    """Train to the last epoch, from the start or from the reporter's state."""
    for _ in epochs(training, reporter):
        pass


def epochs(training: PairTraining, reporter: Reporter) -> Iterator[int]:
    """Train, pausing after each epoch that is done and reported; yields its number.

    Several trainings can so advance side by side. Epochs of the reporter's state are not repeated.

    Raises:
        NotFiniteError: a loss or a feature is not finite; the reporter has been told.
    """
    state = reporter.load_state()
    midway: dict[str, Any] | None = None
    if state is None:
        first_epoch = 0
    else:
        midway = state.get("midway")
        first_epoch = state["epoch"] + (midway is None)
        training.load_state_dict(state)
    if midway is None:
        features = training.features()
    if state is None:
        training.method.start(features)
    for epoch in range(first_epoch, training.method.params.epochs):
        began = time.perf_counter()
        start = EpochStart()
        if midway is None:
            figures = training.start_epoch(epoch, features)
        else:
            figures, start = midway["figures"], EpochStart(midway["step"], midway["sums"])
            training.enter_epoch(midway["method"])
            midway = None
        first_step = start.step

        def after_step(now: EpochStart, epoch: int = epoch, figures: dict[str, float] = figures) -> None:
            if reporter.wants_state():
                within = {**asdict(now), "figures": figures, "method": training.within_epoch()}
                reporter.keep({"epoch": epoch, "midway": within, **training.state_dict()})

        try:
            losses = training.train_epoch(epoch, begin=start, after_step=after_step)
            trained = time.perf_counter()
            features = training.features()
            training.check_finite(epoch, features)
        except NotFiniteError as error:
            reporter.fault(error.details)
            raise
        encoder = training.retrieval_encoder
        asked = training.features(encoder) if training.key and encoder is training.query else features
        images = 2 * training.batches.batch_size * (len(training.batches) - first_step)
        metrics = {
            **losses,
            **figures,
            "train/lr": training.method.lr_at(epoch, epoch * len(training.batches)),
            "time/epoch_seconds": time.perf_counter() - began,
            "time/images_per_second": images / (trained - began),
            "time/workers": float(world_size()),
        }
        state = {"epoch": epoch, **training.state_dict()}
        reporter.end_epoch(EpochReport(epoch, metrics, asked, encoder, state))
        yield epoch


def total_loss(terms: dict[str, Term]) -> Tensor:
    """Weighted sum of the terms."""
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _to(getattr(value, f.name), device) for f in fields(value)})
    return type(value)(_to(part, device) for part in value) if isinstance(value, (list, tuple)) else value
