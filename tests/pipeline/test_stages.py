"""Mistakes stop a stage at once, with one line that names the fault and the remedy."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import pipeline
from tests.conftest import ROOT, run_stage, tiny_params, write_params
from ucir import cli
from ucir.errors import UserError

Stage = Callable[..., None]


@pytest.fixture
def stage(project: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Call a stage's main as DVC's command would."""

    return partial(run_stage, monkeypatch)


def refused(stage: Stage, *command: str) -> str:
    with pytest.raises(UserError) as caught:
        stage(*command)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()
    return str(caught.value)


def test_a_typo_in_a_method_stops_the_first_stage_with_one_line(project: Path) -> None:
    params = tiny_params("images")
    params["methods"]["ucdir"]["shapes"]["lrr"] = 1
    write_params(project, params)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.prepare", "shapes"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    expected = "error: params.yaml: methods.ucdir.shapes.lrr: unknown key; did you mean 'lr'?\n"
    assert done.stderr == expected


def test_what_is_compiled_is_kept_also_where_an_image_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucir.cli.run_main", lambda app: None)
    for begin in (cli.main, lambda: importlib.reload(pipeline)):
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        begin()
        assert not sys.dont_write_bytecode
        assert "PYTHONDONTWRITEBYTECODE" not in os.environ


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no folder", "images: no such folder"),
        ("one domain", "1 domain folder(s) (art); cross-domain retrieval needs at least two"),
        ("no domain", "pair 'art-photo': no domain 'photo'"),
        ("empty class", "art/cross: empty class folder"),
        ("broken file", "1 of 23 files are bad, more than pack.max_bad_share = 0.01 (art/cross/x.png: not"),
        ("read-only", "data/packs/shapes: cannot be written to"),
    ],
)
def test_bad_data_stops_prepare(project: Path, stage: Stage, fault: str, message: str) -> None:
    images = project / "images"
    if fault == "no folder":
        shutil.rmtree(images)
    elif fault == "one domain":
        shutil.rmtree(images / "photo")
        shutil.rmtree(images / "real-life")
    elif fault == "no domain":
        shutil.rmtree(images / "photo")
    elif fault == "empty class":
        shutil.rmtree(images / "art/cross")
        (images / "art/cross").mkdir()
    elif fault == "broken file":
        (images / "art/cross/x.png").write_bytes(b"no image")
    else:  # the tests may run as root, whom no mode stops
        (project / "data").write_text("a file where a folder should be")
    assert message in refused(stage, "prepare", "shapes")
    assert not (project / "data/packs/shapes/pack.json").exists()


def test_stages_in_the_wrong_order_name_the_right_one(
    project: Path,
    stage: Stage,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "no finished pack; run `uv run dvc repro prepare` first" in refused(stage, "pretrain", "shapes")
    stage("prepare", "shapes")
    printed = capsys.readouterr().out
    assert "84 pictures of 3 domains at 20 px" in printed
    assert "28 pictures, 3 classes" in printed
    assert "no start weights" in refused(stage, "train", "shapes-closed-ucdir")
    params = tiny_params("images")
    params["datasets"]["shapes"]["start"] = {
        "encoder": {"trunk": {"convnet": {"width": 4}}},
        "checkpoint": "moco.pt",
    }
    write_params(project, params)
    assert "moco.pt: no such checkpoint" in refused(stage, "pretrain", "shapes")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("shapes-closed-udcir",)])
def test_a_stage_by_itself_says_what_it_takes(stage: Stage, arguments: tuple[str, ...]) -> None:
    message = refused(stage, "train", *arguments)
    assert message.startswith(
        "stage train: `uv run dvc repro train` runs all of it; by itself it takes one of: "
    )
    assert "shapes-closed-ucdir" in message
