"""Train runs in this process, one after the other; what any process that trains a run does."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import torch

from ucir import tracking
from ucir.config.cluster import ClusterParams
from ucir.devices import choose_device
from ucir.errors import UserError
from ucir.methods import RECONSTRUCTED
from ucir.paths import RUNS, locked
from ucir.progress import Progress
from ucir.retrieval.metrics import precision_name
from ucir.runs.reporter import RunReporter
from ucir.runs.run import PRETRAIN, PairRun, Run
from ucir.training.epochs import train


@contextlib.contextmanager
def lock_run(run: Run, wait: bool = False) -> Iterator[None]:
    """Hold the run's folder for this process; a kill gives it back, too.

    Raises:
        UserError: another process holds it, and we do not ``wait``.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    busy = None if wait else f"{run.name}: another process is training it in {run.folder}"
    with locked(run.folder / "lock", busy):
        yield


def train_here(
    run: Run,
    tracked: tracking.TrackedRun,
    device: torch.device,
    advance: Callable[[int, str], None],
    stop: threading.Event,
) -> None:
    """Train one run in this process."""

    def after_epoch(history: list[dict[str, float]]) -> None:
        tracked.log_history(history)
        advance(1, epoch_line(run, history[-1]))

    with lock_run(run), tracking.status_of(tracked):
        advance(0, f"{run.name} begins")
        train(run.new_training(device), RunReporter(run, True, after_epoch, stop))


@contextlib.contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """An event that the first Ctrl+C or SIGTERM sets; the second is a KeyboardInterrupt."""
    stop = threading.Event()

    def asked() -> None:
        if stop.is_set():
            interrupt()
        stop.set()
        os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print may be at work

    with answering(asked, signal.SIGINT, signal.SIGTERM):
        yield stop


def interrupt() -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def answering(asked: Callable[[], None], *numbers: int) -> Iterator[None]:
    """Call ``asked`` on these signals; off the main thread they do not come."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, lambda *_: asked()) for number in numbers if here}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_one_by_one(runs: list[Run], cluster: ClusterParams, uri: str, progress: Progress) -> dict[str, str]:
    """In this process. Returns what failed, and why."""
    failed: dict[str, str] = {}
    with _stoppable() as stop:
        for run in runs:
            try:
                train_here(run, tracked_run_of(run, uri), choose_device(cluster), progress.advance, stop)
            except Exception as error:
                failed[run.name] = reason(run, error)
                progress.message(f"{run.name} failed: {failed[run.name]}")
    return failed


def reason(run: Run, error: Exception) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    message = f"{kind}{error}".strip().splitlines()[0]
    if (fault := run.folder / "fault.json").exists():
        message += f"; its inputs are described in {fault}"
    return message


def tracked_run_of(run: Run, uri: str) -> tracking.TrackedRun:
    params = {
        **run.params.model_dump(),
        "trunk": run.encoder.trunk_name,
        "side": run.view.side,
        "reconstructed": run.tags().get("method") in RECONSTRUCTED,
    }
    return tracking.tracked_run(
        uri,
        f"ucir/{run.dataset}",
        tracking.named(run.name, run.tags().get("setting")),
        run.key,
        {**run.tags(), "stage": "train" if isinstance(run, PairRun) else PRETRAIN},
        params,
        f"`{run.again()}`\n\nWeights and state: `{RUNS / run.folder.name}`",
        tracking.data_inputs(run.pack, run.source, run.contexts),
    )


def track_model(run: Run, uri: str) -> None:
    """Put a finished run's model of the last epoch into the store."""
    tracked_run_of(run, uri).log_model(run.folder / "last.pt")


def track_finished(run: Run, uri: str) -> None:
    """Bring the store up to date with a finished run: it may be new, or have been down."""
    tracked = tracked_run_of(run, uri)
    with tracking.status_of(tracked):
        tracked.log_history(run.history())


def epoch_line(run: Run, entry: dict[str, float]) -> str:
    """What a finished epoch showed, in a line."""
    cutoff = run.cutoffs[0] if isinstance(run, PairRun) else None
    score = entry.get(f"val/{precision_name(cutoff)}") if cutoff else None
    chosen = isinstance(getattr(run.params, "clusters", None), str) and "cluster/count_a" in entry
    counts = f" K {entry['cluster/count_a']:.0f} and {entry['cluster/count_b']:.0f}" if chosen else ""
    shown = "" if score is None else f" P@{cutoff} {score:.1f}"
    return (
        f"{run.name} epoch {int(entry['epoch']) + 1}/{run.params.epochs} "
        f"loss {entry['train/loss_total']:.3f}{shown}{counts}"
    )
