"""What a process computes on: its device and its threads."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from ucir.config.cluster import ClusterParams
from ucir.errors import UserError


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def background_threads() -> int:
    """Threads that render pictures beside the network.

    A Ray worker's share of the machine comes as OMP_NUM_THREADS.
    """
    return max(1, min(8, _cores() // 2))


def set_threads() -> None:
    """Give the network (torch, faiss) the cores that rendering leaves.

    Called before a process computes anything, and never with another number: sums over threads are rounded
    by their number, and a training that goes on in a new process must round as the old one did.
    """
    import faiss

    count = max(1, _cores() - background_threads())
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)


def _cores() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or usable_cores())


def wants_gpu(cluster: ClusterParams) -> bool:
    """``use_gpu``, or whether there is one."""
    return torch.cuda.is_available() if cluster.use_gpu is None else cluster.use_gpu


def choose_device(cluster: ClusterParams) -> torch.device:
    """The first GPU, or the CPU; sets the threads of this process.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    set_threads()
    if wants_gpu(cluster) and not torch.cuda.is_available():
        raise UserError("params.yaml: cluster.use_gpu is true, but torch finds no GPU here")
    return torch.device("cuda" if wants_gpu(cluster) else "cpu")


def machine_name(device: torch.device | None = None) -> str:
    """The processors, what they have, the GPU where that is the device, and torch: what speed depends on."""
    cpuinfo = Path("/proc/cpuinfo")  # Linux's alone
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    wide = "AVX-512" if any("avx512f" in line for line in lines) else "no AVX-512"
    gpu = f", {torch.cuda.get_device_name(device)}" if device and device.type == "cuda" else ""
    return f"{os.cpu_count()} x {processor or platform.machine()} ({wide}){gpu}, torch {torch.__version__}"
