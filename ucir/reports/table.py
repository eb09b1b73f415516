"""All scores of a study as rows, the tables made of them, and the papers' numbers beside them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from ucir.data.splits import both_ways
from ucir.methods import RECONSTRUCTED
from ucir.reports.reference import AVERAGE, PrintedCell
from ucir.retrieval.evaluation import LAST, PRETRAINED, DirectionScore, read_scores
from ucir.retrieval.metrics import metrics

Scores = Mapping[str, Sequence[DirectionScore]]
"""By method, in the order of the tables."""
Direction = tuple[str, str]
MEAN: Direction = (AVERAGE, AVERAGE)


@dataclass(frozen=True)
class ResultRow:
    """One line of ``reports/results.csv``; means and deviations over seeds, in percent.

    A mean over directions has ``AVERAGE`` as both domains.
    """

    dataset: str
    setting: str
    method: str
    query_domain: str
    gallery_domain: str
    metric: str
    epoch_choice: str
    mean: float | None  # None: the paper has a number, we have none
    std: float | None  # None with fewer than two seeds
    seeds: int
    paper_value: float | None = None
    paper_source: str = ""


@dataclass(frozen=True)
class Cell:
    """A mean over seeds with its deviation."""

    mean: float
    std: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


DISPLAYED = {metric.identifier: metric.name for metric in metrics(())}
"""Of the metrics without a cutoff; the others follow a rule."""
ERRORS = {metric.name for metric in metrics(()) if metric.error}
"""Metrics of which less is better."""


def display_name(metric: str) -> str:
    """``P_at_50`` to ``P@50``."""
    return DISPLAYED.get(metric, metric.replace("_at_", "@"))


def identifier(displayed: str) -> str:
    """``P@50`` to ``P_at_50``."""
    return {v: k for k, v in DISPLAYED.items()}.get(displayed, displayed.replace("@", "_at_"))


def read_results(
    root: Path, dataset: str, setting: str, methods: Iterable[str]
) -> dict[str, list[DirectionScore]]:
    """The scores in ``<root>/<dataset>/<setting>/<method>/metrics.json`` of the given methods.

    Those of the start's rows lie in ``start/<row>/metrics.json``, their method is ``start/<row>``.
    """
    return {Path(m).name: read_scores(root / dataset / setting / m / "metrics.json") for m in methods}


def cell(
    scores: Iterable[DirectionScore], metric: str, choice: str, directions: Sequence[Direction]
) -> Cell | None:
    """Mean and deviation over seeds of the mean over directions; None unless all are there.

    A method without the chosen epoch (the untrained network has no epochs) shows its only one.

    Args:
        scores: of one method.
        metric: as displayed, ``P@50``.
        choice: of the epoch.
        directions: one, or those to take the mean of.
    """
    scores = list(scores)
    if choice not in {s.epoch_choice for s in scores}:
        choice = next((s.epoch_choice for s in scores), choice)
    by_seed: dict[int, dict[Direction, float]] = {}
    for s in scores:
        values = {display_name(name): value for name, value in s.scores.items()}
        if s.epoch_choice == choice and metric in values:
            by_seed.setdefault(s.seed, {})[s.query, s.gallery] = values[metric]
    whole = [by_direction for by_direction in by_seed.values() if all(d in by_direction for d in directions)]
    if not whole or len(whole) < len(by_seed):
        return None
    means = [float(np.mean([by_direction[d] for d in directions])) for by_direction in whole]
    deviation = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return Cell(float(np.mean(means)), deviation, len(means))


def scored_directions(scores: Scores) -> list[Direction]:
    """Every direction that some method was scored in, in order."""
    return list(dict.fromkeys((s.query, s.gallery) for results in scores.values() for s in results))


def result_rows(
    dataset: str, setting: str, scores: Scores, printed: Sequence[PrintedCell] = ()
) -> list[ResultRow]:
    """One row for each method, direction (and their mean), metric and choice of epoch.

    Rows with a printed number and none of ours are among them; a number that stands in two tables comes
    from the first. A printed mean is only put beside ours when both are over the same directions.
    """
    ours: dict[tuple[str, Direction, str, str], Cell] = {}
    for method, results in scores.items():
        mine = list(dict.fromkeys((s.query, s.gallery) for s in results))
        metrics = dict.fromkeys(display_name(name) for s in results for name in s.scores)
        for choice in dict.fromkeys(s.epoch_choice for s in results):
            for direction in [*mine, *([MEAN] if len(mine) > 1 else [])]:
                for metric in metrics:
                    value = cell(results, metric, choice, mine if direction == MEAN else [direction])
                    if value:
                        ours[method, direction, metric, choice] = value
    theirs: dict[tuple[str, Direction, str], PrintedCell] = {}
    for entry in printed:
        mine = list({(s.query, s.gallery) for s in scores.get(entry.method, ())})
        table = {e.direction for e in printed if e.table == entry.table} - {MEAN}
        if entry.direction != MEAN or set(mine) == table:
            key = (entry.method, entry.direction, entry.metric)
            if key not in theirs or theirs[key].value is None:
                theirs[key] = entry
    keys = dict.fromkeys([*ours, *((*key, LAST) for key in theirs if (*key, LAST) not in ours)])
    rows = []
    for method, direction, metric, choice in keys:
        our_cell = ours.get((method, direction, metric, choice))
        paper = theirs.get((method, direction, metric))
        lost = " (lost in the scan)" if paper and paper.value is None else ""
        rows.append(
            ResultRow(
                dataset,
                setting,
                method,
                *direction,
                metric,
                choice,
                our_cell.mean if our_cell else None,
                our_cell.std if our_cell else None,
                our_cell.seeds if our_cell else 0,
                paper.value if paper else None,
                paper.table + lost if paper else "",
            )
        )
    return rows


def write_csv(rows: list[ResultRow], path: Path) -> None:
    """``results.csv``; empty cells where there is no value."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(ResultRow)), "reconstructed"])
        writer.writeheader()
        for row in rows:
            cells = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({**cells, "reconstructed": row.method in RECONSTRUCTED})


def row_name(method: str) -> str:
    """How a table names a method."""
    return f"{method} (reconstructed)" if method in RECONSTRUCTED else method


@dataclass(frozen=True)
class Table:
    """Methods by directions, with the mean over directions last."""

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]
    best: list[set[int]]
    """Rows with our highest value of each column, as it is displayed."""


def lead_metrics(setting: str, first: str) -> list[str]:
    """What a setting's results are judged by: the first P@K, or UEM's two and what the second costs."""
    of_setting = {
        "open": ["mAP@All", "open-set accuracy", "rejected though shared"],
        "partial": ["mAP@All"],
    }
    return of_setting.get(setting, [first])


RANKED_BY = {"open-set accuracy": "gate AUROC", "rejected though shared": "gate AUROC"}
"""In place of metrics that are best where everything is rejected, or nothing."""


def direction_table(dataset: str, setting: str, scores: Scores, metric: str, choice: str = LAST) -> Table:
    """One metric of one data set and setting; rows keep the methods' order."""
    directions = scored_directions(scores)
    body: list[tuple[str, list[Cell | None]]] = []
    for method, results in scores.items():
        mine = [d for d in directions if d in {(s.query, s.gallery) for s in results}]
        cells = [cell(results, metric, choice, [d]) for d in directions]
        body.append((method, [*cells, cell(results, metric, choice, mine) if mine == directions else None]))
    return Table(
        f"{dataset}, {setting}: {metric} in percent, {choice.replace('_', ' ')} epoch",
        [*(f"{query} → {gallery}" for query, gallery in directions), "mean"],
        [(row_name(method), ["" if c is None else str(c) for c in cells]) for method, cells in body],
        best_rows([cells for _, cells in body], metric in ERRORS),
    )


FEWEST_TESTED = 5
"""Trainings that a signed-rank test needs: with four of them p is at least 0.125."""


def standing_table(
    dataset: str, setting: str, scores: Scores, metric: str, against: str = PRETRAINED
) -> Table | None:
    """Rank of each method's mean, and what it gains over another row, with a paired test; last epoch.

    The test is Wilcoxon's signed-rank test, two-sided, over trainings: both directions of a pair count as one
    where they come from one training, and seeds by their mean; left out where there are fewer trainings than
    could tell anything. None where that row has no scores, or there is one training alone.

    Args:
        dataset, setting: their names.
        scores: of all methods and of the start, by their names.
        metric: as displayed, ``P@50``.
        against: the other row; by default what trainings begin with.
    """
    from scipy.stats import wilcoxon  # type: ignore[import-untyped]

    directions = scored_directions(scores)
    units: dict[object, list[Direction]] = {}
    for direction in directions:
        units.setdefault(frozenset(direction) if both_ways(setting) else direction, []).append(direction)
    by_unit = {
        method: [mean for unit in units.values() if (mean := cell(results, metric, LAST, unit))]
        for method, results in scores.items()
    }
    whole = {m: np.array([c.mean for c in cells]) for m, cells in by_unit.items() if len(cells) == len(units)}
    if against not in whole or len(units) < 2:
        return None
    less = metric in ERRORS
    means = {method: cell(scores[method], metric, LAST, directions) for method in whole}
    shown = {method: round(mean.mean, 1) for method, mean in means.items() if mean}
    columns = ["rank", "mean", "gain", "better in", "p"]
    best = [set(), *best_rows([[means[method]] for method in whole], less), set(), set(), set()]
    tested = len(units) >= FEWEST_TESTED
    test = f"; p: Wilcoxon's signed-rank test over {len(units)} trainings" if tested else ""
    width = len(columns) if tested else len(columns) - 1
    rows = []
    for method, values in whole.items():
        gain = values - whole[against]
        better = int(((gain < 0) if less else (gain > 0)).sum())
        ahead = [other for other in shown.values() if other != shown[method]]
        rank = 1 + sum((other < shown[method]) == less for other in ahead)
        beside = [""] * 3
        if method != against:
            p = f"{wilcoxon(gain).pvalue:.2g}" if gain.any() else ""
            beside = [f"{gain.mean():+.1f}".replace("-", "−"), f"{better} of {len(units)}", p]
        rows.append((row_name(method), [str(rank), str(means[method]), *beside][:width]))
    other = f"the start ({row_name(against)})" if against == PRETRAINED else row_name(against)
    title = f"{dataset}, {setting}: {metric}, rank of the mean, and gain over {other}"
    return Table(title + test, columns[:width], rows, best[:width])


def overview_table(parts: Sequence[tuple[str, str, Scores, str]]) -> Table:
    """Means over directions of several settings, last epoch.

    Args:
        parts: data set, setting, scores, and the metric that it is judged by.
    """
    methods = list(dict.fromkeys(method for _, _, scores, _ in parts for method in scores))
    body = [[mean_cell(scores, method, metric) for _, _, scores, metric in parts] for method in methods]
    filled = [i for i, cells in enumerate(body) if any(cells)]
    return Table(
        "mean over the directions in percent, last epoch",
        [f"{dataset}, {setting}: {metric}" for dataset, setting, _, metric in parts],
        [(row_name(methods[i]), ["" if c is None else str(c) for c in body[i]]) for i in filled],
        best_rows([body[i] for i in filled]),
    )


def mean_cell(scores: Scores, method: str, metric: str) -> Cell | None:
    """A method's mean over all directions, last epoch; None where it was not scored in each of them."""
    directions = scored_directions(scores)
    return cell(scores[method], metric, LAST, directions) if directions and method in scores else None


def comparison_tables(scores: Scores, printed: Sequence[PrintedCell], choice: str = LAST) -> list[Table]:
    """Ours beside each printed table, metric by metric: ``ours (printed, difference)``.

    Where we have no number the cell holds the printed one alone; what the scan of the paper lost is marked.
    The mean is ours over the table's own directions. No table of an epoch that no method has.
    """
    if choice != LAST and not any(s.epoch_choice == choice for results in scores.values() for s in results):
        return []
    tables = []
    for name, metric in dict.fromkeys((entry.table, entry.metric) for entry in printed):
        entries = [e for e in printed if (e.table, e.metric) == (name, metric)]
        directions = list(dict.fromkeys(e.direction for e in entries if e.direction != MEAN))
        theirs = {(e.method, e.direction): e for e in entries}
        if not directions:  # a table of averages alone: over all that we have
            directions = scored_directions(scores)
        rows, ours = [], []
        for method in dict.fromkeys(e.method for e in entries):
            cells = [cell(scores.get(method, ()), metric, choice, [d]) for d in directions]
            cells.append(cell(scores.get(method, ()), metric, choice, directions) if directions else None)
            beside = [theirs.get((method, d)) for d in (*directions, MEAN)]
            ours.append(cells)
            rows.append((row_name(method), [_beside(*both) for both in zip(cells, beside, strict=True)]))
        first = entries[0]
        tables.append(
            Table(
                f"{name} ({first.dataset}, {first.setting}): {metric}, {choice.replace('_', ' ')} epoch; "
                "ours (printed, difference)",
                [*(f"{query} → {gallery}" for query, gallery in directions), "mean"],
                rows,
                best_rows(ours),
            )
        )
    return tables


def imbalance_cells(by_ratio: Mapping[int, Scores], metric: str) -> dict[str, dict[int, Cell]]:
    """A method's mean over directions at each ratio of class sizes in training, last epoch.

    Over the directions that all of them were scored in, so that the means can be compared.
    """
    scored = [
        {(s.query, s.gallery) for s in results}
        for scores in by_ratio.values()
        for results in scores.values()
        if results
    ]
    directions = sorted(set.intersection(*scored)) if scored else []
    cells: dict[str, dict[int, Cell]] = {}
    for ratio, scores in by_ratio.items():
        for method, results in scores.items():
            mean = cell(results, metric, LAST, directions) if directions else None
            if mean:
                cells.setdefault(method, {})[ratio] = mean
    return cells


def imbalance_table(dataset: str, metric: str, cells: Mapping[str, Mapping[int, Cell]]) -> Table:
    """What :func:`imbalance_cells` gives, a column for each ratio."""
    ratios = sorted({ratio for by_ratio in cells.values() for ratio in by_ratio})
    body = [(method, [by_ratio.get(ratio) for ratio in ratios]) for method, by_ratio in cells.items()]
    return Table(
        f"{dataset}: {metric} in percent by imbalance of the classes in training (largest : smallest), "
        "mean over directions, last epoch",
        [f"{ratio} : 1" for ratio in ratios],
        [(row_name(method), ["" if c is None else str(c) for c in by_ratio]) for method, by_ratio in body],
        best_rows([by_ratio for _, by_ratio in body]),
    )


def _beside(ours: Cell | None, theirs: PrintedCell | None) -> str:
    if theirs is None:
        return "" if ours is None else str(ours)
    if theirs.value is None:
        return f"{'' if ours is None else f'{ours} '}(lost)"
    if ours is None:
        return f"({theirs.value:.1f})"
    return f"{ours} ({theirs.value:.1f}, {ours.mean - theirs.value:+.1f})".replace("-", "−")


def best_rows(rows: Sequence[Sequence[Cell | None]], lowest: bool = False) -> list[set[int]]:
    """Which rows hold each column's highest value, or its lowest, as it is displayed."""
    extreme = min if lowest else max
    best = []
    for column in zip(*rows, strict=True):
        values = {row: round(c.mean, 1) for row, c in enumerate(column) if c is not None}
        best.append({row for row, value in values.items() if value == extreme(values.values())})
    return best


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
            f"**{text}**" if number in best and text else text
            for text, best in zip(cells, table.best, strict=True)
        ]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


LATEX = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$"}
LATEX |= {"→": r"$\to$", "±": r"$\pm$", "−": "$-$", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
LATEX |= {"^": r"\textasciicircum{}"}


def latex(table: Table) -> str:
    """A ``table`` with booktabs' rules, best of each column in bold."""

    def plain_text(text: str) -> str:
        return "".join(LATEX.get(c, c) for c in text)

    lines = [
        r"\begin{table}",
        rf"\caption{{{plain_text(table.title)}}}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(["method", *map(plain_text, table.columns)]) + r" \\",
        r"\midrule",
    ]
    for number, (method, cells) in enumerate(table.rows):
        shown = [
            rf"\textbf{{{plain_text(text)}}}" if number in best and text else plain_text(text)
            for text, best in zip(cells, table.best, strict=True)
        ]
        lines.append(" & ".join([plain_text(method), *shown]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])


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
