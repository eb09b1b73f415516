"""Which epoch, and which method, would a criterion choose? Measured on finished trainings of studies.

For each criterion that sees no labels, and for two ways to join them all (the mean and the least of the
ranks that they give): Spearman's rho with P@K over the epochs of a training, and what the epoch that it picks
has more than the last one, in points of P@K; means over pairs and seeds, by method. Then the same over the
methods of a pair, in their last epoch: rho, and what the chosen method has less than the best, by data set,
with a 90 % interval (bootstrap over pairs and seeds); and what the criterion that is best on all other data
sets loses on each. Where a study has several seeds, their agreement is a criterion of a method, too: the
share of a picture's ten nearest of the other domain that two seeds have in common. Labels are read for
these tables alone.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr

from tests.benchmarks import argument_parser
from ucir.config.load import Params, load_params
from ucir.errors import UserError, run_main
from ucir.retrieval.criteria import CRITERIA
from ucir.retrieval.metrics import precision_name
from ucir.retrieval.ranking import top_ranked
from ucir.runs.run import PairRun, plan_runs
from ucir.runs.scores import run_features
from ucir.runs.study import study_runs

JOINED: dict[str, Any] = {"mean rank": np.mean, "worst rank": np.min}
AGREEMENT = "seeds agree"
NAMES = [*CRITERIA, *JOINED, AGREEMENT]
NEAREST = 10
LABELS = "labels"
RESAMPLES = 2000

Figures = dict[str, list[tuple[float, float]]]


def choices(entries: list[dict[str, float]], metric: str) -> dict[str, tuple[float, float]]:
    """Rho with the metric over these entries of histories, and the metric of the chosen one, by criterion."""
    truth = np.array([entry[metric] for entry in entries])
    scores = {name: np.array([entry[f"quality/{name}"] for entry in entries]) for name in CRITERIA}
    ranks = np.stack([rankdata(values) for values in scores.values()])
    scores |= {name: join(ranks, axis=0) for name, join in JOINED.items()}
    if all(AGREEMENT in entry for entry in entries):
        scores[AGREEMENT] = np.array([entry[AGREEMENT] for entry in entries])
    found = {LABELS: (1.0, float(truth.max()))}
    for name, values in scores.items():
        rho = float(spearmanr(values, truth).statistic) if np.ptp(values) and np.ptp(truth) else 0.0
        found[name] = (rho, float(truth[values.argmax()]))
    return found


def agreement(params: Params, runs: list[PairRun]) -> float:
    """Of trainings that differ in their seeds, mean over both directions and all two of them."""
    neighbours = []
    for run in runs:
        features, _ = run_features(params, run, run.folder / "last.pt", torch.device("cpu"))
        first, second = (features[domain] for domain in run.pair)
        neighbours.append([top_ranked(q, g, NEAREST) for q, g in ((first, second), (second, first))])
    common = [
        (a[:, :, None] == b[:, None, :]).any(axis=2).mean()
        for one, other in combinations(neighbours, 2)
        for a, b in zip(one, other, strict=True)
    ]
    return float(np.mean(common))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="default: the active one")
    parser.add_argument("--methods", nargs="+", help="default: all of the studies")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of each study")
    given = parser.parse_args()
    params = load_params()
    by_method: dict[str, Figures] = {}
    by_pair: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    seeds_of: dict[tuple[str, ...], list[tuple[PairRun, dict[str, float]]]] = defaultdict(list)
    for study in given.studies or [params.study.name]:
        for _, part in study_runs(params, study):
            if given.methods and part["method"] not in given.methods:
                continue
            dataset, seeds = part["dataset"], given.seeds or params.studies[study].seeds
            metric = f"val/{precision_name(params.datasets[dataset].evaluate.cutoffs[0])}"
            pairs = part.get("pairs")
            for run in plan_runs(params, dataset, part["setting"], part["method"], pairs, seeds):
                if run.done and metric in run.history()[-1]:
                    last = run.history()[-1]
                    figures = by_method.setdefault(f"{dataset} {part['method']}", defaultdict(list))
                    for name, (rho, chosen) in choices(run.history(), metric).items():
                        figures[name].append((rho, chosen - last[metric]))
                    pair = f"{part['setting']} {'-'.join(run.pair)} s{run.seed}"
                    entry = {**last, "value": last[metric]}
                    by_pair[dataset, pair].append(entry)
                    seeds_of[dataset, run.method, run.setting, *run.pair].append((run, entry))
    if not by_method:
        raise UserError("no training of these studies is finished: `uv run dvc repro` makes them")
    for of_seeds in seeds_of.values():
        if len(of_seeds) > 1:
            agreed = agreement(params, [run for run, _ in of_seeds])
            for _, entry in of_seeds:
                entry[AGREEMENT] = agreed
    print("rho over epochs / points that its epoch has more than the last one")
    show({row: {n: mean(values) for n, values in kept.items()} for row, kept in by_method.items()})

    chosen_methods: dict[str, Figures] = defaultdict(lambda: defaultdict(list))
    for (dataset, _), entries in by_pair.items():
        if len(entries) > 2:
            found = choices(entries, "value")
            best = found[LABELS][1]
            for name in [name for name in NAMES if name in found]:
                chosen_methods[dataset][name].append((found[name][0], best - found[name][1]))
    print("\nrho over methods / points that its method has less than the best, and their 90 % interval")
    lost = {d: {n: mean(values) for n, values in kept.items()} for d, kept in chosen_methods.items()}
    show(lost)
    for dataset, kept in chosen_methods.items():
        print(
            f"{dataset + ', interval':<24}" + "".join(f"{interval(values):>14}" for values in kept.values())
        )
    for dataset in lost:
        others = [figures for other, figures in lost.items() if other != dataset]
        if others:
            names = [name for name in lost[dataset] if all(name in figures for figures in others)]
            picked = min(names, key=lambda name: float(np.mean([figures[name][1] for figures in others])))
            print(f"{dataset}: {picked}, the best elsewhere, loses {lost[dataset][picked][1]:.1f} points")


def mean(values: list[tuple[float, float]]) -> tuple[float, float]:
    rho, points = np.mean(values, axis=0)
    return float(rho), float(points)


def interval(values: list[tuple[float, float]]) -> str:
    points = np.array([value for _, value in values])
    drawn = np.random.default_rng(0).integers(len(points), size=(RESAMPLES, len(points)))
    low, high = np.quantile(points[drawn].mean(axis=1), (0.05, 0.95))
    return f"{low:.1f} to {high:.1f}"


def show(rows: dict[str, dict[str, tuple[float, float]]]) -> None:
    names = list(next(iter(rows.values()), {}))
    print(f"{'':<24}" + "".join(f"{name[:13]:>14}" for name in names))
    cells = rows | ({"mean": {n: mean([row[n] for row in rows.values()]) for n in names}} if rows else {})
    for row, values in cells.items():
        print(f"{row:<24}" + "".join(f"{rho:>7.2f} /{points:>5.1f}" for rho, points in values.values()))


if __name__ == "__main__":
    run_main(main)
