"""All scores of a study as rows, and the tables made of them."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from ucir.evaluation import LAST, DirectionScore, read_scores


@dataclass(frozen=True)
class ResultRow:
    """One line of ``reports/results.csv``; means and deviations over seeds, in percent."""

    dataset: str
    setting: str
    method: str
    query_domain: str
    gallery_domain: str
    metric: str
    epoch_choice: str
    mean: float
    std: float | None  # None with one seed
    seeds: int
    paper_value: float | None = None
    paper_source: str = ""


def display_name(metric: str) -> str:
    """``P_at_50`` to ``P@50``."""
    return metric.replace("_at_", "@")


def read_results(root: Path, dataset: str, setting: str, methods: Iterable[str]) -> list[ResultRow]:
    """The rows of ``<root>/<dataset>/<setting>/<method>/metrics.json`` for the given methods."""
    return [
        row
        for method in methods
        for row in score_rows(
            dataset,
            setting,
            method,
            read_scores(root / dataset / setting / method / "metrics.json"),
        )
    ]


def score_rows(dataset: str, setting: str, method: str, scores: Iterable[DirectionScore]) -> list[ResultRow]:
    """One row for each direction, choice of epoch and metric; mean and deviation over seeds."""
    values: dict[tuple[str, str, str, str], list[float]] = {}
    for s in scores:
        for metric, value in s.scores.items():
            values.setdefault((s.query, s.gallery, metric, s.epoch_choice), []).append(value)
    return [
        ResultRow(
            dataset,
            setting,
            method,
            query,
            gallery,
            display_name(metric),
            choice,
            float(np.mean(each)),
            float(np.std(each, ddof=1)) if len(each) > 1 else None,
            len(each),
        )
        for (query, gallery, metric, choice), each in values.items()
    ]


def write_csv(rows: list[ResultRow], path: Path) -> None:
    """``results.csv``; empty cells where there is no value."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(ResultRow)])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()})


@dataclass(frozen=True)
class Table:
    """Methods by directions, with the mean over directions last."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    best: list[int]
    """Row with the highest value of each column."""


def direction_table(rows: list[ResultRow], metric: str, choice: str = LAST) -> Table:
    """One metric of one data set and setting; rows keep the methods' order.

    A method without the chosen epoch (the untrained network has no epochs) shows its only one.
    """
    chosen = [
        row
        for row in rows
        if row.metric == metric and (row.epoch_choice == choice or not _has_choice(rows, row.method, choice))
    ]
    methods = list(dict.fromkeys(row.method for row in chosen))
    directions = list(dict.fromkeys((row.query_domain, row.gallery_domain) for row in chosen))
    cells = {(row.method, row.query_domain, row.gallery_domain): row for row in chosen}
    means = np.array([[cells[m, *d].mean for d in directions] for m in methods])
    means = np.concatenate([means, means.mean(axis=1, keepdims=True)], axis=1)
    body = []
    for method, values in zip(methods, means, strict=True):
        texts = [_cell(cells[method, *d]) for d in directions]
        body.append((method, [*texts, f"{values[-1]:.1f}"]))
    return Table(
        f"{rows[0].dataset}, {rows[0].setting}: {metric} in percent, {choice.replace('_', ' ')} epoch",
        [*(f"{query} → {gallery}" for query, gallery in directions), "mean"],
        body,
        [int(i) for i in np.nanargmax(np.nan_to_num(means, nan=-1), axis=0)],
    )


def markdown(table: Table) -> str:
    """GitHub Markdown, best of each column in bold."""
    lines = [
        f"**{table.title}**",
        "",
        "| method | " + " | ".join(table.columns) + " |",
        "|---|" + "---:|" * len(table.columns),
    ]
    for number, (method, cells) in enumerate(table.rows):
        shown = [
            f"**{cell}**" if best == number else cell for cell, best in zip(cells, table.best, strict=True)
        ]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def plain(table: Table) -> str:
    """For a terminal."""
    names = ["method", *(method for method, _ in table.rows)]
    wide = max(len(name) for name in names)
    columns = [[head, *(cells[i] for _, cells in table.rows)] for i, head in enumerate(table.columns)]
    widths = [max(len(text) for text in column) for column in columns]
    lines = [table.title]
    for line, name in enumerate(names):
        texts = [column[line].rjust(w) for column, w in zip(columns, widths, strict=True)]
        lines.append("  ".join([name.ljust(wide), *texts]))
    return "\n".join(lines)


def _has_choice(rows: list[ResultRow], method: str, choice: str) -> bool:
    return any(row.method == method and row.epoch_choice == choice for row in rows)


def _cell(row: ResultRow) -> str:
    return f"{row.mean:.1f}" if row.std is None else f"{row.mean:.1f} ± {row.std:.1f}"
