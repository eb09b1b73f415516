"""What the gates reject where the label spaces are identical and where they are disjoint.

Takes the encoders of finished closed trainings (`uv run ucir study universal`, then `uv run dvc repro`).
Query: the pictures of half of the classes; gallery: the other domain's of the same half, or of the other
half. A row for the start and for the last epoch, and for UEM's gate with each limit of merging; with the
elbow's clusters and with as many as classes.

`--calibrated`: what the calibrated gate rejects of queries with and without a counterpart, after open
trainings (`uv run ucir study real-universal`): where its limit comes from all queries, of which half have
none, and where it comes from one half of those that have one, and the other half is asked. Then what other
limits without labels reject, learnt from all: the lower one of both directions (a gallery has no strangers if
its queries have), and where the farther one of two normal distributions becomes the likelier.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from tests.benchmarks import REMEDY, argument_parser
from ucir.config.load import Params, load_params
from ucir.errors import UserError, run_main
from ucir.methods.registry import params_block
from ucir.progress import counted
from ucir.prototypes.merging import MergingLimit
from ucir.retrieval.gate import GATES, calibrated_limit, cluster_for_gate, fit_gate, nearest_distances
from ucir.runs.run import PairRun, plan_runs
from ucir.runs.scores import run_features


def rejected(
    params: Params, run: PairRun, weights: str, limit: MergingLimit
) -> dict[tuple[str, str], list[float]]:
    """Percent of the queries by (gallery, clusters), a value for each direction."""
    checkpoint = run.start if weights == "start" else run.folder / "last.pt"
    by_domain, names = run_features(params, run, checkpoint, torch.device("cpu"))
    features = [by_domain[domain] for domain in run.pair]
    labels = [np.array(names[domain]) for domain in run.pair]
    classes = sorted(set(labels[0]))
    half = np.random.default_rng(0).permutation(classes)[: len(classes) // 2]
    shares: dict[tuple[str, str], list[float]] = {}
    rules: dict[str, int | str] = {"elbow": "elbow", "classes": len(half)}
    for query, gallery in ((0, 1), (1, 0)):
        asked = features[query][torch.from_numpy(np.isin(labels[query], half))]
        of_asked = {rule: cluster_for_gate(asked, clusters) for rule, clusters in rules.items()}
        same = torch.from_numpy(np.isin(labels[gallery], half))
        for name, chosen in (("identical", same), ("disjoint", ~same)):
            there = features[gallery][chosen]
            for rule, clusters in rules.items():
                kind = GATES.get(params_block(run.method), "spread")
                gate = fit_gate(
                    kind, asked, there, (of_asked[rule], cluster_for_gate(there, clusters)), limit
                )
                share = (gate.scores(asked, there) > 0).float().mean()
                shares.setdefault((name, rule), []).append(100 * float(share))
    return shares


def mixture_limit(nearest_Q: torch.Tensor) -> float:
    """Where a distance is likelier of the farther one of two normal distributions, fitted to all."""
    values = nearest_Q.numpy()[:, None]
    mixture = GaussianMixture(2, random_state=0).fit(values)
    return float(values[mixture.predict(values) == mixture.means_[:, 0].argmin()].max())


def rejected_by_calibrated(params: Params, run: PairRun) -> list[list[float]]:
    """Percent of shared and private queries for each direction: by limits of all, by one of shared ones."""
    features, names = run_features(params, run, run.folder / "last.pt", torch.device("cpu"))
    rows = []
    for query, gallery in run.directions:
        nearest_Q = nearest_distances(features[query], features[gallery])
        shared_Q = torch.from_numpy(np.isin(names[query], names[gallery]))
        shared = nearest_Q[shared_Q][
            torch.from_numpy(np.random.default_rng(0).permutation(int(shared_Q.sum())))
        ]
        given, asked = shared.tensor_split(2)
        private = nearest_Q[~shared_Q]
        of_all, of_given = calibrated_limit(nearest_Q), calibrated_limit(given)
        lower = min(of_all, calibrated_limit(nearest_distances(features[gallery], features[query])))
        mixture = mixture_limit(nearest_Q)
        asked_of = [(shared, of_all), (private, of_all), (asked, of_given), (private, of_given)]
        asked_of += [(x, limit) for limit in (lower, mixture) for x in (shared, private)]
        rows.append([100 * float((x > limit).float().mean()) for x, limit in asked_of])
    return rows


def show_calibrated(params: Params, dataset: str, methods: list[str]) -> None:
    runs_of = finished(params, dataset, "open", methods)
    limits = ("of all", "of shared", "lower", "mixture")
    columns = [f"{limit}: {queries}" for limit in limits for queries in ("shared", "private")]
    print(f"{'rejected, percent; limit':<24}" + "".join(f"{column:>20}" for column in columns))
    for method, runs in runs_of.items():
        rows = [row for run in runs for row in rejected_by_calibrated(params, run)]
        cells = "".join(f"{cell:>20.1f}" for cell in np.mean(rows, axis=0))
        print(f"{method:<24}{cells}   {counted(len(rows), 'direction')}", flush=True)


def finished(params: Params, dataset: str, setting: str, methods: list[str]) -> dict[str, list[PairRun]]:
    """Finished trainings by method. Raises UserError: of a method there is none."""
    runs_of = {}
    for method in methods:
        runs_of[method] = [run for run in plan_runs(params, dataset, setting, method) if run.done]
        if not runs_of[method]:
            raise UserError(f"{method} on {dataset}, {setting}: no finished training: {REMEDY}")
    return runs_of


def show_own(params: Params, dataset: str, methods: list[str]) -> None:
    runs_of = finished(params, dataset, "closed", methods)
    columns = [(name, rule) for rule in ("elbow", "classes") for name in ("identical", "disjoint")]
    print(f"{'rejected, percent; K by':<24}" + "".join(f"{rule + ', ' + name:>22}" for name, rule in columns))
    for method, runs in runs_of.items():
        limits: list[MergingLimit] = ["domain"]
        if GATES.get(params_block(method)) == "merged":
            limits.append("pair")
        for weights, limit in product(("start", "last"), limits):
            all_found = [rejected(params, run, weights, limit) for run in runs]
            cells = [np.mean([value for shares in all_found for value in shares[c]]) for c in columns]
            row = f"{method}, {weights}, {limit}"
            print(f"{row:<24}" + "".join(f"{cell:>22.1f}" for cell in cells), flush=True)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("dataset", nargs="?", default="digits")
    parser.add_argument("methods", nargs="*", default=["uem", "ucdir", "protoot"])
    parser.add_argument("--calibrated", action="store_true", help="see above")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    show = show_calibrated if given.calibrated else show_own
    show(load_params(), given.dataset, given.methods)


if __name__ == "__main__":
    run_main(main)
