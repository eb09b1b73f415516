"""Sweeps: what is searched, the candidates that were tried, and what was found.

A candidate is one drawing of a sweep's values; a trial runs it, see :mod:`ucir.cluster.tune`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ucir.config.base import PARAMS_FILE, checked
from ucir.config.load import Params
from ucir.config.sweep import Dimension, SweepParams
from ucir.data.pack import read_index
from ucir.errors import UserError, nearest
from ucir.methods.registry import fixed_keys, params_block
from ucir.progress import counted
from ucir.retrieval.criteria import CRITERIA
from ucir.retrieval.metrics import precision_name
from ucir.runs.params import method_params
from ucir.runs.run import PairRun, plan_runs

ORACLE = "oracle"


@dataclass(frozen=True)
class Trial:
    """A candidate that was tried."""

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
    objective: tuple[str, ...]
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
            states = "; ".join(dict.fromkeys(trial.state for trial in self.trials))
            raise UserError(f"sweep {self.name}: no trial came to its end: {states}")
        return max(self.finished, key=lambda trial: score(trial.scores, self.objective))

    def ranked(self) -> list[dict[str, Any]]:
        """How well each criterion ranks the finished candidates: Spearman's rho with the oracle, and regret.

        Regret is what the criterion's choice has less than the oracle's, in points of P@K. Empty without
        labels or with fewer than three candidates.
        """
        trials = [trial for trial in self.finished if ORACLE in trial.scores]
        if len(trials) < 3:
            return []
        truth = [trial.scores[ORACLE] for trial in trials]
        judged = {name: [trial.scores[name] for trial in trials] for name in CRITERIA}
        judged["loss"] = [-trial.scores["loss"] for trial in trials]
        if len(self.objective) > 1:
            judged["objective"] = [score(trial.scores, self.objective) for trial in trials]
        rows = []
        for name, values in judged.items():
            rho = float(spearmanr(values, truth).statistic) if len(set(values)) > 1 < len(set(truth)) else 0.0
            regret = max(truth) - truth[int(np.argmax(values))]
            rows.append({"criterion": name, "spearman": rho, "regret": regret})
        return sorted(rows, key=lambda row: -row["spearman"])


def score(scores: Mapping[str, float], criteria: Sequence[str]) -> float:
    """What a trial is judged by: one criterion as it is, of several the product, each at least 0.

    A product, as each is high where another kind of collapse is and near 0 where it finds one.
    """
    if len(criteria) == 1:
        return scores[criteria[0]]
    return math.prod(max(scores[name], 0.0) for name in criteria)


def joined(criteria: Sequence[str]) -> str:
    """An objective's name."""
    return " x ".join(criteria)


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
    for criterion in sweep.objective:
        if criterion not in known:
            raise UserError(f"{where}.objective: {criterion!r} is unknown; {nearest(criterion, known)}")
    prefix = f"methods.{params_block(sweep.method)}.{sweep.dataset}."
    runs = plan_candidate(params, sweep, {})
    domains = dict.fromkeys(domain for run in runs for domain in run.pair)
    for domain in domains if ORACLE in sweep.objective else ():
        if not any(picture.label for picture in read_index(runs[0].pack, domain)):
            raise UserError(f"{where}.objective: oracle: {domain} has no labels; take another")
    space: dict[str, Dimension] = {}
    fixed = fixed_keys(sweep.method)
    for key, dimension in sweep.space.items():
        field = key.removeprefix(prefix)
        if "." in field:
            raise UserError(
                f"{where}.space: {key}: a sweep searches what its trainings are given: keys under "
                f"{prefix.removesuffix('.')}; packs and start weights are made before them"
            )
        if field not in type(base).model_fields:
            raise UserError(f"{where}.space: {key} is unknown; {nearest(field, type(base).model_fields)}")
        if field in fixed:
            raise UserError(f"{where}.space: {key}: {sweep.method} has {field} {fixed[field]} for good")
        if field in space:
            raise UserError(f"{where}.space: {key} stands there twice, by its short and its whole name")
        space[field] = dimension
        for value in dimension.ends:
            try:
                plan_candidate(params, sweep, {field: value})
            except UserError as error:
                raise UserError(f"{where}.space: {key}: {error}") from None
    return sweep, space


def plan_candidate(
    params: Params, sweep: SweepParams, values: Mapping[str, Any], pairs: tuple[str, ...] | None = None
) -> list[PairRun]:
    """The runs of one candidate. Raises as :func:`ucir.runs.run.plan_runs`."""
    raw = params.model_dump()
    shortened = {} if sweep.epochs is None else {"epochs": sweep.epochs}
    raw["methods"][params_block(sweep.method)][sweep.dataset].update({**shortened, **values})
    changed = checked(Params, raw, PARAMS_FILE)
    return plan_runs(changed, sweep.dataset, sweep.setting, sweep.method, pairs or sweep.pairs, sweep.seeds)


def describe_sweep(params: Params, name: str) -> str:
    """What a sweep will do. Raises as :func:`check_sweep`."""
    return described(params, name, *check_sweep(params, name))


def described(params: Params, name: str, sweep: SweepParams, space: Mapping[str, Dimension]) -> str:
    pairs = sweep.pairs or params.datasets[sweep.dataset].pairs
    trainings = len(plan_candidate(params, sweep, {}))
    times = f" for each of {len(pairs)} pairs" if sweep.scope == "per_pair" else ""
    return (
        f"sweep {name}: {sweep.method} on {sweep.dataset}, {sweep.candidates} candidates of "
        f"{', '.join(space)}{times} ({sweep.search}, {sweep.scheduler}), "
        f"{counted(trainings, 'training')} each, judged by {joined(sweep.objective)}"
    )


def epoch_scores(runs: Sequence[PairRun], entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over the runs of one epoch's criteria, oracle and loss."""
    named = {
        **{name: f"quality/{name}" for name in CRITERIA},
        ORACLE: f"val/{precision_name(runs[0].cutoffs[0])}",
        "loss": "train/loss_total",
    }
    return {
        name: float(np.mean([entry[metric] for entry in entries]))
        for name, metric in named.items()
        if all(metric in entry for entry in entries)
    }


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_result(results: list[SweepResult], params: Params, name: str, out: Path) -> None:
    """``trials.csv``, ``criteria.csv`` and ``best.yaml`` in ``out``."""
    from ruamel.yaml import YAML

    sweep = params.sweeps[name]
    out.mkdir(parents=True, exist_ok=True)
    fields = list(dict.fromkeys(key for result in results for trial in result.trials for key in trial.values))
    scores = list(dict.fromkeys(key for result in results for trial in result.trials for key in trial.scores))
    with (out / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["sweep", "state", "epochs_done", *fields, *scores])
        for result in results:
            for trial in result.trials:
                values = [trial.values.get(key, "") for key in fields]
                table.writerow(
                    [
                        result.name,
                        trial.state,
                        trial.epochs,
                        *values,
                        *(trial.scores.get(k, "") for k in scores),
                    ]
                )
    with (out / "criteria.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["sweep", "criterion", "spearman", "regret"])
        for result in results:
            for row in result.ranked():
                table.writerow(
                    [result.name, row["criterion"], f"{row['spearman']:.3f}", f"{row['regret']:.2f}"]
                )
    block = params_block(sweep.method)
    base = params.methods[block][sweep.dataset]
    best = {result.name: {**base, **result.best.values} for result in results}
    with (out / "best.yaml").open("w", encoding="utf-8") as file:
        file.write(
            f"# Found by `ucir tune {name}` by {joined(sweep.objective)}: look at it, then put the "
            f"block into params.yaml as methods.{block}.{sweep.dataset}\n"
        )
        blocks = (
            {"methods": {block: {sweep.dataset: best[name]}}} if sweep.scope == "shared" else {"pairs": best}
        )
        YAML().dump(blocks, file)


def describe_result(one: SweepResult) -> str:
    """For the terminal: the best candidates, and how the criteria did."""
    lines = [f"{one.name}: {len(one.finished)} of {len(one.trials)} trials came to the end"]
    for trial in sorted(one.finished, key=lambda t: -score(t.scores, one.objective))[:5]:
        values = ", ".join(f"{key} {short(value)}" for key, value in trial.values.items())
        oracle = f"  P@K {trial.scores[ORACLE]:.1f}" if ORACLE in trial.scores else ""
        lines.append(f"  objective {score(trial.scores, one.objective):.4f}{oracle}  {values}")
    if rows := one.ranked():
        lines.append(
            "criterion, Spearman's rho with P@K, regret in points (labels were read for this table alone)"
        )
        lines += [f"  {row['criterion']:<20}{row['spearman']:>6.2f}{row['regret']:>8.2f}" for row in rows]
    return "\n".join(lines)
