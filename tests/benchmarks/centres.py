"""What a query of an unknown domain is centred by: measured on the finished trainings of the study `pacs`.

`uv run python -m tests.benchmarks.centres protoot`, after `uv run ucir train --dataset pacs --method protoot
--seed 0`: mean P@50 over the directions, the gallery centred by its own domain, the queries by four rules.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.benchmarks import argument_parser
from ucir.config.load import load_params
from ucir.data.feature_pack import DomainFeatures
from ucir.errors import UserError, run_main
from ucir.models.head import ResidualHead
from ucir.models.model import load_model
from ucir.retrieval.metrics import metric_values
from ucir.retrieval.ranking import rank
from ucir.runs.run import PairRun, plan_runs

CUTOFF = 50


@torch.no_grad()
def queries(head: ResidualHead, pooled_NP: Tensor, domain: int) -> dict[str, Tensor]:
    """Unit features of a domain's pictures by each rule."""
    known_N = torch.full((len(pooled_NP),), domain)
    out = {"its own": head(pooled_NP, known_N), "the nearest": head(pooled_NP)}
    centre_2P = head.centre_2P.clone()
    for rule, centre in (("the mean of both", centre_2P.mean(dim=0)), ("none", torch.zeros(1))):
        head.centre_2P.copy_(centre.expand_as(centre_2P))
        out[rule] = head(pooled_NP, known_N)
    head.centre_2P.copy_(centre_2P)
    return {rule: normalize(x, dim=1) for rule, x in out.items()}


def scores(run: PairRun) -> list[dict[str, float]]:
    """P@50 by rule, in both directions."""
    head = load_model(run.folder / "last.pt").encoder.head.eval()
    labels = [[picture.label for picture in index] for _, index in run.trained]
    features = []
    for number, images in enumerate(run.images()):
        assert isinstance(images, DomainFeatures)
        features.append(queries(head, torch.from_numpy(images.plain_MP[images.row_N]).float(), number))
    out = []
    for q, g in ((0, 1), (1, 0)):
        gallery = features[g]["its own"]
        ranked = {rule: rank(x, gallery, labels[q], labels[g]) for rule, x in features[q].items()}
        out.append({rule: metric_values(r, (CUTOFF,))[f"P_at_{CUTOFF}"] for rule, r in ranked.items()})
    return out


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("method", nargs="?", default="protoot")
    method = parser.parse_args().method
    runs = [run for run in plan_runs(load_params(), "pacs", "closed", method, None, (0,)) if run.done]
    if not runs:
        raise UserError(f"{method} on pacs, closed: no finished training of seed 0")
    rows = [row for run in runs for row in scores(run)]
    print(f"{method}, {len(rows)} directions, P@{CUTOFF} with queries centred by")
    for rule in rows[0]:
        print(f"  {rule:<18}{np.mean([row[rule] for row in rows]):.1f}")


if __name__ == "__main__":
    run_main(main)
