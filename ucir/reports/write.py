"""Put a study's report together: CSV, Markdown, one HTML page that needs nothing else."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ucir import tracking
from ucir.config.data import DatasetParams
from ucir.config.load import Params
from ucir.config.study import SettingParams
from ucir.data.pack import PackInfo, open_domain, read_info
from ucir.data.splits import directions, pack_spaces, tail_ratio, trainings
from ucir.reports import figures
from ucir.reports.compare import SHOWN, Comparison, Direction
from ucir.reports.embedding import embedding
from ucir.reports.reference import AVERAGE, PrintedCell, printed_for
from ucir.reports.table import (
    RANKED_BY,
    ResultRow,
    Scores,
    Table,
    comparison_tables,
    direction_table,
    display_name,
    identifier,
    imbalance_cells,
    imbalance_table,
    latex,
    lead_metrics,
    markdown,
    mean_cell,
    overview_table,
    read_results,
    result_rows,
    scored_directions,
    standing_table,
    write_csv,
)
from ucir.reports.thumbnails import COLUMNS, Thumbnails
from ucir.retrieval.evaluation import (
    BEST,
    LAST,
    PRETRAINED,
    UNTRAINED,
    labels_of,
    load_features,
    scored_index,
)
from ucir.tracking import git_sha

BY_CLASS = "by_class.csv"
NO_LABELS = (
    "no labels: the pictures are not in class folders, so there are no scores; look at what is retrieved"
)


@dataclass(frozen=True)
class Written:
    """What a report consists of, for whoever prints or logs it."""

    page: Path
    headline: list[Table]
    rows: list[ResultRow]
    silent: list[str]
    """What has no scores, and why."""


def write_report(params: Params, packs: Path, results: Path, out: Path) -> Written:
    """Write tables and ``report.html`` of the active study into ``out``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    out.mkdir(parents=True, exist_ok=True)
    study = params.study
    rows: list[ResultRow] = []
    parts = []
    headline = []
    leading: list[tuple[str, str, Scores, str]] = []
    by_class: list[tuple[str, ...]] = []
    thumbnails = Thumbnails()
    tailed: dict[str, dict[int, Scores]] = {}
    for part in study.settings.values():
        block = params.datasets[part.dataset]
        runs = [r for r in study.runs.values() if (r.dataset, r.setting) == (part.dataset, part.setting)]
        methods = [run.method for run in runs]
        folder = results / part.dataset / part.setting
        first = [f"start/{row}" for row in json.loads((folder / "start.json").read_text("utf-8"))]
        scores = read_results(results, part.dataset, part.setting, [*first, *methods])
        printed = printed_for(block.catalogue, part.setting)
        rows += result_rows(part.dataset, part.setting, scores, printed)
        lead = lead_metrics(part.setting, f"P@{block.evaluate.cutoffs[0]}")
        ranked = dict.fromkeys(RANKED_BY.get(metric, metric) for metric in lead)
        standings = [t for m in ranked if (t := standing_table(part.dataset, part.setting, scores, m))]
        tables = _tables(part, scores, printed, block, lead, standings)
        headline += tables[: len(lead)]
        best = None
        if tables:
            leading.append((part.dataset, part.setting, scores, lead[0]))
            means = {m: c.mean for m in methods if (c := mean_cell(scores, m, lead[0]))}
            best = max(means, key=means.__getitem__, default=None)
        if ratio := tail_ratio(part.setting):
            tailed.setdefault(part.dataset, {})[ratio] = scores
        pack = packs / part.dataset
        compared, feature_spaces = _compare(params, part, pack, folder, methods, best, thumbnails)
        class_table = compared.class_table()
        by_class += _class_rows(part, class_table)
        seed = study.seeds[0]
        pairs = _pairs(part, block, read_info(pack))
        parts.append(
            {
                "dataset": part.dataset,
                "setting": part.setting,
                "tables": tables,
                "leading": len(lead) + len(standings),
                "cutoff": block.evaluate.cutoffs[0],
                "best": best,
                "spaces": json.loads((folder / "label_spaces.json").read_text("utf-8")),
                "data": _data(pack),
                "compared": compared.directions,
                "class_table": class_table,
                "confusions": compared.confusions(),
                "feature_spaces": feature_spaces,
                "curves": [(m, _curves(folder / m / "train", pairs, seed, block)) for m in methods],
            }
        )
    write_csv(rows, out / "results.csv")
    with (out / BY_CLASS).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("dataset", "setting", "method", "class", "P@K", "percent"), *by_class])
    imbalance = [_imbalance(dataset, runs, params) for dataset, runs in tailed.items() if len(runs) > 1]
    headline += [table for entry in imbalance for table in entry["tables"][:1]]
    every = [table for part in (*imbalance, *parts) for table in part["tables"]]
    silent = [f"{part['dataset']}, {part['setting']}: {NO_LABELS}" for part in parts if not part["tables"]]
    text = "\n\n".join([*map(markdown, every), *silent])
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    needs = "% needs \\usepackage{booktabs}\n\n"
    (out / "results.tex").write_text(needs + "\n\n".join(map(latex, every)) + "\n", encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("ucir.reports", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
    )
    cutoffs = {params.datasets[part.dataset].evaluate.cutoffs[0] for part in study.settings.values()}
    page = environment.get_template("page.html.j2").render(
        study=study.name,
        seeds=", ".join(map(str, study.seeds)),
        overview=overview_table(leading) if len(leading) > 1 else None,
        sheets=Markup(thumbnails.style()),
        shown=SHOWN,
        start=PRETRAINED,
        thumbnail_columns=COLUMNS,
        commit=git_sha(),
        cutoff=", ".join(map(str, sorted(cutoffs))),
        imbalance=imbalance,
        parts=parts,
        no_labels=NO_LABELS,
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    return Written(out / "report.html", headline, rows, silent)


def _tables(
    part: SettingParams,
    scores: Scores,
    printed: list[PrintedCell],
    block: DatasetParams,
    lead: list[str],
    standings: list[Table],
) -> list[Table]:
    """What the setting is judged by, the best-by-labels epoch, the other metrics, the papers' tables."""
    if not scored_directions(scores):
        return []
    names = dict.fromkeys(
        display_name(name) for results in scores.values() for s in results for name in s.scores
    )
    first = f"P@{block.evaluate.cutoffs[0]}"
    metrics = dict.fromkeys([*lead, *(f"P@{k}" for k in block.evaluate.cutoffs), "mAP@All", *names])
    last = [(metric, LAST) for metric in metrics if metric in names]
    has_best = any(s.epoch_choice == BEST for results in scores.values() for s in results)
    best = [(first, BEST)] if has_best else []
    wanted = [*last[: len(lead)], *best, *last[len(lead) :]]
    tables = [
        direction_table(part.dataset, part.setting, scores, metric, choice) for metric, choice in wanted
    ]
    judged, others = tables[: len(lead)], tables[len(lead) :]
    beside = comparison_tables(scores, printed) + comparison_tables(scores, printed, BEST)
    return judged + standings + others + beside


def _imbalance(dataset: str, by_ratio: dict[int, Scores], params: Params) -> dict[str, Any]:
    """Tables and plot of a study with long-tailed settings."""
    lead = f"P@{params.datasets[dataset].evaluate.cutoffs[0]}"
    cells = {metric: imbalance_cells(by_ratio, metric) for metric in (lead, "mAP@All")}
    return {
        "dataset": dataset,
        "tables": [
            imbalance_table(dataset, metric, cells_of_metric) for metric, cells_of_metric in cells.items()
        ],
        "plot": _inline(
            # the random network would take most of the axis
            figures.imbalance(
                {m: cells_of_metric for m, cells_of_metric in cells[lead].items() if m != UNTRAINED}, lead
            )
        ),
    }


def _class_rows(part: SettingParams, table: Table | None) -> list[tuple[str, ...]]:
    """Lines of ``by_class.csv``."""
    if table is None:
        return []
    cutoff = table.title.split()[0]
    return [
        (part.dataset, part.setting, method, label, cutoff, value)
        for method, values in table.rows
        for label, value in zip(table.columns, values, strict=True)
        if value
    ]


def _data(pack: Path) -> list[dict[str, Any]]:
    """Pictures by domain, and what prepare found odd."""
    with (pack / "check/counts.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    with (pack / "check/duplicates.csv").open(newline="", encoding="utf-8") as file:
        same = list(csv.DictReader(file))
    domains = []
    for domain in dict.fromkeys(line["domain"] for line in lines):
        of_domain = [line for line in lines if line["domain"] == domain]
        known = [int(line["expected"]) for line in of_domain if line["expected"]]
        domains.append(
            {
                "name": domain,
                "found": sum(int(line["found"]) for line in of_domain),
                "expected": sum(known) if len(known) == len(of_domain) else "",
                "left_out": sum(int(line["left_out"]) for line in of_domain),
                "classes": sum(1 for line in of_domain if line["class"] and int(line["found"])),
                "duplicates": sum(1 for line in same if line["domain"] == domain),
            }
        )
    return domains


def _compare(
    params: Params,
    part: SettingParams,
    pack: Path,
    results: Path,
    methods: list[str],
    best: str | None,
    thumbnails: Thumbnails,
) -> tuple[Comparison, list[dict[str, Any]]]:
    """Methods side by side, and feature spaces pair by pair; of the first seed."""
    block = params.datasets[part.dataset]
    seed = params.study.seeds[0]
    info = read_info(pack)
    spaces = pack_spaces(part.setting, pack, block.split)
    compared = Comparison(part.dataset, block.evaluate.cutoffs[0], PRETRAINED, best, thumbnails)
    spaces_shown = []
    for pair in _pairs(part, block, info):
        name = "-".join(pair)
        index = scored_index(pack, pair, spaces)
        images, labels = {d: open_domain(pack, d, x) for d, x in index.items()}, labels_of(index)
        features = {PRETRAINED: load_features(results / "start" / PRETRAINED / "evaluate" / f"{name}.npz")}
        for method in methods:
            stored = results / method / "evaluate" / f"{name}-s{seed}.npz"
            if stored.exists():  # another method of the study may have other pairs
                features[method] = load_features(stored)
        for query, gallery in directions(part.setting, pair):
            compared.add(Direction(query, gallery, features, images, labels), block.evaluate.grid_queries)
        plots = [
            {
                "method": method,
                "plot": embedding(
                    part.dataset, {d: features[method][d] for d in pair}, images, labels, thumbnails
                ),
            }
            for method in (PRETRAINED, best or methods[0])
            if method in features
        ]
        spaces_shown.append({"title": name, "plots": plots})
    return compared, spaces_shown


def _pairs(part: SettingParams, block: DatasetParams, info: PackInfo) -> list[tuple[str, str]]:
    return trainings(part.setting, part.pairs or block.pairs, list(info.counts))


def _curves(trained: Path, pairs: list[tuple[str, str]], seed: int, block: DatasetParams) -> Markup:
    histories = {}
    for pair in pairs:
        path = trained / f"{'-'.join(pair)}-s{seed}" / "run.json"
        if path.exists():
            histories["-".join(pair)] = json.loads(path.read_text("utf-8"))["history"]
    return _inline(figures.curves(histories, block.evaluate.cutoffs[0]))


def _inline(svg: bytes) -> Markup:
    text = svg.decode()
    return Markup(text[text.index("<svg") :])  # inside HTML there is no XML header


def log_summaries(params: Params, written: Written) -> list[str]:
    """One MLflow run per data set and setting that holds the table: the UI cannot pivot runs into one.

    Returns addresses where the scores of each data set are compared.
    """
    uri = tracking.tracking_uri()
    experiments = {}
    tracking.init_store(uri)
    for dataset, setting in ((part.dataset, part.setting) for part in params.study.settings.values()):
        values = {
            f"{row.method}/{identifier(row.metric)}": row.mean
            for row in written.rows
            if (row.dataset, row.setting, row.epoch_choice) == (dataset, setting, LAST)
            if row.query_domain == AVERAGE and row.mean is not None
        }
        key = hashlib.sha256(json.dumps([dataset, setting, values]).encode()).hexdigest()[:12]
        run = tracking.tracked_run(
            uri,
            f"ucir/{dataset}",
            f"summary {dataset} {setting}",
            key,
            {"dataset": dataset, "setting": setting, "stage": "report", "study": params.study.name},
            {},
            f"Study `{params.study.name}`, means over its directions and seeds; tables and pictures are in "
            "`report.html` among the artifacts.",
        )
        with tracking.status_of(run):
            run.log_scores(values)
            for name in ("results.csv", "results.md", "results.tex", BY_CLASS, "report.html"):
                run.log_artifact(written.page.with_name(name))
        if run.experiment_id and values:
            experiments[dataset] = run.experiment_id
    return [tracking.scores_url(uri, number) for number in experiments.values()]
