"""Loss curves at 1, 2 and 4 workers, side by side.

    uv run python -m tests.benchmarks.workers [data set] [pair] [method ...]

Three epochs of each method (both phases of `uem`) on prepared data (`uv run dvc repro prepare pretrain`), in
processes of this machine joined by gloo. Prints the losses and how far each is from one worker's. Training is
chaotic: the order of a sum in float32 shows in the fourth digit after an epoch. The control is one worker
whose start weights are changed by one part in ten million: more workers should differ no more than it does.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing

from ucir.cluster.launch import new_training
from ucir.cluster.runs import Run, plan_runs
from ucir.config import load_params
from ucir.training.loop import EpochReport, train

WORLDS = {"1 worker": 1, "2 workers": 2, "4 workers": 4, "control": 1}
EPOCHS = 3


class Kept:
    """Keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []

    def load_state(self) -> None:
        return None

    def end_epoch(self, report: EpochReport) -> None:
        self.losses.append({k: v for k, v in report.metrics.items() if k.startswith("train/loss")})

    def wants_state(self) -> bool:
        return False

    def keep(self, state: dict[str, Any]) -> None:
        raise AssertionError("nobody asked")

    def fault(self, details: dict[str, Any]) -> None:
        raise AssertionError(details)


def worker(rank: int, world: int, port: int, run: Run, factor: float, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    kept = Kept()
    training = new_training(run, torch.device("cpu"))
    with torch.no_grad():
        for weight in training.query.parameters():
            weight.mul_(factor)
    train(training, kept)
    if rank == 0:
        torch.save(kept.losses, out)
    if world > 1:
        dist.destroy_process_group()


def curve(run: Run, world: int, factor: float) -> list[dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/losses.pt"
        multiprocessing.spawn(worker, (world, port, run, factor, out), nprocs=world)
        losses: list[dict[str, float]] = torch.load(out)
    return losses


def main() -> None:
    dataset, pair, *methods = sys.argv[1:] or ["digits", "handwritten-printed", "ucdir", "protoot", "uem"]
    for method in methods:
        params = load_params(overrides=[f"methods.{method}.{dataset}.epochs={EPOCHS}"])
        run = plan_runs(params, dataset, "closed", method, (pair,), (0,))[0]
        one: list[float] = []
        for name, world in WORLDS.items():
            losses = [e["train/loss_total"] for e in curve(run, world, 1 + 1e-7 * (name == "control"))]
            one = one or losses
            apart = " ".join(f"{abs(x - y) / abs(y):.1e}" for x, y in zip(losses, one, strict=True))
            told = " ".join(f"{loss:.6f}" for loss in losses)
            print(f"{method} on {pair}, {name:<10} {told}   apart {apart}", flush=True)


if __name__ == "__main__":
    Path("runs").mkdir(exist_ok=True)
    main()
