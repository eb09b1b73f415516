"""What studies are made of, against the tables' own rows and columns; what they cost."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT, ucir
from ucir.cluster.launch import train_all
from ucir.config.load import Params, load_params
from ucir.data.splits import directions
from ucir.errors import UserError
from ucir.reports.reference import printed_cells
from ucir.reports.table import MEAN
from ucir.runs.cost import StudyPlan, _identity, describe_hours, describe_runs, plan_study, planned_trainings
from ucir.runs.pace import Machine, Pace
from ucir.runs.run import plan_runs


@pytest.fixture(scope="module")
def shipped() -> Params:
    return load_params(ROOT / "params.yaml")


def test_the_paper_study_has_every_row_and_column_of_every_table(shipped: Params) -> None:
    planned = planned_trainings(shipped, "paper")
    seeds = len(shipped.studies["paper"].seeds)
    tables = {(c.table, c.dataset, c.setting) for c in printed_cells()}
    assert len({table for table, _, _ in tables}) == 3 + 8
    for table, dataset, setting in tables:
        cells = [c for c in printed_cells() if (c.table, c.dataset, c.setting) == (table, dataset, setting)]
        selected = [
            t for t in planned if t.part.startswith(table) and (t.dataset, t.setting) == (dataset, setting)
        ]
        rows = list(dict.fromkeys(c.method for c in cells))
        columns = {c.direction for c in cells} - {MEAN}
        if not columns:  # Table 4 prints averages over the directions of Tables 3, 7 and 8
            same = {"domainnet": "UEM Table 3", "office31": "UEM Table 7", "office_home": "UEM Table 8"}
            columns = {c.direction for c in printed_cells() if c.table == same[dataset]} - {MEAN}
        scored = {d for t in selected for d in directions(setting, t.pair)}
        assert list(dict.fromkeys(t.method for t in selected)) == rows
        if setting == "closed":  # one training serves both directions, also where one is printed
            assert scored == columns | {(gallery, query) for query, gallery in columns}
            trainings = len({frozenset(column) for column in columns})
        else:
            assert scored == columns
            trainings = len(columns)
        assert len(selected) == len(set(selected)) == len(rows) * trainings * seeds
        cutoffs = {f"P@{k}" for k in shipped.datasets[dataset].evaluate.cutoffs}
        assert {c.metric for c in cells if c.metric.startswith("P@")} <= cutoffs


def test_the_number_of_runs_of_each_table(shipped: Params) -> None:
    counts = Counter(t.part for t in planned_trainings(shipped, "paper"))
    assert counts == {
        "UCDIR Table 1": 5 * 6 * 3,
        "UCDIR Table 2": 5 * 6 * 3,
        "UCDIR Table 3": 4 * 6 * 3,
        "ProtoOT, Office-Home": 6 * 3,
        "ProtoOT, DomainNet": 6 * 3,
        "UEM Table 1, Office-31": 8 * 3 * 3,
        "UEM Table 1, DomainNet": 8 * 5 * 3,
        "UEM Table 2": 8 * 12 * 3,
        "UEM Table 3": 8 * 5 * 3,
        "UEM Table 4": 5 * (6 + 12) * 3,
        "UEM Table 4, DomainNet": 5 * 5 * 3,
        "UEM Table 5": 8 * 6 * 3,
        "UEM Table 6, Office-31": 8 * 6 * 3,
        "UEM Table 6, DomainNet": 8 * 5 * 3,
        "UEM Table 7": 8 * 6 * 3,
        "UEM Table 8": 8 * 12 * 3,
    }


def test_a_plan_counts_shared_runs_once(
    shipped: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Machine, "pace", lambda *arguments: Pace(step=1.0, image=0.01))
    study = plan_study(shipped, "paper")
    text = describe_runs(shipped, study)
    assert "UCDIR Table 1: office_home, closed: 5 methods x 6 trainings x 3 seeds = 90 runs" in text
    assert "UEM Table 8: office_home, open: 8 methods x 12 trainings x 3 seeds = 288 runs" in text
    assert "    ucdir              18 runs, 0 done\n" in text
    # UCDIR's 6 pairs of Office-Home, closed, stand in UCDIR's Table 1 and UEM's Table 5
    identities = {_identity(t) for t in study.planned}
    assert f"in all: {len(identities)} different runs" in text
    one = ("office_home", "closed", "ucdir")
    closed = [t for t in study.planned if (t.dataset, t.setting, t.method) == one]
    assert len(closed) == 2 * len({_identity(t) for t in closed}) == 36
    # partial from A to B trains on the same pictures as open from B to A: UEM's Tables 2 and 8
    uem = [t for t in study.planned if (t.dataset, t.method) == ("office_home", "uem")]
    halves = [t for t in uem if t.setting != "closed"]
    assert len({_identity(t) for t in halves}) == 12 * 3
    assert len(halves) == 12 * 3 * 3  # Table 4 names those of Table 8 again
    # of 200 epochs each: the larger domain's steps of a second, and both domains' images
    sizes = {"Art": 2427, "Clipart": 4365, "Product": 4439, "Real": 4357}
    pairs = [pair.split("-") for pair in shipped.datasets["office_home"].pairs]
    seconds = 3 * 200 * sum(max(sizes[a], sizes[b]) // 64 + 0.01 * (sizes[a] + sizes[b]) for a, b in pairs)
    only = StudyPlan("paper", closed, set())
    hours = describe_hours(shipped, only)
    assert f"  ucdir on office_home: 18 runs, {seconds / 3600:.0f} h\n" in hours
    everything = StudyPlan("paper", closed, {_identity(t) for t in closed})
    assert describe_hours(shipped, everything) == "left: nothing"


def test_a_plan_counts_files_where_nothing_is_prepared(project: Path) -> None:
    assert "  ucdir on shapes: 2 runs, 0 min\n" in ucir("plan")
    (project / "images").rename(project / "moved")
    told = ucir("plan")
    assert "  ucdir on shapes: 2 runs, not known\n" in told
    assert "(without shapes: not prepared, so of unknown size)" in told


def test_a_plan_knows_what_is_done(prepared: Path, store: str) -> None:
    before = ucir("plan")
    assert "shapes, closed: 1 method x 2 trainings x 1 seed = 2 runs" in before
    assert "2 runs, 0 done" in before
    assert "Before it can run" not in before
    params = load_params()
    train_all(plan_runs(params, "shapes", "closed", "ucdir", ("art-photo",)), params.cluster)
    after = ucir("plan", "tiny")
    assert "2 runs, 1 done" in after
    assert "2 different runs, 1 done" in after
    assert "disk: about" in after
    source = Path(params.datasets["shapes"].source)
    source.rename(source.with_name("moved"))
    assert f"Before it can run: {source}: no such folder" in ucir("plan")


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("plan", "methods.uem.shapes.lrr=1", r"methods\.uem\.shapes\.lrr: unknown key; did you mean 'lr'"),
        ("train", "methods.uem.shapes.lr=1", r"ucdir on shapes reads methods\.ucdir\.shapes$"),
        (
            "train --method ucdir-v1",
            "methods.ucdir.shapes.distance_weight=1",
            "ucdir-v1 has distance_weight 0.0 for good",
        ),
        ("train", "methods.ucdir.shapes.lr=1e30", "ucdir with these settings, on noise: .* not finite"),
    ],
)
def test_settings_that_are_wrong_or_not_read_are_refused(
    prepared: Path, store: str, command: str, override: str, message: str
) -> None:
    arguments = ("--dataset", "shapes", "--dry-run") if command != "plan" else ()
    with pytest.raises(UserError, match=message) as error:
        ucir(*command.split(), *arguments, "--set", override)
    assert "\n" not in str(error.value)


def test_of_a_head_no_trunk_is_counted_with_each_run(
    shipped: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    studied = plan_study(shipped, "pacs")
    head = 128 * 1280 + (512 * 1280 + 512) + (128 * 512 + 128) + 2 * 1280  # PCA, two layers, centres
    runs = 12 * 6 * 3
    stored = 9991 * (3 * 128**2 + 7 * 2 * 1280)  # pack; features of pictures and of six views
    (size,) = re.findall(r"disk: about ([0-9.]+) GiB", describe_runs(shipped, studied))
    last = 3 * 9991 * 12 * 3 * 2 * 128  # a domain is in three pairs: features of the last epoch
    assert float(size) * 2**30 == pytest.approx(2 * runs * 4 * head + stored + last, rel=0.03)
