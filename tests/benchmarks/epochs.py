"""Which epoch, and which method, would a criterion choose? Measured on the active study's finished trainings.

    uv run python -m tests.benchmarks.epochs

For each criterion that sees no labels: Spearman's rho with P@K over the epochs of a training, and what the
epoch that it picks has more than the last one, in points of P@K; means over pairs and seeds, by method. The
last rows are of the epoch that labels would pick. Then the same over the methods of a pair, in their last
epoch: rho, and what the chosen method has less than the best. Labels are read for these tables alone.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from scipy.stats import spearmanr

from ucir.config.load import load_params
from ucir.retrieval.criteria import CRITERIA
from ucir.retrieval.metrics import precision_name
from ucir.runs.run import plan_runs

Figures = dict[str, list[tuple[float, float]]]


def choices(entries: list[dict[str, float]], metric: str) -> dict[str, tuple[float, float]]:
    """Rho with the metric over these entries of histories, and the metric of the chosen one, by criterion."""
    truth = np.array([entry[metric] for entry in entries])
    found = {"labels": (1.0, float(truth.max()))}
    for name in CRITERIA:
        values = np.array([entry[f"quality/{name}"] for entry in entries])
        rho = float(spearmanr(values, truth).statistic) if np.ptp(values) and np.ptp(truth) else 0.0
        found[name] = (rho, float(truth[values.argmax()]))
    return found


def main() -> None:
    params = load_params()
    names = [*CRITERIA, "labels"]
    by_method: dict[str, Figures] = {}
    by_pair: dict[str, list[dict[str, float]]] = defaultdict(list)
    for part in params.study.runs.values():
        metric = f"val/{precision_name(params.datasets[part.dataset].evaluate.cutoffs[0])}"
        for run in plan_runs(params, part.dataset, part.setting, part.method, part.pairs):
            if run.done and metric in run.history()[-1]:
                last = run.history()[-1]
                figures = by_method.setdefault(f"{part.dataset} {part.method}", defaultdict(list))
                for name, (rho, chosen) in choices(run.history(), metric).items():
                    figures[name].append((rho, chosen - last[metric]))
                by_pair[f"{part.dataset} {part.setting} {'-'.join(run.pair)} s{run.seed}"].append(
                    {**last, "value": last[metric]}
                )
    print("rho over epochs / points that its epoch has more than the last one")
    show(names, by_method)
    print("\nrho over methods / points that its method has less than the best")
    chosen_methods: dict[str, Figures] = {}
    for pair, entries in by_pair.items():
        if len(entries) > 2:
            found = choices(entries, "value")
            best = found["labels"][1]
            chosen_methods[pair] = {name: [(rho, best - chosen)] for name, (rho, chosen) in found.items()}
    show(names, chosen_methods)


def show(names: list[str], rows: dict[str, Figures]) -> None:
    print(f"{'':<40}" + "".join(f"{name[:13]:>15}" for name in names))
    cells = {row: [np.mean(kept[name], axis=0) for name in names] for row, kept in rows.items()}
    if cells:
        cells["mean"] = list(np.mean(list(cells.values()), axis=0))
    for row, values in cells.items():
        print(f"{row:<40}" + "".join(f"{rho:>8.2f} /{points:>5.1f}" for rho, points in values))


if __name__ == "__main__":
    main()
