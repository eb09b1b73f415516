"""Loss curves at 1, 2 and 4 workers, side by side.

Three epochs of each method (both phases of `uem`) on prepared data (`uv run dvc repro prepare pretrain`), in
processes of this machine joined by gloo; --set changes the methods' blocks. Prints the losses and how far
each is from one worker's. Training may be chaotic: in UCDIR's second epoch on the sample, at a rate of 0.05,
what differs in float64's last digit differs in the third 20 steps later. So in float32 there is a control,
one worker whose start weights are changed by one part in ten million: more workers should differ no more than
it does. In float64 the curves should be equal as long as rounding has not grown up.
"""

from __future__ import annotations

import os
import socket
import tempfile
from typing import Any

import torch
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

from tests.benchmarks import argument_parser
from ucir.config.load import load_params
from ucir.errors import run_main
from ucir.runs.run import PairRun, plan_runs
from ucir.training.epochs import EpochReport, train

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


def worker(rank: int, world: int, port: int, run: PairRun, factor: float, double: bool, out: str) -> None:
    torch.set_num_threads(1)
    if double:  # the program knows float32 alone, and says so in these two ways
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign,assignment]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    kept = Kept()
    training = run.new_training(torch.device("cpu"))
    with torch.no_grad():
        for weight in training.query.parameters():
            weight.mul_(factor)
    train(training, kept)
    if rank == 0:
        torch.save(kept.losses, out)
    if world > 1:
        dist.destroy_process_group()


def curve(run: PairRun, world: int, factor: float, double: bool) -> list[dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/losses.pt"
        spawn(worker, (world, port, run, factor, double, out), nprocs=world)
        losses: list[dict[str, float]] = torch.load(out)
    return losses


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("kind", nargs="?", choices=["float32", "float64"], default="float32")
    parser.add_argument("dataset", nargs="?", default="digits")
    parser.add_argument("pair", nargs="?", default="handwritten-printed")
    parser.add_argument("methods", nargs="*", default=["ucdir", "protoot", "uem"])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the methods' blocks")
    given = parser.parse_args()
    kind, dataset, pair = given.kind, given.dataset, given.pair
    changes = [f"epochs={EPOCHS}", *given.set]
    for method in given.methods:
        params = load_params(overrides=[f"methods.{method}.{dataset}.{change}" for change in changes])
        run = plan_runs(params, dataset, "closed", method, (pair,), (0,))[0]
        one: list[float] = []
        for name, world in WORLDS.items():
            if kind == "float64" and name == "control":
                continue
            losses_E = curve(run, world, 1 + 1e-7 * (name == "control"), kind == "float64")
            losses = [epoch["train/loss_total"] for epoch in losses_E]
            one = one or losses
            apart = " ".join(f"{abs(x - y) / abs(y):.1e}" for x, y in zip(losses, one, strict=True))
            line = " ".join(f"{loss:.6f}" for loss in losses)
            print(f"{method} on {pair}, {kind}, {name:<10} {line}   apart {apart}", flush=True)


if __name__ == "__main__":
    run_main(main)
