"""The epochs of a training, and how one that was killed goes on. Knows no Ray, no MLflow, no labels."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ucir.distributed import world_size
from ucir.memory import Features
from ucir.models.encoder import Encoder
from ucir.training.diagnosis import NotFiniteError
from ucir.training.training import EpochStart, Training


@dataclass(frozen=True)
class EpochReport:
    """What a finished epoch hands to the reporter."""

    epoch: int
    metrics: dict[str, float]
    features: tuple[Features, ...]
    """Of the retrieval encoder, of each domain."""
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


def train(training: Training, reporter: Reporter) -> None:
    """Train to the last epoch, from the start or from the reporter's state."""
    for _ in epochs(training, reporter):
        pass


def epochs(training: Training, reporter: Reporter) -> Iterator[int]:
    """Train, pausing after each epoch that is done and reported; yields its number.

    Several trainings can so advance side by side. Epochs of the reporter's state are not repeated.

    Raises:
        NotFiniteError: a loss or a feature is not finite; the reporter has been told.
    """
    method = training.method
    state = reporter.load_state()
    midway: dict[str, Any] | None = None
    if state is None:
        first_epoch = 0
        training.begin()
    else:
        midway = state.get("midway")
        first_epoch = state["epoch"] + (midway is None)
        training.load_state_dict(state)
    if midway is None:
        features = training.features()
    if state is None:
        method.start(features)
    for epoch in range(first_epoch, method.params.epochs):
        began = time.perf_counter()
        start = EpochStart()
        if midway is None:
            figures = training.start_epoch(epoch, features)
        else:
            figures, start = midway["figures"], EpochStart(midway["step"], midway["sums"])
            midway = None
        first_step = start.step

        def after_step(now: EpochStart, epoch: int = epoch, figures: dict[str, float] = figures) -> None:
            if reporter.wants_state():
                progress = {**asdict(now), "figures": figures}
                reporter.keep({"epoch": epoch, "midway": progress, **training.state_dict(within_epoch=True)})

        try:
            losses = training.train_epoch(epoch, begin=start, after_step=after_step)
            trained = time.perf_counter()
            features = training.features()
            training.check_finite(epoch, features)
        except NotFiniteError as error:
            reporter.fault(error.details)
            raise
        encoder = training.step.retrieval_encoder
        ranked = training.features(encoder) if training.key and encoder is training.query else features
        images = training.batches.images * (start.step - first_step)
        metrics = {
            **losses,
            **figures,
            "train/lr": method.lr_at(epoch, epoch * len(training.batches)),
            "time/epoch_seconds": time.perf_counter() - began,
            "time/images_per_second": images / (trained - began),
            "time/workers": float(world_size()),
        }
        state = {"epoch": epoch, **training.state_dict()}
        reporter.end_epoch(EpochReport(epoch, metrics, ranked, encoder, state))
        yield epoch
