"""The papers' printed tables, a cell a line of ``reference.csv``; an empty value is one that the scan lost.

Printed averages stand as printed, also where they disagree with their own rows.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

AVERAGE = "AVERAGE"
"""Both domains of a row that holds the mean over a table's directions."""


@dataclass(frozen=True)
class PrintedCell:
    """One number of a paper's table, in percent."""

    table: str
    dataset: str
    """Name in the catalogue."""
    setting: str
    method: str
    query_domain: str
    gallery_domain: str
    metric: str
    value: float | None
    """None = lost in the scan of the paper."""
    std: float | None

    @property
    def direction(self) -> tuple[str, str]:
        return self.query_domain, self.gallery_domain


@cache
def printed_cells() -> tuple[PrintedCell, ...]:
    """All cells of UCDIR's Tables 1 to 3 and UEM's Tables 1 to 8."""
    with Path(__file__).with_name("reference.csv").open(newline="", encoding="utf-8") as file:
        return tuple(
            PrintedCell(
                row["table"],
                row["dataset"],
                row["setting"],
                row["method"],
                row["query_domain"],
                row["gallery_domain"],
                row["metric"],
                float(row["value"]) if row["value"] else None,
                float(row["std"]) if row["std"] else None,
            )
            for row in csv.DictReader(file)
        )


def printed_for(dataset: str, setting: str) -> list[PrintedCell]:
    """The cells of a data set (by its name in the catalogue) in a setting."""
    return [cell for cell in printed_cells() if (cell.dataset, cell.setting) == (dataset, setting)]
