"""Put a study's report together: CSV, Markdown, one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from ucir import tracking
from ucir.config import DatasetParams, Params, StudyParams
from ucir.data.pack import open_domain, split_pair
from ucir.evaluation import BEST, LAST, PRETRAINED, UNTRAINED, load_features, pair_labels
from ucir.reports import figures
from ucir.reports.table import (
    ResultRow,
    Table,
    direction_table,
    display_name,
    markdown,
    read_results,
    write_csv,
)
from ucir.retrieval.metrics import top_ranked
from ucir.tracking import git_sha

SHOWN = 10
"""Images retrieved per query in a grid."""


@dataclass(frozen=True)
class Written:
    """What a report consists of, for whoever prints or logs it."""

    page: Path
    headline: list[Table]
    rows: list[ResultRow]


def write_report(params: Params, packs: Path, results: Path, out: Path) -> Written:
    """Write ``results.csv``, ``results.md`` and ``report.html`` of the active study into ``out``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    out.mkdir(parents=True, exist_ok=True)
    study = params.study
    rows: list[ResultRow] = []
    parts = []
    headline = []
    for dataset, setting in study_parts(study):
        methods = [r.method for r in study.runs.values() if (r.dataset, r.setting) == (dataset, setting)]
        own = read_results(results, dataset, setting, [UNTRAINED, PRETRAINED, *methods])
        rows += own
        first, *others = [
            *(f"P@{k}" for k in params.datasets[dataset].evaluate.cutoffs),
            display_name("mAP_at_All"),
        ]
        headline.append(direction_table(own, first))
        tables = [
            headline[-1],
            direction_table(own, first, BEST),
            *(direction_table(own, metric) for metric in others),
        ]
        parts.append(
            {
                "dataset": dataset,
                "setting": setting,
                "tables": tables,
                **_pictures(params, dataset, packs / dataset, results / dataset / setting, methods),
            }
        )
    write_csv(rows, out / "results.csv")
    text = "\n\n".join(markdown(table) for part in parts for table in part["tables"])
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("ucir.reports", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
    )
    cutoffs = {params.datasets[dataset].evaluate.cutoffs[0] for dataset, _ in study_parts(study)}
    page = environment.get_template("page.html.j2").render(
        study=study.name,
        seeds=", ".join(map(str, study.seeds)),
        commit=git_sha(),
        cutoff=", ".join(map(str, sorted(cutoffs))),
        parts=parts,
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    return Written(out / "report.html", headline, rows)


def study_parts(study: StudyParams) -> list[tuple[str, str]]:
    """The study's data sets x settings, in its order."""
    return list(dict.fromkeys((run.dataset, run.setting) for run in study.runs.values()))


def _pictures(params: Params, dataset: str, pack: Path, results: Path, methods: list[str]) -> dict[str, Any]:
    """Curves, retrieval grids and embeddings of the first seed, pair by pair."""
    block = params.datasets[dataset]
    seed = params.study.seeds[0]
    labels = pair_labels(pack)
    pixels = {domain: open_domain(pack, domain).pixels_NSS3 for domain in labels}
    pairs = [split_pair(pair, list(labels)) for pair in block.pairs]
    curves = [
        {"name": method, "seed": seed, "curves": _curves(results / method / "train", pairs, seed, block)}
        for method in methods
    ]
    directions = []
    embeddings = []
    start = load_features(results / PRETRAINED / "evaluate" / "all.npz")
    for pair in pairs:
        name = "-".join(pair)
        features = {PRETRAINED: start}
        for method in methods:
            features[method] = load_features(results / method / "evaluate" / f"{name}-s{seed}.npz")
        for query, gallery in (pair, pair[::-1]):
            slots = figures.query_slots(labels[query], block.evaluate.grid_queries)
            grids = []
            for method, x in features.items():
                ranked = top_ranked(x[query][slots], x[gallery], SHOWN)
                png = figures.retrieval_grid(
                    pixels[query], pixels[gallery], slots, ranked, labels[query], labels[gallery]
                )
                grids.append({"method": method, "png": _base64(png)})
            directions.append({"title": f"{query} → {gallery}", "grids": grids})
        plots = []
        for method, x in features.items():
            png = figures.embedding({domain: x[domain] for domain in pair}, labels)
            plots.append({"method": method, "png": _base64(png)})
        embeddings.append({"title": name, "plots": plots})
    return {"methods": curves, "directions": directions, "embeddings": embeddings}


def _curves(trained: Path, pairs: list[tuple[str, str]], seed: int, block: DatasetParams) -> Markup:
    histories = {}
    for pair in pairs:
        name = "-".join(pair)
        run = json.loads((trained / f"{name}-s{seed}" / "run.json").read_text("utf-8"))
        histories[name] = run["history"]
    svg = figures.curves(histories, block.evaluate.cutoffs[0]).decode()
    return Markup(svg[svg.index("<svg") :])  # inside HTML there is no XML header


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def log_summaries(params: Params, written: Written) -> None:
    """One MLflow run per data set and setting that holds the table: the UI cannot pivot runs into one."""
    uri = tracking.tracking_uri()
    tracking.init_store(uri)
    for dataset, setting in study_parts(params.study):
        own = [
            row
            for row in written.rows
            if (row.dataset, row.setting, row.epoch_choice) == (dataset, setting, LAST)
        ]
        means: dict[str, list[float]] = {}
        for row in own:
            metric = row.metric.replace("@", "_at_")
            means.setdefault(f"{row.method}/{metric}", []).append(row.mean)
        values = {name: float(np.mean(each)) for name, each in means.items()}
        key = hashlib.sha256(json.dumps([dataset, setting, values]).encode()).hexdigest()[:12]
        run = tracking.tracked_run(
            uri,
            f"ucir/{dataset}",
            f"summary {dataset} {setting}",
            key,
            {"dataset": dataset, "setting": setting, "stage": "report", "study": params.study.name},
            {},
        )
        with tracking.status_of(run):
            run.log_scores(values)
            for name in ("results.csv", "results.md", "report.html"):
                run.log_artifact(written.page.with_name(name))
