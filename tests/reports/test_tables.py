"""Tables and figures."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from ucir.data.catalogue import entry
from ucir.methods.registry import METHODS
from ucir.reports import figures
from ucir.reports.figures import curves
from ucir.reports.reference import PrintedCell, printed_cells
from ucir.reports.table import (
    cell,
    comparison_tables,
    direction_table,
    imbalance_cells,
    imbalance_table,
    latex,
    markdown,
    overview_table,
    plain,
    read_results,
    result_rows,
    standing_table,
    write_csv,
)
from ucir.retrieval.evaluation import BEST, LAST, DirectionScore, read_scores, write_scores


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


def test_imbalance_is_compared_over_the_directions_that_all_have() -> None:
    one_way = [s for s in scores(10) if s.query == "art"]
    cells = imbalance_cells({1: {"x": scores(0), "y": scores(5)}, 10: {"x": one_way, "y": scores(1)}}, "P@2")
    assert {m: {r: c.mean for r, c in by_ratio.items()} for m, by_ratio in cells.items()} == {
        "x": {1: 50.5, 10: 60.5},
        "y": {1: 55.5, 10: 51.5},
    }
    table = imbalance_table("d", "P@2", cells)
    assert table.columns == ["1 : 1", "10 : 1"]
    assert table.best == [{1}, {0}]
    assert figures.imbalance(cells, "P@2").startswith(b"<?xml")
    apart = [s for s in scores(0) if s.query != "art"]
    assert imbalance_cells({1: {"x": one_way}, 10: {"x": apart}}, "P@2") == {}


def test_tables_hold_means_deviations_and_the_best(tmp_path: Path) -> None:
    for method, given in (("pretrained", scores(-30, (0,), (LAST,))), ("ucdir", scores(0))):
        write_scores(tmp_path / "x/closed" / method / "metrics.json", given)
    results = read_results(tmp_path, "x", "closed", ["pretrained", "ucdir"])
    table = direction_table("x", "closed", results, "P@2")
    assert table.columns == ["art → photo", "photo → art", "mean"]
    assert table.rows == [
        ("pretrained", ["20.0", "10.0", "15.0"]),
        ("ucdir", ["50.5 ± 0.7", "40.5 ± 0.7", "45.5 ± 0.7"]),
    ]
    assert "| ucdir | **50.5 ± 0.7** | **40.5 ± 0.7** | **45.5 ± 0.7** |" in markdown(table)
    assert plain(table).splitlines()[-1].split()[:4] == ["ucdir", "50.5", "±", "0.7"]
    # by labels: the start has no epochs to choose from and shows its only scores
    best = direction_table("x", "closed", results, "P@2", BEST)
    assert [cells[-1] for _, cells in best.rows] == ["15.0", "46.5 ± 0.7"]
    write_csv(result_rows("x", "closed", results), tmp_path / "results.csv")
    written = list(csv.DictReader((tmp_path / "results.csv").open()))
    columns = "dataset,setting,method,query_domain,gallery_domain,metric,epoch_choice,mean,std,seeds,"
    assert list(written[0]) == f"{columns}paper_value,paper_source,reconstructed".split(",")
    key = ("method", "metric", "epoch_choice", "query_domain")
    lines = {tuple(line[name] for name in key): line for line in written}
    for query, mean in (("art", "50.5"), ("AVERAGE", "45.5")):
        line = lines["ucdir", "P@2", LAST, query]
        assert (line["mean"], line["std"], line["seeds"], line["paper_value"]) == (mean, "0.7071", "2", "")
        assert line["reconstructed"] == "False"
    write_csv(result_rows("x", "closed", {"darl": results["ucdir"]}), tmp_path / "results.csv")
    assert {line["reconstructed"] for line in csv.DictReader((tmp_path / "results.csv").open())} == {"True"}


def test_the_deviation_of_a_mean_is_over_seeds_not_over_directions() -> None:
    # seed 0: 10 and 30, seed 1: 20 and 40: the means are 20 and 30
    results = [
        DirectionScore(q, g, seed, LAST, {"P_at_2": value + 10 * seed})
        for q, g, value in (("a", "b", 10.0), ("b", "a", 30.0))
        for seed in (0, 1)
    ]
    mean = cell(results, "P@2", LAST, [("a", "b"), ("b", "a")])
    assert mean is not None
    assert (mean.mean, mean.seeds) == (25.0, 2)
    assert mean.std == pytest.approx(10 / 2**0.5)
    assert cell(results[:3], "P@2", LAST, [("a", "b"), ("b", "a")]) is None, (
        "a mean of what is there is no mean"
    )
    assert cell(results[:1], "P@2", LAST, [("a", "b")]).std is None  # type: ignore[union-attr]


def paper(method: str, query: str, gallery: str, value: float | None) -> PrintedCell:
    return PrintedCell("UCDIR Table 9", "x", "closed", method, query, gallery, "P@2", value, None)


def test_ours_stand_beside_the_printed_numbers() -> None:
    results = {"ucdir": scores(0), "mine": scores(5)}
    printed = [
        paper("pcs", "art", "photo", 41.04),
        paper("pcs", "photo", "art", None),
        paper("ucdir", "art", "photo", 52.0),
        paper("ucdir", "photo", "art", None),
        paper("ucdir", "AVERAGE", "AVERAGE", 44.0),
    ]
    (table,) = comparison_tables(results, printed)
    assert table.columns == ["art → photo", "photo → art", "mean"]
    assert table.rows == [
        ("pcs", ["(41.0)", "(lost)", ""]),
        ("ucdir", ["50.5 ± 0.7 (52.0, −1.5)", "40.5 ± 0.7 (lost)", "45.5 ± 0.7 (44.0, +1.5)"]),
    ]
    assert table.best == [{1}, {1}, {1}]
    assert len(comparison_tables(results, printed, BEST)) == 1
    last = {"ucdir": [s for s in scores(0) if s.epoch_choice == LAST]}
    assert not comparison_tables(last, printed, BEST), "the last epoch is not shown as the best"
    every = result_rows("x", "closed", results, printed)
    rows = {(r.method, r.query_domain, r.epoch_choice): r for r in every if r.metric == "P@2"}
    assert rows["ucdir", "art", LAST].paper_value == 52.0
    assert rows["ucdir", "art", LAST].paper_source == "UCDIR Table 9"
    assert rows["ucdir", "AVERAGE", LAST].paper_value == 44.0
    assert (rows["pcs", "art", LAST].mean, rows["pcs", "art", LAST].paper_value) == (None, 41.04)
    assert rows["pcs", "photo", LAST].paper_source == "UCDIR Table 9 (lost in the scan)"
    assert rows["mine", "art", LAST].paper_source == ""
    # over other directions than the table's, our mean is another thing
    one = {"ucdir": [s for s in scores(0) if s.query == "art"]}
    (table,) = comparison_tables(one, printed)
    assert table.rows[1][1][2] == "(44.0)"
    rows_of_one = result_rows("x", "closed", one, printed)
    assert all(row.mean is None for row in rows_of_one if row.query_domain == "AVERAGE")


def test_equal_values_share_the_bold() -> None:
    results = {"one": scores(0, (0,)), "two": scores(0.01, (0,)), "three": scores(-5, (0,))}
    assert direction_table("x", "closed", results, "P@2").best == [{0, 1}] * 3


def test_latex_has_booktabs_rules_and_escapes() -> None:
    results = {"a_b&c": scores(0), "d": scores(5)}
    text = latex(direction_table("x_y", "closed", results, "P@2"))
    for part in (r"\toprule", r"\midrule", r"\bottomrule", r"a\_b\&c & 50.5 $\pm$ 0.7", r"art $\to$ photo"):
        assert part in text
    assert r"d & \textbf{55.5 $\pm$ 0.7} & \textbf{45.5 $\pm$ 0.7} & \textbf{50.5 $\pm$ 0.7} \\" in text


def test_the_printed_tables_are_those_of_the_papers() -> None:
    cells = printed_cells()
    assert Counter(c.table.split()[0] for c in cells) == {"UCDIR": 546, "UEM": 862}
    assert sum(c.value is None for c in cells) == 14 + 8 + 1
    by_place = {(c.table, c.dataset, c.setting, c.method, *c.direction, c.metric): c for c in cells}
    assert len(by_place) == len(cells)
    one = by_place["UCDIR Table 2", "domainnet", "closed", "ucdir", "AVERAGE", "AVERAGE", "P@50"]
    assert one.value == 47.09
    two = by_place["UEM Table 1", "office31", "closed", "cds", "amazon", "dslr", "mAP@All"]
    assert (two.value, two.std) == (66.7, 1.1)
    for c in cells:
        assert {c.query_domain, c.gallery_domain} <= {*entry(c.dataset).domains, "AVERAGE"}
        assert c.method in METHODS


def test_curves_draw() -> None:
    history = [
        {"epoch": float(e), "train/loss_total": 1.0, "val/P_at_2": 5.0, "val/mAP_at_All": 6.0} for e in (0, 1)
    ]
    assert b"<svg" in curves({"a-b": history, "a-c": history}, 2)
    without_labels = [{"epoch": 0.0, "train/loss_total": 1.0}]
    assert b"<svg" in curves({"a-b": history, "a-c": without_labels}, 2)


def test_names_in_any_script_are_text_in_the_figures() -> None:
    history = [{"epoch": 0.0, "train/loss_total": 1.0}]
    svg = curves(dict.fromkeys(("_素描", "a$b$", "x<y&z"), history), 2).decode()
    for name in ("_素描", "a$b$", "x&lt;y&amp;z"):
        assert f"{name}</text>" in svg, name


def test_the_overview_holds_means_and_leaves_out_what_was_not_scored() -> None:
    whole, shifted = scores(0.0), scores(4.0)
    half = [s for s in scores(0.0) if s.query == "art"]
    table = overview_table(
        [("x", "closed", {"a": whole, "b": shifted, "none": []}, "P@2"), ("y", "open", {"a": half}, "P@2")]
    )
    assert table.columns == ["x, closed: P@2", "y, open: P@2"]
    assert table.rows == [("a", ["45.5 ± 0.7", "50.5 ± 0.7"]), ("b", ["49.5 ± 0.7", ""])]
    assert table.best == [{1}, {0}]


def test_a_standing_has_rank_gain_and_a_paired_test_over_trainings() -> None:
    pairs = [(f"a{n}", f"b{n}") for n in range(6)]

    def of(*values: float) -> list[DirectionScore]:
        """Each pair's mean of both directions, over two seeds."""
        return [
            DirectionScore(q, g, seed, LAST, {"P_at_2": value + shift + seed - 0.5})
            for pair, value in zip(pairs, values, strict=True)
            for (q, g), shift in ((pair, 1.0), (pair[::-1], -1.0))
            for seed in (0, 1)
        ]

    results = {
        "pretrained": [s for s in of(10, 20, 30, 40, 50, 60) if s.seed == 0],
        "up": of(12, 23, 34, 45, 56, 67),
        "mixed": of(9, 22, 27, 44, 45, 66),
        "same": [s for s in of(10, 20, 30, 40, 50, 60) if s.seed == 0],
        "partly": of(12, 23, 34, 45, 56, 67)[:4],
    }
    table = standing_table("x", "closed", results, "P@2")
    assert table is not None
    rows = dict(table.rows)
    # all six gains above 0: 2 of the 2 ** 6 ways to give them signs are as far from the middle
    assert rows["up"] == ["1", "39.5 ± 0.7", "+5.0", "6 of 6", "0.031"]
    # gains -0.5, 2.5, -2.5, 4.5, -4.5, 6.5 have ranks 1, 2.5, 2.5, 4.5, 4.5, 6
    assert rows["mixed"][:4] == ["2", "35.5 ± 0.7", "+1.0", "3 of 6"]
    assert rows["same"] == [*rows["pretrained"][:2], "+0.0", "0 of 6", ""]
    assert "partly" not in rows
    assert table.best[1] == {1}
    other = standing_table("x", "closed", results, "P@2", "mixed")
    assert other is not None
    assert dict(other.rows)["up"][2:4] == ["+4.0", "6 of 6"]
    assert other.title.split(";")[0].endswith("gain over mixed")
    apart = standing_table("x", "open", results, "P@2")
    assert apart is not None
    assert dict(apart.rows)["up"][3:] == ["12 of 12", "0.00049"], "each direction has a training of its own"
    assert standing_table("x", "closed", {"up": results["up"]}, "P@2") is None
    four = {m: [s for s in r if {s.query, s.gallery} <= set(sum(pairs[:4], ()))] for m, r in results.items()}
    few = standing_table("x", "closed", four, "P@2")
    assert few is not None
    assert few.columns == ["rank", "mean", "gain", "better in"], "four gains cannot give a small p"
    assert dict(few.rows)["up"][2:] == ["+4.0", "4 of 4"]
    one = {m: [s for s in r if {s.query, s.gallery} == set(pairs[0])] for m, r in results.items()}
    assert standing_table("x", "closed", one, "P@2") is None, "one training"


def test_of_errors_the_lowest_is_bold() -> None:
    results = {
        name: [DirectionScore("a", "b", 0, LAST, {"null_shared": value, "P_at_2": value})]
        for name, value in (("x", 75.0), ("y", 0.0))
    }
    assert direction_table("d", "open", results, "rejected though shared").best == [{1}, {1}]
    assert direction_table("d", "open", results, "P@2").best == [{0}, {0}]
