"""Tables and figures."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from ucir.evaluation import BEST, LAST, DirectionScore, read_scores, write_scores
from ucir.reports.figures import HIT, MISS, QUERY, curves, embedding, query_slots, retrieval_grid
from ucir.reports.table import direction_table, markdown, plain, read_results, score_rows, write_csv


def scores(shift: float, seeds: tuple[int, ...] = (0, 1), choices: tuple[str, ...] = (LAST, BEST)):  # type: ignore[no-untyped-def]
    return [
        DirectionScore(
            q, g, seed, choice, {"P_at_2": value + shift + seed + (choice == BEST), "mAP_at_All": 1.0}
        )
        for q, g, value in (("art", "photo", 50.0), ("photo", "art", 40.0))
        for seed in seeds
        for choice in choices
    ]


def test_scores_come_back_and_the_mean_stands_first(tmp_path: Path) -> None:
    write_scores(tmp_path / "metrics.json", scores(0))
    assert sorted(map(str, read_scores(tmp_path / "metrics.json"))) == sorted(map(str, scores(0)))
    import json

    mean = json.loads((tmp_path / "metrics.json").read_text())["mean"]
    assert mean[LAST]["P_at_2"] == pytest.approx(45.5)
    assert mean[BEST]["P_at_2"] == pytest.approx(46.5)


def test_tables_hold_means_deviations_and_the_best(tmp_path: Path) -> None:
    for method, found in (("pretrained", scores(-30, (0,), (LAST,))), ("ucdir", scores(0))):
        write_scores(tmp_path / "x/closed" / method / "metrics.json", found)
    rows = read_results(tmp_path, "x", "closed", ["pretrained", "ucdir"])
    table = direction_table(rows, "P@2")
    assert table.columns == ["art → photo", "photo → art", "mean"]
    assert table.rows == [
        ("pretrained", ["20.0", "10.0", "15.0"]),
        ("ucdir", ["50.5 ± 0.7", "40.5 ± 0.7", "45.5"]),
    ]
    assert "| ucdir | **50.5 ± 0.7** | **40.5 ± 0.7** | **45.5** |" in markdown(table)
    assert plain(table).splitlines()[-1].split() == ["ucdir", "50.5", "±", "0.7", "40.5", "±", "0.7", "45.5"]
    # by labels: the start has no epochs to choose from and shows its only scores
    assert [cells[-1] for _, cells in direction_table(rows, "P@2", BEST).rows] == ["15.0", "46.5"]
    write_csv(rows, tmp_path / "results.csv")
    written = list(csv.DictReader((tmp_path / "results.csv").open()))
    columns = "dataset,setting,method,query_domain,gallery_domain,metric,epoch_choice,mean,std,seeds,"
    assert list(written[0]) == f"{columns}paper_value,paper_source".split(",")
    (line,) = [
        r
        for r in written
        if (r["method"], r["query_domain"], r["metric"], r["epoch_choice"]) == ("ucdir", "art", "P@2", LAST)
    ]
    assert (line["mean"], line["std"], line["seeds"], line["paper_value"]) == ("50.5", "0.7071", "2", "")


def test_one_seed_has_no_deviation() -> None:
    (row, *_) = score_rows("x", "closed", "m", scores(0, (0,)))
    assert row.std is None


def test_the_grid_frames_query_hits_and_misses() -> None:
    grey = np.full((4, 8, 8, 3), 128, np.uint8)
    png = retrieval_grid(grey, grey, [1], np.array([[0, 3]]), ["a", "b", "a", "b"], ["b", "b", "b", "a"])
    image = Image.open(io.BytesIO(png)).convert("RGB")
    cell = (image.width - 4) // 3
    assert [image.getpixel((x, 1)) for x in (1, cell + 5, 2 * cell + 5)] == [QUERY, HIT, MISS]


def test_the_same_queries_for_every_method_one_of_each_class_first() -> None:
    labels = ["b", "a", "b", "c", "a"]
    assert query_slots(labels, 3) == [1, 0, 3]
    assert query_slots(labels, 5) == [1, 0, 3, 4, 2]
    assert query_slots(labels, 50) == [1, 0, 3, 4, 2]


def test_curves_and_embedding_draw() -> None:
    history = [
        {"epoch": float(e), "train/loss_total": 1.0, "val/P_at_2": 5.0, "val/mAP_at_All": 6.0} for e in (0, 1)
    ]
    assert b"<svg" in curves({"a-b": history, "a-c": history}, 2)
    features = {d: normalize(torch.randn(9, 6), dim=1) for d in ("a", "b")}
    png = embedding(features, {d: ["x", "y", "z"] * 3 for d in features})
    assert Image.open(io.BytesIO(png)).width > 100
