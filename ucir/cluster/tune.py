"""Sweeps: Ray Tune over a method's params, scored by the mean over the pairs or for each pair by itself.

A trial runs one candidate. Its trainings (all pairs and seeds) advance side by side, so that each epoch has
one score and a scheduler can give the whole candidate up early. They are ordinary runs, found again by their
keys: a trial that was killed, or a sweep that is run again, goes on from their last epochs, and two sweeps
share what they have in common.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from ucir import tracking

# sets Ray's environment: before ray itself
from ucir.cluster.launch import at_once, connect, per_run, workers
from ucir.config.cluster import ClusterParams
from ucir.config.load import Params
from ucir.config.sweep import Dimension, SweepParams
from ucir.devices import choose_device
from ucir.paths import RESULTS, RUNS, check_writable, write_atomically
from ucir.progress import Progress
from ucir.runs.process import lock_run
from ucir.runs.reporter import RunReporter
from ucir.runs.run import content_key
from ucir.runs.sweep import (
    SweepResult,
    Trial,
    check_sweep,
    describe_result,
    described,
    epoch_scores,
    joined,
    plan_candidate,
    score,
    short,
    write_result,
)
from ucir.training.diagnosis import NotFiniteError
from ucir.training.epochs import epochs

from ray import tune  # isort: skip
from ray.tune import Callback  # isort: skip

WAITING = 0.01
"""CPUs of a trial that waits for its own workers; Ray wants something."""
WORST = -1.0
"""Score of a candidate whose loss became NaN: no criterion is lower."""


def run_sweep(params: Params, name: str) -> Path:
    """Run a sweep, or go on with it, write down and print what it found; returns the folder.

    Raises:
        UserError: as :func:`tune_all`.
    """
    out = RESULTS / "sweeps" / name
    results = tune_all(params, name)
    write_result(results, params, name, out)
    for result in results:
        print(describe_result(result))
    return out


def tune_all(params: Params, name: str) -> list[SweepResult]:
    """Run a sweep, or go on with it: one result, or one for each pair.

    Raises:
        UserError: as :func:`check_sweep`; the sweep's folder under results cannot be written; a trial does
            not fit the cluster; no trial came to its end.
    """
    sweep, space = check_sweep(params, name)
    check_writable(RESULTS / "sweeps" / name)
    print(described(params, name, sweep, space), flush=True)
    pairs = sweep.pairs or params.datasets[sweep.dataset].pairs
    groups = [pairs] if sweep.scope == "shared" else [(pair,) for pair in pairs]
    return [_tune(params, name, sweep, space, group) for group in groups]


def _tune(
    params: Params, name: str, sweep: SweepParams, space: dict[str, Dimension], pairs: tuple[str, ...]
) -> SweepResult:
    check_writable(RUNS)
    runs = plan_candidate(params, sweep, {}, pairs)
    title = name if sweep.scope == "shared" else f"{name}-{pairs[0].replace('>', '-to-')}"
    content = {
        "sweep": sweep.model_dump(mode="json"),
        "runs": [run.key for run in runs],
    }
    key = content_key(content)
    folder = (RUNS / "sweeps").resolve() / f"{title}-{key}"
    kept = folder / "trials.json"
    if kept.exists():
        print(f"tune {title}: finished before ({folder.name})")
        trials = [Trial(**trial) for trial in json.loads(kept.read_text("utf-8"))]
        return SweepResult(title, pairs, sweep.objective, trials)
    uri = tracking.tracking_uri()
    tracking.init_store(uri)
    parent = tracking.tracked_run(
        uri,
        f"ucir/sweeps/{sweep.dataset}-{sweep.method}",
        f"sweep {title}",
        f"sweep-{key}",
        {"dataset": sweep.dataset, "setting": sweep.setting, "method": sweep.method, "stage": "sweep"},
        {
            "pairs": ", ".join(pairs),
            **sweep.model_dump(include={"trials", "search", "scheduler"}),
            "objective": joined(sweep.objective),
        },
        f"`uv run ucir tune {name}`; what was found: `results/sweeps/{name}`",
        tracking.data_inputs(
            runs[0].pack, runs[0].source, {domain: "training" for run in runs for domain in run.pair}
        ),
    )
    connect(params.cluster, uri)
    waiting = WAITING if params.cluster.num_workers >= 2 else 0.0
    concurrent = at_once(params.cluster, f"a trial of the sweep {name}", waiting)
    count = sweep.candidates
    task = TrialTask(params, sweep, pairs, parent, key, str(Path.cwd()))

    def trial(values: dict[str, Any]) -> None:
        task(values)

    trainable = tune.with_resources(trial, _per_trial(params.cluster))
    longest = max(space["epochs"].ends) if "epochs" in space else runs[0].params.epochs
    logging.getLogger("ray.tune").setLevel(logging.WARNING)
    with Progress(f"tune {title}", count * longest, "epoch") as progress, tracking.status_of(parent):
        _Shown.progress, _Shown.longest = progress, longest
        if tune.Tuner.can_restore(str(folder)):
            tuner = tune.Tuner.restore(str(folder), trainable, resume_errored=True)
            ended = sum(bool((result.metrics or {}).get("done")) for result in tuner.get_results())
            progress.message(f"tune {title}: goes on, {ended} of {count} trials have ended ({folder})")
            progress.skip(ended * longest)
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={field: _tune_space(d, sweep.search) for field, d in space.items()},
                tune_config=tune.TuneConfig(
                    metric="score",
                    mode="max",
                    num_samples=1 if sweep.search == "grid" else sweep.trials,
                    search_alg=_searcher(sweep, concurrent),
                    scheduler=_scheduler(sweep, longest),
                ),
                run_config=tune.RunConfig(
                    name=folder.name,
                    storage_path=str(folder.parent),
                    verbose=0,
                    callbacks=[_Shown()],
                    failure_config=tune.FailureConfig(max_failures=params.cluster.max_failures),
                ),
            )
        grid = tuner.fit()
    trials = []
    for result in grid:
        trials.append(_ended(result, longest))
        if trial_id := (result.metrics or {}).get("trial_id"):
            status = {"finished": "FINISHED", "stopped": "KILLED"}.get(trials[-1].state, "FAILED")
            task.track(trials[-1].values, trial_id).set_status(status)
    result_of_sweep = SweepResult(title, pairs, sweep.objective, trials)
    best = {f"best/{metric}": value for metric, value in result_of_sweep.best.scores.items()}
    ranks = {
        f"ranks/{row['criterion']}_{what}": row[what]
        for row in result_of_sweep.ranked()
        for what in ("spearman", "regret")
    }
    parent.log_scores({**best, **ranks, "trials": float(len(trials))})
    if all(trial.state in ("finished", "stopped") for trial in trials):
        write_atomically(json.dumps([asdict(trial) for trial in trials], indent=1) + "\n", kept)
    return result_of_sweep


def _ended(result: Any, longest: int) -> Trial:
    """A trial as Ray Tune remembers it."""
    values, metrics = dict(result.config or {}), result.metrics or {}
    if result.error is not None:
        return Trial(values, 0, f"failed: {str(result.error).strip().splitlines()[-1]}", {})
    came, asked = int(metrics.get("epoch", 0)), int(metrics.get("epochs", longest))
    state = "finished" if came == asked else "stopped"
    if metrics.get("fault"):
        state = f"failed: {metrics['fault']}"
    scores = {k.removeprefix("scores_"): v for k, v in metrics.items() if k.startswith("scores_")}
    return Trial(values, came, state, scores)


@dataclass(frozen=True)
class TrialTask:
    """What a trial does, wherever it runs; Ray Tune calls it with a candidate's values."""

    params: Params
    sweep: SweepParams
    pairs: tuple[str, ...]
    parent: tracking.TrackedRun
    key: str
    folder: str
    """The project's, which every machine of the cluster must see under this path."""

    def __call__(self, values: dict[str, Any]) -> None:
        os.chdir(self.folder)
        trial = tune.get_context().get_trial_id()
        if self.params.cluster.num_workers >= 2:
            self._on_workers(values, trial)
        else:
            self.run(values, trial, choose_device(self.params.cluster), True, tune.report)

    def _on_workers(self, values: dict[str, Any], trial: str) -> None:
        """Nested: this trial waits while Ray Train's workers train, and passes their reports on."""
        from ray.tune.integration.ray_train import TuneReportCallback

        config = {"task": self, "values": values, "trial": trial}
        storage = (RUNS / "sweeps" / "workers").resolve()
        name = f"{self.key}-{trial}"
        cluster = self.params.cluster.model_copy(update={"max_workers": None})
        trainer = workers(_trial_worker, config, cluster, name, storage, [TuneReportCallback()])
        trainer.fit()

    def run(
        self,
        values: dict[str, Any],
        trial: str,
        device: Any,
        writes: bool,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        """Train all pairs and seeds of a candidate side by side; a report after each epoch."""
        runs = plan_candidate(self.params, self.sweep, values, self.pairs)
        asked = runs[0].params.epochs
        with contextlib.ExitStack() as held:
            if writes:  # two trials may have drawn the same values: the second waits, then finds it done
                for run in sorted(runs, key=lambda run: run.key):
                    held.enter_context(lock_run(run, wait=True))
            tracked = self.track(values, trial) if writes else None
            histories = [list(run.history()) for run in runs]
            done = [len(history) for history in histories]
            reporters = [RunReporter(run, writes) for run in runs]
            trainings = {
                number: epochs(run.new_training(device), reporters[number])
                for number, run in enumerate(runs)
                if not run.done
            }
            epochs_scores: list[dict[str, float]] = []
            for epoch in range(asked):
                try:
                    for number, training in trainings.items():
                        if done[number] <= epoch:
                            next(training)
                except NotFiniteError as error:
                    scores = epochs_scores[-1] if epochs_scores else {}
                    report(
                        {**_reported(scores, WORST), "epoch": epoch + 1, "epochs": asked, "fault": str(error)}
                    )
                    return
                if not writes:
                    report({})
                    continue
                entries = [
                    (reporter.history or history)[epoch]
                    for reporter, history in zip(reporters, histories, strict=True)
                ]
                epochs_scores.append(epoch_scores(runs, entries))
                if tracked:
                    tracked.log_history(
                        [{"epoch": float(i), **entry} for i, entry in enumerate(epochs_scores)]
                    )
                scores = epochs_scores[-1]
                judged = score(scores, self.sweep.objective)
                report({**_reported(scores, judged), "epoch": epoch + 1, "epochs": asked})

    def track(self, values: dict[str, Any], trial: str) -> tracking.TrackedRun:
        """The trial's run in MLflow, below the sweep's."""
        tags = {"stage": "trial", "method": self.sweep.method, "sweep": self.key}
        if self.parent.run_id:
            tags["mlflow.parentRunId"] = self.parent.run_id
        return tracking.tracked_run(
            self.parent.uri,
            f"ucir/sweeps/{self.sweep.dataset}-{self.sweep.method}",
            ", ".join(f"{key} {short(value)}" for key, value in values.items()),
            f"{self.key}-{trial}",
            tags,
            values,
            data=self.parent.data,
        )


def _trial_worker(config: dict[str, Any]) -> None:
    """A worker of a trial of several."""
    from ray import train as ray_train
    from ray.train.torch import get_device

    task: TrialTask = config["task"]
    os.chdir(task.folder)
    first = ray_train.get_context().get_world_rank() == 0
    task.run(config["values"], config["trial"], get_device(), first, ray_train.report)


def _reported(scores: Mapping[str, float], score: float) -> dict[str, float]:
    return {"score": score, **{f"scores_{name}": value for name, value in scores.items()}}


def _per_trial(cluster: ClusterParams) -> dict[str, float]:
    """Ray Train asks for a trial's workers itself; the trial that waits for them takes next to nothing."""
    return per_run(cluster) if cluster.num_workers < 2 else {"CPU": WAITING}


def _tune_space(dimension: Dimension, search: str) -> Any:
    if dimension.uniform:
        return tune.uniform(*dimension.uniform)
    if dimension.loguniform:
        return tune.loguniform(*dimension.loguniform)
    if dimension.integer:
        return tune.randint(dimension.integer[0], dimension.integer[1] + 1)
    values = list(dimension.choice or ())
    return tune.grid_search(values) if search == "grid" else tune.choice(values)


def _searcher(sweep: SweepParams, concurrent: int) -> Any:
    from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

    if sweep.search != "tpe":
        return BasicVariantGenerator(max_concurrent=concurrent, random_state=sweep.seed)
    from optuna.logging import WARNING, set_verbosity
    from optuna.samplers import TPESampler
    from ray.tune.search.optuna import OptunaSearch

    set_verbosity(WARNING)
    return ConcurrencyLimiter(OptunaSearch(sampler=TPESampler(seed=sweep.seed)), concurrent)


def _scheduler(sweep: SweepParams, longest: int) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    if sweep.scheduler == "asha":
        return ASHAScheduler(
            time_attr="epoch",
            max_t=longest,
            grace_period=min(sweep.grace, longest),
            reduction_factor=sweep.reduction,
        )
    if sweep.scheduler == "median":
        return MedianStoppingRule(time_attr="epoch", grace_period=sweep.grace)
    return FIFOScheduler()


class _Shown(Callback):  # type: ignore[misc]
    """Counts epochs; what a trial that ends early leaves is counted as done. Ray pickles it."""

    progress: ClassVar[Progress | None] = None
    longest: ClassVar[int] = 0

    def __init__(self) -> None:
        self.came: dict[str, int] = {}

    def _reach(self, trial: Any, epoch: int, note: str) -> None:
        steps = epoch - self.came.get(trial.trial_id, 0)
        self.came[trial.trial_id] = epoch
        if self.progress and steps > 0:
            self.progress.advance(steps, note)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        values = ", ".join(f"{key} {short(value)}" for key, value in trial.config.items())
        self._reach(trial, int(result["epoch"]), f"{values}: score {result['score']:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._reach(trial, self.longest, f"trial {trial.trial_id} ended")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.progress:
            self.progress.message(f"trial {trial.trial_id} failed; the others go on")
