"""What `consensus` is taught, ranked as if it were features: no training, and all pictures are known.

P@K, mean over the directions of a data set's pairs (K-means with seed 0), of what training begins with, of
these features diffused over each domain's graph, and of those brought together cluster by cluster, by the
unbalanced plan and by a balanced one. Needs what `uv run dvc repro evaluate_start` leaves of a study with the
data set, closed.
"""

from __future__ import annotations

import numpy as np
import torch

from tests.benchmarks import argument_parser
from ucir.config.load import load_params
from ucir.errors import UserError, run_main
from ucir.memory import Features
from ucir.methods.consensus import Consensus
from ucir.paths import RESULTS
from ucir.retrieval.evaluation import PRETRAINED, load_features, scored_domains
from ucir.retrieval.metrics import metric_values, precision_name
from ucir.retrieval.ranking import rank
from ucir.runs.run import plan_runs

ROWS = {
    "start": None,
    "diffused": "consensus-no-alignment",
    "and aligned": "consensus",
    "by a balanced plan": "consensus-balanced",
}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("datasets", nargs="*", default=["pacs", "office_caltech"], metavar="DATASET")
    given = parser.parse_args()
    torch.set_num_threads(1)
    params = load_params()
    for dataset in given.datasets:
        kept = RESULTS / dataset / "closed/start" / PRETRAINED / "evaluate"
        for row, method in ROWS.items():
            runs = plan_runs(params, dataset, "closed", method or "consensus", seeds=(0,))
            cutoff, values = params.datasets[dataset].evaluate.cutoffs[0], []
            for run in runs:
                _, labels = scored_domains(dataset, params.datasets[dataset], run.pair, run.spaces)
                start = kept / f"{'-'.join(run.pair)}.npz"
                if not start.exists():
                    raise UserError(
                        f"{start}: not there: `uv run ucir study` with a study of all pairs of {dataset}, "
                        "then `uv run dvc repro evaluate_start`"
                    )
                features = load_features(start)
                first, second = (Features(features[domain]) for domain in run.pair)
                if method:
                    targets = Consensus(run.params, run.seed).targets((first, second))
                    features = dict(zip(run.pair, targets, strict=True))
                for query, gallery in run.directions:
                    ranking = rank(features[query], features[gallery], labels[query], labels[gallery])
                    values.append(metric_values(ranking, (cutoff,))[precision_name(cutoff)])
            print(f"{dataset}, P@{cutoff}, {row:<18} {np.mean(values):5.1f}", flush=True)


if __name__ == "__main__":
    run_main(main)
