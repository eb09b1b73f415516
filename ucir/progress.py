"""Progress with an ETA: a live bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_SECONDS = 10


class Progress:
    """Counts ``total`` steps of some work.

    Args:
        title: what is being done.
        total: steps in all.
        unit: name of a step.
    """

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.counted = 0  # steps of this process: those done before it began say nothing of its speed
        self.first = 0.0  # the first step's end: it warms up, and says as little
        self.first_steps = 0
        self.last_line = 0.0
        self.bar: Bar | None = None
        if sys.stdout.isatty():
            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(),
            )
            self.task = self.bar.add_task(title, total=total, note="")

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, steps: int, note: str = "") -> None:
        """Count finished steps; ``note`` says what the last one showed."""
        self.done += steps
        self.counted += steps
        if self.bar:
            self.bar.update(self.task, advance=steps, note=note)
            return
        now = time.monotonic()
        if not self.first:
            self.first, self.first_steps = now, steps
        if now - self.last_line >= LINE_SECONDS or self.done == self.total:
            self.last_line = now
            timed = self.counted - self.first_steps
            left = clock((now - self.first) / timed * (self.total - self.done)) if timed else "?"
            left = "0:00" if self.done == self.total else left
            print(f"{self.title}: {self.done}/{self.total} {self.unit}s, ETA {left}  {note}", flush=True)

    def skip(self, steps: int) -> None:
        """Count steps that an earlier process did."""
        self.done += steps
        if self.bar:
            self.bar.update(self.task, completed=self.done)

    def reach(self, done: int, total: int) -> None:
        """So many of so many steps are finished, where only the work itself knows how many there are."""
        self.total = total
        if self.bar:
            self.bar.update(self.task, total=total)
        self.advance(done - self.done)

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.bar:
            self.bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)


def clock(seconds: float) -> str:
    """``75`` to ``1:15``, ``3700`` to ``1:01:40``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(count: int, name: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{count} {name}{'' if count == 1 else 's'}"


def by_domain(title: str) -> Callable[[str, int, int], None]:
    """A callback (domain, files done, files in all) with a bar for each domain."""
    bars: dict[str, Progress] = {}

    def show(domain: str, done: int, total: int) -> None:
        if domain not in bars:
            bars[domain] = Progress(f"{title} {domain}", total, "file").__enter__()
        bars[domain].advance(done - bars[domain].done)
        if done == total:
            bars[domain].__exit__(None, None, None)

    return show


def by_bytes(title: str) -> Callable[[int, int | None], None]:
    """A callback (bytes there, bytes in all) with a bar in MiB."""
    bar: list[Progress] = []

    def show(done: int, total: int | None) -> None:
        if not bar:
            bar.append(Progress(title, round((total or 0) / 2**20), "MiB").__enter__())
            bar[0].skip(max(0, round(done / 2**20) - 1))
        bar[0].advance(round(done / 2**20) - bar[0].done)
        if done == total:
            bar[0].__exit__(None, None, None)

    return show
