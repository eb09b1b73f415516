"""Runs: keys, plans, folders; and launching them in this process."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from mlflow import MlflowClient

from tests.conftest import make_images
from tests.retrieval.test_search import tiny_model
from ucir.cluster.index import embed_on_ray
from ucir.cluster.launch import at_once, connect, embed_on_cluster, train_all
from ucir.config.base import checked
from ucir.config.cluster import ClusterParams
from ucir.config.load import Params, load_params
from ucir.devices import choose_device
from ucir.errors import UserError
from ucir.models.checkpoints import load_state, save_encoder
from ucir.models.embedding import embed, embed_here
from ucir.models.encoder import new_encoder
from ucir.paths import FEATURES
from ucir.retrieval.index import Compute, FileEmbedder, left_out, update_index
from ucir.runs.cost import describe
from ucir.runs.process import lock_run
from ucir.runs.reporter import RunReporter
from ucir.runs.run import PairRun, embedder_of, materialise, plan_runs, record_start_source
from ucir.training.epochs import epochs
from ucir.training.training import Training


def changed(**changes: Any) -> Params:
    """Params of the tiny study; changes are keys of params.yaml with dots as double underscores."""
    return load_params(overrides=[f"{key.replace('__', '.')}={value}" for key, value in changes.items()])


def plan(**changes: Any) -> list[PairRun]:
    return plan_runs(changed(**changes), "shapes", "closed", "ucdir")


def test_a_key_changes_with_what_the_result_depends_on_and_nothing_else(prepared: Path) -> None:
    keys = {run.pair: run.key for run in plan()}
    assert len(set(keys.values())) == 2
    assert {run.pair: run.key for run in plan()} == keys
    for harmless in (
        {"cluster__num_workers": 2},
        {"datasets__shapes__evaluate__grid_queries": 1},
        {"study__name": "other"},
    ):
        assert {run.pair: run.key for run in plan(**harmless)} == keys
    for matters in (
        {"methods__ucdir__shapes__lr": 0.02},
        {"datasets__shapes__view__side": 20},
        {"study__seeds": "[5]"},
    ):
        record_start_source(changed(**matters).datasets["shapes"], "shapes")
        assert not {run.key for run in plan(**matters)} & set(keys.values())
    record_start_source(changed().datasets["shapes"], "shapes")
    save_encoder(new_encoder(plan()[0].encoder, 1), Path("data/start/shapes/start.pt"))
    assert not {run.key for run in plan()} & set(keys.values())


def test_faults_are_found_before_any_training(prepared: Path) -> None:
    for changes, message in (
        ({"methods__ucdir__shapes__clusters": 25}, "clusters = 25 exceeds the 22 images of domain art"),
        ({"methods__ucdir__shapes__batch_size": 64}, "batch_size = 64 exceeds the 28 images"),
        ({"datasets__shapes__pairs": "[art-film]"}, "no domain 'film'; there is: art, photo, real-life"),
        ({"datasets__shapes__start__encoder__trunk": "{convnet: {width: 8}}"}, "a start of other weights"),
        (
            {"datasets__shapes__pack__side": 30},
            "holds pictures of 20 px .squash., but datasets.shapes.pack says 30 px",
        ),
        ({"methods__ucdir__shape__lr": 1}, "there is no data set 'shape'; did you mean 'shapes'"),
    ):
        with pytest.raises(UserError, match=message):
            plan(**changes)
    with pytest.raises(UserError, match="data set 'shape' is unknown; did you mean 'shapes'"):
        plan_runs(load_params(), "shape", "closed", "ucdir")
    with pytest.raises(UserError, match="setting 'ajar' is unknown"):
        plan_runs(load_params(), "shapes", "ajar", "ucdir")
    (prepared / "data/start/shapes/start.pt").write_bytes(b"garbage")
    with pytest.raises(UserError, match="unreadable as a checkpoint"):
        plan()
    (prepared / "runs").rmdir()
    (prepared / "runs").write_text("a file where the folder should be")
    save_encoder(
        new_encoder(load_params().datasets["shapes"].start.encoder, 0), Path("data/start/shapes/start.pt")
    )
    with pytest.raises(UserError, match="runs: cannot be written to"):
        plan()
    (prepared / "data/start/shapes/start.pt").unlink()
    with pytest.raises(UserError, match="run `uv run dvc repro pretrain` first"):
        plan()


def test_a_start_of_something_else_is_not_trained_from(prepared: Path) -> None:
    given = {"datasets__shapes__start__pretrain": "null", "datasets__shapes__start__torchvision": "ONE"}
    assert plan()
    for other in ({"datasets__shapes__start__pretrain__steps": 4}, given):
        with pytest.raises(UserError, match=r"names now: run `uv run dvc repro pretrain` first"):
            plan(**other)
    record_start_source(changed(**given).datasets["shapes"], "shapes")
    assert plan(**given)
    with pytest.raises(UserError, match="does not fit the encoder"):
        plan(**given, datasets__shapes__start__encoder__trunk="{convnet: {width: 8}}")
    with pytest.raises(UserError, match="names now"):
        plan(**given | {"datasets__shapes__start__torchvision": "TWO"})
    with pytest.raises(UserError, match="names now"):
        plan()


def test_a_seed_or_pair_is_given_once(prepared: Path) -> None:
    with pytest.raises(UserError, match="seeds: 3 stands there 2 times"):
        plan_runs(load_params(), "shapes", "closed", "ucdir", seeds=(3, 3))
    with pytest.raises(UserError, match="pairs: 'photo-art' stands there 2 times"):
        plan_runs(load_params(), "shapes", "closed", "ucdir", ("photo-art", "photo-art"))


def test_a_pair_is_one_run_whichever_domain_comes_first(prepared: Path) -> None:
    def key(pair: str) -> str:
        return plan_runs(load_params(), "shapes", "closed", "ucdir", (pair,))[0].key

    assert key("photo-art") == key("art-photo") != key("art-real-life")


def test_partial_and_open_share_their_trainings(prepared: Path) -> None:
    partial, opened = (
        {run.pair: run for run in plan_runs(load_params(), "shapes", setting, "ucdir", ("art-photo",))}
        for setting in ("partial", "open")
    )
    assert partial.keys() == opened.keys() == {("art", "photo"), ("photo", "art")}
    for pair, run in partial.items():
        other = opened[pair[::-1]]
        assert run.folder == other.folder
        assert run.directions == [pair]
        assert other.directions == [pair[::-1]]
        here, there = ([(x.name, x.row_N.tolist()) for x in r.images()] for r in (run, other))
        assert here == there
    assert len({run.key for run in [*partial.values(), *opened.values()]}) == 2


def test_a_run_belongs_to_one_process_at_a_time(
    prepared: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = plan()[0]
    run.folder.mkdir(parents=True)
    (run.folder / "state.pt").touch()
    busy = rf"ucdir art-photo s0: another process is training it in .* \(process {os.getpid()}\): wait for it"
    with lock_run(run), pytest.raises(UserError, match=busy):
        train_all([run], ClusterParams())
    assert "resumes" not in capsys.readouterr().out


@pytest.mark.slow
def test_runs_are_trained_tracked_and_never_repeated(
    prepared: Path, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = plan()
    cluster = ClusterParams()
    assert "runs: 2" in describe(runs, load_params())

    # the first attempt dies in the middle of the second pair
    original = Training.train_epoch

    def dies(self: Training, epoch: int, **options: Any) -> dict[str, float]:
        if epoch == 2 and self.step.views.counts[1] == 34:
            raise RuntimeError("the machine is gone")
        return original(self, epoch, **options)

    monkeypatch.setattr(Training, "train_epoch", dies)
    with pytest.raises(UserError, match=r"1 of 2 runs failed: ucdir art-real-life s0.*the machine is gone"):
        train_all(runs, cluster)
    assert [run.done for run in runs] == [True, False]
    assert len(runs[1].history()) == 2
    assert not (runs[0].folder / "state.pt").exists(), "a finished run needs no state"
    finished = (runs[0].folder / "done.json").stat().st_mtime_ns

    monkeypatch.setattr(Training, "train_epoch", original)
    capsys.readouterr()
    train_all(runs, cluster)
    assert (runs[0].folder / "done.json").stat().st_mtime_ns == finished
    printed = capsys.readouterr().out
    assert f"finished before: ucdir art-photo s0 ({runs[0].folder.name})\n" in printed
    assert "resumes after epoch 2 of 4" in printed
    train_all(runs, cluster)  # nothing left to do

    # undisturbed, the second pair ends alike
    other = PairRun(**{**runs[1].__dict__, "folder": prepared / "runs/other", "key": "undisturbed"})
    train_all([other], cluster)
    assert other.history()[3]["train/loss_total"] == pytest.approx(
        runs[1].history()[3]["train/loss_total"], rel=0
    )
    one, two = (load_state(run.folder / "last.pt")["state_dict"] for run in (runs[1], other))
    assert all(torch.equal(one[key], two[key]) for key in one)

    materialise(runs[1], prepared / "results")
    assert {p.name for p in (prepared / "results/art-real-life-s0").iterdir()} == {
        "last.pt",
        "best.pt",
        "run.json",
    }

    client = MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name = 'ucir/shapes'")
    tracked = client.search_runs([experiment.experiment_id], "tags.seed = '0'")
    assert len(tracked) == 3
    for run in tracked:
        assert run.info.status == "FINISHED"
        assert run.data.tags["method"] == "ucdir"
        assert run.data.tags["pair"] in {"art-photo", "art-real-life"}
        assert run.data.params["lr"] == "0.01"
        for metric in ("train/loss_total", "val/P_at_2", "val/mAP_at_All"):
            points = client.get_metric_history(run.info.run_id, metric)
            assert [point.step for point in points] == [0, 1, 2, 3]


def test_a_cluster_that_does_not_answer_is_named(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there"):
        connect(ClusterParams(num_workers=1), "sqlite:///x.db")


def test_what_does_not_fit_the_cluster_is_refused_with_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    gpu = {"use_gpu": True, "cpus_per_worker": 2}
    assert at_once(ClusterParams(num_workers=1, use_gpu=False), "a training") == 8
    assert at_once(ClusterParams(num_workers=3, use_gpu=False, cpus_per_worker=2), "a training") == 1
    assert at_once(ClusterParams(num_workers=1, **gpu, gpus_per_worker=0.5), "a training") == 4
    assert at_once(ClusterParams(num_workers=9, at_once=3), "a training") == 3  # it may grow
    with pytest.raises(UserError, match=r"a training asks the cluster for 10 CPU where it has 8 and 5 GPU"):
        at_once(ClusterParams(num_workers=5, **gpu), "a training")
    halves = {"num_workers": 2, "gpus_per_worker": 0.5}
    with pytest.raises(UserError, match="gpus_per_worker: two workers of one training cannot share a GPU"):
        checked(ClusterParams, halves, "params.yaml", "cluster")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_asked_to_stop_keeps_the_epoch_that_it_is_in(
    prepared: Path,
    store: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    run, undisturbed = plan(methods__ucdir__shapes__batch_size=4)[:1] * 2
    original = Training.train_epoch

    def asked(self: Training, epoch: int, **options: Any) -> dict[str, float]:
        if epoch == 1 and not state.exists():
            raise AssertionError("the first epoch's state is missing")
        if epoch == 1 and load_state(state)["epoch"] == 0:
            os.kill(os.getpid(), number)
        return original(self, epoch, **options)

    state = run.folder / "state.pt"
    monkeypatch.setattr(Training, "train_epoch", asked)
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train_all([run], ClusterParams())
    assert signal.getsignal(number) == handler
    kept = load_state(state)
    assert (kept["epoch"], kept["midway"]["step"], len(run.history())) == (1, 1, 1)
    train_all([run], ClusterParams())
    assert "resumes after epoch 1 of 4 and step 1 of the next" in capsys.readouterr().out
    alone = PairRun(**{**undisturbed.__dict__, "folder": prepared / "runs/alone", "key": "alone"})
    monkeypatch.setattr(Training, "train_epoch", original)
    train_all([alone], ClusterParams())
    one, two = (load_state(r.folder / "last.pt")["state_dict"] for r in (run, alone))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_run_of_one_step_an_epoch_stops_when_it_is_asked(
    prepared: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = plan(methods__ucdir__shapes__batch_size=22)[:1]  # of 28 pictures
    original = Training.train_epoch

    def asked(self: Training, epoch: int, **options: Any) -> dict[str, float]:
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, epoch, **options)

    monkeypatch.setattr(Training, "train_epoch", asked)
    with pytest.raises(KeyboardInterrupt):
        train_all([run], ClusterParams())
    assert load_state(run.folder / "state.pt")["epoch"] == 1
    assert len(run.history()) == 2


def test_a_full_disk_costs_nothing_but_the_epoch(
    prepared: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = plan()
    original = torch.save

    def full(state: Any, file: Any) -> None:
        if state.get("epoch") == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"2 of 2 runs failed.*state.pt: the disk is full: make room"):
        train_all(runs, ClusterParams())
    assert [len(run.history()) for run in runs] == [2, 2]
    assert not list(Path("runs").rglob("*.unfinished"))
    monkeypatch.setattr(torch, "save", original)
    train_all(runs, ClusterParams())
    assert all(run.done for run in runs)


def test_curves_may_be_of_some_queries_and_the_last_epoch_is_of_all(prepared: Path) -> None:
    (run,) = plan()[:1]
    train_all([run], ClusterParams())
    (few,) = plan(datasets__shapes__evaluate__curve_queries=1)[:1]
    assert few.key == run.key, "it changes no training"
    few = PairRun(**{**few.__dict__, "folder": prepared / "runs/few"})
    train_all([few], ClusterParams())
    every, some = ([entry["val/P_at_2"] for entry in r.history()] for r in (run, few))
    assert some[-1] == every[-1]
    assert some[:-1] != every[:-1]
    assert {value % 25 for value in some[:-1]} == {0}, "one query of each direction and two places"


@pytest.mark.parametrize("why", ["a long epoch", "a machine leaves"])
def test_a_state_is_kept_in_the_middle_of_an_epoch(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr("ucir.runs.reporter.KEEP_SECONDS", -1 if why == "a long epoch" else 1000)
    monkeypatch.setattr("ucir.runs.reporter.LOOK_SECONDS", -1)
    (run,) = plan(methods__ucdir__shapes__batch_size=4)[:1]
    reporter = RunReporter(run, leaving=lambda: why == "a machine leaves")
    progress = epochs(run.new_training(choose_device(ClusterParams())), reporter)
    next(progress)
    monkeypatch.setattr(Training, "check_finite", lambda *given: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        next(progress)
    kept = load_state(run.folder / "state.pt")
    assert (kept["epoch"], kept["midway"]["step"]) == (1, 28 // 4 - 1)
    assert len(run.history()) == 1


@pytest.mark.slow
@pytest.mark.xdist_group("ray")  # these share a cluster, see `ray_cluster`
def test_runs_at_once_outlive_a_killed_worker_and_a_spoilt_run(
    prepared: Path, store: str, ray_cluster: str
) -> None:
    """On Ray, one worker each: the killed one goes on from its last epoch, the spoilt one fails alone."""
    good = plan(methods__ucdir__shapes__epochs=30)[:1]
    spoilt = plan(methods__ucdir__shapes__lr=1e30)[:1]

    def kill_one() -> None:
        state = good[0].folder / "state.pt"
        while not state.exists():
            time.sleep(0.02)
        for process in psutil.process_iter(["cmdline"]):
            if any(str(good[0].folder / "lock") == file.path for file in open_files(process)):
                process.kill()
                killed.append(len(good[0].history()))

    killed: list[int] = []
    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(UserError, match=r"1 of 2 runs failed: ucdir art-photo s0 .NotFinite.*fault.json"):
        train_all([*good, *spoilt], ClusterParams(num_workers=1))
    killer.join()
    assert len(killed) == 1
    assert 0 < killed[0] < 30
    assert [len(run.history()) for run in good] == [30]
    assert not spoilt[0].done
    alone = PairRun(**{**good[0].__dict__, "folder": prepared / "runs/alone", "key": "alone"})
    train_all([alone], ClusterParams())
    one, two = (load_state(run.folder / "last.pt")["state_dict"] for run in (good[0], alone))
    assert all(torch.equal(one[key], two[key]) for key in one)
    client = MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name = 'ucir/shapes'")
    tracked = client.search_runs([experiment.experiment_id], f"tags.run_key = '{good[0].key}'")
    points = client.get_metric_history(tracked[0].info.run_id, "epoch")
    assert [point.step for point in points] == list(range(30)), "a point twice, or one missing"


def open_files(process: psutil.Process) -> list[Any]:
    """Of a process that may be gone by now."""
    try:
        return process.open_files() if process.pid != os.getpid() else []
    except psutil.Error:
        return []


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_two_workers_store_the_features_that_one_process_does(prepared: Path, ray_cluster: str) -> None:
    block = load_params().datasets["shapes"]
    embedder = embedder_of(block, "shapes", torch.device("cpu"))
    computes = {"here": embed_here, "ray": embed_on_cluster(ClusterParams(num_workers=2, cpus_per_worker=1))}
    stored = {}
    for name, compute in computes.items():
        embed(embedder, FEATURES / name, "key", compute, lambda done, total: None)
        stored[name] = {path.name: path.read_bytes() for path in (FEATURES / name).iterdir()}
    assert len(stored["here"]) == 10, "plain, views and hashes of three domains, and what they are of"
    assert stored["ray"] == stored["here"]


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_two_workers_index_what_one_process_does(
    tmp_path: Path, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "many", per_class=12)
    monkeypatch.chdir(tmp_path)  # workers are elsewhere
    source = Path("many")
    (source / "art/cross/broken.png").write_bytes(b"no picture")
    model = tiny_model()
    here = update_index(source, tmp_path / "here", model)

    def on_ray(embedder: FileEmbedder) -> Compute:
        return embed_on_ray(embedder, ClusterParams(num_workers=2, use_gpu=False))

    there = update_index(source, tmp_path / "there", model, compute=on_ray)
    assert (there.state, there.count, there.bad) == (here.state, here.count, 1)
    rows = [np.load(tmp_path / name / f"rows-{here.state}.npy") for name in ("here", "there")]
    assert np.array_equal(*rows)
    assert left_out(tmp_path / "there") == left_out(tmp_path / "here")
    archive = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", source))
    with pytest.raises(UserError, match="workers read folders alone"):
        update_index(archive, tmp_path / "zip", model, compute=on_ray)
