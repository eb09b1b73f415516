"""Processes that begin with torch imported, which takes each of them seconds else."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import distributed as dist
from torch.multiprocessing.spawn import start_processes

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ot", "torch._dynamo", "ucir.methods.registry", "ucir.retrieval.index"])


def start_process(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process of its own that may be killed; ``work`` is a function of a module."""
    process = FORKS.Process(target=work, args=arguments)
    process.start()
    return process


def run_workers(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work(rank, *arguments)`` in ``world`` gloo workers on this machine, until all have ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(_worker, (world, port, work, arguments), nprocs=world, start_method="forkserver")


def _worker(rank: int, world: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    work(rank, *arguments)
    dist.destroy_process_group()
