"""What the gates reject where the label spaces are identical and where they are disjoint.

Takes the encoders of finished closed trainings (`uv run ucir study universal`, then `uv run dvc repro`).
Query: the pictures of half of the classes; gallery: the other domain's of the same half, or of the other
half. A row for the start and for the last epoch, and for UEM's gate with each limit of merging; with the
elbow's clusters and with as many as classes.
"""

from __future__ import annotations

import argparse
from itertools import product

import numpy as np
import torch

from ucir.config.load import Params, load_params
from ucir.errors import UserError, run_main
from ucir.methods.registry import params_block
from ucir.prototypes.merging import MergingLimit
from ucir.retrieval.evaluation import checkpoint_features, scored_domains
from ucir.retrieval.gate import GATES, cluster_for_gate, fit_gate
from ucir.runs.run import PairRun, plan_runs


def rejected(
    params: Params, run: PairRun, weights: str, limit: MergingLimit
) -> dict[tuple[str, str], list[float]]:
    """Percent of the queries by (gallery, clusters), a value for each direction."""
    block = params.datasets[run.dataset]
    images, names = scored_domains(run.dataset, block, run.pair, run.spaces)
    checkpoint = run.start if weights == "start" else run.folder / "last.pt"
    by_domain = checkpoint_features(checkpoint, block, images, torch.device("cpu"))
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", nargs="?", default="digits")
    parser.add_argument("methods", nargs="*", default=["uem", "ucdir", "protoot"])
    given = parser.parse_args()
    dataset, methods = given.dataset, given.methods
    torch.set_num_threads(1)
    params = load_params()
    columns = [(name, rule) for rule in ("elbow", "classes") for name in ("identical", "disjoint")]
    print(f"{'rejected, percent; K by':<24}" + "".join(f"{rule + ', ' + name:>22}" for name, rule in columns))
    for method in methods:
        runs = [run for run in plan_runs(params, dataset, "closed", method) if run.done]
        if not runs:
            raise UserError(f"{method} on {dataset}, closed: no finished training")
        limits: list[MergingLimit] = ["domain"]
        if GATES.get(params_block(method)) == "merged":
            limits.append("pair")
        for weights, limit in product(("start", "last"), limits):
            all_found = [rejected(params, run, weights, limit) for run in runs]
            cells = [np.mean([value for shares in all_found for value in shares[c]]) for c in columns]
            row = f"{method}, {weights}, {limit}"
            print(f"{row:<24}" + "".join(f"{cell:>22.1f}" for cell in cells), flush=True)


if __name__ == "__main__":
    run_main(main)
