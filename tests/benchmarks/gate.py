"""What the gates reject where the label spaces are identical and where they are disjoint.

    uv run python -m tests.benchmarks.gate [study's data set] [method ...]

Takes the encoders of finished closed trainings (`uv run ucir study universal`, then `uv run dvc repro`).
Query: the pictures of half of the classes; gallery: the other domain's of the same half, or of the other
half. A row for the start and for the last epoch, with the elbow's clusters and with as many as classes.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from ucir.config.load import load_params
from ucir.data.pack import open_domain, read_index
from ucir.methods.registry import params_block
from ucir.models.checkpoints import load_encoder
from ucir.models.encoder import new_encoder
from ucir.models.features import extract_features
from ucir.retrieval.gate import GATES, fit_gate
from ucir.runs.run import PairRun, plan_runs


def rejected(run: PairRun, weights: str) -> dict[tuple[str, str], list[float]]:
    """Percent of the queries by (gallery, clusters), a value for each direction."""
    indices = [read_index(run.pack, domain) for domain in run.pair]
    images = [open_domain(run.pack, d, index) for d, index in zip(run.pair, indices, strict=True)]
    labels = [np.array([picture.label for picture in index]) for index in indices]
    encoder = new_encoder(run.encoder, 0)
    load_encoder(encoder, run.start if weights == "start" else run.folder / "last.pt")
    shared = extract_features(encoder.eval(), (images[0], images[1]), run.view, torch.device("cpu"))
    features = [x.own_ND for x in shared]
    classes = sorted(set(labels[0]))
    half = np.random.default_rng(0).permutation(classes)[: len(classes) // 2]
    shares: dict[tuple[str, str], list[float]] = {}
    for query, gallery in ((0, 1), (1, 0)):
        asked = features[query][torch.from_numpy(np.isin(labels[query], half))]
        same = torch.from_numpy(np.isin(labels[gallery], half))
        for name, chosen in (("identical", same), ("disjoint", ~same)):
            for rule, clusters in (("elbow", "elbow"), ("classes", len(half))):
                there = features[gallery][chosen]
                gate = fit_gate(GATES.get(params_block(run.method), "spread"), asked, there, clusters)
                share = (gate.scores(asked, there) > 0).float().mean()
                shares.setdefault((name, rule), []).append(100 * float(share))
    return shares


def main() -> None:
    torch.set_num_threads(1)
    dataset, *methods = sys.argv[1:] or ["digits", "uem", "ucdir", "protoot"]
    params = load_params()
    columns = [(name, rule) for rule in ("elbow", "classes") for name in ("identical", "disjoint")]
    print(f"{'rejected, percent; K by':<24}" + "".join(f"{rule + ', ' + name:>22}" for name, rule in columns))
    for method in methods:
        runs = [run for run in plan_runs(params, dataset, "closed", method) if run.done]
        for weights in ("start", "last"):
            all_found = [rejected(run, weights) for run in runs]
            cells = [np.mean([value for shares in all_found for value in shares[c]]) for c in columns]
            print(f"{method + ', ' + weights:<24}" + "".join(f"{cell:>22.1f}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
