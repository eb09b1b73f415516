"""What a limit of search rejects: the widest of both domains', and that of the domain a query is taken for.

Takes the heads of finished trainings (`uv run ucir study pacs`, then `uv run dvc repro`) and strangers: all
pictures of one domain of another data set, none of whose classes the first one has. For each training and
either domain as the gallery, limits are learnt from 1,000 pictures of each domain, or half of them; then the
others are asked without saying which domain they are of: the other domain's (the wrong rejections that 5 %
are wanted of), the gallery's own, and the strangers.

    uv run python -m tests.benchmarks.limits pacs closed consensus office_caltech amazon
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.benchmarks import REMEDY, argument_parser
from ucir.config.load import load_params
from ucir.data.feature_pack import open_features
from ucir.data.pack import read_index
from ucir.errors import UserError, run_main
from ucir.models.head import ResidualHead
from ucir.models.model import load_model
from ucir.paths import FEATURES, PACKS
from ucir.retrieval.gate import calibrated_limit
from ucir.runs.run import plan_runs

LEARNT_FROM = 1000
ITSELF = 1e-5
"""A distance below which a picture of the gallery has found itself."""


def pooled_features(dataset: str, domain: str) -> Tensor:
    """Unit features of a frozen trunk, (N, P)."""
    stored = open_features(FEATURES / dataset, domain, read_index(PACKS / dataset, domain))
    return normalize(torch.from_numpy(stored.plain_MP[stored.row_N]).float(), dim=1)


@torch.no_grad()
def rejected(head: ResidualHead, domains: list[Tensor], strangers: Tensor, gallery: int) -> list[float]:
    """Percent of the other domain's queries, of the gallery's, and of strangers: by the widest limit, by that
    of the domain they are taken for."""
    there = normalize(head(domains[gallery], torch.full((len(domains[gallery]),), gallery)), dim=1)

    def nearest(pooled: Tensor, domain: int | None, own: bool) -> Tensor:
        known = None if domain is None else torch.full((len(pooled),), domain)
        distance = 1 - normalize(head(pooled, known), dim=1) @ there.T
        return (
            torch.where(distance < ITSELF, torch.inf, distance).amin(dim=1) if own else distance.amin(dim=1)
        )

    limits, asked = [], []
    generator = torch.Generator().manual_seed(0)
    for domain, pooled in enumerate(domains):
        order = torch.randperm(len(pooled), generator=generator)
        cut = min(LEARNT_FROM, len(pooled) // 2)
        limits.append(calibrated_limit(nearest(pooled[order[:cut]], domain, domain == gallery)))
        asked.append(pooled[order[cut:]])
    by_domain = torch.tensor(limits)
    shares = []
    for queries, own in ((asked[1 - gallery], False), (asked[gallery], True), (strangers, False)):
        distance = nearest(queries, None, own)
        for limit in (by_domain.max(), by_domain[head.nearest_domain(queries)]):
            shares.append(100 * float((distance > limit).float().mean()))
    return shares


def main() -> None:
    parser = argument_parser(__doc__)
    for name in ("dataset", "setting", "method", "strangers", "domain"):
        parser.add_argument(name)
    given = parser.parse_args()
    params = load_params()
    strangers = pooled_features(given.strangers, given.domain)
    rows = []
    print("gallery, then percent rejected by the widest limit / by that of the domain a query is taken for")
    for run in plan_runs(params, given.dataset, given.setting, given.method):
        if not run.done:
            raise UserError(f"{run.name}: {REMEDY}")
        order = [domain for domain, _ in run.trained]
        head = load_model(run.folder / "last.pt").encoder.head
        if not isinstance(head, ResidualHead):
            raise UserError(f"{run.name}: a moco head, which has no centres to tell domains by")
        domains = [pooled_features(run.dataset, domain) for domain in order]
        for gallery, domain in enumerate(order):
            shares = rejected(head, domains, strangers, gallery)
            rows.append(shares)
            told = [f"{a:.1f} / {b:.1f}" for a, b in zip(shares[::2], shares[1::2], strict=True)]
            print(f"{run.name}, {domain}: other domain {told[0]}, its own {told[1]}, strangers {told[2]}")
    mean = np.mean(rows, axis=0)
    print("mean: " + ", ".join(f"{a:.1f} / {b:.1f}" for a, b in zip(mean[::2], mean[1::2], strict=True)))


if __name__ == "__main__":
    run_main(main)
