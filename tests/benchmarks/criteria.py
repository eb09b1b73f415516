"""Which epoch, and which method, would a criterion choose that sees no labels?

Reads `criteria.csv`, which holds what studies left: the criteria and P@K of each training in its last epoch,
and of the first seed's closed trainings, but for ablations, in all epochs. `--write STUDY ...` first puts in
what the finished trainings of these studies left, `--write-sweeps SWEEP ...` what the trials of sweeps did.
Labels are read for P@K alone.

For each criterion, for the product of four (silhouette, stability, cluster cycle, rank), and for two ways to
join them all (the mean and the least of the ranks that they give): Spearman's rho with P@K, and points of
P@K. Over the epochs of a training: what the epoch that it picks has more than the last one. Over the methods
of a pair, in their last epoch, and over the settings of a method: what the one that it picks has more than
the best. Each with a 90 % interval (bootstrap over trainings; pairs and seeds; methods), and with what the
criterion that is best on all other data sets (settings: for all other methods, too) does here, and over
settings also the join of two to four criteria that is. Two criteria are of the weights and not of features,
and so of a method's last epoch alone: the share of a picture's ten nearest of the other domain that stay when
a random view stands for it; and, where a study has several seeds, that two seeds have in common.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr

from tests.benchmarks import argument_parser
from ucir.config.load import Params, load_params
from ucir.config.sweep import PRODUCT
from ucir.data.views import Views, views_of
from ucir.errors import UserError, run_main
from ucir.methods.registry import VARIANTS
from ucir.models.features import extract_features
from ucir.paths import RESULTS
from ucir.retrieval.criteria import CRITERIA
from ucir.retrieval.evaluation import checkpoint_encoder, scored_domains
from ucir.retrieval.metrics import precision_name
from ucir.retrieval.ranking import top_ranked
from ucir.runs.run import PairRun, plan_runs
from ucir.runs.study import study_runs
from ucir.runs.sweep import ORACLE, check_sweep, score, short

TABLE = Path(__file__).with_suffix(".csv")
TRAINING = ("dataset", "setting", "method", "pair", "seed", "changes")
"""``changes``: what a sweep's trial has in place of the shipped settings."""
JOINED: dict[str, Any] = {"mean rank": np.mean, "worst rank": np.min}
WAYS = ("product", *JOINED)
AGREEMENT = ("views_agree", "seeds_agree")
NAMES = [*CRITERIA, "product", *JOINED, *AGREEMENT]
COLUMNS = [*TRAINING, "epoch", "metric", "value", *CRITERIA, *AGREEMENT]
NEAREST = 10
LABELS = "labels"
RESAMPLES = 2000

Row = dict[str, Any]
Figures = dict[str, list[tuple[float, float]]]
Means = dict[str, dict[str, tuple[float, float]]]


def rows_of(params: Params, study: str) -> Iterator[Row]:
    """Of finished trainings: all epochs of whole methods' first seed, closed; of others the last one.

    A training that serves ``partial`` and ``open`` is there once, under what the study names first.
    """
    seen = set()
    of_seeds: dict[tuple[str, ...], list[tuple[PairRun, Row]]] = defaultdict(list)
    for _, part in study_runs(params, study):
        dataset, seeds = part["dataset"], params.studies[study].seeds
        metric = precision_name(params.datasets[dataset].evaluate.cutoffs[0])
        for run in plan_runs(params, dataset, part["setting"], part["method"], part.get("pairs"), seeds):
            if run.key in seen or not run.done or f"val/{metric}" not in run.history()[-1]:
                continue
            seen.add(run.key)
            named = (dataset, run.setting, run.method, "-".join(run.pair), str(run.seed), "")
            rows = [
                {
                    **dict(zip(TRAINING, named, strict=True)),
                    "epoch": int(entry["epoch"]),
                    "metric": metric,
                    "value": entry[f"val/{metric}"],
                    **{name: entry[f"quality/{name}"] for name in CRITERIA},
                }
                for entry in run.history()
            ]
            of_seeds[named[:4]].append((run, rows[-1]))
            if run.setting == "closed" and run.seed == seeds[0] and run.method not in VARIANTS:
                yield from rows[:-1]
    for trainings in of_seeds.values():
        neighbours = [nearest_of(params, run) for run, _ in trainings]
        agreed = [common(one, other) for (one, _), (other, _) in combinations(neighbours, 2)]
        seeds_agree = float(np.mean(agreed)) if agreed else ""
        for (_, row), (plain, viewed) in zip(trainings, neighbours, strict=True):
            yield {**row, "views_agree": common(plain, viewed), "seeds_agree": seeds_agree}


def trials_of(params: Params, name: str) -> Iterator[Row]:
    """Of the trials of a sweep that came to their end."""
    sweep, space = check_sweep(params, name)
    metric = precision_name(params.datasets[sweep.dataset].evaluate.cutoffs[0])
    trials = RESULTS / "sweeps" / name / "trials.csv"
    if not trials.exists():
        raise UserError(f"no {trials}: `uv run ucir tune {name}` makes it")
    with trials.open(newline="", encoding="utf-8") as file:
        for trial in csv.DictReader(file):
            if trial["state"] == "finished":
                values = {field: json.loads(trial[field]) for field in space}
                yield {
                    "dataset": sweep.dataset,
                    "setting": sweep.setting,
                    "method": sweep.method,
                    "pair": "+".join(sweep.pairs or params.datasets[sweep.dataset].pairs),
                    "seed": "+".join(map(str, sweep.seeds)),
                    "changes": " ".join(f"{key}={short(value)}" for key, value in values.items()),
                    "epoch": int(trial["epochs_done"]) - 1,
                    "metric": metric,
                    "value": float(trial[ORACLE]),
                    **{criterion: float(trial[criterion]) for criterion in CRITERIA},
                }


def nearest_of(params: Params, run: PairRun) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """By direction, each picture's nearest of the other domain; and those of a random view of each."""
    block = params.datasets[run.dataset]
    images, _ = scored_domains(run.dataset, block, run.pair, run.spaces)
    domains = [images[name] for name in run.pair]
    device = torch.device("cpu")
    encoder = checkpoint_encoder(run.folder / "last.pt", block, domains[0])
    views = views_of(domains, block.view, encoder.form, device)  # type: ignore[arg-type]
    pooled = block.evaluate.features == "pooled"
    plain, viewed = (
        [x.own_ND for x in extract_features(encoder, of_pictures, device, pooled)]
        for of_pictures in (views, RandomViews(views))
    )
    galleries = plain[::-1]
    there = [top_ranked(q, g, NEAREST) for q, g in zip(plain, galleries, strict=True)]
    return there, [top_ranked(q, g, NEAREST) for q, g in zip(viewed, galleries, strict=True)]


class RandomViews:
    """Another's views, of which the evaluation views are random ones as well."""

    def __init__(self, views: Views) -> None:
        self.views, self.generator = views, torch.Generator().manual_seed(0)
        self.counts, self.draw, self.random = views.counts, views.draw, views.random

    def plain(self, domain: int, slots: slice) -> torch.Tensor:
        slot_B = torch.arange(slots.start, slots.stop)
        domain_B = torch.full_like(slot_B, domain)
        return self.random(domain_B, slot_B, self.draw(domain_B, slot_B, self.generator))


def common(nearest: list[np.ndarray], others: list[np.ndarray]) -> float:
    """Share of the nearest that two lists have in common, mean over pictures and directions."""
    shares = [
        (a[:, :, None] == b[:, None, :]).any(axis=2).mean() for a, b in zip(nearest, others, strict=True)
    ]
    return float(np.mean(shares))


def training_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in TRAINING)


def read_table() -> list[Row]:
    with TABLE.open(newline="", encoding="utf-8") as file:
        texts = list(csv.DictReader(file))
    text = {*TRAINING, "metric"}
    return [{k: v if k in text else float(v) for k, v in row.items() if v or k in text} for row in texts]


def write_table(rows: list[Row]) -> None:
    """Rows of the same trainings are replaced, but for what a study of one seed has not; all others stay."""
    new = {training_of(row) for row in rows}
    before = read_table() if TABLE.exists() else []
    kept = [row for row in before if training_of(row) not in new]
    agreed = {(*training_of(row), row["epoch"]): row for row in before}
    for row in rows:
        if row.get("seeds_agree", "") == "":
            row["seeds_agree"] = agreed.get((*training_of(row), row["epoch"]), {}).get("seeds_agree", "")
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in sorted([*kept, *rows], key=lambda row: (*training_of(row), row["epoch"])):
            known = [name for name in (*CRITERIA, *AGREEMENT) if row.get(name, "") != ""]
            rounded = {name: f"{row[name]:.3g}" for name in known}
            writer.writerow({**row, "value": f"{row['value']:.2f}", "epoch": int(row["epoch"]), **rounded})


def join(rows: list[Row], how: str, names: tuple[str, ...]) -> np.ndarray:
    """Of each row the product of these criteria, or what :data:`JOINED` makes of the ranks that they give."""
    if how == "product":
        return np.array([score(row, names) for row in rows])
    ranks = [rankdata([row[name] for row in rows]) for name in names]
    return np.asarray(JOINED[how](ranks, axis=0))


def choices(rows: list[Row]) -> dict[str, tuple[float, float]]:
    """Rho with the labels' metric over these rows, and the metric of the chosen one, by criterion."""
    truth = np.array([row["value"] for row in rows])
    scores = {name: np.array([row[name] for row in rows]) for name in CRITERIA}
    scores |= {how: join(rows, how, tuple(CRITERIA)) for how in JOINED}
    scores["product"] = join(rows, "product", PRODUCT)
    for name in AGREEMENT:
        if all(name in row for row in rows):
            scores[name] = np.array([row[name] for row in rows])
    found = {LABELS: (1.0, float(truth.max()))}
    for name, values in scores.items():
        rho = float(spearmanr(values, truth).statistic) if np.ptp(values) and np.ptp(truth) else 0.0
        found[name] = (rho, float(truth[values.argmax()]))
    return found


def over(choice: str, rows: list[Row], *by: str) -> dict[str, Figures]:
    """What a criterion's choice has more than the last epoch, or than the best method or settings.

    Args:
        choice: ``epoch`` of a training; of last epochs ``method``, or ``changes`` for settings.
        rows: of shipped settings, or of sweeps.
        by: columns that the figures are told apart by.
    """
    if choice != "epoch":
        rows = list({training_of(row): row for row in rows}.values())
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in TRAINING if name != choice)].append(row)
    found_by: dict[str, Figures] = defaultdict(lambda: defaultdict(list))
    for group in groups.values():
        if len(group) > 2:
            found = choices(group)
            against = group[-1]["value"] if choice == "epoch" else found.pop(LABELS)[1]
            for name, (rho, chosen) in found.items():
                found_by[" ".join(group[0][column] for column in by)][name].append((rho, chosen - against))
    return found_by


def mean(values: list[tuple[float, float]]) -> tuple[float, float]:
    rho, points = np.mean(values, axis=0)
    return float(rho), float(points)


def interval(values: list[tuple[float, float]]) -> str:
    points = np.array([value for _, value in values])
    drawn = np.random.default_rng(0).integers(len(points), size=(RESAMPLES, len(points)))
    low, high = np.quantile(points[drawn].mean(axis=1), (0.05, 0.95))
    return f"{low:.1f} to {high:.1f}"


def show(title: str, figures: dict[str, Figures], intervals: bool = True) -> Means:
    """Print a table, and return what stands in it."""
    print(f"\n{title}")
    means = {row: {name: mean(values) for name, values in kept.items()} for row, kept in figures.items()}
    names = [name for name in (*NAMES, LABELS) if any(name in kept for kept in means.values())]
    print(f"{'':<24}" + "".join(f"{name[:13]:>17}" for name in names))
    for row, kept in means.items():
        cells = [f"{kept[n][0]:.2f} / {kept[n][1]:.1f}" if n in kept else "" for n in names]
        print(f"{row:<24}" + "".join(f"{cell:>17}" for cell in cells))
        if intervals:
            cells = [interval(figures[row][n]) if n in kept else "" for n in names]
            print(f"{'  90 %':<24}" + "".join(f"{cell:>17}" for cell in cells))
    return means


def show_left_out(means: Means) -> None:
    """Of each row, what the criterion does that is the best on all other rows."""
    for row, kept in means.items():
        elsewhere = [other for name, other in means.items() if name != row]
        able = [name for name in kept if name != LABELS and all(name in other for other in elsewhere)]
        if elsewhere and able:
            picked = max(able, key=lambda name: float(np.mean([other[name][1] for other in elsewhere])))
            print(f"{row}: {picked}, the best elsewhere, has {kept[picked][1]:+.1f} points here")


def show_joins(rows: list[Row]) -> None:
    """Of each method, what the join of two to four criteria does that is the best for all other methods."""
    of_method: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of_method[row["method"]].append(row)
    joins = [(how, names) for n in (2, 3, 4) for names in combinations(CRITERIA, n) for how in WAYS]
    lost = np.array([[_lost(group, *join) for join in joins] for group in of_method.values()])
    here = []
    for i, method in enumerate(of_method):
        best = int(np.delete(lost, i, axis=0).mean(axis=0).argmin())
        here.append(lost[i, best])
        how, names = joins[best]
        print(f"{method}: {how} of {', '.join(names)}, the best elsewhere, has {-here[-1]:+.1f} points here")
    best_of_all = -lost.mean(axis=0).min()
    print(f"mean {-np.mean(here):+.1f}; of all {len(joins)} joins the best has {best_of_all:+.1f}")


def _lost(rows: list[Row], how: str, names: tuple[str, ...]) -> float:
    truth = np.array([row["value"] for row in rows])
    return float(truth.max() - truth[join(rows, how, names).argmax()])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--write", nargs="+", metavar="STUDY", default=[], help="put in what these left")
    parser.add_argument("--write-sweeps", nargs="+", metavar="SWEEP", default=[], help="and what these tried")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--settings", nargs="+", default=["closed"], help="default: closed")
    parser.add_argument("--by-method", action="store_true", help="epochs by method, too")
    given = parser.parse_args()
    if given.write or given.write_sweeps:
        params = load_params()
        new = [row for study in given.write for row in rows_of(params, study)]
        new += [row for sweep in given.write_sweeps for row in trials_of(params, sweep)]
        if not new:
            raise UserError("nothing of these is finished: `uv run dvc repro`, `uv run ucir tune` make them")
        write_table(new)
    rows = [
        row
        for row in read_table()
        if row["setting"] in given.settings and (not given.methods or row["method"] in given.methods)
    ]
    if not rows:
        raise UserError(
            f"{TABLE.name}: no training of these settings and methods: `--write STUDY` puts in what a "
            "study's trainings left"
        )
    shipped, tried = [r for r in rows if not r["changes"]], [r for r in rows if r["changes"]]
    title = "points that its epoch has more than the last one"
    show_left_out(show(f"rho over epochs / {title}", over("epoch", shipped, "dataset")))
    if given.by_method:
        show("the same by method", over("epoch", shipped, "dataset", "method"), intervals=False)
    title = "points that its method has more than the best one"
    show_left_out(show(f"rho over methods / {title}", over("method", shipped, "dataset")))
    title = "points that its settings have more than the best ones"
    show_left_out(show(f"rho over settings / {title}", over("changes", tried, "dataset")))
    show_left_out(show("the same by method", over("changes", tried, "dataset", "method"), intervals=False))
    for dataset in dict.fromkeys(row["dataset"] for row in tried):
        here = [row for row in tried if row["dataset"] == dataset]
        if len({row["method"] for row in here}) > 1:
            print(f"\n{dataset}: joins of criteria, chosen for all methods but the one that it is judged by")
            show_joins(here)


if __name__ == "__main__":
    run_main(main)
