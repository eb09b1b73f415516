"""Sweeps: Ray Tune over a method's params, scored by the mean over the pairs or for each pair by itself.

A trial is one setting. Its trainings (all pairs and seeds) advance side by side, so that each epoch has one
score and a scheduler can give the whole setting up early. They are ordinary runs, found again by their keys:
a trial that was killed, or a sweep that is run again, goes on from their last epochs, and two sweeps share
what they have in common.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.stats import spearmanr

from ucir import tracking

# sets Ray's environment: before ray itself
from ucir.cluster.launch import at_once, connect, lock_run, new_training, per_run, workers
from ucir.cluster.runs import Run, RunReporter, plan_runs
from ucir.config import PARAMS_FILE, ClusterParams, Dimension, Params, SweepParams, checked
from ucir.devices import choose_device
from ucir.errors import UserError, nearest
from ucir.methods import method_params, params_block
from ucir.paths import RESULTS, RUNS, check_writable, write_atomically
from ucir.progress import Progress
from ucir.retrieval.criteria import CRITERIA
from ucir.training.loop import NotFiniteError, epochs

from ray import tune  # isort: skip
from ray.tune import Callback  # isort: skip

ORACLE = "oracle"
WAITING = 0.01
"""CPUs of a trial that waits for its own workers; Ray wants something."""
WORST = -1.0
"""Score of a setting whose loss became NaN: no criterion is lower."""


@dataclass(frozen=True)
class Trial:
    """A setting that was tried."""

    values: dict[str, Any]
    epochs: int
    """How far it came."""
    state: str
    """``finished``, ``stopped`` early by the scheduler, or ``failed: <why>``."""
    scores: dict[str, float]
    """Mean over pairs and seeds at its last epoch: the criteria and, where there are labels, the oracle."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found for its pairs."""

    name: str
    pairs: tuple[str, ...]
    objective: str
    trials: list[Trial]

    @property
    def finished(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "finished"]

    @property
    def best(self) -> Trial:
        """By the objective, among those that came to the end.

        Raises:
            UserError: none did.
        """
        if not self.finished:
            told = "; ".join(dict.fromkeys(trial.state for trial in self.trials))
            raise UserError(f"sweep {self.name}: no trial came to its end: {told}")
        return max(self.finished, key=lambda trial: trial.scores[self.objective])

    def ranked(self) -> list[dict[str, Any]]:
        """How well each criterion ranks the finished settings: Spearman's rho with the oracle, and regret.

        Regret is what the criterion's choice has less than the oracle's, in points of P@K. Empty without
        labels or with fewer than three settings.
        """
        trials = [trial for trial in self.finished if ORACLE in trial.scores]
        if len(trials) < 3:
            return []
        truth = [trial.scores[ORACLE] for trial in trials]
        rows = []
        for name in (*CRITERIA, "loss"):
            sign = -1 if name == "loss" else 1
            told = [sign * trial.scores[name] for trial in trials]
            rho = float(spearmanr(told, truth).statistic) if len(set(told)) > 1 < len(set(truth)) else 0.0
            regret = max(truth) - truth[int(np.argmax(told))]
            rows.append({"criterion": name, "spearman": rho, "regret": regret})
        return sorted(rows, key=lambda row: -row["spearman"])


def check_sweep(params: Params, name: str) -> tuple[SweepParams, dict[str, Dimension]]:
    """The sweep and its space by field of the method's params, every end of it checked.

    Raises:
        UserError: an unknown sweep, data set, method, objective or key; a value that the method refuses.
    """
    if name not in params.sweeps:
        raise UserError(f"sweep {name!r} is unknown; {nearest(name, params.sweeps)}")
    sweep = params.sweeps[name]
    where = f"{PARAMS_FILE}: sweeps.{name}"
    try:
        base = method_params(params, sweep.method, sweep.dataset)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    known = (*CRITERIA, ORACLE)
    if sweep.objective not in known:
        raise UserError(
            f"{where}.objective: {sweep.objective!r} is unknown; {nearest(sweep.objective, known)}"
        )
    prefix = f"methods.{params_block(sweep.method)}.{sweep.dataset}."
    plan_settings(params, sweep, {})
    space = {}
    for key, dimension in sweep.space.items():
        field = key.removeprefix(prefix)
        if "." in field:
            raise UserError(
                f"{where}.space: {key}: a sweep searches what its trainings are given: keys under "
                f"{prefix.removesuffix('.')}; packs and start weights are made before them"
            )
        if field not in type(base).model_fields:
            raise UserError(f"{where}.space: {key}: {nearest(field, type(base).model_fields)}")
        space[field] = dimension
        for value in dimension.ends:
            try:
                plan_settings(params, sweep, {field: value})
            except UserError as error:
                raise UserError(f"{where}.space: {key}: {error}") from None
    return sweep, space


def plan_settings(
    params: Params, sweep: SweepParams, values: Mapping[str, Any], pairs: tuple[str, ...] | None = None
) -> list[Run]:
    """The runs of one setting. Raises as :func:`ucir.cluster.runs.plan_runs`."""
    raw = params.model_dump()
    shortened = {} if sweep.epochs is None else {"epochs": sweep.epochs}
    raw["methods"][params_block(sweep.method)][sweep.dataset].update({**shortened, **values})
    changed = checked(Params, raw, PARAMS_FILE)
    return plan_runs(changed, sweep.dataset, sweep.setting, sweep.method, pairs or sweep.pairs, sweep.seeds)


def describe_sweep(params: Params, name: str) -> str:
    """What a sweep will do. Raises as :func:`check_sweep`."""
    return _described(params, name, *check_sweep(params, name))


def _described(params: Params, name: str, sweep: SweepParams, space: Mapping[str, Dimension]) -> str:
    pairs = sweep.pairs or params.datasets[sweep.dataset].pairs
    tried = _count(sweep, space)
    trainings = len(plan_settings(params, sweep, {}))
    times = f" for each of {len(pairs)} pairs" if sweep.scope == "per_pair" else ""
    return (
        f"sweep {name}: {sweep.method} on {sweep.dataset}, {tried} settings of {', '.join(space)}{times} "
        f"({sweep.search}, {sweep.scheduler}), {trainings} trainings each, judged by {sweep.objective}"
    )


def _count(sweep: SweepParams, space: Mapping[str, Dimension]) -> int:
    return math.prod(len(d.ends) for d in space.values()) if sweep.search == "grid" else sweep.trials


def run_sweep(params: Params, name: str) -> Path:
    """Run a sweep, or go on with it, write down and print what it found; returns the folder.

    Raises:
        UserError: as :func:`tune_all`; the folder cannot be written.
    """
    out = RESULTS / "sweeps" / name
    check_writable(out)
    found = tune_all(params, name)
    write_result(found, params, name, out)
    for one in found:
        print(describe_result(one))
    return out


def tune_all(params: Params, name: str) -> list[SweepResult]:
    """Run a sweep, or go on with it: one result, or one for each pair.

    Raises:
        UserError: as :func:`check_sweep`; a trial does not fit the cluster; no trial came to its end.
    """
    sweep, space = check_sweep(params, name)
    print(_described(params, name, sweep, space), flush=True)
    pairs = sweep.pairs or params.datasets[sweep.dataset].pairs
    groups = [pairs] if sweep.scope == "shared" else [(pair,) for pair in pairs]
    return [_tune(params, name, sweep, space, group) for group in groups]


def _tune(
    params: Params, name: str, sweep: SweepParams, space: dict[str, Dimension], pairs: tuple[str, ...]
) -> SweepResult:
    check_writable(RUNS)
    runs = plan_settings(params, sweep, {}, pairs)
    title = name if sweep.scope == "shared" else f"{name}-{pairs[0].replace('>', '-to-')}"
    own = {
        "sweep": sweep.model_dump(mode="json"),
        "runs": [run.key for run in runs],
    }
    key = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]
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
            **sweep.model_dump(include={"trials", "search", "scheduler", "objective"}),
        },
    )
    connect(params.cluster, uri)
    waiting = WAITING if params.cluster.num_workers >= 2 else 0.0
    concurrent = at_once(params.cluster, f"a trial of the sweep {name}", waiting)
    count = _count(sweep, space)
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
    found = SweepResult(title, pairs, sweep.objective, trials)
    best = {f"best/{metric}": value for metric, value in found.best.scores.items()}
    ranks = {
        f"ranks/{row['criterion']}_{what}": row[what]
        for row in found.ranked()
        for what in ("spearman", "regret")
    }
    parent.log_scores({**best, **ranks, "trials": float(len(trials))})
    if all(trial.state in ("finished", "stopped") for trial in trials):
        write_atomically(json.dumps([asdict(trial) for trial in trials], indent=1) + "\n", kept)
    return found


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
    """What a trial does, wherever it runs; Ray Tune calls it with a setting."""

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
        """Train all pairs and seeds of a setting side by side; a report after each epoch."""
        runs = plan_settings(self.params, self.sweep, values, self.pairs)
        asked = runs[0].params.epochs
        with contextlib.ExitStack() as held:
            if writes:  # two trials may have drawn the same setting: the second waits, then finds it done
                for run in sorted(runs, key=lambda run: run.key):
                    held.enter_context(lock_run(run, wait=True))
            tracked = self.track(values, trial) if writes else None
            histories = [list(run.history()) for run in runs]
            done = [len(history) for history in histories]
            reporters = [RunReporter(run, writes) for run in runs]
            trainings = {
                number: epochs(new_training(run, device), reporters[number])
                for number, run in enumerate(runs)
                if not run.done
            }
            told: list[dict[str, float]] = []
            for epoch in range(asked):
                try:
                    for number, training in trainings.items():
                        if done[number] <= epoch:
                            next(training)
                except NotFiniteError as error:
                    scores = told[-1] if told else {}
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
                told.append(_scores(runs, entries))
                if tracked:
                    tracked.log_history([{"epoch": float(i), **entry} for i, entry in enumerate(told)])
                score = told[-1].get(self.sweep.objective)
                if score is None:
                    raise UserError("objective: oracle: the pictures have no labels; take another")
                report({**_reported(told[-1], score), "epoch": epoch + 1, "epochs": asked})

    def track(self, values: dict[str, Any], trial: str) -> tracking.TrackedRun:
        """The trial's run in MLflow, below the sweep's."""
        tags = {"stage": "trial", "method": self.sweep.method, "sweep": self.key}
        if self.parent.run_id:
            tags["mlflow.parentRunId"] = self.parent.run_id
        return tracking.tracked_run(
            self.parent.uri,
            f"ucir/sweeps/{self.sweep.dataset}-{self.sweep.method}",
            ", ".join(f"{key} {_short(value)}" for key, value in values.items()),
            f"{self.key}-{trial}",
            tags,
            values,
        )


def _trial_worker(config: dict[str, Any]) -> None:
    """A worker of a trial of several."""
    from ray import train as ray_train
    from ray.train.torch import get_device

    task: TrialTask = config["task"]
    os.chdir(task.folder)
    first = ray_train.get_context().get_world_rank() == 0
    task.run(config["values"], config["trial"], get_device(), first, ray_train.report)


def _scores(runs: Sequence[Run], entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over the runs of one epoch's criteria, oracle and loss."""
    named = {
        **{name: f"quality/{name}" for name in CRITERIA},
        ORACLE: f"val/P_at_{runs[0].cutoffs[0]}",
        "loss": "train/loss_total",
    }
    return {
        name: float(np.mean([entry[metric] for entry in entries]))
        for name, metric in named.items()
        if all(metric in entry for entry in entries)
    }


def _reported(scores: Mapping[str, float], score: float) -> dict[str, float]:
    return {"score": score, **{f"scores_{name}": value for name, value in scores.items()}}


def _per_trial(cluster: ClusterParams) -> dict[str, float]:
    """Ray Train asks for a trial's workers itself; the trial that waits for them takes next to nothing."""
    return per_run(cluster) if cluster.num_workers < 2 else {"CPU": WAITING}


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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
        told = ", ".join(f"{key} {_short(value)}" for key, value in trial.config.items())
        self._reach(trial, int(result["epoch"]), f"{told}: score {result['score']:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._reach(trial, self.longest, f"trial {trial.trial_id} ended")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.progress:
            self.progress.message(f"trial {trial.trial_id} failed; the others go on")


def write_result(found: list[SweepResult], params: Params, name: str, out: Path) -> None:
    """``trials.csv``, ``criteria.csv`` and ``best.yaml`` in ``out``."""
    from ruamel.yaml import YAML

    sweep = params.sweeps[name]
    out.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(key for one in found for trial in one.trials for key in trial.values))
    scores = list(dict.fromkeys(key for one in found for trial in one.trials for key in trial.scores))
    with (out / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["sweep", "state", "epochs_done", *fields, *scores])
        for one in found:
            for trial in one.trials:
                values = [trial.values.get(key, "") for key in fields]
                table.writerow(
                    [one.name, trial.state, trial.epochs, *values, *(trial.scores.get(k, "") for k in scores)]
                )
    with (out / "criteria.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["sweep", "criterion", "spearman", "regret"])
        for one in found:
            for row in one.ranked():
                table.writerow([one.name, row["criterion"], f"{row['spearman']:.3f}", f"{row['regret']:.2f}"])
    block = params_block(sweep.method)
    base = params.methods[block][sweep.dataset]
    best = {one.name: {**base, **one.best.values} for one in found}
    with (out / "best.yaml").open("w", encoding="utf-8") as file:
        file.write(
            f"# Found by `ucir tune {name}` by the criterion {sweep.objective}: look at it, then put the "
            f"block into params.yaml as methods.{block}.{sweep.dataset}\n"
        )
        told = (
            {"methods": {block: {sweep.dataset: best[name]}}} if sweep.scope == "shared" else {"pairs": best}
        )
        YAML().dump(told, file)


def describe_result(one: SweepResult) -> str:
    """For the terminal: the best settings, and how the criteria did."""
    lines = [f"{one.name}: {len(one.finished)} of {len(one.trials)} trials came to the end"]
    for trial in sorted(one.finished, key=lambda t: -t.scores[one.objective])[:5]:
        values = ", ".join(f"{key} {_short(value)}" for key, value in trial.values.items())
        oracle = f"  P@K {trial.scores[ORACLE]:.1f}" if ORACLE in trial.scores else ""
        lines.append(f"  {one.objective} {trial.scores[one.objective]:.4f}{oracle}  {values}")
    if rows := one.ranked():
        lines.append(
            "criterion, Spearman's rho with P@K, regret in points (labels were read for this table alone)"
        )
        lines += [f"  {row['criterion']:<20}{row['spearman']:>6.2f}{row['regret']:>8.2f}" for row in rows]
    return "\n".join(lines)
