"""How time and memory of an epoch grow with the pictures of a domain, and with K.

Of UCDIR on one thread, what does not grow like the network's own work, N: the losses against the bank (N / 64
steps of B = 64 over N rows), K-means exactly and by its two shorter ways, the ranking of all pictures by all
(of 512 queries, scaled). Seconds of an epoch, peak MiB beside the features, and the exponent x of N^x (K^x)
from a line through the logarithms of the four largest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from torch.nn import functional as F

from tests.benchmarks import argument_parser
from tests.benchmarks.arms import timed
from tests.benchmarks.bank import B, D, K, bank_loss
from ucir.errors import run_main
from ucir.memory import Bank
from ucir.methods.base import SETTLED
from ucir.prototypes.clustering import cluster_means, kmeans
from ucir.retrieval.ranking import rank

QUERIES = 512


def parts(count: int, clusters: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """What an epoch consists of, and how often each is done in it."""
    generator = torch.Generator().manual_seed(0)
    centre_KD = F.normalize(torch.randn(2 * clusters, D, generator=generator), dim=1)
    x = centre_KD[torch.randint(2 * clusters, (count,), generator=generator)]
    x = F.normalize(x.add_(0.08 * torch.randn(count, D, generator=generator)), dim=1)
    options: dict[str, Any] = {"iterations": 20, "restarts": 5, "seed": 0, "max_points": 2000}
    label_N = kmeans(x, clusters, **{**options, "restarts": 1}).label_N
    bank, names = Bank(x), label_N.numpy()
    sum_KD, size_K = bank.sums(label_N, clusters), label_N.bincount(minlength=clusters)
    slot_B = torch.randperm(count, generator=generator)[:B]
    q, k = (F.normalize(torch.randn(B, D, generator=generator), dim=1) for _ in "qk")
    q.requires_grad_(True)
    warm: dict[str, Any] = {"initial_KD": cluster_means(x, label_N, clusters), "settled": SETTLED}
    return {
        "losses": (
            lambda: bank_loss(bank, q, k, slot_B, label_N, sum_KD, size_K).backward(),  # type: ignore[no-untyped-call]
            count / B,
        ),
        "K-means": (lambda: kmeans(x, clusters, **options), 1),
        "its sample": (lambda: kmeans(x, clusters, **options, sample=128, settled=SETTLED), 1),
        "warm": (lambda: kmeans(x, clusters, **options, **warm), 1),
        "ranking": (lambda: rank(x[:QUERIES], x, names[:QUERIES], names), count / QUERIES),
    }


def measured(count: int, clusters: int) -> dict[str, tuple[float, float]]:
    """Seconds of an epoch and peak MiB of each part."""
    figures = {}
    for name, (work, times) in parts(count, clusters).items():
        if count < 100_000:
            work()
        seconds, extra = timed(work)
        figures[name] = (seconds * times, extra)
    return figures


def table(what: str, sizes: list[int], rows: list[dict[str, tuple[float, float]]]) -> None:
    print(f"\n{what:>9}" + "".join(f"{name:>22}" for name in rows[0]))
    for size, row in zip(sizes, rows, strict=True):
        cells = (f"{seconds:.3g} s, {extra:.0f} MiB" for seconds, extra in row.values())
        print(f"{size:>9}" + "".join(f"{cell:>22}" for cell in cells))
    last = slice(-4, None)
    exponents = (
        np.polyfit(np.log(sizes[last]), np.log([row[name][0] for row in rows[last]]), 1)[0]
        for name in rows[0]
    )
    print(f"{'exponent':>9}" + "".join(f"{x:>22.2f}" for x in exponents))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("most", nargs="?", type=int, default=1_000_000, help="largest N")
    most = parser.parse_args().most
    if most < 4_000:
        parser.error("a line needs two sizes: give 4000 or more")
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    sizes = [size for size in (1_000, 4_000, 16_000, 64_000, 256_000, 1_000_000) if size <= most]
    table(f"N, K {K}", sizes, [measured(size, K) for size in sizes])
    clusters = [k for k in (16, 65, 256, 1024) if k < most]
    table("K, N 64k", clusters, [measured(min(most, 64_000), k) for k in clusters])


if __name__ == "__main__":
    run_main(main)
