"""Prepare the next batches in background threads while the network computes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores() -> int:
    """Divide this process's cores between network and prefetching; returns the prefetching threads.

    A Ray worker's share comes as OMP_NUM_THREADS.
    """
    cores = int(os.environ.get("OMP_NUM_THREADS") or usable_cores())
    background = max(1, min(8, cores // 2))
    torch.set_num_threads(max(1, cores - background))
    return background


def prefetch(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``map(work, items)`` in order, computed a few items ahead.

    torch releases the interpreter while it computes, so threads are enough; each of them runs its
    operations on one core, because small operations lose more than they gain by spreading.
    """
    workers = share_cores()
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
