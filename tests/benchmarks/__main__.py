"""All comparisons with the official recipes: `uv run python -m tests.benchmarks [--only NAME…]`.

Each row is measured in one process on one thread, both arms alternately: the official recipe, as its papers
and code describe it, and ours. The table is added to tests/benchmarks/history.csv with the machine's name.
"""

from __future__ import annotations

import csv
import datetime
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks import argument_parser
from tests.benchmarks.arms import Comparison, Measured, measure
from tests.benchmarks.recipes import (
    bank_losses,
    clustering,
    embedding,
    evaluation,
    matching,
    plain_views,
    random_views,
    whole_epoch,
)
from ucir.devices import machine_name

HISTORY = Path(__file__).with_name("history.csv")
ALL: dict[str, Callable[[], Comparison]] = {
    "views-224": lambda: random_views(224, 320),
    "views-64": lambda: random_views(64, 96),
    "plain-224": lambda: plain_views(224, 320),
    "bank-70k": lambda: bank_losses(70_000),
    "bank-1M": lambda: bank_losses(1_000_000),
    "matching": lambda: matching(70_000),
    "kmeans-1": lambda: clustering(70_000, 65, restarts=1),
    "kmeans": lambda: clustering(70_000, 65),
    "kmeans-sample": lambda: clustering(70_000, 65, "sample"),
    "kmeans-warm": lambda: clustering(70_000, 65, "warm"),
    "ranking": lambda: evaluation(70_000),
    "embedding": lambda: embedding("tf_efficientnet_lite0", 128),
    "epoch": lambda: whole_epoch(64),
    "epoch-bf16": lambda: whole_epoch(64, precision="bfloat16"),
}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=list(ALL), default=list(ALL), metavar="NAME", help=f"of {', '.join(ALL)}"
    )
    given = parser.parse_args()
    print(f"{machine()}\n{'':<12}{'official':>10}{'ours':>10}{'ratio':>8}{'':>16}{'extra MiB':>16}")
    for name in given.only:
        row = measure(ALL[name]())
        print(
            f"{name:<12}{_time(row.official):>10}{_time(row.ours):>10}{row.ratio:>8.2f}"
            f"{f'({row.least:.2f} to {row.most:.2f})':>16}"
            f"{f'{row.extra_official:.0f} / {row.extra_ours:.0f}':>16}  {row.name}; {row.same}",
            flush=True,
        )
        _remember(name, row)


def machine() -> str:
    """The processor and what is installed."""
    return f"{machine_name()}, {platform.python_version()}"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _remember(name: str, row: Measured) -> None:
    line = {"date": datetime.date.today().isoformat(), "machine": machine(), "benchmark": name}
    line |= {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in asdict(row).items()}
    new = not HISTORY.exists()
    with HISTORY.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(line))
        if new:
            writer.writeheader()
        writer.writerow(line)


if __name__ == "__main__":
    main()
