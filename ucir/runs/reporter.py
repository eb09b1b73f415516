"""What a training keeps of itself in its run's folder, see :mod:`ucir.runs.run`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import numpy as np
from torch import Tensor

from ucir.distributed import any_worker
from ucir.models.checkpoints import load_state, save_atomically
from ucir.models.model import save_model
from ucir.paths import write_atomically
from ucir.retrieval.criteria import criteria, spread_rows
from ucir.retrieval.evaluation import BEST, CHECKPOINTS, LAST
from ucir.retrieval.metrics import metric_values, metrics, precision_name
from ucir.retrieval.ranking import rank
from ucir.runs.run import PairRun, Run
from ucir.training.epochs import EpochReport

LOOK_SECONDS = 10.0
"""How often workers ask whether one of their machines is leaving; while one is, a state is kept as often."""
KEEP_SECONDS = 300.0
"""A state is kept in the middle of an epoch when the last one is as old."""


@dataclass
class RunReporter:
    """Keeps a run's folder; the only place in training's reach that knows labels, which it gives no one.

    Args:
        run: the run.
        writes: only one worker writes; the others resume from its files.
        on_epoch: called by the writer with the history after each epoch.
        stop: set when the run shall stop after the step at hand, with its state kept.
        leaving: asked now and then, on all workers at once: whether one of their machines is about to go.
    """

    run: Run
    writes: bool = True
    on_epoch: Callable[[list[dict[str, float]]], None] = lambda history: None
    stop: Event = field(default_factory=Event)
    leaving: Callable[[], bool] = lambda: False
    history: list[dict[str, float]] = field(default_factory=list)
    kept: float = field(default_factory=time.monotonic)
    looked: float = 0.0
    labels: dict[str, list[str]] | None = None

    def load_state(self) -> dict[str, Any] | None:
        if self.writes:
            (self.run.folder / "fault.json").unlink(missing_ok=True)  # of an earlier attempt
        path = self.run.folder / "state.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = load_state(path)
        self.history = state.pop("history")
        return state

    def wants_state(self) -> bool:
        """When asked to stop, when a machine leaves, and every few minutes of a long epoch."""
        now = time.monotonic()
        look, due, stop = any_worker(
            [
                self.writes and now - self.looked > LOOK_SECONDS,
                self.writes and now - self.kept > KEEP_SECONDS,
                self.stop.is_set(),
            ]
        )
        if look:
            self.looked = now
        return (look and self.leaving()) or due or stop

    def keep(self, state: dict[str, Any]) -> None:
        if self.writes:
            save_atomically({**state, "history": self.history}, self.run.folder / "state.pt")
        self.kept = time.monotonic()
        if self.stop.is_set():
            raise KeyboardInterrupt

    def end_epoch(self, report: EpochReport) -> None:
        features = [x.on_first() for x in report.features]
        if not self.writes:
            return
        entry = {"epoch": float(report.epoch), **report.metrics}
        last = report.epoch + 1 == self.run.params.epochs
        if isinstance(self.run, PairRun):
            first, second = features
            entry |= {f"quality/{name}": value for name, value in criteria(first, second).items()}
            entry |= self._scores(self.run, None if last else self.run.curve_queries, first, second)
            selector = f"val/{precision_name(self.run.cutoffs[0])}"
            better = selector in entry and all(
                entry[selector] > earlier[selector] for earlier in self.history
            )
            if better and self.run.keep_best:
                self._save(report, BEST, entry)
        self.history.append(entry)
        state = self.run.folder / "state.pt"
        if not last:
            save_atomically({**report.state, "history": self.history}, state)
            self.kept = time.monotonic()
        self.on_epoch(self.history)
        if self.stop.is_set() and not last:  # an epoch of one step asks nobody within it
            raise KeyboardInterrupt
        if last:
            self._save(report, LAST, entry)
            facts = {**self.run.tags(), **self.run.facts(), "history": self.history}
            write_atomically(json.dumps(facts, indent=1) + "\n", self.run.folder / "done.json")
            state.unlink(missing_ok=True)

    def _save(self, report: EpochReport, choice: str, entry: dict[str, float]) -> None:
        # in partial and open the two directions are different tasks, of which the curves' mean is no score
        both = isinstance(self.run, PairRun) and len(self.run.directions) == 2
        named = metrics(self.run.cutoffs) if isinstance(self.run, PairRun) and both else ()
        scores = {m.name: entry[key] for m in named if (key := f"val/{m.identifier}") in entry}
        model = self.run.model(report.encoder, report.epoch + 1, choice, scores)
        save_model(model, self.run.folder / CHECKPOINTS[choice])

    def fault(self, details: dict[str, Any]) -> None:
        if self.writes:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(_plain(details), indent=1, allow_nan=False)
            (self.run.folder / "fault.json").write_text(text + "\n", encoding="utf-8")

    def _scores(self, run: PairRun, most: int | None, *features_ND: Tensor) -> dict[str, float]:
        """P@K and mAP of at most so many queries, mean of both directions: a curve to look at, and the choice
        of the best epoch.

        Nothing for pictures without labels.
        """
        if self.labels is None:
            self.labels = {domain: [p.label for p in index] for domain, index in run.trained}
        if not all(any(labels) for labels in self.labels.values()):
            return {}
        features = dict(zip(self.labels, features_ND, strict=True))
        each = []
        for q, g in (run.pair, run.pair[::-1]):
            count = len(features[q])
            slots = spread_rows(count, most or count)
            query_labels = [self.labels[q][slot] for slot in slots.tolist()]
            ranking = rank(features[q][slots], features[g], query_labels, self.labels[g])
            each.append(metric_values(ranking, run.cutoffs))
        return {f"val/{name}": float(np.mean([s[name] for s in each])) for name in each[0]}


def _plain(value: Any) -> Any:
    """JSON has no word for what is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value
