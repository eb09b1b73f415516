"""The bank's share of a training step, and K-means, at 1, 2 and 4 workers: time, memory, bytes that travel.

UCDIR's instance- and cluster-wise contrast of one domain (B = 64, D = 128, K = 65), the write, then forward
and backward, in processes of this machine joined by gloo, one thread each; medians of the steps, of the
slowest worker. K-means: ten iterations from one start, with UCDIR's sample of the rows, and the labels. Bytes
of a step are counted where they are handed to gloo and compared with the formula.
"""

from __future__ import annotations

import os
import resource
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from tests.benchmarks import argument_parser
from ucir.distributed import own_rows
from ucir.errors import run_main
from ucir.losses.cluster import cluster_contrast
from ucir.losses.instance import instance_contrast
from ucir.memory import Bank, Features
from ucir.prototypes.clustering import kmeans

B, D, K, T = 64, 128, 65, 0.2


def formula(world: int) -> int:
    """Bytes that a worker hands over in a step.

    The total over the bank is a maximum and a sum, and a sum again for the gradient: 3 B floats. The images'
    rows of the bank, before and after the keys are written, are 2 B x D.
    """
    return 0 if world == 1 else 4 * (3 * B + 2 * B * D)


def bank_loss(
    bank: Bank,
    q_BD: Tensor,
    k_BD: Tensor,
    slot_B: Tensor,
    label_N: Tensor,
    sum_KD: Tensor,
    size_K: Tensor,
) -> Tensor:
    """UCDIR's contrast of a domain, after the keys are written; ``sum_KD`` follows."""
    own_B = label_N[slot_B]
    sum_KD.index_add_(0, own_B, bank.change(slot_B, k_BD))
    bank.write(slot_B, k_BD)
    others_B = bank.log_total(q_BD, T, without_B=slot_B)
    mean_BD = sum_KD[own_B] / size_K[own_B, None]
    cluster_B = cluster_contrast(q_BD, bank.rows(slot_B), mean_BD, others_B, T)
    return instance_contrast(q_BD, k_BD, others_B, T) + cluster_B.mean()


def counted(sent: list[int], name: str) -> None:
    original: Callable[..., Any] = getattr(dist, name)

    def call(tensor: Tensor, *arguments: Any, **given: Any) -> Any:
        sent[0] += tensor.numel() * tensor.element_size()
        return original(tensor, *arguments, **given)

    setattr(dist, name, call)


def worker(rank: int, world: int, port: int, rows: int, steps: int, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    sent = [0]
    counted(sent, "all_reduce")
    generator = torch.Generator().manual_seed(0)
    rows_here = own_rows(rows)  # drawn where they lie: nobody ever holds all of them
    drawn = torch.randn(rows_here.stop - rows_here.start, D, generator=torch.Generator().manual_seed(rank))
    bank = Bank(Features(F.normalize(drawn, dim=1), rows))
    label_N = torch.randint(K, (rows,), generator=generator)
    sum_KD, size_K = bank.sums(label_N, K), label_N.bincount(minlength=K)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, travelled = [], []
    for _ in range(steps + 1):
        q = F.normalize(torch.randn(B, D, generator=generator), dim=1).requires_grad_(True)
        k = F.normalize(torch.randn(B, D, generator=generator), dim=1)
        slot = torch.randint(rows, (B,), generator=generator)
        sent[0], began = 0, time.perf_counter()
        loss = bank_loss(bank, q, k, slot, label_N, sum_KD, size_K)
        loss.backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - began)
        travelled.append(sent[0])
    extra = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    held = bank.own_ND.numel() * 4
    faiss.omp_set_num_threads(1)
    began = time.perf_counter()
    kmeans(bank, K, iterations=10, restarts=1, seed=0, max_points=2000)
    clustering = time.perf_counter() - began
    torch.save((float(np.median(times[1:])), held, extra * 1024, travelled[-1], clustering), f"{out}/{rank}")
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("rows", nargs="?", type=int, default=1_000_000)
    parser.add_argument("steps", nargs="?", type=int, default=5)
    given = parser.parse_args()
    rows, steps = given.rows, given.steps
    alone: tuple[float, float] | None = None
    for world in (1, 2, 4):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with tempfile.TemporaryDirectory() as out:
            spawn(worker, (world, port, rows, steps, out), nprocs=world)
            figures = [torch.load(f"{out}/{rank}") for rank in range(world)]
        seconds, held, extra, travelled, clustering = (max(values) for values in zip(*figures, strict=True))
        alone = alone or (seconds, clustering)
        print(
            f"{rows} rows, {world} workers: {1000 * seconds:.0f} ms a step ({alone[0] / seconds:.2f} x one's "
            f"speed), K-means {clustering:.1f} s ({alone[1] / clustering:.2f}), "
            f"{held / 2**20:.0f} MiB of rows and {extra / 2**20:.0f} MiB more a worker, "
            f"{travelled} bytes a step and worker, formula {formula(world)}",
            flush=True,
        )


if __name__ == "__main__":
    run_main(main)
