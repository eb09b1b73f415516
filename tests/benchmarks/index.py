"""Kinds of index on a million features: seconds to build, queries a second, recall against an exact search.

Features are drawn around 2,000 centres, as trained features are: those of noise alone lie in no cells. Both
kinds are what `ucir index` builds. faiss's graph (HNSW) is none: it forgets nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np

from tests.benchmarks import argument_parser
from ucir.errors import run_main
from ucir.retrieval import knn


def features(count: int, dim: int, seed: int) -> Any:
    """Unit vectors around 2,000 common centres, float32."""
    centres = np.random.default_rng(0).standard_normal((2000, dim)).astype(np.float32)
    rng = np.random.default_rng(seed)
    x = centres[rng.integers(0, 2000, count)] + 0.7 * rng.standard_normal((count, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--queries", type=int, default=256)
    arguments = parser.parse_args()
    rows, queries = features(arguments.count, arguments.dim, 1), features(arguments.queries, arguments.dim, 2)
    depth = max(knn.RECALL_DEPTHS)
    true, _ = knn.exact_neighbours(queries, rows, depth)
    print(
        f"{arguments.count} x {arguments.dim}, {arguments.queries} queries, {faiss.omp_get_max_threads()} "
        "threads"
    )
    print(f"{'kind':24}{'build s':>9}{'queries/s':>11}{'recall@10':>11}{'recall@200':>12}")

    def line(name: str, seconds: float, search: Callable[[np.ndarray], np.ndarray]) -> None:
        began = time.perf_counter()
        scores = search(queries)
        pace = len(queries) / (time.perf_counter() - began)
        recall = [knn.recall_at(k, scores, true) for k in (10, 200)]
        print(f"{name:24}{seconds:9.1f}{pace:11.0f}{recall[0]:11.3f}{recall[1]:12.3f}", flush=True)

    line("exact", 0.0, lambda q: knn.exact_neighbours(q, rows, depth)[0])
    began = time.perf_counter()
    inverted: Any = knn.learn_cells(rows, np.arange(len(rows)))
    seconds = time.perf_counter() - began
    for probes in (1, 4, 16, 64):
        inverted.nprobe = probes
        line(f"ivf, {probes} of {inverted.nlist} cells", seconds, lambda q: inverted.search(q, depth)[0])
    probes, _ = knn.fewest_probes(inverted, rows, queries)
    print(
        f"ucir index would look into {probes or 'all'} cells"
        if probes
        else "ucir index would compare with all"
    )
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        faiss.write_index(inverted, f"{folder}/ivf.faiss")
        mapped: Any = faiss.read_index(f"{folder}/ivf.faiss", faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        mapped.nprobe = probes or 16
        line("ivf, memory-mapped", time.perf_counter() - began, lambda q: mapped.search(q, depth)[0])
    began = time.perf_counter()
    inverted.remove_ids(np.arange(0, 1000))
    inverted.add_with_ids(rows[:1000], np.arange(0, 1000))
    print(f"1,000 forgotten and taken up: {time.perf_counter() - began:.2f} s")


if __name__ == "__main__":
    run_main(main)
