"""Sweeps: spaces, trials, what is found; and Ray Tune itself, killed and gone on with."""

from __future__ import annotations

import csv
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from mlflow import MlflowClient

from tests.conftest import tiny_params, write_params
from ucir import tracking
from ucir.cluster.launch import train_all
from ucir.cluster.tune import TrialTask, tune_all
from ucir.config.cluster import ClusterParams
from ucir.config.load import Params, load_params
from ucir.errors import UserError
from ucir.retrieval.criteria import CRITERIA
from ucir.runs.reporter import RunReporter
from ucir.runs.run import PairRun, plan_runs
from ucir.runs.sweep import SweepResult, Trial, check_sweep, describe_sweep, plan_candidate, write_result
from ucir.training.diagnosis import NotFiniteError
from ucir.training.epochs import EpochReport
from ucir.training.training import Training

SPACE = {"temperature": {"loguniform": [0.05, 0.5]}, "clusters": [2, 3]}


def with_sweep(folder: Path, **changes: Any) -> Params:
    """The tiny project's params with a sweep ``try``."""
    block = {"dataset": "shapes", "method": "ucdir", "trials": 4, "space": SPACE, **changes}
    write_params(folder, {**tiny_params("images"), "sweeps": {"try": block}})
    return load_params()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"temprature": [0.1]}}, "temprature is unknown; did you mean 'temperature'"),
        ({"space": {"temperature": [0.1, -1]}}, "sweeps.try.space: temperature: .*greater than 0"),
        ({"space": {"temperature": {"uniform": [0.2, 0.1]}}}, "the first value must be below the second"),
        ({"space": {"temperature": {"uniform": [0.1, 0.2], "choice": [1]}}}, "give a list of values, or one"),
        ({"space": {"clusters": [2, 300]}}, "clusters = 300 exceeds the 22 images of domain art"),
        ({"space": {"datasets.shapes.view.side": [16, 20]}}, "packs and start weights are made before them"),
        ({"space": {"lr": {"uniform": [0.1, 0.2]}}, "search": "grid"}, "a grid needs lists of values"),
        ({"space": {"lr": 0.1}}, "0.1 is one value: write a list"),
        ({"pairs": ["art-film"]}, "^the domains are|params.yaml.*art-film|pair 'art-film'"),
        ({"objective": "mutual_neighbors"}, "did you mean 'mutual_neighbours'"),
        ({"method": "ucdirr"}, "did you mean 'ucdir'"),
        (
            {"method": "ucdir-v3", "space": {"distance_weight": [0.1, 0.2]}},
            "distance_weight: ucdir-v3 has distance_weight 0.0 for good",
        ),
        (
            {"space": {"lr": [0.1, 0.2], "methods.ucdir.shapes.lr": [0.3, 0.4]}},
            "methods.ucdir.shapes.lr stands there twice",
        ),
        ({"schedular": "asha"}, "did you mean 'scheduler'"),
    ],
)
def test_a_sweep_with_a_fault_starts_nothing(changes: dict[str, Any], message: str, prepared: Path) -> None:
    with pytest.raises(UserError, match=message):
        check_sweep(with_sweep(prepared, **changes), "try")
    assert not (prepared / "runs/sweeps").exists()


def test_without_labels_no_sweep_is_judged_by_them(prepared: Path) -> None:
    index = prepared / "data/packs/shapes/photo.csv"
    index.write_text(re.sub("circle|cross|square", "", index.read_text()))
    check_sweep(with_sweep(prepared), "try")
    with pytest.raises(UserError, match="objective: oracle: photo has no labels"):
        check_sweep(with_sweep(prepared, objective="oracle"), "try")


def test_epochs_of_the_trials_stay_out_of_what_is_found(prepared: Path) -> None:
    params = with_sweep(prepared, epochs=2)
    runs = plan_candidate(params, params.sweeps["try"], {"lr": 0.02})
    assert {(run.params.epochs, run.params.lr) for run in runs} == {(2, 0.02)}
    write_result([a_result([10, 30, 20], [0.1, 0.4, 0.2])], params, "try", prepared / "out")
    block = yaml.safe_load((prepared / "out/best.yaml").read_text())["methods"]["ucdir"]["shapes"]
    assert block["epochs"] == 4


def test_keys_may_be_given_by_their_path(prepared: Path) -> None:
    params = with_sweep(prepared, space={"methods.ucdir.shapes.lr": [0.01, 0.02]}, search="grid")
    _, space = check_sweep(params, "try")
    assert list(space) == ["lr"]
    assert "2 candidates of lr" in describe_sweep(params, "try")
    with pytest.raises(UserError, match="sweep 'tri' is unknown; did you mean 'try'"):
        check_sweep(params, "tri")


def run_trial(params: Params, store: str, values: dict[str, Any], name: str = "t0") -> list[dict[str, Any]]:
    """One trial in this process; what it reported."""
    parent = tracking.tracked_run(store, "ucir/sweeps/x", "sweep", "sweep-k", {}, {})
    sweep = params.sweeps["try"]
    task = TrialTask(
        params, sweep, sweep.pairs or params.datasets["shapes"].pairs, parent, "k", str(Path.cwd())
    )
    reports: list[dict[str, Any]] = []
    task.run(values, name, torch.device("cpu"), True, reports.append)
    return reports


def test_a_trial_reports_the_mean_over_pairs_and_is_an_ordinary_training(prepared: Path, store: str) -> None:
    params = with_sweep(prepared)
    reports = run_trial(params, store, {"temperature": 0.3})
    assert [entry["epoch"] for entry in reports] == [1, 2, 3, 4]
    runs = plan_candidate(params, params.sweeps["try"], {"temperature": 0.3})
    for epoch, entry in enumerate(reports):
        for name in CRITERIA:
            mean = sum(run.history()[epoch][f"quality/{name}"] for run in runs) / len(runs)
            assert entry[f"scores_{name}"] == pytest.approx(mean)
        factors = [entry[f"scores_{name}"] for name in ("silhouette", "stability", "cluster_cycle", "rank")]
        assert entry["score"] == pytest.approx(math.prod(max(factor, 0.0) for factor in factors))
        oracle = sum(run.history()[epoch]["val/P_at_2"] for run in runs) / len(runs)
        assert entry["scores_oracle"] == pytest.approx(oracle)
    overridden = load_params(overrides=["methods.ucdir.shapes.temperature=0.3"])
    same = plan_runs(overridden, "shapes", "closed", "ucdir")
    assert [run.key for run in same] == [run.key for run in runs]
    assert all(run.done for run in same)
    before = [(run.folder / "done.json").stat().st_mtime_ns for run in runs]
    assert run_trial(params, store, {"temperature": 0.3}, "t1") == reports  # from what is there
    assert [(run.folder / "done.json").stat().st_mtime_ns for run in runs] == before
    alone = [run.__class__(**{**run.__dict__, "folder": prepared / "runs" / run.slug}) for run in runs]
    train_all(alone, ClusterParams())
    for one, other in zip(runs, alone, strict=True):
        assert [e["train/loss_total"] for e in one.history()] == [
            e["train/loss_total"] for e in other.history()
        ]


def test_a_killed_trial_goes_on_where_its_pairs_were(
    prepared: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = with_sweep(prepared)
    undisturbed = run_trial(with_sweep(prepared, seeds=[0]), store, {"temperature": 0.2})
    (prepared / "runs").rename(prepared / "elsewhere")
    original = RunReporter.end_epoch
    ended: list[str] = []

    def killed(self: RunReporter, report: EpochReport) -> None:
        original(self, report)
        assert isinstance(self.run, PairRun)
        ended.append(self.run.slug)
        if len(ended) == 5:  # the first pair is an epoch ahead
            raise KeyboardInterrupt

    monkeypatch.setattr(RunReporter, "end_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        run_trial(params, store, {"temperature": 0.2})
    reports = run_trial(params, store, {"temperature": 0.2})
    assert len(ended) == 8
    assert reports == undisturbed


def test_a_setting_whose_loss_is_no_number_is_the_worst_and_the_rest_goes_on(
    prepared: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = with_sweep(prepared)

    def spoilt(self: Training, epoch: int, **options: Any) -> dict[str, float]:
        if epoch == 2:
            raise NotFiniteError("epoch 2, step 0: a loss is not finite")
        return original(self, epoch, **options)

    original = Training.train_epoch
    monkeypatch.setattr(Training, "train_epoch", spoilt)
    reports = run_trial(params, store, {"temperature": 0.2})
    assert [entry["score"] for entry in reports][-1] == -1.0
    assert "not finite" in reports[-1]["fault"]
    assert len(reports) == 3


def a_result(
    oracle: list[float], cycle: list[float], objective: tuple[str, ...] = ("cluster_cycle",)
) -> SweepResult:
    trials = [
        Trial(
            {"lr": 0.1 * number},
            4,
            "finished",
            {
                **dict.fromkeys(CRITERIA, 0.5),
                "cluster_cycle": c,
                "rank": 4.0 - number,
                "loss": -c,
                "oracle": o,
            },
        )
        for number, (o, c) in enumerate(zip(oracle, cycle, strict=True))
    ]
    stopped = Trial({"lr": 9.0}, 1, "stopped", {**trials[0].scores, "cluster_cycle": 1.0, "oracle": 99.0})
    return SweepResult("try", ("art-photo",), objective, [*trials, stopped])


def test_criteria_are_ranked_by_how_well_they_find_what_labels_would_choose(prepared: Path) -> None:
    rows = {row["criterion"]: row for row in a_result([10, 30, 20, 40], [0.1, 0.4, 0.2, 0.3]).ranked()}
    assert rows["cluster_cycle"]["spearman"] == pytest.approx(0.8)
    assert rows["cluster_cycle"]["regret"] == pytest.approx(10)
    assert rows["loss"]["spearman"] == pytest.approx(0.8)  # less is more
    assert rows["silhouette"]["spearman"] == 0.0  # says nothing
    assert a_result([10, 30], [0.1, 0.4]).ranked() == []


def test_several_criteria_choose_by_their_product(prepared: Path) -> None:
    assert check_sweep(with_sweep(prepared, objective="rank"), "try")[0].objective == ("rank",)
    both = ("cluster_cycle", "rank")
    assert check_sweep(with_sweep(prepared, objective=both), "try")[0].objective == both
    # rank falls from 4 to 1: products 0.4, 1.05, 0.4, 0.4; a criterion below 0 counts as 0
    result = a_result([10, 30, 20, 40], [0.1, 0.35, 0.2, 0.4], both)
    assert result.best.values == {"lr": 0.1}
    row = next(row for row in result.ranked() if row["criterion"] == "objective")
    assert row["regret"] == pytest.approx(10)
    assert a_result([10, 30], [0.0, -0.2], ("cluster_cycle", "cluster_cycle")).best.values == {"lr": 0.0}


def test_what_is_found_is_a_block_for_params_yaml(prepared: Path) -> None:
    params = with_sweep(prepared, objective="cluster_cycle")
    result = a_result([10, 30, 20, 40], [0.1, 0.4, 0.2, 0.3])
    assert result.best.values == {"lr": 0.1}
    write_result([result], params, "try", prepared / "out")
    block = yaml.safe_load((prepared / "out/best.yaml").read_text())["methods"]["ucdir"]["shapes"]
    assert block == {**tiny_params("images")["methods"]["ucdir"]["shapes"], "lr": 0.1}
    with (prepared / "out/trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["finished"] * 4 + ["stopped"]
    assert rows[1]["oracle"] == "30"
    with pytest.raises(UserError, match="no trial came to its end: failed: why"):
        _ = SweepResult("x", (), ("rank",), [Trial({}, 1, "failed: why", {})]).best


def is_free() -> bool:
    """Whether the cluster gets back all that trials held, a moment after they have ended."""
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up:
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return True
        time.sleep(0.2)
    return False


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_a_sweep_is_killed_and_goes_on_and_gives_everything_back(
    prepared: Path,
    store: str,
    ray_cluster: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_sweep(prepared, trials=2, grace=1, reduction=2)
    one_by_one = f"cluster.cpus_per_worker={ray.cluster_resources()['CPU']}"  # one has ended, one is to come
    first = subprocess.Popen(
        [sys.executable, "-c", "from ucir.cli import main; main()", "tune", "try", "--set", one_by_one],
        env={**os.environ, "RAY_ADDRESS": ray_cluster},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    give_up = time.monotonic() + 300
    while not list(prepared.glob("runs/shapes-*/done.json")) and time.monotonic() < give_up:
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(3)  # trials notice a moment later that nobody is there any more
    finished = {p: p.stat().st_mtime_ns for p in prepared.glob("runs/shapes-*/done.json")}
    assert finished
    (found,) = tune_all(load_params(), "try")
    assert "goes on" in capsys.readouterr().out
    states = [trial.state for trial in found.trials]
    assert len(states) == 2
    assert "finished" in states
    assert is_free()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "a finished run was repeated"
    client = MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name = 'ucir/sweeps/shapes-ucdir'")
    tracked = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in tracked if run.data.tags["stage"] == "sweep"]
    children = [run for run in tracked if run.data.tags["stage"] == "trial"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert parent.info.status == "FINISHED"
    assert len(children) >= 2
    statuses = [run.info.status for run in children]
    assert statuses.count("FINISHED") == states.count("finished")
    assert statuses.count("KILLED") == states.count("stopped")
    for run in children:
        points = client.get_metric_history(run.info.run_id, "mutual_neighbours")
        assert [p.step for p in points] == list(range(len(points)))
    monkeypatch.setattr("ucir.cluster.tune.connect", lambda *given: pytest.fail("repeated"))
    (again,) = tune_all(load_params(), "try")
    assert [trial.state for trial in again.trials] == states


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_trials_of_two_workers_find_what_trials_in_one_process_do(
    prepared: Path, store: str, ray_cluster: str
) -> None:
    """And train what one process does."""
    space = {"temperature": [0.1]}
    params = with_sweep(prepared, search="grid", space=space, pairs=["art-photo"], scheduler="fifo")
    alone = run_trial(params, store, {"temperature": 0.1}, "t0")[-1]
    (run,) = plan_candidate(params, params.sweeps["try"], {"temperature": 0.1})
    history = run.history()
    (prepared / "runs").rename(prepared / "elsewhere")
    (found,) = tune_all(load_params(overrides=["cluster.num_workers=2"]), "try")
    (trial,) = found.trials
    assert trial.state == "finished"
    assert is_free()
    assert trial.scores["loss"] == pytest.approx(alone["scores_loss"], rel=0.01)
    for one, many in zip(history, run.history(), strict=True):
        assert (one["time/workers"], many["time/workers"]) == (1, 2)
        for name in ("train/loss_total", "train/loss_instance_a", "val/mAP_at_All"):
            assert many[name] == pytest.approx(one[name], rel=1e-3), name
