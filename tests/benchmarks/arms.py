"""Two arms measured alternately in one process: the official recipe, as it is described, and ours."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Comparison:
    """A quantity that both arms compute."""

    name: str
    official: Callable[[], Any]
    ours: Callable[[], Any]
    same: Callable[[Any, Any], str]
    """Raises AssertionError where their results differ; says how near they are."""
    rounds: int = 5
    share: float = 1.0
    """Of the work that the official arm does of ours, where all of it would take too long."""


@dataclass(frozen=True)
class Measured:
    """What came out."""

    name: str
    official: float
    """Median CPU seconds."""
    ours: float
    ratio: float
    """Median of the rounds' official / ours."""
    least: float
    most: float
    extra_official: float
    """MiB above what was held before, at its peak."""
    extra_ours: float
    same: str


def measure(comparison: Comparison) -> Measured:
    """Both arms in turn, on one thread; the first round warms up and compares the results."""
    torch.set_num_threads(1)
    same = comparison.same(comparison.official(), comparison.ours())
    seconds: list[tuple[float, float]] = []
    extra: list[tuple[float, float]] = []
    for _ in range(comparison.rounds):
        official, held_official = timed(comparison.official)
        ours, held_ours = timed(comparison.ours)
        seconds.append((official / comparison.share, ours))
        extra.append((held_official, held_ours))
    ratios = [official / ours for official, ours in seconds]
    first, second = (statistics.median(values) for values in zip(*seconds, strict=True))
    more, less = (max(values) for values in zip(*extra, strict=True))
    ratio = statistics.median(ratios)
    return Measured(comparison.name, first, second, ratio, min(ratios), max(ratios), more, less, same)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds, and MiB above what was held before, at the peak."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    began = time.process_time()
    work()
    return time.process_time() - began, max(0.0, _memory("VmHWM") - before)


def _memory(name: str) -> float:
    """MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return float(line.split()[1]) / 1024
    raise KeyError(name)


def near(tolerance: float) -> Callable[[Any, Any], str]:
    """Numbers, or tensors of them, whose largest difference is at most this share of the largest value."""

    def same(official: Any, ours: Any) -> str:
        worst = 0.0
        for one, other in zip(official, ours, strict=True):
            first, second = torch.as_tensor(one).double(), torch.as_tensor(other).double()
            worst = max(worst, float((first - second).abs().max() / first.abs().max().clamp(min=1e-12)))
        assert worst <= tolerance, f"the arms differ by {worst:.1e}"
        return f"equal to {worst:.0e}"

    return same
