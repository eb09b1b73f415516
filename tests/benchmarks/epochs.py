"""Which epoch would a criterion choose? Measured on the finished trainings of the active study.

    uv run python -m tests.benchmarks.epochs

For each criterion that sees no labels: Spearman's rho with P@K over the epochs of a training, and what the
epoch that it picks has more than the last one, in points of P@K; means over pairs and seeds, by method. The
last rows are of the epoch that labels would pick. Labels are read for this table alone.
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


def figures(history: list[dict[str, float]], metric: str) -> dict[str, tuple[float, float]]:
    """Rho, and the gain on the last epoch, by criterion."""
    truth = np.array([entry[metric] for entry in history])
    found = {"labels": (1.0, float(truth.max() - truth[-1]))}
    for name in CRITERIA:
        values = np.array([entry[f"quality/{name}"] for entry in history])
        rho = float(spearmanr(values, truth).statistic) if np.ptp(values) and np.ptp(truth) else 0.0
        found[name] = (rho, float(truth[values.argmax()] - truth[-1]))
    return found


def main() -> None:
    params = load_params()
    by_method: dict[str, Figures] = {}
    for part in params.study.runs.values():
        metric = f"val/{precision_name(params.datasets[part.dataset].evaluate.cutoffs[0])}"
        kept: Figures = defaultdict(list)
        for run in plan_runs(params, part.dataset, part.setting, part.method, part.pairs):
            if run.done and metric in run.history()[-1]:
                for name, pair in figures(run.history(), metric).items():
                    kept[name].append(pair)
        if kept:
            by_method[f"{part.dataset} {part.method} ({len(kept['labels'])})"] = kept
    names = [*CRITERIA, "labels"]
    print("rho over epochs / points that its epoch has more than the last one")
    print(f"{'':<32}" + "".join(f"{name[:13]:>15}" for name in names))
    for method, kept in by_method.items():
        cells = [np.mean(kept[name], axis=0) for name in names]
        print(f"{method:<32}" + "".join(f"{rho:>8.2f} /{gain:>5.1f}" for rho, gain in cells))
    every = [np.mean([np.mean(kept[name], axis=0) for kept in by_method.values()], axis=0) for name in names]
    print(f"{'mean':<32}" + "".join(f"{rho:>8.2f} /{gain:>5.1f}" for rho, gain in every))


if __name__ == "__main__":
    main()
