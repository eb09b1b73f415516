"""Streaming transport against the dense plan: `uv run python -m tests.benchmarks.transport [--largest N]`.

Both arms do the optimal transport of one ProtoOT step with all terms: both domains' banks to their own
prototypes, which are renewed, then each bank to the other's. The dense arm is the release's way: the whole
plan, N x K, exponentiated and normalised in place, four times a step. Ours is
:mod:`ucir.prototypes.transport`.

Arms alternate on one thread; memory is measured in a process of its own for each arm, as the growth of its
peak over what the banks take.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks import argument_parser
from ucir.errors import run_main
from ucir.prototypes.transport import plan_rows, potential, transport

DIM = 128
BATCH = 64
REGULARISATION = 0.05
ITERATIONS = 3


class Dense:
    """The release's ``ProtoOT``, line by line: the plan as a matrix."""

    @staticmethod
    def plan(x_ND: Tensor, prototype_KD: Tensor, marginal_K: Tensor) -> Tensor:
        """(N, K), rows of sum 1."""
        q_KN = torch.exp(F.normalize(x_ND @ prototype_KD.T, dim=1) / REGULARISATION).T
        q_KN = q_KN / q_KN.sum()
        count = q_KN.shape[1]
        for _ in range(ITERATIONS):
            q_KN /= q_KN.sum(dim=1, keepdim=True)
            q_KN *= marginal_K[:, None]
            q_KN /= q_KN.sum(dim=0, keepdim=True)
            q_KN /= count
        q_KN *= count
        return q_KN.T

    @classmethod
    def match(cls, x_ND: Tensor, prototype_KD: Tensor, marginal_K: Tensor, slot_B: Tensor) -> Tensor:
        """Matched prototypes of the batch."""
        return cls.plan(x_ND, prototype_KD, marginal_K)[slot_B].argmax(dim=1)

    @classmethod
    def renew(
        cls, x_ND: Tensor, prototype_KD: Tensor, marginal_K: Tensor, slot_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """These and the renewed prototypes."""
        plan_NK = cls.plan(x_ND, prototype_KD, marginal_K)
        return plan_NK[slot_B].argmax(dim=1), F.normalize(plan_NK.T @ x_ND, dim=1)


class Streaming:
    """Ours: K potentials."""

    @staticmethod
    def match(x_ND: Tensor, prototype_KD: Tensor, marginal_K: Tensor, slot_B: Tensor) -> Tensor:
        """Matched prototypes of the batch."""
        g_K = potential(x_ND, prototype_KD, marginal_K, REGULARISATION, ITERATIONS)
        return plan_rows(x_ND[slot_B], prototype_KD, g_K, REGULARISATION).argmax(dim=1)

    @staticmethod
    def renew(
        x_ND: Tensor, prototype_KD: Tensor, marginal_K: Tensor, slot_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """These and the renewed prototypes."""
        plan = transport(x_ND, prototype_KD, marginal_K, REGULARISATION, ITERATIONS)
        row_BK = plan_rows(x_ND[slot_B], prototype_KD, plan.potential_K, REGULARISATION)
        return row_BK.argmax(dim=1), plan.mean_KD


Arm = type[Dense] | type[Streaming]
ARMS: dict[str, Arm] = {"dense": Dense, "streaming": Streaming}


def step(arm: Arm, banks: list[Tensor], prototypes: list[Tensor], marginal_K: Tensor) -> list[Tensor]:
    """A step's four transports; returns all that the losses need of them."""
    slot_B = torch.arange(BATCH)
    plans = [arm.renew(x, p, marginal_K, slot_B) for x, p in zip(banks, prototypes, strict=True)]
    renewed = [mean for _, mean in plans]
    cross = [arm.match(x, p, marginal_K, slot_B) for x, p in zip(banks, renewed[::-1], strict=True)]
    return [*renewed, *(label for label, _ in plans), *cross]


def inputs(n: int, k: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Two clustered banks, prototypes near their clusters, uneven marginals."""
    generator = torch.Generator().manual_seed(0)
    centre_KD = F.normalize(torch.randn(k, DIM, generator=generator), dim=1)
    banks = []
    for _ in range(2):
        bank = torch.randn(n, DIM, generator=generator).mul_(0.1)
        for first in range(0, n, 65536):
            part = bank[first : first + 65536]
            part += centre_KD[torch.randint(k, (len(part),), generator=generator)]
            part /= part.norm(dim=1, keepdim=True)
        banks.append(bank)
    prototypes = [
        F.normalize(centre_KD + 0.05 * torch.randn(k, DIM, generator=generator), dim=1) for _ in banks
    ]
    marginal_K = torch.rand(k, generator=generator) + 0.1
    return banks, prototypes, marginal_K / marginal_K.sum()


def extra_megabytes(arm: str, n: int, k: int) -> float:
    """Growth of a fresh process's peak memory by one step."""
    command = [sys.executable, "-m", "tests.benchmarks.transport", "--memory", arm, str(n), str(k)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _megabytes(key: str) -> float:
    """Of /proc/self/status: VmRSS, what is in memory now, or VmHWM, the most since it was set back."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {key}")


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=int, default=1_000_000)
    parser.add_argument("--memory", nargs=3, metavar=("ARM", "N", "K"), help="used by the program itself")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        arm, n, k = arguments.memory
        step(ARMS[arm], *inputs(1000, int(k)))  # libraries' own buffers
        given = inputs(int(n), int(k))
        Path("/proc/self/clear_refs").write_text("5", "ascii")  # sets VmHWM back
        before = _megabytes("VmRSS")
        step(ARMS[arm], *given)
        print(_megabytes("VmHWM") - before)
        return
    print(f"{'N':>9} {'K':>4}  {'dense':>9} {'ours':>9}  {'dense / ours':>22}  {'extra memory, MB':>18}")
    for n in (4_000, 70_000, 1_000_000):
        for k in (7, 65, 345):
            if n > arguments.largest:
                continue
            given = inputs(n, k)
            reference, ours = (step(arm, *given) for arm in ARMS.values())
            for one, other in zip(reference, ours, strict=True):
                if one.is_floating_point():
                    assert float((one - other).abs().max()) < 1e-4
                else:
                    assert float((one == other).float().mean()) > 0.98
            times: dict[str, list[float]] = {name: [] for name in ARMS}
            for _ in range(arguments.rounds if n < 1_000_000 else min(3, arguments.rounds)):
                for name, arm in ARMS.items():
                    began = time.perf_counter()
                    step(arm, *given)
                    times[name].append(time.perf_counter() - began)
            del given, reference, ours
            ratios = sorted(a / b for a, b in zip(times["dense"], times["streaming"], strict=True))
            medians = [1000 * statistics.median(samples) for samples in times.values()]
            memory = [extra_megabytes(name, n, k) for name in ARMS]
            print(
                f"{n:>9} {k:>4}  {medians[0]:>6.0f} ms {medians[1]:>6.0f} ms  "
                f"{statistics.median(ratios):>6.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})  "
                f"{memory[0]:>8.0f} {memory[1]:>8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    run_main(main)
