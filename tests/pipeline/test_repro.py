"""`dvc repro` for real, on a tiny study: what runs, what runs again, what survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import ROOT, make_images, run_python, run_stage, tiny_params, write_params
from ucir.cluster.launch import train_all
from ucir.config.cluster import ClusterParams
from ucir.config.load import load_params
from ucir.models.checkpoints import load_state
from ucir.runs.run import PairRun, plan_runs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workspace")]

EPOCHS = 25
"""Of the run that is killed: long enough to be met in the middle."""


@dataclass(frozen=True)
class Killed:
    """What a killed `dvc repro` left, and what the next one printed."""

    left: list[Path]
    """Folders of unfinished runs."""
    printed: str


@pytest.fixture(scope="module")
def killed(workspace: Path) -> Killed:
    """The first `dvc repro` is killed in the middle of the training, the second finishes everything."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"],
        cwd=workspace,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def states() -> list[Path]:
        return list((workspace / "runs").glob("*-ucdir-*/state.pt"))

    deadline = time.monotonic() + 240
    while not states() or load_state(states()[0])["epoch"] < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = [state.parent for state in states() if not (state.parent / "done.json").exists()]
    printed = dvc(workspace, "exp", "run", "-S", "methods.ucdir.shapes.entropy_weight=0.7")
    commit(workspace)
    return Killed(left, printed)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A clone of the project's pipeline around a tiny data set; nothing is run yet."""
    folder = tmp_path_factory.mktemp("workspace")
    shutil.copytree(ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "ucir").symlink_to(ROOT / "ucir")
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copyfile(ROOT / name, folder / name)
    make_images(folder / "images")
    params = tiny_params("images")
    params["datasets"]["shapes"]["pairs"] = ["art-photo"]
    params["methods"]["ucdir"]["shapes"] |= {"epochs": EPOCHS, "entropy_weight": 0.7}
    write_params(folder, params)
    shutil.copyfile(empty_store, folder / "mlflow.db")
    git(folder, "init", "-q")
    run_python("-m", "dvc", "init", "-q", cwd=folder)
    shutil.copyfile(ROOT / ".dvc/config", folder / ".dvc/config")
    run_python("-m", "dvc", "remote", "add", "-d", "store", str(folder.parent / "store"), cwd=folder)
    commit(folder)
    return folder


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x")


def environment() -> dict[str, str]:
    """Stages call `python`: this one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}


def dvc(folder: Path, *arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def stages_run(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def change(folder: Path, key: str, value: object) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    block = params
    *blocks, last = key.split(".")
    for name in blocks:
        block = block[name]
    block[last] = value
    write_params(folder, params)


def test_a_killed_repro_goes_on_and_ends_as_an_undisturbed_one(
    workspace: Path, killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stages_run(killed.printed) == [
        "train@shapes-closed-ucdir",
        "evaluate@shapes-closed-ucdir",
        "report",
    ]
    assert "resumes after epoch" in killed.printed
    assert "finished before" not in killed.printed
    monkeypatch.chdir(workspace)
    (run,) = plan_runs(load_params(), "shapes", "closed", "ucdir")
    assert [run.folder.resolve()] == killed.left
    alone = PairRun(**{**run.__dict__, "folder": workspace / "runs/alone", "key": "alone"})
    train_all([alone], ClusterParams())
    one, two = (load_state(folder / "last.pt")["state_dict"] for folder in (run.folder, alone.folder))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_second_repro_does_nothing_and_a_weight_changes_the_training_alone(
    workspace: Path, killed: Killed
) -> None:
    assert stages_run(dvc(workspace, "repro")) == []
    before = (workspace / "params.yaml").read_text()
    change(workspace, "methods.ucdir.shapes.entropy_weight", 0.8)
    assert sorted(json.loads(dvc(workspace, "status", "--json"))) == [
        "code",  # it checks the file
        "evaluate@shapes-closed-ucdir",
        "train@shapes-closed-ucdir",
    ]
    change(workspace, "clutser", {"num_workers": 1})
    refused = dvc(workspace, "repro", check=False)
    assert "params.yaml: clutser: unknown key; did you mean 'cluster'" in refused
    assert stages_run(refused) == ["code"]
    (workspace / "params.yaml").write_text(before)


def test_the_report_stands_and_shows_every_part(workspace: Path, killed: Killed) -> None:
    page = (workspace / "reports/report.html").read_text()
    rows = ("untrained", "frozen", "centred", "pca", "pretrained", "ucdir")
    for part in (*rows, "art → photo", "photo → art", "t-SNE", "<svg", "P@2"):
        assert part in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", ""), "the page must need nothing else"
    lines = (workspace / "reports/results.csv").read_text().splitlines()
    # (five rows before training + ucdir last + ucdir best) x (2 directions + their mean) x 11 metrics
    assert len(lines) == 1 + 7 * 3 * 11
    assert "**shapes, closed: P@2" in (workspace / "reports/results.md").read_text()


def test_prepare_keeps_what_it_has_decoded(workspace: Path, killed: Killed) -> None:
    kept = workspace / "data/packs/shapes/unfinished"
    new = workspace / "images/art/circle/new.png"
    new.write_bytes(b"no image, and one of 23 is too many")
    output = dvc(workspace, "repro", "--single-item", "prepare@shapes", check=False)
    assert "1 of 23 files are bad" in output
    assert (kept / "earlier.json").exists(), "DVC must not clear the stage's folder (persist)"
    new.unlink()
    assert stages_run(dvc(workspace, "repro", "--single-item", "prepare@shapes")) == ["prepare@shapes"]
    assert not kept.exists()


def test_the_cache_takes_no_space_and_a_stage_by_hand_does_not_write_into_it(
    workspace: Path, killed: Killed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (weights,) = workspace.glob("results/shapes/closed/ucdir/train/*/last.pt")
    for file in (weights, *workspace.glob("data/start/shapes/*.pt"), workspace / "reports/report.html"):
        assert file.stat().st_nlink > 1
    assert any(weights.samefile(file) for file in workspace.glob("runs/*/last.pt"))
    monkeypatch.chdir(workspace)
    for stage in ("train", "evaluate"):
        run_stage(monkeypatch, stage, "shapes-closed-ucdir")
    cached = [file for file in workspace.glob(".dvc/cache/files/md5/*/*") if file.suffix != ".dir"]
    assert len(cached) > 20
    for file in cached:
        assert hashlib.md5(file.read_bytes()).hexdigest() == file.parent.name + file.name
    assert stages_run(dvc(workspace, "repro")) == []


def test_dvcs_own_commands_know_the_scores(workspace: Path, killed: Killed) -> None:
    """Also in a fresh clone."""
    scores = "results/shapes/closed/ucdir/metrics.json"
    assert "art>photo.seed_0.last.P_at_2" in dvc(workspace, "metrics", "diff", "--all")
    shown = dvc(workspace, "exp", "show", "--json")
    assert scores in shown
    assert '"error": {' not in shown
    shutil.copytree(workspace / "images/art", workspace / "data/mine")
    dvc(workspace, "add", "data/mine")
    commit(workspace)
    dvc(workspace, "push")
    fresh = workspace.parent / "fresh"
    git(workspace.parent, "clone", "-q", str(workspace), str(fresh))
    dvc(fresh, "pull")
    assert (fresh / scores).read_bytes() == (workspace / scores).read_bytes()
    assert (fresh / "data/mine/circle/0.png").exists(), "or an experiment elsewhere would have no pictures"
    assert "P_at_2" in dvc(fresh, "metrics", "show")
    assert "failed" not in dvc(workspace, "gc", "--workspace", "--force")
    assert (workspace / scores).exists()
